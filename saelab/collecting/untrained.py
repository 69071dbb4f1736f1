"""`harvest_untrained`: feature store of an untrained SAE on the same tokens as an existing store, as a baseline."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from saelab.collecting.harvesting import SHARD_TOKENS, ValueDtype, _Job, _run, require_harvested
from saelab.collecting.reader import Reader
from saelab.collecting.sources import Batch, TextSource
from saelab.lm.forwards import FORWARD_TOKENS
from saelab.lm.masks import TokenMask
from saelab.lm.models import Model
from saelab.lm.tokens import PADDING, Tokens
from saelab.sae.matching import match_model
from saelab.sae.sae import SAE
from saelab.sae.untrained import make_untrained
from saelab.stores.corpus import StoredText
from saelab.stores.features import FeatureStore

SAMPLE_TOKENS = 8_192  # tokens to which the untrained SAE's location and scale are fitted
EVERYTHING = TokenMask(special=False)


@torch.no_grad()
def harvest_untrained(
    store: FeatureStore,
    sae: SAE,
    model: Model,
    out: str | Path,
    *,
    seed: int = 0,
    dtype: ValueDtype = "float16",
    allow_mismatch: bool = False,
    progress: bool = True,
    resume: bool = True,
) -> FeatureStore:
    """Feature store with the same rows as `store`, encoded by an untrained SAE of the same shape as `sae`.

    The untrained SAE has the same configuration and number of active codes (`make_untrained`). The result is the
    baseline for `compare(..., untrained=)`, `label_by_rules(..., untrained=)`, `explain_features` and
    `probe_features(..., untrained=)`. The text is the store's own; the cost is a forward pass over it. An interrupted
    call continues where it stopped when it is made again.

    Args:
        store: feature store of the trained SAE.
        sae: the SAE that `store` was harvested with.
        model: its language model.
        out: folder of the new store.
        seed: seed of the untrained SAE's weights.
        dtype: dtype of the stored values, as in `harvest`.
        allow_mismatch: accept a model, weight processing or hook point that differs from the SAE's training.
        progress: whether to show a progress bar.
        resume: continue an interrupted call; False deletes what `out` holds and starts over.

    Raises:
        ValueError: as `harvest`, for an SAE that is not the store's, and for a store whose text has gaps in its rows.
    """
    require_harvested(store, sae)
    place = match_model(sae, model, store.provenance.hook_point or None, EVERYTHING, allow_mismatch)
    tokens = rebuild_tokens(store.text)
    reader = Reader.make(
        model, tokens, place.hook_points[: 1 if sae.cfg.d_out is None else 2], EVERYTHING, torch.float32
    )
    source = _SameRows(reader, tokens, max(1, FORWARD_TOKENS // tokens.ctx_len), store.places)
    x = source.sample(SAMPLE_TOKENS)
    targets = x[reader.hook_points[1]] if sae.cfg.d_out is not None and len(reader.hook_points) > 1 else None
    made = make_untrained(sae, x[reader.hook_points[0]], targets, seed=seed)
    made.name_or_path = f"untrained, seed {seed}"
    with _Job.start(made, reader.hook_points[0], source, Path(out), dtype, SHARD_TOKENS, resume) as job:
        _run([] if job.done else [job], source, progress)
        return FeatureStore.load(out)


def rebuild_tokens(text: StoredText) -> Tokens:
    """Rows of token ids as the model read them, from the text of a store; padded on the right. ValueError where the
    text has gaps.
    """
    positions = np.asarray(text.positions).astype(np.int64)
    begins = np.append(True, positions[1:] <= positions[:-1]) if len(positions) else np.zeros(0, bool)
    row, ctx_len = np.cumsum(begins) - 1, int(positions.max(initial=0)) + 1
    ids = np.zeros((int(row[-1]) + 1, ctx_len), np.int32)
    doc_ids = np.full_like(ids, PADDING)
    ids[row, positions], doc_ids[row, positions] = text.token_ids, text.doc_ids
    first = positions[begins]
    if (first != 0).any() or (positions != np.arange(len(row)) - np.flatnonzero(begins)[row]).any():
        raise ValueError("A store must hold its text in whole rows to be encoded again, got gaps; harvest from tokens.")
    return Tokens(ids=torch.from_numpy(ids), doc_ids=torch.from_numpy(doc_ids), source="a feature store")


class _SameRows(TextSource):
    """A text source restricted to the tokens at given indices of the text."""

    def __init__(self, reader: Reader, tokens: Tokens, n_seq: int, places: np.ndarray) -> None:
        super().__init__(reader, tokens, n_seq)
        self.kept = torch.zeros(tokens.n_tokens, dtype=torch.bool)
        self.kept[torch.from_numpy(np.asarray(places).astype(np.int64))] = True

    def read(self, start: int) -> Batch:
        """Rows of the batch that the store has, from one forward pass."""
        batch = super().read(start)
        here = self.kept[batch.places]
        acts = {name: x[here.to(x.device)] for name, x in batch.acts.items()}
        return replace(batch, acts=acts, places=batch.places[here])

    def sample(self, n_tokens: int) -> dict[str, Tensor]:
        """Activations of at most `n_tokens` rows by hook point, from the beginning of the text."""
        parts: list[dict[str, Tensor]] = []
        for start in range(0, self.n_units, self.size):
            parts.append(dict(self.read(start).acts))
            if sum(len(next(iter(part.values()))) for part in parts) >= n_tokens:
                break
        return {name: torch.cat([part[name] for part in parts])[:n_tokens].float() for name in parts[0]}

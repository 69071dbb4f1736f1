"""`write_delphi`: write a feature store as a latent cache that delphi (EleutherAI) reads, to run its explainers and
scorers.
"""

from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Int32, Integer

from saelab.stores.features import FeatureStore
from saelab.stores.files import replace_folder, save_tensors, write_json
from saelab.stores.names import as_file_name, shareable

CONFIG = "config.json"
N_SPLITS = 5
SMALLEST = 1e-5  # delphi omits codes up to this magnitude
SHORT, WIDE = np.uint16, np.uint32


def write_delphi(
    store: FeatureStore, folder: str | Path, *, n_splits: int = N_SPLITS, pad_id: int | None = None
) -> Path:
    """Write `{hook point}/{first}_{last}.safetensors` and `config.json` into a folder; returns the hook point's folder.

    Each file has the codes of a range of latents: `locations` (n, 3) of sequence, position and latent counted from the
    file's first, in text order, `activations` in float16, and all `tokens`. Codes of |z| <= 1e-5 are left out, as
    delphi does; negative ones are written, though delphi itself counts only positive ones as active. Tokens that the
    mask removed are included, without codes.

    Args:
        store: the feature store.
        folder: folder in which the hook point's folder is made.
        n_splits: number of files to divide the latents into.
        pad_id: token id that fills up sequences shorter than the longest; None requires all to be of one length.

    Raises:
        ValueError: where sequences are of different lengths and there is no `pad_id`.
    """
    if not 1 <= n_splits <= store.d_sae:
        raise ValueError(f"`n_splits` must be in 1..{store.d_sae}, got {n_splits}.")
    origin = store.provenance
    place = Path(folder) / as_file_name(origin.hook_point)
    tokens, places = _lay_out(store, pad_id)
    ids = torch.from_numpy(tokens.astype(np.int64))
    ends = np.linspace(0, store.d_sae, n_splits + 1).astype(int).tolist()
    config = {
        "dataset_repo": shareable(origin.text),
        "dataset_split": "",
        "dataset_name": "",
        "batch_size": 1,
        "ctx_len": int(tokens.shape[1]),
        "n_tokens": int(tokens.size),
        "n_splits": n_splits,
        "model_name": shareable(origin.model),
    }
    with replace_folder(place, last=CONFIG, stale=(CONFIG, "[0-9]*_[0-9]*.safetensors")) as temp:
        for first, stop in pairwise(ends):
            locations, values = _locate(store, first, stop, places, tokens.shape[1])
            tensors = {"locations": locations, "activations": values, "tokens": ids}
            save_tensors(temp / f"{first}_{stop - 1}.safetensors", tensors)
        write_json(temp / CONFIG, config)
    return place


def _lay_out(store: FeatureStore, pad_id: int | None) -> tuple[Int32[np.ndarray, "n_seq ctx_len"], np.ndarray]:
    """Token ids in rows, and the index of each token of the text there: sequence * ctx_len + position."""
    text = store.text
    positions = np.asarray(text.positions, np.int64)
    begins = np.flatnonzero(np.diff(positions, prepend=positions[:1] + 1) <= 0)
    sequence = np.searchsorted(begins, np.arange(len(positions)), side="right") - 1
    ctx_len = int(positions.max()) + 1
    n_short = len(begins) * ctx_len - len(positions)
    if n_short and pad_id is None:
        raise ValueError(
            f"`pad_id` must be given, as sequences are of different lengths and delphi's are all of {ctx_len}, got "
            "none; pass the tokenizer's padding token."
        )
    tokens = np.full((len(begins), ctx_len), pad_id or 0, np.int32)
    tokens[sequence, positions] = text.token_ids
    return tokens, sequence * ctx_len + positions


def _locate(
    store: FeatureStore, first: int, stop: int, places: Integer[np.ndarray, "n"], ctx_len: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Locations and values of the codes of a range of latents, in text order."""
    rows = store.columns(first, stop).tocsr()
    rows.sort_indices()
    at = np.repeat(places[store.places], np.diff(rows.indptr))
    kept = np.abs(rows.data) > SMALLEST
    triples = np.stack([at // ctx_len, at % ctx_len, rows.indices], 1)[kept]
    narrow = triples.max(initial=0) < 2**16
    locations = torch.from_numpy(triples.astype(SHORT if narrow else WIDE))
    return locations, torch.from_numpy(rows.data[kept].astype(np.float16))

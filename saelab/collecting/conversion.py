"""`convert_delphi`: convert a latent cache written by delphi into a feature store."""

from pathlib import Path
from typing import Any

import torch
from jaxtyping import Integer
from torch import Tensor

from saelab.collecting.delphi import DelphiCache, PlacedCodes
from saelab.collecting.harvesting import SHARD_TOKENS
from saelab.collecting.writers import ShardWriter, claim_folder
from saelab.stores.features import FeatureStore, save_statistics
from saelab.stores.manifest import FeatureManifest
from saelab.stores.packing import pack_codes
from saelab.stores.progress import hidden
from saelab.stores.statistics import measure


def convert_delphi(
    folder: str | Path,
    out: str | Path,
    *,
    tokens: Integer[Tensor, "n_seq ctx_len"] | None = None,
    tokenizer: Any = None,
    hook_point: str | None = None,
    shard_tokens: int = SHARD_TOKENS,
    progress: bool = True,
    resume: bool = True,
) -> FeatureStore:
    """Feature store made in `out` from the latent cache that delphi (EleutherAI) wrote for one hook point.

    Codes keep sign and value to the bit (delphi has left out |z| <= 1e-5); zeros are dropped. Every token is a row, as
    delphi has no token mask, and every sequence is a document, as it does not record documents. Memory use is the
    tokens and the codes of `shard_tokens` rows or one sequence. An interrupted call continues where it stopped when it
    is made again, and ends with the same bytes.

    Args:
        folder: folder of the hook point: `config.json` and files `{first}_{last}.safetensors`.
        out: folder of the feature store.
        tokens: (n_seq, ctx_len) ids that were cached; needed where the cache was saved without them.
        tokenizer: gives the strings of tokens; None shows them as <id>.
        hook_point: name of the hook point in TransformerLens' spelling; None is delphi's name.
        shard_tokens: rows per shard, rounded down to whole sequences.
        progress: whether to show a progress bar.
        resume: continue an interrupted call; False deletes what `out` holds and starts over.

    Raises:
        FileNotFoundError: where there is no cache.
        ValueError: naming the file, where latents are missing or occur twice, for locations outside the tokens, values
            that are not finite and tokens that differ; and for an `out` begun with other arguments.

    >>> convert_delphi("latents/layers.2", "store")
    Traceback (most recent call last):
    FileNotFoundError: `folder` must be the folder of one hook point in a latent cache, got latents/layers.2. ...
    """
    if shard_tokens < 1:
        raise ValueError(f"`shard_tokens` must be at least 1, got {shard_tokens}.")
    cache, out = DelphiCache.open(Path(folder), tokens, hook_point), Path(out)
    n_seq = max(1, shard_tokens // cache.tokens.ctx_len)
    request = cache.request() | {"tokenizer": getattr(tokenizer, "name_or_path", None), "shard_sequences": n_seq}
    with claim_folder(out, request, FeatureManifest, lambda: _begin(cache, request), resume) as manifest:
        if not manifest.complete:
            buffers = _Packer(cache.d_sae), _Packer(cache.d_sae)
            with ShardWriter(out, manifest, n_seq * cache.tokens.ctx_len, buffers) as writer:
                _write_shards(cache, writer, n_seq, progress)
                _finish(cache, writer, tokenizer)
        return FeatureStore.load(out)


def _begin(cache: DelphiCache, request: dict[str, Any]) -> FeatureManifest:
    return FeatureManifest(
        d_sae=cache.d_sae,
        dtype=cache.dtype,
        sae={"config": {"d_sae": cache.d_sae}, "delphi": cache.config},
        source=f"delphi's cache of {cache.config['model_name']} at {cache.hook_point}",
        request=request,
        provenance=cache.origin().to_dict(),
    )


def _write_shards(cache: DelphiCache, writer: ShardWriter, n_seq: int, progress: bool) -> None:
    """Write a shard for every `n_seq` sequences."""
    from tqdm.auto import tqdm

    ctx_len, n_all = cache.tokens.ctx_len, len(cache.tokens)
    bar = {"total": n_all * ctx_len, "initial": writer.next_seq * ctx_len, "unit": " tokens", "unit_scale": True}
    with tqdm(**bar, disable=hidden(progress)) as shown:
        for first in range(writer.next_seq, n_all, n_seq):
            stop = min(first + n_seq, n_all)
            codes = cache.read(first, stop)
            writer.add(codes, len(codes.places), stop - first, {})
            shown.update(len(codes.places))


def _finish(cache: DelphiCache, writer: ShardWriter, tokenizer: Any) -> None:
    """Write remaining rows, the text and the statistics."""
    writer.flush()
    manifest = writer.manifest
    assert isinstance(manifest, FeatureManifest)
    store = FeatureStore(writer.folder, manifest, manifest.check_shards(writer.folder))
    orders = ((arrays["feature_offsets"], arrays["feature_values"]) for _, arrays in store.shards())
    files = save_statistics(writer.folder, measure(cache.d_sae, orders))
    writer.finish(cache.origin(), files=files | cache.text(tokenizer).save(writer.folder))


class _Packer:
    """Codes of the next shard, added all at once."""

    def __init__(self, d_sae: int) -> None:
        self._d_sae = d_sae

    def add(self, reading: PlacedCodes, start: int, stop: int) -> None:
        """Set the shard's codes."""
        assert (start, stop) == (0, len(reading.places))
        self._codes = reading

    def take(self) -> dict[str, Tensor]:
        """The codes ordered by token and by feature."""
        codes = self._codes
        packed = pack_codes(codes.offsets, codes.latents, codes.values, self._d_sae) | {"places": codes.places}
        return {name: torch.from_numpy(array) for name, array in packed.items()}

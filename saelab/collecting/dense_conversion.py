"""`convert_activations`: convert activation caches of SAELens or OpenMOSS into a folder as `collect` writes it."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from saelab.collecting.caches import Cache, Piece, describe_files, open_cache
from saelab.collecting.collection import SHARD_TOKENS
from saelab.collecting.reader import Reading, require_finite
from saelab.collecting.writers import FolderWriter, claim_folder, load_all
from saelab.lm.masks import TokenMask
from saelab.stores.activations import Activations
from saelab.stores.manifest import ActivationsManifest, dtype_name
from saelab.stores.progress import hidden
from saelab.stores.provenance import Provenance


def convert_activations(
    folder: str | Path,
    out: str | Path,
    *,
    model: str,
    hook_point: str | None = None,
    weight_processing: str = "none",
    shard_tokens: int = SHARD_TOKENS,
    progress: bool = True,
    resume: bool = True,
) -> Activations:
    """Activations in `out`, converted from a cache that SAELens (Arrow files) or OpenMOSS (chunks) wrote.

    Rows keep their dtype and value, token ids theirs; tokens that OpenMOSS' masks exclude are dropped, SAELens has no
    mask. Every sequence counts as a document. Memory use is a piece of the cache and a shard. An interrupted call
    continues where it stopped when it is made again. Needs pyarrow for SAELens' files.

    Args:
        folder: folder of the cache.
        out: folder to write to.
        model: name of the model, which the caches do not record.
        hook_point: which hook point to convert; needed where the cache holds several.
        weight_processing: processing of the model's weights, "none" or "folded".
        shard_tokens: rows per shard.
        progress: whether to show a progress bar.
        resume: continue an interrupted call; False deletes what `out` holds and starts over.

    Raises:
        FileNotFoundError: where there is no cache.
        ValueError: naming the file, for one that is damaged and for values that are not finite; and for an `out` begun
            with other arguments.
    """
    if shard_tokens < 1:
        raise ValueError(f"`shard_tokens` must be at least 1, got {shard_tokens}.")
    cache, out = open_cache(Path(folder), hook_point), Path(out)
    first = cache.read(0)
    request: dict[str, Any] = {"files": describe_files(cache.paths), "hook_point": cache.hook_point, "model": model}
    request |= {"weight_processing": weight_processing, "shard_tokens": shard_tokens}
    origin = _describe(cache, first, model, weight_processing)
    fresh = ActivationsManifest(
        d_in={cache.hook_point: first.acts.shape[-1]},
        dtype=dtype_name(first.acts.dtype),
        request=request,
        provenance=origin.to_dict(),
    )
    with claim_folder(out, request, ActivationsManifest, lambda: fresh, resume) as manifest:
        if manifest.complete:
            return load_all(out, [cache.hook_point])[cache.hook_point]
        writer = FolderWriter(out, manifest, shard_tokens)
        with writer:
            return _run(cache, writer, origin, progress)


def _run(cache: Cache, writer: FolderWriter, origin: Provenance, progress: bool) -> Activations:
    from tqdm.auto import tqdm

    for i in tqdm(range(writer.next_seq, len(cache.sizes)), unit=" pieces", disable=hidden(progress)):
        writer.add_reading(_to_reading(cache, i), 1)
    done = replace(origin, n_tokens=writer.n_tokens, removed=dict(writer.removed))
    return writer.open({cache.hook_point: done})[cache.hook_point]


def _to_reading(cache: Cache, i: int) -> Reading:
    """Rows of a piece that are not masked."""
    piece = cache.read(i)
    index = piece.keep.flatten().nonzero().squeeze(1)
    n_seq, ctx_len = piece.token_ids.shape
    positions = torch.arange(ctx_len, dtype=torch.int32).expand(n_seq, ctx_len)
    documents = torch.arange(n_seq, dtype=torch.int32)[:, None].expand(n_seq, ctx_len) + sum(cache.sizes[:i])
    columns = {"token_ids": piece.token_ids, "doc_ids": documents, "positions": positions}
    rows = piece.acts.flatten(0, 1)[index]
    require_finite(cache.hook_point, rows)
    kept = {name: column.flatten()[index] for name, column in columns.items()}
    return Reading({cache.hook_point: rows}, kept, index, {"masked": piece.keep.numel() - len(index)})


def _describe(cache: Cache, first: Piece, model: str, weight_processing: str) -> Provenance:
    return Provenance(
        model=model,
        weight_processing=weight_processing,
        hook_point=cache.hook_point,
        text="unknown",
        tokens_sha256="",
        mask=TokenMask(special=False).to_dict(),
        dtype=dtype_name(first.acts.dtype),
        ctx_len=first.token_ids.shape[1],
        n_tokens=0,
        seed=None,
        versions={},
    )

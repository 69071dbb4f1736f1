"""`collect`: activations of a text at hook points, in memory or in a folder of shards."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from saelab.collecting.reader import DEFAULT_MASK, Reader
from saelab.collecting.writers import (
    FolderWriter,
    MemoryWriter,
    Writer,
    claim_folder,
    load_all,
)
from saelab.lm.forwards import forward_size
from saelab.lm.masks import TokenMask
from saelab.lm.models import Model
from saelab.lm.tokens import Tokens
from saelab.stores.activations import Activations
from saelab.stores.manifest import ActivationsManifest, dtype_name
from saelab.stores.progress import hidden

SHARD_TOKENS = 32768


def collect(
    model: Model,
    tokens: Tokens,
    hook_points: str | Sequence[str],
    out: str | Path | None = None,
    *,
    dtype: torch.dtype | None = None,
    mask: TokenMask = DEFAULT_MASK,
    batch_size: int | None = None,
    shard_tokens: int = SHARD_TOKENS,
    progress: bool = True,
    resume: bool = True,
) -> Activations | dict[str, Activations]:
    """Activations at one hook point, or a dictionary of several, from one forward pass for all of them.

    With `out` they are written to a folder, shard by shard, each atomically. An interrupted call continues where it
    stopped when it is made again, and ends with the same bytes; a finished one is opened at once. What each rule of the
    mask removed is in `provenance.removed`.

    Args:
        model: the language model.
        tokens: rows of token ids to run it on.
        hook_points: name of a hook point, or several.
        out: folder to write to; None keeps the activations in memory.
        dtype: dtype of the stored rows; None is the model's.
        mask: tokens to keep, the same for all hook points: a token whose norm is an outlier at one is dropped at all.
        batch_size: sequences per forward pass; None is about 4096 tokens' worth.
        shard_tokens: rows per shard.
        progress: whether to show a progress bar.
        resume: continue an interrupted call; False deletes what `out` holds and starts over.

    Raises:
        ValueError: for a wrong hook point, NaN or infinity, a mask that keeps nothing, and a folder begun with other
            arguments.
        OSError: where the disk is full or not writable.

    >>> model = sl.tiny_model()
    >>> tokens = sl.tokenize(model, ["Once upon a time there was a cat."] * 8, ctx_len=16)
    >>> acts = sl.collect(model, tokens, "blocks.1.hook_resid_post", progress=False)
    >>> acts.d_in
    32
    """
    names = [hook_points] if isinstance(hook_points, str) else list(hook_points)
    if shard_tokens < 1:
        raise ValueError(f"`shard_tokens` must be at least 1, got {shard_tokens}.")
    reader = Reader.make(model, tokens, names, mask, dtype)
    n_seq = forward_size(tokens, batch_size)
    if out is None:
        reader = reader.calibrated(tokens, n_seq)
        memory = MemoryWriter(reader.count_rows(tokens), reader.widths(tokens), reader.dtype)
        acts = _run(reader, tokens, memory, n_seq, progress)
    else:
        acts = _collect_to_folder(reader, tokens, Path(out), n_seq, shard_tokens, progress, resume)
    return acts[hook_points] if isinstance(hook_points, str) else acts


def _collect_to_folder(
    reader: Reader, tokens: Tokens, folder: Path, n_seq: int, shard_tokens: int, progress: bool, resume: bool
) -> dict[str, Activations]:
    request = reader.request(tokens) | {"batch_size": n_seq, "shard_tokens": shard_tokens}

    def begin() -> ActivationsManifest:
        calibrated = reader.calibrated(tokens, n_seq)
        return ActivationsManifest(
            d_in=calibrated.widths(tokens),
            dtype=dtype_name(calibrated.dtype),
            request=request,
            provenance=calibrated.origins(tokens, 0, {})[calibrated.hook_points[0]].to_dict(),
            median_norms=calibrated.median_norms,
        )

    with claim_folder(folder, request, ActivationsManifest, begin, resume) as manifest:
        if manifest.complete:
            return load_all(folder, list(reader.hook_points))
        reader = replace(reader, median_norms=manifest.median_norms)
        writer = FolderWriter(folder, manifest, shard_tokens)
        with writer:
            return _run(reader, tokens, writer, n_seq, progress)


def _run(reader: Reader, tokens: Tokens, writer: Writer, n_seq: int, progress: bool) -> dict[str, Activations]:
    from tqdm.auto import tqdm

    first = writer.next_seq
    done = tokens[:first].n_tokens if first else 0
    with tqdm(total=tokens.n_tokens, initial=done, unit=" tokens", unit_scale=True, disable=hidden(progress)) as bar:
        for start in range(first, len(tokens), n_seq):
            batch = tokens[start : start + n_seq]
            writer.add_reading(reader.read(batch), len(batch))
            bar.update(batch.n_tokens)
    return writer.open(reader.origins(tokens, writer.n_tokens, dict(writer.removed)))

"""`convert_activations`: convert activation caches of SAELens or OpenMOSS into a folder as `collect` writes it.

SAELens' Arrow files and OpenMOSS' chunks are read in the pieces in which they were written.
"""

import re
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int32
from torch import Tensor

from saelab.collecting.collection import SHARD_TOKENS
from saelab.collecting.reader import ForwardRows
from saelab.collecting.writers import FolderWriter, claim_folder, load_all
from saelab.lm.hooks import require_finite
from saelab.lm.masks import TokenMask
from saelab.sae.formats.sources import read_tensors
from saelab.stores.activations import Activations
from saelab.stores.files import checksum, inside
from saelab.stores.jobs import hidden
from saelab.stores.manifest import ActivationsManifest, Provenance, dtype_name
from saelab.stores.validation import read_json

STATE = "state.json"
TOKENS = "token_ids"
CHUNK = re.compile(r"(?:shard-(\d+)-)?chunk-(\d+)\.(safetensors|pt)")


@dataclass(frozen=True, eq=False)
class Piece:
    """Activations and token ids of some sequences."""

    acts: Float[Tensor, "n_seq ctx_len d_in"]
    """activations in the dtype of the cache, or float16 for one of 8 bits, all of whose values it has"""
    token_ids: Int32[Tensor, "n_seq ctx_len"]
    """token ids"""
    keep: Bool[Tensor, "n_seq ctx_len"]
    """tokens that are not masked"""


@dataclass(frozen=True, eq=False)
class Cache(ABC):
    """Base class of caches of one hook point's activations."""

    hook_point: str
    """name of the hook point"""
    paths: list[Path]
    """its files"""
    sizes: list[int]
    """number of sequences in each piece"""

    @abstractmethod
    def read(self, i: int) -> Piece:
        """Activations and token ids of piece i."""


def open_cache(folder: Path, hook_point: str | None) -> Cache:
    """Cache in a folder, its format detected from its files; FileNotFoundError where there is none."""
    if (folder / STATE).is_file():
        return SAELensCache.open(folder, hook_point)
    place = folder / inside(hook_point) if hook_point is not None and (folder / inside(hook_point)).is_dir() else folder
    if place.is_dir() and any(CHUNK.fullmatch(path.name) for path in place.iterdir()):
        return OpenMOSSCache.open(place, hook_point or place.resolve().name)
    raise FileNotFoundError(
        f"`folder` must hold activations that SAELens ({STATE}) or OpenMOSS (chunk-*.safetensors) cached, got "
        f"{folder}, which has neither; check its name."
    )


@dataclass(frozen=True, eq=False)
class SAELensCache(Cache):
    """A folder written by `datasets`: Arrow record batches, a column of activations (n, ctx_len, d_in), one of token
    ids.

    Ids are read as the integers they are, whatever the dtype of the activations: as float16, 50256 would be 50240.
    """

    batches: list[Any]
    """record batches, memory-mapped"""

    @classmethod
    def open(cls, folder: Path, hook_point: str | None) -> "SAELensCache":
        """Cache in a folder; ValueError where several columns could be the activations, or token ids are missing."""
        listed = read_json(folder / STATE)
        try:
            paths = [folder / inside(entry["filename"]) for entry in listed["_data_files"]]
        except (KeyError, TypeError):
            raise ValueError(
                f"{folder / STATE} must list data files, as `datasets` writes it. Was it edited?"
            ) from None
        batches = [batch for path in paths for batch in _open_stream(path)]
        names = list(batches[0].schema.names) if batches else []
        columns = [name for name in names if name != TOKENS]
        if TOKENS not in names:
            raise ValueError(
                f"{folder} must have a column `{TOKENS}` next to the activations, got {names}; cache again."
            )
        if hook_point is None and len(columns) == 1:
            hook_point = columns[0]
        if hook_point is None or hook_point not in columns:
            raise ValueError(
                f"`hook_point` must be a column of {folder}, got {hook_point!r}. Choose from {columns[:5]}."
            )
        return cls(hook_point, paths, [batch.num_rows for batch in batches], batches)

    def read(self, i: int) -> Piece:
        """Activations and token ids of record batch i."""
        ids = _to_array(self.batches[i].column(TOKENS), 1)
        acts = _to_array(self.batches[i].column(self.hook_point), 2)
        token_ids = torch.from_numpy(ids.astype(np.int32))
        return Piece(torch.from_numpy(acts.copy()), token_ids, torch.ones(token_ids.shape, dtype=torch.bool))


def _open_stream(path: Path) -> list[Any]:
    """Record batches of an Arrow file, memory-mapped."""
    from pyarrow import ArrowInvalid, ipc, memory_map

    if not path.is_file():
        raise FileNotFoundError(f"{path} must be there, as {STATE} lists it. Copy it too.")
    try:
        return list(ipc.open_stream(memory_map(str(path))))
    except (ArrowInvalid, OSError) as error:
        raise ValueError(f"{path} must be a whole Arrow stream ({error}). Was it cut off? Copy it again.") from None


def _to_array(column: Any, depth: int) -> np.ndarray:
    """Nested lists of equal length as an array with `depth` further axes."""
    inner = getattr(column, "storage", column)
    shape = [len(inner)]
    for _ in range(depth):
        lengths = set(inner.value_lengths().to_pylist())
        if len(lengths) != 1:
            raise ValueError(f"Sequences must be of one length, got {sorted(lengths)[:5]}; cache again.")
        shape.append(lengths.pop())
        inner = inner.flatten()
    return np.asarray(inner.to_numpy(zero_copy_only=False)).reshape(shape)


@dataclass(frozen=True, eq=False)
class OpenMOSSCache(Cache):
    """A folder of chunks: `activation` (n_seq, ctx_len, d_in) or (n, d_in), `tokens`, and masks of valid tokens."""

    @classmethod
    def open(cls, folder: Path, hook_point: str) -> "OpenMOSSCache":
        """Cache in a folder, its chunks ordered by shard and chunk number."""
        named = [(CHUNK.fullmatch(path.name), path) for path in folder.iterdir()]
        paths = [path for _, _, path in sorted((int(m[1] or 0), int(m[2]), path) for m, path in named if m)]
        shapes = [read_tensors(path).get("tokens", torch.empty(0)).shape for path in paths]
        return cls(hook_point, paths, [shape[0] if len(shape) > 1 else 1 for shape in shapes])

    def read(self, i: int) -> Piece:
        """Activations and token ids of chunk i; a chunk without a sequence axis is read as one sequence."""
        held = read_tensors(self.paths[i])
        if missing := [name for name in ("activation", "tokens") if not isinstance(held.get(name), Tensor)]:
            raise ValueError(f"{self.paths[i]} must hold `activation` and `tokens`, got none for {missing}.")
        acts, tokens = held["activation"], held["tokens"]
        if acts.ndim == 2:
            acts, tokens = acts[None], tokens[None]
        if acts.ndim != 3 or tuple(acts.shape[:2]) != tuple(tokens.shape):
            raise ValueError(
                f"{self.paths[i]}: `activation` must be (*tokens, d_in), got {tuple(acts.shape)} and tokens "
                f"{tuple(tokens.shape)}."
            )
        if acts.is_floating_point() and acts.dtype.itemsize == 1:
            acts = acts.to(torch.float16)
        keep = torch.ones(tokens.shape, dtype=torch.bool)
        for name in ("mask", "attention_mask"):
            if isinstance(held.get(name), Tensor):
                keep &= held[name].reshape(tokens.shape).bool()
        return Piece(acts, tokens.to(torch.int32), keep)


def describe_files(paths: list[Path]) -> dict[str, str]:
    """Checksum of each file, by name."""
    return {path.name: checksum(path) for path in paths}


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

    Rows keep their value and dtype (8-bit floats become float16), token ids theirs; tokens that OpenMOSS' masks exclude
    are dropped, SAELens has no mask. Every sequence counts as a document. Memory use is a piece of the cache and a
    shard. An interrupted call continues where it stopped when it is made again. Needs pyarrow for SAELens' files.

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


def _to_reading(cache: Cache, i: int) -> ForwardRows:
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
    return ForwardRows({cache.hook_point: rows}, kept, index, {"masked": piece.keep.numel() - len(index)})


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

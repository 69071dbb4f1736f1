"""`embed`: one row a document, from a text encoder, a function or vectors, with the document as the row's payload.

A folder is written as by `collect`: in shards, each atomically, and continued where an interrupted call stopped.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from saelab.collecting.documents import GivenDocuments, hash_values
from saelab.collecting.reader import fingerprint
from saelab.collecting.writers import ShardWriter, claim_folder
from saelab.lm.hooks import require_finite
from saelab.lm.masks import TokenMask
from saelab.lm.model_checks import Model, sketch_weights
from saelab.lm.text_encoders import (
    OWN,
    PooledEncoder,
    find_versions,
    is_pretrained,
    is_sentence_transformer,
    make_pooled_encoder,
)
from saelab.lm.unwrapped import evaluating
from saelab.stores.activations import Activations
from saelab.stores.jobs import hidden
from saelab.stores.manifest import ActivationsManifest, Provenance, dtype_name
from saelab.stores.payload import PayloadKinds, pack_strings
from saelab.stores.row_columns import FolderRows, MemoryRows
from saelab.stores.sharing import shareable

SHARD_ROWS = 8192
FUNCTION_BATCH = 256
"""Documents a function gets at a time."""
CHANGED = 0.05
"""Relative distance from which a vector is another: rounding in half precision moves it less."""


def embed(
    encoder: Any,
    documents: Any = None,
    out: str | Path | None = None,
    *,
    pooling: str | None = None,
    images: Any = None,
    normalize: bool = False,
    hook_point: str | None = None,
    mask: TokenMask | None = None,
    tokenizer: Any = None,
    max_tokens: int | None = None,
    batch_size: int | None = None,
    dtype: torch.dtype = torch.float32,
    shard_rows: int = SHARD_ROWS,
    separator: str | None = "<|endoftext|>",
    field: str = "text",
    progress: bool = True,
    resume: bool = True,
) -> Activations:
    """Activations with one row a document, and the document beside it: its text, the path of its image, or an image.

    `fit` and `harvest` take them as those of `collect`; a token is then a document. With `out` they are written to a
    folder, shard by shard. An interrupted call continues where it stopped when it is made again, and ends with the same
    bytes; a finished one is opened at once, of a function after its first vector was compared. In memory are some
    thousand documents, and the texts where they are a list.

    Args:
        encoder: what makes rows of documents: a model of sentence-transformers or of Hugging Face, one of
            `load_model`, the folder of any of them, a function from a part of `documents` to vectors (n, d), or the
            vectors themselves, an array or tensor.
        documents: texts, as in `saelab.lm.documents.read_documents`, none of them blank in a list; of a function or
            vectors anything with a length. Texts are shown with their rows; numbers are shown if they are images.
        out: folder to write to; None keeps the rows in memory.
        pooling: how the vectors of tokens become one: mean, last, max or cls; None is the encoder's own, which
            models of sentence-transformers have.
        images: shown with each row: pixels (n, height, width), with or without channels as the last axis, or paths of
            PNG, JPEG or GIF files, which then take the place of texts.
        normalize: scale each row to norm 1.
        hook_point: where a model of `load_model` is read.
        mask: tokens of such a model that are pooled; None leaves out special ones.
        tokenizer: of a Hugging Face model; None loads that of its folder.
        max_tokens: tokens of a document that are read; None is as many as the model reads.
        batch_size: documents per forward pass; None is about 4096 tokens' worth.
        dtype: dtype of the stored rows.
        shard_rows: rows per shard.
        separator: line that divides the documents of a text file; None makes each line a document.
        field: name of the column or key that holds the text.
        progress: whether to show a progress bar.
        resume: continue an interrupted call; False deletes what `out` holds and starts over.

    Raises:
        ValueError: for an encoder without pooling where none is named, blank documents, texts or images of another
            number than rows, rows that are not finite or of another width, and a folder begun with other arguments.
        TypeError: for what is no encoder, and documents that are no texts.
        OSError: where the disk is full or not writable.

    >>> acts = sl.embed(torch.eye(3), ["a cat", "a dog", "a hen"], progress=False)
    >>> acts, acts.texts
    (Activations(3 documents, d_in 3, torch.float32 at vectors), ['a cat', 'a dog', 'a hen'])
    """
    if shard_rows < 1:
        raise ValueError(f"`shard_rows` must be at least 1, got {shard_rows}.")
    if not dtype.is_floating_point:
        raise ValueError(f"`dtype` must be a floating dtype such as torch.bfloat16, got {dtype}.")
    vectors = _as_vectors(encoder)
    given = {"pooling": pooling, "hook_point": hook_point, "mask": mask, "tokenizer": tokenizer}
    source = GivenDocuments.read(documents, images, separator, field, None if vectors is None else len(vectors))
    rows: _Embedder
    if vectors is not None or _is_function(encoder):
        if wrong := [name for name, value in (given | {"max_tokens": max_tokens}).items() if value is not None]:
            raise ValueError(f"`{wrong[0]}` goes with an encoder of texts; leave it out for a function or vectors.")
        rows = _OwnVectors(encoder if vectors is None else vectors, batch_size or FUNCTION_BATCH)
    else:
        rows = _Encoded(
            make_pooled_encoder(
                encoder, pooling, hook_point=hook_point, mask=mask, tokenizer=tokenizer, max_tokens=max_tokens,
                batch_size=batch_size,
            )
        )  # fmt: skip
        source.require_texts()
    job = EmbeddingJob(source, rows, normalize, dtype)
    return job.in_memory(progress) if out is None else job.in_folder(Path(out), shard_rows, progress, resume)


def _as_vectors(encoder: Any) -> Tensor | None:
    """The rows, where they are given in place of an encoder; ValueError where they are no matrix of numbers."""
    if isinstance(encoder, np.ndarray):
        encoder = torch.from_numpy(np.ascontiguousarray(encoder))
    if not isinstance(encoder, Tensor):
        return None
    if encoder.ndim != 2 or 0 in encoder.shape or encoder.is_complex():
        raise ValueError(f"Vectors must be real and of shape (n, d), got {tuple(encoder.shape)} of {encoder.dtype}.")
    return encoder.detach()


def _is_function(encoder: Any) -> bool:
    known = isinstance(encoder, Model) or is_sentence_transformer(encoder) or is_pretrained(encoder)
    return callable(encoder) and not known


class _Embedder:
    """What makes rows of documents, and what the rows depend on."""

    name: str
    place: str
    pooling: str = OWN
    mask: dict[str, Any]
    max_tokens: int | None = None
    weight_processing: str = "none"
    backend: str | None = None
    versions: dict[str, str]
    sketch: tuple[float, ...] | None = None

    def read(self, documents: Any, start: int) -> Tensor:
        """The vectors of documents, the first of which is document `start`."""
        raise NotImplementedError

    def request(self) -> dict[str, Any]:
        """What determines the vectors, as a dictionary for JSON."""
        raise NotImplementedError


class _Encoded(_Embedder):
    """Vectors from a text encoder."""

    def __init__(self, encoder: PooledEncoder) -> None:
        self.encoder, self.name, self.place, self.pooling = encoder, encoder.name, encoder.place, encoder.pooling
        self.mask, self.max_tokens, self.versions = encoder.mask, encoder.max_tokens, encoder.versions
        self.weight_processing, self.backend = encoder.weight_processing, encoder.backend
        self.sketch = sketch_weights(encoder.model)

    def read(self, documents: Any, start: int) -> Tensor:
        return self.encoder.encode(documents)

    def request(self) -> dict[str, Any]:
        return self.encoder.request()


class _OwnVectors(_Embedder):
    """Vectors from a function, which gets some documents at a time, or vectors that are given."""

    def __init__(self, make: Callable[[Any], Any] | Tensor, size: int) -> None:
        self.make, self.size, self.mask = make, size, {}
        self.place = "vectors" if isinstance(make, Tensor) else "output"
        named = make if hasattr(make, "__name__") else type(make)
        self.name = "vectors" if isinstance(make, Tensor) else str(getattr(named, "__name__", "function"))
        self.versions = find_versions(("saelab", "torch"))
        self.sketch = sketch_weights(make) if isinstance(make, nn.Module) else None

    @torch.no_grad()
    def read(self, documents: Any, start: int) -> Tensor:
        n = len(documents)
        if isinstance(self.make, Tensor):
            return self.make[start : start + n].float().cpu()
        with ExitStack() as stack:
            if isinstance(self.make, nn.Module):
                stack.enter_context(evaluating(self.make))
            parts = [self._call(documents[i : i + self.size]) for i in range(0, n, self.size)]
        if len(widths := {part.shape[1] for part in parts}) > 1:
            raise ValueError(f"`encoder` must give vectors of one width, got {sorted(widths)}.")
        return torch.cat(parts)

    def _call(self, part: Any) -> Tensor:
        assert callable(self.make)
        if isinstance(self.make, nn.Module) and isinstance(part, np.ndarray):
            weight = next(self.make.parameters(), torch.empty(0))
            part = torch.from_numpy(np.ascontiguousarray(part)).to(weight.device, weight.dtype)
        found = self.make(part)
        x = found.detach() if isinstance(found, Tensor) else torch.from_numpy(np.asarray(found))
        if x.ndim != 2 or len(x) != len(part) or x.shape[1] == 0 or x.is_complex():
            raise ValueError(
                f"`encoder` must give a real vector for each of {len(part)} documents, got {x.dtype} of shape "
                f"{tuple(x.shape)}."
            )
        return x.float().cpu()

    def request(self) -> dict[str, Any]:
        told: dict[str, Any] = {"model": self.name, "place": self.place}
        if isinstance(self.make, Tensor):
            return told | {"weights": hash_values(self.make)}
        weights = dict(self.make.named_parameters()) if isinstance(self.make, nn.Module) else {}
        return told | {"weights": fingerprint(weights), "batch_size": self.size}


@dataclass(frozen=True, eq=False)
class EmbeddingJob:
    """Documents, what embeds them, and how rows are stored."""

    documents: GivenDocuments
    embedder: _Embedder
    normalize: bool
    dtype: torch.dtype

    @cached_property
    def d_in(self) -> int:
        """Width of a row, from the first document."""
        return self.first.shape[1]

    @cached_property
    def first(self) -> Float[Tensor, "1 d_in"]:
        """The vector of the first document."""
        return self.embedder.read(next(self.documents.chunks(0)).items[:1], 0)

    def in_memory(self, progress: bool) -> Activations:
        """All rows in memory."""
        shown = self.documents.payload
        buffer = DocumentBuffer(self.documents.n, self.embedder.place, self.d_in, self.dtype, shown)
        for rows in self._read(0, progress):
            buffer.add(rows, 0, len(rows.x))
        columns, texts = buffer.rows()
        return Activations(MemoryRows(columns, shown, texts), self.embedder.place, self._origin(self.documents.n))

    def in_folder(self, folder: Path, shard_rows: int, progress: bool, resume: bool) -> Activations:
        """All rows in a folder.

        Args:
            folder: the folder.
            shard_rows: rows per shard.
            progress: whether to show a progress bar.
            resume: continue what the folder holds; False starts over.
        """
        place, shown = self.embedder.place, self.documents.payload
        request = self.embedder.request() | {"documents_sha256": self.documents.sha256, "payload": shown}
        request |= {"normalize": self.normalize, "dtype": dtype_name(self.dtype), "shard_tokens": shard_rows}

        def begin() -> ActivationsManifest:
            return ActivationsManifest(
                d_in={place: self.d_in},
                dtype=dtype_name(self.dtype),
                request=request,
                provenance=self._origin(0).to_dict(),
                payload=shown,
            )

        with claim_folder(folder, request, ActivationsManifest, begin, resume) as manifest:
            if manifest.shards and isinstance(self.embedder, _OwnVectors):
                there = torch.empty(1, manifest.d_in[place], dtype=self.dtype)
                FolderRows(folder, manifest, verify=False).copy_slice(place, 0, there)
                self._require_same(there)
            if not manifest.complete:
                first, second = (DocumentBuffer(shard_rows, place, self.d_in, self.dtype, shown) for _ in range(2))
                writer = ShardWriter(folder, manifest, shard_rows, (first, second))
                with writer:
                    for rows in self._read(writer.next_seq, progress):
                        writer.add(rows, len(rows.x), len(rows.x), {})
                    writer.finish(self._origin(writer.n_tokens))
        return Activations.load(folder)

    def _require_same(self, there: Tensor) -> None:
        """Raise ValueError where a function gives another vector of the first document than the folder holds."""
        now = self._finish(self.first).float()
        if now.shape != there.shape or not (now - there).norm() <= CHANGED * there.float().norm():
            raise ValueError(
                f"`out` must have been made with this `encoder`, but '{self.embedder.name}' gives another vector of "
                "the first document than it holds. Choose another folder, or pass resume=False to start over."
            )

    def _finish(self, x: Tensor) -> Tensor:
        """Rows as they are stored."""
        return (torch.nn.functional.normalize(x, dim=1) if self.normalize else x).to(self.dtype)

    def _read(self, start: int, progress: bool) -> Iterator["EmbeddedRows"]:
        """The rows of documents from one on, which begins a part, some thousand at a time."""
        from tqdm.auto import tqdm

        total = self.documents.n
        with tqdm(total=total, initial=start, unit=" documents", unit_scale=True, disable=hidden(progress)) as bar:
            for chunk in self.documents.chunks(start):
                x = self.embedder.read(chunk.items, chunk.start)
                if x.shape[1] != self.d_in:
                    raise ValueError(f"Rows must all be as wide as the first, {self.d_in}, got {x.shape[1]}.")
                x = self._finish(x)
                require_finite(self.embedder.place, x)
                yield EmbeddedRows(x, chunk.texts, chunk.pixels)
                bar.update(len(x))

    def _origin(self, n_rows: int) -> Provenance:
        made = self.embedder
        return Provenance(
            model=shareable(made.name),
            weight_processing=made.weight_processing,
            hook_point=made.place,
            text=self.documents.source,
            tokens_sha256=self.documents.sha256,
            mask=made.mask,
            dtype=dtype_name(self.dtype),
            ctx_len=made.max_tokens,
            n_tokens=n_rows,
            seed=None,
            versions=made.versions,
            model_sketch=made.sketch,
            pooling=made.pooling,
            backend=made.backend,
        )


@dataclass(frozen=True, eq=False)
class EmbeddedRows:
    """Rows of some documents, with their texts or paths and their images."""

    x: Float[Tensor, "n d_in"]
    texts: list[str] | None
    pixels: np.ndarray | None


class DocumentBuffer:
    """Buffer of rows and payload of documents, for a shard.

    Args:
        n_rows: largest number of rows.
        place: name of the column of rows.
        d_in: width of a row.
        dtype: dtype of the rows.
        payload: what documents have to show.
    """

    def __init__(self, n_rows: int, place: str, d_in: int, dtype: torch.dtype, payload: PayloadKinds) -> None:
        self._place, self._n, self._texts = place, 0, list[str]()
        self._has_texts = not {"texts", "paths"}.isdisjoint(payload)
        self._columns = {place: torch.empty(n_rows, d_in, dtype=dtype)}
        if "pixels" in payload:
            self._columns["pixels"] = torch.empty(n_rows, *payload["pixels"], dtype=torch.uint8)

    def add(self, reading: EmbeddedRows, start: int, stop: int) -> None:
        """Append rows `start:stop` of some documents."""
        end = self._n + stop - start
        self._columns[self._place][self._n : end] = reading.x[start:stop]
        if reading.pixels is not None:
            self._columns["pixels"][self._n : end] = torch.from_numpy(reading.pixels[start:stop])
        self._texts += (reading.texts or [])[start:stop]
        self._n = end

    def rows(self) -> tuple[dict[str, Tensor], list[str]]:
        """The columns, as views, and texts added since the last call."""
        n, texts = self._n, self._texts
        self._n, self._texts = 0, []
        return {name: column[:n] for name, column in self._columns.items()}, texts

    def take(self) -> dict[str, Tensor]:
        """All rows as a shard's tensors."""
        columns, texts = self.rows()
        return columns | (pack_strings(texts) if self._has_texts else {})

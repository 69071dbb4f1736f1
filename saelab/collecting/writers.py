"""Writers of collected rows, in memory or in a folder of shards that can be resumed.

When a feature store is overwritten, labels of another SAE are moved to a file of their own.
"""

import logging
import os
import re
import shutil
import sqlite3
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from saelab.collecting.reader import ForwardRows
from saelab.stores.activations import Activations
from saelab.stores.files import is_empty, remove_leftovers, save_tensors
from saelab.stores.jobs import FolderInUse, Terminable, clear_lock, hold_folder
from saelab.stores.manifest import INT_COLUMNS, ActivationsManifest, AnyManifest, Manifest, Provenance, Shard
from saelab.stores.tensors import TensorFile
from saelab.stores.validation import read_json

BOOK = "labels.sqlite"
PATIENCE = 5.0
"""seconds to wait for another process that is writing labels"""
logger = logging.getLogger(__name__)
MANIFEST = "manifest.json"
PARTS = ".parts-"
"""A folder's hidden folder for the parts of several processes, with their number."""


def make_way(folder: Path, request: dict[str, Any]) -> None:
    """Move the labels of a store that is about to be overwritten to another file, unless the new store is of the same
    SAE.

    They go to labels-SAE.sqlite in the same folder, and return from there when that SAE is harvested again. The caller
    must hold the folder's lock.

    Raises:
        TimeoutError: where another process is writing the labels.
    """
    before = read_json(folder / "manifest.json").get("request") or {}
    if before == request or (before.get("sae") is not None and before.get("sae") == request.get("sae")):
        return
    book = folder / BOOK
    if book.is_file():
        aside = _name_free(folder, before.get("sae"))
        _rename(book, aside)
        logger.warning(
            "%s holds labels of the SAE that was harvested here before; they are no labels of this one and are kept in "
            "%s. Write them to a file with `saelab.labels.LabelStore(%r).save('labels.json')`.",
            folder,
            aside,
            str(aside),
        )
    kept = folder / _name(request.get("sae"))
    if kept.is_file():
        _rename(kept, book)
        logger.warning("%s has its labels of this SAE back, from %s.", folder, kept)


def _name(sae: object, n: int = 0) -> str:
    fingerprint = re.sub(r"[^0-9A-Za-z]", "", str(sae or "unknown"))[:16]  # no path, whatever the file holds
    return f"labels-{fingerprint}{f'-{n}' if n else ''}.sqlite"


def _name_free(folder: Path, sae: object) -> Path:
    n = 0
    while (folder / _name(sae, n)).exists():
        n += 1
    return folder / _name(sae, n)


def _rename(path: Path, new: Path) -> None:
    with _alone_with(path):
        os.replace(path, new)


@contextmanager
def _alone_with(path: Path) -> Iterator[None]:
    """Context manager that holds a database's exclusive lock, after rolling back what a killed process left
    half-written.
    """
    with closing(sqlite3.connect(path, timeout=PATIENCE, isolation_level=None)) as db:
        try:
            db.execute("BEGIN EXCLUSIVE")
        except sqlite3.OperationalError as error:
            if "locked" in str(error):
                raise TimeoutError(
                    f"{path} is being written by another process. Try again when that has ended."
                ) from None
        except sqlite3.DatabaseError:  # damaged: moved as it is
            pass
        yield


@runtime_checkable
class RowWriter(Protocol):
    """Protocol of writers, which receive the readings of successive batches of sequences."""

    next_seq: int
    n_tokens: int
    removed: Counter[str]

    def add_reading(self, reading: ForwardRows, n_seq: int) -> None:
        """Append the rows of a batch of `n_seq` sequences."""

    def open(self, origins: dict[str, Provenance]) -> dict[str, Activations]:
        """Finish writing; returns the activations by hook point."""


class MemoryWriter:
    """Keeps rows in memory, for `collect` without a folder."""

    def __init__(self, n_rows: int, widths: dict[str, int], dtype: torch.dtype) -> None:
        self.next_seq = 0
        self.n_tokens = 0
        self.removed: Counter[str] = Counter()
        self._buffer = RowBuffer(n_rows, widths, dtype)

    def add_reading(self, reading: ForwardRows, n_seq: int) -> None:
        """Append the rows of a batch."""
        n_rows = len(reading.columns["token_ids"])
        self._buffer.add(reading, 0, n_rows)
        self.n_tokens += n_rows
        self.removed.update(reading.removed)
        self.next_seq += n_seq

    def open(self, origins: dict[str, Provenance]) -> dict[str, Activations]:
        """Activations by hook point."""
        columns = self._buffer.take()
        ints = {name: columns[name] for name in INT_COLUMNS}
        return {name: Activations.from_tensor(columns[name], origin, **ints) for name, origin in origins.items()}


@runtime_checkable
class ArrayBuffer(Protocol):
    """Protocol of buffers, which hold the rows of the next shard."""

    def add(self, reading: Any, start: int, stop: int) -> None:
        """Append rows `start:stop` of a batch, or of another shard."""

    def take(self) -> dict[str, Tensor]:
        """All rows as a shard's tensors; called in the background, before rows are added again."""


class RowBuffer:
    """Buffer of dense rows, in preallocated tensors."""

    def __init__(self, n_rows: int, widths: dict[str, int], dtype: torch.dtype) -> None:
        self._columns = _allocate(n_rows, widths, dtype)
        self._n = 0

    def add(self, reading: ForwardRows | TensorFile, start: int, stop: int) -> None:
        """Append rows `start:stop` of a reading, or of another shard."""
        given = {} if isinstance(reading, TensorFile) else reading.acts | reading.columns
        for name, column in self._columns.items():
            rows = read_rows(reading, name, start, stop) if isinstance(reading, TensorFile) else given[name][start:stop]
            column[self._n : self._n + stop - start] = rows
        self._n += stop - start

    def take(self) -> dict[str, Tensor]:
        """The rows added since the last call, as views."""
        n, self._n = self._n, 0
        return {name: column[:n] for name, column in self._columns.items()}


def read_rows(shard: TensorFile, name: str, start: int, stop: int) -> Tensor:
    """Part of a tensor of a shard, memory-mapped.

    Args:
        shard: the shard's file.
        name: the tensor.
        start: first entry.
        stop: entry after the last.

    Raises:
        ValueError: a checksum differs.
    """
    shard.check(name, start, stop)
    return shard.map(name)[start:stop]


class ShardWriter:
    """Writes rows in shards of exactly `shard_tokens` (the last may be shorter), whose bytes do not depend on
    interruptions.

    The manifest is rewritten after each shard and records where to continue: the first sequence with rows outside the
    shards, and how many rows of its batch are in them already. One shard is written in the background while the next is
    filled; leaving the `with` block waits for it.
    """

    def __init__(
        self,
        folder: Path,
        manifest: Manifest,
        shard_tokens: int,
        buffers: tuple[ArrayBuffer, ArrayBuffer],
        first_tokens: int | None = None,
    ) -> None:
        """Continue a folder where its manifest ends.

        Args:
            folder: the folder, which the caller has locked.
            manifest: its manifest.
            shard_tokens: rows per shard.
            buffers: two empty buffers: one is filled while the other is written.
            first_tokens: rows of the folder's first shard, where that is shorter; None is `shard_tokens`.
        """
        self.folder, self.manifest = folder, manifest
        self.next_seq = manifest.next_seq
        self.removed = Counter(manifest.removed)
        self._to_skip = manifest.skip_rows
        self.n_tokens = manifest.n_tokens
        self._n_buffered = 0
        self._shard_tokens = shard_tokens
        self._room = shard_tokens if first_tokens is None or manifest.shards else first_tokens
        self._buffer, self._spare = buffers
        self._background = ThreadPoolExecutor(max_workers=1)
        self._pending: Future[None] | None = None
        self._signals = Terminable()

    def __enter__(self) -> "ShardWriter":
        self._signals.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, *about: Any) -> None:
        self._background.shutdown(wait=True)
        self._signals.__exit__(kind, *about)
        if kind is KeyboardInterrupt:
            raise KeyboardInterrupt(
                f"Stopped. {self.manifest.n_tokens} {self.manifest.counted} are saved in {self.folder}. "
                "Make the same call, without resume=False, to go on."
            ) from None

    def add(self, reading: Any, n_rows: int, n_seq: int, removed: dict[str, int]) -> None:
        """Append the rows of a batch that are not in the shards yet; write each shard that becomes full.

        Args:
            reading: the batch, in the form that the buffers take.
            n_rows: number of rows in it.
            n_seq: number of sequences (or other items of the source) that it covers.
            removed: number of tokens that each rule of the mask removed from it.
        """
        done, self._to_skip = self._to_skip, 0
        while done < n_rows:
            take = min(n_rows - done, self._room - self._n_buffered)
            self._buffer.add(reading, done, done + take)
            self._n_buffered += take
            self.n_tokens += take
            done += take
            if self._n_buffered == self._room and done < n_rows:
                self._flush(skip_rows=done)
        self.next_seq += n_seq
        self.removed.update(removed)
        if self._n_buffered == self._room:
            self._flush(skip_rows=0)

    def finish(self, provenance: Provenance, **changes: Any) -> None:
        """Write remaining rows, and mark the manifest complete, with further `changes` of its fields."""
        self.flush()
        changes |= {"complete": True, "removed": dict(self.removed), "provenance": provenance.to_dict()}
        changes |= {"next_seq": self.next_seq, "skip_rows": 0}  # also where the last batches have no rows
        self._save(replace(self.manifest, **changes))

    def flush(self) -> None:
        """Write remaining rows, and wait until they are written."""
        if self._n_buffered:
            self._flush(skip_rows=0)
        self._wait()

    def _flush(self, skip_rows: int) -> None:
        """Hand the buffer to the background thread, once it has written the previous one."""
        self._wait()
        place = {"next_seq": self.next_seq, "skip_rows": skip_rows, "removed": dict(self.removed)}
        self._pending = self._background.submit(self._write, self._buffer, self._n_buffered, place)
        self._buffer, self._spare = self._spare, self._buffer
        self._n_buffered, self._room = 0, self._shard_tokens

    def _wait(self) -> None:
        if self._pending is not None:
            self._pending.result()  # re-raises errors of the background thread

    def _write(self, buffer: ArrayBuffer, n_tokens: int, place: dict[str, Any]) -> None:
        file, tensors = shard_name(len(self.manifest.shards)), buffer.take()
        crc32 = save_tensors(self.folder / file, tensors)
        shard = Shard(file=file, n_tokens=n_tokens, crc32=crc32)
        self._save(replace(self.manifest.with_shard(shard, tensors), **place))

    def _save(self, manifest: Manifest) -> None:
        manifest.save(self.folder)
        self.manifest = manifest  # set after saving, so that on Ctrl-C it does not list more than is on disk


class FolderWriter(ShardWriter):
    """Writes activations to a folder of shards, for `collect`.

    Args:
        folder: the folder.
        manifest: what the folder holds so far.
        shard_tokens: rows of a shard.
        first_tokens: rows of the folder's first shard, where that is shorter; None is `shard_tokens`.
    """

    def __init__(
        self, folder: Path, manifest: ActivationsManifest, shard_tokens: int, first_tokens: int | None = None
    ) -> None:
        first, second = (RowBuffer(shard_tokens, manifest.d_in, getattr(torch, manifest.dtype)) for _ in range(2))
        super().__init__(folder, manifest, shard_tokens, (first, second), first_tokens)

    def add_reading(self, reading: ForwardRows, n_seq: int) -> None:
        """Append the rows of a batch."""
        self.add(reading, len(reading.columns["token_ids"]), n_seq, reading.removed)

    def open(self, origins: dict[str, Provenance]) -> dict[str, Activations]:
        """Write remaining rows and open the folder: activations by hook point."""
        self.finish(next(iter(origins.values())))
        return load_all(self.folder, list(origins))


def shard_name(i: int) -> str:
    """File name of a folder's i-th shard."""
    return f"shard-{i:05d}.safetensors"


def load_all(folder: Path, hook_points: list[str]) -> dict[str, Activations]:
    """Activations of a finished folder, by hook point."""
    return {name: Activations.load(folder, name) for name in hook_points}


@contextmanager
def claim_folder(
    folder: Path,
    request: dict[str, Any],
    kind: type[AnyManifest],
    begin: Callable[[], AnyManifest],
    resume: bool,
    n_parts: int = 1,
) -> Iterator[AnyManifest]:
    """Context manager that yields the manifest of a folder: that of an unfinished or finished call with the same
    arguments, or a new one, already written.

    The folder is locked in the block, unless the call was finished, as then nothing will be written. With
    `resume=False` the new manifest replaces the old one atomically before old files are deleted, so that a killed
    process leaves no partial store that looks complete.

    Args:
        folder: folder to write to.
        request: arguments that determine the folder's contents; they must equal those that an existing manifest
            records.
        kind: class of the manifest.
        begin: makes the manifest of a new folder.
        resume: continue or open what the folder holds; False replaces it.
        n_parts: number of processes that write the folder together.

    Raises:
        ValueError: where the folder holds something else than requested, or parts of another number of processes, and
            where another process is writing there.
    """
    if resume and (folder / MANIFEST).is_file() and kind.load(folder).complete:
        clear_lock(folder)
        _clear_parts(folder)
        yield _resume(folder, request, kind)
    else:
        with hold_folder(folder):
            yield _claim_held(folder, request, kind, begin, resume, n_parts)


def _claim_held(
    folder: Path,
    request: dict[str, Any],
    kind: type[AnyManifest],
    begin: Callable[[], AnyManifest],
    resume: bool,
    n_parts: int,
) -> AnyManifest:
    remove_leftovers(folder)
    described = folder / MANIFEST
    if described.is_file() and resume:
        manifest = _resume(folder, request, kind)
        _check_parts(folder, n_parts)
    elif _is_of_kind(described, kind) or is_empty(folder, kind.allowed_files):
        if described.is_file() and kind.allowed_files:
            make_way(folder, request)
        remove_parts(folder)  # before the manifest, so that they are never taken for its own
        manifest = begin()
        manifest.save(folder)  # fails early where the folder is not writable
    else:
        raise ValueError(f"`out` must be empty or hold what `{kind.verb}` wrote, got {folder}. Choose another folder.")
    if not manifest.complete:
        _remove_strangers(folder, manifest)
    return manifest


def remove_parts(folder: Path) -> None:
    """Delete what several processes wrote on the way to a folder; for whoever holds it."""
    for parts in folder.glob(f"{PARTS}*"):
        shutil.rmtree(parts, ignore_errors=True)


def _clear_parts(folder: Path) -> None:
    """Delete the parts of a finished folder that killed processes left, where it may be written to."""
    if any(folder.glob(f"{PARTS}*")):
        with suppress(OSError, FolderInUse), hold_folder(folder):
            remove_parts(folder)


def _check_parts(folder: Path, n_parts: int) -> None:
    for n in (parts.name.removeprefix(PARTS) for parts in folder.glob(f"{PARTS}*")):
        if n != f"{n_parts}":
            raise ValueError(
                f"{folder} was begun by {n} processes and can be resumed only by as many, got {n_parts}. Start {n}, "
                "choose another folder, or pass resume=False to delete what is there and start over."
            )


def _is_of_kind(path: Path, kind: type[Manifest]) -> bool:
    """Whether a manifest can be read and is of this kind."""
    if not path.is_file():
        return False
    found = read_json(path)
    return isinstance(found, dict) and found.get("kind") == kind.kind


def _resume(folder: Path, request: dict[str, Any], kind: type[AnyManifest]) -> AnyManifest:
    manifest = kind.load(folder)
    before = manifest.request
    if differing := [key for key in request | before if not _is_same(before.get(key), request.get(key))]:
        what = "; ".join(f"{key}: there {before.get(key)!r}, now {request.get(key)!r}" for key in differing)
        raise ValueError(
            f"{folder} can be resumed only with the arguments it was begun with, got others ({what}). "
            "Use those, choose another folder, or pass resume=False to delete what is there and start over."
            + (EARLIER if differing == ["weights"] else "")
        )
    manifest.check_shards(folder)
    return manifest


EARLIER = (
    " If the weights are the same and the folder was begun by saelab before its fingerprints were those of either back "
    "end, load the model with backend='transformer_lens' to resume it."
)


def _is_same(before: Any, now: Any) -> bool:
    return bool(before == now or (before is not None and before == getattr(now, "earlier", None)))


def _remove_strangers(folder: Path, manifest: Manifest) -> None:
    """Delete files of a manifest's kind that it does not list: those of a store that was here before."""
    own = {shard.file for shard in manifest.shards}
    for pattern in manifest.files_of_kind:
        for file in folder.glob(pattern):
            if file.name not in own:
                file.unlink()


def _allocate(n_rows: int, widths: dict[str, int], dtype: torch.dtype) -> dict[str, Tensor]:
    columns = {name: _empty(n_rows * d_in, dtype).view(n_rows, d_in) for name, d_in in widths.items()}
    return columns | {name: _empty(n_rows, torch.int32) for name in INT_COLUMNS}


def _empty(n: int, dtype: torch.dtype) -> Tensor:
    """Like `torch.empty`, but allocated by NumPy, which requests huge pages: the first write is several times
    faster.
    """
    return torch.from_numpy(np.empty(n * dtype.itemsize, np.uint8)).view(dtype)

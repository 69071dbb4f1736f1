"""Where collected rows go: into memory, or into a folder of shards that can be resumed."""

from collections import Counter
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from saelab.collecting.reader import Reading
from saelab.stores.activations import Activations
from saelab.stores.files import read_json, remove_leftovers, save_tensors
from saelab.stores.manifest import INT_COLUMNS, Manifest, Shard
from saelab.stores.provenance import Provenance


@runtime_checkable
class Writer(Protocol):
    """Takes the readings of successive batches of sequences."""

    next_seq: int
    n_tokens: int
    removed: Counter[str]

    def add(self, reading: Reading, n_seq: int) -> None: ...

    def finish(self, origins: dict[str, Provenance]) -> dict[str, Activations]: ...


class MemoryWriter:
    """Rows in preallocated tensors."""

    def __init__(self, n_rows: int, widths: dict[str, int], dtype: torch.dtype) -> None:
        self.next_seq = 0
        self.n_tokens = 0
        self.removed: Counter[str] = Counter()
        self._columns = _allocate(n_rows, widths, dtype)

    def add(self, reading: Reading, n_seq: int) -> None:
        """Append a reading."""
        for name, column in (reading.acts | reading.columns).items():
            self._columns[name][self.n_tokens : self.n_tokens + len(column)] = column
        self.n_tokens += len(reading.columns["token_ids"])
        self.removed.update(reading.removed)
        self.next_seq += n_seq

    def finish(self, origins: dict[str, Provenance]) -> dict[str, Activations]:
        """The activations by hook point."""
        columns = {name: column[: self.n_tokens] for name, column in self._columns.items()}
        ints = {name: columns[name] for name in INT_COLUMNS}
        return {name: Activations.from_tensor(columns[name], origin, **ints) for name, origin in origins.items()}


class FolderWriter:
    """Rows in shards of exactly `shard_tokens` (the last may be shorter), whose bytes do not depend on interruptions.

    The manifest is rewritten after each shard and says where to go on: the first sequence with rows outside the shards,
    and how many rows of its batch are in them already. One shard is written in the background while the next is filled;
    leaving the `with` block waits for it.
    """

    def __init__(self, folder: Path, manifest: Manifest, shard_tokens: int) -> None:
        self.folder, self.manifest = folder, manifest
        self.next_seq = manifest.next_seq
        self.removed = Counter(manifest.removed)
        self._to_skip = manifest.skip_rows
        self.n_tokens = manifest.n_tokens
        self._n_buffered = 0
        self._shard_tokens = shard_tokens
        self._buffer, self._spare = (
            _allocate(shard_tokens, manifest.d_in, getattr(torch, manifest.dtype)) for _ in range(2)
        )
        self._background = ThreadPoolExecutor(max_workers=1)
        self._pending: Future[None] | None = None

    def __enter__(self) -> "FolderWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self._background.shutdown(wait=True)

    def add(self, reading: Reading, n_seq: int) -> None:
        """Append the rows that are not in the shards yet; write each shard that becomes full."""
        columns = reading.acts | reading.columns
        n_rows = len(reading.columns["token_ids"])
        done, self._to_skip = self._to_skip, 0
        while done < n_rows:
            take = min(n_rows - done, self._shard_tokens - self._n_buffered)
            for name, column in columns.items():
                self._buffer[name][self._n_buffered : self._n_buffered + take] = column[done : done + take]
            self._n_buffered += take
            self.n_tokens += take
            done += take
            if self._n_buffered == self._shard_tokens and done < n_rows:
                self._flush(skip_rows=done)
        self.next_seq += n_seq
        self.removed.update(reading.removed)
        if self._n_buffered == self._shard_tokens:
            self._flush(skip_rows=0)

    def finish(self, origins: dict[str, Provenance]) -> dict[str, Activations]:
        """Write what is left and open the folder."""
        if self._n_buffered:
            self._flush(skip_rows=0)
        self._wait()
        self._save(complete=True, removed=dict(self.removed), provenance=next(iter(origins.values())).to_dict())
        return load_all(self.folder, list(origins))

    def _flush(self, skip_rows: int) -> None:
        """Hand the buffer over to be written, once the one before is."""
        self._wait()
        tensors = {name: column[: self._n_buffered] for name, column in self._buffer.items()}
        place = {"next_seq": self.next_seq, "skip_rows": skip_rows, "removed": dict(self.removed)}
        self._pending = self._background.submit(self._write, tensors, place)
        self._buffer, self._spare = self._spare, self._buffer
        self._n_buffered = 0

    def _wait(self) -> None:
        if self._pending is not None:
            self._pending.result()  # raises what writing raised

    def _write(self, tensors: dict[str, Tensor], place: dict[str, Any]) -> None:
        file = f"shard-{len(self.manifest.shards):05d}.safetensors"
        crc32 = save_tensors(self.folder / file, tensors)
        shard = Shard(file=file, n_tokens=len(tensors["token_ids"]), crc32=crc32)
        self._save(shards=(*self.manifest.shards, shard), **place)

    def _save(self, **changes: Any) -> None:
        manifest = replace(self.manifest, **changes)
        manifest.save(self.folder)
        self.manifest = manifest  # only now, so that after Ctrl-C it does not promise more than is on disk


def load_all(folder: Path, hook_points: list[str]) -> dict[str, Activations]:
    """The activations of a finished folder by hook point."""
    return {name: Activations.load(folder, name) for name in hook_points}


def resume_folder(folder: Path, request: dict[str, Any]) -> Manifest | None:
    """The manifest in `folder`, or None where nothing is; ValueError when it holds something else than asked for."""
    if folder.is_dir():
        remove_leftovers(folder)
    if not (folder / "manifest.json").is_file():
        if folder.is_dir() and any(folder.iterdir()):
            raise ValueError(f"`out` must be empty or hold collected activations, got {folder}. Choose another folder.")
        return None
    manifest = Manifest.load(folder)
    if differing := [key for key, value in request.items() if manifest.request.get(key) != value]:
        what = "; ".join(f"{key}: there {manifest.request.get(key)!r}, now {request[key]!r}" for key in differing)
        raise ValueError(
            f"{folder} can be resumed only with the arguments it was begun with, got others ({what}). "
            "Use those, choose another folder, or pass resume=False to delete what is there and begin anew."
        )
    manifest.check_shards(folder)
    return manifest


def clear_folder(folder: Path) -> None:
    """Remove collected activations, the manifest first, so that no half of them passes for a whole; nothing else."""
    path = folder / "manifest.json"
    if path.is_file() and read_json(path).get("kind") == "activations":
        path.unlink()
        for shard in folder.glob("shard-*.safetensors"):
            shard.unlink()


def _allocate(n_rows: int, widths: dict[str, int], dtype: torch.dtype) -> dict[str, Tensor]:
    columns = {name: torch.empty(n_rows, d_in, dtype=dtype) for name, d_in in widths.items()}
    return columns | {name: torch.empty(n_rows, dtype=torch.int32) for name in INT_COLUMNS}

"""Columns of activations, in memory or in a folder's shards: rows, token ids, documents and positions, or payload."""

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from saelab.stores.manifest import INT_COLUMNS, ActivationsManifest
from saelab.stores.payload import PayloadKinds, unpack_strings
from saelab.stores.tensors import map_tensor
from saelab.stores.validation import naming


@runtime_checkable
class RowColumns(Protocol):
    """Protocol of columns of equal length that can be copied in parts."""

    n_tokens: int
    columns: dict[str, tuple[torch.dtype, tuple[int, ...]]]
    payload: PayloadKinds | None

    def read_strings(self, start: int, stop: int) -> list[str]:
        """The strings of documents `start:stop`."""

    def copy_slice(self, column: str, start: int, out: Tensor) -> None:
        """Fill `out` with consecutive rows, the first of which is row `start`."""

    def copy_rows(self, column: str, index: Tensor, out: Tensor) -> None:
        """Fill `out` with the rows of the given numbers."""


class MemoryRows:
    """Columns held as tensors, and the strings of documents.

    Args:
        tensors: columns by name; the first is the activations.
        payload: what documents have to show; None where rows are tokens.
        strings: a text or path of each document, where the payload has one.
    """

    def __init__(
        self, tensors: dict[str, Tensor], payload: PayloadKinds | None = None, strings: Sequence[str] = ()
    ) -> None:
        self.tensors, self.payload, self._strings = tensors, payload, strings
        self.n_tokens = len(next(iter(tensors.values())))
        self.columns = {name: (t.dtype, tuple(t.shape[1:])) for name, t in tensors.items()}

    def read_strings(self, start: int, stop: int) -> list[str]:
        """The strings of documents `start:stop`."""
        return list(self._strings[start:stop])

    def copy_slice(self, column: str, start: int, out: Tensor) -> None:
        """Fill `out` with consecutive rows, the first of which is row `start`."""
        out.copy_(self.tensors[column][start : start + len(out)])

    def copy_rows(self, column: str, index: Tensor, out: Tensor) -> None:
        """Fill `out` with the rows of the given numbers."""
        out.copy_(self.tensors[column][index.to(self.tensors[column].device)])


class FolderRows:
    """Columns in safetensors shards; the one read last stays mapped, and no file descriptor is kept open."""

    def __init__(self, folder: Path, manifest: ActivationsManifest, verify: bool) -> None:
        self.folder, self.manifest = folder, manifest
        self.files = manifest.check_shards(folder, verify)
        self.starts = [0, *accumulate(shard.n_tokens for shard in manifest.shards)]
        self.n_tokens = self.starts[-1]
        self.payload = manifest.payload
        self.columns: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
        if self.payload is None:
            self.columns |= dict.fromkeys(INT_COLUMNS, (torch.int32, ()))
        elif "pixels" in self.payload:
            self.columns["pixels"] = (torch.uint8, tuple(self.payload["pixels"]))
        self.columns |= {name: (getattr(torch, manifest.dtype), (d_in,)) for name, d_in in manifest.d_in.items()}
        self._mapped: tuple[int, str, Tensor] | None = None

    def read_strings(self, start: int, stop: int) -> list[str]:
        """The strings of documents `start:stop`."""
        found: list[str] = []
        for shard in range(len(self.files)):
            first, end = (min(max(at - self.starts[shard], 0), self.starts[shard + 1] - self.starts[shard])
                          for at in (start, stop))  # fmt: skip
            if first < end:
                found += self._read_strings(shard, first, end)
        return found

    def _read_strings(self, shard: int, first: int, end: int) -> list[str]:
        file = self.files[shard]
        file.check("text_ends", max(0, first - 1), end)
        ends = self._map(shard, "text_ends")[max(0, first - 1) : end]
        begin, stop = (int(ends[0]) if first else 0), int(ends[-1])
        with naming(file.path):
            if not 0 <= begin <= stop <= file.specs["texts"].shape[0]:
                raise ValueError("the ends of its texts must rise within their bytes. It was edited: make it again.")
            file.check("texts", begin, stop)
            return unpack_strings(self._map(shard, "texts")[begin:stop], ends[min(first, 1) :], begin)

    def copy_slice(self, column: str, start: int, out: Tensor) -> None:
        """Fill `out` with consecutive rows, the first of which is row `start`."""
        done = 0
        while done < len(out):
            shard = bisect_right(self.starts, start + done) - 1
            first = start + done - self.starts[shard]
            stop = min(first + len(out) - done, self.starts[shard + 1] - self.starts[shard])
            self.files[shard].check(column, first, stop)
            piece = self._map(shard, column)[first:stop]
            if column in INT_COLUMNS and len(piece) and int(piece.min()) < 0:
                raise ValueError(
                    f"{self.files[shard].path} must hold {column} of at least 0, got {int(piece.min())}. It was edited "
                    "or written wrongly: make it again."
                )
            out[done : done + len(piece)] = piece
            done += len(piece)

    def copy_rows(self, column: str, index: Tensor, out: Tensor) -> None:
        """Fill `out` with the rows of the given numbers."""
        shards = torch.bucketize(index, torch.tensor(self.starts), right=True) - 1
        for shard in torch.unique(shards).tolist():
            here = (shards == shard).nonzero().squeeze(1)
            rows = index[here] - self.starts[shard]
            self.files[shard].check_rows(column, rows.numpy())
            out[here] = self._map(shard, column)[rows]

    def _map(self, shard: int, column: str) -> Tensor:
        mapped = self._mapped  # of several threads each sees a whole entry
        if mapped is None or mapped[:2] != (shard, column):
            file = self.files[shard]
            mapped = self._mapped = (shard, column, map_tensor(file.path, file.specs[column]))
        return mapped[2]

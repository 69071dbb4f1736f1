"""Memory-mapped reading of safetensors files, with checksums that are compared when a part is first read.

Files written by saelab have their checksums in the header's metadata, under `crc32`: eight hexadecimal digits for the
header itself (computed with these eight as zeros), then eight for each block of 256 KiB of each tensor, in the order
of the data. The key `sealed` marks that they must be there. Files of other writers have neither and are read as they
are.
"""

import json
import math
import os
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from saelab.stores.partial_files import PartialFile
from saelab.stores.validation import parse_json

Chunk: TypeAlias = bytes | memoryview
"""The bytes of one tensor"""
BLOCK = 1 << 18
"""Bytes that one checksum covers: what must be read to check a single row, and 32,768 times the size of a checksum"""
SEAL, SEALED = "crc32", "sealed"
UNSEALED = "0" * 8
MAX_HEADER = 100_000_000

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "C64": torch.complex64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
if hasattr(torch, "float8_e8m0fnu"):  # since PyTorch 2.7
    DTYPES["F8_E8M0"] = torch.float8_e8m0fnu
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class TensorSpec:
    """Position of one tensor in a safetensors file: dtype, shape and offset of its first byte."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int

    @property
    def n_bytes(self) -> int:
        """Size of the tensor in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def n_blocks(self) -> int:
        """Number of blocks, each of which has a checksum."""
        return -(-self.n_bytes // BLOCK)

    def span(self, block: int) -> tuple[int, int]:
        """The first byte of a block in the file, and the byte after its last."""
        start = self.offset + block * BLOCK
        return start, min(start + BLOCK, self.offset + self.n_bytes)

    @cached_property
    def row_bytes(self) -> int:
        """Size in bytes of one entry of the first axis."""
        return math.prod(self.shape[1:]) * self.dtype.itemsize


class TensorFile:
    """One safetensors file: the positions of its tensors, and which of their blocks have been checked.

    Args:
        path: the file.
        specs: position of each tensor, in the order of the data.
        metadata: metadata of the header, without checksums.
        sums: checksum of each block, in the order of the data; None for a file without checksums.
    """

    def __init__(
        self, path: Path, specs: dict[str, TensorSpec], metadata: dict[str, str], sums: Sequence[int] | None
    ) -> None:
        self.path, self.specs, self.metadata = path, specs, metadata
        self._sums = sums
        self._partial = PartialFile.find(path)
        n_blocks = [0, *accumulate(spec.n_blocks for spec in specs.values())]
        self._first = dict(zip(specs, n_blocks, strict=False))
        self._seen = np.zeros(n_blocks[-1], bool)

    @classmethod
    def open(cls, path: str | Path) -> "TensorFile":
        """The file at a path, of which only the header is read.

        Raises:
            FileNotFoundError: the file is missing.
            ValueError: the file is truncated, damaged or not safetensors.
        """
        path = Path(path)
        try:
            return cls(path, *_read_header(path))
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            raise FileNotFoundError(
                f"`path` must be an existing safetensors file, got {path}. Check the folder's name."
            ) from None

    def map(self, name: str) -> Tensor:
        """One tensor, memory-mapped, without comparing checksums; changes to it never reach the file."""
        return map_tensor(self.path, self.specs[name])

    def read(self, name: str) -> Tensor:
        """One tensor, memory-mapped, after comparing all its checksums; ValueError for damage, KeyError for another
        name.
        """
        self.check(name)
        return self.map(name)

    def check(self, name: str, start: int = 0, stop: int | None = None) -> range:
        """Compare the checksums of rows `start:stop` of a tensor, where that has not been done before.

        Args:
            name: the tensor.
            start: first row.
            stop: row after the last; None for all.

        Returns:
            The range of rows that were checked for the first time, with all rows between the first and the last.

        Raises:
            ValueError: a block is damaged; the message names the file, tensor and bytes.
        """
        spec = self.specs[name]
        stop = (spec.shape[0] if spec.shape else 1) if stop is None else stop
        size, own = spec.row_bytes, self._first[name]
        first, end = start * size // BLOCK, -(-stop * size // BLOCK)
        if bool(self._seen[own + first : own + end].all()):
            return range(0)
        return self._check(name, np.arange(first, end))

    def check_rows(self, name: str, rows: Int[np.ndarray, "n"]) -> None:
        """Compare the checksums of single rows of a tensor, as `check` does for a range; ValueError for damage."""
        size = self.specs[name].row_bytes
        first, last = rows * size // BLOCK, ((rows + 1) * size - 1) // BLOCK
        widest = int((last - first).max(initial=0))
        self._check(name, np.unique(np.minimum(first[:, None] + np.arange(widest + 1), last[:, None])))

    def forget(self, name: str) -> None:
        """Mark all blocks of a tensor as unchecked, so that the next read compares their checksums again."""
        first = self._first[name]
        self._seen[first : first + self.specs[name].n_blocks] = False

    def check_all(self) -> None:
        """Compare the checksums of every tensor; ValueError naming the first that is damaged."""
        for name in self.specs:
            self.check(name)

    @cached_property
    def _bytes(self) -> memoryview:
        return torch.from_file(str(self.path), False, self.path.stat().st_size, dtype=torch.uint8).numpy().data

    def release(self) -> None:
        """Release the memory map through which checksums are computed; it is made again when needed."""
        self.__dict__.pop("_bytes", None)

    def map_all(self) -> dict[str, Tensor]:
        """Every tensor by name, memory-mapped without comparing checksums; unaffected if the file is replaced later."""
        assert self._bytes is not None
        return {name: self.map(name) for name in self.specs}

    def _check(self, name: str, blocks: np.ndarray) -> range:
        spec, first = self.specs[name], self._first[name]
        new = blocks[~self._seen[first + blocks]] if spec.n_bytes else blocks[:0]
        if len(new) == 0:
            return range(0)
        spans = [spec.span(block) for block in new.tolist()]
        self._fetch(spans)
        for block, (start, stop) in zip(new.tolist(), spans, strict=True):
            if not self._agrees(start, stop, first + block):
                raise ValueError(
                    f"{self.path} must hold what was written, but bytes {start} to {stop} (of '{name}') "
                    "have another checksum: the file was damaged or edited. Copy it again, or make it again."
                )
        self._seen[first + new] = True
        size = max(1, spec.row_bytes)
        n_rows = spec.shape[0] if spec.shape else 1
        return range(int(new[0]) * BLOCK // size, min(n_rows, -(-(int(new[-1]) + 1) * BLOCK // size)))

    def _fetch(self, spans: Sequence[tuple[int, int]]) -> None:
        """Of a file of which parts are here: get what is missing, neighboring blocks together."""
        if self._partial is None:
            return
        start, stop = spans[0]
        for first, end in spans[1:]:
            if first > stop:
                self._partial.fetch(start, stop)
                start = first
            stop = end
        self._partial.fetch(start, stop)
        self.release()  # a map that is made now has what was written

    def _agrees(self, start: int, stop: int, block: int) -> bool:
        """Whether bytes have the checksum of a block; a fetched part that does not is fetched once more."""
        if self._sums is None or zlib.crc32(self._bytes[start:stop]) == self._sums[block]:
            return True
        if self._partial is None:
            return False
        self._partial.forget(start, stop)
        self._fetch([(start, stop)])
        return zlib.crc32(self._bytes[start:stop]) == self._sums[block]

    def identify(self) -> tuple[int, ...]:
        """Numbers that differ between the file and one that replaced it, or was edited."""
        found = os.stat(self.path)
        time = found.st_mtime_ns if self._partial is None else 0  # which grows by what is read
        return found.st_dev, found.st_ino, found.st_size, time


def map_tensor(path: str | Path, spec: TensorSpec) -> Tensor:
    """One tensor of a safetensors file, memory-mapped: data is read when it is accessed.

    Writing to the tensor changes a private copy of the page, never the file. The mapping holds no file descriptor and
    ends with the tensor.
    """
    if spec.n_bytes == 0:
        return torch.empty(spec.shape, dtype=spec.dtype)
    end = spec.offset + spec.n_bytes
    raw = torch.from_file(str(path), shared=False, size=end, dtype=torch.uint8)[spec.offset :]
    if spec.offset % spec.dtype.itemsize:  # legal in safetensors, though our own files are aligned
        raw = raw.clone()
    return raw.view(spec.dtype).view(spec.shape)


def load_tensors(path: str | Path) -> dict[str, Tensor]:
    """Every tensor of a safetensors file by name, read into memory.

    Raises:
        FileNotFoundError: the file is missing.
        ValueError: the file is truncated, damaged or not safetensors.
    """
    file = TensorFile.open(path)
    return {name: file.read(name).clone() for name in file.specs}


def read_header(path: str | Path) -> tuple[dict[str, TensorSpec], dict[str, str]]:
    """Position of each tensor of a safetensors file, and its metadata, without reading the tensors.

    Raises:
        FileNotFoundError: the file is missing.
        ValueError: the file is truncated or not safetensors.
    """
    file = TensorFile.open(path)
    return file.specs, file.metadata


def make_header(tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None, chunks: Sequence[Chunk]) -> bytes:
    """The header of a safetensors file, checksums included.

    Args:
        tensors: tensors by name, in the order of the data.
        metadata: strings by name; None for none.
        chunks: bytes of each tensor.
    """
    sums = "".join(f"{zlib.crc32(part):08x}" for chunk in chunks for part in _blocks(chunk))
    header: dict[str, object] = {"__metadata__": {**(metadata or {}), SEALED: SEAL, SEAL: UNSEALED + sums}}
    end = 0
    for name, tensor in tensors.items():
        start, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": DTYPE_NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + _seal(text)


def _blocks(chunk: Chunk) -> list[Chunk]:
    return [chunk[i : i + BLOCK] for i in range(0, len(chunk), BLOCK)]


def _seal(text: bytes) -> bytes:
    """The header with its own checksum in the place of the first eight zeros."""
    place = _find_seal(text)
    return text[:place] + f"{zlib.crc32(text):08x}".encode() + text[place + 8 :]


def _find_seal(text: bytes) -> int:
    """Where the checksums begin; no tensor's name can contain the marker, as its quotation marks would be escaped."""
    mark = f'"{SEAL}":"'.encode()
    return text.index(mark) + len(mark)


def _read_header(path: Path) -> tuple[dict[str, TensorSpec], dict[str, str], list[int] | None]:
    if (partial := PartialFile.find(path)) is not None:
        partial.fetch_header(MAX_HEADER)
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= min(size - 8, MAX_HEADER):
            raise _refusal(path, "it is cut off before its header ends, or is of another kind")
        text = file.read(length)
    try:
        header = parse_json(text)
        metadata = dict(header.pop("__metadata__", None) or {})
        sound = all(isinstance(value, str) for value in metadata.values())
        sums, sealed = metadata.pop(SEAL, None), metadata.pop(SEALED, None)
    except (ValueError, AttributeError, TypeError):
        raise _refusal(path, "its header is no JSON object") from None
    if not sound:
        raise _refusal(path, "its metadata are no texts")
    if sealed is not None or sums is not None:
        _check_seal(path, text, sums if sealed == SEAL else None)
    specs = {name: _read_spec(path, name, entry, 8 + length) for name, entry in header.items()}
    specs = dict(sorted(specs.items(), key=lambda item: (item[1].offset, item[1].n_bytes)))
    _check_layout(path, specs, 8 + length, size)
    return specs, metadata, None if sums is None else _read_sums(path, sums, specs)


def _check_seal(path: Path, text: bytes, sums: object) -> None:
    try:
        place = _find_seal(text)
        found = zlib.crc32(text[:place] + UNSEALED.encode() + text[place + 8 :])
        sound = isinstance(sums, str) and sums[:8] == f"{found:08x}"
    except ValueError:
        sound = False
    if not sound:
        raise _refusal(path, "its header has another checksum than it says: it was damaged or edited")


def _read_sums(path: Path, sums: str, specs: Mapping[str, TensorSpec]) -> list[int]:
    if len(sums) != 8 * (1 + sum(spec.n_blocks for spec in specs.values())):
        raise _refusal(path, f"it says {len(sums) // 8 - 1} checksums of blocks, which are not those of its tensors")
    return [int(sums[i : i + 8], 16) for i in range(8, len(sums), 8)]


def _read_spec(path: Path, name: str, entry: Any, start: int) -> TensorSpec:
    try:
        dtype, shape, (first, last) = entry["dtype"], entry["shape"], entry["data_offsets"]
    except (KeyError, TypeError, ValueError):
        raise _refusal(path, f"its header does not say dtype, shape and data_offsets of '{name}'") from None
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise ValueError(
            f"{path} must hold tensors of {', '.join(DTYPES)}, got {str(dtype)[:40]!r} for '{name}', which PyTorch "
            "has no name for. Convert that tensor, for example to F16."
        )
    numbers = [first, last, *shape] if isinstance(shape, list) else [None]
    if any(type(number) is not int or not 0 <= number < 2**62 for number in numbers):
        raise _refusal(path, f"shape and data_offsets of '{name}' are no sizes")
    spec = TensorSpec(DTYPES[dtype], tuple(shape), start + first)
    if spec.n_bytes != last - first:
        raise _refusal(path, f"shape and data_offsets of '{name}' disagree")
    return spec


def _check_layout(path: Path, specs: Mapping[str, TensorSpec], start: int, size: int) -> None:
    """Refuse a file whose tensors overlap, leave gaps or do not fill it."""
    end = start
    for name, spec in specs.items():
        if spec.offset != end:
            raise _refusal(
                path, f"'{name}' {'overlaps' if spec.offset < end else 'leaves a gap behind'} another tensor"
            )
        end += spec.n_bytes
    if end != size:
        what = "It was cut off: write it again" if size < end else "Something was added: write it again"
        raise ValueError(f"{path} must have {end} bytes by its header, got {size}. {what}.")


def _refusal(path: Path, cause: str) -> ValueError:
    return ValueError(f"{path} must be a safetensors file; {cause}. Copy it again, or write it again.")

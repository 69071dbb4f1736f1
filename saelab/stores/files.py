"""Files and folders: every write is atomic, every failure says which folder and what to do."""

import errno
import json
import math
import os
import secrets
import shutil
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
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
_DTYPE_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


@dataclass(frozen=True)
class TensorSpec:
    """Where one tensor lies in a safetensors file: dtype, shape, first byte."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int

    @property
    def n_bytes(self) -> int:
        """Length in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


def write_atomic(path: str | Path, data: bytes) -> None:
    """Write `data` to `path` in full or not at all; missing folders are made.

    Raises OSError naming the folder when the disk is full or the folder cannot be written to.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write_atomic(f"{folder}/a.txt", b"hello")
    ...     Path(folder, "a.txt").read_bytes()
    b'hello'
    """
    with _replacing(Path(path)) as temp:
        _write(temp, [data])


def write_json(path: str | Path, obj: Any) -> None:
    """Write `obj` as indented JSON, atomically; NaN and infinities become null (JSON has neither)."""
    write_atomic(path, (to_json(obj) + "\n").encode())


def to_json(obj: Any) -> str:
    """`obj` as indented JSON; NaN and infinities become null.

    >>> to_json(float("nan"))
    'null'
    """
    return json.dumps(_finite(obj), indent=2, allow_nan=False)


def read_json(path: str | Path) -> Any:
    """Read a JSON file; FileNotFoundError when missing, ValueError when it is not JSON."""
    try:
        return json.loads(Path(path).read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        raise FileNotFoundError(f"`path` must be an existing JSON file, got {path}. Check the folder's name.") from None
    except ValueError as error:
        raise ValueError(f"{path} must hold JSON, got something else ({error}). Was it edited or cut off?") from None


def save_tensors(path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> str:
    """Write a safetensors file atomically and return the CRC-32 of its bytes in hexadecimal.

    The same tensors give the same bytes, and no tensor on the CPU is copied on the way.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     crc = save_tensors(f"{folder}/a.safetensors", {"x": torch.ones(2)})
    ...     load_tensors(f"{folder}/a.safetensors")["x"].tolist()
    [1.0, 1.0]
    """
    # Wide elements first, so that each tensor starts on a multiple of its own element size.
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0]))
    chunks = [_header(dict(ordered), metadata), *(_bytes_of(tensor) for _, tensor in ordered)]
    with _replacing(Path(path)) as temp:
        return _write(temp, chunks)


def load_tensors(path: str | Path) -> dict[str, Tensor]:
    """Read every tensor of a safetensors file into memory; ValueError when it is cut off or not safetensors."""
    specs, _ = read_header(path)
    return {name: map_tensor(path, spec).clone() for name, spec in specs.items()}


def read_header(path: str | Path) -> tuple[dict[str, TensorSpec], dict[str, str]]:
    """Read where each tensor of a safetensors file lies, and its metadata, without reading the tensors.

    Raises FileNotFoundError when missing, ValueError when the file is cut off or is not safetensors.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"`path` must be an existing safetensors file, got {path}. Check the folder's name.")
    try:
        specs, metadata, end = _parse_header(path)
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f"{path} must be a safetensors file; its header cannot be read. Write it again.") from None
    if end != path.stat().st_size:
        raise ValueError(
            f"{path} must have {end} bytes by its header, got {path.stat().st_size}. It was cut off: write it again."
        )
    return specs, metadata


def map_tensor(path: str | Path, spec: TensorSpec) -> Tensor:
    """Map one tensor of a safetensors file into memory: nothing is read before it is touched.

    Writing to the tensor changes a private copy of the page, never the file. The mapping holds no file
    descriptor and goes with the tensor.
    """
    if spec.n_bytes == 0:
        return torch.empty(spec.shape, dtype=spec.dtype)
    end = spec.offset + spec.n_bytes
    raw = torch.from_file(str(path), shared=False, size=end, dtype=torch.uint8)[spec.offset :]
    if spec.offset % spec.dtype.itemsize:  # legal in safetensors, though our own files are aligned
        raw = raw.clone()
    return raw.view(spec.dtype).view(spec.shape)


def checksum(path: str | Path) -> str:
    """The CRC-32 of a file in hexadecimal: it finds damage at a seventh of the cost of a cryptographic hash."""
    crc = 0
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            crc = zlib.crc32(chunk, crc)
    return f"{crc:08x}"


@contextmanager
def replace_folder(path: str | Path) -> Iterator[Path]:
    """Yield an empty temporary folder that takes the place of `path` when the block ends well.

    After an exception the temporary folder is removed and `path` is as it was.
    """
    path = Path(path)
    temp, old = _temp_beside(path), _temp_beside(path)
    with _explained(path.parent):
        temp.mkdir(parents=True)
    try:
        yield temp
        with _explained(path.parent):
            _swap(temp, path, old)
    finally:
        shutil.rmtree(temp, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def remove_leftovers(folder: str | Path) -> None:
    """Remove the temporary files and folders that a killed process left in `folder`."""
    for leftover in Path(folder).glob(".*.tmp"):
        if leftover.is_dir():
            shutil.rmtree(leftover, ignore_errors=True)
        else:
            leftover.unlink(missing_ok=True)


def _swap(temp: Path, path: Path, old: Path) -> None:
    existed = path.exists()
    if existed:
        os.replace(path, old)
    try:
        os.replace(temp, path)
    except BaseException:
        if existed:
            os.replace(old, path)
        raise


def _temp_beside(path: Path) -> Path:
    # Unique, so that two processes never share one; not mkstemp, whose files nobody else may read.
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    with _explained(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        temp = _temp_beside(path)
        try:
            yield temp
            os.replace(temp, path)
        finally:
            with suppress(OSError):
                temp.unlink(missing_ok=True)


@contextmanager
def _explained(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            reason = "the disk is full. Free some space or choose another folder, then run again"
        elif error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            reason = "it may not be written to. Choose another folder or change its permissions"
        elif error.errno in (errno.ENOTDIR, errno.EEXIST):
            reason = "a file is in the way. Choose another folder or move that file"
        else:
            raise
        raise type(error)(error.errno, f"Cannot write in {folder}: {reason}. Nothing was half-written") from error


def _write(path: Path, chunks: list[Any]) -> str:
    crc = 0
    with open(path, "xb") as file:
        _reserve(file.fileno(), sum(map(len, chunks)))
        for chunk in chunks:
            file.write(chunk)
            crc = zlib.crc32(chunk, crc)
        file.flush()
        os.fsync(file.fileno())
    return f"{crc:08x}"


def _reserve(descriptor: int, n_bytes: int) -> None:
    """Claim the room where the system can: writing then costs a quarter of the CPU, and a full disk shows at once."""
    if n_bytes and hasattr(os, "posix_fallocate"):
        try:
            os.posix_fallocate(descriptor, 0, n_bytes)
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):  # not every file system has it
                raise


def _header(tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None) -> bytes:
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name, tensor in tensors.items():
        start, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": _DTYPE_NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _bytes_of(tensor: Tensor) -> Any:
    if tensor.numel() == 0:  # an empty tensor cannot be viewed as bytes
        return b""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def _parse_header(path: Path) -> tuple[dict[str, TensorSpec], dict[str, str], int]:
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= min(path.stat().st_size, 100_000_000):
            raise ValueError("no header")
        header = json.loads(file.read(length))
    metadata = header.pop("__metadata__", {})
    specs = {}
    end = start = 8 + length
    for name, entry in header.items():
        first, last = entry["data_offsets"]
        specs[name] = TensorSpec(_DTYPES[entry["dtype"]], tuple(entry["shape"]), start + first)
        if specs[name].n_bytes != last - first:
            raise ValueError("shape and offsets disagree")
        end = max(end, start + last)
    return specs, metadata, end


def _finite(obj: Any) -> Any:
    if isinstance(obj, Mapping):
        return {str(key): _finite(value) for key, value in obj.items()}
    if isinstance(obj, (list, tuple)):
        return [_finite(value) for value in obj]
    if isinstance(obj, Path):
        return str(obj)
    if isinstance(obj, float) and not math.isfinite(obj):
        return None
    return obj

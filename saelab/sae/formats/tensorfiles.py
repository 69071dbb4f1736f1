"""Safe reading of tensors from files of other libraries: safetensors, PyTorch's zip format, NumPy's npz. Nothing in
them is executed.

Tensors are memory-mapped, so that names, shapes and dtypes are known before any value is read.
"""

import pickle
import re
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from saelab.stores.tensors import TensorFile, TensorSpec, map_tensor

ARCHIVES = (".npz",)
PICKLES = (".pt", ".pth", ".bin")
SMALL = 2**24  # bytes up to which a compressed array may have any compression ratio
MAX_RATIO = 20  # largest compression ratio of a larger array: weights hardly compress
NAMED = re.compile(r"GLOBAL ([\w.]+)")  # function or class that a pickle refers to, in PyTorch's message
LOCAL_HEADER = 30  # bytes before a member's name in a zip file


def read_tensors(path: Path) -> Mapping[str, Any]:
    """Contents of a weights file by name: tensors, memory-mapped and not yet read, and plain values stored with them.

    Raises:
        FileNotFoundError: where there is no file.
        ValueError: for one that is cut off, is no such file, would have to run code to be read, or declares arrays
            larger than its bytes can hold.
    """
    if not path.is_file():
        raise FileNotFoundError(f"An SAE's weights must be a file, got {path}, where there is none. Check the name.")
    if path.suffix in PICKLES:
        return _read_pickle(path)
    if path.suffix in ARCHIVES:
        return _read_archive(path)
    return _Checked(TensorFile.open(path))


class _Checked(Mapping):  # unparametrised, as a runtime type checker would read its values
    """The tensors of a safetensors file; each is compared with its checksum, if it has one, on access."""

    def __init__(self, file: TensorFile) -> None:
        self._file = file
        self._maps = file.map_all()

    def __getitem__(self, name: str) -> Tensor:
        self._file.check(name)
        return self._maps[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._file.specs)

    def __len__(self) -> int:
        return len(self._file.specs)

    def __contains__(self, name: object) -> bool:
        return name in self._file.specs


def _read_pickle(path: Path) -> Mapping[str, Any]:
    """A dictionary that `torch.save` wrote. Only tensors and plain values are unpickled; anything else is refused."""
    try:
        zipped = zipfile.is_zipfile(path)
        if zipped:
            with zipfile.ZipFile(path) as archive:
                _refuse_compressed(path, archive)
    except (zipfile.BadZipFile, OSError, EOFError, NotImplementedError, OverflowError, KeyError) as error:
        raise ValueError(f"{path} must be a whole PyTorch file, got a damaged one ({error}). Copy it again.") from None
    try:
        held = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except (
        *(pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError, AttributeError, TypeError),
        *(OSError, IndexError, OverflowError, MemoryError, AssertionError, ImportError, NotImplementedError),
    ) as error:
        raise ValueError(
            f"{path} must be a whole PyTorch file of tensors and plain values, got {_name_cause(error)}. It was not "
            "unpickled further: what it holds could run code. Ask for safetensors, or copy it again."
        ) from None
    if not isinstance(held, Mapping) or not all(isinstance(name, str) for name in held):
        raise ValueError(f"{path} must hold a dictionary of tensors by name, got a {type(held).__name__}.")
    return held


def _name_cause(error: Exception) -> str:
    """What stopped the unpickler, without PyTorch's own message, which advises to run the code."""
    found = NAMED.search(str(error))
    return f"one that names {found[1]}" if found else f"another ({type(error).__name__})"


def _refuse_compressed(path: Path, archive: zipfile.ZipFile) -> None:
    if any(info.compress_type != zipfile.ZIP_STORED for info in archive.infolist()):
        raise ValueError(
            f"{path} must be stored uncompressed, as torch.save does, got a compressed file. Write it anew."
        )


def _read_archive(path: Path) -> Mapping[str, Tensor]:
    """Arrays of an npz file: uncompressed ones are memory-mapped; small or slightly compressed ones are read."""
    try:
        with zipfile.ZipFile(path) as archive:
            return {info.filename.removesuffix(".npy"): _read_array(path, archive, info) for info in archive.infolist()}
    except (
        zipfile.BadZipFile,
        zlib.error,
        OSError,
        EOFError,
        KeyError,
        SyntaxError,
        OverflowError,
        IndexError,
    ) as error:
        raise ValueError(f"{path} must be a whole npz file, got another ({error}). Was it cut off?") from None


def _read_array(path: Path, archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> Tensor:
    shape, fortran, dtype, start = _read_array_header(path, archive, info)
    n_bytes = int(np.prod(shape, dtype=np.float64) * dtype.itemsize)
    if info.file_size != start + n_bytes:
        raise ValueError(
            f"{path}: '{info.filename}' must have {start + n_bytes} bytes by its header {shape}, got {info.file_size}. "
            "It was cut off or made up; copy it again."
        )
    if info.compress_type == zipfile.ZIP_STORED and not fortran:
        return map_tensor(path, TensorSpec(_to_torch(path, dtype), shape, _find_data(path, info) + start))
    if n_bytes > max(SMALL, MAX_RATIO * info.compress_size):
        raise ValueError(
            f"{path}: '{info.filename}' must not unpack to more than {MAX_RATIO} times its size, got {n_bytes} bytes "
            f"in {info.compress_size}. Weights do not compress like that; store them uncompressed."
        )
    with archive.open(info) as member:
        return torch.from_numpy(np.array(np.lib.format.read_array(member, allow_pickle=False)))


def _read_array_header(
    path: Path, archive: zipfile.ZipFile, info: zipfile.ZipInfo
) -> tuple[tuple[int, ...], bool, np.dtype, int]:
    """Shape, order, dtype and length of the header; ValueError for what is no array of numbers."""
    with archive.open(info) as member:
        try:
            version = np.lib.format.read_magic(member)
            read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape, fortran, dtype = read(member)
        except ValueError as error:
            raise ValueError(f"{path}: '{info.filename}' must be an array, got another ({error}).") from None
        if dtype.hasobject:
            raise ValueError(
                f"{path}: '{info.filename}' must be an array of numbers, got objects, which could run code. Not read."
            )
        return shape, fortran, dtype, member.tell()


def _find_data(path: Path, info: zipfile.ZipInfo) -> int:
    """Offset of a stored member's data: after its local header, a name and an extra field."""
    with open(path, "rb") as file:
        file.seek(info.header_offset)
        header = file.read(LOCAL_HEADER)
    n_name, n_extra = (int.from_bytes(header[i : i + 2], "little") for i in (26, 28))
    return info.header_offset + LOCAL_HEADER + n_name + n_extra


def _to_torch(path: Path, dtype: np.dtype) -> torch.dtype:
    try:
        return torch.from_numpy(np.empty(0, dtype)).dtype
    except TypeError:
        raise ValueError(f"{path} must hold numbers that PyTorch knows, got {dtype}.") from None

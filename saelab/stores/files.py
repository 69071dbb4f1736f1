"""Atomic writing of files: safetensors, JSON, and all files of a folder at once; and safe file names.

Names read from files are checked.
"""

import errno
import json
import math
import os
import re
import shutil
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, TypeVar

import torch
from torch import Tensor

from saelab.stores.jobs import CAN_LOCK, LOCK, FolderInUse, explained, hold_folder, open_locked
from saelab.stores.tensors import Chunk, make_header
from saelab.stores.validation import read_fields, read_json, seal

# Readers are exported here next to the writers.

T = TypeVar("T")
STAGED, JOURNAL = ".saelab-new", "journal.json"
PATIENCE = 10.0
"""seconds that a reader waits for the files of a folder to be moved into place, which takes milliseconds"""
RESERVED = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", re.IGNORECASE)
FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,199}")


def write_atomic(path: str | Path, data: bytes) -> None:
    """Write `data` to `path` in full or not at all; missing folders are made.

    Raises:
        OSError: the disk is full or the folder cannot be written to; the message names the folder.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write_atomic(f"{folder}/a.txt", b"hello")
    ...     Path(folder, "a.txt").read_bytes()
    b'hello'
    """
    with _replacing(Path(path)) as file:
        _write(file, [data])


def write_json(path: str | Path, obj: object, *, sealed: bool = False) -> None:
    """Write `obj` as indented JSON, atomically; NaN and infinities become null (JSON has neither).

    With `sealed`, which needs an object, its checksum is added as the last key; `read_sealed` compares it.
    """
    text = to_json(obj)
    write_atomic(path, (seal(text) if sealed else text.encode()) + b"\n")


def to_json(obj: object, indent: int | None = 2) -> str:
    """`obj` as JSON, indented or in one line; NaN and infinities become null.

    >>> to_json(float("nan"))
    'null'
    """
    return json.dumps(_finite(obj), indent=indent, allow_nan=False)


def save_tensors(path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> str:
    """Write a safetensors file atomically and return the CRC-32 of its bytes in hexadecimal.

    The same tensors give the same bytes, and contiguous tensors on the CPU are not copied.

    Args:
        path: the file.
        tensors: tensors by name.
        metadata: strings by name, for the file's header; checksums of the tensors are added.

    >>> import tempfile
    >>> from saelab.stores.tensors import load_tensors
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     crc = save_tensors(f"{folder}/a.safetensors", {"x": torch.ones(2)})
    ...     load_tensors(f"{folder}/a.safetensors")["x"].tolist()
    [1.0, 1.0]
    """
    # Wide elements first, so that each tensor starts on a multiple of its own element size.
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0]))
    chunks = [_bytes_of(tensor) for _, tensor in ordered]
    chunks = [make_header(dict(ordered), metadata, chunks), *chunks]
    with _replacing(Path(path)) as file:
        return _write(file, chunks)


def checksum(path: str | Path) -> str:
    """The CRC-32 of a file in hexadecimal; it detects damage at a seventh of the cost of a cryptographic hash."""
    crc = 0
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            crc = zlib.crc32(chunk, crc)
    return f"{crc:08x}"


@dataclass(frozen=True)
class _Journal:
    """What is left to do before a folder's new files are in place."""

    last: str
    stale: list[str]


@contextmanager
def replace_folder(path: str | Path, last: str = "", stale: Sequence[str] = ("*",)) -> Iterator[Path]:
    """Context with an empty folder whose files are moved into `path` when the block succeeds: all of them or none.

    New files are written to a hidden folder in `path`, and a journal after them. Once the journal is written nothing is
    lost: files that a killed process did not move are moved by the next writer or reader. After an exception in the
    block `path` is as it was.

    Args:
        path: the folder; made where it is missing, and locked during the block.
        last: file that describes the folder, such as its manifest. Its old version is removed first and the new one
            moved last, so that a reader without knowledge of the journal never finds a mixture.
        stale: patterns of old files that are removed unless they are written again, by default all; others are kept.

    Raises:
        FolderInUse: somebody else is writing there.
        OSError: the disk is full or the folder cannot be written to.
    """
    folder = Path(path)
    staged = folder / STAGED
    with hold_folder(folder), explained(folder):
        settle(folder)
        staged.mkdir()
        try:
            yield staged
            _write_journal(folder, last, stale)
        except BaseException:
            if not (staged / JOURNAL).is_file():
                shutil.rmtree(staged, ignore_errors=True)
            raise
        settle(folder)


def settle(folder: str | Path) -> None:
    """Complete an interrupted `replace_folder`: move its files into place, or remove them where not all were written.

    The caller must hold the folder; readers call `await_settled`.
    """
    staged = Path(folder) / STAGED
    if (staged / JOURNAL).is_file():
        _move_in(Path(folder), staged)
    if staged.is_symlink():
        staged.unlink()
    elif staged.is_dir():
        shutil.rmtree(staged)


def await_settled(folder: str | Path) -> None:
    """Make sure that a folder is complete before it is read: `settle` it, or wait for the process that is writing.

    Raises:
        ValueError: the folder cannot be completed here, or (FolderInUse) is still being written after 10 seconds.
    """
    journal, end = Path(folder) / STAGED / JOURNAL, time.monotonic() + PATIENCE
    while journal.is_file():
        try:
            with hold_folder(folder, brief=True):
                settle(folder)
        except FolderInUse:
            if time.monotonic() > end:
                raise
            time.sleep(0.01)
        except OSError as error:
            raise ValueError(
                f"{folder} must be whole to be read; its files were being replaced when the writer was cut off, and "
                f"this cannot be finished here ({error}). Open it once where it may be written."
            ) from error


def read_settled(folder: str | Path, read: Callable[[], T]) -> T:
    """The result of `read` on a folder whose files did not change meanwhile; if they did, `read` is called again.

    Args:
        folder: the folder that is read.
        read: called without arguments; an OSError or ValueError of it is raised if the folder did not change.

    Raises:
        ValueError: the folder kept changing for 10 seconds.
    """
    end = time.monotonic() + PATIENCE
    while True:
        await_settled(folder)
        before = _identify(folder)
        problem: Exception | None = None
        try:
            found = read()
        except (OSError, ValueError) as error:
            problem = error
        if before is not None and _identify(folder) == before:
            break
        if time.monotonic() > end:
            raise ValueError(f"{folder} must be left alone while it is read, but its files change. Try again later.")
    if problem is not None:
        raise problem
    return found


def _identify(folder: str | Path) -> frozenset[tuple[str, int, int]] | None:
    """Name, inode and time of the files of a folder; None while they are being replaced."""
    if (Path(folder) / STAGED / JOURNAL).is_file():
        return None
    with suppress(FileNotFoundError), os.scandir(folder) as files:
        seen = [(file.name, file.stat()) for file in files if file.is_file()]
        return frozenset((name, found.st_ino, found.st_mtime_ns) for name, found in seen if name != LOCK)
    return None


def is_empty(folder: str | Path, allowed: Sequence[str] = ()) -> bool:
    """Whether a folder is missing, or holds nothing but leftovers of a killed writer and files that may be kept.

    Args:
        folder: the folder.
        allowed: patterns of the files that may be kept.
    """
    ours = (LOCK, STAGED, ".*.tmp", *allowed)
    folder = Path(folder)
    return not folder.exists() or all(any(map(file.match, ours)) for file in folder.iterdir())


def remove_leftovers(folder: str | Path) -> None:
    """Remove the temporary files and folders that a killed process left in `folder`; the caller must hold it."""
    for leftover in Path(folder).glob(".*.tmp"):
        if leftover.is_dir():
            shutil.rmtree(leftover, ignore_errors=True)
        else:
            leftover.unlink(missing_ok=True)


def _write_journal(folder: Path, last: str, stale: Sequence[str]) -> None:
    staged = folder / STAGED
    written = {file.relative_to(staged).as_posix() for file in _walk(staged)}
    matched = {file.relative_to(folder) for pattern in stale for file in folder.glob(pattern) if file.is_file()}
    found = {file.as_posix() for file in matched if file.parts[0] != STAGED}
    _sync(staged)
    write_json(staged / JOURNAL, {"last": last, "stale": sorted(found - written - {LOCK})})
    _sync(staged)


def _move_in(folder: Path, staged: Path) -> None:
    """Carry out the journal; every step may be repeated, as a killed process may have done some of them."""
    last, stale = _read_journal(staged)
    files = [file for file in _walk(staged) if file != staged / JOURNAL]
    files.sort(key=lambda file: (file == staged / last, file))
    if files and files[-1] == staged / last:
        (folder / last).unlink(missing_ok=True)
    for name in stale:
        if (folder / name).parent.resolve().is_relative_to(folder.resolve()):
            (folder / name).unlink(missing_ok=True)
    for file in files:
        place = folder / file.relative_to(staged)
        place.parent.mkdir(parents=True, exist_ok=True)
        os.replace(file, place)
    _sync(folder)
    (staged / JOURNAL).unlink()


def _read_journal(staged: Path) -> tuple[str, list[str]]:
    """The file to move last, and those to remove; ValueError where the journal is not one that saelab wrote."""
    try:
        journal = read_fields(_Journal, read_json(staged / JOURNAL))
        if staged.is_symlink() or any(Path(name).is_absolute() or ".." in Path(name).parts for name in journal.stale):
            raise ValueError("it leads out of the folder")
    except ValueError as error:
        raise ValueError(
            f"{staged} must be what saelab left there when it was cut off, but {error}. Remove it."
        ) from None
    return journal.last, journal.stale


def _walk(folder: Path) -> Iterator[Path]:
    for root, _, names in os.walk(folder):
        yield from (Path(root, name) for name in names)


def _sync(folder: Path) -> None:
    """Flush a folder's entries to the disk, where the system supports it."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextmanager
def _replacing(path: Path) -> Iterator[BinaryIO]:
    """Context with a temporary file that replaces `path` when the block succeeds.

    Its name is always the same, so that the next writer of the same file reuses what a killed one left; a lock makes
    other writers wait.
    """
    temp = path.with_name(f".{path.name}.tmp")
    with explained(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = open_locked(temp, wait=True)
        assert descriptor is not None
        with os.fdopen(descriptor, "wb") as file:
            try:
                file.truncate(0)
                yield file
                file.flush()
                os.fsync(file.fileno())
                if not CAN_LOCK:  # Windows renames no open file
                    file.close()
                os.replace(temp, path)
            except BaseException:
                with suppress(OSError):
                    temp.unlink(missing_ok=True)
                raise


def _write(file: BinaryIO, chunks: list[Chunk]) -> str:
    crc = 0
    _reserve(file.fileno(), sum(map(len, chunks)))
    for chunk in chunks:
        file.write(chunk)
        crc = zlib.crc32(chunk, crc)
    return f"{crc:08x}"


def _reserve(descriptor: int, n_bytes: int) -> None:
    """Allocate space where the system supports it: writing costs a quarter of the CPU, and a full disk fails early."""
    if n_bytes and hasattr(os, "posix_fallocate"):
        try:
            os.posix_fallocate(descriptor, 0, n_bytes)
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):  # not every file system has it
                raise


def _bytes_of(tensor: Tensor) -> Chunk:
    if tensor.numel() == 0:  # an empty tensor cannot be viewed as bytes
        return b""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def _finite(obj: object) -> object:
    if isinstance(obj, Mapping):
        return {str(key): _finite(value) for key, value in obj.items()}
    if isinstance(obj, (list, tuple)):
        return [_finite(value) for value in obj]
    if isinstance(obj, Path):
        return str(obj)
    if isinstance(obj, float) and not math.isfinite(obj):
        return None
    return obj


def require_file_name(name: str) -> str:
    """The same name, if it is that of a file and no path; ValueError for a path and for names that Windows reserves.

    >>> require_file_name("shard-00000.safetensors")
    'shard-00000.safetensors'
    """
    if not FILE_NAME.fullmatch(name) or RESERVED.fullmatch(name) or name.endswith("."):
        raise ValueError(
            f"A file must be named by letters, digits, '.', '_' and '-' alone, got {name[:80]!r}, which may lead out "
            "of the folder. Was the manifest edited?"
        )
    return name


def inside(name: str) -> str:
    """The name itself; ValueError for a path that leads out of the folder."""
    parts = Path(name).parts
    if not parts or Path(name).is_absolute() or ".." in parts or name.startswith("~"):
        raise ValueError(f"A file must be named by its path inside its folder, got '{name}', which leaves it.")
    return name


def as_file_name(text: str) -> str:
    """A file or folder name made from a text: characters other than letters, digits, '.', '_' and '-' become '-'.

    >>> as_file_name("../blocks.0.hook_resid_post")
    '-blocks.0.hook_resid_post'
    """
    name = re.sub(r"[^A-Za-z0-9_.-]+", "-", text).lstrip(".")[:150].rstrip(".") or "unnamed"
    return f"_{name}" if RESERVED.fullmatch(name) else name


def find_inside(folder: str | Path, name: str) -> Path:
    """Path of a named file in a folder.

    Links of the Hugging Face cache, from a snapshot to its repository's blobs, are followed.

    Raises:
        ValueError: the name is a path, or the file is a link that leads out of the folder.
    """
    path = Path(folder) / require_file_name(name)
    if path.is_symlink():
        place, home = path.resolve(), Path(folder).resolve()
        blobs = [above.parent / "blobs" for above in home.parents if above.name == "snapshots"]
        if place.parent != home and not any(place.is_relative_to(folder) for folder in blobs):
            raise ValueError(
                f"{path} must be a file of its folder, got a link to {place}. Copy that file here if it is meant."
            )
    return path

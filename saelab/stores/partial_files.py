"""`PartialFile`: a file elsewhere of which the parts that are read are kept here, in a sparse file of its full size.

Beside it lies a record of which chunks are there, so that none is fetched twice, in this process or a later one.
Folders of such files are known to the process that opened them, and to no other: a file that came with a folder never
makes anybody ask a server.
"""

import os
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias

CHUNK = 1 << 16
"""bytes that are fetched at least, a multiple of the size of a page of memory"""
LONGEST = 1 << 26
"""bytes of one request at most"""
Reader: TypeAlias = Callable[[str, int, int], bytes]
"""what returns bytes `start:stop` of a file by its name"""
_readers: dict[Path, Reader] = {}


def serve_folder(folder: Path, read: Reader) -> None:
    """Let this process fetch the missing parts of the files in a folder."""
    _readers[folder.resolve()] = read


def _record_of(path: Path) -> Path:
    return path.with_name(f".{path.name}.parts")


@dataclass(eq=False)
class PartialFile:
    """A file of which some chunks are here."""

    path: Path
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @classmethod
    def find(cls, path: Path) -> "PartialFile | None":
        """The file at a path, where it is one of these; None where it is whole."""
        return cls(path) if _record_of(path).is_file() else None

    @classmethod
    def make(cls, path: Path, size: int) -> "PartialFile":
        """A file of a size without any part; one that is there with its record stays as it is."""
        record, n_chunks = _record_of(path), -(-size // CHUNK)
        sizes = [file.stat().st_size if file.is_file() else None for file in (path, record)]
        if sizes != [size, n_chunks]:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.unlink(missing_ok=True)
            record.write_bytes(bytes(n_chunks))  # first: a file without a record would pass for a whole one
            with open(path, "wb") as file:
                file.truncate(size)
        return cls(path)

    def fetch(self, start: int, stop: int) -> None:
        """Make sure that bytes `start:stop` are here.

        Raises:
            FileNotFoundError: they are not, and nobody said where to get them.
            OSError: the server does not answer, or not with these bytes.
        """
        with self._lock:
            size, record = self.path.stat().st_size, _record_of(self.path)
            stop = min(stop, size)
            if start >= stop:
                return
            first, end = start // CHUNK, -(-stop // CHUNK)
            with open(record, "rb") as held:
                held.seek(first)
                there = held.read(end - first)
            at = first
            while at < end:
                upto = at
                while upto < end and not there[upto - first] and (upto - at) * CHUNK < LONGEST:
                    upto += 1
                if upto > at:
                    self._fetch(at, upto, size)
                at = max(upto, at + 1)

    def fetch_header(self, longest: int) -> None:
        """Make sure that the header of a safetensors file is here, whose first eight bytes say its length."""
        self.fetch(0, 8)
        with open(self.path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
        self.fetch(8, 8 + min(length, longest))

    def _fetch(self, first: int, end: int, size: int) -> None:
        start, stop = first * CHUNK, min(end * CHUNK, size)
        read = _readers.get(self.path.parent.resolve())
        if read is None:
            raise FileNotFoundError(
                f"{self.path} must have bytes {start} to {stop}, got a file of which parts were fetched, without "
                "these. Open it with `from_pretrained`, which fetches more."
            )
        data = read(self.path.name, start, stop)
        if len(data) != stop - start:
            raise OSError(f"bytes {start} to {stop} of {self.path.name} were asked for, got {len(data)} bytes.")
        with open(self.path, "r+b") as file:
            file.seek(start)
            file.write(data)
            file.flush()
            with suppress(OSError):
                os.fsync(file.fileno())
        with open(_record_of(self.path), "r+b") as record:
            record.seek(first)
            record.write(b"\1" * (end - first))

    def forget(self, start: int, stop: int) -> None:
        """Fetch bytes `start:stop` again when they are next needed."""
        first, end = start // CHUNK, -(-stop // CHUNK)
        with self._lock, open(_record_of(self.path), "r+b") as record:
            record.seek(first)
            record.write(bytes(end - first))

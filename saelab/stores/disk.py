"""What the disk refuses said plainly, and one writer at a time for a file or a folder.

Locks are the system's own (`flock`): they go with the process that holds them, so that a killed one leaves none. The
file that carries a folder's lock lies in the folder while it is held, says by whom, and is removed with it.
"""

import errno
import logging
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows has no such locks
    fcntl = None  # type: ignore[assignment]

LOCK = ".saelab-lock"
CAN_LOCK = fcntl is not None
FLAGS = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)
UNSUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)  # what file systems without locks say
BRIEFLY = ", which reads it"
PATIENCE = 10.0  # seconds for a reader to finish what a killed writer left
logger = logging.getLogger(__name__)


class FolderInUse(ValueError):
    """Another process, or another thread, is writing a folder."""


@dataclass
class _Hold:
    """A folder's lock, held by a thread of this process."""

    thread: int
    descriptor: int
    depth: int = 1


_held: dict[str, _Hold] = {}
_guard = threading.Lock()


def _forget_held() -> None:
    """In a forked process: the locks are its parent's."""
    for hold in _held.values():
        os.close(hold.descriptor)
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_held)


@contextmanager
def explained(folder: Path) -> Iterator[None]:
    """Errors of the disk in the block, with the folder and what to do; those that say so already pass."""
    try:
        yield
    except OSError as error:
        if isinstance(error.__cause__, OSError):
            raise
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            reason = "the disk is full. Free some space or choose another folder, then run again"
        elif error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            reason = "it may not be written to. Choose another folder or change its permissions"
        elif error.errno in (errno.ENOTDIR, errno.EEXIST):
            reason = "a file is in the way. Choose another folder or move that file"
        else:
            raise
        raise type(error)(error.errno, f"Cannot write in {folder}: {reason}. Nothing was half-written") from error


@contextmanager
def hold_folder(path: str | Path, brief: bool = False) -> Iterator[None]:
    """Keep every other writer out of a folder, which is made; readers are not kept out.

    The same thread may hold a folder several times. A folder that was made for this and stays empty goes again. A
    `brief` hold is a reader's, who finishes what a killed writer left: a writer waits for its end. Raises FolderInUse,
    a ValueError, naming the process that writes there.
    """
    folder = Path(path)
    key = os.path.realpath(folder)
    with explained(folder):
        made = _make(folder)
    try:
        _enter(key, folder, brief)
        try:
            yield
        finally:
            _leave(key, folder)
    finally:
        with suppress(OSError):  # somebody else's by now, or not empty
            for one in made:
                one.rmdir()


def clear_lock(path: str | Path) -> None:
    """Remove the lock's file where the writer that made it was killed; nothing where it is held, or cannot be had."""
    if (Path(path) / LOCK).is_file():
        with suppress(OSError, FolderInUse), hold_folder(path):
            pass


def open_locked(path: Path, wait: bool) -> int | None:
    """A descriptor of a file, made if need be, that this process alone has locked; None where another one has and
    there is no waiting. A file that is no longer at `path` once the lock is there does not count.
    """
    while True:
        descriptor = os.open(path, FLAGS, 0o666)
        try:
            if not _lock(descriptor, path, wait):
                os.close(descriptor)
                return None
            if os.path.samestat(os.fstat(descriptor), os.stat(path)):
                return descriptor
        except FileNotFoundError:
            pass
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _lock(descriptor: int, path: Path, wait: bool) -> bool:
    if fcntl is None:
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise
        logger.warning("%s cannot be locked on this file system: see that nobody else writes there", path.parent)
    return True


def _make(folder: Path) -> list[Path]:
    """Make a folder; returns those that were missing, the innermost first."""
    missing = [one for one in (folder, *folder.parents) if not one.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    return missing


def _enter(key: str, folder: Path, brief: bool) -> None:
    end = time.monotonic() + PATIENCE
    while not _try_to_enter(key, folder, brief):
        owner = _read_owner(folder / LOCK)
        passing = owner is None or owner.endswith(BRIEFLY)  # a name is written just after the lock is there
        if brief or not passing or time.monotonic() > end:
            raise FolderInUse(
                f"{folder} must have one writer at a time, and {owner or 'another process'} is writing there. "
                "Wait until that has ended, or choose another folder."
            )
        time.sleep(0.005)


def _try_to_enter(key: str, folder: Path, brief: bool) -> bool:
    with _guard:
        hold = _held.get(key)
        if hold is not None and hold.thread == threading.get_ident():
            hold.depth += 1
            return True
        with explained(folder):
            descriptor = None if hold is not None else open_locked(folder / LOCK, wait=False)
            if descriptor is None:
                return False
            _held[key] = _Hold(threading.get_ident(), descriptor)
            with suppress(OSError):  # a lock without a name is a lock, too
                os.ftruncate(descriptor, 0)
                os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}{BRIEFLY * brief}\n".encode())
            return True


def _leave(key: str, folder: Path) -> None:
    with _guard:
        hold = _held[key]
        hold.depth -= 1
        if not hold.depth:
            del _held[key]
            if not CAN_LOCK:  # Windows removes no open file
                os.close(hold.descriptor)
            with suppress(OSError):
                (folder / LOCK).unlink()  # before it is let go, so that it is not another's
            if CAN_LOCK:
                os.close(hold.descriptor)


def _read_owner(path: Path) -> str | None:
    """Who holds the lock, as the file says; None where it says nothing, or is gone already."""
    try:
        said = path.read_bytes()[:200].decode(errors="replace").strip()
    except OSError:
        return None
    return said if said.isprintable() and said else None

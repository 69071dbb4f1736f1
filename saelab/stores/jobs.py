"""Locks on files and folders, handling of interrupts, and progress bars, for long jobs that write to disk.

Locks are the operating system's (`flock`): they end with the process that holds them, also when it is killed. The file
that carries a folder's lock lies in the folder while the lock is held, names the holder, and is removed with it.

On Ctrl-C or SIGTERM (which clusters send before they kill) a job stops after a step, so that it can be saved. Handlers
are installed in the main thread only, where Python allows them, never for a signal that is ignored, and are restored
at the end of the block. Progress bars are shown as the caller requests, unless TQDM_DISABLE switches them off.
"""

import errno
import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, TypeAlias, TypeVar

try:
    import fcntl
except ImportError:  # Windows has no such locks
    fcntl = None  # type: ignore[assignment]

LOCK = ".saelab-lock"
CAN_LOCK = fcntl is not None
FLAGS = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)
UNSUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)  # from file systems without locks
BRIEFLY = ", which reads it"
PATIENCE = 10.0  # seconds for a reader to finish what a killed writer left
logger = logging.getLogger(__name__)
SIGNALS = (signal.SIGINT, signal.SIGTERM)
Handler: TypeAlias = Callable[[int, FrameType | None], Any] | int | None
"""what `signal.signal` takes and returns"""
AnyHandlers = TypeVar("AnyHandlers", bound="_Handlers")


class FolderInUse(ValueError):
    """Raised when another process or thread is writing a folder."""


@dataclass
class _Hold:
    """A folder's lock, held by a thread of this process."""

    thread: int
    descriptor: int
    depth: int = 1


_held: dict[str, _Hold] = {}
_guard = threading.Lock()


def _forget_held() -> None:
    """Drop all locks in a forked process: they belong to its parent."""
    for hold in _held.values():
        os.close(hold.descriptor)
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_held)


@contextmanager
def explained(folder: Path) -> Iterator[None]:
    """Context in which an OSError of the disk is raised with the folder and what to do, unless it has been already."""
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
    """Context that holds a folder's lock, so that nobody else writes there; readers are not affected.

    The folder is made where it is missing, and removed again if it was made here and stays empty. The same thread may
    hold a folder several times.

    Args:
        path: the folder.
        brief: whether the caller is a reader that completes what a killed writer left; writers wait for its end
            instead of being refused.

    Raises:
        FolderInUse: (a ValueError) somebody else holds the lock; the message names the process.
        OSError: the folder cannot be made or written.
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
    """Remove the lock file of a writer that was killed; does nothing where the lock is held or cannot be acquired."""
    if (Path(path) / LOCK).is_file():
        with suppress(OSError, FolderInUse), hold_folder(path):
            pass


def open_locked(path: Path, wait: bool) -> int | None:
    """Descriptor of a file, created if missing, with an exclusive lock; None where another process has locked it.

    The lock is on the file that is at `path` when it is acquired, not on one that was replaced meanwhile.

    Args:
        path: the file.
        wait: whether to wait for the lock instead of returning None.
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
    """Make a folder and return the folders that were missing, the innermost first."""
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
    """The holder of a lock by its lock file; None where the file is empty or gone."""
    try:
        said = path.read_bytes()[:200].decode(errors="replace").strip()
    except OSError:
        return None
    return said if said.isprintable() and said else None


class _Handlers:
    """Context in which `_handle` is called for `signals`."""

    signals: tuple[signal.Signals, ...] = ()

    def __enter__(self: AnyHandlers) -> AnyHandlers:
        self._before: dict[signal.Signals, Handler] = {}
        if threading.current_thread() is threading.main_thread():
            for number in self.signals:
                if signal.getsignal(number) not in (None, signal.SIG_IGN):
                    self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        raise NotImplementedError


class DeferredInterrupt(_Handlers):
    """Context in which the first Ctrl-C or SIGTERM only sets `requested`, to be checked after each step.

    A second one stops at once: Ctrl-C by KeyboardInterrupt, SIGTERM by ending the process. Outside the main thread it
    does nothing.
    """

    signals = SIGNALS

    def __init__(self) -> None:
        self.requested = False

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            _stop(number)
        self.requested = True


class Terminable(_Handlers):
    """Context in which SIGTERM raises KeyboardInterrupt, as Ctrl-C does; a second one ends the process.

    Outside the main thread it does nothing.
    """

    signals = (signal.SIGTERM,)

    def __init__(self) -> None:
        self._was_sent = False

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        outer = getattr(self._before.get(signal.SIGTERM), "__self__", None)
        if self._was_sent and isinstance(outer, Terminable):
            outer._was_sent = True  # so that the next one is the second for the outer block, too
        super().__exit__(kind, error, trace)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._was_sent:
            _stop(number)
        self._was_sent = True
        raise KeyboardInterrupt


def _stop(number: int) -> None:
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)


def hidden(progress: bool) -> bool:
    """Value for tqdm's `disable`: True without `progress`, or where the environment variable TQDM_DISABLE is set.

    tqdm itself ignores the variable where `disable` is passed.

    >>> hidden(False)
    True
    """
    return not progress or os.environ.get("TQDM_DISABLE", "").lower() not in ("", "0", "false")


def is_launched() -> bool:
    """Whether this process is one of several that a launcher started: RANK and WORLD_SIZE are in its environment."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def name_process(first: bool = False) -> str:
    """This process as messages name it; "" where it is alone, and where it is the first unless `first` is set."""
    rank = os.environ.get("RANK", "0") if is_launched() else ""
    return "" if rank == "" or (rank == "0" and not first) else f"process {rank} on {socket.gethostname()}"

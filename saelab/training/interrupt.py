"""Handling of Ctrl-C and of SIGTERM (which clusters send before they kill): stop after a step, so that it can be saved.

Handlers are installed in the main thread only, where Python allows them, never for a signal that is ignored, and are
restored at the end of the block.
"""

import os
import signal
import threading
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any, TypeAlias, TypeVar

SIGNALS = (signal.SIGINT, signal.SIGTERM)
Handler: TypeAlias = Callable[[int, FrameType | None], Any] | int | None
"""what `signal.signal` takes and returns"""
AnyHandlers = TypeVar("AnyHandlers", bound="_Handlers")


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

"""Ctrl-C that waits for the end of a step, so that what is saved is whole."""

import signal
import threading
from types import FrameType, TracebackType


class DeferredInterrupt:
    """Within the block the first Ctrl-C only sets `requested`; a second one interrupts at once. Outside the main
    thread it does nothing.
    """

    def __init__(self) -> None:
        self.requested = False
        self._in_main = threading.current_thread() is threading.main_thread()

    def __enter__(self) -> "DeferredInterrupt":
        if self._in_main:
            self._before = signal.signal(signal.SIGINT, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._in_main:
            signal.signal(signal.SIGINT, self._before)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True

"""What loading a model must not do: show progress bars, start processes, use the network."""

import logging
import os
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

logger = logging.getLogger(__name__)
_STARTERS = ("fork", "forkpty", "posix_spawn", "posix_spawnp", "system", "popen", "startfile")


@contextmanager
def hidden_bars() -> Iterator[None]:
    """Context manager without progress bars of transformers and huggingface_hub; their previous settings are
    restored.
    """
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
    from transformers.utils import logging

    shown, hub_hidden = logging.is_progress_bar_enabled(), are_progress_bars_disabled()
    logging.disable_progress_bar()  # also disables those of huggingface_hub
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
        if are_progress_bars_disabled() != hub_hidden:
            (disable_progress_bars if hub_hidden else enable_progress_bars)()


@contextmanager
def no_processes() -> Iterator[None]:
    """Context manager in which starting a process on this thread raises PermissionError and is logged.

    transformer_lens installs torchvision by pip where a processor is missing, and continues without it where that
    fails.
    """
    thread = threading.get_ident()

    def guard(start: Callable) -> Callable:
        def refuse(*args: Any, **options: Any) -> Any:
            if threading.get_ident() != thread:
                return start(*args, **options)
            wanted = next((arg for arg in args if isinstance(arg, str | bytes | list | tuple)), options.get("args", ""))
            logger.info("Not started while a model was loaded, since nobody asked for it: %s", wanted)
            raise PermissionError(f"Loading a model starts no process, a library wanted {wanted!r}. Run it yourself.")

        return refuse

    with ExitStack() as stack:
        stack.enter_context(_replaced(subprocess.Popen, "__init__", guard))
        for name in _STARTERS:
            if hasattr(os, name):
                stack.enter_context(_replaced(os, name, guard))
        yield


@contextmanager
def offline() -> Iterator[None]:
    """Context manager in which huggingface_hub and transformers do not use the network."""
    from huggingface_hub import constants

    with _replaced(constants, "HF_HUB_OFFLINE", lambda _: True):
        yield


@contextmanager
def _replaced(holder: Any, name: str, make: Callable[[Any], Any]) -> Iterator[None]:
    """Context manager in which an attribute is replaced by what `make` returns for it."""
    before = vars(holder)[name]
    setattr(holder, name, make(before))
    try:
        yield
    finally:
        setattr(holder, name, before)

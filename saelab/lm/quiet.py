"""Suppressing side effects of loading a model: started processes, network access, and weights filled in at random."""

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
def text_alone() -> Iterator[None]:
    """Context manager in which transformer_lens does not require the image libraries of a multimodal model, as text
    needs none.

    What the model's own modules need is still required where they are made.
    """
    from transformer_lens.model_bridge.architecture_adapter import ArchitectureAdapter

    if not hasattr(ArchitectureAdapter, "_check_required_libraries"):  # releases before 4
        yield
        return
    with _replaced(ArchitectureAdapter, "_check_required_libraries", lambda _: lambda _adapter: None):
        yield


@contextmanager
def offline() -> Iterator[None]:
    """Context manager in which huggingface_hub and transformers do not use the network."""
    from huggingface_hub import constants

    with _replaced(constants, "HF_HUB_OFFLINE", lambda _: True):
        yield


@contextmanager
def recorded_missing() -> Iterator[list[set[str]]]:
    """Context manager that yields the names of weights that Hugging Face does not find in the files, a set for each
    model loaded in it.
    """
    from transformers import PreTrainedModel

    missing: list[set[str]] = []

    def record(load: Any) -> Any:
        def from_pretrained(cls: type, *args: Any, **options: Any) -> Any:
            model, found = load.__func__(cls, *args, **{**options, "output_loading_info": True})
            missing.append(set(found["missing_keys"]))
            return model

        return classmethod(from_pretrained)

    with _replaced(PreTrainedModel, "from_pretrained", record):
        yield missing


@contextmanager
def _replaced(holder: Any, name: str, make: Callable[[Any], Any]) -> Iterator[None]:
    """Context manager in which an attribute is replaced by what `make` returns for it."""
    before = vars(holder)[name]
    setattr(holder, name, make(before))
    try:
        yield
    finally:
        setattr(holder, name, before)

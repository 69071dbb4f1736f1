"""What the libraries behind a model do unasked: start processes, reach the network, fill in weights at random."""

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
    """Whatever wants to start a process inside, on this thread, gets a PermissionError, and the log a line of it.

    transformer_lens installs torchvision by pip where it misses a processor, and goes on without where it cannot.
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
    """Inside, transformer_lens asks for no library by which a multimodal model prepares pictures: a text needs none.

    What the model's own modules need is missed where they are made.
    """
    from transformer_lens.model_bridge.architecture_adapter import ArchitectureAdapter

    if not hasattr(ArchitectureAdapter, "_check_required_libraries"):  # releases before 4
        yield
        return
    with _replaced(ArchitectureAdapter, "_check_required_libraries", lambda _: lambda _adapter: None):
        yield


@contextmanager
def offline() -> Iterator[None]:
    """huggingface_hub and transformers stay off the network inside."""
    from huggingface_hub import constants

    with _replaced(constants, "HF_HUB_OFFLINE", lambda _: True):
        yield


@contextmanager
def recorded_missing() -> Iterator[list[set[str]]]:
    """Names of the weights that Hugging Face does not find in the files, a set for each model that is loaded inside."""
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
    """What `make` makes of an attribute in its place inside."""
    before = vars(holder)[name]
    setattr(holder, name, make(before))
    try:
        yield
    finally:
        setattr(holder, name, before)

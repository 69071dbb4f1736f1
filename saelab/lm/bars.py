"""Hiding the progress bars that transformers and huggingface_hub show when loading."""

from collections.abc import Iterator
from contextlib import contextmanager


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

"""The package without its run-time type checks, which take half the time of a training step."""

from collections.abc import Iterator
from contextlib import contextmanager

import jaxtyping


@contextmanager
def unchecked() -> Iterator[None]:
    """Inside, annotations are not checked: for hundreds of equal steps, each call of which other tests check.

    Stands before a test as `@unchecked()` too.
    """
    jaxtyping.config.update("jaxtyping_disable", True)
    try:
        yield
    finally:
        jaxtyping.config.update("jaxtyping_disable", False)

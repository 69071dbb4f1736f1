"""Automatic mixed precision, `torch.autocast`: what computes a language model may use it, an SAE keeps its own dtype.

Sums over many codes and the order of pre-activations need the precision of the weights, and the sparse products are not
among the operations that autocast knows.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any, TypeVar, cast

import torch

Method = TypeVar("Method", bound=Callable[..., Any])


def autocast_dtype(kind: str) -> torch.dtype | None:
    """Dtype of products on a kind of device under the `torch.autocast` that is in force; None where none is.

    >>> with torch.autocast("cpu", torch.bfloat16):
    ...     autocast_dtype("cpu")
    torch.bfloat16
    """
    if kind == "meta" or not torch.amp.autocast_mode.is_autocast_available(kind):
        return None
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None


@contextmanager
def computing_in(dtype: torch.dtype | None, kind: str) -> Iterator[None]:
    """Context under `torch.autocast` to a dtype, or without it (None), whatever is in force around it."""
    if dtype == autocast_dtype(kind):
        yield
        return
    # A cache of casted weights would outlive a change of them.
    with torch.autocast(kind, dtype, enabled=dtype is not None, cache_enabled=False):
        yield


def in_own_dtype(method: Method) -> Method:
    """Decorator of methods of what has a `device`: they compute in the dtype of their tensors, also under autocast."""

    @wraps(method)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        kind = self.device.type
        if autocast_dtype(kind) is None:
            return method(self, *args, **kwargs)
        with computing_in(None, kind):
            return method(self, *args, **kwargs)

    return cast(Method, call)

"""Memory that is written over at every call: for buffers whose first touch would cost as much as what fills them."""

import math
import threading

import torch
from torch import Tensor


class _Kept(threading.local):
    """One buffer a name and thread; the largest asked for so far."""

    def __init__(self) -> None:
        self.buffers: dict[tuple[str, torch.dtype, torch.device], Tensor] = {}


_KEPT = _Kept()


def scratch(name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Uninitialised memory of a shape; the next call with the same name, dtype and device takes it back.

    >>> scratch("example", (2, 3), torch.float32, torch.device("cpu")).shape
    torch.Size([2, 3])
    """
    key, size = (name, dtype, device), math.prod(shape)
    if key not in _KEPT.buffers or _KEPT.buffers[key].numel() < size:
        _KEPT.buffers[key] = torch.empty(size, dtype=dtype, device=device)
    return _KEPT.buffers[key][:size].view(shape)

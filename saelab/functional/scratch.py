"""Reused buffers for intermediate results, where allocating memory would cost as much as computing what fills it."""

import math
import threading

import torch
from torch import Tensor


class _Kept(threading.local):
    """Buffers of this thread by name, dtype and device; each as large as the largest requested so far."""

    def __init__(self) -> None:
        self.buffers: dict[tuple[str, torch.dtype, torch.device], Tensor] = {}


_KEPT = _Kept()


def scratch(name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """An uninitialised buffer, which the next call with the same name, dtype and device in this thread reuses.

    Do not keep the result beyond that call.

    Args:
        name: what the buffer is for; buffers of different names never share memory.
        shape: shape of the result.
        dtype: dtype of the result.
        device: device of the result.

    >>> scratch("example", (2, 3), torch.float32, torch.device("cpu")).shape
    torch.Size([2, 3])
    """
    key, size = (name, dtype, device), math.prod(shape)
    if key not in _KEPT.buffers or _KEPT.buffers[key].numel() < size:
        _KEPT.buffers[key] = torch.empty(size, dtype=dtype, device=device)
    return _KEPT.buffers[key][:size].view(shape)

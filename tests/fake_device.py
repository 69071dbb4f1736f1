"""A device that is not there: numbers in the memory of the CPU, which code has to treat as those of an accelerator.

Inside `FakeDevice` tensors that are made on, or moved to, its device are `OnDevice`: they compute, but as on a real
accelerator they refuse to meet tensors of the CPU, and every read that would make the CPU wait for the device is
written down with the place in saelab that asked for it.

To PyTorch's own code such a tensor is on the device "meta", because a build for CPUs ends the process where autograd
meets a tensor on "cuda"; to Python code it says that it is on "cuda:0", or another. So branches on the type of the
device are taken as they would be there, kernels are not: what is wrong in a kernel alone is not found.
"""

import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_flatten, tree_map_only

import saelab
from saelab.functional import screening, sparse_products

PACKAGE = Path(saelab.__file__).parent
aten = torch.ops.aten
META = torch.device("meta")
WAITS = {aten.nonzero, aten.masked_select, aten.equal, aten._unique2, aten.unique_consecutive, aten.unique_dim}
"""operations whose result has a size that the CPU must learn, or is a number of the CPU"""
MASKED = {aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_}
"""operations that wait where an index is a mask, as they look for its places"""
STACKED = {aten.cat, aten.stack}
"""operations that take no number of the CPU"""


MADE_OF_NUMBERS = (torch.tensor, torch.as_tensor, torch.Tensor.new_tensor)
"""what PyTorch makes on "meta" without asking anybody, as it does numbers in an index"""
INDEXED = (torch.Tensor.__getitem__, torch.Tensor.__setitem__)


class MixedDevices(RuntimeError):
    """An operation was given tensors of the device and of the CPU."""


class OnDevice(torch.Tensor):
    """A tensor on the device; `host` has its numbers."""

    host: torch.Tensor

    @staticmethod
    def __new__(cls, host: torch.Tensor) -> "OnDevice":
        return torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined, no-any-return]
            cls,
            host.size(),
            strides=host.stride(),
            storage_offset=host.storage_offset(),
            dtype=host.dtype,
            layout=host.layout,
            device=META,
        )

    def __init__(self, host: torch.Tensor) -> None:
        self.host = host

    def __repr__(self, **_: Any) -> str:
        return f"OnDevice({self.host})"

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return FakeDevice.named

    @property
    def is_cuda(self) -> bool:  # type: ignore[override]
        return FakeDevice.named.type == "cuda"

    @property
    def is_meta(self) -> bool:  # type: ignore[override]
        return False

    def numpy(self, **_: Any) -> Any:
        raise MixedDevices("numpy reads memory of the CPU alone")

    def __array__(self, *_: Any) -> Any:
        raise MixedDevices("numpy reads memory of the CPU alone")

    def tolist(self) -> Any:
        return self.cpu().tolist()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {}, None)


class _Named(TorchFunctionMode):
    """Context in which PyTorch is given "meta" for every other device than the CPU."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in MADE_OF_NUMBERS and is_fake(kwargs.get("device", getattr(args[0], "device", None))):
            make = torch.tensor if func is torch.Tensor.new_tensor else func
            numbers = args[1:] if func is torch.Tensor.new_tensor else args
            if func is torch.Tensor.new_tensor:
                kwargs.setdefault("dtype", args[0].dtype)
            return make(*numbers, **{**kwargs, "device": torch.device("cpu")}).to(META)
        if func in INDEXED and isinstance(args[0], OnDevice):
            args = (args[0], as_index(args[1]), *args[2:])
        if is_fake(kwargs.get("device")):
            kwargs["device"] = META
        elif len(args) > 1 and func is torch.Tensor.to and is_device(args[1]) and is_fake(args[1]):
            args = (args[0], META, *args[2:])
        elif func is torch.Tensor.cuda:
            func, args = torch.Tensor.to, (args[0], META)
        return func(*args, **kwargs)


class FakeDevice(TorchDispatchMode):
    """Context in which tensors can be on the device.

    `reads` counts, by place in saelab, what makes the CPU wait for the device; `sent` what is copied there.
    """

    named = torch.device("cuda", 0)

    def __init__(self) -> None:
        super().__init__()
        self.reads: Counter[str] = Counter()
        self.sent: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {}, self)

    @property
    def n_reads(self) -> int:
        """How often the CPU waited."""
        return sum(self.reads.values())

    def forget(self) -> None:
        """Begin to count anew."""
        self.reads.clear()
        self.sent.clear()


@contextmanager
def fake_device(name: str = "cuda") -> Iterator[FakeDevice]:
    """Context with a fake device; what saelab keeps for the rest of a process is free of it afterward."""
    buffers, engine = dict(screening._KEPT.buffers), torch.autograd._engine_run_backward
    swaps = torch.__future__.get_swap_module_params_on_conversion()

    def backward(*args: Any, **kwargs: Any) -> Any:
        with _Named():  # which PyTorch leaves while it calls `backward`
            return engine(*args, **kwargs)

    with (
        patch.object(torch.autograd, "_engine_run_backward", backward),
        patch.object(FakeDevice, "named", torch.device(name, 0)),
        _Named(),
        FakeDevice() as device,
    ):
        torch.__future__.set_swap_module_params_on_conversion(True)  # else weights that modules share are torn apart
        try:
            yield device
        finally:
            torch.__future__.set_swap_module_params_on_conversion(swaps)
            screening._KEPT.buffers = buffers
            sparse_products.has_dot_kernel.cache_clear()


def run(func: Any, args: Any, kwargs: Any, device: FakeDevice | None) -> Any:
    """One operation, computed on the CPU, with its result where it would be."""
    given = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, torch.Tensor)]
    there = [x for x in given if isinstance(x, OnDevice)]
    here = [x for x in given if not isinstance(x, OnDevice)]
    if any(x.is_meta for x in here):
        raise MixedDevices(f"{func} was given a tensor that the fake device does not know of, at {place()}")
    packet, asked = func.overloadpacket, kwargs.get("device")
    copies = packet in (aten._to_copy, aten.copy_)
    if packet in MASKED and isinstance(args[0], OnDevice):  # indices may come from the CPU
        indices = {id(x) for x in args[1] if x is not None}
        check_mixed(func, args, kwargs, [x for x in here if id(x) not in indices])
    elif there and here and not copies:
        check_mixed(func, args, kwargs, here)
    if (generator := kwargs.get("generator")) is not None and (there or is_fake(asked)):
        raise MixedDevices(f"{func} was given a generator on {generator.device}")
    if device is not None:
        note(func, args, kwargs, there, here, device)
    if asked is not None:
        kwargs = {**kwargs, "device": torch.device("cpu")}
    stays = is_fake(asked) if asked is not None else bool(there)
    if packet is aten.copy_:
        stays = isinstance(args[0], OnDevice)
    host_args, host_kwargs = tree_map_only(OnDevice, lambda x: x.host, (args, kwargs))
    out = func(*host_args, **host_kwargs)
    if packet is aten._to_copy and out is host_args[0]:
        out = out.clone()
    if stays:
        if FakeDevice.named.type == "mps" and any(is_double(x) for x in tree_flatten(out)[0]):
            raise MixedDevices(f"{func} made float64, which MPS does not have, at {place()}")
        out = tree_map_only(torch.Tensor, OnDevice, out)
    return return_and_correct_aliasing(func, args, kwargs, out) if there and stays else out


def is_device(x: Any) -> bool:
    return isinstance(x, str | torch.device)


def is_fake(device: Any) -> bool:
    return device is not None and torch.device(device).type != "cpu"


def check_mixed(func: Any, args: Any, kwargs: Any, here: list[torch.Tensor]) -> None:
    """Raise MixedDevices, as an accelerator would; numbers of the CPU may be read."""
    written = {
        id(x)
        for argument, x in zip(func._schema.arguments, args, strict=False)
        if argument.alias_info is not None and argument.alias_info.is_write
        for x in (x if isinstance(x, list) else [x])
    } | {id(x) for name, x in kwargs.items() if name == "out"}
    for x in here:
        if x.ndim or id(x) in written or func.overloadpacket in STACKED:
            raise MixedDevices(f"{func} was given a tensor of the CPU {tuple(x.shape)} at {place()}")


def note(func: Any, args: Any, kwargs: Any, there: list[Any], here: list[Any], device: FakeDevice) -> None:
    packet = func.overloadpacket
    if packet is aten._local_scalar_dense and there:
        device.reads[f"{place()} number"] += 1
    elif packet in WAITS and there:
        device.reads[f"{place()} {packet.__name__}"] += 1
    elif packet in MASKED and there:
        if any(is_mask(x) for x in args[1]):
            device.reads[f"{place()} mask"] += 1
        if any(x is not None and not isinstance(x, OnDevice) for x in args[1]):
            device.sent[f"{place()} index"] += 1
    elif packet is aten.repeat_interleave and there and kwargs.get("output_size") is None:
        device.reads[f"{place()} repeat_interleave"] += 1
    elif packet is aten._to_copy and kwargs.get("device") is not None:
        if there and not is_fake(kwargs["device"]):
            device.reads[f"{place()} copy"] += 1
        elif here and is_fake(kwargs["device"]):
            device.sent[f"{place()} copy"] += 1
    elif packet is aten.copy_ and there and here:
        (device.reads if isinstance(args[1], OnDevice) else device.sent)[f"{place()} copy_"] += 1


def as_index(index: Any) -> Any:
    """The index with its lists of numbers as tensors on the device."""
    if isinstance(index, tuple):
        return tuple(as_index(part) for part in index)
    if not isinstance(index, list | range | np.ndarray):
        return index
    numbers = np.asarray(index)
    return torch.as_tensor(numbers if numbers.size else numbers.astype(np.int64)).to(META)


def is_double(x: Any) -> bool:
    return isinstance(x, torch.Tensor) and x.dtype in (torch.float64, torch.complex128)


def is_mask(x: Any) -> bool:
    return isinstance(x, torch.Tensor) and x.dtype in (torch.bool, torch.uint8)


def place() -> str:
    """Where in saelab, or else in the test, the operation was asked for."""
    frame = sys._getframe(1)
    first = ""
    while frame is not None:
        file = Path(frame.f_code.co_filename)
        if PACKAGE in file.parents:
            return f"{file.relative_to(PACKAGE.parent)}:{frame.f_lineno}"
        if not first and file.parent.name != "" and file.name.startswith("test_"):
            first = f"{file.name}:{frame.f_lineno}"
        frame = frame.f_back  # type: ignore[assignment]
    return first

"""Where Numba's kernels are used in place of PyTorch's operations on CPUs, and the threads they run on.

They are used for float32 on CPUs with weights of at least `LEAST_WEIGHTS` entries, where numba can be imported (extra
`[fast]`); SAELAB_NUMBA=0 in the environment switches them off. Elsewhere PyTorch's operations give the same numbers up
to rounding. Which of them is used depends on the weights alone, so that equal rows give equal results whatever else is
in their batch.

A kernel runs on the threads that PyTorch's own operations run on. After an operation of its own, OpenMP keeps these
waiting for milliseconds, in which they take the processor from any other thread: a training step that changes between
PyTorch's threads and others loses a fifth of its time.
"""

import ctypes
import functools
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

LEAST_WEIGHTS = 2**16
"""below this number of weights PyTorch's operations take about as long"""
PARTS = 4
"""of a range for each thread"""


def use_numba(weights: Tensor, *others: Tensor) -> bool:
    """Whether Numba's kernels take these tensors: float32, contiguous and on the CPU, the weights large enough.

    >>> use_numba(torch.ones(2, 2))
    False
    """
    return all(_is_plain(tensor) for tensor in (weights, *others)) and takes_numba(weights.numel())


def takes_numba(n_weights: int) -> bool:
    """Whether Numba's kernels take float32 weights of so many entries, where these are on the CPU."""
    return n_weights >= LEAST_WEIGHTS and os.environ.get("SAELAB_NUMBA") != "0" and has_numba()


def _is_plain(tensor: Tensor) -> bool:
    """Whether the tensor's memory can be read as an array of float32, row by row."""
    plain = type(tensor) in (Tensor, torch.nn.Parameter) and tensor.device.type == "cpu"
    return plain and tensor.dtype == torch.float32 and tensor.is_contiguous()


@functools.cache
def has_numba() -> bool:
    """Whether numba is installed; looked up once a process, when weights that are large enough are first seen."""
    return find_spec("numba") is not None


def run_parts(kernel: Callable[[int, int], object], n: int) -> None:
    """Call `kernel(first, last)` for parts of `range(n)` on as many threads as PyTorch uses, a few parts for each.

    Args:
        kernel: called with the bounds of a part, by several threads at once; its result must not depend on how the
            range is divided, and it should hold the interpreter's lock for moments only.
        n: length of the range.

    >>> found = [0] * 4
    >>> run_parts(lambda first, last: found.__setitem__(slice(first, last), range(first, last)), 4)
    >>> found
    [0, 1, 2, 3]
    """
    n_threads = min(torch.get_num_threads(), n)
    if n_threads <= 1:
        kernel(0, n)
        return
    n_parts = min(n, n_threads * PARTS)  # a thread that is slowed down leaves more of them to the others
    parts = iter([(n * i // n_parts, n * (i + 1) // n_parts) for i in range(n_parts)])
    run = _run_by_openmp if _openmp() else _run_by_pool
    run(kernel, parts, n_threads)


Ranges = Iterator[tuple[int, int]]


def _run_by_openmp(kernel: Callable[[int, int], object], parts: Ranges, n_threads: int) -> None:
    errors: list[BaseException] = []

    def work(_: Any) -> None:
        try:
            for first, last in iter(lambda: next(parts, None), None):
                kernel(first, last)
        except BaseException as error:
            errors.append(error)

    callback, library = _CALLBACK(work), _openmp()
    assert library is not None
    library.GOMP_parallel(callback, None, n_threads, 0)
    if errors:
        raise errors[0]


def _run_by_pool(kernel: Callable[[int, int], object], parts: Ranges, n_threads: int) -> None:
    def work() -> None:
        for first, last in iter(lambda: next(parts, None), None):
            kernel(first, last)

    pool = _pool(n_threads - 1, os.getpid())
    others = [pool.submit(work) for _ in range(n_threads - 1)]
    try:
        work()
    finally:
        for other in others:
            other.result()


_CALLBACK = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


@functools.cache
def _openmp() -> ctypes.CDLL | None:
    """The GNU OpenMP library that PyTorch has loaded into this process; None where it has another or none."""
    maps = Path("/proc/self/maps")
    if not maps.exists() or "ATen parallel backend: OpenMP" not in torch.__config__.parallel_info():
        return None
    files = {line.split(maxsplit=5)[-1] for line in maps.read_text().splitlines() if "libgomp" in line}
    home = Path(torch.__file__).parent
    if len(files) > 1:  # other libraries bring copies of their own
        files = {file for file in files if Path(file).parent in (home / "lib", home.with_name("torch.libs"))}
    if len(files) != 1:  # it is not known which one runs PyTorch's operations
        return None
    library = ctypes.CDLL(files.pop(), mode=os.RTLD_NOW | os.RTLD_NOLOAD)
    library.GOMP_parallel.argtypes = [_CALLBACK, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
    library.GOMP_parallel.restype = None
    return library


@functools.lru_cache(maxsize=4)
def _pool(n: int, process: int) -> ThreadPoolExecutor:
    """Threads beside the calling one; those of a parent process do not run in a forked one, so each has its own."""
    return ThreadPoolExecutor(n, thread_name_prefix="saelab-kernel")

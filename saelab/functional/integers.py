"""Matrix products of int8 that are exact on every processor, and the check whether the int8 kernel can be used here.

Without VNNI instructions oneDNN sums pairs of int8 products in 16 bits, with saturation: `torch._int_mm` is then
silently wrong by up to the size of its own entries. The processor's instruction set does not decide this, as oneDNN
may be restricted to older instructions (ONEDNN_MAX_CPU_ISA, read once per process). So the kernel is tried once, and
used only where it is exact.
"""

import functools

import torch
from jaxtyping import Int, Int8
from torch import Tensor

TRIED_SHAPES = ((1, 25, 560), (17, 16, 16), (70, 33, 512), (30, 129, 1024), (64, 769, 256))
"""rows, width and columns: a vector, whole and broken tiles, and lengths of sum that meet every kernel's remainder"""


def multiply_int8(
    a: Int8[Tensor, "n d"], b: Int8[Tensor, "m d"], out: Int[Tensor, "n m"] | None = None
) -> Int[Tensor, "n m"]:
    """`a b^T` in int32, exact: by the int8 kernel where that is exact here, else through float32 and as slow as that.

    The result is written into `out` where that is given.

    >>> multiply_int8(torch.full((1, 2), -128, dtype=torch.int8), torch.full((1, 2), -128, dtype=torch.int8))
    tensor([[32768]], dtype=torch.int32)
    """
    if a.device.type == "cpu" and has_exact_int8():
        return torch._int_mm(a, b.T) if out is None else torch._int_mm(a, b.T, out=out)
    out = torch.zeros(len(a), len(b), dtype=torch.int32, device=a.device) if out is None else out.zero_()
    for columns in torch.split(torch.arange(a.shape[1], device=a.device), 1024):  # 1024 * 128^2 = 2^24: exact
        part = slice(int(columns[0]), int(columns[-1]) + 1)
        out += (a[:, part].float() @ b[:, part].float().T).int()
    return out


def has_exact_int8() -> bool:
    """Whether `torch._int_mm` is exact here; tried once per process, thread count and oneDNN setting (10 ms)."""
    return _try_int8(torch.get_num_threads(), torch.backends.mkldnn.enabled)


@functools.cache
def _try_int8(n_threads: int, with_onednn: bool) -> bool:
    generator = torch.Generator().manual_seed(0)
    for n, d, m in TRIED_SHAPES:
        a, b = (torch.randint(-128, 128, (rows, d), dtype=torch.int8, generator=generator) for rows in (n, m))
        a[0], b[0] = -128, -128  # the largest sum there is
        a[-1, ::2] = 127
        try:
            found = torch._int_mm(a, b.T)
        except (AttributeError, RuntimeError):  # a private name, and not every build has the kernel
            return False
        if not torch.equal(found.double(), a.double() @ b.double().T):
            return False
    return True

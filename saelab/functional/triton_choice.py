"""Where Triton's kernels are used in place of PyTorch's, and residuals of nested prefixes by either.

They are used for float32 and low precision on CUDA devices, where triton can be imported; SAELAB_TRITON=0 in the
environment switches them off. Elsewhere PyTorch's operations give the same numbers up to rounding.
"""

import functools
import os

import torch
from jaxtyping import Float
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CAPABILITY = (8, 0)  # the first that multiplies bfloat16


def use_triton(first: Tensor, *others: Tensor) -> bool:
    """Whether Triton's kernels take these tensors: all on CUDA devices, float32 or shorter, and not switched off.

    >>> use_triton(torch.ones(2))
    False
    """
    tensors = (first, *others)
    if not all(tensor.is_cuda and tensor.dtype in DTYPES for tensor in tensors):
        return False
    if os.environ.get("SAELAB_TRITON") == "0":
        return False
    return has_triton() and all(_is_able(tensor.device) for tensor in tensors)


@functools.cache
def has_triton() -> bool:
    """Whether triton can be imported; tried once a process, when a tensor on a CUDA device is first seen."""
    from saelab.functional import triton_kernels

    return triton_kernels.IS_INSTALLED


@functools.cache
def _is_able(device: torch.device) -> bool:
    return torch.version.cuda is None or torch.cuda.get_device_capability(device) >= CAPABILITY


def subtract_parts(
    target: Float[Tensor, "n_rows d"],
    parts: Float[Tensor, "n_groups n_rows d"],
    out: Float[Tensor, "n_groups n_rows d"],
) -> Float[Tensor, "n_groups"]:
    """Squared errors of every prefix, `||target - sum_{h <= g} parts[h]||^2`; the residuals are written into `out`.

    `out` may be `parts`: one buffer then serves both.

    >>> out = torch.empty(2, 1, 2)
    >>> subtract_parts(torch.ones(1, 2), torch.ones(2, 1, 2), out).round(), out[1]
    (tensor([0., 2.]), tensor([[-1., -1.]]))
    """
    if parts.numel() and use_triton(target, parts):
        from saelab.functional import triton_kernels

        return triton_kernels.subtract_parts(target, parts, out)
    above = target
    for part, residual in zip(parts, out, strict=True):
        above = torch.sub(above, part, out=residual)
    errors: Tensor = torch.linalg.vector_norm(out.flatten(1), dim=1).square()
    return errors


def add_residuals(
    residuals: Float[Tensor, "n_groups n_rows d"], grad: Float[Tensor, "n_groups"]
) -> Float[Tensor, "n_groups n_rows d"]:
    """Gradients of every part, `-2 sum_{h >= g} grad[h] residuals[h]`, from those of the squared errors.

    >>> add_residuals(torch.ones(2, 1, 1), torch.tensor([1.0, 2.0])).flatten()
    tensor([-6., -4.])
    """
    if residuals.numel() and use_triton(residuals, grad):
        from saelab.functional import triton_kernels

        return triton_kernels.add_residuals(residuals, grad)
    grad_parts = residuals * (-2 * grad).view(-1, 1, 1)
    for g in range(len(residuals) - 2, -1, -1):  # part g enters every reconstruction from g on
        grad_parts[g] += grad_parts[g + 1]
    return grad_parts

"""Reconstruction losses of SAE training; each is unitless and about 1 for a dictionary that explains nothing."""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor


class _NestedError(torch.autograd.Function):
    """Squared errors of cumulative reconstructions; one buffer of residuals serves forward and backward."""

    @staticmethod
    def forward(ctx: Any, target: Tensor, parts: Tensor) -> tuple[Tensor, Tensor]:
        residuals = torch.empty_like(parts)
        torch.sub(target, parts[0], out=residuals[0])
        for g in range(1, len(parts)):
            torch.sub(residuals[g - 1], parts[g], out=residuals[g])
        ctx.save_for_backward(residuals)
        last = residuals[-1]
        ctx.mark_non_differentiable(last)
        return torch.linalg.vector_norm(residuals.flatten(1), dim=1).square(), last

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor, Tensor]:
        (residuals,) = ctx.saved_tensors
        grad_parts = residuals * (-2 * grad).view(-1, 1, 1)
        for g in range(len(residuals) - 2, -1, -1):  # part g enters every reconstruction from g on
            grad_parts[g] += grad_parts[g + 1]
        return -grad_parts[0], grad_parts


_nested_error: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] = _NestedError.apply


def nested_error(
    target: Float[Tensor, "n_rows d_in"], parts: Float[Tensor, "n_groups n_rows d_in"]
) -> tuple[Float[Tensor, "n_groups"], Float[Tensor, "n_rows d_in"]]:
    """Squared error of every prefix, `||target - sum_{h <= g} parts[h]||^2`, and the residual of the last, detached.

    Source: the Matryoshka loss of arXiv:2503.17547, groups accumulated so that all prefixes cost one decode.

    >>> nested_error(torch.ones(1, 2), torch.ones(2, 1, 2))[0].round()
    tensor([0., 2.])
    """
    return _nested_error(target, parts)


def normalised_error(estimate: Float[Tensor, "n_rows d_in"], target: Float[Tensor, "n_rows d_in"]) -> Float[Tensor, ""]:
    """`sum ||estimate - target||^2 / sum ||target - mean(target)||^2`, 0 where the target does not vary.

    In [0, inf), lower is better. The scale of the AuxK loss (arXiv:2406.04093, A.2); the caller detaches the target.

    >>> normalised_error(torch.zeros(2, 1), torch.tensor([[1.0], [-1.0]]))
    tensor(1.)
    """
    variance = (target - target.mean(0)).square().sum()
    error = (estimate - target).square().sum()
    return error / variance if variance > 0 else error * 0

"""Proximal operators of sparse coding: dense pre-activations u in, sparse codes z out, differentiable.

Each is the proximal map of a sparsity penalty (arXiv:2510.00404): ReLU of l1 on z >= 0, JumpReLU of l0 on z >= 0,
TopK and AbsTopK of the k-sparse set with and without z >= 0. The batch operators share k * n_rows places between the
rows (arXiv:2412.06410).
"""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saelab.functional.ranking import largest_first


def keep_topk(u: Float[Tensor, "*batch d_sae"], k: int, signed: bool) -> Float[Tensor, "*batch d_sae"]:
    """Keep the k largest of every row: by |u| where `signed`, else the positive ones among the k largest; the rest is
    0. Of equal ones the first are kept.

    >>> keep_topk(torch.tensor([3.0, -5.0, 1.0]), k=2, signed=True)
    tensor([ 3., -5.,  0.])
    """
    return keep_places(u, largest_first((u.abs() if signed else u).detach(), k), signed)


def keep_places(
    u: Float[Tensor, "*batch d_sae"], places: Int[Tensor, "*batch k"], signed: bool
) -> Float[Tensor, "*batch d_sae"]:
    """Keep what is at some places of every row, only the positive ones unless `signed`; the rest is 0.

    >>> keep_places(torch.tensor([3.0, -5.0, 1.0]), torch.tensor([0, 1]), signed=False)
    tensor([3., 0., 0.])
    """
    kept = u.gather(-1, places)
    return torch.zeros_like(u).scatter(-1, places, kept if signed else kept.relu())


def keep_batch_topk(u: Float[Tensor, "*batch d_sae"], k: int, signed: bool) -> Float[Tensor, "*batch d_sae"]:
    """Keep the k * n_rows largest of the whole batch: by |u| where `signed`, else the positive ones among them. Of
    equal ones the first are kept, row by row.

    >>> keep_batch_topk(torch.tensor([[3.0, 4.0], [1.0, 2.0]]), k=1, signed=False)
    tensor([[3., 4.],
            [0., 0.]])
    """
    n_rows = u[..., 0].numel()
    return keep_topk(u.reshape(-1), k * n_rows, signed).view_as(u)


def keep_group_max(u: Float[Tensor, "*batch d_sae"], k: int) -> Float[Tensor, "*batch d_sae"]:
    """Keep the largest of each of k contiguous groups of a row, the first of equal ones, where it is positive; the rest
    is 0.

    >>> keep_group_max(torch.tensor([3.0, 5.0, -1.0, -2.0]), k=2)
    tensor([0., 5., 0., 0.])
    """
    grouped = u.unflatten(-1, (k, -1))
    places = grouped.argmax(-1, keepdim=True)
    return torch.zeros_like(grouped).scatter(-1, places, grouped.gather(-1, places).relu()).flatten(-2)


def keep_above(
    u: Float[Tensor, "*batch d_sae"], threshold: Float[Tensor, "..."], signed: bool
) -> Float[Tensor, "*batch d_sae"]:
    """Keep what exceeds a threshold: |u| > threshold where `signed`, else u > threshold and u > 0.

    >>> keep_above(torch.tensor([3.0, -5.0, 1.0]), torch.tensor(2.0), signed=True)
    tensor([ 3., -5.,  0.])
    """
    return u * (u.abs() > threshold) if signed else u.relu() * (u > threshold)


class _JumpReLU(torch.autograd.Function):
    """u where u > threshold; the threshold's gradient is a kernel estimate at the jump."""

    @staticmethod
    def forward(ctx: Any, u: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
        ctx.save_for_backward(u, threshold)
        ctx.bandwidth = bandwidth
        return u * (u > threshold)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        u, threshold = ctx.saved_tensors
        near = (u - threshold).abs() < ctx.bandwidth / 2
        grad_threshold = (grad * near * (-threshold / ctx.bandwidth)).sum_to_size(threshold.shape)
        return grad * (u > threshold), grad_threshold, None


class _Step(torch.autograd.Function):
    """1 where u > threshold; the kernel estimate looks at u, before the jump, so that it sees both sides of it."""

    @staticmethod
    def forward(ctx: Any, u: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
        ctx.save_for_backward(u, threshold)
        ctx.bandwidth = bandwidth
        return (u > threshold).to(u.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor, None]:
        u, threshold = ctx.saved_tensors
        near = (u - threshold).abs() < ctx.bandwidth / 2
        return None, (grad * near / -ctx.bandwidth).sum_to_size(threshold.shape), None


def jumprelu(
    u: Float[Tensor, "*batch n"], threshold: Float[Tensor, "*batch_or_none n"], bandwidth: float
) -> Float[Tensor, "*batch n"]:
    """`u` where `u > threshold`, else 0, with a straight-through gradient for the threshold (arXiv:2407.14435, eq. 11).

    d out / d threshold is estimated as `-(threshold / bandwidth) * [|u - threshold| < bandwidth / 2]`.

    >>> jumprelu(torch.tensor([[0.5, 2.0]]), torch.tensor([1.0, 1.0]), bandwidth=0.1)
    tensor([[0., 2.]])
    """
    return _JumpReLU.apply(u, threshold, bandwidth)


def step_above(
    u: Float[Tensor, "*batch n"], threshold: Float[Tensor, "*batch_or_none n"], bandwidth: float
) -> Float[Tensor, "*batch n"]:
    """1 where `u > threshold`, else 0, with a straight-through gradient for the threshold (arXiv:2407.14435, eq. 12).

    Its sum over latents is L0. The gradient is estimated on the pre-activation as `-[|u - threshold| < bandwidth / 2]
    / bandwidth`.

    >>> step_above(torch.tensor([[0.5, 2.0]]), torch.tensor([1.0, 1.0]), bandwidth=0.1)
    tensor([[0., 1.]])
    """
    return _Step.apply(u, threshold, bandwidth)

"""Sparse activation functions: TopK, BatchTopK, GroupMax, JumpReLU and signed versions.

Each activation function is differentiable and the proximal operator of a sparsity penalty (arXiv:2510.00404): ReLU of
l1 on z >= 0, JumpReLU and its signed version of l0 with and without z >= 0, TopK and AbsTopK likewise of the k-sparse
set. The batch operators keep k * n_rows codes in all, shared between the rows (arXiv:2412.06410).
"""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saelab.functional.screening import largest_first


def keep_topk(u: Float[Tensor, "*batch d_sae"], k: int, signed: bool) -> Float[Tensor, "*batch d_sae"]:
    """`u` where it is among the k largest of its row, else 0: TopK, or AbsTopK where `signed`.

    Where `signed` the largest are those of |u|, else negative ones among the k largest become 0. Of equal ones the
    first are kept.

    >>> keep_topk(torch.tensor([3.0, -5.0, 1.0]), k=2, signed=True)
    tensor([ 3., -5.,  0.])
    """
    return keep_places(u, largest_first((u.abs() if signed else u).detach(), k), signed)


def keep_places(
    u: Float[Tensor, "*batch d_sae"], places: Int[Tensor, "*batch k"], signed: bool
) -> Float[Tensor, "*batch d_sae"]:
    """`u` at the latents `places` of every row, else 0; negative values become 0 unless `signed`.

    >>> keep_places(torch.tensor([3.0, -5.0, 1.0]), torch.tensor([0, 1]), signed=False)
    tensor([3., 0., 0.])
    """
    kept = u.gather(-1, places)
    return torch.zeros_like(u).scatter(-1, places, kept if signed else kept.relu())


def keep_batch_topk(u: Float[Tensor, "*batch d_sae"], k: int, signed: bool) -> Float[Tensor, "*batch d_sae"]:
    """`u` where it is among the k * n_rows largest of the batch, else 0: BatchTopK, or by |u| where `signed`.

    Unless `signed`, negative ones among them become 0. Of equal ones the first are kept, row by row.

    >>> keep_batch_topk(torch.tensor([[3.0, 4.0], [1.0, 2.0]]), k=1, signed=False)
    tensor([[3., 4.],
            [0., 0.]])
    """
    n_rows = u[..., 0].numel()
    return keep_topk(u.reshape(-1), k * n_rows, signed).view_as(u)


def keep_group_max(u: Float[Tensor, "*batch d_sae"], k: int) -> Float[Tensor, "*batch d_sae"]:
    """`u` where it is positive and the largest of its group, one of k contiguous groups of a row; else 0.

    Of equal ones the first is kept.

    >>> keep_group_max(torch.tensor([3.0, 5.0, -1.0, -2.0]), k=2)
    tensor([0., 5., 0., 0.])
    """
    grouped = torch.unflatten(u, -1, (k, -1))
    places = grouped.argmax(-1, keepdim=True)
    return torch.zeros_like(grouped).scatter(-1, places, grouped.gather(-1, places).relu()).flatten(-2)


def keep_above(
    u: Float[Tensor, "*batch d_sae"], threshold: Float[Tensor, "..."], signed: bool
) -> Float[Tensor, "*batch d_sae"]:
    """`u` where it exceeds a threshold, else 0: |u| > threshold where `signed`, else u > threshold and u > 0.

    >>> keep_above(torch.tensor([3.0, -5.0, 1.0]), torch.tensor(2.0), signed=True)
    tensor([ 3., -5.,  0.])
    """
    return u * (u.abs() > threshold) if signed else u.relu() * (u > threshold)


def project_simplex(x: Float[Tensor, "n_rows n"]) -> Float[Tensor, "n_rows n"]:
    """Nearest rows with entries >= 0 that sum to 1 (Euclidean projection): `max(x - t, 0)`, with `t` found per row.

    The projection shifts all positive entries of a row equally, so a gradient step on one weight is balanced by all
    others, and an entry at 0 returns as soon as a step lifts it above t; clipping and dividing by the sum has neither
    property.

    >>> project_simplex(torch.tensor([[1.0, 0.5, -1.0]]))
    tensor([[0.7500, 0.2500, 0.0000]])
    """
    kept = torch.ones_like(x, dtype=torch.bool)
    while True:  # Michelot's algorithm: the set of positive entries shrinks in each iteration
        bound = ((x * kept).sum(1, keepdim=True) - 1) / kept.sum(1, keepdim=True)
        fewer = kept & (x > bound)
        if torch.equal(fewer, kept):
            break
        kept = fewer
    rows = (x - bound).clamp(min=0)
    return rows / rows.sum(1, keepdim=True)


def sparsemax(u: Float[Tensor, "*batch d_sae"], scale: float) -> Float[Tensor, "*batch d_sae"]:
    """Sparsemax of every row, in units of its largest entry: `z = s sparsemax(u / s)`, `s = scale max(u)`, which is the
    nearest row with entries >= 0 and sum s (arXiv:1602.02068); 0 where no entry is positive.

    Its entries are `max(u - t, 0)` with one t for the row. Differentiable, also through s; z(c u) = c z(u) for c > 0.

    Args:
        u: pre-activations.
        scale: sum of a row of codes over its largest pre-activation, above 0; more is less sparse.

    >>> sparsemax(torch.tensor([2.0, 1.5, 0.2]), scale=1.0)
    tensor([1.2500, 0.7500, 0.0000])
    """
    rows = u.reshape(-1, u.shape[-1])
    total = scale * rows.amax(1, keepdim=True).relu()
    with torch.no_grad():
        kept = (project_simplex(rows / total.clamp(min=torch.finfo(u.dtype).tiny)) > 0) & (total > 0)
    bound = ((rows * kept).sum(1, keepdim=True) - total) / kept.sum(1, keepdim=True).clamp(min=1)
    return (rows - bound).masked_fill(~kept, 0.0).relu().view_as(u)


class _JumpReLU(torch.autograd.Function):
    """u where its size exceeds the threshold; the threshold's gradient is a kernel estimate at the jump."""

    @staticmethod
    def forward(ctx: Any, u: Tensor, threshold: Tensor, bandwidth: float, signed: bool) -> Tensor:
        ctx.save_for_backward(u, threshold)
        ctx.bandwidth, ctx.signed = bandwidth, signed
        return u * ((u.abs() if signed else u) > threshold)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        u, threshold = ctx.saved_tensors
        size = u.abs() if ctx.signed else u
        near = (size - threshold).abs() < ctx.bandwidth / 2
        lost = grad * near * u.sign() if ctx.signed else grad * near
        grad_threshold = (lost * (-threshold / ctx.bandwidth)).sum_to_size(threshold.shape)
        return grad * (size > threshold), grad_threshold, None, None


_jumprelu: Callable[[Tensor, Tensor, float, bool], Tensor] = _JumpReLU.apply


class _StepAbove(torch.autograd.Function):
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


_step: Callable[[Tensor, Tensor, float], Tensor] = _StepAbove.apply


def jumprelu(
    u: Float[Tensor, "*batch n"], threshold: Float[Tensor, "*batch_or_none n"], bandwidth: float, signed: bool = False
) -> Float[Tensor, "*batch n"]:
    """`u` where `u > threshold`, else 0, with a straight-through gradient for the threshold (arXiv:2407.14435, eq. 11).

    d out / d threshold is estimated as `-(threshold / bandwidth) * [|u - threshold| < bandwidth / 2]`. Where `signed`,
    |u| takes the place of u in both, and the estimate has the sign of u.

    Args:
        u: pre-activations.
        threshold: threshold of each pre-activation, positive.
        bandwidth: width of the window around the threshold in which it has a gradient.
        signed: whether |u| is compared with the threshold, so that codes keep their signs.

    >>> jumprelu(torch.tensor([[0.5, -2.0]]), torch.tensor([1.0, 1.0]), bandwidth=0.1, signed=True)
    tensor([[ 0., -2.]])
    """
    return _jumprelu(u, threshold, bandwidth, signed)


def step_above(
    u: Float[Tensor, "*batch n"], threshold: Float[Tensor, "*batch_or_none n"], bandwidth: float, signed: bool = False
) -> Float[Tensor, "*batch n"]:
    """1 where `u > threshold`, else 0, with a straight-through gradient for the threshold (arXiv:2407.14435, eq. 12).

    Its sum over latents is L0. The gradient is estimated on the pre-activation as `-[|u - threshold| < bandwidth / 2]
    / bandwidth`.

    Args:
        u: pre-activations.
        threshold: threshold of each pre-activation, positive.
        bandwidth: width of the window around the threshold in which it has a gradient.
        signed: whether |u| takes the place of u.

    >>> step_above(torch.tensor([[0.5, -2.0]]), torch.tensor([1.0, 1.0]), bandwidth=0.1, signed=True)
    tensor([[0., 1.]])
    """
    return _step(u.detach().abs() if signed else u, threshold, bandwidth)

"""Pre-activations just below their threshold: codes of 0 that nothing reads, with a gradient to the threshold.

A straight-through estimate (`jumprelu`, `step_above`) gives a threshold a gradient from every pre-activation less than
half of a bandwidth away. Those below it are 0 in the reconstruction and send nothing to encoder and decoder. Neither
their values nor their separate gradients are needed, but one sum for each latent.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saelab.functional.compiled import use_numba
from saelab.functional.sparse_products import gather_sum, transpose_entries


class SilentCodes(NamedTuple):
    """Entries of a batch whose code is 0 and whose threshold has a gradient, by latent: latent j has those of the rows
    `rows[starts[j]:starts[j + 1]]`.
    """

    rows: Int[Tensor, "n_silent"]
    starts: Int[Tensor, "d_sae_1"]

    @classmethod
    def from_entries(cls, rows: Int[Tensor, "n_silent"], latents: Int[Tensor, "n_silent"], d_sae: int) -> "SilentCodes":
        """The entries sorted by latent, in the order given.

        Args:
            rows: row of each entry.
            latents: latent of each entry.
            d_sae: number of latents.

        >>> SilentCodes.from_entries(torch.tensor([0, 1]), torch.tensor([2, 0]), 3)
        SilentCodes(rows=tensor([1, 0]), starts=tensor([0, 1, 1, 2]))
        """
        order, starts = transpose_entries(latents, d_sae)
        return cls(rows.index_select(0, order), starts)


class _ThresholdError(torch.autograd.Function):
    """The squared error as it is, with the gradient that silent codes give their thresholds."""

    @staticmethod
    def forward(
        ctx: Any,
        error: Tensor,
        threshold: Tensor,
        residual: Tensor,
        W_dec: Tensor,
        silent: SilentCodes,
        bandwidth: float,
    ) -> Tensor:
        ctx.save_for_backward(threshold, residual, W_dec)
        ctx.silent, ctx.bandwidth = silent, bandwidth
        return error.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        threshold, residual, W_dec = ctx.saved_tensors
        # a code z has the gradient -2 <residual, W_dec row>, and z of the threshold -threshold / bandwidth
        lost = sum_products(residual, W_dec, ctx.silent)
        return grad, grad * (2 / ctx.bandwidth) * threshold * lost, None, None, None, None


_threshold_error: Callable[[Tensor, Tensor, Tensor, Tensor, SilentCodes, float], Tensor] = _ThresholdError.apply


class _SilentPenalty(torch.autograd.Function):
    """0, with the gradient of each silent code's step to its threshold."""

    @staticmethod
    def forward(ctx: Any, threshold: Tensor, silent: SilentCodes, bandwidth: float) -> Tensor:
        ctx.counts, ctx.bandwidth = silent.starts.diff(), bandwidth
        return threshold.new_zeros(1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad * ctx.counts / -ctx.bandwidth, None, None


_silent_penalty: Callable[[Tensor, SilentCodes, float], Tensor] = _SilentPenalty.apply


def threshold_error(
    error: Float[Tensor, "1"],
    threshold: Float[Tensor, "d_sae"],
    residual: Float[Tensor, "n_rows d_in"],
    W_dec: Float[Tensor, "d_sae d_in"],
    silent: SilentCodes,
    bandwidth: float,
) -> Float[Tensor, "1"]:
    """The squared error `||residual||^2` of a reconstruction, with the gradient that silent codes give thresholds: as
    if they were among its codes, by `jumprelu`.

    Args:
        error: the squared error, with the gradients of the codes that fire.
        threshold: threshold of each latent.
        residual: what the codes leave of the activations; no gradient reaches it.
        W_dec: decoder, one row per latent; no gradient reaches it, as silent codes are 0.
        silent: the silent codes.
        bandwidth: width of the window around the threshold in which it has a gradient.

    >>> threshold = torch.ones(2, requires_grad=True)
    >>> silent = SilentCodes(torch.tensor([0]), torch.tensor([0, 0, 1]))
    >>> threshold_error(torch.ones(1), threshold, torch.ones(1, 2), torch.eye(2), silent, 0.5).backward()
    >>> threshold.grad
    tensor([0., 4.])
    """
    return _threshold_error(error, threshold, residual, W_dec, silent, bandwidth)


def silent_penalty(threshold: Float[Tensor, "d_sae"], silent: SilentCodes, bandwidth: float) -> Float[Tensor, "1"]:
    """`step_above` of all silent codes together: 0, with their gradients to the thresholds, -1 / bandwidth for each.

    Args:
        threshold: threshold of each latent.
        silent: the silent codes.
        bandwidth: width of the window around the threshold in which it has a gradient.

    >>> threshold = torch.ones(2, requires_grad=True)
    >>> silent_penalty(threshold, SilentCodes(torch.tensor([0]), torch.tensor([0, 0, 1])), 0.5).backward()
    >>> threshold.grad.tolist() == [0.0, -2.0]
    True
    """
    return _silent_penalty(threshold, silent, bandwidth)


def sum_products(
    left: Float[Tensor, "n_rows d"], table: Float[Tensor, "d_sae d"], silent: SilentCodes
) -> Float[Tensor, "d_sae"]:
    """Sum of the inner products of each latent's entries: `out[j] = <sum over its rows r: left[r], table[j]>`.

    Args:
        left: first factors, one row per token.
        table: second factors, one row per latent.
        silent: the entries.

    >>> sum_products(torch.ones(1, 2), torch.eye(2), SilentCodes(torch.tensor([0]), torch.tensor([0, 0, 1])))
    tensor([0., 1.])
    """
    if use_numba(table, left):
        from saelab.functional import step_kernels

        return step_kernels.sum_products(silent.rows, silent.starts, left, table)
    sums = gather_sum(silent.rows, left.new_ones(len(silent.rows)), silent.starts, left)
    products: Tensor = torch.linalg.vecdot(sums, table)
    return products

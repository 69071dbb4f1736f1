"""Products that touch only the non-zero codes: the sparse half of a training step.

A batch of codes is held in compressed rows: `indices` and `values` of its entries, row after row, and `offsets` saying where
each row starts. Two products are enough for everything a sparse autoencoder does with it, forward and backward:

    gather_sum    out[r] = sum over entries e of row r:  values[e] * table[indices[e]]       (sparse x dense)
    sampled_dot   out[e] = < left[rows[e]], table[indices[e]] >                              (dense x dense, at the entries)
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import embedding_bag


def gather_sum(
    indices: Int[Tensor, "nnz"],
    values: Float[Tensor, "nnz"],
    offsets: Int[Tensor, "n_rows_1"],
    table: Float[Tensor, "n d"],
) -> Float[Tensor, "n_rows d"]:
    """Sum weighted rows of `table`: `out[r] = sum_e values[e] * table[indices[e]]` over the entries e of row r.

    >>> gather_sum(torch.tensor([0, 2, 1]), torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0, 2, 3]), torch.eye(3))
    tensor([[1., 0., 2.],
            [0., 3., 0.]])
    """
    if indices.numel() == 0:
        return table.new_zeros(offsets.numel() - 1, table.shape[1])
    return embedding_bag(
        indices, table, offsets, per_sample_weights=values, mode="sum", include_last_offset=True
    )


def sampled_dot(
    rows: Int[Tensor, "nnz"],
    indices: Int[Tensor, "nnz"],
    left: Float[Tensor, "n_rows d"],
    table: Float[Tensor, "n d"],
) -> Float[Tensor, "nnz"]:
    """Inner products at the entries only: `out[e] = <left[rows[e]], table[indices[e]]>`.

    On CPU and CUDA this is the kernel behind the gradient of `embedding_bag`'s weights, which reads each row in place; gathering
    the rows first (what other devices do here) moves several times the memory.

    >>> sampled_dot(torch.tensor([0, 1]), torch.tensor([2, 0]), torch.eye(2, 3), torch.ones(3, 3))
    tensor([1., 1.])
    """
    if indices.numel() == 0:
        return table.new_zeros(0)
    if table.device.type in ("cpu", "cuda"):
        bags = torch.zeros(1, dtype=indices.dtype, device=indices.device)
        kernel = torch.ops.aten._embedding_bag_per_sample_weights_backward
        return kernel(left.contiguous(), table, indices, bags, rows, 0)
    return (left[rows] * table[indices]).sum(-1)


def transpose_entries(
    indices: Int[Tensor, "nnz"], n_columns: int
) -> tuple[Int[Tensor, "nnz"], Int[Tensor, "n_columns_1"]]:
    """Order the entries by column: the permutation, and where each column starts in it (compressed columns).

    >>> transpose_entries(torch.tensor([2, 0, 2]), 3)
    (tensor([1, 0, 2]), tensor([0, 1, 1, 3]))
    """
    columns, order = torch.sort(indices, stable=True)
    starts = torch.searchsorted(columns, torch.arange(n_columns + 1, device=indices.device, dtype=columns.dtype))
    return order, starts


class _Decode(torch.autograd.Function):
    """z W_dec from compressed rows; the gradients touch the entries only."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, W_dec: Tensor, indices: Tensor, rows: Tensor, offsets: Tensor) -> Tensor:
        ctx.save_for_backward(values, W_dec, indices, rows)
        return gather_sum(indices, values, offsets, W_dec)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        values, W_dec, indices, rows = ctx.saved_tensors
        grad = grad.contiguous()
        grad_values = sampled_dot(rows, indices, grad, W_dec) if ctx.needs_input_grad[0] else None
        grad_W = None
        if ctx.needs_input_grad[1]:
            order, starts = transpose_entries(indices, W_dec.shape[0])
            grad_W = gather_sum(rows[order], values[order], starts, grad)
        return grad_values, grad_W, None, None, None


class _Encode(torch.autograd.Function):
    """(x - b_dec) W_enc + b_enc at chosen entries; W_enc is read as rows of its transpose."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, W_enc: Tensor, b_enc: Tensor, b_dec: Tensor, values: Tensor, entries: tuple[Tensor, ...]
    ) -> Tensor:
        ctx.save_for_backward(x, W_enc, b_dec, *entries)
        return values.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, W_enc, b_dec, indices, rows, offsets = ctx.saved_tensors
        order, starts = transpose_entries(indices, W_enc.shape[1])
        # index_add_ adds in the order of the entries, so one seed gives one result
        grad_b = torch.zeros_like(W_enc[0]).index_add_(0, indices, grad)
        grad_W = gather_sum(rows[order], grad[order], starts, x - b_dec).T if ctx.needs_input_grad[1] else None
        grad_x = gather_sum(indices, grad, offsets, W_enc.T) if ctx.needs_input_grad[0] else None
        # every token shares b_dec, so its gradient is one matrix-vector product
        return grad_x, grad_W, grad_b, -(W_enc @ grad_b), None, None


def sparse_decode(
    values: Float[Tensor, "nnz"],
    W_dec: Float[Tensor, "d_sae d_in"],
    indices: Int[Tensor, "nnz"],
    rows: Int[Tensor, "nnz"],
    offsets: Int[Tensor, "n_rows_1"],
) -> Float[Tensor, "n_rows d_in"]:
    """Decode compressed codes: `z W_dec`, differentiable in the values and in W_dec, at the cost of the non-zero entries.

    >>> one = torch.ones(1)
    >>> sparse_decode(one, torch.eye(2), torch.tensor([1]), torch.tensor([0]), torch.tensor([0, 1]))
    tensor([[0., 1.]])
    """
    return _Decode.apply(values, W_dec, indices, rows, offsets)


def attach_encoder(
    values: Float[Tensor, "nnz"],
    x: Float[Tensor, "n_rows d_in"],
    W_enc: Float[Tensor, "d_in d_sae"],
    b_enc: Float[Tensor, "d_sae"],
    b_dec: Float[Tensor, "d_in"],
    entries: tuple[Int[Tensor, "nnz"], Int[Tensor, "nnz"], Int[Tensor, "n_rows_1"]],
) -> Float[Tensor, "nnz"]:
    """Give pre-activations found by a search without gradients their gradients back, at the entries kept.

    `values[e]` must equal `((x - b_dec) W_enc + b_enc)[rows[e], indices[e]]`; `entries` is (indices, rows, offsets). The result has
    the same values, and its gradient reaches x, W_enc, b_enc and b_dec as if the dense product had been differentiated.
    """
    return _Encode.apply(x, W_enc, b_enc, b_dec, values, entries)

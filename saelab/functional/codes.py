"""`SparseCodes`: the non-zero codes of a batch in compressed rows, and the sparse matrix products over them.

Compressed rows are the `indices` and `values` of a batch's entries, row after row, and `offsets`, the entry that each
row starts with. Decoding and the gradients of a training step are built from two products:

    gather_sum    out[r] = sum over entries e of row r:  values[e] * table[indices[e]]                 (sparse x dense)
    sampled_dot   out[e] = < left[rows[e]], table[indices[e]] >                         (dense x dense, at the entries)
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from saelab.functional.compiled import use_numba
from saelab.functional.sparse_products import (
    Entries as Entries,
    GradientMemory,
    gather_sum,
    sampled_dot,
    weight_gradient,
)
from saelab.functional.triton_choice import add_residuals, subtract_parts


def _differentiate_decoding(
    needs: tuple[bool, bool],
    values: Tensor,
    W_dec: Tensor,
    entries: Entries,
    grad: Tensor,
    memory: GradientMemory | None,
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of values and W_dec from that of the decoded rows, as far as they are needed: W_dec's may be kept."""
    grad_values = grad_W = None
    kept = memory.keep(entries, values, grad, W_dec) if memory and needs[1] else None
    if kept and needs[0] and entries.order is not None:
        grad_values = kept.sampled_dot(W_dec, entries.order)
    elif all(needs) and use_numba(W_dec, grad):
        from saelab.functional import numba_kernels

        assert entries.columns is not None
        spare = memory.pop() if memory else None
        grad_W = torch.empty_like(W_dec) if spare is None else spare
        step = memory if memory is not None and memory.sparse else None
        grad_values, squares = numba_kernels.decode_gradients(
            entries.rows, entries.columns, values, grad, W_dec, grad_W, step is not None and step.projected
        )
        if step is not None:
            step.note(grad_W, squares.sum())
    else:
        if needs[0]:
            grad_values = sampled_dot(entries.rows, entries.indices, grad, W_dec, entries.order)
        if needs[1] and not kept:
            grad_W = weight_gradient(entries, values, grad, len(W_dec), memory)
    return grad_values, grad_W


class _Decode(torch.autograd.Function):
    """z W_dec from compressed rows; the gradients touch the entries only."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, W_dec: Tensor, entries: Entries, memory: GradientMemory | None) -> Tensor:
        ctx.save_for_backward(values, W_dec)
        ctx.entries = entries
        ctx.memory = memory
        return gather_sum(entries[0], values, entries[2], W_dec)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        values, W_dec = ctx.saved_tensors
        entries: Entries = ctx.entries.with_columns(len(W_dec))
        needs = ctx.needs_input_grad[:2]
        grads = _differentiate_decoding(needs, values, W_dec, entries, grad.contiguous(), ctx.memory)
        return *grads, None, None


_decode: Callable[[Tensor, Tensor, Entries, GradientMemory | None], Tensor] = _Decode.apply


class _NestedDecode(torch.autograd.Function):
    """Squared errors of cumulative reconstructions; one buffer holds the parts, then the residuals.

    The compiled form keeps for each prefix the sum of its residual and those of longer ones. Where all errors have the
    same gradient c, the gradient of a part is -2 c times that sum.
    """

    @staticmethod
    def forward(
        ctx: Any,
        values: Tensor,
        W_dec: Tensor,
        x: Tensor,
        b_dec: Tensor,
        entries: Entries,
        n_groups: int,
        memory: GradientMemory | None,
        centered: Tensor | None,
        add: Callable[[Tensor], None] | None,
    ) -> tuple[Tensor, Tensor]:
        target = x - b_dec if centered is None else centered
        ctx.summed = add is None and use_numba(W_dec, target)
        if ctx.summed:
            from saelab.functional import step_kernels

            errors, residuals = step_kernels.decode_nested(entries.indices, values, entries.offsets, W_dec, target)
        else:
            residuals = gather_sum(entries.indices, values, entries.offsets, W_dec).view(n_groups, *x.shape)
            if add is not None:
                add(residuals)
            errors = subtract_parts(target, residuals, residuals)
        ctx.save_for_backward(values, W_dec, residuals)
        ctx.entries = entries
        ctx.memory = memory
        last = residuals[-1]
        ctx.mark_non_differentiable(last)
        return errors, last

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        values, W_dec, residuals = ctx.saved_tensors
        entries: Entries = ctx.entries.with_columns(len(W_dec))
        scale = None
        if ctx.summed and bool((grad == grad[0]).all()):
            scale, grad_parts = -2 * grad[0], residuals
            values = values * scale
        else:
            each = torch.cat([residuals[:-1] - residuals[1:], residuals[-1:]]) if ctx.summed else residuals
            grad_parts = add_residuals(each, grad)
        flat, needs = grad_parts.view(-1, W_dec.shape[1]), ctx.needs_input_grad[:2]
        grad_values, grad_W = _differentiate_decoding(needs, values, W_dec, entries, flat, ctx.memory)
        grad_x = -grad_parts[0] if ctx.needs_input_grad[2] else None
        grad_b = grad_parts[0].sum(0)
        if scale is not None:
            grad_values = None if grad_values is None else grad_values * scale
            grad_x, grad_b = None if grad_x is None else grad_x * scale, grad_b * scale
        return grad_values, grad_W, grad_x, grad_b, None, None, None, None, None


_nested_decode: Callable[
    [
        Tensor,
        Tensor,
        Tensor,
        Tensor,
        Entries,
        int,
        GradientMemory | None,
        Tensor | None,
        Callable[[Tensor], None] | None,
    ],
    tuple[Tensor, Tensor],
] = _NestedDecode.apply


class _Encode(torch.autograd.Function):
    """(x - b_dec) W_enc + b_enc at chosen entries; W_enc is read as rows of its transpose."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        W_enc: Tensor,
        b_enc: Tensor,
        b_dec: Tensor | None,
        values: Tensor,
        entries: Entries,
        memory: GradientMemory | None,
        centered: Tensor | None,
    ) -> Tensor:
        if centered is None:
            centered = x if b_dec is None else x - b_dec
        ctx.save_for_backward(centered, W_enc)
        ctx.entries = entries
        ctx.memory = memory
        return values.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        centered, W_enc = ctx.saved_tensors
        entries: Entries = ctx.entries.with_columns(W_enc.shape[1])
        # the entries of a latent are added in their order, so one seed gives one result; index_add_ has none on CUDA
        if grad.is_cuda:
            grad_b = weight_gradient(entries, grad, centered.new_ones(len(centered), 1), W_enc.shape[1])[:, 0]
        else:
            grad_b = torch.zeros_like(W_enc[0]).index_add_(0, entries.indices, grad)
        memory: GradientMemory | None = ctx.memory
        kept = memory.keep(entries, grad, centered, W_enc.T) if memory and ctx.needs_input_grad[1] else None
        grad_W = None if kept else weight_gradient(entries, grad, centered, W_enc.shape[1], memory).T
        grad_x = gather_sum(entries.indices, grad, entries.offsets, W_enc.T) if ctx.needs_input_grad[0] else None
        # every token shares b_dec, so its gradient is one matrix-vector product
        grad_b_dec = -(W_enc @ grad_b) if ctx.needs_input_grad[3] else None
        return grad_x, grad_W, grad_b, grad_b_dec, None, None, None, None


_encode: Callable[
    [Tensor, Tensor, Tensor, Tensor | None, Tensor, Entries, GradientMemory | None, Tensor | None], Tensor
] = _Encode.apply


def sparse_decode(
    values: Float[Tensor, "nnz"],
    W_dec: Float[Tensor, "d_sae d_in"],
    indices: Int[Tensor, "nnz"],
    rows: Int[Tensor, "nnz"],
    offsets: Int[Tensor, "n_rows_1"],
) -> Float[Tensor, "n_rows d_in"]:
    """`z W_dec` for compressed codes z, differentiable in the values and W_dec, at the cost of the non-zero entries.

    Args:
        values: the non-zero codes.
        W_dec: decoder, one row per latent.
        indices: latent of each code.
        rows: row of each code, ascending.
        offsets: (n_rows + 1,) row r owns the codes `offsets[r]` to `offsets[r + 1]`.

    >>> one = torch.ones(1)
    >>> sparse_decode(one, torch.eye(2), torch.tensor([1]), torch.tensor([0]), torch.tensor([0, 1]))
    tensor([[0., 1.]])
    """
    return _decode(values, W_dec, Entries(indices, rows, offsets), None)


def decode_entries(
    values: Float[Tensor, "nnz"],
    W_dec: Float[Tensor, "d_sae d_in"],
    entries: Entries,
    memory: GradientMemory | None = None,
) -> Float[Tensor, "n_rows d_in"]:
    """`sparse_decode` at entries whose columns may be known, with memory for W_dec's gradient.

    Args:
        values: the non-zero codes.
        W_dec: decoder, one row per latent.
        entries: positions of the codes.
        memory: takes the gradient of W_dec, or gives the memory for it.
    """
    return _decode(values, W_dec, entries, memory)


class _WeightedError(torch.autograd.Function):
    """Weighted squared error of parts that each cover the columns from one on."""

    @staticmethod
    def forward(ctx: Any, target: Tensor, weights: Tensor, starts: list[int], *parts: Tensor) -> tuple[Tensor, Tensor]:
        residual = target.clone()
        for start, part in zip(starts, parts, strict=True):
            residual[:, start:] -= part
        weighted = residual * weights
        ctx.save_for_backward(weighted)
        ctx.starts = starts
        ctx.mark_non_differentiable(residual)
        return torch.linalg.vecdot(weighted, residual).sum(), residual

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        (weighted,) = ctx.saved_tensors
        each = -2 * grad * weighted
        grad_target = -each if ctx.needs_input_grad[0] else None
        return grad_target, None, None, *(each[:, start:] for start in ctx.starts)


_weighted_error: Callable[..., tuple[Tensor, Tensor]] = _WeightedError.apply


def weighted_error(
    target: Float[Tensor, "n_rows d"],
    weights: Float[Tensor, "d"],
    parts: Sequence[Tensor],
    starts: Sequence[int],
) -> tuple[Float[Tensor, ""], Float[Tensor, "n_rows d"]]:
    """`sum_i weights_i ||target_i - sum_l parts_l,i||^2` over columns i, where each part covers the columns from its
    start on; and the residual, detached. Differentiable in the target and the parts.

    Args:
        target: what the parts add up to.
        weights: weight of each column.
        parts: (n_rows, d - start) each.
        starts: first column of each part.

    >>> weighted_error(torch.ones(1, 2), torch.ones(2), [torch.ones(1, 2), torch.ones(1, 1)], [0, 1])
    (tensor(1.), tensor([[ 0., -1.]]))
    """
    return _weighted_error(target, weights, list(starts), *parts)


def nested_decode_error(
    values: Float[Tensor, "nnz"],
    W_dec: Float[Tensor, "d_sae d_in"],
    x: Float[Tensor, "n_rows d_in"],
    b_dec: Float[Tensor, "d_in"],
    entries: Entries,
    n_groups: int = 1,
    memory: GradientMemory | None = None,
    centered: Float[Tensor, "n_rows d_in"] | None = None,
    add: Callable[[Tensor], None] | None = None,
) -> tuple[Float[Tensor, "n_groups"], Float[Tensor, "n_rows d_in"]]:
    """Squared error of every prefix, `||x - b_dec - sum_{h <= g} z_h W_dec||^2`, and the last one's residual, detached.

    Differentiable in values, W_dec, x and b_dec, at the cost of the non-zero entries; all prefixes cost one decode.
    Source: the Matryoshka loss of arXiv:2503.17547.

    Args:
        values: the non-zero codes.
        W_dec: decoder, one row per latent.
        x: activations to reconstruct.
        b_dec: decoder bias.
        entries: positions of the codes in n_groups stacked batches: row `g * n_rows + r` holds the codes of group g
            of the latents for token r.
        n_groups: number of groups of latents, one more joining in each prefix.
        memory: takes the gradient of W_dec, or gives the memory for it.
        centered: x - b_dec, if known.
        add: called with the decoded parts (n_groups, n_rows, d_in) to add, in place, what other processes decoded of
            their latents; its gradient is taken as 1. None is for no others.

    >>> entries = Entries(torch.tensor([1]), torch.tensor([0]), torch.tensor([0, 1]))
    >>> nested_decode_error(torch.ones(1), torch.eye(2), torch.ones(1, 2), torch.zeros(2), entries)
    (tensor([1.]), tensor([[1., 0.]]))
    """
    return _nested_decode(values, W_dec, x, b_dec, entries, n_groups, memory, centered, add)


def attach_encoder(
    values: Float[Tensor, "nnz"],
    x: Float[Tensor, "n_rows d_in"],
    W_enc: Float[Tensor, "d_in d_sae"],
    b_enc: Float[Tensor, "d_sae"],
    b_dec: Float[Tensor, "d_in"] | None,
    entries: Entries,
    memory: GradientMemory | None = None,
    centered: Float[Tensor, "n_rows d_in"] | None = None,
) -> Float[Tensor, "nnz"]:
    """The same pre-activations with gradients to the encoder, as if the dense product had been differentiated.

    For values that a search found without gradients. The gradient reaches x, W_enc, b_enc and b_dec.

    Args:
        values: pre-activations at the entries, equal to `((x - b_dec) W_enc + b_enc)[rows[e], indices[e]]`.
        x: activations that were encoded.
        W_enc: encoder.
        b_enc: encoder bias.
        b_dec: bias that was subtracted from x; None where nothing was.
        entries: positions of the values.
        memory: takes the gradient of W_enc transposed, or gives the memory for it.
        centered: x - b_dec, if known.
    """
    return _encode(x, W_enc, b_enc, b_dec, values, entries, memory, centered)


@dataclass(frozen=True, eq=False)
class SparseCodes:
    """The non-zero codes of a batch, row after row.

    Entry e is `values[e]` of latent `indices[e]` in row `rows[e]`; row r owns the entries `offsets[r]` to `offsets[r
    + 1]`. Rows are the batch axes flattened; `batch_shape` keeps them.
    """

    indices: Int[Tensor, "nnz"]
    values: Float[Tensor, "nnz"]
    rows: Int[Tensor, "nnz"]
    offsets: Int[Tensor, "n_rows_1"]
    d_sae: int
    batch_shape: tuple[int, ...]

    @classmethod
    def from_rows(
        cls,
        indices: Int[Tensor, "nnz"],
        values: Float[Tensor, "nnz"],
        rows: Int[Tensor, "nnz"],
        shape: tuple[int, int],
    ) -> "SparseCodes":
        """Codes from entries that are sorted by row.

        Args:
            indices: latent of each entry, in 0..d_sae - 1.
            values: code of each entry.
            rows: row of each entry, ascending.
            shape: (n_rows, d_sae) of the dense codes; rows without an entry are empty.

        >>> SparseCodes.from_rows(torch.tensor([3, 1]), torch.ones(2), torch.tensor([0, 2]), (3, 4)).offsets
        tensor([0, 1, 1, 2])
        """
        offsets = torch.searchsorted(rows, torch.arange(shape[0] + 1, device=rows.device))
        return cls(indices, values, rows, offsets, shape[1], (shape[0],))

    @classmethod
    def from_dense(cls, z: Float[Tensor, "*batch d_sae"]) -> "SparseCodes":
        """The non-zero entries of dense codes, negative ones included.

        >>> SparseCodes.from_dense(torch.tensor([[0.0, -2.0], [1.0, 0.0]])).values
        tensor([-2.,  1.])
        """
        flat = z.reshape(-1, z.shape[-1])
        rows, indices = flat.nonzero(as_tuple=True)
        codes = cls.from_rows(indices, flat[rows, indices], rows, (flat.shape[0], flat.shape[1]))
        return replace(codes, batch_shape=tuple(z.shape[:-1]))

    def to_dense(self) -> Float[Tensor, "*batch d_sae"]:
        """The same codes as a dense tensor, `(*batch_shape, d_sae)`."""
        dense = self.values.new_zeros(len(self.offsets) - 1, self.d_sae)
        return dense.index_put((self.rows, self.indices), self.values).view(*self.batch_shape, self.d_sae)

    def columns(self, latents: Int[Tensor, "n_latents"]) -> Float[Tensor, "*batch n_latents"]:
        """Dense codes of the given latents, in the order given."""
        entries, which = (self.indices[:, None] == latents).nonzero(as_tuple=True)
        dense = self.values.new_zeros(len(self), len(latents))
        return dense.index_put((self.rows[entries], which), self.values[entries]).view(*self.batch_shape, len(latents))

    def decode(self, W_dec: Float[Tensor, "d_sae d_in"]) -> Float[Tensor, "*batch d_in"]:
        """`z W_dec`, differentiable, at the cost of the non-zero entries."""
        flat = sparse_decode(self.values, W_dec, self.indices, self.rows, self.offsets)
        return flat.view(*self.batch_shape, W_dec.shape[1])

    def prefix(self, n_latents: int) -> "SparseCodes":
        """The codes of the first `n_latents` latents only."""
        return self.keep(self.indices < n_latents)

    def select(self, latents: Bool[Tensor, "d_sae"]) -> "SparseCodes":
        """The codes of the latents whose entry of the mask is True; all other codes are dropped."""
        return self.keep(latents[self.indices])

    def keep(self, keep: Bool[Tensor, "nnz"]) -> "SparseCodes":
        """The codes where the mask is True."""
        shape = (len(self.offsets) - 1, self.d_sae)
        part = self.from_rows(self.indices[keep], self.values[keep], self.rows[keep], shape)
        return replace(part, batch_shape=self.batch_shape)

    @property
    def l0(self) -> Int[Tensor, "n_rows"]:
        """Number of latents that fire (z != 0) in each row."""
        return self.offsets.diff()

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __repr__(self) -> str:
        mean_l0 = self.indices.numel() / max(1, len(self))
        return f"SparseCodes(batch_shape={self.batch_shape}, d_sae={self.d_sae}, l0={mean_l0:.4g})"

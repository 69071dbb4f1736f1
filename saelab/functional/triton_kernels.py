"""Triton kernels of the sparse products, of the top-k search and of nested errors, and the functions that launch them.

PyTorch's own operations write what these keep in registers: gathered rows, all pre-activations, the residual of every
prefix before its square. Sums are in float32 whatever the inputs are, and in an order that depends on the shapes
alone: no kernel adds atomically, so equal inputs give equal bits.

The functions need triton; `triton_choice.use_triton` says where they are used. With TRITON_INTERPRET=1 in the
environment before the import the kernels run on the CPU as they are written.
"""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, no_type_check

import torch
from jaxtyping import Float, Int
from torch import Tensor

try:
    import triton  # type: ignore[import-not-found,import-untyped,unused-ignore]
    import triton.language as tl  # type: ignore[import-not-found,import-untyped,unused-ignore]
except ImportError:  # the module can be imported all the same, as every module of the package
    triton, tl = None, SimpleNamespace(constexpr=int)

LARGEST_K = 256  # latents of a row that a program holds in registers
N_PROGRAMS = 256  # programs of a search at least, where there are that many blocks: about two for each multiprocessor
IS_INSTALLED = triton is not None
LAST_LATENT = 2**31 - 1
ELEMENTS = 1024  # of a tensor that a program takes
FUSED: dict[str, Any] = {"enable_fp_fusion": True}  # the default of a setting that warns where it is not given


def _kernel(function: Callable[..., Any]) -> Any:
    """The function as Triton compiles it; one program for every `nnz`, so that an entry's sum keeps its order."""
    return triton.jit(function, do_not_specialize=["nnz"]) if triton else function


@_kernel
@no_type_check
def _gather_sum(
    indices, values, offsets, table, out, d, stride_row, stride_column, BLOCK_E: tl.constexpr, BLOCK_D: tl.constexpr
):
    """One row of sums, BLOCK_D of its columns: partial sums of every BLOCK_E-th entry, then the sum of those."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = columns < d
    start, end = tl.load(offsets + row), tl.load(offsets + row + 1)
    total = tl.zeros([BLOCK_E, BLOCK_D], tl.float32)
    for first in range(start, end, BLOCK_E):
        entries = first + tl.arange(0, BLOCK_E)
        there = entries < end
        taken = tl.load(indices + entries, mask=there, other=0)
        weight = tl.load(values + entries, mask=there, other=0).to(tl.float32)
        places = taken[:, None] * stride_row + columns[None, :] * stride_column
        rows = tl.load(table + places, mask=there[:, None] & inside[None, :], other=0).to(tl.float32)
        total += weight[:, None] * rows
    tl.store(out + row * d + columns, tl.sum(total, 0), mask=inside)


@_kernel
@no_type_check
def _sampled_dot(
    rows, indices, order, left, table, out, nnz, d, left_row, left_column, table_row, table_column,
    ORDERED: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """BLOCK_E inner products; each is summed in the same order, wherever its entry lies."""
    entries = tl.program_id(0).to(tl.int64) * BLOCK_E + tl.arange(0, BLOCK_E)
    there = entries < nnz
    if ORDERED:
        entries = tl.load(order + entries, mask=there, other=0)
    row = tl.load(rows + entries, mask=there, other=0)
    index = tl.load(indices + entries, mask=there, other=0)
    total = tl.zeros([BLOCK_E, BLOCK_D], tl.float32)
    for first in range(0, d, BLOCK_D):
        columns = first + tl.arange(0, BLOCK_D)
        mask = there[:, None] & (columns < d)[None, :]
        a = tl.load(left + row[:, None] * left_row + columns[None, :] * left_column, mask=mask, other=0)
        b = tl.load(table + index[:, None] * table_row + columns[None, :] * table_column, mask=mask, other=0)
        total += a.to(tl.float32) * b.to(tl.float32)
    tl.store(out + entries, tl.sum(total, 1), mask=there)


@_kernel
@no_type_check
def _make_keys(u, latents, SIGNED: tl.constexpr):
    """Integers in the order of u, or of |u|; of equal numbers that of the lowest latent is the largest.

    The upper 32 bits are those of the number, turned around where it is negative, the lower ones the latent counted
    backwards and the sign that |u| loses. NaN counts as infinite, and both zeros as one.
    """
    u = tl.where(u != u, float("inf"), tl.where(u == 0, 0.0, u))
    bits = u.to(tl.int32, bitcast=True)
    if SIGNED:
        size, negative = bits & 0x7FFFFFFF, (bits < 0).to(tl.int64)
    else:
        size, negative = bits ^ ((bits >> 31) & 0x7FFFFFFF), tl.zeros_like(bits).to(tl.int64)
    return (size.to(tl.int64) << 32) | ((latents ^ 0x7FFFFFFF).to(tl.int64) << 1) | negative


@_kernel
@no_type_check
def _exchange(
    keys,
    APART: tl.constexpr,
    RUN: tl.constexpr,
    ASCENDING: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Rows of keys in which each pair APART places apart is in order; every second run of RUN the other way around."""
    pairs: tl.constexpr = BLOCK_N * BLOCK_K // (2 * APART)
    grouped = tl.reshape(keys, [pairs, 2, APART])
    first = tl.arange(0, 2)[None, :, None] == 0
    turned = ((tl.arange(0, pairs) * (2 * APART)) & (BLOCK_K - 1) & RUN) != 0
    takes_larger = (first != turned[:, None, None]) != ASCENDING
    larger, smaller = tl.max(grouped, 1, keep_dims=True), tl.min(grouped, 1, keep_dims=True)
    return tl.reshape(tl.where(takes_larger, larger, smaller), [BLOCK_N, BLOCK_K])


@_kernel
@no_type_check
def _merge_runs(keys, STAGE: tl.constexpr, ASCENDING: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """Rows whose bitonic runs of 2^(STAGE + 1) keys are sorted, every second run the other way around.

    Triton's own sort combines pairs by exclusive or, which its interpreter does one element at a time.
    """
    for step in tl.static_range(0, STAGE + 1):
        keys = _exchange(keys, 1 << (STAGE - step), 2 << STAGE, ASCENDING, BLOCK_N, BLOCK_K)
    return keys


@_kernel
@no_type_check
def _merge_topk(
    x, W, bias, out, n_rows, d_in, d_sae, per_split, x_row, x_column, W_row, W_column, bias_stride,
    SIGNED: tl.constexpr, PRECISION: tl.constexpr, WIDEN: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    LOG_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Keys of the BLOCK_K largest pre-activations of BLOCK_N rows among `per_split` latents, largest first.

    Each block of BLOCK_K latents is a tile of the product. Two sorted lists, one of them backwards, have the largest of
    both in their elementwise maximum; a block with nothing larger than what every row has is passed over.
    """
    lowest: tl.constexpr = -9223372036854775807  # below the key of every number
    rows = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    there = rows < n_rows
    split = tl.program_id(1)
    end = tl.minimum(d_sae, (split + 1) * per_split)
    best = tl.full([BLOCK_N, BLOCK_K], lowest, tl.int64)
    for first in range(split * per_split, end, BLOCK_K):
        latents = first + tl.arange(0, BLOCK_K)
        known = latents < end
        u = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
        for column in range(0, d_in, BLOCK_D):
            columns = column + tl.arange(0, BLOCK_D)
            inside = columns < d_in
            a_places = rows[:, None] * x_row + columns[None, :] * x_column
            a = tl.load(x + a_places, mask=there[:, None] & inside[None, :], other=0)
            b_places = latents.to(tl.int64)[None, :] * W_row + columns[:, None] * W_column
            b = tl.load(W + b_places, mask=inside[:, None] & known[None, :], other=0)
            if WIDEN:
                a, b = a.to(tl.float32), b.to(tl.float32)
            u = tl.dot(a, b, u, input_precision=PRECISION)
        u += tl.load(bias + latents * bias_stride, mask=known, other=0).to(tl.float32)[None, :]
        keys = tl.where(known[None, :], _make_keys(u, latents[None, :], SIGNED), lowest)
        larger = (keys > tl.min(best, 1)[:, None]) & there[:, None]
        if tl.sum(tl.sum(larger.to(tl.int32), 1), 0) > 0:
            for stage in tl.static_range(0, LOG_K):
                keys = _merge_runs(keys, stage, True, BLOCK_N, BLOCK_K)
            best = _merge_runs(tl.maximum(best, keys), LOG_K - 1, False, BLOCK_N, BLOCK_K)
    places = (rows[:, None] * tl.num_programs(1) + split) * BLOCK_K + tl.arange(0, BLOCK_K)[None, :]
    tl.store(out + places, best, mask=there[:, None])


@_kernel
@no_type_check
def _subtract_parts(target, parts, residuals, errors, n_groups, n, BLOCK: tl.constexpr):
    """Residuals of every prefix at BLOCK places, and their squares' sums; `residuals` may be `parts`."""
    places = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = places < n
    residual = tl.load(target + places, mask=inside, other=0).to(tl.float32)
    for g in range(n_groups):
        at = tl.cast(g, tl.int64) * n + places
        residual -= tl.load(parts + at, mask=inside, other=0).to(tl.float32)
        tl.store(residuals + at, residual, mask=inside)
        tl.store(errors + tl.program_id(0) * n_groups + g, tl.sum(residual * residual, 0))


@_kernel
@no_type_check
def _add_residuals(residuals, grad, out, n_groups, n, BLOCK: tl.constexpr):
    """Gradient of every part at BLOCK places: that of all prefixes from its own on."""
    places = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = places < n
    total = tl.zeros([BLOCK], tl.float32)
    for later in range(n_groups):
        g = n_groups - 1 - later
        at = tl.cast(g, tl.int64) * n + places
        weight = -2 * tl.load(grad + g).to(tl.float32)
        total += weight * tl.load(residuals + at, mask=inside, other=0).to(tl.float32)
        tl.store(out + at, total, mask=inside)


def gather_sum(
    indices: Int[Tensor, "nnz"],
    values: Float[Tensor, "nnz"],
    offsets: Int[Tensor, "n_rows_1"],
    table: Float[Tensor, "n d"],
) -> Float[Tensor, "n_rows d"]:
    """Weighted sums of rows of `table`: see `codes.gather_sum`, whose arguments these are.

    With compressed columns in place of rows the sums are the gradient of a weight, over the entries of each latent in
    their order.

    Args:
        indices: row of `table` that each entry takes.
        values: weight of each entry.
        offsets: (n_rows + 1,) row r owns the entries `offsets[r]` to `offsets[r + 1]`.
        table: the dense matrix, such as W_dec.
    """
    n_rows, d = len(offsets) - 1, table.shape[1]
    out = table.new_empty(n_rows, d)
    if out.numel() == 0:
        return out
    width = _block(d, 256)
    entries = (indices.contiguous(), values.contiguous(), offsets.contiguous())
    sizes = {"BLOCK_E": 8, "BLOCK_D": width, **FUSED}
    with torch.cuda.device(table.get_device()):
        _gather_sum[(n_rows, triton.cdiv(d, width))](*entries, table, out, d, *table.stride(), **sizes)
    return out


def sampled_dot(
    rows: Int[Tensor, "nnz"],
    indices: Int[Tensor, "nnz"],
    left: Float[Tensor, "n_rows d"],
    table: Float[Tensor, "n d"],
    order: Int[Tensor, "nnz"] | None = None,
) -> Float[Tensor, "nnz"]:
    """Inner products at the entries only: see `codes.sampled_dot`.

    Args:
        rows: row of `left` of each entry.
        indices: row of `table` of each entry.
        left: first factors, one row per token.
        table: second factors, one row per latent.
        order: permutation in which the entries are visited; None visits them as they lie.
    """
    out, nnz, d = table.new_empty(len(rows)), len(rows), table.shape[1]
    if nnz == 0:
        return out
    entries = (rows.contiguous(), indices.contiguous(), rows if order is None else order.contiguous())
    strides = (*left.stride(), *table.stride())
    sizes = {"ORDERED": order is not None, "BLOCK_E": 16, "BLOCK_D": _block(d, 128), **FUSED}
    with torch.cuda.device(table.get_device()):
        _sampled_dot[(triton.cdiv(nnz, 16),)](*entries, left, table, out, nnz, d, *strides, **sizes)
    return out


def merge_topk(
    x: Float[Tensor, "n_rows d_in"],
    W: Float[Tensor, "d_sae d_in"],
    bias: Float[Tensor, "d_sae"],
    k: int,
    signed: bool,
    n_splits: int | None = None,
) -> tuple[Float[Tensor, "n_rows k"], Int[Tensor, "n_rows k"]]:
    """Values and latents of each row's k largest `u = x W^T + bias`, largest first; of equal ones the lowest latent.

    Tiles of the product are merged into each row's list as they are made, so u is never written. Products are of the
    inputs as they are, sums float32.

    Args:
        x: activations.
        W: encoder, one row per latent.
        bias: encoder bias.
        k: latents kept in each row, at most `LARGEST_K` and at most d_sae.
        signed: whether the largest are those of |u|.
        n_splits: parts of the latents that are searched side by side, then merged; None chooses. It changes no result.
    """
    (n_rows, d_in), d_sae = x.shape, len(W)
    if not 1 <= k <= min(LARGEST_K, d_sae):
        raise ValueError(f"`k` must be in 1..{min(LARGEST_K, d_sae)}, got {k}.")
    kept, height = max(64, triton.next_power_of_2(k)), 16 if n_rows <= 16 or k > 64 else 64
    row_blocks, latent_blocks = triton.cdiv(n_rows, height), triton.cdiv(d_sae, kept)
    wanted = n_splits or triton.cdiv(N_PROGRAMS, max(1, row_blocks))
    per_split = triton.cdiv(latent_blocks, min(wanted, latent_blocks))
    splits = triton.cdiv(latent_blocks, per_split)
    keys = torch.empty(n_rows, splits, kept, dtype=torch.int64, device=x.device)
    if n_rows:
        strides = (*x.stride(), *W.stride(), bias.stride(0))
        counts = (n_rows, d_in, d_sae, per_split * kept)
        sizes = {"BLOCK_N": height, "BLOCK_K": kept, "LOG_K": kept.bit_length() - 1, "BLOCK_D": _block(d_in, 32)}
        # the interpreter, alone in taking tensors of the CPU, multiplies the bits of bfloat16
        how = {"SIGNED": signed, "PRECISION": "ieee", "WIDEN": not x.is_cuda, **FUSED}
        how["num_warps"] = 4 if height * kept <= 1024 else 8
        with torch.cuda.device(x.get_device()):
            _merge_topk[(row_blocks, splits)](x, W, bias, keys, *counts, *strides, **sizes, **how)
    return _read_keys(keys.flatten(1).topk(k, dim=1).values, signed)  # keys differ: no ties to break


def screen_topk(
    x: Float[Tensor, "n_rows d_in"],
    W: Float[Tensor, "d_sae d_in"],
    bias: Float[Tensor, "d_sae"],
    n: int,
    signed: bool,
) -> tuple[Float[Tensor, "n_rows n"], Int[Tensor, "n_rows n"], Float[Tensor, "n_rows"]]:
    """Sizes and latents of each row's n largest u, or |u|, and the largest of the others; -inf where none is left.

    Args:
        x: activations.
        W: encoder, one row per latent, in the dtype of the product.
        bias: encoder bias.
        n: latents returned for each row.
        signed: whether sizes are those of |u|.
    """
    values, latents = merge_topk(x.to(W.dtype), W, bias, min(n + 1, len(W)), signed)
    sizes = values.abs() if signed else values
    unseen = sizes[:, n] if n < len(W) else sizes.new_full((len(x),), -torch.inf)
    return sizes[:, :n], latents[:, :n], unseen


def _read_keys(keys: Int[Tensor, "n k"], signed: bool) -> tuple[Float[Tensor, "n k"], Int[Tensor, "n k"]]:
    """The numbers and latents that `_make_keys` put together."""
    latents = LAST_LATENT - ((keys & 0xFFFFFFFF) >> 1)
    size = (keys >> 32).int()
    if not signed:
        return (size ^ ((size >> 31) & 0x7FFFFFFF)).view(torch.float32), latents
    values = size.view(torch.float32)
    return torch.where((keys & 1).bool(), -values, values), latents


def subtract_parts(
    target: Float[Tensor, "n_rows d"],
    parts: Float[Tensor, "n_groups n_rows d"],
    out: Float[Tensor, "n_groups n_rows d"],
) -> Float[Tensor, "n_groups"]:
    """Squared errors of every prefix; residuals are written into `out`, which may be `parts`. One pass over memory."""
    n_groups, n = len(parts), target.numel()
    n_blocks = triton.cdiv(n, ELEMENTS)
    errors = torch.empty(n_blocks, n_groups, dtype=torch.float32, device=parts.device)
    tensors = (target.contiguous(), parts.contiguous(), out.contiguous())
    with torch.cuda.device(parts.get_device()):
        _subtract_parts[(n_blocks,)](*tensors, errors, n_groups, n, BLOCK=ELEMENTS, **FUSED)
    if not out.is_contiguous():
        out.copy_(tensors[2])
    return errors.sum(0).to(parts.dtype)


def add_residuals(
    residuals: Float[Tensor, "n_groups n_rows d"], grad: Float[Tensor, "n_groups"]
) -> Float[Tensor, "n_groups n_rows d"]:
    """Gradients of every part from those of the squared errors, in one pass over memory."""
    tensors, n = (residuals.contiguous(), grad.contiguous()), residuals[0].numel()
    out = torch.empty_like(tensors[0])
    with torch.cuda.device(residuals.get_device()):
        _add_residuals[(triton.cdiv(n, ELEMENTS),)](*tensors, out, len(residuals), n, BLOCK=ELEMENTS, **FUSED)
    return out


def _block(width: int, largest: int) -> int:
    """The power of two that covers a width, within what a tile takes."""
    return max(16, min(largest, int(triton.next_power_of_2(width))))

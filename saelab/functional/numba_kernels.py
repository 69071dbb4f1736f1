"""Numba kernels of the training step on CPUs: inner products, gradients and Adam.

PyTorch's operations pass over memory several times where one pass does; on a CPU that is most of a training step beside
the encoder's product. Every kernel computes each row or latent by itself, so that the result does not depend on the
number of threads (`compiled.run_parts`).

The functions need numba; `compiled.use_numba` says where they are used. Numba is imported with this module, which takes
half a second; kernels are compiled when first called and kept beside the module, where it can be written.
"""

from collections.abc import Callable, Sequence
from typing import Any, no_type_check

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from saelab.functional.compiled import run_parts
from saelab.functional.short_floats import LIMIT, MEAN_BITS, MEAN_SCALE, SQUARE_BITS, SQUARE_SCALE

try:
    import numba  # type: ignore[import-not-found,import-untyped,unused-ignore]
except ImportError:  # the module can be imported all the same, as every module of the package
    numba = None  # type: ignore[assignment,unused-ignore]

MEAN_SHIFT, SQUARE_SHIFT = np.uint32(MEAN_BITS), np.uint32(SQUARE_BITS)
COMPARISONS = {"nnan", "nsz"}
# sums may be split into the lanes of a vector register; nothing here is NaN unless the result may be
SUMS = {"reassoc", "contract", "nsz", "arcp"}


def kernel(fastmath: set[str]) -> Callable[[Callable[..., Any]], Any]:
    """The decorator that has Numba compile a function for arrays, without the interpreter's lock."""

    def compile_(function: Callable[..., Any]) -> Any:
        if numba is None:
            return function
        options: dict[str, Any] = {"nogil": True, "fastmath": fastmath, "error_model": "numpy"}
        try:
            return numba.njit(cache=True, **options)(function)
        except RuntimeError:  # no folder can be written: it is compiled again in every process
            return numba.njit(**options)(function)

    return compile_


@kernel(SUMS)
@no_type_check
def _dot(rows, latents, left, table, first, last, out):
    """Inner products of entries first to last, sorted by latent.

    Two entries of a latent share a pass over its row. A single one is its own partner: a loop of another form might
    sum in another order, and equal rows must give equal products.
    """
    i = first
    while i < last:
        partner = i + 1 if i + 1 < last and latents[i + 1] == latents[i] else i
        a, b, weight = left[rows[i]], left[rows[partner]], table[latents[i]]
        one, two = np.float32(0), np.float32(0)
        for j in range(len(weight)):
            one += a[j] * weight[j]
            two += b[j] * weight[j]
        out[i], out[partner] = one, two
        i = partner + 1


@kernel(SUMS)
@no_type_check
def _decode_row(rows, starts, values, left, table, latent, total, products):
    """Of a latent: the sum of `values * left[rows]` over the entries, and every entry's inner product."""
    weight = table[latent]
    total[:] = np.float32(0)
    for i in range(starts[latent], starts[latent + 1]):
        a, value, product = left[rows[i]], values[i], np.float32(0)
        for j in range(len(weight)):
            product += a[j] * weight[j]
            total[j] += value * a[j]
        products[i] = product


@kernel(set())
@no_type_check
def _decode_gradients(rows, starts, values, left, table, normals, first, last, out, squares, products):
    """Of latents first to last: gradients of their rows, without the parts along `normals`, and their squared norms;
    and every entry's inner product.
    """
    for latent in range(first, last):
        _decode_row(rows, starts, values, left, table, latent, out[latent], products)
        squares[latent] = np.float32(0)
        if starts[latent] < starts[latent + 1]:
            if len(normals):
                _project_row(out[latent], normals[latent])
            squares[latent] = _square(out[latent])


@kernel(set())
@no_type_check
def _decode_squares(rows, starts, values, left, table, normals, first, last, squares, products):
    """Of latents first to last: squared norms of gradients of their rows, without the parts along `normals`, and every
    entry's inner product.
    """
    total = np.empty(table.shape[1], np.float32)
    for latent in range(first, last):
        squares[latent] = np.float32(0)
        if starts[latent] < starts[latent + 1]:
            _decode_row(rows, starts, values, left, table, latent, total, products)
            if len(normals):
                _project_row(total, normals[latent])
            squares[latent] = _square(total)


@kernel(SUMS)
@no_type_check
def _gradient_row(starts, rows, values, left, normals, latent, total):
    """Row of a sparse gradient, without its part along the same row of `normals`, if there are any."""
    total[:] = np.float32(0)
    for i in range(starts[latent], starts[latent + 1]):
        a, value = left[rows[i]], values[i]
        for j in range(len(total)):
            total[j] += value * a[j]
    if len(normals) and starts[latent] < starts[latent + 1]:
        _project_row(total, normals[latent])


@kernel(SUMS)
@no_type_check
def _gradient_squares(starts, rows, values, left, normals, first, last, out):
    """Squared norms of rows first to last of a sparse gradient."""
    row = np.empty(left.shape[1], np.float32)
    for latent in range(first, last):
        if starts[latent] == starts[latent + 1]:
            out[latent] = np.float32(0)
            continue
        _gradient_row(starts, rows, values, left, normals, latent, row)
        out[latent] = _square(row)


@kernel(set())
@no_type_check
def _transpose(columns, starts, order):
    """Counting sort: places of the entries by column, in their order, and where each column starts."""
    starts[:] = 0
    for i in range(len(columns)):
        starts[columns[i] + 1] += 1
    for j in range(len(starts) - 1):
        starts[j + 1] += starts[j]
    for i in range(len(columns)):
        column = columns[i]
        order[starts[column]] = i
        starts[column] += 1
    for j in range(len(starts) - 1, 0, -1):
        starts[j] = starts[j - 1]
    starts[0] = 0


@kernel(SUMS)
@no_type_check
def _project_row(g, w):
    """Subtract from a row of a gradient its part along the weight's row."""
    along = np.float32(0)
    for j in range(len(g)):
        along += g[j] * w[j]
    for j in range(len(g)):
        g[j] -= along * w[j]


@kernel(SUMS)
@no_type_check
def _project(grad, weight, first, last):
    """Subtract from rows first to last of the gradient their part along the weight's row."""
    for r in range(first, last):
        _project_row(grad[r], weight[r])


@kernel(SUMS)
@no_type_check
def _square(row):
    total = np.float32(0)
    for j in range(len(row)):
        total += row[j] * row[j]
    return total


@kernel({"nsz"})  # contracted, a sum of products has two roundings: code that was just compiled and the same from the
@no_type_check  # cache chose different ones
def _adam_row(w, g, m, v, settings, unit):
    """One step of Adam for a row, which is divided by its norm where `unit`."""
    rate, keep_mean, keep_square, root, eps = settings
    new_mean, new_square = np.float32(1) - keep_mean, np.float32(1) - keep_square
    for j in range(len(w)):
        m[j] += new_mean * (g[j] - m[j])
        v[j] = keep_square * v[j] + new_square * g[j] * g[j]
        w[j] -= rate * m[j] / (np.sqrt(v[j]) / root + eps)
    if unit:
        norm = max(np.sqrt(_square(w)), np.float32(1e-12))
        for j in range(len(w)):
            w[j] /= norm


@kernel(set())
@no_type_check
def _adam(weight, grad, mean, square, settings, unit, first, last):
    """One step of Adam for rows first to last."""
    for r in range(first, last):
        _adam_row(weight[r], grad[r], mean[r], square[r], settings, unit)


@kernel(set())
@no_type_check
def _adam_sparse(weight, starts, rows, values, left, normals, mean, square, settings, unit, first, last):
    """One step of Adam for rows first to last from a sparse gradient."""
    g = np.empty(weight.shape[1], np.float32)
    for r in range(first, last):
        _gradient_row(starts, rows, values, left, normals, r, g)
        _adam_row(weight[r], g, mean[r], square[r], settings, unit)


@kernel(set())
@no_type_check
def _mix(bits):
    """`short_floats._mix` of a number of 32 bits."""
    bits = np.uint32(bits ^ (bits >> np.uint32(16)))
    bits = np.uint32(bits * np.uint32(0x85EBCA6B))
    bits = np.uint32(bits ^ (bits >> np.uint32(13)))
    bits = np.uint32(bits * np.uint32(0xC2B2AE35))
    return np.uint32(bits ^ (bits >> np.uint32(16)))


@kernel(set())
@no_type_check
def _decode_moments(mean, square, m, v):
    """A row of both moments from codes, as `short_floats` decodes them."""
    m_bits, v_bits = m.view(np.uint32), v.view(np.uint32)
    for j in range(len(m)):
        code = np.uint32(mean[j])
        m_bits[j] = np.uint32((code & np.uint32(0x7FFF)) << MEAN_SHIFT) | np.uint32(
            (code >> np.uint32(15)) << np.uint32(31)
        )
        v_bits[j] = np.uint32(np.uint32(square[j]) << SQUARE_SHIFT)
    for j in range(len(m)):
        m[j] *= np.float32(MEAN_SCALE)
        v[j] *= np.float32(SQUARE_SCALE)


@kernel(set())
@no_type_check
def _encode_moments(m, v, key, mean, square):
    """Codes of a row of both moments, as `short_floats` encodes them; the moments are lost."""
    m_bits, v_bits = m.view(np.uint32), v.view(np.uint32)
    for j in range(len(m)):
        m[j] *= np.float32(1 / MEAN_SCALE)
        v[j] *= np.float32(1 / SQUARE_SCALE)
    for j in range(len(m)):
        random = _mix(np.uint32(key ^ np.uint32(j)))
        size = np.uint32((m_bits[j] & np.uint32(0x7FFFFFFF)) + (random & np.uint32((1 << MEAN_BITS) - 1)))
        mean[j] = np.uint16((size >> MEAN_SHIFT) | ((m_bits[j] >> np.uint32(31)) << np.uint32(15)))
        square[j] = np.uint16(np.uint32(v_bits[j] + (random >> np.uint32(32 - SQUARE_BITS))) >> SQUARE_SHIFT)


@kernel(set())
@no_type_check
def _adam_short(weight, dense, starts, rows, values, left, normals, mean, square, settings, unit, key, first, last):
    """One step of Adam for rows first to last with moments in codes, from a dense gradient, if there is one, or a
    sparse one.
    """
    width, limit = weight.shape[1], np.float32(LIMIT)
    g, m, v = np.empty(width, np.float32), np.empty(width, np.float32), np.empty(width, np.float32)
    for r in range(first, last):
        if len(dense):
            g[:] = dense[r]
        else:
            _gradient_row(starts, rows, values, left, normals, r, g)
        for j in range(width):
            g[j] = limit if g[j] > limit else (-limit if g[j] < -limit else g[j])
        _decode_moments(mean[r], square[r], m, v)
        _adam_row(weight[r], g, m, v, settings, unit)
        _encode_moments(m, v, _mix(np.uint32(np.uint32(r) ^ key)), mean[r], square[r])


def _array(tensor: Tensor) -> Any:
    return tensor.detach().numpy()


def sampled_dot(
    rows: Int[Tensor, "nnz"],
    indices: Int[Tensor, "nnz"],
    left: Float[Tensor, "n_rows d"],
    table: Float[Tensor, "n d"],
    order: Int[Tensor, "nnz"],
) -> Float[Tensor, "nnz"]:
    """Inner products at the entries: `out[e] = <left[rows[e]], table[indices[e]]>`.

    Args:
        rows: row of `left` of each entry.
        indices: row of `table` of each entry.
        left: first factors, one row per token.
        table: second factors, one row per latent.
        order: permutation that sorts the entries by `indices`.
    """
    sorted_rows, sorted_latents, products = rows[order], indices[order], left.new_empty(len(rows))
    arrays = [_array(t) for t in (sorted_rows, sorted_latents, left, table)]
    out = _array(products)
    run_parts(lambda a, b: _dot(*arrays, a, b, out), len(rows))
    return torch.empty_like(products).index_copy_(0, order, products)


def decode_gradients(
    rows: Int[Tensor, "nnz"],
    columns: tuple[Int[Tensor, "nnz"], Int[Tensor, "n_1"]],
    values: Float[Tensor, "nnz"],
    left: Float[Tensor, "n_rows d"],
    table: Float[Tensor, "n d"],
    out: Float[Tensor, "n d"],
    projected: bool = False,
) -> tuple[Float[Tensor, "nnz"], Float[Tensor, "n"]]:
    """`sampled_dot(rows, ...)` at the entries, and in the same pass their `weight_gradient`, written into `out`, and
    the squared norms of its rows.

    Args:
        rows: row of `left` of each entry.
        columns: the result of `transpose_entries` for the entries.
        values: value of each entry.
        left: dense rows.
        table: the decoder, one row per latent.
        out: filled with `sum_e values[e] * left[rows[e]]` over the entries of each latent.
        projected: whether `out` is to have no part along the table's rows, which are of unit norm.
    """
    order, starts = columns
    products, squares = torch.empty_like(values), values.new_empty(len(table))
    normals = table if projected else table[:0]
    arrays = [_array(t) for t in (rows[order], starts, values[order], left, table, normals)]
    into = [_array(t) for t in (out, squares, products)]
    run_parts(lambda a, b: _decode_gradients(*arrays, a, b, *into), len(table))
    return torch.empty_like(products).index_copy_(0, order, products), squares


def decode_squares(parts: Sequence[Tensor], table: Float[Tensor, "n d"]) -> tuple[Tensor, Tensor]:
    """`gradient_squares`, and in the same pass the entries' inner products `<left[rows], table[latent]>`.

    Args:
        parts: tensors of the gradient: `SparseGradient.parts`.
        table: the decoder, one row per latent.
    """
    starts, rows, values, left, normals = (_array(t) for t in parts)
    squares, products = table.new_empty(len(table)), torch.empty_like(parts[2])
    arrays, made = (rows, starts, values, left, _array(table), normals), (_array(squares), _array(products))
    run_parts(lambda a, b: _decode_squares(*arrays, a, b, *made), len(table))
    return squares, products


def transpose_entries(
    indices: Int[Tensor, "nnz"], n_columns: int
) -> tuple[Int[Tensor, "nnz"], Int[Tensor, "n_columns_1"]]:
    """The permutation that sorts entries by column, keeping their order, and where each column starts in it."""
    order, starts = torch.empty_like(indices), indices.new_empty(n_columns + 1)
    _transpose(_array(indices), _array(starts), _array(order))
    return order, starts


def project_rows(grad: Float[Tensor, "n d"], weight: Float[Tensor, "n d"]) -> None:
    """Subtract from each row of the gradient its part along the weight's row (of unit norm), in place."""
    g, w = _array(grad), _array(weight)
    run_parts(lambda a, b: _project(g, w, a, b), len(g))


def gradient_squares(parts: Sequence[Tensor]) -> Float[Tensor, "n"]:
    """Squared norms of the rows of a sparse gradient.

    Args:
        parts: tensors of the gradient: `SparseGradient.parts`.
    """
    out = parts[3].new_empty(len(parts[0]) - 1)
    arrays, into = [_array(t) for t in parts], _array(out)
    run_parts(lambda a, b: _gradient_squares(*arrays, a, b, into), len(out))
    return out


def step_adam(
    weight: Float[Tensor, "n d"],
    grad: Float[Tensor, "n d"] | Sequence[Tensor],
    mean: Float[Tensor, "n d"] | Int[Tensor, "n d"],
    square: Float[Tensor, "n d"] | Int[Tensor, "n d"],
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    step: int,
    unit: bool,
    key: int = 0,
) -> None:
    """One step of Adam (arXiv:1412.6980) on a weight and its moments, in place, in one pass over memory.

    Moments of int16 are codes of `short_floats`.

    Args:
        weight: the weight.
        grad: its gradient, or the tensors of a sparse one (`SparseGradient.parts`), of which one row at a time is
            computed.
        mean: running mean of the gradient.
        square: running mean of its square.
        lr: learning rate.
        betas: decay of the two means.
        eps: added to the root of the second.
        step: number of this step, from 1.
        unit: whether rows are divided by their norm afterwards.
        key: 32 bits that the rounding of codes is drawn from.
    """
    corrected = (lr / (1 - betas[0] ** step), *betas, (1 - betas[1] ** step) ** 0.5, eps)
    settings = np.array(corrected, dtype=np.float32)
    sparse = [] if isinstance(grad, Tensor) else [_array(t) for t in grad]
    moments = [_array(t) for t in (mean, square)]
    if mean.dtype == torch.int16:
        dense = _array(grad) if isinstance(grad, Tensor) else np.empty((0, weight.shape[1]), np.float32)
        none = [np.zeros(0, np.int64)] * 2 + [np.zeros(0, np.float32)] + [dense[:0]] * 2
        codes = [moment.view(np.uint16) for moment in moments]
        arrays = [_array(weight), dense, *(sparse or none), *codes]
        run_parts(lambda a, b: _adam_short(*arrays, settings, unit, np.uint32(key), a, b), len(weight))
    elif isinstance(grad, Tensor):
        arrays = [_array(weight), _array(grad), *moments]
        run_parts(lambda a, b: _adam(*arrays, settings, unit, a, b), len(weight))
    else:
        arrays = [_array(weight), *sparse, *moments]
        run_parts(lambda a, b: _adam_sparse(*arrays, settings, unit, a, b), len(weight))

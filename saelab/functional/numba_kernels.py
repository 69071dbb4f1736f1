"""Numba kernels of the training step on CPUs: inner products, gradients and Adam.

PyTorch's operations pass over memory several times where one pass does; on a CPU that is most of a training step beside
the encoder's product. Every kernel computes each row or latent by itself, so that the result does not depend on the
number of threads (`compiled.run_parts`).

The functions need numba; `compiled.use_numba` says where they are used. Numba is imported with this module, which takes
half a second; kernels are compiled when first called and kept beside the module, where it can be written.
"""

from collections.abc import Callable
from typing import Any, no_type_check

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from saelab.functional.compiled import run_parts

try:
    import numba  # type: ignore[import-not-found,import-untyped,unused-ignore]
except ImportError:  # the module can be imported all the same, as every module of the package
    numba = None  # type: ignore[assignment,unused-ignore]

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
def _decode_gradients(rows, starts, values, left, table, first, last, out, products):
    """Of latents first to last: the sum of `values * left[rows]` over the entries, and every entry's inner product."""
    for latent in range(first, last):
        weight, total = table[latent], out[latent]
        total[:] = np.float32(0)
        for i in range(starts[latent], starts[latent + 1]):
            a, value, product = left[rows[i]], values[i], np.float32(0)
            for j in range(len(weight)):
                product += a[j] * weight[j]
                total[j] += value * a[j]
            products[i] = product


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
def _project(grad, weight, first, last):
    """Subtract from rows first to last of the gradient their part along the weight's row."""
    for r in range(first, last):
        g, w = grad[r], weight[r]
        along = np.float32(0)
        for j in range(len(g)):
            along += g[j] * w[j]
        for j in range(len(g)):
            g[j] -= along * w[j]


@kernel(SUMS)
@no_type_check
def _norm(row):
    total = np.float32(0)
    for j in range(len(row)):
        total += row[j] * row[j]
    return np.sqrt(total)


@kernel({"contract", "nsz"})
@no_type_check
def _adam(weight, grad, mean, square, settings, unit, first, last):
    """One step of Adam for rows first to last, which are divided by their norms where `unit`."""
    rate, keep_mean, keep_square, root, eps = settings
    new_mean, new_square = np.float32(1) - keep_mean, np.float32(1) - keep_square
    for r in range(first, last):
        w, g, m, v = weight[r], grad[r], mean[r], square[r]
        for j in range(len(w)):
            m[j] += new_mean * (g[j] - m[j])
            v[j] = keep_square * v[j] + new_square * g[j] * g[j]
            w[j] -= rate * m[j] / (np.sqrt(v[j]) / root + eps)
        if unit:
            norm = max(_norm(w), np.float32(1e-12))
            for j in range(len(w)):
                w[j] /= norm


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
) -> Float[Tensor, "nnz"]:
    """`sampled_dot(rows, ...)` at the entries, and in the same pass their `weight_gradient`, written into `out`.

    Args:
        rows: row of `left` of each entry.
        columns: the result of `transpose_entries` for the entries.
        values: value of each entry.
        left: dense rows.
        table: the decoder, one row per latent.
        out: filled with `sum_e values[e] * left[rows[e]]` over the entries of each latent.
    """
    order, starts = columns
    products = torch.empty_like(values)
    arrays = [_array(t) for t in (rows[order], starts, values[order], left, table)]
    into, made = _array(out), _array(products)
    run_parts(lambda a, b: _decode_gradients(*arrays, a, b, into, made), len(table))
    return torch.empty_like(products).index_copy_(0, order, products)


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


def step_adam(
    weight: Float[Tensor, "n d"],
    grad: Float[Tensor, "n d"],
    mean: Float[Tensor, "n d"],
    square: Float[Tensor, "n d"],
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    step: int,
    unit: bool,
) -> None:
    """One step of Adam (arXiv:1412.6980) on a weight and its moments, in place, in one pass over memory.

    Args:
        weight: the weight.
        grad: its gradient.
        mean: running mean of the gradient.
        square: running mean of its square.
        lr: learning rate.
        betas: decay of the two means.
        eps: added to the root of the second.
        step: number of this step, from 1.
        unit: whether rows are divided by their norm afterwards.
    """
    corrected = (lr / (1 - betas[0] ** step), *betas, (1 - betas[1] ** step) ** 0.5, eps)
    settings = np.array(corrected, dtype=np.float32)
    arrays = [_array(t) for t in (weight, grad, mean, square)]
    run_parts(lambda a, b: _adam(*arrays, settings, unit, a, b), len(weight))

"""Numba kernels of the training step on CPUs: selection from a screen, inner products, quantization, gradients and Adam.

PyTorch's operations pass over memory several times where one pass does; on a CPU that is most of a training step beside
the encoder's product. Every kernel computes each row or latent by itself, so that the result does not depend on the
number of threads, and is run on `torch.get_num_threads()` Python threads, as compiled code needs no interpreter.

The functions need numba; `compiled.use_numba` says where they are used. Numba is imported with this module, which takes
half a second; kernels are compiled when first called and kept beside the module, where it can be written.
"""

from collections.abc import Callable
from typing import Any, no_type_check

import numpy as np
import torch
from jaxtyping import Float, Int, Int8
from torch import Tensor

from saelab.functional.compiled import run_parts

try:
    import numba  # type: ignore[import-not-found,import-untyped,unused-ignore]
except ImportError:  # the module can be imported all the same, as every module of the package
    numba = None

IS_INSTALLED = numba is not None
LANE, GROUP = 16, 4  # sizes of a lane, lanes of a group: the maxima of groups are compared first
LANES = 64  # maxima that a loop keeps, so that it takes whole vector registers
TRIES = 24  # bisections of a threshold
# sums may be split into the lanes of a vector register; nothing here is NaN unless the result may be
SUMS = {"reassoc", "contract", "nsz", "arcp"}
COMPARISONS = {"nnan", "nsz"}


def _kernel(fastmath: set[str]) -> Callable[[Callable[..., Any]], Any]:
    """The decorator that has Numba compile a function for arrays, without the interpreter's lock."""

    def compile_(function: Callable[..., Any]) -> Any:
        if numba is None:
            return function
        return numba.njit(nogil=True, cache=True, fastmath=fastmath, error_model="numpy")(function)

    return compile_


@_kernel(COMPARISONS)
@no_type_check
def _top(sizes, step, n, signed, first, last, out, latents, unseen):
    """The n largest `sizes * step` of rows first to last, unsorted, and an upper bound of the others.

    Lanes are every n_lanes-th size, groups every n_groups-th lane; n groups reach a threshold, so n sizes do.
    """
    n_latents = sizes.shape[1]
    n_lanes = (n_latents + LANE - 1) // LANE
    n_groups = (n_lanes + GROUP - 1) // GROUP
    lanes, groups = np.empty(n_lanes, np.float32), np.empty(n_groups, np.float32)
    for r in range(first, last):
        row, kept, names = sizes[r], out[r], latents[r]
        lanes[:] = np.float32(-np.inf)
        groups[:] = np.float32(-np.inf)
        for start in range(0, n_latents, n_lanes):
            part, factor = row[start : start + n_lanes], step[start : start + n_lanes]
            for i in range(len(part)):
                size = np.float32(part[i]) * factor[i]
                size = abs(size) if signed else size
                lanes[i] = size if size > lanes[i] else lanes[i]
        for start in range(0, n_lanes, n_groups):
            some = lanes[start : start + n_groups]
            for i in range(len(some)):
                groups[i] = some[i] if some[i] > groups[i] else groups[i]
        low, high = groups[0], groups[0]
        for i in range(n_groups):
            size = groups[i]
            high = size if size > high else high
            low = size if size < low else low
        for _ in range(TRIES):
            middle = np.float32(0.5) * (low + high)
            count = np.int32(0)
            for i in range(n_groups):
                count += np.int32(1) if groups[i] >= middle else np.int32(0)
            if count >= n:
                low = middle
                if count <= n + 3:
                    break
            else:
                high = middle
        bound, n_found, place = low, 0, 0
        for group in range(n_groups):
            if groups[group] < low:
                continue
            for lane in range(group, n_lanes, n_groups):
                if lanes[lane] < low:
                    continue
                for latent in range(lane, n_latents, n_lanes):
                    size = np.float32(row[latent]) * step[latent]
                    size = abs(size) if signed else size
                    if size < low:
                        continue
                    if n_found < n:
                        kept[n_found], names[n_found] = size, latent
                        n_found += 1
                        if n_found < n:
                            continue
                    elif size > kept[place]:
                        bound = kept[place] if kept[place] > bound else bound
                        kept[place], names[place] = size, latent
                    else:
                        bound = size if size > bound else bound
                        continue
                    for i in range(n):  # the smallest of those kept goes first
                        place = i if kept[i] < kept[place] else place
        unseen[r] = bound


@_kernel(COMPARISONS)
@no_type_check
def _above(sizes, step, floor, factor, slack, signed, first, last, out, latents, counts):
    """Entries with `sizes * step + slack >= floor * factor` of rows first to last: as many as there is room for."""
    n_latents, room = sizes.shape[1], out.shape[1]
    n_lanes = (n_latents + LANE - 1) // LANE
    largest = np.empty(n_lanes, np.float32)
    for r in range(first, last):
        row, by, limit = sizes[r], factor[r], -slack[r]
        largest[:] = np.float32(-np.inf)
        for start in range(0, n_latents, n_lanes):
            end = start + n_lanes
            part, unit, least = row[start:end], step[start:end], floor[start:end]
            for i in range(len(part)):
                size = np.float32(part[i]) * unit[i]
                size = abs(size) if signed else size
                size -= least[i] * by
                largest[i] = size if size > largest[i] else largest[i]
        n_found = 0
        for i in range(n_lanes):
            if largest[i] < limit:
                continue
            for latent in range(i, n_latents, n_lanes):
                size = np.float32(row[latent]) * step[latent]
                size = abs(size) if signed else size
                if size - floor[latent] * by >= limit:
                    if n_found < room:
                        out[r, n_found], latents[r, n_found] = size, latent
                    n_found += 1
        counts[r] = n_found


@_kernel(SUMS)
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


@_kernel(SUMS)
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


@_kernel(set())
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


@_kernel({"nnan", "nsz", "contract"})
@no_type_check
def _quantize(x, scale, last_column, first, last, out, step):
    """Rows first to last of `[x * scale, last_column]` in int8, and their steps."""
    width = x.shape[1]
    scaled, largest = np.empty(width, np.float32), np.empty(LANES, np.float32)
    for r in range(first, last):
        row, to = x[r], out[r, :width]
        largest[:] = np.float32(1e-30)
        for start in range(0, width, LANES):
            end = start + LANES
            part, factor, product = row[start:end], scale[start:end], scaled[start:end]
            for i in range(len(part)):
                value = part[i] * factor[i]
                product[i] = value
                value = abs(value)
                largest[i] = value if value > largest[i] else largest[i]
        top = abs(last_column[r])
        for i in range(LANES):
            top = largest[i] if largest[i] > top else top
        size = top / np.float32(127)
        inverse = np.float32(1) / size
        for i in range(width):
            to[i] = np.int8(np.int32(np.rint(scaled[i] * inverse)))
        out[r, width] = np.int8(np.rint(last_column[r] / size))
        step[r] = size


@_kernel(SUMS)
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


@_kernel(SUMS)
@no_type_check
def _norm(row):
    total = np.float32(0)
    for j in range(len(row)):
        total += row[j] * row[j]
    return np.sqrt(total)


@_kernel({"contract", "nsz"})
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


def top_of_rows(
    sizes: Tensor, step: Float[Tensor, "d_sae"], n: int, signed: bool
) -> tuple[Float[Tensor, "n_rows n"], Int[Tensor, "n_rows n"], Float[Tensor, "n_rows"]]:
    """The n largest `sizes * step` of each row (by magnitude if `signed`), unsorted, their latents, and an upper bound
    of the row's others.

    Args:
        sizes: (n_rows, d_sae) int32 or float32.
        step: factor of each latent.
        n: number kept; at most d_sae / 64.
        signed: whether magnitudes are compared.
    """
    shape = (len(sizes), n)
    out, latents, unseen = step.new_empty(shape), torch.empty(shape, dtype=torch.int64), step.new_empty(len(sizes))
    arrays = [_array(t) for t in (sizes, step, out, latents, unseen)]
    run_parts(lambda a, b: _top(arrays[0], arrays[1], n, signed, a, b, *arrays[2:]), len(sizes))
    return out, latents, unseen


def above_floor(
    sizes: Tensor,
    step: Float[Tensor, "d_sae"],
    floor: Float[Tensor, "d_sae"],
    factor: Float[Tensor, "n_rows"],
    slack: Float[Tensor, "n_rows"],
    signed: bool,
    room: int,
) -> tuple[Int[Tensor, "nnz"], Int[Tensor, "nnz"], Float[Tensor, "nnz"]]:
    """Rows, latents and values of all entries with `sizes * step + slack >= floor * factor`, row by row.

    Args:
        sizes: (n_rows, d_sae) int32 or float32.
        step: factor of each latent.
        floor: the threshold of each latent.
        factor: factor of each row on the thresholds.
        slack: what is added to each row.
        signed: whether magnitudes are compared and returned.
        room: entries expected in a row at most; where a row has more, the search is repeated with room for them.
    """
    while True:
        values, counts = step.new_empty(len(sizes), room), torch.empty(len(sizes), dtype=torch.int64)
        latents = torch.empty(len(sizes), room, dtype=torch.int64)
        inputs, outputs = (sizes, step, floor, factor, slack), (values, latents, counts)
        given, made = ([_array(t) for t in tensors] for tensors in (inputs, outputs))
        run_parts(lambda a, b, given=given, made=made: _above(*given, signed, a, b, *made), len(sizes))
        if not len(sizes) or int(counts.max()) <= room:
            break
        room = int(counts.max())
    rows, places = (torch.arange(room) < counts[:, None]).nonzero(as_tuple=True)
    return rows, latents[rows, places], values[rows, places]


def sampled_dot(
    rows: Int[Tensor, "nnz"],
    indices: Int[Tensor, "nnz"],
    left: Float[Tensor, "n_rows d"],
    table: Float[Tensor, "n d"],
    order: Int[Tensor, "nnz"],
) -> Float[Tensor, "nnz"]:
    """Inner products at the entries, `<left[rows[e]], table[indices[e]]>`; `order` sorts the entries by `indices`."""
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


def quantize_rows(
    x: Float[Tensor, "n d"],
    last: Float[Tensor, "n 1"],
    scale: Float[Tensor, "d"] | None,
    out: Int8[Tensor, "n d_1"],
    step: Float[Tensor, "n 1"],
) -> None:
    """Quantize rows of `[x * scale, last]` into `out`, with the steps in `step`."""
    scale = x.new_ones(x.shape[1]) if scale is None else scale
    x_, scale_, last_, out_, step_ = (_array(t) for t in (x, scale, last[:, 0].contiguous(), out, step[:, 0]))
    run_parts(lambda a, b: _quantize(x_, scale_, last_, a, b, out_, step_), len(x))


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

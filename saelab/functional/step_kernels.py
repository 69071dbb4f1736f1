"""Numba kernels of the training step on CPUs: nested reconstructions in one pass, and entries near thresholds.

As in `numba_kernels` every latent and row is computed by itself, so that the result does not depend on the number of
threads; the functions need numba.
"""

from typing import Any, no_type_check

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import pad

from saelab.functional.compiled import run_parts
from saelab.functional.numba_kernels import COMPARISONS, SUMS, kernel

SLICE = 64  # columns for which all rows of a batch are in the second cache


@kernel(SUMS)
@no_type_check
def _decode_nested(indices, values, offsets, table, target, first, last, sums, errors):
    """Of rows first to last: the residual of every prefix, its square, and the residuals' sums from each prefix on."""
    n_groups, n_rows = sums.shape[0], sums.shape[1]
    for r in range(first, last):
        for g in range(n_groups):
            before, rest = target[r] if g == 0 else sums[g - 1, r], sums[g, r]
            i, end = offsets[g * n_rows + r], offsets[g * n_rows + r + 1]
            for j in range(len(rest)):
                rest[j] = before[j]
            while i + 4 <= end:  # four rows at a time are read from memory
                w0, w1, w2, w3 = table[indices[i]], table[indices[i + 1]], table[indices[i + 2]], table[indices[i + 3]]
                z0, z1, z2, z3 = values[i], values[i + 1], values[i + 2], values[i + 3]
                for j in range(len(rest)):
                    rest[j] -= (z0 * w0[j] + z1 * w1[j]) + (z2 * w2[j] + z3 * w3[j])
                i += 4
            while i < end:
                w, z = table[indices[i]], values[i]
                for j in range(len(rest)):
                    rest[j] -= z * w[j]
                i += 1
            error = np.float32(0)
            for j in range(len(rest)):
                error += rest[j] * rest[j]
            errors[g, r] = error
        for g in range(n_groups - 2, -1, -1):
            rest, after = sums[g, r], sums[g + 1, r]
            for j in range(len(rest)):
                rest[j] += after[j]


@kernel(SUMS)
@no_type_check
def _sum_products(rows, starts, slices, table, first, last, out):
    """Of latents first to last: the inner product of the sum of their rows with their row of the table.

    Slice by slice of the columns: entries of a latent read other rows of all tokens, too many for a cache at full
    width.
    """
    total = np.empty(SLICE, np.float32)
    for latent in range(first, last):
        out[latent] = np.float32(0)
    for s in range(len(slices)):
        columns = slices[s]
        width = min(SLICE, table.shape[1] - s * SLICE)
        for latent in range(first, last):
            begin, end = starts[latent], starts[latent + 1]
            if begin == end:
                continue
            total[:] = np.float32(0)
            i = begin
            while i + 4 <= end:  # sums of four are added at a time, as each time reads and writes the total
                r0, r1, r2, r3 = columns[rows[i]], columns[rows[i + 1]], columns[rows[i + 2]], columns[rows[i + 3]]
                for j in range(SLICE):
                    total[j] += (r0[j] + r1[j]) + (r2[j] + r3[j])
                i += 4
            while i < end:
                row = columns[rows[i]]
                for j in range(SLICE):
                    total[j] += row[j]
                i += 1
            weight, product = table[latent, s * SLICE : s * SLICE + width], np.float32(0)
            for j in range(width):
                product += total[j] * weight[j]
            out[latent] += product


@kernel(COMPARISONS)
@no_type_check
def _count_between(sizes, counts, scale, margin, width, first, last, n_between):
    """Number of the sizes of rows first to last that are between `margin` and `width - margin`."""
    for r in range(first, last):
        low, high, n = margin[r], width - margin[r], 0
        for i in range(counts[r]):
            size = sizes[r, i] * scale[r]
            n += 1 if size > low and size < high else 0
        n_between[r] = n


@kernel(COMPARISONS)
@no_type_check
def _split_hits(sizes, names, counts, scale, margin, width, starts, first, last, others, between):
    """Write rows, latents (and sizes) of rows first to last: those of `_count_between`, and the others."""
    rows, latents, found = others
    rows_between, latents_between = between
    for r in range(first, last):
        low, high = margin[r], width - margin[r]
        i_other, i_between = starts[0, r], starts[1, r]
        for i in range(counts[r]):
            size = sizes[r, i] * scale[r]
            if size > low and size < high:
                rows_between[i_between], latents_between[i_between] = r, names[r, i]
                i_between += 1
            else:
                rows[i_other], latents[i_other], found[i_other] = r, names[r, i], size
                i_other += 1


def decode_nested(
    indices: Int[Tensor, "nnz"],
    values: Float[Tensor, "nnz"],
    offsets: Int[Tensor, "n_stacked_1"],
    table: Float[Tensor, "n d"],
    target: Float[Tensor, "n_rows d"],
) -> tuple[Float[Tensor, "n_groups"], Float[Tensor, "n_groups n_rows d"]]:
    """Squared errors of all prefixes, `||r_g||^2` with `r_g = target - sum_{h <= g} parts[h]`; and `sum_{h >= g} r_h`,
    which are the gradients of the parts where all errors count alike, up to a factor.

    Args:
        indices: row of `table` of each code.
        values: the codes.
        offsets: (n_groups * n_rows + 1,) group g of row r has the codes `offsets[g * n_rows + r]` to the next offset.
        table: decoder, one row per latent.
        target: what is reconstructed.
    """
    n_groups = (len(offsets) - 1) // max(1, len(target))
    sums, errors = target.new_empty(n_groups, *target.shape), target.new_empty(n_groups, len(target))
    arrays = [_array(t) for t in (indices, values, offsets, table, target)]
    into, squares = _array(sums), _array(errors)
    run_parts(lambda a, b: _decode_nested(*arrays, a, b, into, squares), len(target))
    return errors.sum(1, dtype=torch.float64).to(errors.dtype), sums


def split_hits(
    sizes: Float[Tensor, "n_padded room"],
    latents: Int[Tensor, "n_padded room"],
    counts: Int[Tensor, "n_rows"],
    scale: Float[Tensor, "n_rows"],
    margin: Float[Tensor, "n_rows"],
    width: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """What a screen found in each row, row by row: rows, latents and sizes; and rows and latents of the sizes that are
    above `margin` and below `width - margin`, which are left out of the first three.

    Args:
        sizes: sizes found in each row, in the row's own unit.
        latents: their latents.
        counts: how many were found in each row.
        scale: unit of each row.
        margin: lower bound of the second kind, which is also its distance from `width`.
        width: upper bound; 0 for no entries of the second kind.
    """
    n_between = torch.empty_like(counts)
    inputs = [_array(t) for t in (sizes, latents, counts, scale, margin)]
    upper, counted = np.float32(width), _array(n_between)
    run_parts(lambda a, b: _count_between(inputs[0], *inputs[2:], upper, a, b, counted), len(counts))
    ends = torch.stack([counts - n_between, n_between]).cumsum(1)
    starts = pad(ends, (1, 0))
    n_others, n_sure = ends[:, -1].tolist() if len(counts) else (0, 0)
    others = [torch.empty(n_others, dtype=dtype) for dtype in (torch.int64, torch.int64, torch.float32)]
    between = [torch.empty(n_sure, dtype=torch.int64) for _ in range(2)]
    into = [tuple(_array(t) for t in part) for part in (others, between)]
    first_places = _array(starts)
    run_parts(lambda a, b: _split_hits(*inputs, upper, first_places, a, b, *into), len(counts))
    return others[0], others[1], others[2], between[0], between[1]


def sum_products(
    rows: Int[Tensor, "n_entries"],
    starts: Int[Tensor, "n_1"],
    left: Float[Tensor, "n_rows d"],
    table: Float[Tensor, "n d"],
) -> Float[Tensor, "n"]:
    """Sums of inner products of each latent's entries: `out[j] = <sum over its entries e: left[rows[e]], table[j]>`.

    Args:
        rows: row of `left` of each entry, sorted by latent.
        starts: latent j has the entries `starts[j]` to `starts[j + 1]`.
        left: first factors, one row per token.
        table: second factors, one row per latent.
    """
    n_slices = -(-left.shape[1] // SLICE)
    wide = pad(left, (0, n_slices * SLICE - left.shape[1])) if left.shape[1] % SLICE else left
    slices = wide.view(len(left), n_slices, SLICE).transpose(0, 1).contiguous()
    out = left.new_empty(len(table))
    arrays = [_array(t) for t in (rows, starts, slices, table)]
    into = _array(out)
    run_parts(lambda a, b: _sum_products(*arrays, a, b, into), len(table))
    return out


def _array(tensor: Tensor) -> Any:
    return tensor.detach().numpy()

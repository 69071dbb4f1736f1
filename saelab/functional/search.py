"""Search for the largest pre-activations, without ever holding all of them.

Both searches screen in low precision, keep more candidates than asked for, re-score those in float32 and select again.
The candidates' own errors, in proportion to what each row's should be, say how far the screen can be wrong; rows where
an unseen latent might still have won are searched again in float32. The result is the top-k of the float32 scores
unless the screen errs on an unseen winner by more than `ERROR_MARGIN` times its largest such error on all candidates.
That is a check, not a proof: scores can be built to pass it and lose a member (tests/test_search.py keeps one); no
random data tried did.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saelab.functional.codes import SparseCodes
from saelab.functional.kernels import sampled_dot
from saelab.functional.screening import SCAN_ROWS, Precision, Screen, choose_precision

DENSE_WIDTH = 8192  # below this width a dense product and its top-k cost less than screening
ERROR_MARGIN = 1.25  # an unseen latent may be wrong by this many times the largest error seen on the candidates
MAX_UNSURE = 0.1  # of the rows may be searched again in float32; with more, another screen costs less


def search_topk(
    x: Float[Tensor, "n_rows d_in"],
    W: Float[Tensor, "d_sae d_in"],
    bias: Float[Tensor, "d_sae"],
    k: int,
    signed: bool,
    precision: Precision | None = None,
) -> SparseCodes:
    """The k largest `u = x W^T + bias` of every row: by |u| where `signed`, else the positive ones among the k largest.

    >>> search_topk(torch.tensor([[1.0, -3.0]]), torch.eye(2), torch.zeros(2), k=1, signed=True).values
    tensor([-3.])
    """
    d_sae = len(W)
    screen = _make_screen(x, W, bias, signed, precision)
    if screen is None:
        return _keep_firing(*_dense_topk(x, W, bias, k, signed), signed, d_sae)
    n_candidates = min(d_sae, 2 * k - k // 4 + 4 if screen.precision == "int8" else k + k // 4 + 8)
    parts = zip(*(c.top(n_candidates) for c in screen.chunks(x)), strict=True)
    approximate, candidates, unseen, noise = (torch.cat(part) for part in parts)
    rows = torch.arange(len(x), device=x.device)
    exact = _rescore(x, W, bias, rows.repeat_interleave(n_candidates), candidates.flatten()).view(candidates.shape)
    size = exact.abs() if signed else exact
    best = size.topk(k, dim=1)
    indices, values = candidates.gather(1, best.indices), exact.gather(1, best.indices)
    if n_candidates < d_sae:
        error = _bound_error((size - approximate).abs().amax(1) / noise, noise)
        unsure = (unseen + error > best.values[:, -1].clamp(min=0)).nonzero().squeeze(1)
        indices[unsure], _ = _dense_topk(x[unsure], W, bias, k, signed)
        values[unsure] = _rescore(x, W, bias, unsure.repeat_interleave(k), indices[unsure].flatten()).view(-1, k)
    return _keep_firing(indices, values, signed, d_sae)


def search_group_max(
    x: Float[Tensor, "n_rows d_in"], W: Float[Tensor, "d_sae d_in"], bias: Float[Tensor, "d_sae"], k: int
) -> SparseCodes:
    """The largest `u = x W^T + bias` of each of k contiguous groups of latents, where it is positive.

    >>> search_group_max(torch.tensor([[1.0, -3.0]]), torch.eye(2), torch.zeros(2), k=2).indices
    tensor([0])
    """
    parts = [torch.addmm(bias, rows, W.T).unflatten(1, (k, -1)).max(dim=2) for rows in x.split(256)]
    values, within = (torch.cat(part) for part in zip(*parts, strict=True))
    firsts = torch.arange(0, len(W), len(W) // k, device=x.device)
    return _keep_firing(within + firsts, values, False, len(W))


def _make_screen(x: Tensor, W: Tensor, bias: Tensor, signed: bool, precision: Precision | None) -> Screen | None:
    """The screen for a search among these rows; None where a dense product costs less."""
    if len(x) == 0 or (precision is None and len(W) < DENSE_WIDTH):
        return None
    return Screen(W, bias, precision or choose_precision(x.shape[1], len(W), x.device), signed, like=x)


def _dense_topk(x: Tensor, W: Tensor, bias: Tensor, k: int, signed: bool) -> tuple[Tensor, Tensor]:
    """Latents and values of each row's k largest, from the whole product, a part of the rows at a time."""
    indices = torch.empty(len(x), k, dtype=torch.int64, device=x.device)
    values = x.new_empty(len(x), k)
    for rows in torch.arange(len(x), device=x.device).split(256):
        u = torch.addmm(bias, x[rows], W.T)
        indices[rows] = (u.abs() if signed else u).topk(k, dim=1).indices
        values[rows] = u.gather(1, indices[rows])
    return indices, values


def _keep_firing(indices: Tensor, values: Tensor, signed: bool, d_sae: int) -> SparseCodes:
    """Compress (n_rows, k) codes, dropping zeros and, unless signed, what is below zero."""
    rows, place = ((values != 0) if signed else (values > 0)).nonzero(as_tuple=True)
    return SparseCodes.from_rows(indices[rows, place], values[rows, place], rows, (len(values), d_sae))


def _rescore(x: Tensor, W: Tensor, bias: Tensor, rows: Tensor, indices: Tensor) -> Tensor:
    return sampled_dot(rows, indices, x, W) + bias[indices]


def search_batch_topk(
    x: Float[Tensor, "n_rows d_in"],
    W: Float[Tensor, "d_sae d_in"],
    bias: Float[Tensor, "d_sae"],
    k: int,
    signed: bool,
    precision: Precision | None = None,
) -> SparseCodes:
    """The k * n_rows largest `u = x W^T + bias` of the whole batch: by |u| where `signed`, else the positive ones
    among them.

    >>> search_batch_topk(torch.tensor([[9.0, 8.0], [1.0, 2.0]]), torch.eye(2), torch.zeros(2), k=1, signed=False).rows
    tensor([0, 0])
    """
    n_rows, d_sae = x.shape[0], W.shape[0]
    n_kept = k * n_rows
    screen = _make_screen(x, W, bias, signed, precision)
    if screen is None:
        u = torch.addmm(bias, x, W.T)
        kept = _largest(u.abs() if signed else u, n_kept)
        values = u.flatten()[kept]
        kept, values = (part[(values != 0) if signed else (values > 0)] for part in (kept, values))
        return SparseCodes.from_rows(kept % d_sae, values, kept // d_sae, (n_rows, d_sae))
    rows, indices, exact = _screen_batch(screen, x, W, bias, n_kept)
    size = exact.abs() if signed else exact
    keep = size.topk(min(n_kept, len(size)), sorted=False).indices.sort().values
    keep = keep[size[keep] > 0]
    return SparseCodes.from_rows(indices[keep], exact[keep], rows[keep], (n_rows, d_sae))


def _screen_batch(
    screen: Screen, x: Tensor, W: Tensor, bias: Tensor, n_kept: int
) -> tuple[Int[Tensor, "nnz"], Int[Tensor, "nnz"], Float[Tensor, "nnz"]]:
    """Rows, latents and exact u of a superset of the batch's n_kept largest, row by row."""
    surplus = 1.6 if screen.precision == "int8" else 1.25
    while True:
        floor = _estimate_floor(screen, x, n_kept / len(x) * surplus)
        parts = zip(*(c.above(floor) for c in screen.chunks(x)), strict=True)
        rows, indices, approximate, noise = (torch.cat(part) for part in parts)
        exact = _rescore(x, W, bias, rows, indices)
        size = exact.abs() if screen.signed else exact
        if len(size) >= n_kept:
            worst = size.topk(n_kept, sorted=False).values.amin().clamp(min=0)
            error = _bound_error((size - approximate).abs() / noise[rows], noise)
            unsure = floor + error > worst
            if unsure.sum() <= MAX_UNSURE * len(x):
                return _search_again(unsure, (rows, indices, exact), x, W, bias, worst, screen.signed)
        if floor == -torch.inf:
            return rows, indices, exact
        surplus *= 4  # the floor was too high to be sure: screen again with a lower one


def _search_again(
    unsure: Tensor, found: tuple[Tensor, ...], x: Tensor, W: Tensor, bias: Tensor, worst: Tensor, signed: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Replace what was found in the unsure rows by all that float32 finds there, down to `worst`."""
    if not unsure.any():
        return found[0], found[1], found[2]
    lost = unsure.nonzero().squeeze(1)
    codes = search_above(x[lost], W, bias, worst.nextafter(worst.new_tensor(-1.0)), signed)
    assert codes is not None
    sure = ~unsure[found[0]]
    rows = torch.cat([found[0][sure], lost[codes.rows]])
    indices = torch.cat([found[1][sure], codes.indices])
    exact = torch.cat([found[2][sure], _rescore(x, W, bias, lost[codes.rows], codes.indices)])
    order = rows.argsort(stable=True)
    return rows[order], indices[order], exact[order]


def _bound_error(relative: Float[Tensor, "..."], noise: Float[Tensor, "n_rows"]) -> Float[Tensor, "n_rows"]:
    """How wrong an unseen size may be in each row, from the candidates' errors relative to their row's noise."""
    worst = relative.nan_to_num().amax() if relative.numel() else noise.new_zeros(())
    return worst * noise * ERROR_MARGIN


def _largest(size: Float[Tensor, "n_rows d_sae"], n: int) -> Int[Tensor, "n"]:
    """Places of the n largest in the flattened tensor, ascending; a floor read off some rows leaves few to compare."""
    sample, flat = size[::16].flatten(), size.flatten()
    if n == len(flat):
        return torch.arange(n, device=size.device)
    floor = sample.topk(min(len(sample), int(1.3 * n * len(sample) / len(flat)) + 1), sorted=False).values.amin()
    above = (flat >= floor).nonzero().squeeze(1)
    if len(above) < n:
        above = torch.arange(len(flat), device=size.device)
    return above[flat[above].topk(n, sorted=False).indices].sort().values


def _estimate_floor(screen: Screen, x: Tensor, k: float) -> Float[Tensor, ""]:
    """The size that about k entries a row exceed, from an even sample of the rows; -inf where k is most of the
    latents.
    """
    n = min(int(4 * k) + 1, len(screen.latents))
    if 2 * k >= len(screen.latents):
        return x.new_full((), -torch.inf)
    sample = x[:: max(1, x.shape[0] // 256)]
    sizes = torch.cat([chunk.top(n)[0] for chunk in screen.chunks(sample)]).flatten()
    return sizes.topk(int(k * len(sample)) + 1).values[-1]


def search_above(
    x: Float[Tensor, "n_rows d_in"],
    W: Float[Tensor, "d_sae d_in"],
    bias: Float[Tensor, "d_sae"],
    floor: Float[Tensor, "..."],
    signed: bool,
    max_frac: float = 1.0,
) -> SparseCodes | None:
    """All `u = x W^T + bias` above a floor (one, or one a latent): |u| where `signed`; None where they are more than
    `max_frac` of all.

    >>> search_above(torch.tensor([[1.0, -3.0]]), torch.eye(2), torch.zeros(2), torch.tensor(2.0), signed=True).values
    tensor([-3.])
    """
    found: list[tuple[Tensor, Tensor, Tensor]] = []
    n_left = int(max_frac * len(x) * len(W))
    for start in range(0, len(x), SCAN_ROWS):
        u = torch.addmm(bias, x[start : start + SCAN_ROWS], W.T)
        rows, indices = ((u.abs() if signed else u) > floor).nonzero(as_tuple=True)
        n_left -= len(rows)
        if n_left < 0:
            return None
        found.append((indices, u[rows, indices], rows + start))
    if not found:
        return search_topk(x, W, bias, 1, signed)
    indices, values, rows = (torch.cat(parts) for parts in zip(*found, strict=True))
    return SparseCodes.from_rows(indices, values, rows, (len(x), len(W)))

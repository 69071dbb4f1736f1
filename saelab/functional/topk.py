"""Top-k search over the encoder's pre-activations, without holding all of them: codes of TopK, BatchTopK and GroupMax.

Searches screen in low precision, keep more candidates than needed, recompute those in float32 and select again.
The errors found on the candidates, relative to each row's expected error, bound the error of the screen; rows where
another latent might still be among the largest are searched again in float32. The result is the top-k of the float32
values unless the screen's error on a latent that was not recomputed exceeds `rescoring.ERROR_MARGIN` times its
largest relative error on all candidates. That is a check, not a proof: values can be constructed that pass it and lose
a member (tests/functional/test_topk.py keeps one); no random data tried did.

Of equal values that of the lowest latent is kept, however it was found. Exact ties are common (latents that are copies
of each other, whole numbers, a penalty's zeros), `torch.topk` breaks them arbitrarily, and a matrix product gives equal
columns different last bits depending on their position. So values within rounding of each other are recomputed one by
one (`sampled_dot`); of equal ones the lowest latent is kept, and across a batch the first row's.
"""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saelab.functional.activation_functions import keep_places
from saelab.functional.codes import SparseCodes
from saelab.functional.rescoring import bound_error, bound_rounding, score
from saelab.functional.row_topk import dense_topk, exact_topk, finds_exactly, topk_latents
from saelab.functional.screening import Precision, Screen, first_largest
from saelab.functional.threshold_search import DENSE_WIDTH, is_fused, screening_precision, search_above

WIDE = 2**15  # latents from which on directions are looked for in which the activations lie
MAX_UNSURE = 0.1  # of the rows may be searched again in float32; with more, another screen costs less
SAMPLE = 16  # times k latents are computed first: k of these usually exceed a latent of average size
PART = 2**22  # pre-activations held at a time


def first_of_tied(size: Float[Tensor, "n m"], latents: Int[Tensor, "n m"], k: int) -> Int[Tensor, "n k"]:
    """Places of each row's k largest, largest first; of equal ones that of the lowest latent."""
    best = size.topk(min(k + 1, size.shape[1]), dim=1)
    places = best.indices[:, :k].contiguous()
    tied = (best.values[:, 1:] == best.values[:, :-1]).any(1).nonzero().squeeze(1)
    by_latent = latents[tied].argsort(1)
    order = size[tied].gather(1, by_latent).sort(dim=1, descending=True, stable=True).indices[:, :k]
    places[tied] = by_latent.gather(1, order)
    return places


@torch.no_grad()
def batch_topk_entries(
    u: Float[Tensor, "n_rows d_sae"],
    x: Float[Tensor, "n_rows d_in"],
    W: Float[Tensor, "d_sae d_in"],
    bias: Float[Tensor, "d_sae"],
    n: int,
    signed: bool,
) -> tuple[Int[Tensor, "nnz"], Int[Tensor, "nnz"]]:
    """Rows and latents of the n largest `u = x W^T + bias` of a batch, row by row.

    Of equal values the first row's are kept, and in a row those of the lowest latents. Fewer than n are returned where
    fewer can fire.

    Args:
        u: (n_rows, d_sae) the product, already computed.
        x: activations, for recomputing what is too close to decide.
        W: encoder, one row per latent.
        bias: encoder bias.
        n: entries kept in the batch.
        signed: whether the largest are those of |u|.

    >>> x, W = torch.ones(2, 2), torch.ones(2, 2)
    >>> batch_topk_entries(x @ W.T, x, W, torch.zeros(2), n=3, signed=False)
    (tensor([0, 0, 1]), tensor([0, 1, 0]))
    """
    size = u.abs() if signed else u
    slack = bound_rounding(x, W, bias)
    rows, latents = _above_floor(size, slack, n)
    may_fire = size[rows, latents] + slack[rows] > 0
    rows, latents = rows[may_fire], latents[may_fire]
    if n < len(rows):
        sizes, off = size[rows, latents], slack[rows]
        surely = (sizes - off).topk(n, sorted=False).values.amin()
        at_most = (sizes + off).topk(n, sorted=False).values.amin()
        kept = sizes - off > at_most
        open_ = (~kept & (sizes + off >= surely)).nonzero()[:, 0]
        exact = score(x, W, bias, rows[open_], latents[open_])
        kept[open_[first_largest(exact.abs() if signed else exact, n - int(kept.sum()))]] = True
        rows, latents = rows[kept], latents[kept]
    return rows, latents


def _above_floor(size: Tensor, slack: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """Entries that include the n largest, within `slack`; a threshold from every 16th row leaves few to compare."""
    sample, total = size[::16].flatten(), size.numel()
    if n < total:
        floor = sample.topk(min(len(sample), int(1.3 * n * len(sample) / total) + 1), sorted=False).values.amin()
        rows, latents = (size >= (floor - 2 * slack)[:, None]).nonzero(as_tuple=True)
        if int((size[rows, latents] - slack[rows] >= floor).sum()) >= n:
            return rows, latents
    every = torch.ones_like(size, dtype=torch.bool).nonzero(as_tuple=True)
    return every[0], every[1]


@torch.no_grad()
def group_max_latents(
    u: Float[Tensor, "n_rows d_sae"],
    x: Float[Tensor, "n_rows d_in"],
    W: Float[Tensor, "d_sae d_in"],
    bias: Float[Tensor, "d_sae"],
    k: int,
) -> Int[Tensor, "n_rows k"]:
    """The latent with the largest `u = x W^T + bias` in each of k contiguous groups of a row; of equal ones the lowest.

    Args:
        u: (n_rows, d_sae) the product, already computed.
        x: activations, for recomputing what is too close to decide.
        W: encoder, one row per latent.
        bias: encoder bias.
        k: number of groups, which divides d_sae.

    >>> x, W = torch.ones(1, 2), torch.ones(4, 2)
    >>> group_max_latents(x @ W.T, x, W, torch.zeros(4), k=2)
    tensor([[0, 2]])
    """
    grouped = torch.unflatten(u, 1, (k, -1))
    largest, within = grouped.max(dim=2)
    width, slack = grouped.shape[2], 2 * bound_rounding(x, W, bias)
    near = grouped >= (largest - slack[:, None])[:, :, None]
    rows, groups = (near.sum(2) > 1).nonzero(as_tuple=True)
    if len(rows):
        possible, place = near[rows, groups].nonzero(as_tuple=True)
        exact = x.new_full((len(rows), width), -torch.inf)
        exact[possible, place] = score(x, W, bias, rows[possible], groups[possible] * width + place)
        within[rows, groups] = exact.argmax(1)
    return within + torch.arange(k, device=u.device) * width


def search_topk(
    x: Float[Tensor, "n_rows d_in"],
    W: Float[Tensor, "d_sae d_in"],
    bias: Float[Tensor, "d_sae"],
    k: int,
    signed: bool,
    precision: Precision | None = None,
) -> SparseCodes:
    """Codes of the k largest `u = x W^T + bias` of every row: TopK, or AbsTopK where `signed`.

    Args:
        x: activations.
        W: encoder, one row per latent.
        bias: encoder bias.
        k: latents kept in each row.
        signed: whether the largest are those of |u|; else negative ones among the k largest are dropped.
        precision: dtype of the approximate product that finds candidates, which float32 then decides; None takes the
            fastest, and an exact dense product for small dictionaries.

    >>> search_topk(torch.tensor([[1.0, -3.0]]), torch.eye(2), torch.zeros(2), k=1, signed=True).values
    tensor([-3.])
    """
    d_sae = len(W)
    if precision is None and finds_exactly(W, k):
        return _keep_firing(*exact_topk(x, W, bias, k, signed), signed, d_sae)
    screen = _make_screen(x, W, bias, signed, precision)
    if screen is None:
        return _keep_firing(*dense_topk(x, W, bias, k, signed), signed, d_sae)
    n_candidates = min(d_sae, 2 * k - k // 4 + 4 if screen.precision == "int8" else k + k // 4 + 8)
    approximate, candidates, unseen, noise = screen.top(x, n_candidates)
    rows = torch.arange(len(x), device=x.device)
    exact = score(x, W, bias, rows.repeat_interleave(n_candidates), candidates.flatten()).view(candidates.shape)
    size = exact.abs() if signed else exact
    places = first_of_tied(size, candidates, k)
    indices, values = candidates.gather(1, places), exact.gather(1, places)
    if n_candidates < d_sae:
        unseen = unseen + bound_error((size - approximate).abs().amax(1) / noise, noise)
        worst = size.gather(1, places[:, -1:])[:, 0]
        unsure = (~(unseen < worst) & ~(unseen <= 0)).nonzero().squeeze(1)  # NaN decides nothing
        indices[unsure], _ = dense_topk(x[unsure], W, bias, k, signed)
        values[unsure] = score(x, W, bias, unsure.repeat_interleave(k), indices[unsure].flatten()).view(-1, k)
    return _keep_firing(indices, values, signed, d_sae)


def search_group_max(
    x: Float[Tensor, "n_rows d_in"], W: Float[Tensor, "d_sae d_in"], bias: Float[Tensor, "d_sae"], k: int
) -> SparseCodes:
    """Codes of the largest `u = x W^T + bias` in each of k contiguous groups of latents, where it is positive.

    Args:
        x: activations.
        W: encoder, one row per latent.
        bias: encoder bias.
        k: number of groups, which divides d_sae.

    >>> search_group_max(torch.tensor([[1.0, -3.0]]), torch.eye(2), torch.zeros(2), k=2).indices
    tensor([0])
    """
    values, latents = [], []
    for rows in torch.split(x, 256):
        u = torch.addmm(bias, rows, W.T)
        latents.append(group_max_latents(u, rows, W, bias, k))
        values.append(u.gather(1, latents[-1]))
    return _keep_firing(torch.cat(latents), torch.cat(values), False, len(W))


def _make_screen(x: Tensor, W: Tensor, bias: Tensor, signed: bool, precision: Precision | None) -> Any:
    """The screen for these rows, of one of three kinds; None where a dense product costs less."""
    if len(x) == 0 or (precision is None and len(W) < DENSE_WIDTH):
        return None
    precision = precision or screening_precision(W)
    if is_fused(W, precision):
        from saelab.functional.fused_screen import FusedScreen
        from saelab.functional.partial_screen import LeadingScreen, find_leading

        leading = find_leading(x, W) if len(W) >= WIDE else None
        if leading is not None:
            return LeadingScreen(W, bias, signed, x, leading)
        return FusedScreen(W, bias, signed, like=x)
    return Screen(W, bias, precision, signed, like=x)


def _keep_firing(indices: Tensor, values: Tensor, signed: bool, d_sae: int) -> SparseCodes:
    """Compress (n_rows, k) codes, dropping zeros and, unless signed, negative ones."""
    n, k = values.shape
    if bool((values != 0 if signed else values > 0).all()):
        rows, offsets = torch.arange(n, device=values.device), torch.arange(n + 1, device=values.device) * k
        return SparseCodes(indices.flatten(), values.flatten(), rows.repeat_interleave(k), offsets, d_sae, (n,))
    rows, place = ((values != 0) if signed else (values > 0)).nonzero(as_tuple=True)
    return SparseCodes.from_rows(indices[rows, place], values[rows, place], rows, (len(values), d_sae))


def search_batch_topk(
    x: Float[Tensor, "n_rows d_in"],
    W: Float[Tensor, "d_sae d_in"],
    bias: Float[Tensor, "d_sae"],
    k: int,
    signed: bool,
    precision: Precision | None = None,
) -> SparseCodes:
    """Codes of the k * n_rows largest `u = x W^T + bias` of the batch: BatchTopK, or by |u| where `signed`.

    Args:
        x: activations.
        W: encoder, one row per latent.
        bias: encoder bias.
        k: latents kept per row, on average.
        signed: whether the largest are those of |u|; else negative ones among them are dropped.
        precision: dtype of the approximate product that finds candidates, which float32 then decides; None takes the
            fastest, and an exact dense product for small dictionaries.

    >>> search_batch_topk(torch.tensor([[9.0, 8.0], [1.0, 2.0]]), torch.eye(2), torch.zeros(2), k=1, signed=False).rows
    tensor([0, 0])
    """
    n_rows, d_sae = x.shape[0], W.shape[0]
    n_kept = k * n_rows
    screen = _make_screen(x, W, bias, signed, precision)
    if screen is None:
        u = torch.addmm(bias, x, W.T)
        rows, indices = batch_topk_entries(u, x, W, bias, n_kept, signed)
        values = u[rows, indices]
        firing = (values != 0) if signed else (values > 0)
        return SparseCodes.from_rows(indices[firing], values[firing], rows[firing], (n_rows, d_sae))
    rows, indices, exact = _screen_batch(screen, x, W, bias, n_kept)
    size = exact.abs() if signed else exact
    keep = _first_of_tied_entries(size, rows * d_sae + indices, n_kept)
    keep = keep[size[keep] > 0]
    return SparseCodes.from_rows(indices[keep], exact[keep], rows[keep], (n_rows, d_sae))


def _first_of_tied_entries(size: Float[Tensor, "m"], entries: Int[Tensor, "m"], n: int) -> Int[Tensor, "n_kept"]:
    """Places of the n largest, ascending; of equal ones those with the lowest numbers in `entries`."""
    keep = first_largest(size, n)
    if n >= len(size):
        return keep
    floor = size[keep].amin()
    tied = (size == floor).nonzero().squeeze(1)
    n_tied = int((size[keep] == floor).sum())
    if n_tied == len(tied):  # none is left out, or none but one is
        return keep
    lowest = tied[entries[tied].argsort()[:n_tied]]
    return torch.cat([keep[size[keep] != floor], lowest]).sort().values


def _screen_batch(
    screen: Any, x: Tensor, W: Tensor, bias: Tensor, n_kept: int
) -> tuple[Int[Tensor, "nnz"], Int[Tensor, "nnz"], Float[Tensor, "nnz"]]:
    """Rows, latents and exact u of a superset of the batch's n_kept largest, row by row."""
    surplus = 1.6 if screen.precision == "int8" else 1.25
    while True:
        floor = _estimate_floor(screen, x, n_kept / len(x) * surplus)
        rows, indices, approximate, noise = screen.above(x, floor)
        exact = score(x, W, bias, rows, indices)
        size = exact.abs() if screen.signed else exact
        if len(size) >= n_kept:
            worst = size.topk(n_kept, sorted=False).values.amin().clamp(min=0)
            unseen = floor + bound_error((size - approximate).abs() / noise[rows], noise)
            unsure = (unseen >= worst) & (unseen > 0)
            if unsure.sum() <= MAX_UNSURE * len(x):
                return _search_again(unsure, (rows, indices, exact), x, W, bias, worst, screen.signed)
        if floor == -torch.inf:
            return rows, indices, exact
        surplus *= 4  # the floor was too high to be sure: screen again with a lower one


def _search_again(
    unsure: Tensor, found: tuple[Tensor, ...], x: Tensor, W: Tensor, bias: Tensor, worst: Tensor, signed: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Replace the entries of the unsure rows by all that a float32 search finds there, down to `worst`."""
    if not unsure.any():
        return found[0], found[1], found[2]
    lost = unsure.nonzero().squeeze(1)
    codes = search_above(x[lost], W, bias, worst.nextafter(worst.new_tensor(-1.0)), signed)
    assert codes is not None
    sure = ~unsure[found[0]]
    rows = torch.cat([found[0][sure], lost[codes.rows]])
    indices = torch.cat([found[1][sure], codes.indices])
    exact = torch.cat([found[2][sure], score(x, W, bias, lost[codes.rows], codes.indices)])
    order = rows.argsort(stable=True)
    return rows[order], indices[order], exact[order]


def _estimate_floor(screen: Any, x: Tensor, k: float) -> Float[Tensor, ""]:
    """The size that about k entries per row exceed, from every nth row; -inf where k is at least half of the
    latents.
    """
    n = min(int(4 * k) + 1, screen.d_sae)
    if 2 * k >= screen.d_sae:
        return x.new_full((), -torch.inf)
    sample = x[:: max(1, x.shape[0] // 256)]
    sizes = screen.top(sample, n)[0].flatten()
    floor: Tensor = sizes.topk(int(k * len(sample)) + 1).values[-1]
    return floor


def pick_topk(
    x: Float[Tensor, "n_rows d_in"],
    W: Float[Tensor, "d_sae d_in"],
    bias: Float[Tensor, "d_sae"],
    latents: Int[Tensor, "n_latents"],
    k: int,
    signed: bool,
) -> Float[Tensor, "n_rows n_latents"]:
    """Dense codes of the given latents where only the k largest of `x W^T + bias` fire, differentiable.

    If k latents exceed latent j, j is not among the k largest, and k of the first few hundred latents usually suffice
    to show it: only rows where they do not are encoded in full. Rows are processed in parts, so that memory does not
    grow with their number.

    Args:
        x: activations.
        W: encoder, one row per latent.
        bias: encoder bias.
        latents: the latents whose codes are returned, in this order.
        k: latents that fire in each row.
        signed: whether the largest are those of |u| (negative codes are kept); else only positive ones fire.

    >>> x, W = torch.tensor([[1.0, -3.0], [4.0, 2.0]]), torch.eye(2)
    >>> pick_topk(x, W, torch.zeros(2), torch.tensor([1]), k=1, signed=True)
    tensor([[-3.],
            [ 0.]])
    """
    parts = torch.split(x, max(1, PART // len(W)))
    return torch.cat([_pick_part(part, W, bias, latents, k, signed) for part in parts])


def _pick_part(x: Tensor, W: Tensor, bias: Tensor, latents: Tensor, k: int, signed: bool) -> Tensor:
    u = torch.addmm(bias[latents], x, W[latents].T)
    rows = _find_unbeaten(x, W, bias, u, k, signed).nonzero()[:, 0]
    z = torch.zeros_like(u)
    if not len(rows):
        return z
    whole = torch.addmm(bias, x[rows], W.T)
    kept = keep_places(whole, topk_latents(whole, x[rows], W, bias, k, signed), signed)
    return z.index_put((rows,), kept[:, latents])


@torch.no_grad()
def _find_unbeaten(x: Tensor, W: Tensor, bias: Tensor, u: Tensor, k: int, signed: bool) -> Tensor:
    """Rows where fewer than k of the first latents exceed the largest of the chosen ones."""
    n, asked = SAMPLE * k, (u.abs() if signed else u).amax(1, keepdim=True)
    if n >= len(W):
        return asked[:, 0] > 0
    first = torch.addmm(bias[:n], x, W[:n].T)
    slack = 2 * bound_rounding(x, W, bias)[:, None]  # by rounding, an equal one may seem larger
    return ((first.abs() if signed else first) > asked + slack).sum(1) < k

"""Pursuits: sparse codes found a few latents at a time, each time those that fit the residual best.

Matching pursuit (arXiv:2506.03093) keeps each code as it was found. Orthogonal matching pursuit fits the codes of all
latents chosen so far again after each choice, and iterative codebook feature learning (ICFL, arXiv:2412.16247) those of
the latents chosen together, both by least squares.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from saelab.functional.codes import SparseCodes
from saelab.functional.topk import search_topk

GATHERED = 2**25  # entries of dictionary rows held at a time
RIDGE = 1e-6  # added to the squared norms of unit rows, so that a system of parallel rows can be solved
ROUNDING = 1e-6  # products with the residual below this share of ||x|| are of rounding errors


def pursue(
    x: Float[Tensor, "n_rows d_in"],
    W: Float[Tensor, "d_sae d_in"],
    n_steps: int,
    signed: bool = False,
    residual_threshold: float = 0.0,
    stop_on_repeat: bool = True,
) -> SparseCodes:
    """Codes z of `x ~ z W` by matching pursuit: each step adds <r, w> to the code of the row w that fits the residual
    r best.

    Differentiable in x and W; the choice of rows is not. Products are not divided by ||w||^2, so rows of W should be
    of unit norm.

    Args:
        x: activations to encode.
        W: dictionary, one row per latent.
        n_steps: largest number of steps per row of x.
        signed: whether the best row has the largest |<r, w>|; else the largest positive <r, w>.
        residual_threshold: a row of x is done once the norm of its residual is below this; 0 for no such stop.
        stop_on_repeat: whether a row of x is done once a step adds nothing, or adds to a latent that it already has;
            that last addition is kept.

    >>> pursue(torch.tensor([[3.0, 1.0]]), torch.eye(2), n_steps=5).values
    tensor([3., 1.])
    """
    residual, going = x, x.new_ones(len(x), dtype=torch.bool)
    chosen = torch.empty(len(x), 0, dtype=torch.int64, device=x.device)
    added = x.new_empty(len(x), 0)
    for _ in range(n_steps):
        latents = _choose(residual.detach(), W.detach(), 1, signed)[0][:, 0]
        rows = W[latents]
        values = (residual * rows).sum(1)
        values = (values if signed else values.relu()) * going
        residual = residual - values[:, None] * rows
        known = ((chosen == latents[:, None]) & (added != 0)).any(1)
        chosen, added = torch.cat([chosen, latents[:, None]], 1), torch.cat([added, values[:, None]], 1)
        going = going & ~_is_done(residual.detach(), known | (values == 0), residual_threshold, stop_on_repeat)
        if not going.any():
            break
    return _gather(chosen, added, len(W))


def pursue_least_squares(
    x: Float[Tensor, "n_rows d_in"],
    W: Float[Tensor, "d_sae d_in"],
    n_latents: int,
    signed: bool = False,
    per_round: int = 1,
    refit: bool = True,
) -> SparseCodes:
    """Codes z of `x ~ z W` by rounds of least squares, differentiable in x and W; the choice of rows is not.

    Each round chooses the rows w of W with the largest cosine to the residual r, and solves `min_z ||x - z W||^2` for
    the rows chosen so far (`refit`: orthogonal matching pursuit, for several rows a round as in arXiv:1111.6664) or
    `min_z ||r - z W||^2` for those of the round alone (ICFL). Non-negative codes solve it under z >= 0: latents whose
    code would turn negative are left out again (Lawson and Hanson's method). Rows of W may be of any length.

    Args:
        x: activations to encode.
        W: dictionary, one row per latent.
        n_latents: latents chosen for each row of x, in all rounds together.
        signed: whether codes may be negative.
        per_round: latents chosen at a time.
        refit: whether every round fits the codes of all latents chosen so far.

    >>> pursue_least_squares(torch.tensor([[3.0, 1.0]]), torch.tensor([[2.0, 0.0], [1.0, 1.0]]), n_latents=2).indices
    tensor([0, 1])
    """
    norms = W.norm(dim=1)
    unit = W / norms.clamp(min=torch.finfo(W.dtype).tiny)[:, None]
    chosen, found = [], []
    for part in torch.split(x, max(1, GATHERED // (n_latents * x.shape[1]))):
        with torch.no_grad():
            latents, active, values = _choose_and_fit(part.detach(), unit.detach(), n_latents, signed, per_round, refit)
        if torch.is_grad_enabled() and (x.requires_grad or W.requires_grad):
            again = _fit_again(part, unit, latents, active, n_latents if refit else per_round)
            values = values + (again - again.detach())  # the same bits with a gradient as without
        chosen.append(latents)
        found.append(values)
    width = max((latents.shape[1] for latents in chosen), default=0)
    latents = torch.cat([_widen(part, width) for part in chosen]) if chosen else x.new_zeros(0, 0, dtype=torch.int64)
    values = torch.cat([_widen(part, width) for part in found]) if found else x.new_zeros(0, 0)
    return _gather(latents, values / norms[latents].clamp(min=torch.finfo(W.dtype).tiny), len(W))


def _widen(part: Tensor, width: int) -> Tensor:
    """The same columns and zeros up to a width."""
    return torch.cat([part, part.new_zeros(len(part), width - part.shape[1])], 1)


def _choose_and_fit(
    x: Tensor, W: Tensor, n_latents: int, signed: bool, per_round: int, refit: bool
) -> tuple[Int[Tensor, "n_rows n"], Bool[Tensor, "n_rows n"], Float[Tensor, "n_rows n"]]:
    """Latents chosen for each row of x, which of them have a code, and their codes, for rows of W of unit norm."""
    shape = (len(x), n_latents)
    latents = torch.zeros(shape, dtype=torch.int64, device=x.device)
    active, values = torch.zeros(shape, dtype=torch.bool, device=x.device), x.new_zeros(shape)
    rows, gram = x.new_zeros(*shape, x.shape[1]), x.new_zeros(*shape, n_latents)
    residual, floor = x, ROUNDING * x.norm(dim=1, keepdim=True)
    start = end = 0
    while end < n_latents:
        new = slice(end, min(end + per_round, n_latents))
        latents[:, new], products = _choose(residual, W, new.stop - new.start, signed)
        earlier = latents[:, start:end].masked_fill(~active[:, start:end], -1)
        known = (latents[:, new, None] == earlier[:, None]).any(2)
        active[:, new] = (products.abs() > floor) & ~known
        if not active[:, new].any():
            break
        start, end = 0 if refit else new.start, new.stop
        now = slice(start, end)
        rows[:, new] = W[latents[:, new]]
        block = rows[:, now] @ rows[:, new].mT
        gram[:, now, new], gram[:, new, now] = block, block.mT
        target = x if refit else residual
        values[:, now], active[:, now] = _fit(
            rows[:, now], gram[:, now, now], target, values[:, now], active[:, now], signed
        )
        residual = target - _combine(values[:, now], rows[:, now])
        start = 0 if refit else end
    return latents[:, :end], active[:, :end], values[:, :end]


def _choose(
    residual: Tensor, W: Tensor, n: int, signed: bool
) -> tuple[Int[Tensor, "n_rows n"], Float[Tensor, "n_rows n"]]:
    """The rows of W with the largest products with each residual, and the products; 0 where there is none."""
    found = search_topk(residual, W, W.new_zeros(len(W)), min(n, len(W)), signed)
    place = torch.arange(len(found.rows), device=W.device) - found.offsets[found.rows]
    latents = found.indices.new_zeros(len(residual), n)
    products = found.values.new_zeros(len(residual), n)
    latents[found.rows, place], products[found.rows, place] = found.indices, found.values
    return latents, products


def _fit(
    rows: Float[Tensor, "n_rows n d_in"],
    gram: Float[Tensor, "n_rows n n"],
    x: Float[Tensor, "n_rows d_in"],
    values: Float[Tensor, "n_rows n"],
    active: Bool[Tensor, "n_rows n"],
    signed: bool,
) -> tuple[Float[Tensor, "n_rows n"], Bool[Tensor, "n_rows n"]]:
    """Least-squares codes of the active latents, from codes near them; without `signed` the non-negative ones, and the
    latents that are still active.
    """
    # a fit of what the codes leave, not of x: errors of the fit before are corrected
    target = values + _solve(gram, active, _product(rows, x - _combine(values, rows)))
    below = active & (target <= 0)
    if signed or not below.any():
        return target, active
    some = below.any(1).nonzero()[:, 0]
    before, below = values[some], below[some]
    # as far towards the target as all codes stay non-negative; the first to reach 0 is left out
    gap = (before - target[some]).clamp(min=torch.finfo(x.dtype).tiny)
    share = torch.where(below, before / gap, torch.inf)
    nearest = share.amin(1, keepdim=True)
    kept = active[some] & ~(share <= nearest)
    moved = (before + nearest * (target[some] - before)) * kept
    active = active.clone()
    target[some], active[some] = _fit(rows[some], gram[some], x[some], moved, kept, signed)
    return target, active


def _fit_again(x: Tensor, W: Tensor, latents: Tensor, active: Tensor, width: int) -> Float[Tensor, "n_rows n"]:
    """The codes of latents that are known, `width` of them at a time, differentiable."""
    residual, found = x, []
    for chosen, real in zip(torch.split(latents, width, 1), torch.split(active, width, 1), strict=True):
        rows = W[chosen]
        found.append(_solve(rows @ rows.mT, real, _product(rows, residual)))
        residual = residual - _combine(found[-1], rows)
    return torch.cat(found, 1) if found else x.new_zeros(len(x), 0)


def _solve(
    gram: Float[Tensor, "n_rows n n"], active: Bool[Tensor, "n_rows n"], products: Float[Tensor, "n_rows n"]
) -> Float[Tensor, "n_rows n"]:
    """Codes c with `c G = products` for the active latents, 0 for the others."""
    both = active[:, :, None] & active[:, None, :]
    system = torch.where(both, gram, 0.0) + torch.diag_embed(torch.where(active, RIDGE, 1.0).to(gram))
    precise = torch.float32 if gram.device.type == "mps" else torch.float64
    factor = torch.linalg.cholesky(system.to(precise))
    return torch.cholesky_solve((products * active).to(precise)[:, :, None], factor)[:, :, 0].to(products)


def _combine(values: Float[Tensor, "n_rows n"], rows: Float[Tensor, "n_rows n d_in"]) -> Float[Tensor, "n_rows d_in"]:
    return (values[:, None] @ rows)[:, 0]


def _product(rows: Float[Tensor, "n_rows n d_in"], x: Float[Tensor, "n_rows d_in"]) -> Float[Tensor, "n_rows n"]:
    return (rows @ x[:, :, None])[:, :, 0]


def _is_done(
    residual: Tensor, repeated: Bool[Tensor, "n_rows"], residual_threshold: float, stop_on_repeat: bool
) -> Bool[Tensor, "n_rows"]:
    done = repeated if stop_on_repeat else torch.zeros_like(repeated)
    return done | (residual.norm(dim=1) < residual_threshold) if residual_threshold > 0 else done


def _gather(chosen: Int[Tensor, "n_rows n"], added: Float[Tensor, "n_rows n"], d_sae: int) -> SparseCodes:
    """Codes as sums of each latent's steps; latents without a step that added something are left out."""
    rows, steps = added.nonzero(as_tuple=True)
    places, which = torch.unique(rows * d_sae + chosen[rows, steps], return_inverse=True)
    values = added.new_zeros(len(places)).index_add(0, which, added[rows, steps])
    return SparseCodes.from_rows(places % d_sae, values, places // d_sae, (len(chosen), d_sae))

"""Pursuits: sparse codes found a few latents at a time, each time those that fit the residual best.

Matching pursuit (arXiv:2506.03093) keeps each code as it was found. Orthogonal matching pursuit fits the codes of all
latents chosen so far again after each choice, and iterative codebook feature learning (ICFL, arXiv:2412.16247) those of
the latents chosen together, both by least squares.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from saelab.functional.codes import SparseCodes
from saelab.functional.rescoring import bound_rounding
from saelab.functional.threshold_search import DENSE_WIDTH
from saelab.functional.topk import search_topk

GATHERED = 2**25  # entries of dictionary rows held at a time
SEARCHED = 256  # rows whose products with all of W are held at a time, few enough for the cache
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
    width = n_latents if refit else 0  # rounds fitted alone need no basis of the rounds before
    basis, recipes = x.new_empty(len(x), width, x.shape[1]), x.new_zeros(len(x), width, width)
    residual, floor = x.clone(), ROUNDING * x.norm(dim=1, keepdim=True)
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
        now, before = slice(start, end), values[:, start:end].clone()
        unfit = torch.ones_like(active[:, 0])
        if refit:
            for i in range(new.start, end):
                row, upto = W[latents[:, i]] * active[:, i, None], slice(i + 1)
                residual = _append(row, residual, values[:, upto], basis[:, upto], recipes[:, upto, upto])
            unfit = (active[:, now] & (values[:, now] <= 0)).any(1) & (not signed)
        some = unfit.nonzero()[:, 0]
        if len(some):
            rows, target = W[latents[some, now]], (x if refit else residual)[some]
            values[some, now], active[some, now], found = _fit(
                rows, rows @ rows.mT, target, before[some], active[some, now], signed
            )
            residual[some] = target - _combine(values[some, now], rows)
            if refit:
                basis[some, now], recipes[some, now, now] = found @ rows, found
        start = 0 if refit else end
    return latents[:, :end], active[:, :end], values[:, :end]


def _append(
    row: Float[Tensor, "n_rows d_in"],
    residual: Float[Tensor, "n_rows d_in"],
    values: Float[Tensor, "n_rows n"],
    basis: Float[Tensor, "n_rows n d_in"],
    recipes: Float[Tensor, "n_rows n n"],
) -> Float[Tensor, "n_rows d_in"]:
    """What is left of the residual once one more row is fitted too; the codes change in `values`.

    The last vector of `basis` is written: the part of `row` that is orthogonal to the others, by Gram and Schmidt; and
    the last of `recipes`, which make the basis of the rows: `basis = recipes rows`. RIDGE enters its length so that the
    recipes are the inverse of the Cholesky factor of `rows rows^T + RIDGE`. A row of zeros is not fitted.
    """
    old, made = basis[:, :-1], recipes[:, :-1, :-1]
    both = torch.stack([row, residual], 1)  # what the fit before left of the residual along the others goes too
    along = both @ old.mT
    left, change = torch.baddbmm(both, along, old, alpha=-1), along @ made
    recipe = torch.cat([-change[:, 0], row.any(1, keepdim=True).to(row)], 1)
    size = (left[:, 0].square().sum(1) + RIDGE * recipe.square().sum(1)).sqrt()
    size = size.clamp(min=torch.finfo(row.dtype).tiny)[:, None]
    basis[:, -1], recipes[:, -1] = left[:, 0] / size, recipe / size
    step = (basis[:, -1] * left[:, 1]).sum(1, keepdim=True)
    values[:, :-1] += change[:, 1]
    values += step * recipes[:, -1]
    return torch.addcmul(left[:, 1], step, basis[:, -1], value=-1)


def _choose(
    residual: Tensor, W: Tensor, n: int, signed: bool
) -> tuple[Int[Tensor, "n_rows n"], Float[Tensor, "n_rows n"]]:
    """The rows of W with the largest products with each residual, and the products; 0 where there is none."""
    if n == 1 and len(W) < DENSE_WIDTH:
        return _choose_one(residual, W, signed)
    return _search(residual, W, n, signed)


def _search(
    residual: Tensor, W: Tensor, n: int, signed: bool
) -> tuple[Int[Tensor, "n_rows n"], Float[Tensor, "n_rows n"]]:
    """`_choose` by the search for any number of rows."""
    found = search_topk(residual, W, W.new_zeros(len(W)), min(n, len(W)), signed)
    place = torch.arange(len(found.rows), device=W.device) - found.offsets[found.rows]
    latents = found.indices.new_zeros(len(residual), n)
    products = found.values.new_zeros(len(residual), n)
    latents[found.rows, place], products[found.rows, place] = found.indices, found.values
    return latents, products


def _choose_one(residual: Tensor, W: Tensor, signed: bool) -> tuple[Int[Tensor, "n_rows 1"], Float[Tensor, "n_rows 1"]]:
    """`_choose` of one row, by a plain product; where another is within rounding of the largest, by the search."""
    found, leads = [], []
    for part in torch.split(residual, SEARCHED):
        u = part @ W.T
        size = u.abs_() if signed else u
        largest, place = size.max(1)
        found.append(place)
        leads.append(largest - size.scatter_(1, place[:, None], -torch.inf).amax(1))
    latents, lead = torch.cat(found), torch.cat(leads)
    close = (lead <= 2 * bound_rounding(residual, W, W.new_zeros(len(W)))).nonzero()[:, 0]
    if len(close):
        latents[close] = _search(residual[close], W, 1, signed)[0][:, 0]
    products = (residual * W[latents]).sum(1)
    return latents[:, None], (products if signed else products.relu())[:, None]


def _fit(
    rows: Float[Tensor, "n_rows n d_in"],
    gram: Float[Tensor, "n_rows n n"],
    x: Float[Tensor, "n_rows d_in"],
    values: Float[Tensor, "n_rows n"],
    active: Bool[Tensor, "n_rows n"],
    signed: bool,
) -> tuple[Float[Tensor, "n_rows n"], Bool[Tensor, "n_rows n"], Float[Tensor, "n_rows n n"]]:
    """Least-squares codes of the active latents, from codes near them; without `signed` the non-negative ones. With the
    latents that are still active, and the recipes (`_append`) of a basis of their rows.
    """
    recipes = _invert(gram, active).to(x)
    # a fit of what the codes leave, not of x: errors of the fit before are corrected
    steps = _product(recipes, _product(rows, x - _combine(values, rows)))
    target = values + _combine(steps, recipes)
    below = active & (target <= 0)
    if signed or not below.any():
        return target, active, recipes
    some = below.any(1).nonzero()[:, 0]
    before, below = values[some], below[some]
    # as far towards the target as all codes stay non-negative; the first to reach 0 is left out
    gap = (before - target[some]).clamp(min=torch.finfo(x.dtype).tiny)
    share = torch.where(below, before / gap, torch.inf)
    nearest = share.amin(1, keepdim=True)
    kept = active[some] & ~(share <= nearest)
    moved = (before + nearest * (target[some] - before)) * kept
    active = active.clone()
    target[some], active[some], recipes[some] = _fit(rows[some], gram[some], x[some], moved, kept, signed)
    return target, active, recipes


def _fit_again(x: Tensor, W: Tensor, latents: Tensor, active: Tensor, width: int) -> Float[Tensor, "n_rows n"]:
    """The codes of latents that are known, `width` of them at a time, differentiable."""
    residual, found = x, []
    for chosen, real in zip(torch.split(latents, width, 1), torch.split(active, width, 1), strict=True):
        rows = W[chosen]
        recipes = _invert(rows @ rows.mT, real).to(x)
        found.append(_combine(_product(recipes, _product(rows, residual)), recipes))
        residual = residual - _combine(found[-1], rows)
    return torch.cat(found, 1) if found else x.new_zeros(len(x), 0)


def _invert(gram: Float[Tensor, "n_rows n n"], active: Bool[Tensor, "n_rows n"]) -> Float[Tensor, "n_rows n n"]:
    """Inverse of the Cholesky factor of `gram + RIDGE` for the active latents, 0 for the others."""
    both = active[:, :, None] & active[:, None, :]
    system = torch.where(both, gram, 0.0) + torch.diag_embed(torch.where(active, RIDGE, 1.0).to(gram))
    precise = torch.float32 if gram.device.type == "mps" else torch.float64
    factor = torch.linalg.cholesky(system.to(precise))
    one = torch.eye(gram.shape[1], dtype=precise, device=gram.device)
    inverse: Tensor = torch.linalg.solve_triangular(factor, one.expand_as(factor), upper=False)
    return inverse * both


def _combine(values: Float[Tensor, "n_rows n"], rows: Float[Tensor, "n_rows n d_in"]) -> Float[Tensor, "n_rows d_in"]:
    return (values[:, None] @ rows)[:, 0]


def _product(rows: Float[Tensor, "n_rows n d_in"], x: Float[Tensor, "n_rows d_in"]) -> Float[Tensor, "n_rows n"]:
    return (x[:, None] @ rows.mT)[:, 0]


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

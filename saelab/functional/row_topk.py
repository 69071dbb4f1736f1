"""Each row's k largest pre-activations, from a float32 product: compiled, or by PyTorch's operations.

Of equal values that of the lowest latent is kept, however it was found: values within rounding of each other are
recomputed one by one (`rescoring.score`).
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saelab.functional.compiled import use_numba
from saelab.functional.rescoring import bound_rounding, score
from saelab.functional.screening import largest_first
from saelab.functional.threshold_search import DENSE_WIDTH

BLOCK = 8  # entries of a dense row's block: the maxima of blocks are compared first
CLOSE = 3  # sizes looked at beside those asked for and the next one, which may be too close to decide
MOST_SORTED = 128  # latents kept in a row: more are not sorted one by one
MOST_EXACT = 2**19  # weights up to which float32 costs no more than a screen and recomputing its candidates


def row_topk(sizes: Float[Tensor, "n_rows n"], k: int) -> tuple[Float[Tensor, "n_rows k"], Int[Tensor, "n_rows k"]]:
    """Each row's k largest entries, largest first, and their places; which of equal entries are taken is not defined.

    As `torch.topk`, which on a CPU costs several nanoseconds an entry: the k largest lie in the k blocks with the
    largest maxima, which are found among a block's share of the entries.

    >>> row_topk(torch.tensor([[1.0, 3.0, 2.0]]), 2)
    (tensor([[3., 2.]]), tensor([[1, 2]]))
    """
    n_rows, n = sizes.shape
    if sizes.device.type != "cpu" or n % BLOCK or 3 * k * BLOCK > n:  # nothing, or too little, to leave out
        best = sizes.topk(k, dim=1)
        return best.values, best.indices
    blocks = sizes.view(n_rows, BLOCK, n // BLOCK)  # a block is every n/8th entry: its maximum is one of whole rows
    taken = blocks.amax(1).topk(k, dim=1, sorted=False).indices
    inside = blocks.gather(2, taken.unsqueeze(1).expand(-1, BLOCK, -1)).flatten(1)
    best = inside.topk(k, dim=1)
    return best.values, taken.gather(1, best.indices % k) + best.indices.div(k, rounding_mode="floor") * (n // BLOCK)


def find_close(
    size: Float[Tensor, "n d_sae"],
    largest: Float[Tensor, "n k1"],
    slack: Float[Tensor, "n"],
    k: int,
    firing: bool = True,
) -> tuple[Int[Tensor, "n_close"], Int[Tensor, "m"], Int[Tensor, "m"]]:
    """Rows whose k-th largest size is too close to the next to decide; and of each of the latents that may be among
    its k largest, the place of its row in these and its number.

    Args:
        size: the sizes.
        largest: the k + 1 largest of each row, from `row_topk`.
        slack: difference below which two sizes of a row count as close.
        k: number of latents kept.
        firing: whether sizes that are not above 0 are dropped, so that none of them needs to be decided.
    """
    last, next_one = largest[:, k - 1], largest[:, k]
    open_ = last - next_one <= slack
    if firing:
        open_ &= (last > -slack) & (last != 0)
    close = open_.nonzero()[:, 0]
    if not len(close):
        return close, close, close
    rows, latents = (size[close] >= (last - slack)[close, None]).nonzero(as_tuple=True)
    return close, rows, latents


@torch.no_grad()
def topk_latents(
    u: Float[Tensor, "n_rows d_sae"],
    x: Float[Tensor, "n_rows d_in"],
    W: Float[Tensor, "d_sae d_in"],
    bias: Float[Tensor, "d_sae"],
    k: int,
    signed: bool,
) -> Int[Tensor, "n_rows k"]:
    """Latents of each row's k largest `u = x W^T + bias`; of equal values the lowest latent.

    Args:
        u: (n_rows, d_sae) the product, already computed.
        x: activations, for recomputing what is too close to decide.
        W: encoder, one row per latent.
        bias: encoder bias.
        k: latents kept in each row.
        signed: whether the largest are those of |u|.

    >>> x, W = torch.ones(1, 2), torch.ones(4, 2)
    >>> topk_latents(x @ W.T, x, W, torch.zeros(4), k=2, signed=False)
    tensor([[0, 1]])
    """
    size = u.abs() if signed else u
    largest, found = row_topk(size, min(k + 1, size.shape[1]))
    latents = found[:, :k]
    if k == size.shape[1] or not len(u):
        return latents
    close, rows, possible = find_close(size, largest, 2 * bound_rounding(x, W, bias), k)
    if len(close):
        latents[close] = possible[_settle(close[rows], possible, x, W, bias, k, signed)]
    return latents


def _settle(
    rows: Int[Tensor, "m"], latents: Int[Tensor, "m"], x: Tensor, W: Tensor, bias: Tensor, k: int, signed: bool
) -> Int[Tensor, "n k"]:
    """Which of the entries, sorted by row and in a row by latent, are the k largest of each row that has any,
    recomputed one by one.
    """
    exact = score(x, W, bias, rows, latents)
    number, counts = torch.unique_consecutive(rows, return_inverse=True, return_counts=True)[1:]
    entries = torch.arange(len(rows), device=rows.device)
    place = entries - (counts.cumsum(0) - counts)[number]
    sizes = x.new_full((len(counts), int(counts.max())), -torch.inf)
    sizes[number, place] = exact.abs() if signed else exact
    best: Tensor = (counts.cumsum(0) - counts)[:, None] + largest_first(sizes, k)
    return best


def finds_exactly(W: Float[Tensor, "d_sae d_in"], k: int) -> bool:
    """Whether a compiled product in float32 finds each row's k largest; the weights alone decide.

    >>> finds_exactly(torch.ones(4, 2), 1)
    False
    """
    few = k <= MOST_SORTED and 4 * k <= len(W)
    return few and (W.numel() <= MOST_EXACT or len(W) < DENSE_WIDTH) and use_numba(W)


def exact_topk(
    x: Float[Tensor, "n_rows d_in"],
    W: Float[Tensor, "d_sae d_in"],
    bias: Float[Tensor, "d_sae"],
    k: int,
    signed: bool,
    firing: bool = True,
) -> tuple[Int[Tensor, "n_rows k"], Float[Tensor, "n_rows k"]]:
    """Latents and values of each row's k largest, by `ExactSearch`; what is too close to decide is recomputed.

    Args:
        x: activations.
        W: encoder, one row per latent.
        bias: encoder bias.
        k: latents of each row.
        signed: whether the largest are those of |u|.
        firing: whether what is not above 0 is dropped, so that of it any may be given.
    """
    from saelab.functional.exact_search import ExactSearch

    values, latents, found = ExactSearch(W, bias, signed).top(x, k + 1 + CLOSE)
    size, slack = values.abs() if signed else values, 2 * bound_rounding(x, W, bias)
    last = size[:, k - 1]
    # a slack that is not finite makes nothing sure: of such rows NaN would be the largest
    sure = last - size[:, k] > slack
    if firing:
        sure |= (last < -slack) | ((last == 0) & slack.isfinite())
    sure &= found == values.shape[1]
    indices, kept = latents[:, :k], values[:, :k]
    if bool(sure.all()):
        return indices, kept
    again = (~sure).nonzero()[:, 0]
    floor = (last - slack)[again]
    known = (size[again, -1] < floor) & (found[again] == values.shape[1])  # all that may be among the k largest
    near, far = again[known], again[~known]
    if len(near):
        possible = (size[near] >= floor[known, None]).nonzero(as_tuple=True)
        rows, names = near[possible[0]], latents[near][possible]
        order = (rows * len(W) + names).argsort()
        best = order[_settle(rows[order], names[order], x, W, bias, k, signed)]
        indices[near], kept[near] = names[best], values[near][possible][best]
    if len(far):
        indices[far], _ = dense_topk(x[far], W, bias, k, signed, firing)
        kept[far] = score(x, W, bias, far.repeat_interleave(k), indices[far].flatten()).view(-1, k)
    return indices, kept


def largest_latents(
    x: Float[Tensor, "n_rows d_in"],
    W: Float[Tensor, "d_sae d_in"],
    bias: Float[Tensor, "d_sae"],
    k: int,
    signed: bool,
) -> tuple[Int[Tensor, "n_rows k"], Float[Tensor, "n_rows k"]]:
    """Latents and values of each row's k largest `u = x W^T + bias`, also where these are negative, of equal ones the
    lowest latent; not differentiable.

    Args:
        x: activations.
        W: encoder, one row per latent.
        bias: encoder bias.
        k: latents of each row, at most d_sae.
        signed: whether the largest are those of |u|.

    >>> largest_latents(torch.tensor([[1.0, -3.0]]), -torch.eye(2), torch.zeros(2), k=2, signed=False)
    (tensor([[1, 0]]), tensor([[ 3., -1.]]))
    """
    return (exact_topk if finds_exactly(W, k) else dense_topk)(x, W, bias, k, signed, firing=False)


def dense_topk(
    x: Float[Tensor, "n_rows d_in"],
    W: Float[Tensor, "d_sae d_in"],
    bias: Float[Tensor, "d_sae"],
    k: int,
    signed: bool,
    firing: bool = True,
) -> tuple[Int[Tensor, "n_rows k"], Float[Tensor, "n_rows k"]]:
    """Latents and values of each row's k largest, from the dense product, 256 rows at a time.

    Args:
        x: activations.
        W: encoder, one row per latent.
        bias: encoder bias.
        k: latents of each row.
        signed: whether the largest are those of |u|.
        firing: whether what is not above 0 is dropped, so that of it any may be given.
    """
    indices = torch.empty(len(x), k, dtype=torch.int64, device=x.device)
    values, slack, close = x.new_empty(len(x), k), 2 * bound_rounding(x, W, bias), []
    for start in range(0, len(x), 256):
        part = slice(start, start + 256)
        u = torch.addmm(bias, x[part], W.T)
        size = u.abs() if signed else u
        largest, found = row_topk(size, min(k + 1, len(W)))
        indices[part] = found[:, :k]
        values[part] = u.gather(1, indices[part])
        if k < len(W):
            near, rows, latents = find_close(size, largest, slack[part], k, firing)
            close.append((start + near[rows], latents, u[near[rows], latents]))
    if any(len(rows) for rows, _, _ in close):
        rows, latents, u = (torch.cat(columns) for columns in zip(*close, strict=True))
        best = _settle(rows, latents, x, W, bias, k, signed)
        indices[rows[best[:, 0]]], values[rows[best[:, 0]]] = latents[best], u[best]
    return indices, values

"""Top-k with reproducible ties: of equal pre-activations that of the lowest latent is kept, however they were computed.

Exact ties are common (latents that are copies of each other, whole numbers, a penalty's zeros), `torch.topk` breaks
them arbitrarily, and a matrix product gives equal columns different last bits depending on their place. So values
within rounding of each other are recomputed one by one (`sampled_dot`); of equal ones the lowest latent is kept, and
across a batch the first row's.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from saelab.functional.kernels import sampled_dot
from saelab.functional.ranking import first_largest, largest_first

ROUNDINGS = 4.0  # how many times their expected size, eps * sqrt(d) * |x| |w|, errors of a product may be


def score(
    x: Float[Tensor, "n_rows d_in"],
    W: Float[Tensor, "d_sae d_in"],
    bias: Float[Tensor, "d_sae"],
    rows: Int[Tensor, "nnz"],
    latents: Int[Tensor, "nnz"],
) -> Float[Tensor, "nnz"]:
    """`u = x W^T + bias` at the given entries, bit for bit the same wherever an entry stands.

    Args:
        x: activations.
        W: encoder, one row per latent.
        bias: encoder bias.
        rows: row of x of each entry.
        latents: latent of each entry.
    """
    return sampled_dot(rows, latents, x, W) + bias[latents]


def bound_rounding(
    x: Float[Tensor, "n_rows d_in"], W: Float[Tensor, "d_sae d_in"], bias: Float[Tensor, "d_sae"]
) -> Float[Tensor, "n_rows"]:
    """Bound of the difference between a matrix product and `score` in each row; both round at every step of a sum."""
    largest = torch.linalg.vector_norm(W, dim=1).amax()
    size = torch.linalg.vector_norm(x, dim=1) * largest * x.shape[1] ** 0.5 + bias.abs().amax()
    bound: Tensor = ROUNDINGS * torch.finfo(x.dtype).eps * size
    return bound


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
    best = size.topk(min(k + 1, size.shape[1]), dim=1)
    latents = best.indices[:, :k]
    if k == size.shape[1] or not len(u):
        return latents
    slack = 2 * bound_rounding(x, W, bias)
    last, next_one = best.values[:, k - 1], best.values[:, k]
    close = ((last - next_one <= slack) & (last > -slack) & (last != 0)).nonzero()[:, 0]
    if len(close):
        latents[close] = _settle(size[close] >= (last - slack)[close, None], close, x, W, bias, k, signed)
    return latents


def _settle(
    possible: Bool[Tensor, "n d_sae"], rows: Tensor, x: Tensor, W: Tensor, bias: Tensor, k: int, signed: bool
) -> Int[Tensor, "n k"]:
    """The k largest of each row among the `possible`, recomputed one by one."""
    row, latents = possible.nonzero(as_tuple=True)
    exact = score(x, W, bias, rows[row], latents)
    counts = possible.sum(1)
    place = torch.arange(len(row), device=row.device) - (counts.cumsum(0) - counts)[row]
    sizes = x.new_full((len(possible), int(counts.max())), -torch.inf)
    sizes[row, place] = exact.abs() if signed else exact
    names = torch.zeros_like(sizes, dtype=torch.int64)
    names[row, place] = latents
    return names.gather(1, largest_first(sizes, k))


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

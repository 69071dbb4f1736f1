"""`row_topk`: the largest entries of each row of a matrix; and rows with entries that are equal, or almost."""

from jaxtyping import Float, Int
from torch import Tensor

BLOCK = 8  # entries a block


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
    size: Float[Tensor, "n d_sae"], largest: Float[Tensor, "n k1"], slack: Float[Tensor, "n"], k: int
) -> tuple[Int[Tensor, "n_close"], Int[Tensor, "m"], Int[Tensor, "m"]]:
    """Rows whose k-th largest size is too close to the next to decide; and of each of the latents that may be among
    its k largest, the place of its row in these and its number.

    Args:
        size: the sizes.
        largest: the k + 1 largest of each row, from `row_topk`.
        slack: difference below which two sizes of a row count as close.
        k: number of latents kept.
    """
    last, next_one = largest[:, k - 1], largest[:, k]
    close = ((last - next_one <= slack) & (last > -slack) & (last != 0)).nonzero()[:, 0]
    rows, latents = (size[close] >= (last - slack)[close, None]).nonzero(as_tuple=True)
    return close, rows, latents


def first_of_tied(size: Float[Tensor, "n m"], latents: Int[Tensor, "n m"], k: int) -> Int[Tensor, "n k"]:
    """Places of each row's k largest, largest first; of equal ones that of the lowest latent."""
    best = size.topk(min(k + 1, size.shape[1]), dim=1)
    places = best.indices[:, :k].contiguous()
    tied = (best.values[:, 1:] == best.values[:, :-1]).any(1).nonzero().squeeze(1)
    by_latent = latents[tied].argsort(1)
    order = size[tied].gather(1, by_latent).sort(dim=1, descending=True, stable=True).indices[:, :k]
    places[tied] = by_latent.gather(1, order)
    return places

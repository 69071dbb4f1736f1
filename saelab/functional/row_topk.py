"""`row_topk`: the largest entries of each row of a wide matrix, found by way of blocks of entries."""

from jaxtyping import Float, Int
from torch import Tensor

BLOCK = 8  # entries a block


def row_topk(sizes: Float[Tensor, "n_rows n"], k: int) -> tuple[Float[Tensor, "n_rows k"], Int[Tensor, "n_rows k"]]:
    """Each row's k largest entries, largest first, and their places; which of equal entries are taken is not defined.

    As `torch.topk`, which on a CPU costs several nanoseconds an entry: the k largest lie in the k blocks with the
    largest maxima, which are found among a block's share of the entries.

    >>> row_topk(torch.tensor([[1.0, 3.0, 2.0]]), 2)
    (tensor([[3., 2.]]), tensor([[1, 0]]))
    """
    n_rows, n = sizes.shape
    if sizes.device.type != "cpu" or n % BLOCK or 3 * k * BLOCK > n:  # nothing, or too little, to leave out
        best = sizes.topk(k, dim=1)
        return best.values, best.indices
    blocks = sizes.view(n_rows, BLOCK, n // BLOCK)  # a block is every n/8th entry: its maximum is one of whole rows
    taken = blocks.amax(1).topk(k, dim=1, sorted=False).indices
    inside = blocks.gather(2, taken.unsqueeze(1).expand(-1, BLOCK, -1)).view(n_rows, -1)
    best = inside.topk(k, dim=1)
    return best.values, taken.gather(1, best.indices % k) + best.indices.div(k, rounding_mode="floor") * (n // BLOCK)

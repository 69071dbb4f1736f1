"""The largest of each row, unsorted: selection among sizes that are approximate anyway."""

import torch
from jaxtyping import Float, Int
from torch import Tensor


def largest_places(sizes: Float[Tensor, "n_rows n"], k: int) -> tuple[Int[Tensor, "n_rows k"], Float[Tensor, "n_rows"]]:
    """Places of each row's k largest, in no order, and a bound that every other entry of the row keeps below.

    On CPU size and place share a 32-bit key, the size in its upper bits, and numpy's vectorised partition selects among
    the keys; a top-k of (size, place) pairs costs several times as much. Sizes that the upper bits do not tell apart
    count as equal; the bound allows for that.

    >>> places, bound = largest_places(torch.tensor([[3.0, -1.0, 2.0]]), 1)
    >>> places.tolist(), 3 <= float(bound) < 3.01
    ([[0]], True)
    """
    n = sizes.shape[1]
    low, high = sizes.aminmax()
    largest = torch.maximum(-low, high)
    place_bits = (n - 1).bit_length()
    if sizes.device.type != "cpu" or k == n or place_bits > 14 or not torch.isfinite(largest):
        best = sizes.topk(k, dim=1, sorted=False)
        return best.indices, best.values.amin(1)
    levels = (2 ** (30 - place_bits) - 1) / largest.clamp(min=1e-30)
    keys = torch.add(torch.arange(n, dtype=torch.int32), (sizes * levels).int(), alpha=2**place_bits)
    keys.numpy().partition(n - k, axis=1)  # in place
    kept = keys[:, n - k :]
    return (kept & (2**place_bits - 1)).long(), ((kept[:, 0] >> place_bits) + 1) / levels

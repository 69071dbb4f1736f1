"""Places of the largest entries of each row: sorted with ties broken by the lowest place, or unsorted and fast."""

import torch
from jaxtyping import Float, Int
from torch import Tensor


def largest_places(sizes: Float[Tensor, "n_rows n"], k: int) -> tuple[Int[Tensor, "n_rows k"], Float[Tensor, "n_rows"]]:
    """Places of each row's k largest entries, unsorted, and an upper bound of the row's other entries.

    On CPU size and place share a 32-bit key, the size in its upper bits, and numpy's vectorised partition selects among
    the keys; a top-k of (size, place) pairs costs several times as much. Sizes with the same upper bits count as equal;
    the bound allows for that.

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


def largest_first(sizes: Float[Tensor, "*batch n"], k: int) -> Int[Tensor, "*batch k"]:
    """Places of each row's k largest entries, largest first; of equal entries the lowest place.

    `torch.topk` alone breaks ties arbitrarily: by processor, length of the row, and k.

    >>> largest_first(torch.tensor([1.0, 2.0, 1.0, 2.0]), 3)
    tensor([1, 3, 0])
    """
    flat = sizes.reshape(-1, sizes.shape[-1])
    best = flat.topk(min(k + 1, flat.shape[1]), dim=1)
    places = best.indices[:, :k].contiguous()
    tied = (best.values[:, 1:] == best.values[:, :-1]).any(1).nonzero()[:, 0]
    for rows in torch.split(tied, 256):
        part, last = flat[rows], best.values[rows, k - 1 : k]
        above, equal = ~(part <= last), part == last  # so that NaN, the largest for `topk`, is above
        members = above | (equal & (equal.cumsum(1) <= k - above.sum(1, keepdim=True)))
        within = members.nonzero()[:, 1].view(-1, k)
        order = part.gather(1, within).sort(dim=1, descending=True, stable=True).indices
        places[rows] = within.gather(1, order)
    return places.view(*sizes.shape[:-1], k)


def first_largest(sizes: Float[Tensor, "n"], k: int) -> Int[Tensor, "k"]:
    """Places of the k largest entries, ascending; of equal entries the first.

    >>> first_largest(torch.tensor([1.0, 2.0, 1.0, 2.0]), 3)
    tensor([0, 1, 3])
    """
    if k >= len(sizes):
        return torch.arange(len(sizes), device=sizes.device)
    if k < 1:
        return torch.arange(0, device=sizes.device)
    floor = sizes.topk(k, sorted=False).values.amin()
    places = (~(sizes < floor)).nonzero()[:, 0]  # NaN is the largest for `topk`
    equal = (sizes[places] == floor).nonzero()[:, 0]
    keep = torch.ones_like(places, dtype=torch.bool)
    keep[equal[len(equal) - (len(places) - k) :]] = False
    return places[keep]

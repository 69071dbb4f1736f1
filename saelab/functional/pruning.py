"""`needed_codes`: which codes of a dictionary are left when those that the reconstruction hardly needs are dropped."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from saelab.functional.codes import SparseCodes

HELD_NUMBERS = 2**22  # numbers held at a time


def needed_codes(
    codes: SparseCodes, x: Float[Tensor, "n_rows d_in"], W: Float[Tensor, "d_sae d_in"], tau: float
) -> Bool[Tensor, "nnz"]:
    """Whether each code of `x ~ z W` is left when in every row the least needed code is dropped, again and again, while
    that raises the row's squared error by less than `tau` times what it was at first.

    Without code i the error ||r||^2 of a row is `2 z_i <r, w_i> + z_i^2 ||w_i||^2` larger. As codes are dropped one
    after another, the last of two equal latents stays. Other codes do not change. Costs one Gram matrix of its active
    latents for each row.

    Args:
        codes: the codes, of either sign.
        x: what they reconstruct, without biases.
        W: dictionary, one row per latent.
        tau: relative rise of the error, at least 0; with 0 only codes whose removal lowers the error are dropped.

    >>> codes = SparseCodes.from_dense(torch.tensor([[1.0, 0.2]]))
    >>> needed_codes(codes, torch.tensor([[1.0, 0.0, 0.5]]), torch.eye(2, 3), tau=0.2)
    tensor([ True, False])
    """
    n, longest = len(codes), int(codes.l0.amax()) if len(codes) else 0
    kept = torch.ones_like(codes.indices, dtype=torch.bool)
    size = max(1, HELD_NUMBERS // max(1, longest * (longest + W.shape[1])))
    for start in range(0, n, size):
        offsets = codes.offsets[start : start + size + 1]
        part = slice(int(offsets[0]), int(offsets[-1]))
        if part.start == part.stop:
            continue
        rows = codes.rows[part] - start
        places = torch.arange(part.start, part.stop, device=rows.device) - codes.offsets[codes.rows[part]]
        z = W.new_zeros(len(offsets) - 1, int(offsets.diff().amax()))
        latents = torch.zeros_like(z, dtype=torch.long)
        z[rows, places], latents[rows, places] = codes.values[part].to(z), codes.indices[part]
        kept[part] = _drop(z, W[latents], x[start : start + size].to(W), tau)[rows, places]
    return kept


def _drop(
    z: Float[Tensor, "n_rows k"], rows: Float[Tensor, "n_rows k d_in"], x: Float[Tensor, "n_rows d_in"], tau: float
) -> Bool[Tensor, "n_rows k"]:
    """Which codes are left; those of 0 are."""
    gram = rows @ rows.mT
    residual = x - (z.unsqueeze(1) @ rows).squeeze(1)
    products = (rows @ residual.unsqueeze(2)).squeeze(2)  # <r, w_i>
    limit = tau * residual.square().sum(1)
    energies = z.square() * gram.diagonal(dim1=1, dim2=2)
    kept, active = torch.ones_like(z, dtype=torch.bool), torch.arange(len(z), device=z.device)
    while len(active):  # the rows that may lose another code
        rise = (2 * z * products + energies).masked_fill(~(kept[active] & (z != 0)), torch.inf)
        least, place = rise.min(1)
        goes = least < limit
        active, place = active[goes], place[goes]
        kept[active, place] = False
        z, gram, products, energies, limit = (part[goes] for part in (z, gram, products, energies, limit))
        every = torch.arange(len(active), device=z.device)
        products = products + z[every, place].unsqueeze(1) * gram[every, place]
    return kept

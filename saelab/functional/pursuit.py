"""Matching pursuit: sparse codes over the rows of a dictionary, one latent at a time (arXiv:2506.03093)."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from saelab.functional.codes import SparseCodes

SCAN_NUMBERS = 2**22  # products held at a time


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
        latents = _choose(residual.detach(), W.detach(), signed)
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


def _choose(residual: Tensor, W: Tensor, signed: bool) -> Int[Tensor, "n_rows"]:
    """The row of W with the largest product with each residual, a part of the residuals at a time."""
    best = []
    for part in torch.split(residual, max(1, SCAN_NUMBERS // len(W))):
        u = part @ W.T
        best.append((u.abs_() if signed else u).argmax(1))
    return torch.cat(best)


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

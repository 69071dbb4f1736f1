"""`search_above`: codes of all pre-activations above a threshold, without holding the others."""

import torch
from jaxtyping import Float
from torch import Tensor

from saelab.functional.codes import SparseCodes
from saelab.functional.compiled import use_numba
from saelab.functional.rescoring import ERROR_MARGIN, score
from saelab.functional.screening import SCAN_ROWS, Precision, choose_precision

DENSE_WIDTH = 8192  # below this width a dense product and its top-k cost less than screening
MOST_SCREENED = 1 / 32  # of all entries: where more are above the threshold, a dense product costs less
ERRORS = 8.0  # times a row's typical error that a candidate's size may be off by, at first: with VNNI 5 are seen


def search_above(
    x: Float[Tensor, "n_rows d_in"],
    W: Float[Tensor, "d_sae d_in"],
    bias: Float[Tensor, "d_sae"],
    floor: Float[Tensor, "..."],
    signed: bool,
    max_frac: float = 1.0,
) -> SparseCodes | None:
    """Codes of all `u = x W^T + bias` above a threshold; None where they are more than the share `max_frac`.

    Args:
        x: activations.
        W: encoder, one row per latent.
        bias: encoder bias.
        floor: the threshold: one number, or one per latent.
        signed: whether |u| is compared with the threshold.
        max_frac: largest share of all n_rows * d_sae entries; with more the result is None.

    >>> search_above(torch.tensor([[1.0, -3.0]]), torch.eye(2), torch.zeros(2), torch.tensor(2.0), signed=True).values
    tensor([-3.])
    """
    if _is_screened(x, W, signed, floor):
        codes, decided = _search_screened(x, W, bias, floor, signed, max_frac)
        if decided:
            return codes
    found: list[tuple[Tensor, Tensor, Tensor]] = []
    n_left = int(max_frac * len(x) * len(W))
    for start in range(0, len(x), SCAN_ROWS):
        u = torch.addmm(bias, x[start : start + SCAN_ROWS], W.T)
        rows, indices = ((u.abs() if signed else u) > floor).nonzero(as_tuple=True)
        n_left -= len(rows)
        if n_left < 0:
            return None
        found.append((indices, u[rows, indices], rows + start))
    if not found:
        return _make_codes(x, W, *x.new_empty(3, 0))
    indices, values, rows = (torch.cat(parts) for parts in zip(*found, strict=True))
    return _make_codes(x, W, rows, indices, values)


def is_fused(W: Float[Tensor, "d_sae d_in"], precision: Precision) -> bool:
    """Whether a screen of this encoder in this precision is a `FusedScreen`."""
    if precision != "int8" or not use_numba(W):
        return False
    from saelab.functional.fused_screen import can_fuse

    return can_fuse()


def screening_precision(W: Float[Tensor, "d_sae d_in"]) -> Precision:
    """The fastest precision for screening this encoder: int8 where compiled kernels have it, whatever PyTorch's has."""
    return "int8" if is_fused(W, "int8") else choose_precision(W.shape[1], len(W), W.device)


def _is_screened(x: Tensor, W: Tensor, signed: bool, floor: Tensor) -> bool:
    """Whether a screen can find candidates here: magnitudes only above one threshold for all latents."""
    if len(W) < DENSE_WIDTH or not len(x) or (signed and floor.numel() > 1):
        return False
    return is_fused(W, "int8")


def _search_screened(
    x: Tensor, W: Tensor, bias: Tensor, floor: Tensor, signed: bool, max_frac: float
) -> tuple[SparseCodes | None, bool]:
    """The codes, and whether they are the answer: a screen's candidates, decided in float32.

    Sizes within a row's possible error of their threshold are candidates too. What is possible is the largest error
    seen on the candidates times `ERROR_MARGIN`; where that is more than was allowed for, the screen is repeated.
    """
    from saelab.functional.fused_screen import FusedScreen

    per_latent = floor.numel() > 1
    shifted = bias - floor if per_latent else bias
    limit = floor.new_zeros(()) if per_latent else floor.reshape(())
    screen = FusedScreen(W, shifted, signed, like=x)
    sample = x[:: max(1, len(x) // 128)]
    n_above = int(screen.count_above(sample, limit).sum())
    if n_above > min(max_frac, MOST_SCREENED) * len(sample) * len(W):
        return None, False
    errors = ERRORS
    while True:
        rows, latents, sizes, noise = screen.above(x, limit, errors)
        if not bool(noise.isfinite().all()):  # rows that int8 cannot hold
            return None, False
        u = score(x, W, bias, rows, latents)
        exact = u - floor[latents] if per_latent else u
        seen = ((exact.abs() if signed else exact) - sizes).abs() / noise[rows]
        largest = float(seen.nan_to_num().max()) if len(seen) else 0.0
        if largest * ERROR_MARGIN <= errors:
            break
        errors = 2 * largest * ERROR_MARGIN
    above = (u.abs() if signed else u) > (floor[latents] if per_latent else limit)
    if int(above.sum()) > max_frac * len(x) * len(W):
        return None, True
    return _make_codes(x, W, rows[above], latents[above], u[above]), True


def _make_codes(x: Tensor, W: Tensor, rows: Tensor, latents: Tensor, values: Tensor) -> SparseCodes:
    return SparseCodes.from_rows(latents.long(), values, rows.long(), (len(x), len(W)))

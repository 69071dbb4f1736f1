"""Codes of all pre-activations above a threshold, without holding the others, and of those just below a learned one."""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saelab.functional.codes import SparseCodes
from saelab.functional.compiled import use_numba
from saelab.functional.rescoring import ERROR_MARGIN, score
from saelab.functional.screening import SCAN_ROWS, Precision, choose_precision
from saelab.functional.silent_codes import SilentCodes

DENSE_WIDTH = 8192  # below this width a dense product and its top-k cost less than screening
MOST_SCREENED = 1 / 32  # of all entries: where more are above the threshold, a dense product costs less
ROUNDING = 1e-6  # of the largest bias and threshold, by which a size may be off beside the screen's error
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
    near = _screen(x, W, bias, floor, signed, max_frac) if _is_screened(x, W, signed, floor) else None
    if near is None:
        near = _scan(x, W, bias, floor, signed, max_frac)
        return None if near is None else _make_codes(x, W, near.rows, near.latents, near.u)
    above = (near.u.abs() if signed else near.u) > (floor[near.latents] if floor.numel() > 1 else floor)
    if int(above.sum()) > max_frac * len(x) * len(W):
        return None
    return _make_codes(x, W, near.rows[above], near.latents[above], near.u[above])


@torch.no_grad()
def search_near(
    x: Float[Tensor, "n_rows d_in"],
    W: Float[Tensor, "d_sae d_in"],
    bias: Float[Tensor, "d_sae"],
    threshold: Float[Tensor, "d_sae"],
    bandwidth: float,
    max_frac: float = 1.0,
) -> tuple[SparseCodes, SilentCodes] | None:
    """Codes of all `u = x W^T + bias` above their thresholds, and where u is at most half of the bandwidth below; None
    where both together are more than the share `max_frac`.

    Of the latter u itself is not needed, so that most of them are not recomputed.

    Args:
        x: activations.
        W: encoder, one row per latent.
        bias: encoder bias.
        threshold: threshold of each latent.
        bandwidth: width of the window around a threshold.
        max_frac: largest share of all n_rows * d_sae entries; with more the result is None.

    >>> codes, silent = search_near(torch.tensor([[2.0, 0.9]]), torch.eye(2), torch.zeros(2), torch.ones(2), 0.5)
    >>> codes.values, silent.starts
    (tensor([2.]), tensor([0, 0, 1]))
    """
    floor, near = threshold - bandwidth / 2, None
    if _is_screened(x, W, False, floor):
        near = _screen(x, W, bias, floor, False, max_frac, bandwidth / 2)
    if near is None and (near := _scan(x, W, bias, floor, False, max_frac)) is None:
        return None
    distance = near.u - threshold.index_select(0, near.latents)
    fires = (distance > 0).nonzero()[:, 0]
    silent = ((distance <= 0) & (distance.abs() < bandwidth / 2)).nonzero()[:, 0]
    if len(fires) + len(silent) + len(near.sure_rows) > max_frac * len(x) * len(W):
        return None
    rows, latents = (
        torch.cat([sure, recomputed.index_select(0, silent)])
        for sure, recomputed in ((near.sure_rows, near.rows), (near.sure_latents, near.latents))
    )
    codes = _make_codes(x, W, *(part.index_select(0, fires) for part in (near.rows, near.latents, near.u)))
    return codes, SilentCodes.from_entries(rows, latents, len(W))


def is_fused(W: Float[Tensor, "d_sae d_in"], precision: Precision = "int8") -> bool:
    """Whether a screen of this encoder in this precision is a `FusedScreen`."""
    if precision != "int8" or not use_numba(W):
        return False
    from saelab.functional.fused_screen import can_fuse

    return can_fuse()


def screening_precision(W: Float[Tensor, "d_sae d_in"]) -> Precision:
    """The fastest precision for screening this encoder: int8 where compiled kernels have it, whatever PyTorch's has."""
    return "int8" if is_fused(W) else choose_precision(W.shape[1], len(W), W.device)


def _is_screened(x: Tensor, W: Tensor, signed: bool, floor: Tensor) -> bool:
    """Whether a screen can find candidates here: magnitudes only above one threshold for all latents."""
    if len(W) < DENSE_WIDTH or not len(x) or (signed and floor.numel() > 1):
        return False
    return is_fused(W)


class _Near(NamedTuple):
    """Entries near a threshold or above it, and those that are surely just above it, of which u is not known."""

    rows: Int[Tensor, "n"]
    latents: Int[Tensor, "n"]
    u: Float[Tensor, "n"]
    sure_rows: Int[Tensor, "n_sure"]
    sure_latents: Int[Tensor, "n_sure"]


def _scan(x: Tensor, W: Tensor, bias: Tensor, floor: Tensor, signed: bool, max_frac: float) -> _Near | None:
    """All entries above `floor`, from the dense product; None where they are more than the share `max_frac`."""
    nothing = torch.empty(0, dtype=torch.int64, device=x.device)
    found: list[tuple[Tensor, Tensor, Tensor]] = [(nothing, nothing, x.new_empty(0))]
    n_left = int(max_frac * len(x) * len(W))
    for start in range(0, len(x), SCAN_ROWS):
        u = torch.addmm(bias, x[start : start + SCAN_ROWS], W.T)
        rows, latents = ((u.abs() if signed else u) > floor).nonzero(as_tuple=True)
        n_left -= len(rows)
        if n_left < 0:
            return None
        found.append((rows + start, latents, u[rows, latents]))
    rows, latents, values = (torch.cat(parts) for parts in zip(*found, strict=True))
    return _Near(rows, latents, values, nothing, nothing)


def _screen(
    x: Tensor, W: Tensor, bias: Tensor, floor: Tensor, signed: bool, max_frac: float, width: float = 0.0
) -> _Near | None:
    """A screen's candidates, which include all entries above `floor`, recomputed in float32; None where a dense product
    costs less or the screen cannot hold the rows.

    Sizes within a row's possible error of their threshold are candidates too. What is possible is the largest error
    seen on the candidates times `ERROR_MARGIN`; where that is more than was allowed for, the screen is repeated. With
    `width` those between `floor` and `floor + width`, by more than the error, are not recomputed.
    """
    from saelab.functional.fused_screen import FusedScreen

    bias, floor, per_latent = bias.detach(), floor.detach(), floor.numel() > 1
    shifted = bias - floor if per_latent else bias
    limit = floor.new_zeros(()) if per_latent else floor.reshape(())
    screen = FusedScreen(W, shifted, signed, like=x)
    sample = x[:: max(1, len(x) // 128)]
    counts = screen.count_above(sample, limit)
    if int(counts.sum()) > min(max_frac, MOST_SCREENED) * len(sample) * len(W):
        return None
    rounding = ROUNDING * (float(bias.abs().max() + floor.abs().max()) + width)
    errors, room = ERRORS, 2 * int(counts.max())
    while True:
        rows, latents, sizes, *sure, noise = screen.near(x, limit, errors, width, rounding, room)
        if not bool(noise.isfinite().all()):  # rows that int8 cannot hold
            return None
        u = score(x, W, bias, rows, latents)
        exact = u - floor[latents] if per_latent else u
        seen = ((exact.abs() if signed else exact) - sizes).abs() / noise[rows]
        largest = float(seen.nan_to_num().max()) if len(seen) else 0.0
        if largest * ERROR_MARGIN <= errors:
            return _Near(rows, latents, u, *sure)
        errors = 2 * largest * ERROR_MARGIN


def _make_codes(x: Tensor, W: Tensor, rows: Tensor, latents: Tensor, values: Tensor) -> SparseCodes:
    return SparseCodes.from_rows(latents.long(), values, rows.long(), (len(x), len(W)))

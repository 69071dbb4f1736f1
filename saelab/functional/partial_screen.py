"""A screen that multiplies the leading principal directions alone, where the activations' spectrum allows.

Of `u = x W^T + bias`, directions in which x hardly varies contribute little. If r of d_in directions hold nearly all of
it, an int8 product of length r finds the candidates, which float32 then decides; what was left out counts as an error
of the screen, and is guarded like that of int8 (`topk.py`): measured on the candidates, and rows that it leaves
undecided are searched again.

How small the rest must be follows from the gap between the k-th largest size and the largest that is not a candidate.
Sizes of a row are close to normally distributed but for a few: with 98,304 latents and k 32, the 32nd is 3.4 standard
deviations above the mean and the 64th 3.1. The largest of millions of errors is 5 to 6 times their standard deviation,
and more where the rest holds features of its own. So the rest may have a hundredth of the sizes' standard deviation;
`benchmarks/wide_search.py` prints what it has, by the number of directions, and what it would cost to allow for more.
"""

import functools
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from saelab.functional.fused_screen import FusedScreen

MOST_DIRECTIONS = 1 / 3  # of d_in: the weights are projected in every call, which costs more than their product saves
LARGEST_REST = 0.01  # standard deviation of what is left out, relative to that of a row's sizes
STEP = 16  # ranks tried are multiples of this
SAMPLE = 256  # rows of x from which directions are found, and as many on which they are tried


@dataclass(frozen=True)
class Leading:
    """Directions that hold nearly all of `x W^T`.

    Args:
        basis: orthonormal directions, one per column.
        of_x: what x is multiplied with.
        of_W: what W is multiplied with: `(x of_x) (W of_W)^T` is the product within these directions.
        rest: typical weight of a latent in one of the other directions.
    """

    basis: Float[Tensor, "d_in r"]
    of_x: Float[Tensor, "d_in r"]
    of_W: Float[Tensor, "d_in r"]
    rest: float


def find_leading(x: Float[Tensor, "n_rows d_in"], W: Float[Tensor, "d_sae d_in"]) -> Leading | None:
    """The fewest leading directions that leave out at most a hundredth of the sizes' deviation, from a sample of rows.

    None where there are no such directions, or too many to save anything.

    Args:
        x: activations.
        W: encoder, one row per latent.

    >>> x = torch.randn(1024, 8) @ torch.randn(8, 96)
    >>> leading = find_leading(x, torch.randn(64, 96))
    >>> None if leading is None else leading.basis.shape[1]
    16
    """
    stats = measure_rest(x, W)
    if stats is None:
        return None
    basis, rests, of_x, of_W, outside = stats
    enough = (rests <= LARGEST_REST).nonzero()[:, 0] + 1
    if not len(enough):
        return None
    rank = -(-int(enough[0]) // STEP) * STEP
    if rank > basis.shape[1]:
        return None
    basis = basis[:, :rank]
    ratio = (of_x[:rank] / of_W[:rank]).sqrt()
    balance = torch.where(ratio.isfinite() & (ratio > 0), ratio, torch.ones_like(ratio))
    # directions of very different size would leave the small ones no resolution in int8
    mixed = _mix(rank)
    return Leading(basis, (basis / balance) @ mixed, (basis * balance) @ mixed, float(outside[rank - 1]))


def measure_rest(
    x: Float[Tensor, "n_rows d_in"],
    W: Float[Tensor, "d_sae d_in"],
    largest: float = LARGEST_REST,
    most: float = MOST_DIRECTIONS,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor] | None:
    """What each number of leading directions leaves out of `x W^T`; None where that is too much, or the rows too few.

    Directions come from one sample of the rows, what they leave out from another.

    Args:
        x: activations.
        W: encoder, one row per latent.
        largest: where even `most` directions leave out more than this, the result is None.
        most: directions found, as a share of d_in.

    Returns:
        The directions, one per column; by their number, the standard deviation of what is left out relative to that of
        the sizes; root mean squares of x and of W in each direction; and by number of directions that of W in one of
        the others.
    """
    d_in, n = x.shape[1], max(SAMPLE, int(most * x.shape[1]))
    most_rank = min(int(most * d_in) // STEP * STEP, n)
    if len(x) < 2 * n or most_rank < STEP:
        return None
    sample = x[:: len(x) // (2 * n)][: 2 * n].double()
    found, tried = sample[::2], sample[1::2]
    weights = W[:: max(1, len(W) // (2 * SAMPLE))].double()
    varies = ((tried - tried.mean(0)) @ weights.T).square().mean().clamp(min=1e-300)
    gram, n_outside = found @ found.T, max(1, d_in - n)
    jitter = 1e-12 * float(gram.diagonal().mean()) + 1e-300
    factor, failed = torch.linalg.cholesky_ex(gram + jitter * torch.eye(n, dtype=gram.dtype, device=x.device))
    if bool(failed):
        return None
    rest_x, rest_W = (_outside(part, found, factor) for part in (tried, weights))
    if bool((rest_x * rest_W / n_outside / varies).sqrt() > largest):  # all of the sampled rows together leave more
        return None
    energy, vectors = torch.linalg.eigh(gram)
    energy, vectors = energy.flip(0)[:most_rank], vectors.flip(1)[:, :most_rank]
    basis = found.T @ (vectors * energy.clamp(min=jitter).rsqrt())
    of_x, of_W = (tried @ basis).square().mean(0), (weights @ basis).square().mean(0)
    rest_x = (tried.square().sum(1).mean() - of_x.cumsum(0)).clamp(min=0)
    width = torch.arange(d_in - 1, d_in - 1 - most_rank, -1, device=x.device).clamp(min=1)
    rest_W = (weights.square().sum(1).mean() - of_W.cumsum(0)).clamp(min=0) / width
    rests = (rest_x * rest_W / varies).sqrt()
    return basis.float(), rests, of_x.sqrt().float(), of_W.sqrt().float(), rest_W.sqrt()


def _outside(rows: Tensor, found: Tensor, factor: Tensor) -> Float[Tensor, ""]:
    """Mean square of what the rows have outside of the space of the rows `found`, from the factor of their products."""
    inside: Tensor = torch.linalg.solve_triangular(factor, found @ rows.T, upper=False)
    return (rows.square().sum(1) - inside.square().sum(0)).mean().clamp(min=0)


@functools.lru_cache(maxsize=8)
def _mix(rank: int) -> Float[Tensor, "r r"]:
    """A fixed random rotation."""
    drawn = torch.randn(rank, rank, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    rotation: Tensor = torch.linalg.qr(drawn).Q
    return rotation.float()


class LeadingScreen(FusedScreen):
    """A screen of the product within leading directions; the noise includes what they leave out.

    Args:
        W: encoder, one row per latent.
        bias: encoder bias.
        signed: whether the sizes are |u|.
        like: rows similar to those to be screened.
        leading: the directions.
    """

    def __init__(
        self,
        W: Float[Tensor, "d_sae d_in"],
        bias: Float[Tensor, "d_sae"],
        signed: bool,
        like: Float[Tensor, "n_rows d_in"],
        leading: Leading,
    ) -> None:
        super().__init__(W @ leading.of_W, bias, signed, like=like @ leading.of_x)
        self.leading = leading

    def _pack(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        low, start, scale, noise = super()._pack(x @ self.leading.of_x)
        inside = x @ self.leading.basis
        left_out = (x.square().sum(1) - inside.square().sum(1)).clamp(min=0).sqrt()
        return low, start, scale, torch.hypot(noise, left_out * self.leading.rest)

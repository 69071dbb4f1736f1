"""Metrics: one definition each, in streamed float64 sums, so that any amount of data fits in the memory of one batch.

With x the activations, x_hat their reconstructions, z the codes, sums over all tokens and mean(x) the mean of every dimension:

    fvu        sum ||x - x_hat||^2 / sum ||x - mean(x)||^2      [0, inf), lower is better; 0 perfect, 1 the mean predictor
    explained_variance   1 - fvu                                (-inf, 1], higher is better
    cosine     mean <x, x_hat> / (||x|| ||x_hat||)              [-1, 1], higher is better
    bias       sum ||x_hat||^2 / sum <x, x_hat>                 1 is none; < 1 shrinkage (arXiv:2404.16014, eq. 10)
    l0         mean #{i: z_i != 0}                              latents a token; signed codes count on both sides
    density_i  #{tokens: z_i != 0} / #tokens                    [0, 1]
    dead_frac  share of latents that never fired in the tokens seen; it means nothing without their number
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saelab.functional.codes import SparseCodes


class ReconstructionSums:
    """Running sums from which every reconstruction metric follows; `add` batches, read at the end.

    >>> sums = ReconstructionSums(2)
    >>> x = torch.tensor([[0.0, 1.0], [2.0, 1.0]])
    >>> sums.add(x, x.mean(0).expand(2, 2))
    >>> sums.fvu
    1.0
    """

    def __init__(self, d_in: int) -> None:
        self.n_tokens = 0
        self._shift: Tensor | None = None  # a first mean: keeps the variance exact beside a large offset
        self._sum = torch.zeros(d_in, dtype=torch.float64)
        self._squares = self._error = self._hat_squares = self._inner = self._cosine = 0.0

    def add(self, x: Float[Tensor, "n_tokens d_in"], x_hat: Float[Tensor, "n_tokens d_in"]) -> None:
        """Count a batch of activations and their reconstructions."""
        if len(x) == 0:
            return
        x, x_hat = x.detach().double(), x_hat.detach().double()
        if self._shift is None:
            self._shift = x.mean(0)
        centred = x - self._shift
        self._sum = self._sum.to(x.device) + centred.sum(0)
        self._squares += float(centred.square().sum())
        self._error += float((x - x_hat).square().sum())
        self._hat_squares += float(x_hat.square().sum())
        inner = (x * x_hat).sum(-1)
        self._inner += float(inner.sum())
        self._cosine += float((inner / (x.norm(dim=-1) * x_hat.norm(dim=-1)).clamp(min=1e-300)).sum())
        self.n_tokens += len(x)

    @property
    def variance(self) -> float:
        """`sum ||x - mean(x)||^2`, over all tokens."""
        return max(0.0, self._squares - float(self._sum.square().sum()) / max(1, self.n_tokens))

    @property
    def fvu(self) -> float:
        """Fraction of variance unexplained; NaN where the activations do not vary."""
        return _ratio(self._error, self.variance)

    @property
    def explained_variance(self) -> float:
        """`1 - fvu`."""
        return 1 - self.fvu

    @property
    def cosine(self) -> float:
        """Mean cosine between activation and reconstruction."""
        return _ratio(self._cosine, self.n_tokens)

    @property
    def bias(self) -> float:
        """Relative reconstruction bias; NaN where reconstructions have nothing in common with the activations."""
        return _ratio(self._hat_squares, self._inner)


class FiringSums:
    """Running counts of firings, by sign; `add` codes, read at the end.

    >>> sums = FiringSums(3)
    >>> sums.add(SparseCodes.from_dense(torch.tensor([[0.0, -2.0, 1.0], [0.0, 3.0, 0.0]])))
    >>> sums.l0, sums.density.tolist(), sums.dead_frac == 1 / 3
    (1.5, [0.0, 1.0, 0.5], True)
    """

    def __init__(self, d_sae: int) -> None:
        self.n_tokens = 0
        self.positive: Int[Tensor, "d_sae"] = torch.zeros(d_sae, dtype=torch.int64)
        self.negative: Int[Tensor, "d_sae"] = torch.zeros(d_sae, dtype=torch.int64)

    def add(self, codes: SparseCodes) -> None:
        """Count a batch of codes."""
        self.positive += torch.bincount(codes.indices[codes.values > 0].cpu(), minlength=codes.d_sae)
        self.negative += torch.bincount(codes.indices[codes.values < 0].cpu(), minlength=codes.d_sae)
        self.n_tokens += len(codes)

    @property
    def firings(self) -> Int[Tensor, "d_sae"]:
        """Tokens on which each latent fired, with either sign."""
        return self.positive + self.negative

    @property
    def l0(self) -> float:
        """Mean number of latents that fire on a token."""
        return _ratio(float(self.firings.sum()), self.n_tokens)

    @property
    def density(self) -> Float[Tensor, "d_sae"]:
        """Share of tokens on which each latent fires."""
        return self.firings.double() / max(1, self.n_tokens)

    @property
    def dead_frac(self) -> float:
        """Share of latents that fired on no token counted."""
        return float((self.firings == 0).double().mean())


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else math.nan

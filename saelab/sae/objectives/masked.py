"""`MaskedLoss`: the reconstruction error of coordinates that the encoder did not see."""

import functools
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from saelab.functional.codes import sparse_decode
from saelab.sae.encoders import PursuitEncoder
from saelab.sae.objectives.reconstruction import ReconstructionLoss
from saelab.sae.objectives.terms import TrainingStep, register_loss_term


@register_loss_term("masked")
@dataclass(frozen=True, kw_only=True)
class MaskedLoss(ReconstructionLoss):
    """Reconstruction error of hidden coordinates, from codes of the visible ones: a dictionary with more rows than
    there are features has no reward for fitting noise (arXiv:2302.12715).

    Every step draws which coordinates are visible; a pursuit finds z from those of x and W_dec alone, and the loss is

        ||(y - b_dec - z W_dec) H||^2 d_in / (n_hidden n_tokens variance)

    where the columns of H are the hidden coordinates and z is a constant. Coordinates are taken after a random rotation
    drawn once per run, as those of a language model are not exchangeable. Inference sees all of them.

    >>> MaskedLoss(visible_frac=0.75).draw_views(8, seed=0, number=0)[1].shape
    torch.Size([8, 2])
    """

    visible_frac: float = 0.9
    """share of the coordinates that codes are found from"""
    rotated: bool = True
    """whether coordinates are those of a random orthonormal basis; else the activations' own"""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.visible_frac < 1:
            raise ValueError(f"`visible_frac` must be in (0, 1), got {self.visible_frac}.")

    def __call__(self, step: TrainingStep) -> Float[Tensor, ""]:
        """`||(y - b_dec - z W_dec) H||^2 d_in / (n_hidden n_tokens variance)`."""
        entries = step.entries
        decoded = sparse_decode(step.values, step.W_dec, entries.indices, entries.rows, entries.offsets)
        hidden = self.draw_views(step.x.shape[1], step.seed, step.number)[1].to(step.x)
        error = ((step.y - step.sae.b_dec - decoded) @ hidden).square().mean()
        return error * step.x.shape[1] / step.state["variance"]

    def draw_views(
        self, d_in: int, seed: int, number: int
    ) -> tuple[Float[Tensor, "d_in n_visible"], Float[Tensor, "d_in n_hidden"]]:
        """Orthonormal directions that are visible in a step, and those that are hidden.

        Args:
            d_in: width of the activations.
            seed: seed of the run.
            number: number of completed steps.
        """
        basis = _draw_rotation(d_in, seed) if self.rotated else torch.eye(d_in)
        order = torch.randperm(d_in, generator=torch.Generator().manual_seed(seed * 1_000_003 + number))
        n = round(self.visible_frac * d_in)
        return basis[:, order[:n]], basis[:, order[n:]]

    def visible(self, d_in: int, seed: int, number: int) -> Float[Tensor, "d_in n_visible"]:
        """Directions that codes are found from in a step.

        Args:
            d_in: width of the activations.
            seed: seed of the run.
            number: number of completed steps.
        """
        return self.draw_views(d_in, seed, number)[0]

    def check(self, cfg: Any) -> None:
        """Raise ValueError for an encoder that cannot code a part of the coordinates, for prefixes, and where nothing
        would be hidden or visible.
        """
        super().check(cfg)
        if not (isinstance(cfg.encoder, PursuitEncoder) and cfg.encoder.scalable):
            raise ValueError(
                "`encoder` of a masked loss must find codes by least squares from any part of the coordinates: "
                f"OrthogonalMatchingPursuit or ICFL, got {cfg.encoder!r}; with a linear one masking finds fewer "
                "features."
            )
        if cfg.prefixes is not None:
            raise ValueError(f"`prefixes` must be None with a masked loss, got {cfg.prefixes}.")
        if not 1 <= round(self.visible_frac * cfg.d_in) < cfg.d_in:
            raise ValueError(
                f"`visible_frac` must leave a coordinate to see and one to hide of {cfg.d_in}, got {self.visible_frac}."
            )


@functools.lru_cache(maxsize=4)
def _draw_rotation(d: int, seed: int) -> Float[Tensor, "d d"]:
    """A random orthonormal basis, the same for one seed, so that no state has to be saved."""
    q, r = torch.linalg.qr(torch.randn(d, d, generator=torch.Generator().manual_seed(seed)))
    return q * r.diagonal().sign()

"""`OrthogonalLoss`: a penalty on decoder rows that point in similar directions."""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from saelab.sae.objectives.terms import LossTerm, TrainingStep, register_loss_term
from saelab.training.schedules import Scheduled


@register_loss_term("orthogonal")
@dataclass(frozen=True, kw_only=True)
class OrthogonalLoss(LossTerm):
    """Mean over latents of the largest squared cosine between a row of W_dec and another (OrtSAE, arXiv:2509.22033).

    `mean_i max_{j != i, j in chunk(i)} cos(d_i, d_j)^2`, 0 to 1. Rows are compared within chunks of the dictionary that
    are drawn anew in each step, at a cost of `d_sae * chunk * d_out`; it does not depend on the number of tokens.
    """

    coefficient: Scheduled = 0.25
    """weight of the loss"""
    chunk: int = 512
    """fewest latents per chunk; a dictionary of fewer than twice as many is one chunk"""
    every: int = 1
    """computed in every n-th step only, and 0 in the others, so that its average weight is `coefficient / every`"""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.chunk < 2:
            raise ValueError(f"`chunk` must be at least 2 latents to compare, got {self.chunk}.")
        if self.every < 1:
            raise ValueError(f"`every` must be at least 1 step, got {self.every}.")

    def __call__(self, step: TrainingStep) -> Float[Tensor, ""]:
        """Mean largest squared cosine within this step's chunks."""
        if step.number % self.every:
            return step.W_dec.new_zeros(())
        rows = torch.nn.functional.normalize(step.W_dec, dim=1)
        nearest = self._nearest(rows.detach(), step.generator)
        return (rows * rows.index_select(0, nearest)).sum(1).square().mean()

    def _nearest(self, rows: Tensor, generator: torch.Generator) -> Tensor:
        """For each row the one of its chunk with the largest squared cosine: only these two have a gradient."""
        order = torch.randperm(len(rows), generator=generator).to(rows.device)
        nearest = torch.empty_like(order)
        for part in order.tensor_split(max(1, len(rows) // self.chunk)):
            cosines = rows[part] @ rows[part].T
            nearest[part] = part[cosines.square().fill_diagonal_(-1).argmax(1)]
        return nearest

    def check(self, cfg: Any) -> None:
        """Raise ValueError for a dictionary that does not move, and for a single latent."""
        if cfg.dictionary == "frozen" or cfg.d_sae < 2:
            raise ValueError(
                f"`{self.name}` must have several rows that move, got dictionary='{cfg.dictionary}' and d_sae "
                f"{cfg.d_sae}."
            )

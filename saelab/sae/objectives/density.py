"""`FLOPsPenalty`: a penalty on latents that are active on many tokens."""

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from saelab.sae.objectives.terms import LossTerm, TrainingStep, register_loss_term
from saelab.training.schedules import Scheduled


@register_loss_term("flops")
@dataclass(frozen=True, kw_only=True)
class FLOPsPenalty(LossTerm):
    """The FLOPs regularizer of sparse retrieval (arXiv:2004.05665): each latent's mean magnitude over the batch,
    squared and summed over latents, `sum_j w_j (mean_b |z_j|)^2`.

    The gradient of a code grows with the mean of its latent, so that dense latents are made sparser and rare ones left
    alone, where L1 treats all alike. It goes with any activation function; where k is fixed, L0 stays.

    >>> cfg = sl.SAEConfig(d_in=8, d_sae=32, objective=(sl.ReconstructionLoss(), FLOPsPenalty(coefficient=0.1)))
    >>> sl.SAEConfig.from_dict(cfg.to_dict()) == cfg
    True
    """

    coefficient: Scheduled = 1e-2
    """weight of the penalty"""
    weights: tuple[float, ...] | None = None
    """weight w_j of each latent; None is 1 for all"""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.weights is not None:  # a list of a file, or an array
            object.__setattr__(self, "weights", tuple(map(float, self.weights)))
        if self.weights is not None and not all(0 <= w < math.inf for w in self.weights):
            raise ValueError(f"`weights` must be at least 0 and finite, got {self.weights}.")

    sharded: ClassVar[bool] = True

    def __call__(self, step: TrainingStep) -> Float[Tensor, ""]:
        """`sum_j w_j (mean_b |z_j|)^2`."""
        if step.dense is not None:
            sums = step.dense.abs().sum(0)
        else:
            sums = step.values.new_zeros(step.d_sae).index_add(0, step.entries.indices, step.values.abs())
        squares = step.ranks.mean_tokens(sums / step.n_tokens).square()
        if self.weights is None:
            return step.ranks.latents.sum(squares.sum())
        weights = torch.tensor(self.weights[step.latents.start : step.latents.stop]).to(squares)
        return step.ranks.latents.sum(squares @ weights)

    def check(self, cfg: Any) -> None:
        """Raise ValueError for a number of weights that is not that of the latents."""
        if self.weights is not None and len(self.weights) != cfg.d_sae:
            raise ValueError(f"`weights` must have one number for each latent ({cfg.d_sae}), got {len(self.weights)}.")

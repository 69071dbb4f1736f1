"""`SoftFrozen`: a dictionary whose rows stay near their random initial directions, a baseline of what training adds."""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class SoftFrozen:
    """Constraint on the rows of W_dec: unit norm, and a cosine of at least `cosine` with the initial row
    (arXiv:2602.14111).

    At 0.8 an SAE can learn little more than which random directions to use; a score that it reaches too says little of
    learned features. Like "frozen" and `train_encoder=False` it is a baseline.

    >>> sl.SAEConfig(d_in=8, d_sae=64, dictionary=SoftFrozen()).dictionary
    SoftFrozen(cosine=0.8)
    """

    cosine: float = 0.8
    """smallest cosine of a row with its initial direction; 1 is frozen, -1 free"""

    def __post_init__(self) -> None:
        if not -1 < self.cosine < 1:
            raise ValueError(f"`cosine` must be in (-1, 1), got {self.cosine}; use dictionary='frozen' for 1.")


def project_to_cones(rows: Float[Tensor, "n d"], axes: Float[Tensor, "n d"], cosine: float) -> Float[Tensor, "n d"]:
    """Unit rows, each the one nearest to the given row among those with a cosine of at least `cosine` with its axis.

    Args:
        rows: rows of any length but 0.
        axes: unit rows.
        cosine: smallest cosine, -1 to 1.

    >>> project_to_cones(torch.tensor([[0.0, 2.0]]), torch.tensor([[1.0, 0.0]]), 0.8)
    tensor([[0.8000, 0.6000]])
    """
    rows = rows / rows.norm(dim=1, keepdim=True).clamp(min=1e-12)
    along = (rows * axes).sum(1, keepdim=True)
    across = rows - along * axes
    across = across / across.norm(dim=1, keepdim=True).clamp(min=1e-12)
    return torch.where(along < cosine, cosine * axes + math.sqrt(1 - cosine**2) * across, rows)

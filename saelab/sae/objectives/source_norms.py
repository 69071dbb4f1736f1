"""`SourceNormsLoss`: a crosscoder's sparsity penalty weighted by the norms of its decoder rows, source by source."""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from saelab.sae.objectives.sparsity import SparsityLoss
from saelab.sae.objectives.terms import TrainingStep, register_loss_term


@register_loss_term("source_norms")
@dataclass(frozen=True, kw_only=True)
class SourceNormsLoss(SparsityLoss):
    """The activation's penalty times the sum of the norms of the latent's decoder rows at each source: with ReLU
    `sum z_j (||d_a,j|| + ||d_b,j||)`, the L1 crosscoder's loss (transformer-circuits.pub/2024/crosscoders).

    It drives rows of weak sources to 0, which then look absent (arXiv:2504.02922): a baseline. BatchTopK has no such
    pull.

    >>> two = tuple(sl.stores.JoinedSource(name=name, d_in=4) for name in "ab")
    >>> terms = (sl.ReconstructionLoss(), SourceNormsLoss())
    >>> sl.SAEConfig(d_in=8, d_sae=16, activation=sl.ReLU(target_l0=2.0), sources=two, objective=terms).terms == terms
    True
    """

    def penalty(self, step: TrainingStep) -> Float[Tensor, "..."]:
        """Penalty of each code."""
        found = super().penalty(step)
        parts = step.W_dec.split(list(step.sae.cfg.widths), dim=1)
        weights = torch.stack([part.norm(dim=1) for part in parts]).sum(0)
        return found * (weights if found.ndim == 2 else weights[step.entries.indices])

    def check(self, cfg: Any) -> None:
        """Raise ValueError for an SAE of one source, for an activation without a penalty, and a second such term."""
        super().check(cfg)
        if cfg.sources is None:
            raise ValueError(f"`{self.name}` must go with `sources`, of which it adds up the norms; use 'sparsity'.")

"""`GateReconstructionLoss`: the auxiliary loss of a gated SAE, reconstruction from the gates alone."""

from dataclasses import dataclass
from typing import Any, ClassVar

from jaxtyping import Float
from torch import Tensor

from saelab.functional.codes import nested_decode_error
from saelab.sae.objectives.terms import LossTerm, TrainingStep, register_loss_term


@register_loss_term("gate_reconstruction")
@dataclass(frozen=True, kw_only=True)
class GateReconstructionLoss(LossTerm):
    """Mean squared error of the reconstruction from the pre-activations of the open gates, through a decoder that gets
    no gradient (arXiv:2404.16014, eq. 8), in units of the target's variance.

    Without it nothing but the penalty trains which gates open. Every objective with the activation `Gated` has it;
    name it there to weigh it. With Matryoshka prefixes it is that of the whole dictionary.
    """

    sharded: ClassVar[bool] = True

    def __call__(self, step: TrainingStep) -> Float[Tensor, ""]:
        """`||y - b_dec - max(pi, 0) W_dec||^2 / (n_tokens * variance)`, with y, b_dec and W_dec as constants."""
        assert step.penalty is not None
        ranks = step.ranks
        W_dec, b_dec, y = step.W_dec.detach(), step.sae.b_dec.detach(), step.y.detach()
        if step.penalty.ndim == 2:
            error = (y - b_dec - ranks.latents.sum(step.penalty @ W_dec)).square().sum()
        else:
            add = ranks.latents.add_
            error = nested_decode_error(step.penalty, W_dec, y, b_dec, step.entries, add=add)[0].sum()
        return ranks.mean_tokens(error / (step.n_tokens * step.state["variance"]))

    def check(self, cfg: Any) -> None:
        """Raise ValueError for an activation function without gates."""
        if not cfg.activation.gated:
            raise ValueError(f"`{self.name}` must go with the activation Gated, got {cfg.activation}.")

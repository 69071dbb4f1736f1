"""`SparsityLoss`: the sparsity penalty of an activation function that has one."""

from dataclasses import dataclass
from typing import Any, ClassVar

from jaxtyping import Float
from torch import Tensor

from saelab.sae.objectives.terms import LossTerm, TrainingStep, register_loss_term


@register_loss_term("sparsity")
@dataclass(frozen=True, kw_only=True)
class SparsityLoss(LossTerm):
    """The penalty that the activation function defines, summed over latents, averaged over tokens: L1 of ReLU, L0 of
    JumpReLU.

    It is weighted by the activation's `coefficient`, or by the one that is controlled to reach its `target_l0`; this
    term's own `coefficient` multiplies that, so a `Schedule` from 0 to 1 is a warm-up. An objective that has no
    `SparsityLoss` or subclass of it gets this one where the activation has a penalty.
    """

    sharded: ClassVar[bool] = True
    reads_codes: ClassVar[bool] = False

    def __call__(self, step: TrainingStep) -> Float[Tensor, ""]:
        """`lambda * sum of penalties / n_tokens`."""
        penalty = self.penalty(step)
        value = step.state["coefficient"] * penalty.sum() / step.n_tokens
        return step.ranks.mean_tokens(step.ranks.latents.sum(value))

    def penalty(self, step: TrainingStep) -> Float[Tensor, "..."]:
        """Penalty of each code."""
        assert step.penalty is not None
        return step.penalty

    def check(self, cfg: Any) -> None:
        """Raise ValueError for an activation function without a penalty, and for a second sparsity term."""
        if not cfg.activation.penalized:
            raise ValueError(
                f"`{self.name}` must go with an activation that has a penalty, such as ReLU or JumpReLU, got "
                f"{cfg.activation}."
            )
        others = [term for term in cfg.objective if isinstance(term, SparsityLoss)]
        if len(others) > 1:
            raise ValueError(f"`objective` must have at most one sparsity term, got {len(others)}.")

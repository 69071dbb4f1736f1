"""`LpPenalty`: a sparsity penalty whose exponent falls during training (p-annealing)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from saelab.sae.activation_functions import JumpReLU
from saelab.sae.objectives.sparsity import SparsityLoss
from saelab.sae.objectives.terms import TrainingStep, register_loss_term


@register_loss_term("lp")
@dataclass(frozen=True, kw_only=True)
class LpPenalty(SparsityLoss):
    """The sum of the activation's penalties to the power p, which goes from `p` to `p_end` in `n_updates` equal updates
    (p-annealing, arXiv:2408.00113): `lambda * sum |z|^p / n_tokens` for ReLU, of its gate for `Gated`.

    p is constant up to the share `start` of the run, changes there for the first time, and has been `p_end` for as long
    as any value before when the run ends. lambda is the activation's coefficient, fixed or controlled, times a factor
    that each update multiplies by `sum |z|^p_old / sum |z|^p_new` of its batch: the penalty is equal before and after.
    A smaller p penalizes large codes less and small ones more, so that training ends near L0, without L1's shrinkage.

    >>> LpPenalty(n_updates=4).p_after(2)
    0.6
    """

    p: float = 1.0
    """exponent at the start of training"""
    p_end: float = 0.2
    """exponent at the end of training"""
    start: float = 0.3
    """share of the run after which p changes for the first time, 0 to 1"""
    n_updates: int = 10
    """number of changes of p"""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.p_end <= self.p:
            raise ValueError(f"0 < `p_end` <= `p` must hold, got {self.p_end} and {self.p}.")
        if not 0 <= self.start < 1:
            raise ValueError(f"`start` must be in [0, 1), got {self.start}.")
        if self.n_updates < 1:
            raise ValueError(
                f"`n_updates` must be at least 1, got {self.n_updates}; use SparsityLoss for a constant p."
            )

    def __call__(self, step: TrainingStep) -> Float[Tensor, ""]:
        """`lambda * sum |z|^p / n_tokens`, with the exponent of this step."""
        done, due = int(step.state[f"{self.name}.updates"]), self.updates_due(step.share)
        value = self._sum(step, done)
        if due > done:
            step.notes[f"{self.name}.updates"] = torch.tensor(due)
            step.notes[f"{self.name}.ratio"] = (value / self._sum(step, due)).detach()
        return step.state["coefficient"] * step.state[f"{self.name}.factor"] * value / step.n_tokens

    def _sum(self, step: TrainingStep, n_updates: int) -> Tensor:
        """Sum of the penalties after a number of updates; the zeros are left out, where the gradient is infinite."""
        penalty = self.penalty(step)
        return penalty[penalty > 0].pow(self.p_after(n_updates)).sum()

    def p_after(self, n_updates: int) -> float:
        """Exponent after a number of updates."""
        return self.p + n_updates / self.n_updates * (self.p_end - self.p)

    def updates_due(self, share: float) -> int:
        """Number of updates that should be done after a share of the run.

        Args:
            share: completed steps over all steps, 0 to 1.
        """
        if share < self.start:
            return 0
        return min(self.n_updates, 1 + int((share - self.start) / (1 - self.start) * self.n_updates))

    def initial_state(self, cfg: Any) -> dict[str, Tensor]:
        """Number of updates done, and the factor on lambda."""
        return {"updates": torch.zeros((), dtype=torch.int64), "factor": torch.ones(())}

    def observe(self, notes: Mapping[str, Tensor], state: dict[str, Tensor], share: float) -> None:
        """Change the exponent after a step in which that was due.

        Args:
            notes: of such a step, the number of updates due and the sum of its penalties over that with the new p.
            state: state of training, changed in place.
            share: completed steps over all steps, this one included.
        """
        if (ratio := notes.get(f"{self.name}.ratio")) is None:
            return
        state[f"{self.name}.updates"].copy_(notes[f"{self.name}.updates"])
        state[f"{self.name}.factor"] *= torch.where(ratio.isfinite() & (ratio > 0), ratio, 1.0)  # not if nothing fired

    def check(self, cfg: Any) -> None:
        """Raise ValueError for an activation function whose penalty is not a magnitude, and for a second sparsity
        term.
        """
        super().check(cfg)
        if isinstance(cfg.activation, JumpReLU):
            raise ValueError(
                f"`{self.name}` must go with an activation whose penalty is a magnitude, such as ReLU, got "
                f"{cfg.activation}: its penalty is L0, which p would not change."
            )

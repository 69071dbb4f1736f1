"""`KeptCoreLoss`: a penalty that keeps the first latents' directions where a run started."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from saelab.sae.objectives.terms import LossTerm, TrainingStep, register_loss_term
from saelab.training.schedules import Scheduled


@register_loss_term("kept_core")
@dataclass(frozen=True, kw_only=True)
class KeptCoreLoss(LossTerm):
    """Mean of `1 - cos(d_i, start_i)` over the first n rows of W_dec, where start_i is the row before the first step.

    It keeps the core that `start_from_core` puts there, features that recurred in earlier runs, while the other latents
    learn what it leaves (after arXiv:2512.24975, whose core is kept by copying encoders only). Encoders and biases are
    not held. A large coefficient freezes the rows.
    """

    n: int
    """number of latents kept, the first ones"""
    coefficient: Scheduled = 1.0
    """weight of the loss"""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.n < 1:
            raise ValueError(f"`n` must be at least 1 latent to keep, got {self.n}.")

    def __call__(self, step: TrainingStep) -> Float[Tensor, ""]:
        """Mean distance of the kept rows from their start; 0 in the first step."""
        rows = torch.nn.functional.normalize(step.W_dec[: self.n], dim=1)
        start = step.state[f"{self.name}.start"]
        if step.number == 0:
            start = step.notes[f"{self.name}.start"] = rows.detach()
        return 1 - (rows * start).sum(1).mean()

    def initial_state(self, cfg: Any) -> dict[str, Tensor]:
        """The rows of the start, known from the first step on."""
        return {"start": torch.zeros(self.n, cfg.d_target)}

    def observe(self, notes: Mapping[str, Tensor], state: dict[str, Tensor], share: float) -> None:
        """Keep the rows of the first step."""
        if (start := notes.get(f"{self.name}.start")) is not None:
            state[f"{self.name}.start"].copy_(start)

    def check(self, cfg: Any) -> None:
        """Raise ValueError for more latents than there are, and for a dictionary that is not learned row by row."""
        if self.n > cfg.d_sae or cfg.dictionary not in ("unit", "free"):
            raise ValueError(
                f"`{self.name}` must keep at most d_sae ({cfg.d_sae}) rows of a 'unit' or 'free' dictionary, got n="
                f"{self.n} and {cfg.dictionary!r}."
            )

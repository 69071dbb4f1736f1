"""`MatryoshkaLoss`: errors of nested prefixes, with choices about what they train and which latents they hold."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saelab.functional.codes import Entries, sparse_decode
from saelab.sae.activation_functions import GroupMax
from saelab.sae.objectives.density import FLOPsPenalty
from saelab.sae.objectives.kept_core import KeptCoreLoss
from saelab.sae.objectives.reconstruction import ReconstructionLoss
from saelab.sae.objectives.terms import TrainingStep, register_loss_term, stack_groups

RATE_DECAY = 0.99  # of the exponential average of firing rates, per step


@register_loss_term("matryoshka")
@dataclass(frozen=True, kw_only=True)
class MatryoshkaLoss(ReconstructionLoss):
    """Mean over prefixes of the reconstruction error, `mean_g T(||y - y_hat_g||^2) / variance`, where T is a mean over
    tokens: a `ReconstructionLoss` with three choices, of which none is taken by default.

    They are parts of the LISTA-Matryoshka recipe for SynthSAEBench (arXiv:2602.14687), whose others are a `Refined`
    encoder, a falling k (`sparsity_schedule`) and at inference `SAE.prune`. Its errors are a sum, not a mean.

    >>> loss = MatryoshkaLoss(detached=True, by_rate=True, tilt=2e-3)
    >>> sl.SAEConfig(d_in=8, d_sae=32, prefixes=(8, 32), objective=(loss, sl.AuxK())).reconstruction == loss
    True
    """

    detached: bool = False
    """whether the error of a prefix trains only the latents that the smaller ones lack; that of the whole dictionary
    trains all
    """
    by_rate: bool = False
    """whether prefixes hold the latents that fire most often, by an average over some 100 steps; the trained
    SAE's latents are in that order
    """
    tilt: float = 0.0
    """T is `s / tilt * log mean exp(tilt * error / s)` with the mean error s as a constant, which gives tokens of large
    error more weight (arXiv:2007.01162); 0 is the mean
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.tilt < torch.inf:
            raise ValueError(f"`tilt` must be at least 0 and finite, got {self.tilt}.")

    def __call__(self, step: TrainingStep) -> Float[Tensor, ""]:
        """`mean_g T(||y - y_hat_g||^2) / variance`."""
        ends = torch.tensor(step.sae.cfg.prefixes_at(step.seed, step.number), device=step.y.device)
        places = step.entries.indices
        if self.by_rate:
            places = _rank(step.state[f"{self.name}.rate"])[places]
            step.notes[f"{self.name}.rate"] = _firing_rate(step)
        group = torch.bucketize(places, ends, right=True)
        values, entries = stack_groups(step.values, step.entries, group, len(ends), step.n_tokens)
        parts = sparse_decode(values, step.W_dec, entries.indices, entries.rows, entries.offsets)
        residuals = self._residuals(step.y - step.sae.b_dec, parts.view(len(ends), *step.y.shape))
        return tilted_mean(residuals.square().sum(-1), self.tilt).mean() / step.state["variance"]

    def _residuals(self, target: Tensor, parts: Tensor) -> Tensor:
        """(n_groups, n_tokens, d_out) error of every prefix."""
        residuals: list[Tensor] = []
        for g, part in enumerate(parts):
            above = residuals[-1] if residuals else target
            if not self.detached:
                residuals.append(above - part)
            elif g == len(parts) - 1:
                residuals.append(target - parts.sum(0))
            else:
                residuals.append((above.detach() if residuals else above) - part)
        return torch.stack(residuals)

    def group(
        self, values: Float[Tensor, "nnz"], entries: Entries, n_tokens: int, cfg: Any
    ) -> tuple[Int[Tensor, "nnz"], int]:
        """One group: the errors of the prefixes are computed here."""
        return entries.indices, 1

    def initial_state(self, cfg: Any) -> dict[str, Tensor]:
        """Firing rates, where they order the latents."""
        return {"rate": torch.zeros(cfg.d_sae)} if self.by_rate else {}

    def observe(self, notes: Mapping[str, Tensor], state: dict[str, Tensor], share: float) -> None:
        """Move the firing rates toward those of the batch."""
        if (rate := notes.get(f"{self.name}.rate")) is not None:
            weight = 1.0 if int(state["n_steps"]) == 1 else 1 - RATE_DECAY
            state[f"{self.name}.rate"].lerp_(rate, weight)

    def final_order(self, state: Mapping[str, Tensor]) -> Int[Tensor, "d_sae"] | None:
        """Latents by falling firing rate, where that orders them."""
        return _order(state[f"{self.name}.rate"]) if self.by_rate else None

    def check(self, cfg: Any) -> None:
        """Raise ValueError for choices about prefixes without any, and for latents that cannot be put in another
        order.
        """
        super().check(cfg)
        if (self.detached or self.by_rate) and cfg.prefixes is None:
            raise ValueError(f"`prefixes` must be given for {self}, which treats them in another way, got None.")
        held = cfg.dictionary not in ("unit", "free", "frozen") or isinstance(cfg.activation, GroupMax)
        named = [term.name for term in cfg.objective if isinstance(term, KeptCoreLoss) or _names_latents(term)]
        if self.by_rate and (held or named):
            raise ValueError(
                "`by_rate` puts latents in another order, so none may have a place of its own, got "
                f"{named[0] if named else f'{cfg.dictionary!r} and {cfg.activation}'}."
            )


def tilted_mean(errors: Float[Tensor, "n_groups n_tokens"], tilt: float) -> Float[Tensor, "n_groups"]:
    """`s / tilt * log mean exp(tilt * errors / s)` over tokens, with their mean s as a constant: the mean for tilt 0,
    the largest for a large one (arXiv:2007.01162).

    Its gradient is that of a weighted mean, with weights `softmax(tilt * errors / s)`.

    >>> tilted_mean(torch.tensor([[1.0, 3.0]]), 0.0), tilted_mean(torch.tensor([[1.0, 3.0]]), 100.0).round(decimals=1)
    (tensor([2.]), tensor([3.]))
    """
    if not tilt:
        return errors.mean(1)
    scale = errors.detach().mean(1, keepdim=True).clamp(min=torch.finfo(errors.dtype).tiny)
    exponents = tilt * errors / scale
    largest = exponents.detach().amax(1, keepdim=True)  # taken out, so that nothing overflows or is rounded to 1
    return ((exponents - largest).expm1().mean(1).log1p() + largest[:, 0]) * scale[:, 0] / tilt


def _names_latents(term: object) -> bool:
    return isinstance(term, FLOPsPenalty) and term.weights is not None


def _firing_rate(step: TrainingStep) -> Float[Tensor, "d_sae"]:
    """Share of the batch's tokens that each latent fires on."""
    fires = (step.values.detach() != 0).to(step.y)
    return fires.new_zeros(step.d_sae).index_add(0, step.entries.indices, fires) / step.n_tokens


def _order(rate: Tensor) -> Tensor:
    return rate.argsort(descending=True, stable=True)


def _rank(rate: Tensor) -> Tensor:
    """Place of each latent by falling rate, 0-based."""
    order = _order(rate)
    return torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))

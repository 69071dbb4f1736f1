"""`ReconstructionLoss`: the squared error of the reconstruction, or of several with fewer latents."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from jaxtyping import Float, Int
from torch import Tensor

from saelab.functional.codes import Entries
from saelab.sae.objectives.terms import LossTerm, TrainingStep, register_loss_term


@register_loss_term("reconstruction")
@dataclass(frozen=True, kw_only=True)
class ReconstructionLoss(LossTerm):
    """Mean squared error per token in units of the target's variance; with Matryoshka prefixes the mean over prefixes.

    Exactly one term of an objective must be a `ReconstructionLoss` or a subclass of it. A subclass may compare other
    parts of the codes with the target: `group` assigns each code to a group, and `TrainingStep.errors` has the error of
    the first group, of the first two, and so on.
    """

    sharded: ClassVar[bool] = True
    reads_codes: ClassVar[bool] = False

    def __call__(self, step: TrainingStep) -> Float[Tensor, ""]:
        """`mean_g ||y - y_hat_g||^2 / (n_tokens * variance)`."""
        return step.ranks.mean_tokens(step.errors.mean() / (step.n_tokens * step.state["variance"]))

    def training_k(self, k: int) -> int:
        """Latents kept per token in training, for an activation that keeps k in inference."""
        return k

    def group(
        self, values: Float[Tensor, "nnz"], entries: Entries, n_tokens: int, cfg: Any
    ) -> tuple[Int[Tensor, "nnz"], int] | None:
        """Group of each code, 0-based, and the number of groups; None for the groups of the configuration's prefixes.

        Args:
            values: codes.
            entries: latent and token of each code.
            n_tokens: tokens in the batch.
            cfg: configuration of the SAE.
        """
        return None

    def final_order(self, state: Mapping[str, Tensor]) -> Int[Tensor, "d_sae"] | None:
        """Order that the latents are put in after the last step; None leaves it.

        Args:
            state: state of training, with the term's own under `name.key`.
        """
        return None

    def visible(self, d_in: int, seed: int, number: int) -> Float[Tensor, "d_in n_visible"] | None:
        """Directions that a pursuit finds codes from in a step; None for all of the activations.

        Args:
            d_in: width of the activations.
            seed: seed of the run.
            number: number of completed steps.
        """
        return None

    def check(self, cfg: Any) -> None:
        """Raise ValueError for a second reconstruction term."""
        others = [term for term in cfg.objective if isinstance(term, ReconstructionLoss)]
        if len(others) > 1:
            raise ValueError(f"`objective` must have exactly one reconstruction term, got {len(others)}.")

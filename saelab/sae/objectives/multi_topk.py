"""`MultiTopKLoss` and `HierarchicalLoss`: reconstruction errors of one set of codes at several k."""

import itertools
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saelab.functional.codes import Entries
from saelab.sae.activation_functions import BatchTopK, TopK
from saelab.sae.objectives.reconstruction import ReconstructionLoss
from saelab.sae.objectives.terms import TrainingStep, register_loss_term


@register_loss_term("hierarchical")
@dataclass(frozen=True, kw_only=True)
class HierarchicalLoss(ReconstructionLoss):
    """Mean reconstruction error over several k: one SAE for all of them, by `SAE.with_k` (HierarchicalTopK,
    arXiv:2505.24473).

    `mean_k ||y - y_hat_k||^2 / (n_tokens * variance)`, where y_hat_k decodes each token's k largest codes by
    magnitude, or for BatchTopK the batch's `k * n_tokens` largest. Training keeps the largest k: L0 and firings in the
    history, and the residual that AuxK reads, are those of the largest k. All errors cost one decode and one residual
    for each k.

    >>> HierarchicalLoss(ks=(8, 16, 32)).training_k(16)
    32
    """

    sharded: ClassVar[bool] = True

    ks: tuple[int, ...]
    """latents kept per token, increasing; the activation's own k, used in inference, is at most the last"""

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "ks", tuple(self.ks))
        if not self.ks or self.ks[0] < 1 or any(a >= b for a, b in itertools.pairwise(self.ks)):
            raise ValueError(f"`ks` must increase from at least 1, got {self.ks}.")

    def __call__(self, step: TrainingStep) -> Float[Tensor, ""]:
        """`mean_k ||y - y_hat_k||^2 / (n_tokens * variance)`."""
        return step.ranks.mean_tokens(step.errors.mean() / (step.n_tokens * step.state["variance"]))

    def training_k(self, k: int) -> int:
        """The largest of `ks`."""
        return self.ks[-1]

    def group(
        self, values: Float[Tensor, "nnz"], entries: Entries, n_tokens: int, cfg: Any
    ) -> tuple[Int[Tensor, "nnz"], int]:
        """For each code the first of `ks` that keeps it, by the rank of its magnitude, and the number of `ks`.

        Args:
            values: codes.
            entries: latent and token of each code.
            n_tokens: tokens in the batch.
            cfg: configuration of the SAE; batch activations rank in the batch, others in each token.
        """
        size, ends = values.detach().abs(), torch.tensor(self.ks, device=values.device)
        if isinstance(cfg.activation, BatchTopK):
            ranks, ends = rank_magnitudes(size[None])[0], ends * n_tokens
        else:
            places = torch.arange(len(size), device=size.device) - entries.offsets[entries.rows]
            grid = size.new_full((n_tokens, int(entries.offsets.diff().max())), -1.0)
            grid[entries.rows, places] = size
            ranks = rank_magnitudes(grid)[entries.rows, places]
        return torch.bucketize(ranks, ends, right=True), len(self.ks)

    def check(self, cfg: Any) -> None:
        """Raise ValueError for an activation that does not keep the k largest, for a k that is never trained, and for
        groups or schedules of another kind.
        """
        super().check(cfg)
        if not isinstance(cfg.activation, TopK | BatchTopK) or cfg.encoder != "linear":
            raise ValueError(
                f"`{self.name}` ranks the codes of TopK, AbsTopK, BatchTopK or BatchAbsTopK and a linear encoder, got "
                f"{cfg.activation} and {cfg.encoder!r}."
            )
        if not cfg.activation.k <= self.ks[-1] <= cfg.d_sae:
            raise ValueError(
                f"`ks` must end between the activation's k ({cfg.activation.k}) and d_sae ({cfg.d_sae}), got {self.ks}."
            )
        for name in ("prefixes", "sparsity_schedule"):
            if getattr(cfg, name) is not None:
                raise ValueError(f"`{name}` must be None with `{self.name}`, whose groups are ranks up to fixed k.")


@register_loss_term("multi_topk")
@dataclass(frozen=True, kw_only=True)
class MultiTopKLoss(HierarchicalLoss):
    """Weighted sum of reconstruction errors at several k (Multi-TopK, arXiv:2406.04093, A.4).

    `sum_k w_k ||y - y_hat_k||^2 / (n_tokens * variance)`; that of the paper, which keeps the error from growing where
    more latents are kept in inference than in training, is `ks=(k, 4 * k), weights=(1, 1 / 8)`. For all else see
    `HierarchicalLoss`.

    >>> MultiTopKLoss(ks=(16, 64), weights=(1, 1 / 8)).weights
    (1, 0.125)
    """

    sharded: ClassVar[bool] = True

    weights: tuple[float | int, ...]
    """weight of each error"""

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "weights", tuple(self.weights))
        if len(self.weights) != len(self.ks) or not all(0 < weight < torch.inf for weight in self.weights):
            raise ValueError(f"`weights` must be a positive number for each of {self.ks}, got {self.weights}.")

    def __call__(self, step: TrainingStep) -> Float[Tensor, ""]:
        """`sum_k w_k ||y - y_hat_k||^2 / (n_tokens * variance)`."""
        weighted = step.errors @ step.errors.new_tensor(self.weights)
        return step.ranks.mean_tokens(weighted / (step.n_tokens * step.state["variance"]))


def rank_magnitudes(size: Float[Tensor, "n_rows n"]) -> Int[Tensor, "n_rows n"]:
    """Rank of each entry in its row, the largest first, 0-based; of equal entries the first.

    >>> rank_magnitudes(torch.tensor([[1.0, 3.0, 2.0]]))
    tensor([[2, 0, 1]])
    """
    order = size.argsort(dim=1, descending=True, stable=True)
    return torch.empty_like(order).scatter_(1, order, torch.arange(size.shape[1], device=size.device).expand_as(order))

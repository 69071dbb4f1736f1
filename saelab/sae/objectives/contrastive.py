"""`ContrastiveLoss`: InfoNCE on codes, of neighboring tokens (temporal SAEs) or of each token alone (CSR)."""

from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from saelab.sae.objectives.terms import LossTerm, TrainingStep, register_loss_term
from saelab.training.schedules import Scheduled

Pairs = Literal["neighbors", "self"]


@register_loss_term("contrastive")
@dataclass(frozen=True, kw_only=True)
class ContrastiveLoss(LossTerm):
    """InfoNCE on codes: those of a pair are to be alike, those of different pairs are not.

    With unit-length codes a_i, b_i of the n/2 pairs of a batch and s_ij = <a_i, b_j> / temperature, the loss is the
    mean over i and both directions of `-log(exp(s_ii) / sum_j exp(s_ij))`, between 0 and about log(n/2).

    With `pairs="neighbors"` a pair is two adjacent tokens of a document, or two adjacent rows where rows are sentences;
    with `prefix=0.2`, and the same latents as a Matryoshka prefix, it is the temporal SAE's (arXiv:2511.05541): the
    first latents hold what stays the same along a text. With `pairs="self"`, as in CSR for single embeddings
    (arXiv:2503.01776), both codes of a pair are the same, so that s_ii is constant: this only repels the codes of
    different tokens, and nearest neighbors among codes get worse, not better.

    The (n/2, n/2) similarities and the (n, prefix) codes are dense.
    """

    coefficient: Scheduled = 0.1
    """weight of the loss"""
    temperature: float = 0.2
    """divides the cosines; the smaller, the more the nearest of the other pairs count"""
    pairs: Pairs = "neighbors"
    """"neighbors": a token and the next of its document, so that training must have documents; "self": a token and
    itself
    """
    prefix: float = 1.0
    """fraction of the latents, the first ones, whose codes are compared"""

    needs: ClassVar[frozenset[str]] = frozenset({"neighbors"})

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.temperature < torch.inf:
            raise ValueError(f"`temperature` must be above 0, got {self.temperature}.")
        if self.pairs not in get_args(Pairs):
            raise ValueError(f"`pairs` must be one of {list(get_args(Pairs))}, got '{self.pairs}'.")
        if not 0 < self.prefix <= 1:
            raise ValueError(f"`prefix` must be in (0, 1], got {self.prefix}.")
        if self.pairs == "self":  # any batches do
            object.__setattr__(self, "needs", frozenset())

    def __call__(self, step: TrainingStep) -> Float[Tensor, ""]:
        """Mean InfoNCE of the pairs in both directions; with `pairs="self"` of the first half of the batch."""
        codes = step.codes_of(self.n_latents(step.d_sae))
        length = codes.norm(dim=1, keepdim=True)
        codes = codes / torch.where(length > 0, length, 1)
        half = len(codes) // 2
        first, second = codes[:half], codes[half : 2 * half] if self.pairs == "neighbors" else codes[:half]
        similarity = first @ second.T / self.temperature
        both = (similarity.logsumexp(1) + similarity.logsumexp(0)) / 2
        return (both - similarity.diagonal()).sum() / max(half, 1)

    def n_latents(self, d_sae: int) -> int:
        """Number of latents that are compared, at least 1."""
        return max(1, round(self.prefix * d_sae))

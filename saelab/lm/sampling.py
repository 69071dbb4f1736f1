"""`Sampler`: draws the next token of each row of a batch, with a random generator per row."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Generator, Tensor


@dataclass(frozen=True, eq=False)
class Sampler:
    """Samples tokens from softmax(logits / temperature), or takes the most likely at temperature 0.

    Row i draws with `generators[i]` alone, the same number of times at every step, so that its sample does not depend
    on the rest of the batch, and two models sampled with the same seeds use the same noise.
    """

    temperature: float
    """divisor of the logits; 0 takes the most likely token"""
    top_k: int | None
    """sample only from the k most likely tokens; None is all"""
    top_p: float | None
    """sample only from the smallest set of most likely tokens whose probabilities sum to at least p; None is all"""
    generators: Sequence[Generator]
    """one generator per row; its state advances with each call"""

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"`temperature` must be finite and at least 0, got {self.temperature}.")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"`top_k` must be at least 1, got {self.top_k}; use None for all tokens.")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"`top_p` must be in (0, 1], got {self.top_p}.")

    def __call__(self, logits: Float[Tensor, "batch d_vocab"]) -> Int[Tensor, "batch"]:
        """(batch,) token ids, one per row."""
        if self.temperature == 0:
            return logits.argmax(1)
        kept = self._cut(logits / self.temperature)
        waits = torch.empty_like(kept)
        for row, generator in zip(waits, self.generators, strict=True):
            row.exponential_(generator=generator)
        # Exponential race: among exponential times with rates p, the minimum is at i with probability p_i.
        return (kept - waits.log()).argmax(1)

    def _cut(self, logits: Tensor) -> Tensor:
        """Logits with -inf for tokens that top-k and top-p exclude."""
        if self.top_k is not None and self.top_k < logits.shape[1]:
            logits = logits.masked_fill(logits < logits.topk(self.top_k, 1).values[:, -1:], -torch.inf)
        if self.top_p is not None and self.top_p < 1:
            ordered, order = logits.sort(dim=1, descending=True, stable=True)
            before = ordered.softmax(1).cumsum(1) - ordered.softmax(1)  # probability of all more likely tokens
            ordered = ordered.masked_fill(before >= self.top_p, -torch.inf)
            logits = logits.scatter(1, order, ordered)
        return logits

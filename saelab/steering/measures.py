"""Measures of the effect and cost of steering; p is the unsteered model's prediction, p' the steered model's:

    lift           mean_t log p'_t(C) - log p_t(C), p(C) the probability of a set of tokens, on the same prefixes, nats
    selectivity    the lift minus the mean lift of other sets
    mass           mean_t p'_t(C): how often the concept is expected; gain: its logarithm minus that of mean_t p_t(C)
    kl             mean_t KL(p_t || p'_t), nats
    entropy        mean_t of p'_t, nats
    nll            mean_t -log p_t of the tokens that the steered model generated, nats; perplexity is exp(nll)
    rate           share of generated tokens that are in C; share: of generated texts that contain one
    repetition     share of a text's 4-grams that occurred in it before (seq-rep-4, arXiv:1908.04319)
    distinct_n     different n-grams over all n-grams of a set of texts, n = 1 and 2 (arXiv:1510.03055)

Lift, gain, kl and entropy are computed on text that the unsteered model generated; prompt_lift, prompt_selectivity and
prompt_kl on the prompts themselves. The lift weighs all tokens alike, and so mostly those where the concept is very
unlikely: there any disturbance raises it by nats. The selectivity subtracts that; the gain weighs tokens by the
concept's probability.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

REPEATED = 4
"""length of the n-grams counted in `repetition`"""


def log_mass(log_probs: Float[Tensor, "*shape d_vocab"], ids: Int[Tensor, "n"]) -> Float[Tensor, "*shape"]:
    """The log-probability that the next token is one of `ids`, `log sum_{v in ids} p_v`, in nats.

    >>> round(float(log_mass(torch.zeros(8).log_softmax(0), torch.tensor([1, 5])).exp()), 6)
    0.25
    """
    return log_probs[..., ids.to(log_probs.device)].logsumexp(-1)


def entropy(log_probs: Float[Tensor, "*shape d_vocab"]) -> Float[Tensor, "*shape"]:
    """The entropy `-sum_v p_v log p_v` in nats: 0 for a certain token, log(d_vocab) for a uniform distribution.

    >>> round(float(entropy(torch.zeros(8).log_softmax(0))), 4)
    2.0794
    """
    return torch.special.entr(log_probs.exp()).sum(-1)


def repetition(ids: Sequence[int], n: int = REPEATED) -> float:
    """The share of a text's n-grams that occurred in it before, in [0, 1); 0 for a text shorter than n + 1.

    >>> repetition([1, 2, 3, 1, 2, 3], n=2)
    0.4
    """
    grams = _grams(ids, n)
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def distinct(texts: Sequence[Sequence[int]], n: int) -> float:
    """The number of different n-grams over that of all n-grams of several texts, in (0, 1]; NaN where there is none.

    It falls with the number of tokens: compare it among sets of one size.

    >>> distinct([[1, 2], [1, 2]], n=1)
    0.5
    """
    grams = [gram for text in texts for gram in _grams(text, n)]
    return len(set(grams)) / len(grams) if grams else float("nan")


def _grams(ids: Sequence[int], n: int) -> list[tuple[int, ...]]:
    return [tuple(ids[i : i + n]) for i in range(len(ids) - n + 1)]

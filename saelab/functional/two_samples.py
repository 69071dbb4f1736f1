"""Two samples of documents compared in one sparse column: p values by permutation, effect sizes and their intervals.

Most documents have the value 0 in a column of codes, so all of it is computed from the other documents alone.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int

Z = 1.959963984540054
"""standard errors on each side of an interval of 95 %"""
HALF_STEP = 0.5  # ranks are spaced by 1: the correction for continuity
CORRECTION = 0.5  # added to each count of an odds ratio, which is then finite (Haldane and Anscombe)


@dataclass(frozen=True)
class Effect:
    """An estimate with its interval of 95 %."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:+.3f} ({self.low:+.3f} to {self.high:+.3f})"


def permutation_p(
    values: Float[np.ndarray, "n_fires"], rows: Int[np.ndarray, "n_fires"], in_b: Bool[np.ndarray, "n_labelings n"]
) -> Float[np.ndarray, "n_labelings"]:
    """Natural logarithms of two-sided p values of Mann and Whitney's rank sum, when documents change sides at random.

    The null distribution is that of all divisions of the n documents into samples of the same sizes. The number of
    documents with a value above 0 that a sample gets is hypergeometric, which is exact; given that number, the sum of
    their ranks has its exact mean and variance over all divisions and is taken as normal, with a correction for
    continuity. Where all values above 0 are equal this is Fisher's exact test. The p value is twice the smaller tail.

    Args:
        values: the values that are not 0; they must be above 0.
        rows: the documents that have them.
        in_b: for each way to divide the documents, whether each of them is in the second sample.

    >>> labeling = np.array([[False] * 6 + [True] * 6])
    >>> float(np.exp(permutation_p(np.ones(6), np.arange(6), labeling))[0].round(5))
    0.00216
    """
    from scipy.special import gammaln, log_ndtr, logsumexp
    from scipy.stats import rankdata

    n, n_fires = in_b.shape[1], len(values)
    if n_fires == 0:
        return np.zeros(len(in_b))
    n_b = int(in_b[0].sum())
    ranks = rankdata(values)
    sums = in_b[:, rows] @ ranks  # of the ranks among documents with a value
    k = np.arange(max(0, n_fires - (n - n_b)), min(n_fires, n_b) + 1)  # those that may come into the second sample

    def log_choose(total: int, some: np.ndarray) -> np.ndarray:
        return np.asarray(gammaln(total + 1) - gammaln(some + 1) - gammaln(total - some + 1))

    log_share = log_choose(n_fires, k) + log_choose(n - n_fires, n_b - k) - log_choose(n, np.array(n_b))
    mean = k * (n_fires + 1) / 2
    spread = np.sqrt(k * (n_fires - k) / max(n_fires - 1, 1) * ranks.var())
    # A document with a value beats (n - n_fires - 1) / 2 more on average than one without, whatever its own rank.
    found = in_b[:, rows].sum(1) * (n - n_fires - 1) / 2 + sums
    needed = found[:, None] - k * (n - n_fires - 1) / 2 - mean
    with np.errstate(divide="ignore", invalid="ignore"):
        above = log_ndtr(-(needed - HALF_STEP) / spread)
        below = log_ndtr((needed + HALF_STEP) / spread)
    fixed = spread == 0
    above[:, fixed] = np.where(needed[:, fixed] <= 1e-9, 0.0, -np.inf)
    below[:, fixed] = np.where(needed[:, fixed] >= -1e-9, 0.0, -np.inf)
    tails = [logsumexp(log_share + tail, axis=1) for tail in (above, below)]
    return np.asarray(np.minimum(np.log(2) + np.minimum(*tails), 0.0))


def rate_difference(fires_a: int, n_a: int, fires_b: int, n_b: int) -> Effect:
    """The second rate less the first, with Newcombe's interval from Wilson's intervals of both (his method 10).

    Args:
        fires_a: documents of the first sample that have the feature.
        n_a: documents of the first sample.
        fires_b: documents of the second sample that have it.
        n_b: documents of the second sample.

    >>> print(rate_difference(48, 80, 56, 70))
    +0.200 (+0.052 to +0.334)
    """
    a, b = fires_a / n_a, fires_b / n_b
    (low_a, high_a), (low_b, high_b) = _wilson(a, n_a), _wilson(b, n_b)
    return Effect(
        b - a,
        b - a - float(np.hypot(b - low_b, high_a - a)),
        b - a + float(np.hypot(high_b - b, a - low_a)),
    )


def log_odds_ratio(fires_a: int, n_a: int, fires_b: int, n_b: int) -> Effect:
    """The log odds of the second sample less those of the first, in nats, each count with 1/2 added; Wald's interval.

    Args:
        fires_a: documents of the first sample that have the feature.
        n_a: documents of the first sample.
        fires_b: documents of the second sample that have it.
        n_b: documents of the second sample.
    """
    counts = np.array([fires_a, n_a - fires_a, fires_b, n_b - fires_b]) + CORRECTION
    value = float(np.log(counts[2] * counts[1] / (counts[3] * counts[0])))
    reach = Z * float(np.sqrt((1 / counts).sum()))
    return Effect(value, value - reach, value + reach)


def cliffs_delta(a: Float[np.ndarray, "n_fires_a"], n_a: int, b: Float[np.ndarray, "n_fires_b"], n_b: int) -> Effect:
    """Cliff's delta, P(b > a) - P(a > b) for a document of each sample, -1 to 1; 0 where neither tends to be larger.

    The interval is Wilson's for the probability (delta + 1) / 2, with as many documents as DeLong's standard error is
    worth (Mee, 1990), at most about all of them; where the samples do not overlap, with those of the smaller one.

    Args:
        a: values of the first sample that are not 0; they must be above 0.
        n_a: documents of the first sample.
        b: values of the second sample that are not 0.
        n_b: documents of the second sample.

    >>> cliffs_delta(np.array([1.0]), 4, np.array([2.0, 3.0]), 2).value
    1.0
    """
    (wins_b, ties), (wins_a, _) = _compare(b, a, n_a), _compare(a, b, n_b)
    zeros = 0.5 * (n_a - len(a)) / n_a, 0.5 * (n_b - len(b)) / n_b  # wins of a document with 0
    theta = float((wins_b.sum() + (n_b - len(b)) * zeros[0]) / n_b)
    ties = (ties + (n_a - len(a)) * (n_b - len(b))) / (n_a * n_b)
    variance = _variance(wins_b, zeros[0], n_b) / n_b + _variance(wins_a, zeros[1], n_a) / n_a
    variance = max(variance, (theta * (1 - theta) - ties / 4) / (n_a + n_b))  # it is too small where few overlap
    worth = theta * (1 - theta) / variance if variance > 1e-15 else float(min(n_a, n_b))
    low, high = _wilson(theta, max(worth, 1.0))
    return Effect(2 * theta - 1, 2 * low - 1, 2 * high - 1)


def _compare(own: np.ndarray, other: np.ndarray, n_other: int) -> tuple[np.ndarray, float]:
    """Share of another sample's documents that are smaller than each of some values above 0, equal ones counted half;
    and the number of equal pairs.
    """
    ordered = np.sort(other)
    less, up_to = np.searchsorted(ordered, own, "left"), np.searchsorted(ordered, own, "right")
    return np.asarray((n_other - len(other) + 0.5 * (less + up_to)) / n_other), float((up_to - less).sum())


def _variance(values: np.ndarray, rest: float, n: int) -> float:
    """Variance of n numbers, of which those that are not listed are all the same."""
    if n < 2:
        return 0.0
    n_rest = n - len(values)
    mean = (values.sum() + n_rest * rest) / n
    return float((((values - mean) ** 2).sum() + n_rest * (rest - mean) ** 2) / (n - 1))


def _wilson(rate: float, n: float | int) -> tuple[float, float]:
    """Wilson's interval of 95 % of a rate among n."""
    middle = (rate + Z**2 / (2 * n)) / (1 + Z**2 / n)
    reach = Z / (1 + Z**2 / n) * np.sqrt(rate * (1 - rate) / n + Z**2 / (4 * n**2))
    return float(max(0.0, middle - reach)), float(min(1.0, middle + reach))

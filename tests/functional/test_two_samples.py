"""p values beside all divisions of a few documents and many random ones; intervals beside the truth they hold."""

from itertools import combinations

import numpy as np
import pytest
from scipy.stats import hypergeom, mannwhitneyu, rankdata

from saelab.functional.two_samples import cliffs_delta, log_odds_ratio, permutation_p, rate_difference


def p_of(values: np.ndarray, in_b: np.ndarray) -> float:
    rows = np.flatnonzero(values)
    return float(np.exp(permutation_p(values[rows], rows, in_b[None])[0]))


def enumerated_p(values: np.ndarray, in_b: np.ndarray) -> float:
    """Twice the smaller tail over every division into samples of these sizes."""
    ranks = rankdata(values)
    own = ranks[in_b].sum()
    sums = np.array([ranks[list(chosen)].sum() for chosen in combinations(range(len(values)), int(in_b.sum()))])
    return min(1.0, 2 * min((sums >= own - 1e-9).mean(), (sums <= own + 1e-9).mean()))


def test_equal_values_give_the_exact_test_of_fisher() -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        n, n_b = 40, int(rng.integers(5, 35))
        values = (rng.random(n) < rng.random()).astype(float) * 2.5
        in_b = rng.permutation(np.arange(n) < n_b)
        k = int((values[in_b] > 0).sum())
        null = hypergeom(n, int((values > 0).sum()), n_b)
        assert p_of(values, in_b) == pytest.approx(min(1.0, 2 * min(null.sf(k - 1), null.cdf(k))), rel=1e-9)


def test_few_documents_agree_with_all_their_divisions() -> None:
    rng = np.random.default_rng(1)
    ratios = []
    for _ in range(60):
        values = rng.gamma(2, size=14).round(1) * (rng.random(14) < 0.6)
        in_b = rng.permutation(np.arange(14) < 6)
        ratios.append(p_of(values, in_b) / enumerated_p(values, in_b))
    # sums of few ranks are not normal: within a tenth mostly, always within a third
    assert abs(np.median(ratios) - 1) < 0.05 and min(ratios) > 0.67 and max(ratios) < 1.5


def test_p_values_are_uniform_under_the_null_and_small_beside_it() -> None:
    rng = np.random.default_rng(2)
    values = rng.gamma(2, size=300) * (rng.random(300) < 0.2)
    rows = np.flatnonzero(values)
    labelings = np.stack([rng.permutation(np.arange(300) < 120) for _ in range(4000)])
    p = np.exp(permutation_p(values[rows], rows, labelings))
    for level in (0.3, 0.1, 0.01):  # within 4 standard errors, and the steps of a discrete distribution
        assert abs((p <= level).mean() - level) < 4 * (level * (1 - level) / 4000) ** 0.5 + 0.03 * level
    shifted = values.copy()
    shifted[labelings[0]] += rng.random(120) < 0.6
    assert p_of(shifted, labelings[0]) < 1e-4


def test_tiny_p_values_are_those_of_the_distribution_and_never_underflow() -> None:
    n = 4000
    in_b = np.arange(n) >= n // 2
    values = np.where(in_b, 1.0, 0.0)
    rows = np.flatnonzero(values)
    null = hypergeom(n, n // 2, n // 2)
    assert permutation_p(values[rows], rows, in_b[None])[0] == pytest.approx(np.log(2) + null.logpmf(n // 2), rel=1e-9)
    assert permutation_p(np.zeros(0), np.zeros(0, np.int64), in_b[None]).tolist() == [0.0]


def test_both_directions_count_alike() -> None:
    rng = np.random.default_rng(3)
    values = rng.gamma(2, size=200) * (rng.random(200) < 0.4)
    in_b = rng.random(200) < 0.3
    assert p_of(values, in_b) == pytest.approx(p_of(values, ~in_b), rel=1e-9)
    # with every document above 0 it is Mann and Whitney's test
    dense = values + 1
    asymptotic = mannwhitneyu(dense[in_b], dense[~in_b], method="asymptotic").pvalue
    assert p_of(dense, in_b) == pytest.approx(asymptotic, rel=0.02)


def test_delta_is_that_of_all_pairs() -> None:
    rng = np.random.default_rng(4)
    for _ in range(20):
        a, b = (rng.integers(0, 4, size).astype(float) for size in (17, 23))
        pairs = np.sign(b[None] - a[:, None]).mean()
        found = cliffs_delta(a[a > 0], 17, b[b > 0], 23)
        assert found.value == pytest.approx(pairs) and found.low <= found.value <= found.high
    assert cliffs_delta(np.array([1.0, 2.0]), 2, np.array([3.0, 4.0]), 2).value == 1
    assert cliffs_delta(np.zeros(0), 9, np.zeros(0), 9).value == 0


@pytest.mark.parametrize(
    ("p_a", "p_b", "shift"), [(0.1, 0.3, 0.0), (0.9, 0.95, 1.0), (1.0, 1.0, 3.0), (0.05, 0.95, 2.0)]
)
def test_intervals_hold_the_truth_in_95_of_100_samples(p_a: float, p_b: float, shift: float) -> None:
    rng = np.random.default_rng(5)

    def draw(n: int, rate: float, more: float) -> np.ndarray:
        return (rng.gamma(2, size=n) + more) * (rng.random(n) < rate)

    truth = np.sign(draw(300_000, p_b, shift) - draw(300_000, p_a, 0)).mean()
    held = np.zeros(3)
    n_draws = 400
    for _ in range(n_draws):
        a, b = draw(40, p_a, 0), draw(60, p_b, shift)
        sizes = int((a > 0).sum()), 40, int((b > 0).sum()), 60
        odds = np.log(p_b / max(1 - p_b, 1e-9)) - np.log(p_a / max(1 - p_a, 1e-9))
        effects = cliffs_delta(a[a > 0], 40, b[b > 0], 60), rate_difference(*sizes), log_odds_ratio(*sizes)
        held += [one.low <= true <= one.high for one, true in zip(effects, (truth, p_b - p_a, odds), strict=True)]
    assert (held / n_draws > 0.95 - 0.015 - 4 * (0.95 * 0.05 / n_draws) ** 0.5).all()

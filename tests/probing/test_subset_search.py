"""Subsets of features: every pair as scikit-learn fits it, what swaps add, and a pair that no single one gives away."""

from itertools import combinations

import numpy as np
import pytest
from scipy.sparse import csr_matrix
from unchecked import unchecked

from saelab.probing.sparse_probing import probe_features
from saelab.probing.subset_search import Correlations, best_subset, grow_subsets


def problem(seed=0, n=300, m=7, rate=0.2):
    """Correlated columns, one of them constant and one twice, and a label."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, m)) @ rng.normal(size=(m, m))
    y = x @ rng.normal(size=m) + 3 * rng.normal(size=n)
    return np.column_stack([x, np.ones(n), x[:, 0]]), y > np.quantile(y, 1 - rate)


def fitted_r2(x, y, columns):
    """What scikit-learn explains of the label with these columns, both classes weighed alike."""
    from sklearn.linear_model import LinearRegression

    weights = np.where(y, 0.5 / y.sum(), 0.5 / (~y).sum())
    return LinearRegression().fit(x[:, columns], y, weights).score(x[:, columns], y, weights)


@pytest.mark.parametrize("sparse", [False, True])
def test_the_best_are_those_of_all_fits(sparse):
    x, y = problem()
    found = Correlations.of(csr_matrix(x) if sparse else x, y)
    for k in (1, 2):
        fits = {columns: fitted_r2(x, y, list(columns)) for columns in combinations(range(x.shape[1]), k)}
        best = best_subset(found, k)
        assert found.r2(best) == pytest.approx(max(fits.values())) == pytest.approx(fits[tuple(sorted(best))])
    for columns in ([0, 2, 5], [0, 8], [7, 3]):  # a column twice, and a constant one
        assert found.r2(np.array(columns)) == pytest.approx(fitted_r2(x, y, columns))
        gained = found.gains(np.array(columns))[4]
        assert gained == pytest.approx(fitted_r2(x, y, [*columns, 4]) - fitted_r2(x, y, columns))


def test_swaps_never_lose_and_sometimes_win():
    wins = 0
    for seed in range(12):
        found = Correlations.of(*problem(seed, n=80))
        swapped, plain = (list(grow_subsets(found, 4, swaps=swaps)) for swaps in (True, False))
        for one, other in zip(swapped, plain, strict=True):
            assert len(set(one.tolist())) == len(one) == len(other)
            wins += found.r2(one) > found.r2(other) + 1e-6
        pairs = found.r2(swapped[1]), found.r2(best_subset(found, 2))
        assert pairs[0] <= pairs[1] + 1e-9 and found.r2(swapped[3]) >= found.r2(swapped[2]) - 1e-9
    assert wins > 0


def test_two_features_that_tell_it_together_are_found_by_searches_alone():
    """Feature 0 has the label under much noise, feature 1 the noise; five others tell more each, and all the same."""
    rng = np.random.default_rng(0)
    n = 3_000
    y, noise = rng.random(n) < 0.5, 4 * rng.random(n)
    same = rng.random(n) < 0.35 + 0.3 * y
    z = np.column_stack([1 + 0.6 * y + noise, 0.1 + noise, *(same ^ (rng.random((5, n)) < 0.02))])
    found = probe_features(z, y, np.arange(n) // 10, ks=(1, 2), rankings=("f", "svm", "exact", "swap"))
    chosen = {(p.ranking, p.k): p for p in found.probes}
    for ranking in ("exact", "swap"):
        assert {one.feature for one in chosen[ranking, 2].features} == {0, 1}
        assert chosen[ranking, 2].held_out.balanced > 0.99 and abs(chosen[ranking, 2].shuffled.balanced - 0.5) < 0.1
    assert not {one.feature for one in chosen["f", 2].features} & {0, 1}
    assert chosen["f", 2].held_out.balanced < 0.8 and chosen["exact", 1].features[0].feature > 1
    assert {one.feature for one in chosen["svm", 2].features} == {0, 1}  # its weights are of all features together


@unchecked()
def test_subsets_of_other_sizes_are_not_enumerated():
    x, y = problem()
    with pytest.raises(ValueError, match="`k` must be 1 or 2"):
        best_subset(Correlations.of(x, y), 3)
    codes, doc_ids = np.abs(x), np.arange(len(y)) // 10
    with pytest.raises(ValueError, match="`ks` must have 1 or 2 for 'exact'"):
        probe_features(codes, y, doc_ids, ks=(4,), rankings=("exact",))
    both = probe_features(codes, y, doc_ids, ks=(1, 4), rankings=("exact", "swap"))
    assert [(p.ranking, p.k) for p in both.probes] == [("exact", 1), ("swap", 1), ("swap", 4)]

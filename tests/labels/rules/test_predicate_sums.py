"""Counts of predicates over lists of tokens equal dense products, however many predicates are common."""

import numpy as np
import pytest
from scipy.sparse import csr_matrix

from saelab.labels.rules import predicate_sums
from saelab.labels.rules.contingency import Counts
from saelab.labels.rules.predicate_sums import N_COMMON, PredicateSums
from saelab.labels.rules.rule_search import LONGEST, PAIR_COST, PART_COST, _lists

N_TOKENS = 300


@pytest.mark.parametrize("n_predicates", [1, 5, N_COMMON, N_COMMON + 1, 150])
@pytest.mark.parametrize("exact", [predicate_sums.EXACT, N_TOKENS - 1], ids=["float32", "float64"])
def test_counts_over_lists_and_pairs_equal_dense_products(n_predicates, exact, monkeypatch):
    monkeypatch.setattr(predicate_sums, "EXACT", exact)
    rng = np.random.default_rng(n_predicates)
    marks = rng.random((N_TOKENS, n_predicates)) < rng.random(n_predicates) ** 4  # few are common
    marks[:, 0] = True
    sums = PredicateSums(csr_matrix(marks), marks.sum(0))
    lists = [np.sort(rng.choice(N_TOKENS, n, replace=False)) for n in (0, 7, N_TOKENS, 1, 0, 90, 0)]
    offsets = np.cumsum([0, *map(len, lists)])
    counts = sums.over(np.concatenate(lists).astype(np.int32), offsets)
    wanted = np.array([6, 1, 2, 2, 4, 5, 3, 0])
    assert np.array_equal(counts.of(wanted), [marks[lists[i]].sum(0) for i in wanted])
    assert np.array_equal(sums.pairs, marks.T.astype(int) @ marks)
    empty = sums.over(np.empty(0, np.int32), np.zeros(3, int))
    assert np.array_equal(empty.of(np.arange(2)), np.zeros((2, n_predicates)))


def test_lists_take_the_best_members_in_order_also_where_most_have_no_hits():
    """Of equal F1 the first member is taken; the most precise comes first."""
    rng = np.random.default_rng(0)
    n, both = 40, rng.integers(0, 3, (30, 2, 40)) * (rng.random((30, 2, 40)) < rng.random((30, 1, 1)))
    counts = Counts(both, np.full((30, 2), 12), rng.integers(2, 5, n), 1000)
    possible = rng.random((30, 2)) < 0.8
    family = np.flatnonzero(rng.random(n) < 0.7)
    found = _lists(family.tolist(), counts, possible)
    assert found is not None
    chosen, lengths, f1, scores = found
    assert (both[possible][:, family] > 0).sum(1).min() < 2  # some have fewer hits than members
    for side, level in zip(*np.nonzero(possible), strict=True):
        hits, holds = both[side, level, family], counts.holds[family]
        order = np.argsort(-(2 * hits / (12 + holds)), kind="stable")[:LONGEST]
        order = order[np.argsort(-(hits / holds)[order], kind="stable")]
        joint = 2 * hits[order].cumsum() / (12 + holds[order].cumsum())
        score = joint - PAIR_COST - PART_COST * np.log2(np.arange(1, len(order) + 1))
        length = int(score[1:].argmax()) + 2
        assert lengths[side, level] == length and scores[side, level] == score[length - 1]
        assert f1[side, level] == joint[length - 1]
        assert np.array_equal(chosen[side, level, :length], family[order[:length]])

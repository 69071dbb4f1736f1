"""One-to-one assignment and pooled p values, computed from the nearest features of either side."""

import numpy as np
from jaxtyping import Float, Int

from saelab.universality.nearest import Nearest

N_BINS, POOL = 8, 200
"""Number of groups of equally many features by firing count, each with its own null distribution, and the smallest size
of a group; fewer groups where one would be smaller."""


def find_mutual(of_a: Int[np.ndarray, "d_a"], of_b: Int[np.ndarray, "d_b"]) -> Int[np.ndarray, "n 2"]:
    """Pairs of features that are each other's best partner; -1 stands for no partner.

    >>> find_mutual(np.array([1, 1, -1]), np.array([0, 1])).tolist()
    [[1, 1]]
    """
    features = np.flatnonzero(of_a >= 0)
    partners = of_a[features]
    kept = of_b[partners] == features
    return np.stack([features[kept], partners[kept]], 1)


def assign(of_a: Nearest, of_b: Nearest) -> tuple[Int[np.ndarray, "n 2"], Float[np.ndarray, "n"]]:
    """The one-to-one pairs with the largest sum of |similarity| (Hungarian algorithm), and their similarities.

    Only pairs among the nearest of either side are considered; where those are all pairs, the result is exact. A
    feature may stay without a partner.
    """
    from scipy.sparse import csr_matrix, hstack
    from scipy.sparse.csgraph import min_weight_full_bipartite_matching

    rows_a, at_a = np.nonzero(of_a.indices >= 0)
    rows_b, at_b = np.nonzero(of_b.indices >= 0)
    i = np.concatenate([rows_a, of_b.indices[rows_b, at_b]])
    j = np.concatenate([of_a.indices[rows_a, at_a], rows_b])
    values = np.concatenate([of_a.values[rows_a, at_a], of_b.values[rows_b, at_b]]).astype(np.float64)
    d_a, d_b = len(of_a.indices), len(of_b.indices)
    _, first = np.unique(i.astype(np.int64) * d_b + j, return_index=True)
    i, j, values = i[first], j[first], values[first]
    # A dummy partner without gain for every feature, so that none has to be paired.
    edges = csr_matrix((2 - np.abs(values), (i, j)), shape=(d_a, d_b))
    alone = csr_matrix((np.full(d_a, 2.0), (np.arange(d_a), np.arange(d_a))), shape=(d_a, d_a))
    matched, partners = min_weight_full_bipartite_matching(hstack([edges, alone], format="csr"))
    kept = partners < d_b
    pairs = np.stack([matched[kept], partners[kept]], 1).astype(np.int64)
    at = np.searchsorted(i.astype(np.int64) * d_b + j, pairs[:, 0] * d_b + pairs[:, 1])
    return pairs, values[at]


def pooled_p(
    values: Float[np.ndarray, "n"],
    by_chance: Float[np.ndarray, "n_null"],
    fires: Int[np.ndarray, "n"],
    fires_by_chance: Int[np.ndarray, "n_null"],
) -> Float[np.ndarray, "n"]:
    """The p value of each similarity: (1 + how many of the null are as large) / (1 + size of the null).

    Rare features reach large similarities by chance more easily, so values are standardized by the median and
    interquartile range of the null of features that fire about as often; after that the null is one pool. p is never 0.

    Args:
        values: best similarities; NaN has p = 1.
        by_chance: best similarities under the null hypothesis.
        fires: number of rows on which the feature of each value fires.
        fires_by_chance: number of rows on which the feature of each null value fires.
    """
    n_bins = int(np.clip(len(by_chance) // POOL, 1, N_BINS))
    borders = np.quantile(fires_by_chance, np.linspace(0, 1, n_bins + 1)[1:-1]) if len(fires_by_chance) else []
    mine, theirs = np.searchsorted(borders, fires), np.searchsorted(borders, fires_by_chance)
    scaled, pool = np.full(len(values), np.nan), np.full(len(by_chance), np.nan)
    for group in np.unique(theirs):
        here = by_chance[theirs == group]
        low, middle, high = np.quantile(here, [0.25, 0.5, 0.75])
        width = max(float(high - low), 1e-6)
        scaled[mine == group] = (values[mine == group] - middle) / width
        pool[theirs == group] = (here - middle) / width
    pool.sort()
    larger = len(pool) - np.searchsorted(pool, scaled, "left")
    return np.where(np.isnan(scaled), 1.0, (1 + larger) / (1 + len(pool)))

"""`pair_all`: the one-to-one assignment with the largest sum of similarities, from few candidates and a proof."""

import numpy as np
import torch
from jaxtyping import Float, Float32, Int

WHOLE = 256
"""Number of rows up to which all pairs are candidates."""
CANDIDATES = 64
"""Largest similarities of each row and of each column that are candidates at first."""
ROUNDING = 1e-12
CHECKED_ROWS = 256


def pair_all(sizes: Float32[np.ndarray, "d d"]) -> Int[np.ndarray, "d"]:
    """The column assigned to each row, each once, with the largest sum of sizes: the Hungarian algorithm's result.

    The assignment is found among the largest sizes of each row and column. Prices of the columns then show whether any
    other pair could improve it (linear programming duality); where one could, or prices are not found, there are twice
    as many candidates.

    Args:
        sizes: similarities of rows and columns, at most 1 in magnitude.

    >>> pair_all(np.array([[0.9, 0.8], [0.7, 0.1]], np.float32)).tolist()
    [1, 0]
    """
    from scipy.optimize import linear_sum_assignment
    from scipy.sparse import csr_matrix
    from scipy.sparse.csgraph import min_weight_full_bipartite_matching

    d, m = len(sizes), CANDIDATES
    while d > WHOLE and 2 * m < d:
        rows, columns = _find_candidates(sizes, m)
        costs = 3 - sizes[rows, columns].astype(np.float64)  # zeros would count as missing
        _, partners = min_weight_full_bipartite_matching(csr_matrix((costs, (rows, columns)), shape=(d, d)))
        prices = _find_prices(rows, columns, costs, partners)
        if prices is not None and _is_best(sizes, partners, *prices):
            return partners.astype(np.int64)
        m *= 2
    return linear_sum_assignment(sizes, maximize=True)[1]


def _find_candidates(sizes: np.ndarray, m: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows and columns of the `m` largest sizes of each row and column, and of the diagonal, in order of rows.

    With the diagonal there is an assignment.
    """
    found = torch.from_numpy(sizes)
    chosen = torch.zeros(sizes.shape, dtype=torch.bool)
    chosen.scatter_(1, found.topk(m, dim=1, sorted=False).indices, True)
    chosen.T.scatter_(1, found.T.contiguous().topk(m, dim=1, sorted=False).indices, True)
    chosen.fill_diagonal_(True)
    rows, columns = chosen.nonzero(as_tuple=True)
    return rows.numpy(), columns.numpy()


def _find_prices(
    rows: np.ndarray, columns: np.ndarray, costs: np.ndarray, partners: np.ndarray
) -> tuple[Float[np.ndarray, "d"], Float[np.ndarray, "d"]] | None:
    """Prices u of rows and v of columns with u + v <= cost for candidates and u + v = cost for partners.

    They are the lengths of shortest paths (Bellman-Ford). None where these are not found in d steps.
    """
    order = np.argsort(columns, kind="stable")
    rows, columns, costs = rows[order], columns[order], costs[order]
    starts = np.searchsorted(columns, np.arange(len(partners)))
    paid = np.empty(len(partners))
    is_pair = partners[rows] == columns
    paid[rows[is_pair]] = costs[is_pair]
    prices = np.zeros(len(partners))
    for _ in range(len(partners)):
        of_rows = paid - prices[partners]
        lower = np.minimum.reduceat(costs - of_rows[rows], starts)
        if not (lower < prices - ROUNDING).any():
            return of_rows, prices
        prices = np.minimum(prices, lower)
    return None


def _is_best(sizes: np.ndarray, partners: np.ndarray, of_rows: np.ndarray, of_columns: np.ndarray) -> bool:
    """Whether no pair at all costs less than its two prices, but for rounding."""
    limits = 3 + 10 * ROUNDING - of_rows
    starts = range(0, len(sizes), CHECKED_ROWS)
    parts = (slice(start, start + CHECKED_ROWS) for start in starts)
    return all(bool((sizes[part] <= limits[part, None] - of_columns).all()) for part in parts)

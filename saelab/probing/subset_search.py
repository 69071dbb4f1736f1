"""Subsets of features that together predict a label best: all pairs, and greedy additions with swaps.

A subset is as good as the share of the label's variance that a linear function of its columns explains, R^2, with both
classes weighed alike: then least squares are Fisher's linear discriminant. R^2 of any subset is in closed form from
correlations, so that every pair is tried and the best one is exact.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

SMALLEST = 1e-6  # share of its variance by which a column must differ from a combination of others


@dataclass(frozen=True, eq=False)
class Correlations:
    """Correlations of columns with each other and with a label, both classes weighed alike."""

    between: Float[np.ndarray, "n n"]
    with_label: Float[np.ndarray, "n"]

    @classmethod
    def of(cls, x: Any, y: Bool[np.ndarray, "rows"]) -> "Correlations":
        """Of columns (rows, n), dense or scipy sparse; a constant column has correlation 0 with all."""
        weights = np.where(y, 0.5 / max(1, y.sum()), 0.5 / max(1, (~y).sum()))
        scaled = x.multiply(weights[:, None]).tocsc() if hasattr(x, "multiply") else x * weights[:, None]
        means = np.asarray(scaled.sum(0), np.float64).ravel()
        products = x.T @ scaled
        moments = np.asarray(products.toarray() if hasattr(products, "toarray") else products, np.float64)
        moments = moments - np.outer(means, means)
        variances = np.maximum(moments.diagonal(), 0)
        scales = np.sqrt(np.where(variances > SMALLEST**2, variances, np.inf))
        true = np.asarray(scaled.T @ y.astype(np.float64)).ravel()
        return cls(moments / np.outer(scales, scales), (true - 0.5 * means) / (0.5 * scales))

    def r2(self, chosen: Int[np.ndarray, "k"]) -> float:
        """R^2 of a subset of columns."""
        c = self.with_label[chosen]
        return float(c @ np.linalg.pinv(self.between[np.ix_(chosen, chosen)], hermitian=True) @ c)

    def gains(self, chosen: Int[np.ndarray, "k"]) -> Float[np.ndarray, "n"]:
        """What each column would add to the R^2 of a subset; 0 for what the subset has already."""
        inverse = np.linalg.pinv(self.between[np.ix_(chosen, chosen)], hermitian=True)
        ties = self.between[:, chosen]
        left = self.with_label - ties @ (inverse @ self.with_label[chosen])
        free = 1 - ((ties @ inverse) * ties).sum(1)
        return np.where(free > SMALLEST, left**2 / np.maximum(free, SMALLEST), 0.0)

    @cached_property
    def best_pair(self) -> Int[np.ndarray, "2"]:
        """The pair of columns with the largest R^2, of all pairs; the column that alone has more comes first."""
        c, r = self.with_label, self.between
        free = 1 - r**2
        sums = (c[:, None] ** 2 + c[None, :] ** 2 - 2 * r * np.outer(c, c)) / np.maximum(free, SMALLEST)
        scores = np.where(free > SMALLEST, sums, np.maximum(c[:, None] ** 2, c[None, :] ** 2))
        np.fill_diagonal(scores, -1)
        pair = np.array(np.unravel_index(int(scores.argmax()), scores.shape))
        return pair[np.argsort(-(c[pair] ** 2), kind="stable")]


def best_subset(found: Correlations, k: int) -> Int[np.ndarray, "k"]:
    """The column, or the pair of columns, with the largest R^2; ValueError for other sizes.

    Args:
        found: correlations of the columns.
        k: 1 or 2.

    >>> y = np.array([True, True, False, False])
    >>> found = Correlations.of(np.array([[3.0, 1, 1], [0, -1, 0], [2, 1, 1], [-1, -1, 0]]), y)
    >>> best_subset(found, 2).tolist(), round(found.r2(best_subset(found, 2)), 3)
    ([0, 1], 1.0)
    """
    if k not in (1, 2):
        raise ValueError(f"`k` must be 1 or 2 where all subsets are tried, got {k}.")
    return found.best_pair if k == 2 else np.array([int((found.with_label**2).argmax())])


def grow_subsets(found: Correlations, k: int, *, swaps: bool = True) -> Iterator[Int[np.ndarray, "_"]]:
    """Subsets of 1 to k columns: the one before and the column that adds most, then swaps of a member for an outsider
    while the best of these raises R^2.

    Args:
        found: correlations of the columns.
        k: size of the largest subset, at most the number of columns.
        swaps: whether members are swapped.

    >>> y = np.array([True, True, False, False])
    >>> found = Correlations.of(np.array([[3.0, 1, 1], [0, -1, 0], [2, 1, 1], [-1, -1, 0]]), y)
    >>> [one.tolist() for one in grow_subsets(found, 2)]
    [[0], [0, 1]]
    """
    chosen = np.empty(0, np.int64)
    for _ in range(k):
        chosen = np.append(chosen, _best_other(found, chosen, chosen)[1])
        best = found.r2(chosen)
        while swaps and len(chosen) > 1:
            trials = []
            for i in range(len(chosen)):
                rest = np.delete(chosen, i)
                gain, other = _best_other(found, rest, chosen)
                trials.append((found.r2(rest) + gain, np.append(rest, other)))
            top = max(range(len(trials)), key=lambda i: trials[i][0])
            if trials[top][0] <= best + 1e-9:
                break
            best, chosen = trials[top]
        yield chosen


def _best_other(found: Correlations, subset: np.ndarray, taken: np.ndarray) -> tuple[float, int]:
    """The column outside of `taken` that adds most to a subset, and what it adds."""
    gains = found.gains(subset)
    gains[taken] = -1
    return float(gains.max()), int(gains.argmax())

"""Rankings of features, each sign on its own, by how well they predict a label on training tokens."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Literal

import numpy as np
from jaxtyping import Bool, Float, Int

from saelab.functional.statistics import fit_balanced_probe
from saelab.probing.subset_search import Correlations, best_subset, grow_subsets
from saelab.stores.packing import smallest_int

if TYPE_CHECKING:
    from scipy.sparse import csc_matrix, csr_matrix

Ranking = Literal["means", "f", "information", "l1", "pruning", "svm", "exact", "swap"]
SUBSETS = ("exact", "swap")
"""rankings that choose features for their number, not one by one"""
PREFILTER = 512
SEARCHED = 4096  # sides among which subsets are searched: their correlations are 128 MiB
N_BINS = 4
PENALTY = 0.1  # C of the regressions that rank


@dataclass(frozen=True, eq=False)
class RankedSides:
    """Codes split by sign: column i holds |z| of `features[i]` where z has the sign `signs[i]`, 0 elsewhere."""

    matrix: "csc_matrix"
    features: Int[np.ndarray, "n_sides"]
    signs: Int[np.ndarray, "n_sides"]

    @classmethod
    def split(cls, codes: "csr_matrix", live: Bool[np.ndarray, "n_tokens"]) -> "RankedSides":
        """Both signs of every feature; those that fire on no row of `live` are left out."""
        from scipy.sparse import hstack

        parts = [codes.maximum(0), (-codes).maximum(0)]
        matrix = hstack(parts, format="csc")
        matrix.eliminate_zeros()
        kept = np.flatnonzero(matrix[live].getnnz(axis=0) > 0)
        d_sae = codes.shape[1]
        return cls(matrix[:, kept], kept % d_sae, 1 - 2 * (kept // d_sae))

    def __len__(self) -> int:
        return len(self.features)


@dataclass(frozen=True, eq=False)
class Columns:
    """Split codes on training rows, with statistics that do not depend on labels."""

    matrix: "csc_matrix"

    @cached_property
    def rows(self) -> "csr_matrix":
        """The matrix by row."""
        return self.matrix.tocsr()

    @cached_property
    def counts(self) -> Int[np.ndarray, "n_sides"]:
        """Number of rows on which each column is not 0."""
        return np.diff(self.matrix.indptr)

    @cached_property
    def sums(self) -> Float[np.ndarray, "n_sides"]:
        """Sum of each column."""
        return np.asarray(self.matrix.sum(0)).ravel().astype(np.float64)

    @cached_property
    def peaks(self) -> Float[np.ndarray, "n_sides"]:
        """Maximum of each column, 1 where it is all 0."""
        found = self.matrix.max(axis=0).toarray().ravel()
        return np.where(found > 0, found, 1)

    @cached_property
    def deviations(self) -> Float[np.ndarray, "n_sides"]:
        """Standard deviation of each column, 1 where it does not vary."""
        n = self.matrix.shape[0]
        squares = np.asarray(self.matrix.multiply(self.matrix).sum(0)).ravel().astype(np.float64)
        found = np.sqrt(np.maximum(squares / n - (self.sums / n) ** 2, 0))
        return np.where(found > 0, found, 1.0)

    @cached_property
    def cells(self) -> Int[np.ndarray, "nnz"]:
        """Column and bin of each entry as one number: bins 1 to 4 are the quarters of a column's entries by size."""
        columns = np.repeat(np.arange(len(self.counts)), self.counts)
        order = np.argsort(self.matrix.data, kind="stable")
        short = columns[order].astype(smallest_int(len(self.counts)))  # integers of 16 bits sort quickly
        order = order[np.argsort(short, kind="stable")]
        ranks = np.empty(len(order), np.int64)
        ranks[order] = np.arange(len(order)) - np.repeat(self.matrix.indptr[:-1], self.counts)
        return columns * (N_BINS + 1) + 1 + ranks * N_BINS // np.repeat(self.counts, self.counts)

    @cached_property
    def binned(self) -> Int[np.ndarray, "n_sides n_bins"]:
        """Number of rows in each bin; rows where a column is 0 are in bin 0."""
        return self.count_bins(np.ones(self.matrix.shape[0], bool))

    def count_bins(self, y: Bool[np.ndarray, "n"]) -> Int[np.ndarray, "n_sides n_bins"]:
        """Number of rows in each bin, among those where a label is true."""
        cells, n = self.cells[y[self.matrix.indices]], len(self.counts)
        found = np.bincount(cells, minlength=n * (N_BINS + 1)).reshape(n, N_BINS + 1)
        found[:, 0] = y.sum() - found.sum(1)
        return found


@dataclass(frozen=True, eq=False)
class Labeled:
    """Split codes on training rows with a label."""

    columns: Columns
    y: Bool[np.ndarray, "n"]
    """the label of each row"""
    sample: Int[np.ndarray, "n_sample"]
    """rows that regressions are fitted to, both classes among them"""

    @cached_property
    def _sampled(self) -> "csc_matrix":
        return self.columns.rows[self.sample].tocsc()

    @cached_property
    def differences(self) -> Float[np.ndarray, "n_sides"]:
        """Mean where the label is true, less the mean where it is false, of each column."""
        here = np.asarray(self.columns.matrix.T @ self.y.astype(np.float64))
        n_true = int(self.y.sum())
        return here / n_true - (self.columns.sums - here) / (len(self.y) - n_true)

    def choose(self, ranking: Ranking, ks: Sequence[int]) -> dict[int, Int[np.ndarray, "k"]]:
        """Columns by their number: the first in order of a ranking, or the best together; "exact" has 1 and 2 alone."""
        if ranking not in SUBSETS:
            order = self.order(ranking)
            return {k: order[:k] for k in ks}
        first, found = self._searched
        if ranking == "exact":
            return {k: first[best_subset(found, k)] for k in ks if k <= 2}
        grown = list(grow_subsets(found, min(max(ks), len(first))))
        return {k: first[grown[k - 1]] for k in ks if k <= len(grown)}

    @cached_property
    def _searched(self) -> tuple[Int[np.ndarray, "m"], Correlations]:
        """The columns that subsets are made of, and their correlations."""
        first = self.order("f")[:SEARCHED]
        return first, Correlations.of(self._sampled[:, first], self.y[self.sample])

    def order(self, ranking: Ranking) -> Int[np.ndarray, "n_sides"]:
        """Columns in order of a ranking, the most predictive first."""
        if ranking in ("l1", "svm", "pruning"):
            return self._by_pruning() if ranking == "pruning" else self._by_weights(ranking)
        scores = {"means": self._by_means, "f": lambda: self._f, "information": self._by_information}
        return np.argsort(-scores[ranking](), kind="stable")

    def _by_means(self) -> np.ndarray:
        """Difference of means over the largest code: codes are mostly 0 and of any scale."""
        return np.abs(self.differences) / self.columns.peaks

    @cached_property
    def _f(self) -> np.ndarray:
        """ANOVA F of two groups, `(n - 2) r^2 / (1 - r^2)`, r the correlation of code and label."""
        rate = self.y.mean()
        r2 = (self.differences / self.columns.deviations) ** 2 * rate * (1 - rate)
        return (len(self.y) - 2) * r2 / np.maximum(1 - r2, 1e-12)

    def _by_information(self) -> np.ndarray:
        """Mutual information of the label and of the code in 5 bins: 0, and quarters of what is not 0; in nats."""
        true, all_, n = self.columns.count_bins(self.y), self.columns.binned, len(self.y)
        return _information(true, all_, n) + _information(all_ - true, all_, n)

    def _by_weights(self, ranking: Ranking) -> np.ndarray:
        order = self.order("f")
        first = order[:PREFILTER]
        weights = np.abs(self._fit_svm(first) if ranking == "svm" else self.fit(first, c=PENALTY, l1=True))
        return np.concatenate([first[np.argsort(-weights, kind="stable")], order[PREFILTER:]])

    def _by_pruning(self) -> np.ndarray:
        """Columns in reverse order of removal by a dense regression that repeatedly drops its weaker half."""
        order = self.order("f")
        left, lost = order[:PREFILTER], [order[PREFILTER:]]
        while True:
            left = left[np.argsort(-np.abs(self.fit(left, c=PENALTY)), kind="stable")]
            half = -(-len(left) // 2)
            if half == len(left):
                return np.concatenate([left, *lost])
            left, lost = left[:half], [left[half:], *lost]

    def fit(self, columns: Int[np.ndarray, "k"], *, c: float = 1.0, l1: bool = False) -> Float[np.ndarray, "k"]:
        """Weights of a logistic regression on columns over 10 standard deviations, with balanced classes; `c` inverse
        penalty.
        """
        return fit_balanced_probe(self._scaled(columns), self.y[self.sample], c=c, l1=l1)

    def _fit_svm(self, columns: Int[np.ndarray, "k"]) -> Float[np.ndarray, "k"]:
        """Weights of a linear support vector machine on the same columns (scikit-learn's `LinearSVC`)."""
        from sklearn.svm import LinearSVC

        svm = LinearSVC(class_weight="balanced", C=PENALTY, dual=False, max_iter=2000, random_state=0)
        return np.asarray(svm.fit(self._scaled(columns), self.y[self.sample].astype(np.int64)).coef_[0])

    def _scaled(self, columns: Int[np.ndarray, "k"]) -> "csr_matrix":
        from scipy.sparse import diags

        return (self._sampled[:, columns] @ diags(0.1 / self.columns.deviations[columns])).tocsr()


def _information(part: np.ndarray, whole: np.ndarray, n: int) -> np.ndarray:
    """The terms of one label in `sum p(bin, label) log p(bin, label) / (p(bin) p(label))`."""
    rate = part[0].sum() / n
    share = np.divide(part, np.maximum(whole, 1) * rate)
    return (part / n * np.log(np.where(part > 0, share, 1))).sum(1)

"""`diff_corpora`: which features differ between two corpora, with effect sizes, p values over documents and FDR."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool

from saelab.corpora.document_features import DocumentFeatures, Documents, as_documents, require_same_dictionary
from saelab.functional.statistics import adjust
from saelab.functional.two_samples import Effect, cliffs_delta, log_odds_ratio, permutation_p, rate_difference
from saelab.stores.feature_names import FeatureNames, name_sides, require_names
from saelab.stores.results import Result, format_table

SHOWN = 15


@dataclass(frozen=True, kw_only=True)
class FeatureDifference:
    """How one side of a feature differs between corpora a and b; every effect is above 0 where b has more."""

    feature: int
    sign: int
    """1 or -1: the side of the feature"""
    name: str
    """its label; empty where it has none"""
    rate_a: float
    """share of a's documents in which the side fires"""
    rate_b: float
    """share of b's documents"""
    opposite_rates: tuple[float, float] | None
    """both shares of the feature's other side; None where that never fires"""
    difference: Effect
    """rate_b less rate_a, with Newcombe's interval"""
    log_odds: Effect
    """logarithm of the odds ratio of firing, nats"""
    delta: Effect
    """Cliff's delta of the pooled magnitudes, -1 to 1: P(b > a) - P(a > b)"""
    p: float
    """two-sided, of the rank sum when documents change corpora at random"""
    q: float
    """Benjamini and Hochberg's false discovery rate"""

    @property
    def more_in(self) -> str:
        """The corpus with more of it, "a" or "b"."""
        return "b" if self.delta.value > 0 else "a"


@dataclass(frozen=True, kw_only=True, eq=False)
class CorpusDiff(Result):
    """The features of two corpora by how much they differ, the smallest p value first."""

    by: str
    """how codes were pooled over a document"""
    n_a: int
    """documents of corpus a"""
    n_b: int
    fdr: float
    """false discovery rate up to which a difference is a discovery"""
    min_documents: int
    """documents in which a side had to fire to be tested"""
    null_discoveries: tuple[int, ...]
    """discoveries after documents changed corpora at random, one number a draw"""
    rows: tuple[FeatureDifference, ...]
    """every side that was tested"""

    @property
    def discoveries(self) -> tuple[FeatureDifference, ...]:
        """The rows whose false discovery rate is at most `fdr`."""
        return tuple(row for row in self.rows if row.q <= self.fdr)

    def __str__(self) -> str:
        found, null = self.discoveries, self.null_discoveries
        chance = f"; {np.mean(null):.3g} with documents exchanged at random ({len(null)} draws)" if null else ""
        head = (
            f"{len(found):,} of {len(self.rows):,} sides of features differ at FDR {self.fdr:g} between {self.n_a:,} "
            f"documents (a) and {self.n_b:,} (b){chance}"
        )
        table = [["feature", "in a", "in b", "Cliff's delta", "log odds", "q", "name"]]
        table += [
            [
                f"{row.feature}{'' if row.sign > 0 else ' -'}",
                f"{row.rate_a:.1%}",
                f"{row.rate_b:.1%}",
                str(row.delta),
                f"{row.log_odds.value:+.2f}",
                f"{row.q:.2g}",
                row.name,
            ]
            for row in found[:SHOWN]
        ]
        return "\n".join([head, *(format_table(table, left=(0, 6)) if found else ())])


def diff_corpora(
    a: Documents,
    b: Documents,
    *,
    labels: FeatureNames | None = None,
    fdr: float = 0.05,
    min_documents: int = 5,
    n_null: int = 20,
    seed: int = 0,
) -> CorpusDiff:
    """The features that differ between two corpora, by a rank-sum test over documents (arXiv:2512.10092).

    A document counts once, however many tokens it has: its codes are pooled, each side of a feature by itself. The test
    compares the ranks of the pooled magnitudes, so that both more documents and larger codes count; its null
    distribution is that of documents exchanged between the corpora at random. See `permutation_p`.

    Args:
        a: feature store of one corpus, or its documents from `pool_documents`, which chooses the pooling.
        b: that of the other, coded by the same SAE.
        labels: names of features, as texts by feature or a label store.
        fdr: false discovery rate (Benjamini and Hochberg) up to which a difference is a discovery.
        min_documents: sides that fire in fewer documents of both together are not tested.
        n_null: draws of documents exchanged at random, whose discoveries are counted beside.
        seed: of those draws.

    Raises:
        ValueError: corpora of different SAEs or poolings, fewer than two documents in one, or an `fdr` out of range.
    """
    require_names(labels)
    a, b = as_documents(a), as_documents(b)
    require_same_dictionary(a, b)
    _check(a, b, fdr, min_documents, n_null)
    tested, log_p = _test_sides(a, b, min_documents, n_null, seed)
    q = np.array([adjust(np.exp(one)) for one in log_p.T]).T if len(tested) else log_p
    rows = _describe(a, b, tested, log_p, q, labels)
    null = tuple(int((q[:, i] <= fdr).sum()) for i in range(1, 1 + n_null))
    order = sorted(range(len(rows)), key=lambda i: (log_p[i, 0], -abs(rows[i].delta.value), tested[i]))
    return CorpusDiff(
        by=a.by,
        n_a=len(a),
        n_b=len(b),
        fdr=fdr,
        min_documents=min_documents,
        null_discoveries=null,
        rows=tuple(rows[i] for i in order),
    )


def _check(a: DocumentFeatures, b: DocumentFeatures, fdr: float, min_documents: int, n_null: int) -> None:
    if min(len(a), len(b)) < 2:
        raise ValueError(
            f"Each corpus must have at least 2 documents, got {len(a)} and {len(b)}; documents are what is counted."
        )
    if not 0 < fdr < 1 or min_documents < 1 or n_null < 0:
        raise ValueError(
            "`fdr` must be between 0 and 1, `min_documents` at least 1 and `n_null` at least 0, got "
            f"{fdr}, {min_documents} and {n_null}."
        )


def draw_labelings(n_a: int, n_b: int, n_null: int, seed: int) -> Bool[np.ndarray, "n_labelings n"]:
    """Which documents of both corpora are b's: as it is, and in random divisions into corpora of the same sizes.

    Args:
        n_a: documents of the first corpus, which come first.
        n_b: documents of the second.
        n_null: number of random divisions.
        seed: of the draws.

    >>> draw_labelings(1, 2, 1, 0).sum(1).tolist()
    [2, 2]
    """
    rng, own = np.random.default_rng(seed), np.arange(n_a + n_b) >= n_a
    return np.stack([own, *(rng.permutation(own) for _ in range(n_null))])


def _test_sides(
    a: DocumentFeatures, b: DocumentFeatures, min_documents: int, n_null: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Columns that were tested, and log p of each for the corpora as they are and as they were divided.

    How often a side fires in both corpora together says nothing of where, so those that are left out bias no p value.
    """
    from scipy.sparse import vstack

    columns = vstack([a.matrix, b.matrix]).tocsc()
    tested = np.flatnonzero(np.diff(columns.indptr) >= min_documents)
    in_b = draw_labelings(len(a), len(b), n_null, seed)
    log_p = np.zeros((len(tested), 1 + n_null))
    for i, column in enumerate(tested.tolist()):
        part = slice(*columns.indptr[column : column + 2])
        log_p[i] = permutation_p(columns.data[part].astype(np.float64), columns.indices[part], in_b)
    return tested, log_p


def _describe(
    a: DocumentFeatures,
    b: DocumentFeatures,
    tested: np.ndarray,
    log_p: np.ndarray,
    q: np.ndarray,
    labels: FeatureNames | None,
) -> list[FeatureDifference]:
    """Effects of the columns that were tested."""
    name = name_sides(labels, sorted({column // 2 for column in tested.tolist()}))
    in_a, in_b = a.matrix.tocsc(), b.matrix.tocsc()
    counts = a.n_fires, b.n_fires
    rows = []
    for i, column in enumerate(tested.tolist()):
        values = [one.data[slice(*one.indptr[column : column + 2])].astype(np.float64) for one in (in_a, in_b)]
        sizes = int(counts[0][column]), len(a), int(counts[1][column]), len(b)
        other = int(counts[0][column ^ 1]), int(counts[1][column ^ 1])
        sign = -1 if column % 2 else 1
        rows.append(
            FeatureDifference(
                feature=column // 2,
                sign=sign,
                name=name(column // 2, sign),
                rate_a=sizes[0] / len(a),
                rate_b=sizes[2] / len(b),
                opposite_rates=(other[0] / len(a), other[1] / len(b)) if any(other) else None,
                difference=rate_difference(*sizes),
                log_odds=log_odds_ratio(*sizes),
                delta=cliffs_delta(values[0], len(a), values[1], len(b)),
                p=float(np.exp(log_p[i, 0])),
                q=float(q[i, 0]),
            )
        )
    return rows

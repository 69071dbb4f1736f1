"""Structure of features over documents: `cluster_features` by co-firing, `correlate_property` with a property."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int, Shaped

from saelab.corpora.document_features import Documents, as_documents
from saelab.functional.statistics import adjust
from saelab.functional.two_samples import Effect, Z, permutation_p
from saelab.stores.feature_names import FeatureNames, name_sides, require_names
from saelab.stores.results import Result, format_table

MOST_SIDES = 8192
"""sides that are clustered at once: their similarities are 512 MiB"""
N_SHOWN = 15
N_MEMBERS = 6  # of a cluster that are shown
LINKED = 1e-6  # least affinity, so that no two features are unconnected


@dataclass(frozen=True, kw_only=True)
class FeatureCluster:
    """Sides of features that fire in the same documents, the most central first."""

    members: tuple[tuple[int, int], ...]
    """features and signs"""
    names: tuple[str, ...]
    """their labels; empty where there is none"""
    inside: float
    """mean phi (Pearson's r of firing over documents) of its pairs; NaN of one member"""
    outside: float
    """mean phi with sides of other clusters"""


@dataclass(frozen=True, kw_only=True)
class FeatureClusters(Result):
    """Clusters of features by co-firing over documents, the most coherent first."""

    n_documents: int
    clusters: tuple[FeatureCluster, ...]
    contrast: float
    """mean phi inside clusters less that outside, over all pairs of sides"""
    contrast_null: float
    """the same of clusters found after each side's documents were permuted: what clustering finds in nothing"""

    def __str__(self) -> str:
        n = sum(len(cluster.members) for cluster in self.clusters)
        lines = [
            f"{n:,} sides of features in {len(self.clusters)} clusters, by {self.n_documents:,} documents: phi inside "
            f"less outside {self.contrast:+.3f}; documents of each side permuted {self.contrast_null:+.3f}"
        ]
        table = [["size", "inside", "outside", "features"]]
        for cluster in self.clusters[:N_SHOWN]:
            shown = zip(cluster.members[:N_MEMBERS], cluster.names, strict=False)
            table.append(
                [
                    f"{len(cluster.members):,}",
                    f"{cluster.inside:+.3f}",
                    f"{cluster.outside:+.3f}",
                    ", ".join(
                        f"{j}{'' if sign > 0 else ' -'}{f' ({name})' if name else ''}" for (j, sign), name in shown
                    ),
                ]
            )
        return "\n".join(lines + format_table(table, left=(3,)))


def cluster_features(
    documents: Documents,
    n_clusters: int = 10,
    *,
    labels: FeatureNames | None = None,
    min_documents: int = 5,
    seed: int = 0,
) -> FeatureClusters:
    """Clusters of sides of features that fire in the same documents: spectral clustering of phi, negative as 0.

    Args:
        documents: feature store, or documents from `pool_documents`.
        n_clusters: number of clusters.
        labels: names of features, as texts by feature or a label store.
        min_documents: sides are left out that fire in fewer documents, or in all but fewer.
        seed: of the permutations and of the solver.

    Raises:
        ValueError: fewer sides than clusters, or more than can be clustered at once.
    """
    require_names(labels)
    documents = as_documents(documents)
    counts = documents.n_fires
    kept = np.flatnonzero((counts >= min_documents) & (counts <= len(documents) - min_documents))
    if not 2 <= n_clusters <= len(kept) or len(kept) > MOST_SIDES:
        raise ValueError(
            f"`n_clusters` must be 2 to the {len(kept)} sides that fire in at least {min_documents} and not in all of "
            f"{len(documents)} documents, these at most {MOST_SIDES}, got {n_clusters}; change `min_documents`."
        )
    fires = (documents.matrix[:, kept] > 0).toarray().astype(np.float32)
    rng = np.random.default_rng(seed)
    phi = np.corrcoef(fires.T)
    of = _cluster(phi, n_clusters, seed)
    null = np.corrcoef(rng.permuted(fires, axis=0).T)
    name = name_sides(labels, (kept // 2).tolist())
    found = [_gather(phi, np.flatnonzero(of == i), kept, name) for i in np.unique(of).tolist()]
    return FeatureClusters(
        n_documents=len(documents),
        clusters=tuple(sorted(found, key=lambda one: (-np.nan_to_num(one.inside, nan=-1.0), one.members))),
        contrast=_contrast(phi, of),
        contrast_null=_contrast(null, _cluster(null, n_clusters, seed)),
    )


def _cluster(phi: np.ndarray, n_clusters: int, seed: int) -> Int[np.ndarray, "n_sides"]:
    from sklearn.cluster import SpectralClustering

    made = SpectralClustering(n_clusters, affinity="precomputed", assign_labels="cluster_qr", random_state=seed)
    return np.asarray(made.fit_predict(np.maximum(phi, LINKED)), np.int64)


def _gather(phi: np.ndarray, own: np.ndarray, kept: np.ndarray, name: object) -> FeatureCluster:
    assert callable(name)
    within = phi[np.ix_(own, own)]
    order = own[np.argsort(-within.sum(1), kind="stable")]
    others = np.setdiff1d(np.arange(len(phi)), own)
    members = tuple((int(kept[i]) // 2, 1 - 2 * (int(kept[i]) % 2)) for i in order)
    n = len(own)
    return FeatureCluster(
        members=members,
        names=tuple(name(*member) for member in members),
        inside=float((within.sum() - n) / (n * (n - 1))) if n > 1 else float("nan"),
        outside=float(phi[np.ix_(own, others)].mean()) if len(others) else float("nan"),
    )


def _contrast(phi: np.ndarray, of: np.ndarray) -> float:
    same = of[:, None] == of
    inside = (phi[same].sum() - len(of)) / max(same.sum() - len(of), 1)
    return float(inside - phi[~same].mean())


@dataclass(frozen=True, kw_only=True)
class PropertyCorrelation:
    """How one side of a feature goes with a property of documents."""

    feature: int
    sign: int
    name: str
    """its label; empty where it has none"""
    rate: float
    """share of documents in which it fires"""
    r: Effect
    """Spearman's rank correlation of the pooled magnitude with the property"""
    p: float
    q: float
    """Benjamini and Hochberg's false discovery rate"""


@dataclass(frozen=True, kw_only=True)
class PropertyCorrelations(Result):
    """Sides of features by how much they go with a property of documents, the smallest p value first."""

    n_documents: int
    fdr: float
    rows: tuple[PropertyCorrelation, ...]
    """every side that was tested"""

    @property
    def discoveries(self) -> tuple[PropertyCorrelation, ...]:
        """The rows whose false discovery rate is at most `fdr`."""
        return tuple(row for row in self.rows if row.q <= self.fdr)

    def __str__(self) -> str:
        found = self.discoveries
        head = (
            f"{len(found):,} of {len(self.rows):,} sides of features go with the property at FDR {self.fdr:g}, by "
            f"{self.n_documents:,} documents"
        )
        table = [["feature", "fires in", "Spearman's r", "q", "name"]]
        table += [
            [f"{row.feature}{'' if row.sign > 0 else ' -'}", f"{row.rate:.1%}", str(row.r), f"{row.q:.2g}", row.name]
            for row in found[:N_SHOWN]
        ]
        return "\n".join([head, *(format_table(table, left=(0, 4)) if found else ())])


def correlate_property(
    documents: Documents,
    values: Shaped[np.ndarray, "n_documents"] | Sequence[float],
    *,
    labels: FeatureNames | None = None,
    fdr: float = 0.05,
    min_documents: int = 5,
) -> PropertyCorrelations:
    """The features that go with a property of documents, such as a date, a rating or a length, by rank correlation.

    p values are those of the property permuted over the documents: as in `diff_corpora` where it has two values;
    otherwise Spearman's r times sqrt(n - 1), which has mean 0 and variance 1 over all permutations, is taken as normal.
    The intervals are Bonett and Wright's.

    Args:
        documents: feature store, or documents from `pool_documents`.
        values: the property of each document, in their order: numbers or booleans.
        labels: names of features, as texts by feature or a label store.
        fdr: false discovery rate up to which a correlation is a discovery.
        min_documents: sides that fire in fewer documents are not tested.

    Raises:
        ValueError: another number of values than documents, values that are not finite, or all the same.
    """
    from scipy.special import ndtr
    from scipy.stats import rankdata

    require_names(labels)
    documents = as_documents(documents)
    given = np.asarray(values, np.float64)
    if given.shape != (len(documents),) or not np.isfinite(given).all() or len(np.unique(given)) < 2:
        raise ValueError(
            f"`values` must be {len(documents)} finite numbers, one a document and not all the same, got shape "
            f"{given.shape} with {len(np.unique(given))} values, {int((~np.isfinite(given)).sum())} not finite."
        )
    columns = documents.matrix.tocsc()
    tested = np.flatnonzero(np.diff(columns.indptr) >= min_documents)
    ranks = _standardize(rankdata(given))
    two = (given == given.max())[None] if len(np.unique(given)) == 2 else None
    r, p = np.zeros(len(tested)), np.ones(len(tested))
    for i, column in enumerate(tested.tolist()):
        part = slice(*columns.indptr[column : column + 2])
        rows, sizes = columns.indices[part], columns.data[part].astype(np.float64)
        dense = np.zeros(len(documents))
        dense[rows] = sizes
        r[i] = float(_standardize(rankdata(dense)) @ ranks)
        if two is not None:
            p[i] = np.exp(permutation_p(sizes, rows, two)[0])
        elif r[i]:
            p[i] = 2 * ndtr(-abs(r[i]) * np.sqrt(len(documents) - 1))
    q, name = adjust(p), name_sides(labels, (tested // 2).tolist())
    found = [
        PropertyCorrelation(
            feature=column // 2,
            sign=1 - 2 * (column % 2),
            name=name(column // 2, 1 - 2 * (column % 2)),
            rate=int(np.diff(columns.indptr)[column]) / len(documents),
            r=_interval(float(r[i]), len(documents)),
            p=float(p[i]),
            q=float(q[i]),
        )
        for i, column in enumerate(tested.tolist())
    ]
    ordered = sorted(found, key=lambda row: (row.p, -abs(row.r.value), row.feature))
    return PropertyCorrelations(n_documents=len(documents), fdr=fdr, rows=tuple(ordered))


def _standardize(ranks: Float[np.ndarray, "n"]) -> Float[np.ndarray, "n"]:
    """Ranks with mean 0 and norm 1; all 0 where they are equal."""
    off = ranks - ranks.mean()
    return np.asarray(off / max(float(np.linalg.norm(off)), 1e-300))


def _interval(r: float, n: int) -> Effect:
    """Bonett and Wright's interval of 95 % of Spearman's correlation (2000)."""
    r = min(max(r, -1.0), 1.0)
    middle = np.arctanh(min(max(r, -1 + 1e-12), 1 - 1e-12))
    reach = Z * np.sqrt((1 + r * r / 2) / max(n - 3, 1))
    return Effect(r, float(np.tanh(middle - reach)), float(np.tanh(middle + reach)))

"""`NormalizedVectors` and `SpectralClusters`: spectral clustering by cosines, of all pairs only where it must be.

The firing of features in windows of text, centered and scaled, are unit vectors too, whose cosines are phi. With the
affinity `cosine + 1` a product with the matrix of all pairs is two products with the vectors: it need not be made.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, TypeAlias

import numpy as np
from jaxtyping import Float, Int

Affinity: TypeAlias = Literal["cosine + 1", "max(cosine, 0)"]
"""how alike two vectors are to a clustering; phi is the cosine of two features' firing"""
MOST_PAIRED = 32_768
"""vectors of which all cosines are held at once, in 4 GiB"""
BLOCK = 1024  # vectors whose cosines are computed at once
LINKED = 1e-6  # least affinity, so that no two vectors are unconnected
TOLERANCE = 1e-5  # of eigenvalues, relative
N_STARTS = 10  # of k-means


@dataclass(frozen=True, eq=False)
class NormalizedVectors:
    """n vectors of norm 1, as columns of a dense or sparse matrix less their means, scaled."""

    columns: Any
    """(n_dims, n)"""
    means: Float[np.ndarray, "n"]
    scales: Float[np.ndarray, "n"]

    @classmethod
    def of_rows(cls, rows: Float[np.ndarray, "n d"]) -> "NormalizedVectors":
        """Rows that are not 0, scaled to norm 1."""
        return cls(rows.T, np.zeros(len(rows)), 1 / np.linalg.norm(rows, axis=1))

    @classmethod
    def of_windows(cls, windows: Any) -> "NormalizedVectors":
        """Features by the windows that they fire in, a scipy matrix (n_windows, n) of 0 and 1; cosines are phi.

        Every feature must fire in some windows and not in others.
        """
        n, rates = windows.shape[0], np.asarray(windows.mean(0), np.float64).ravel()
        return cls(windows, rates, 1 / np.sqrt(n * rates * (1 - rates)))

    def __len__(self) -> int:
        return len(self.means)

    @property
    def scaled(self) -> Float[np.ndarray, "n_dims n"] | None:
        """The vectors as dense columns where they are fewer dimensions than vectors, else None."""
        if not isinstance(self.columns, np.ndarray) or len(self.columns) >= len(self):
            return None
        return (self.columns - self.means.astype(self.columns.dtype)) * self.scales.astype(self.columns.dtype)

    def times(self, v: Float[np.ndarray, "n m"]) -> Float[np.ndarray, "n m"]:
        """The matrix of all cosines times some columns."""
        weighed = self.scales[:, None] * v
        given = weighed.astype(self.columns.dtype)  # else all columns are copied
        inside = np.asarray(self.columns @ given, np.float64) - self.means @ weighed
        back = np.asarray(self.columns.T @ inside.astype(given.dtype), np.float64)
        return np.asarray(self.scales[:, None] * (back - np.outer(self.means, inside.sum(0))))

    def blocks(self) -> Iterator[tuple[slice, Float[np.ndarray, "n m"]]]:
        """All cosines, some columns of the matrix at a time."""
        n = len(self)
        for start in range(0, n, BLOCK):
            part = slice(start, min(start + BLOCK, n))
            yield part, self.times(np.eye(n, part.stop - start, -start))

    @cached_property
    def squares(self) -> float:
        """The sum of the squares of all cosines."""
        if (scaled := self.scaled) is not None:
            return float(np.square(scaled @ scaled.T).sum(dtype=np.float64))
        return float(sum(np.square(block).sum() for _, block in self.blocks()))

    def pairs(self) -> Float[np.ndarray, "n n"]:
        """All cosines, in float32; ValueError for more vectors than fit."""
        n = len(self)
        if n > MOST_PAIRED:
            raise ValueError(
                f"Affinity 'max(cosine, 0)' needs all pairs of at most {MOST_PAIRED:,} vectors, got {n:,}; take "
                "'cosine + 1', which needs none."
            )
        found = np.empty((n, n), np.float32)
        for part, block in self.blocks():
            found[:, part] = block
        return found


@dataclass(frozen=True, eq=False)
class SpectralClusters:
    """Leading eigenvectors of an affinity, from which clusters of any number up to theirs are read."""

    axes: Float[np.ndarray, "n n_most"]
    """of the normalized affinity, the largest eigenvalue first, over the roots of the degrees"""

    @classmethod
    def of(cls, vectors: NormalizedVectors, n_most: int, affinity: Affinity, seed: int) -> "SpectralClusters":
        """The eigenvectors for up to `n_most` clusters.

        Args:
            vectors: what is clustered.
            n_most: largest number of clusters, below that of the vectors.
            affinity: "cosine + 1", by products with the vectors, or "max(cosine, 0)", by all pairs.
            seed: of the solver's start.
        """
        n, apply = len(vectors), _affinity(vectors, affinity)
        roots = np.sqrt(np.maximum(apply(np.ones((n, 1)))[:, 0], LINKED))
        if affinity == "cosine + 1" and (scaled := vectors.scaled) is not None:
            return cls(_by_dimensions(scaled, roots, n_most) / roots[:, None])
        return cls(_by_products(apply, roots, n_most, seed) / roots[:, None])

    def cut(self, n_clusters: int, seed: int) -> Int[np.ndarray, "n"]:
        """The cluster of each vector, by k-means on the first eigenvectors."""
        from sklearn.cluster import KMeans

        means = KMeans(n_clusters, n_init=N_STARTS, random_state=seed)
        return np.asarray(means.fit_predict(self.axes[:, :n_clusters]), np.int64)


def _by_dimensions(
    scaled: Float[np.ndarray, "n_dims n"], roots: Float[np.ndarray, "n"], n_most: int
) -> Float[np.ndarray, "n n_most"]:
    """Leading eigenvectors of `F^T F`, from those of `F F^T`, which has the size of the dimensions."""
    f = np.vstack([scaled, np.ones((1, len(roots)), scaled.dtype)]) / roots.astype(scaled.dtype)
    values, axes = np.linalg.eigh((f @ f.T).astype(np.float64))
    values, axes = values[::-1][:n_most], axes[:, ::-1][:, :n_most]
    return np.asarray((f.T @ axes.astype(f.dtype)) / np.sqrt(np.maximum(values, 1e-300)))


def _by_products(
    apply: Callable[[np.ndarray], np.ndarray], roots: Float[np.ndarray, "n"], n_most: int, seed: int
) -> Float[np.ndarray, "n n_most"]:
    """Leading eigenvectors of the normalized affinity, by products with it."""
    from scipy.sparse.linalg import LinearOperator, eigsh

    def matvec(v: np.ndarray) -> np.ndarray:
        return np.asarray(apply(v.reshape(len(roots), -1) / roots[:, None]) / roots[:, None]).reshape(v.shape)

    start = np.random.default_rng(seed).standard_normal(len(roots))
    operator = LinearOperator((len(roots), len(roots)), matvec=matvec, matmat=matvec, dtype=np.float64)
    values, axes = eigsh(operator, n_most, which="LA", v0=start, tol=TOLERANCE)
    return np.asarray(axes[:, np.argsort(-values)])


def _affinity(vectors: NormalizedVectors, affinity: Affinity) -> Callable[[np.ndarray], np.ndarray]:
    """Products with the matrix of affinities."""
    if affinity == "cosine + 1":
        return lambda v: vectors.times(v) + v.sum(0)
    pairs = vectors.pairs()
    np.maximum(pairs, LINKED, out=pairs)
    return lambda v: pairs @ v.astype(np.float32)

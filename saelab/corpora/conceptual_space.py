"""`conceptualize`: embeddings as similarities to named concepts of a hierarchy; and `representative_points`."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from saelab.stores.results import Result, format_table

SHOWN = 12
MAX_ITER = 100
BLOCK = 2048  # rows whose similarities to all others are held
TINY = 1e-12


@dataclass(frozen=True, kw_only=True, eq=False)
class ConceptBank:
    """Named concepts with an embedding each, in a hierarchy.

    Args:
        names: names of the concepts.
        vectors: embedding of each, of the space of what is described: of its name, or the mean of its examples.
        parents: index of each concept's parent, -1 for a root; None for a flat list.

    Raises:
        ValueError: lists that do not fit together, or a hierarchy with a circle.

    >>> ConceptBank(names=["animal", "cat"], vectors=np.eye(2), parents=[-1, 0]).children(0)
    [1]
    """

    names: Sequence[str]
    vectors: Float[np.ndarray, "n_concepts d"]
    parents: Sequence[int] | None = None

    def __post_init__(self) -> None:
        n, parents = len(self.names), self.parents
        fits = self.vectors.ndim == 2 and len(self.vectors) == n > 0 and (parents is None or len(parents) == n)
        if not fits or not np.isfinite(self.vectors).all():
            raise ValueError(
                f"A bank must have a finite vector and a parent for each of its {n} names, got vectors of shape "
                f"{self.vectors.shape} and {'no' if parents is None else len(parents)} parents."
            )
        if parents is not None and not all(-1 <= parent < n for parent in parents):
            raise ValueError(f"`parents` must be -1 for a root or 0..{n - 1}, got {min(parents)} to {max(parents)}.")
        for i in range(n):
            seen, at = {i}, self.parent(i)
            while at >= 0:
                if at in seen:
                    raise ValueError(f"`parents` must lead to a root, got a circle at {self.names[i]!r}.")
                seen.add(at)
                at = self.parent(at)

    def __len__(self) -> int:
        return len(self.names)

    def parent(self, i: int) -> int:
        """Index of a concept's parent; -1 for a root."""
        return -1 if self.parents is None else int(self.parents[i])

    def children(self, i: int) -> list[int]:
        """Indices of the concepts below one; with -1 the roots."""
        return [j for j in range(len(self)) if self.parent(j) == i]


@dataclass(frozen=True, kw_only=True, eq=False)
class ConceptualSpace(Result):
    """Embeddings described by concepts: one row an embedding, one column a concept."""

    concepts: tuple[int, ...]
    """indices in the bank of the columns' concepts"""
    names: tuple[str, ...]
    coordinates: Float[np.ndarray, "n n_concepts"]
    """cosine of each embedding with each concept, -1 to 1, after both were centered"""
    splits: tuple[str, ...]
    """names of the concepts that were replaced by their children, in this order"""

    def describe(self, row: int, n: int = 5) -> list[tuple[str, float]]:
        """The concepts that an embedding is most like, with the cosines."""
        order = np.argsort(-self.coordinates[row], kind="stable")[:n].tolist()
        return [(self.names[j], float(self.coordinates[row, j])) for j in order]

    def __str__(self) -> str:
        n, m = self.coordinates.shape
        size = np.abs(self.coordinates).mean(0)
        order = np.argsort(-size, kind="stable")[:SHOWN].tolist()
        table = [["mean |cosine|", "concept"], *([f"{size[j]:.3f}", self.names[j]] for j in order)]
        return "\n".join([f"{n:,} embeddings by {m} concepts", *format_table(table, left=(1,))])


def conceptualize(
    x: Float[np.ndarray, "n d"],
    bank: ConceptBank,
    n_concepts: int,
    *,
    center: bool = True,
) -> ConceptualSpace:
    """Embeddings as cosines with named concepts, chosen from a hierarchy down to a budget (arXiv:2209.00445).

    It begins with the roots. Then the concept with the largest weight is replaced by its children, as long as the
    budget allows: the space is fine where the embeddings are. A concept's weight is the share of embeddings that are
    more like it than like any other of the concepts so far.

    Args:
        x: the embeddings.
        bank: the concepts.
        n_concepts: most concepts; at least the number of roots.
        center: subtract the mean of `x` from embeddings, and the mean of all concepts from these: what all have in
            common, such as the direction in which a model's activations lie, tells nothing apart.

    Raises:
        ValueError: embeddings of another width than the bank's, numbers that are not finite, or a budget below the
            number of roots.
    """
    roots = bank.children(-1)
    if x.shape[1] != bank.vectors.shape[1] or not np.isfinite(x).all() or len(x) == 0:
        raise ValueError(
            f"`x` must be at least one row of {bank.vectors.shape[1]} finite numbers, as wide as the bank's vectors, "
            f"got shape {x.shape}, {int((~np.isfinite(x)).sum())} not finite."
        )
    if n_concepts < len(roots):
        raise ValueError(f"`n_concepts` must be at least the {len(roots)} roots of the bank, got {n_concepts}.")
    vectors = bank.vectors
    if center:
        x, vectors = x - x.mean(0), vectors - vectors.mean(0)
    cosines = _normalize(x) @ _normalize(vectors).T
    chosen, splits = list(roots), list[str]()
    while True:
        nearest = np.array(chosen)[cosines[:, chosen].argmax(1)]
        weights = np.bincount(nearest, minlength=len(bank))
        options = [i for i in chosen if bank.children(i) and len(chosen) - 1 + len(bank.children(i)) <= n_concepts]
        if not options:
            break
        split = max(options, key=lambda i: (int(weights[i]), -i))
        splits.append(bank.names[split])
        at = chosen.index(split)
        chosen[at : at + 1] = bank.children(split)
    return ConceptualSpace(
        concepts=tuple(chosen),
        names=tuple(bank.names[i] for i in chosen),
        coordinates=cosines[:, chosen],
        splits=tuple(splits),
    )


def _normalize(rows: np.ndarray) -> np.ndarray:
    return np.asarray(rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), TINY))


def neighbors_kept(x: Float[np.ndarray, "n d_x"], y: Float[np.ndarray, "n d_y"], n_nearest: int = 10) -> float:
    """Mean share of a row's nearest rows by cosine in `x` that are among its nearest in `y`, 0 to 1.

    Of rows that have nothing to do with each other it is n_nearest / (n - 1) on average.

    Raises:
        ValueError: other rows in `y` than in `x`, or not more than `n_nearest` others.

    >>> x = np.random.default_rng(0).normal(size=(30, 4))
    >>> neighbors_kept(x, 2 * x, 3)
    1.0
    """
    if len(x) != len(y) or not 1 <= n_nearest < len(x):
        raise ValueError(
            f"`x` and `y` must have the same rows and `n_nearest` be 1 to one less, got {len(x)}, {len(y)} rows and "
            f"{n_nearest}."
        )
    a, b = (_normalize(np.asarray(rows, np.float64)) for rows in (x, y))
    kept = 0
    for start in range(0, len(a), BLOCK):
        near = [_nearest(rows, start, n_nearest) for rows in (a, b)]
        kept += int((near[0][:, :, None] == near[1][:, None]).sum())
    return kept / (len(a) * n_nearest)


def _nearest(unit: np.ndarray, start: int, n_nearest: int) -> np.ndarray:
    block = unit[start : start + BLOCK] @ unit.T
    block[np.arange(len(block)), np.arange(start, start + len(block))] = -np.inf
    return np.argpartition(-block, n_nearest - 1, axis=1)[:, :n_nearest]


@dataclass(frozen=True, kw_only=True, eq=False)
class RepresentativePoints(Result):
    """Rows that stand for all others: medoids, each nearest on average to the rows of its own cluster."""

    rows: Int[np.ndarray, "k"]
    """the medoids, that of the largest cluster first"""
    cluster: Int[np.ndarray, "n"]
    """index in `rows` of each row's medoid"""
    similarity: float
    """mean cosine of a row with its medoid"""

    @property
    def sizes(self) -> Int[np.ndarray, "k"]:
        """Number of rows of each cluster."""
        return np.bincount(self.cluster, minlength=len(self.rows))


def representative_points(x: Float[np.ndarray, "n d"], k: int, *, seed: int = 0) -> RepresentativePoints:
    """The `k` rows that stand best for all by cosine: k-medoids, begun as k-means++ does and improved until it stays.

    Args:
        x: embeddings or codes.
        k: number of medoids.
        seed: of the first medoids.

    Raises:
        ValueError: fewer rows than medoids.
    """
    if not 1 <= k <= len(x):
        raise ValueError(f"`k` must be 1 to the number of rows ({len(x)}), got {k}.")
    unit, rng = _normalize(np.asarray(x, np.float64)), np.random.default_rng(seed)
    medoids = _first_medoids(unit, k, rng)
    for _ in range(MAX_ITER):
        cluster = (unit @ unit[medoids].T).argmax(1)
        cluster[medoids] = np.arange(k)  # equal rows may be several medoids
        # The row with the largest mean cosine to a cluster is that nearest to the sum of its rows.
        sums = np.stack([unit[cluster == i].sum(0) for i in range(k)])
        fit = (unit * sums[cluster]).sum(1)
        best = np.array([np.flatnonzero(cluster == i)[fit[cluster == i].argmax()] for i in range(k)])
        if np.array_equal(best, medoids):
            break
        medoids = best
    cluster = (unit @ unit[medoids].T).argmax(1)
    cluster[medoids] = np.arange(k)
    order = np.argsort(-np.bincount(cluster, minlength=k), kind="stable")
    place = np.argsort(order)
    similarity = float((unit * unit[medoids[cluster]]).sum(1).mean())
    return RepresentativePoints(rows=medoids[order], cluster=place[cluster], similarity=similarity)


def _first_medoids(unit: np.ndarray, k: int, rng: np.random.Generator) -> np.ndarray:
    """Rows drawn one after another, each with a probability that grows with its distance from those before."""
    chosen = [int(rng.integers(len(unit)))]
    far = np.maximum(1 - unit @ unit[chosen[0]], 0)
    while len(chosen) < k:
        far[chosen] = 0
        if far.sum() <= TINY:  # only rows that equal a medoid are left
            left = np.setdiff1d(np.arange(len(unit)), chosen)
            chosen += left[: k - len(chosen)].tolist()
            break
        chosen.append(int(rng.choice(len(unit), p=far / far.sum())))
        far = np.minimum(far, np.maximum(1 - unit @ unit[chosen[-1]], 0))
    return np.array(chosen)

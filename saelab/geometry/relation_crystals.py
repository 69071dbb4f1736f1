"""`crystals`: whether pairs of words in one relation differ by one vector, beside pairs that are permuted."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int
from torch import Tensor

from saelab.geometry.group_agreement import REACHES
from saelab.stores.results import Result, find_row, format_spread, format_table

N_FOLDS = 5
SAME = 1e-9  # length of a difference that is none, relative to the vectors
RAW, OUT, RANDOM, FITTED, HELD_OUT = "raw", "distractors out", "random out", "LDA, fitted", "LDA, held out"
LIMITS = (
    "It cannot show that a relation is a translation where its first words are one class and its second words another: "
    "the difference of the classes alone is shared, and pairs permuted within their relation have it, too."
)


@dataclass(frozen=True, kw_only=True)
class CrystalScore:
    """How parallel differences of a relation are, of vectors treated in one way."""

    space: str
    contrast: float
    """mean cosine of two differences of one relation less that of two relations"""
    permuted_pairs: tuple[float, ...]
    """the same with second words permuted within each relation, for each draw"""
    permuted_relations: tuple[float, ...]
    """the same with relations of the pairs permuted, for each draw"""

    @property
    def z(self) -> float:
        """Standard deviations of the contrast above that of permuted pairs; NaN where these do not vary."""
        spread = float(np.std(self.permuted_pairs))
        return (self.contrast - float(np.mean(self.permuted_pairs))) / spread if spread > 0 else math.nan


@dataclass(frozen=True, kw_only=True)
class RelationScore:
    """How parallel the differences of one relation are."""

    name: str
    n_pairs: int
    cosine: float
    """mean cosine of two of its differences; NaN for a single pair"""
    cosine_permuted: float
    """the same with second words permuted, mean over draws"""
    cosine_out: float
    """without the directions of distractors; NaN where there are none"""


@dataclass(frozen=True, kw_only=True)
class Crystals(Result):
    """Parallelism of the differences of pairs in known relations."""

    n_pairs: int
    n_differ: int
    """pairs whose vectors differ: those of other pairs count in no cosine"""
    n_words: int
    n_distractors: int
    n_draws: int
    seed: int
    scores: tuple[CrystalScore, ...]
    relations: tuple[RelationScore, ...]

    def at(self, space: str) -> CrystalScore:
        """The scores of one treatment of the vectors; KeyError for another."""
        return find_row(self.scores, space=space)

    @property
    def failed(self) -> tuple[str, ...]:
        """Nulls that reach half of a contrast, or of what projecting distractors out gains."""
        found, known = [], {score.space: score for score in self.scores}
        for score in self.scores:
            for what in ("permuted_pairs", "permuted_relations"):
                null = float(np.mean(getattr(score, what)))
                if score.space != RANDOM and null >= REACHES * score.contrast:
                    found.append(f"{what.replace('_', ' ')} reach {null:.3f}, of {score.contrast:.3f} ({score.space})")
        if OUT in known:
            raw, out = known[RAW], known[OUT]
            gain = out.contrast - raw.contrast
            permuted = float(np.mean(out.permuted_pairs) - np.mean(raw.permuted_pairs))
            random = known[RANDOM].contrast - raw.contrast
            if permuted >= REACHES * gain:
                found.append(f"without distractors permuted pairs gain {permuted:+.3f}, pairs {gain:+.3f}")
            if random >= REACHES * gain:
                found.append(
                    f"without as many random directions pairs gain {random:+.3f}, without distractors {gain:+.3f}"
                )
        return tuple(found)

    def __str__(self) -> str:
        lines = [f"A null is not passed: {one}" for one in self.failed]
        lines.append(
            f"{self.n_pairs:,} pairs ({self.n_differ:,} of different vectors) of {len(self.relations)} relations, "
            f"{self.n_words:,} words, {self.n_distractors} distractors; {self.n_draws} draws of each null, seed "
            f"{self.seed}"
        )
        table = [["cosine within relations less across", "pairs", "pairs permuted", "z", "relations permuted"]]
        for score in self.scores:
            null = "-" if score.space == RANDOM else format_spread(score.permuted_pairs)
            other = "-" if score.space == RANDOM else format_spread(score.permuted_relations)
            z = "-" if score.z != score.z else f"{score.z:.1f}"
            table.append([score.space, f"{score.contrast:.3f}", null, z, other])
        rows = [["relation", "pairs", "cosine", "permuted", OUT]]
        for row in self.relations:
            figures = (row.cosine, row.cosine_permuted, row.cosine_out)
            rows.append([row.name, str(row.n_pairs), *("-" if x != x else f"{x:.3f}" for x in figures)])
        return "\n".join([*lines, *format_table(table), *format_table(rows), LIMITS])


def crystals(
    vectors: Float[Tensor, "n_words d"] | Float[np.ndarray, "n_words d"],
    pairs: Mapping[str, Sequence[tuple[Any, Any]]],
    *,
    names: Sequence[str] | None = None,
    distractors: Any = None,
    weights: Any = None,
    n_draws: int = 10,
    seed: int = 0,
) -> Crystals:
    """Whether pairs in one relation differ by one vector: mean cosine of differences within relations less across them.

    - "raw": differences b - a of the vectors as they are.
    - "distractors out": without the directions along which words vary with each distractor, `sum_w (x_w - mean x) (c_w
      - mean c)`, over words that are in no pair; "random out" is without as many random directions.
    - "LDA": in the space of a linear discriminant analysis that tells relations apart, of the differences that it was
      fitted on, and of held-out ones with those (5 folds). The first can be high whatever the vectors are.

    Source: arXiv:2410.19750, section 3.

    Args:
        vectors: of words, such as mean activations or decoder rows of their features.
        pairs: for each relation its pairs (a, b), as names, or as rows of `vectors` where there are no `names`.
        names: the word of each row.
        distractors: (n_words, n_distractors) properties that relations are not about, such as length or frequency.
        weights: (n_words,) weight of each word for the directions of distractors, such as its count; None is equal.
        n_draws: draws of each null.
        seed: of draws, random directions and folds.

    Raises:
        ValueError: fewer than two relations, a relation of fewer than three pairs, words that are not there, sizes that
            disagree, or too few words outside of pairs.

    >>> rng = np.random.default_rng(0)
    >>> a = rng.normal(size=(20, 30))
    >>> x, pairs = np.vstack([a, a + np.repeat(rng.normal(size=(2, 30)), 10, axis=0)]), [(i, i + 20) for i in range(20)]
    >>> found = crystals(x, {"first": pairs[:10], "second": pairs[10:]}).at("raw")
    >>> found.contrast > 0.9 > max(found.permuted_pairs)
    True
    """
    x = np.asarray(vectors.detach().cpu() if isinstance(vectors, Tensor) else vectors, np.float64)
    first, second, relation = _read_pairs(pairs, names, len(x))
    if n_draws < 2 or not np.isfinite(x).all():
        raise ValueError(f"`vectors` must be finite and `n_draws` at least 2, got {n_draws} draws; leave words out.")
    spaces, rng = {RAW: x}, np.random.default_rng(seed)
    n_out = 0
    if distractors is not None:
        axes = _distractor_axes(x, distractors, weights, np.concatenate([first, second]))
        n_out = axes.shape[1]
        spaces[OUT] = x - x @ axes @ axes.T
    limit = SAME * float(np.linalg.norm(x - x.mean(0), axis=1).max())

    def measure(b: np.ndarray, groups: np.ndarray) -> dict[str, float]:
        found = {name: _contrast(space[b] - space[first], groups, limit) for name, space in spaces.items()}
        return found | _discriminate(x[b] - x[first], groups, limit, seed)

    shuffled = [second[np.lexsort((rng.random(len(second)), relation))] for _ in range(n_draws)]
    own, by_pairs = measure(second, relation), [measure(b, relation) for b in shuffled]
    by_relations = [measure(second, rng.permutation(relation)) for _ in range(n_draws)]
    scores = [
        CrystalScore(
            space=name,
            contrast=value,
            permuted_pairs=tuple(one[name] for one in by_pairs),
            permuted_relations=tuple(one[name] for one in by_relations),
        )
        for name, value in own.items()
    ]
    if n_out:
        drawn = [np.linalg.qr(rng.standard_normal((x.shape[1], n_out)))[0] for _ in range(n_draws)]
        found = tuple(_contrast((d := x[second] - x[first]) - d @ q @ q.T, relation, limit) for q in drawn)
        random = CrystalScore(
            space=RANDOM, contrast=float(np.mean(found)), permuted_pairs=found, permuted_relations=found
        )
        scores.insert(2, random)
    return Crystals(
        n_pairs=len(first),
        n_differ=int((np.linalg.norm(x[second] - x[first], axis=1) > limit).sum()),
        n_words=len(x),
        n_distractors=n_out,
        n_draws=n_draws,
        seed=seed,
        scores=tuple(scores),
        relations=_by_relation(list(pairs), spaces, (first, second, relation), shuffled, limit),
    )


def _read_pairs(
    pairs: Mapping[str, Sequence[tuple[Any, Any]]], names: Sequence[str] | None, n_words: int
) -> tuple[Int[np.ndarray, "n"], Int[np.ndarray, "n"], Int[np.ndarray, "n"]]:
    """Rows of first and second words, and the number of the relation."""
    if names is not None and len(names) != n_words:
        raise ValueError(f"`names` must be those of the {n_words} rows of `vectors`, got {len(names)}.")
    place = {i: i for i in range(n_words)} if names is None else {name: i for i, name in enumerate(names)}
    sizes = {name: len(found) for name, found in pairs.items()}
    if len(sizes) < 2 or min(sizes.values()) < 3:
        raise ValueError(f"`pairs` must be of at least two relations with three pairs each, got {sizes}.")
    if unknown := [word for found in pairs.values() for pair in found for word in pair if word not in place]:
        raise ValueError(f"Words of `pairs` must be among those of `vectors`, not so: {unknown[:5]}.")
    rows = [(place[a], place[b], r) for r, found in enumerate(pairs.values()) for a, b in found]
    first, second, relation = np.array(rows, np.int64).T
    return first, second, relation


def _distractor_axes(x: np.ndarray, distractors: Any, weights: Any, used: np.ndarray) -> Float[np.ndarray, "d n"]:
    """Orthonormal directions along which words outside of pairs vary with the distractors."""
    known = np.asarray(distractors, np.float64)
    known = known[:, None] if known.ndim == 1 else known
    w = np.ones(len(x)) if weights is None else np.asarray(weights, np.float64).copy()
    if len(known) != len(x) or w.shape != (len(x),) or not np.isfinite(known).all() or not (w >= 0).all():
        raise ValueError(
            f"`distractors` and `weights` must be finite, with a row for each of the {len(x)} words and no weight "
            f"below 0, got shapes {known.shape} and {w.shape}."
        )
    w[used] = 0
    n = known.shape[1]
    if n >= x.shape[1] or (w > 0).sum() <= n:
        raise ValueError(
            f"`distractors` must be fewer than the {x.shape[1]} dimensions and the {int((w > 0).sum())} words outside "
            f"of pairs, got {n}; give vectors of more words."
        )
    off = (known - np.average(known, 0, w)) * w[:, None]
    directions = (x - np.average(x, 0, w)).T @ (off / np.maximum(np.linalg.norm(off, axis=0), 1e-300))
    axes, sizes, _ = np.linalg.svd(directions, full_matrices=False)
    return np.asarray(axes[:, sizes > 1e-9 * max(sizes.max(initial=0), 1e-300)])


def _contrast(d: np.ndarray, groups: np.ndarray, limit: float) -> float:
    return _compare(d, d, groups, groups, limit)


def _compare(a: np.ndarray, b: np.ndarray, of_a: np.ndarray, of_b: np.ndarray, limit: float) -> float:
    """Mean cosine of rows of equal groups less that of others; rows of no length do not count, nor with itself."""
    cosines, known = _cosines(a, b, limit)
    same = of_a[:, None] == of_b
    parts = [cosines[known & chosen] for chosen in (same, ~same)]
    return float(parts[0].mean() - parts[1].mean()) if all(map(len, parts)) else math.nan


def _cosines(a: np.ndarray, b: np.ndarray, limit: float) -> tuple[Float[np.ndarray, "n m"], Bool[np.ndarray, "n m"]]:
    sizes = [np.linalg.norm(one, axis=1) for one in (a, b)]
    known = np.outer(*(size > limit for size in sizes))
    if a is b:
        np.fill_diagonal(known, False)
    return (a @ b.T) / np.maximum(np.outer(*sizes), 1e-300), known


def _discriminate(d: np.ndarray, groups: np.ndarray, limit: float, seed: int) -> dict[str, float]:
    """The contrast in the space of a discriminant analysis of these differences, and of held-out ones with the rest."""
    from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
    from sklearn.model_selection import StratifiedKFold

    if d.shape[1] > len(d):  # differences lie in a space of their own number
        d = d @ np.linalg.qr(d.T)[0]
    n_axes = len(np.unique(groups)) - 1

    def project(train: np.ndarray) -> np.ndarray:
        fitted = LinearDiscriminantAnalysis(solver="eigen", shrinkage="auto").fit(d[train], groups[train])
        return np.asarray(d @ fitted.scalings_[:, :n_axes])

    inside, held = project(np.arange(len(d))), []
    folds = StratifiedKFold(min(N_FOLDS, int(np.bincount(groups).min())), shuffle=True, random_state=seed)
    for train, test in folds.split(d, groups):
        rows = project(train)
        held.append(_compare(rows[test], rows[train], groups[test], groups[train], 0.0))
    return {FITTED: _contrast(inside, groups, 0.0), HELD_OUT: float(np.nanmean(held))}


def _by_relation(
    names: Sequence[str],
    spaces: Mapping[str, np.ndarray],
    words: tuple[np.ndarray, np.ndarray, np.ndarray],
    shuffled: Sequence[np.ndarray],
    limit: float,
) -> tuple[RelationScore, ...]:
    first, second, relation = words

    def mean(space: str, b: np.ndarray, own: np.ndarray) -> float:
        d = spaces[space][b[own]] - spaces[space][first[own]] if space in spaces else np.zeros((0, 1))
        cosines, known = _cosines(d, d, limit)
        return float(cosines[known].mean()) if known.any() else math.nan

    found = []
    for r, name in enumerate(names):
        own = np.flatnonzero(relation == r)
        permuted = float(np.nanmean([mean(RAW, b, own) for b in shuffled]))
        figures = {"cosine": mean(RAW, second, own), "cosine_permuted": permuted, "cosine_out": mean(OUT, second, own)}
        found.append(RelationScore(name=name, n_pairs=len(own), **figures))
    return tuple(found)

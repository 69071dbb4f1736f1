"""Representational similarity of two spaces with paired rows: SVCCA, CKA, RSA, Procrustes and others, with a null.

Row i of `x` and row i of `y` belong together: the decoder rows of a matched pair of features, or the activations at a
token in two models. Pairs that match with a negative sign must be flipped by the caller: pass `y * sign[:, None]`. The
measures alone return NaN where they are undefined; `compare_spaces` gives the reason.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, Shaped
from tqdm.auto import tqdm

from saelab.functional.indices import find_runs, move_blocks
from saelab.functional.screening import largest_first
from saelab.functional.statistics import similarity_ranks
from saelab.stores.jobs import hidden
from saelab.stores.results import Result, format_table

VARIANCE_FRAC = 0.99
"""Share of each side's variance that SVCCA keeps."""
LEADING = 10
"""Number of leading principal components whose span `principal_angles` compares."""
ENOUGH = 5
"""Pairs per component, of both sides together, below which canonical correlations are high by chance."""
SAMPLED_ROWS = 2000
"""Number of rows drawn where a measure compares all rows with each other."""
N_ANCHORS, N_NEIGHBORS = 300, 10
ROUNDING = 1e-7
"""Differences up to this size are rounding errors."""


@dataclass(frozen=True, eq=False)
class SpaceSide:
    """One matrix with its decompositions, computed on first use; nothing here depends on how rows are paired."""

    rows: Float[np.ndarray, "n d"]
    sample: Int[np.ndarray, "m"]
    is_anchor: Bool[np.ndarray, "m"]

    @cached_property
    def is_constant(self) -> bool:
        """Whether all rows are equal."""
        return bool((np.ptp(self.rows, axis=0) <= ROUNDING * np.abs(self.rows).max(0)).all())

    @cached_property
    def centered(self) -> Float[np.ndarray, "n d"]:
        """Centered rows over their largest absolute value: no measure depends on the scale, and no power overflows."""
        centered = self.rows - self.rows.mean(0)
        return centered / np.abs(centered).max()

    @cached_property
    def parts(self) -> tuple[Float[np.ndarray, "n r"], Float[np.ndarray, "r"]]:
        """Principal components of unit norm and their singular values, as many as the rank."""
        u, s, _ = np.linalg.svd(self.centered, full_matrices=False)
        rank = np.count_nonzero(s > s[0] * max(self.rows.shape) * np.finfo(s.dtype).eps)
        return u[:, :rank], s[:rank]

    @cached_property
    def n_kept(self) -> int:
        """Number of components that hold `VARIANCE_FRAC` of the variance."""
        if len(self.rows) == 0 or self.is_constant:
            return 0
        variance = np.cumsum(self.parts[1] ** 2)
        return int(np.searchsorted(variance, VARIANCE_FRAC * variance[-1])) + 1

    @cached_property
    def squares(self) -> Float[np.ndarray, "n"]:
        """Squared norms of the centered rows."""
        return (self.centered**2).sum(1)

    @cached_property
    def hsic(self) -> float:
        """Hilbert-Schmidt criterion of the side with itself."""
        return _hsic(self.squares, self.squares, float((self.parts[1] ** 4).sum()))

    @cached_property
    def flat_rows(self) -> int:
        """Number of sampled rows that are constant, and so correlate with nothing."""
        rows = self.rows[self.sample]
        return int(np.count_nonzero(np.ptp(rows, axis=1) <= ROUNDING * np.abs(rows).max(1)))

    @cached_property
    def ranks(self) -> Float[np.ndarray, "m m"]:
        """Ranks of the correlations of every two rows, with mean 0 and norm 1; all 0 where correlations are equal."""
        return similarity_ranks(self.rows[self.sample])

    @cached_property
    def cosines(self) -> Float[np.ndarray, "m m"]:
        """Cosines of every two rows of the sample."""
        unit = _normalize_rows(self.centered[self.sample])
        return unit @ unit.T

    def relate(self, order: Int[np.ndarray, "m"]) -> Float[np.ndarray, "n_items n_anchors"]:
        """Relative representations: each row's cosines to the anchors, of unit norm, with rows permuted by `order`."""
        return _normalize_rows(self.cosines[np.ix_(order[~self.is_anchor], order[self.is_anchor])])

    @cached_property
    def related(self) -> Float[np.ndarray, "n_items n_anchors"]:
        """Relative representations of the rows in their own order."""
        return self.relate(np.arange(len(self.sample)))

    @cached_property
    def nearest(self) -> Bool[np.ndarray, "n_items n_items"]:
        """Whether each row is among the nearest neighbors of another."""
        found = np.zeros((len(self.related), len(self.related)), bool)
        np.put_along_axis(found, _nearest(self.related), True, axis=1)
        return found


@dataclass(frozen=True, eq=False)
class Paired:
    """Two matrices with paired rows: row i of `x` and row `order[i]` of `y`."""

    x: SpaceSide
    y: SpaceSide
    order: Int[np.ndarray, "n"]

    @classmethod
    def make(cls, x: np.ndarray, y: np.ndarray, rng: "np.random.Generator") -> "Paired":
        """The pairing of row i of `x` with row i of `y`; `rng` draws the sample and the anchors."""
        if x.ndim != 2 or y.ndim != 2 or len(x) != len(y):
            raise ValueError(f"`x` and `y` must have one row a pair, as many on both sides, got {x.shape}, {y.shape}.")
        if not (np.isfinite(x).all() and np.isfinite(y).all()):
            raise ValueError("`x` and `y` must be finite, got NaN or infinity; leave those pairs out.")
        n, m = len(x), min(len(x), SAMPLED_ROWS)
        sample, is_anchor = np.sort(rng.permutation(n)[:m]), np.zeros(m, bool)
        is_anchor[rng.permutation(m)[: min(N_ANCHORS, m // 2)]] = True
        left, right = (SpaceSide(rows.astype(np.float64), sample, is_anchor) for rows in (x, y))
        return cls(left, right, np.arange(n))

    @property
    def n(self) -> int:
        """Number of pairs."""
        return len(self.order)

    @cached_property
    def sampled_order(self) -> Int[np.ndarray, "m"]:
        """The permutation within the sample: the order itself where all rows are sampled."""
        return self.order[self.order < len(self.x.sample)]

    @cached_property
    def cross(self) -> Float[np.ndarray, "r_x r_y"]:
        """Correlations of all principal components of both sides, for most measures all that a permutation changes."""
        return self.x.parts[0].T @ self.y.parts[0][self.order]

    @cached_property
    def related(self) -> Float[np.ndarray, "n_items n_anchors"]:
        """Relative representations of `y` in the order of the pairing."""
        return self.y.relate(self.sampled_order)

    def fault(self, measure: str) -> str:
        """The reason why a measure is undefined for these rows; empty where it is defined."""
        least = {"linear_cka": 4, "relative_agreement": 6, "neighbor_overlap": 6}.get(measure, 3)
        if self.n < least:
            return f"needs {least} pairs"
        for name, side in (("x", self.x), ("y", self.y)):
            if side.is_constant:
                return f"all rows of {name} are equal"
            if measure == "linear_cka" and side.hsic <= 0:
                return f"all rows of {name} are equally far apart"
            if measure == "rsa" and side.flat_rows:
                return f"{side.flat_rows:,} rows of {name} are constant, which correlate with nothing"
            if measure == "rsa" and not side.ranks.any():
                return f"all rows of {name} are equally alike"
        return ""

    def note(self, measure: str) -> str:
        """What a measure was computed from, where that is not all rows, and warnings."""
        n_kept, m = self.x.n_kept + self.y.n_kept, len(self.x.sample)
        if measure == "svcca" and self.n < ENOUGH * n_kept:
            return f"fewer than {ENOUGH} pairs a component: high by chance, read the excess"
        if measure == "principal_angles":
            return "{} and {} leading components".format(*(min(LEADING, len(s.parts[1])) for s in (self.x, self.y)))
        drawn = f"of {m:,} rows" if m < self.n else "of all rows"
        n_anchors = int(self.x.is_anchor.sum())
        if measure == "relative_agreement":
            return f"{n_anchors} anchors {drawn}"
        if measure == "neighbor_overlap":
            return f"{_n_near(m - n_anchors)} nearest, {n_anchors} anchors {drawn}"
        return drawn if measure == "rsa" and m < self.n else ""


def _svcca(paired: Paired) -> float:
    return _mean_cosine(paired.cross[: paired.x.n_kept, : paired.y.n_kept])


def _svcca_one(paired: Paired) -> float:
    return float(abs(paired.cross[0, 0]))


def _principal_angles(paired: Paired) -> float:
    return _mean_cosine(paired.cross[:LEADING, :LEADING])


def _linear_cka(paired: Paired) -> float:
    x, y = paired.x, paired.y
    of_both = _hsic(x.squares, y.squares[paired.order], float((_scaled(paired) ** 2).sum()))
    return of_both / (x.hsic * y.hsic) ** 0.5


def _procrustes(paired: Paired) -> float:
    spread = np.linalg.norm(paired.x.parts[1]) * np.linalg.norm(paired.y.parts[1])
    return float((_singular_sum(_scaled(paired)) / spread) ** 2)


def _rsa(paired: Paired) -> float:
    order = paired.sampled_order
    return float(np.vdot(paired.x.ranks, paired.y.ranks[np.ix_(order, order)])) / 2


def _relative_agreement(paired: Paired) -> float:
    return float((paired.x.related * paired.related).sum(1).mean())


def _neighbor_overlap(paired: Paired) -> float:
    return float(np.take_along_axis(paired.x.nearest, _nearest(paired.related), axis=1).mean())


MEASURES: dict[str, Callable[[Paired], float]] = {
    "svcca": _svcca,
    "svcca_one": _svcca_one,
    "principal_angles": _principal_angles,
    "linear_cka": _linear_cka,
    "procrustes": _procrustes,
    "rsa": _rsa,
    "relative_agreement": _relative_agreement,
    "neighbor_overlap": _neighbor_overlap,
}


def _scaled(paired: Paired) -> Float[np.ndarray, "r_x r_y"]:
    """`X.T @ Y` of the centered rows, but for a rotation of either side."""
    return paired.x.parts[1][:, None] * paired.cross * paired.y.parts[1]


def _hsic(x: np.ndarray, y: np.ndarray, total: float) -> float:
    """Unbiased Hilbert-Schmidt criterion times n (n - 3), of the squared norms of centered rows and `||X.T @ Y||^2`.

    0 where only rounding is left of it.
    """
    n = len(x)
    value = total - float(x @ y) * n / (n - 2) + float(x.sum() * y.sum()) / ((n - 1) * (n - 2))
    return value if abs(value) > ROUNDING * total else 0.0


def _singular_sum(matrix: np.ndarray) -> float:
    """The sum of the singular values; from the smaller Gram matrix, which takes half the time."""
    wide = matrix if len(matrix) <= matrix.shape[1] else matrix.T
    return float(np.sqrt(np.linalg.eigvalsh(wide @ wide.T).clip(min=0)).sum())


def _mean_cosine(cross: np.ndarray) -> float:
    return _singular_sum(cross) / min(cross.shape)


def _normalize_rows(rows: np.ndarray) -> np.ndarray:
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-300)


def _n_near(n_items: int) -> int:
    return int(np.clip(n_items // N_NEIGHBORS, 1, N_NEIGHBORS))


def _nearest(related: np.ndarray) -> Int[np.ndarray, "n_items n_near"]:
    likeness = related @ related.T
    np.fill_diagonal(likeness, -np.inf)
    n_near = _n_near(len(related))
    return largest_first(torch.from_numpy(likeness), n_near).numpy()


@dataclass(frozen=True, kw_only=True)
class SpaceScore:
    """One similarity measure, with its values under shuffled pairings; NaN where it is undefined."""

    value: float
    chance: float
    """mean over shuffled pairings"""
    chance_95: float
    """95th percentile over shuffled pairings"""
    excess: float
    """`value - chance`"""
    p: float
    """share of shuffled pairings that reach the value, which is counted among them; at least 1 / (n_shuffles + 1)"""
    note: str
    """what the value was computed from, a warning, or why it is NaN"""


@dataclass(frozen=True, kw_only=True)
class SpaceComparison(Result):
    """Similarity measures of two spaces by name, each with its null of shuffled pairings."""

    scores: dict[str, SpaceScore]
    n_pairs: int
    n_components: tuple[int, int]
    """number of components that SVCCA keeps of either side; 0 where a side does not vary"""
    n_shuffles: int
    in_blocks: bool = False
    """whether rows were shuffled in blocks of neighbors, as rows of tokens should be"""
    seed: int

    def __getitem__(self, measure: str) -> SpaceScore:
        return self.scores[measure]

    def __str__(self) -> str:
        kept = "{} and {}".format(*self.n_components)
        how = "pairings shuffled in blocks" if self.in_blocks else "shuffled pairings"
        lines = [f"{self.n_pairs:,} pairs, {self.n_shuffles:,} {how}, {kept} components"]
        table = [["", "value", "chance", "95 %", "excess", "p"]]
        for name, score in self.scores.items():
            values = (score.value, score.chance, score.chance_95, score.excess)
            marks = [f"{round(value, 3) + 0.0:.3f}" for value in values]  # + 0.0: no "-0.000"
            table.append([name.replace("_", " "), *marks, self._p(score.p), score.note])
        return "\n".join([*lines, *format_table(table, left=(0, 6))])

    def _p(self, p: float) -> str:
        lowest = self.n_shuffles + 1
        return f"< 1/{lowest}" if round(p * lowest, 6) == 1 else f"{p:.3g}"


def compare_spaces(
    x: Float[np.ndarray, "n_x d_x"],
    y: Float[np.ndarray, "n_y d_y"],
    *,
    doc_ids: Shaped[np.ndarray, "n_rows"] | None = None,
    measures: Iterable[str] | None = None,
    n_shuffles: int = 100,
    seed: int = 0,
    progress: bool = True,
) -> SpaceComparison:
    """Similarity measures of two spaces with paired rows, each with its null distribution over shuffled rows of `y`.

    Every measure is 1 for equal spaces and higher is more alike; most are above 0 by chance, so read the excess. A row
    that stands in several pairs raises all measures: give one-to-one pairs, or report both. Each side is decomposed
    once, so the cost is linear in pairs: 5,000 pairs of 768 numbers and 100 shuffles take a minute on one core.

    Args:
        x: (n, d_x) rows of one space.
        y: (n, d_y) rows of the other space, row i paired with row i of `x`.
        doc_ids: document of each row, where rows are tokens; rows are then shuffled in blocks of neighbors, each
            rotated by a random step, because neighboring tokens are alike and so are not independent samples. None,
            for features, shuffles rows one by one.
        measures: names of the measures, each also a function of `saelab.universality`: "svcca", "svcca_one",
            "principal_angles", "linear_cka", "procrustes", "rsa", "relative_agreement" and "neighbor_overlap"; None
            is all.
        n_shuffles: number of shuffled pairings, at least 1.
        seed: seed of the shuffles, and of samples of rows.
        progress: whether to show a progress bar.

    Raises:
        ValueError: shapes do not fit, values are not finite, or a measure does not exist.

    >>> x = np.random.default_rng(0).normal(size=(200, 8))
    >>> found = compare_spaces(x, 3 * x[:, ::-1], measures=["svcca", "procrustes"], n_shuffles=20)
    >>> round(found["procrustes"].value, 6), round(found["svcca"].p, 3)
    (1.0, 0.048)
    """
    names = list(MEASURES if measures is None else measures)
    unknown = [name for name in names if name not in MEASURES]
    if unknown or not names or n_shuffles < 1:
        raise ValueError(
            f"`measures` must be among {', '.join(MEASURES)}, and `n_shuffles` at least 1, got {names}, {n_shuffles}."
        )
    if doc_ids is not None and len(doc_ids) != len(x):
        raise ValueError(f"`doc_ids` must be one for each of the {len(x)} rows, got {len(doc_ids)}.")
    starts = None if doc_ids is None else find_runs(doc_ids)
    sampling, shuffling = np.random.default_rng(seed).spawn(2)
    paired = Paired.make(x, y, sampling)
    faults = {name: paired.fault(name) for name in names}
    sound = [name for name in names if not faults[name]]
    values = {name: MEASURES[name](paired) for name in sound}
    shuffled: dict[str, list[float]] = {name: [] for name in sound}
    for _ in tqdm(range(n_shuffles if sound else 0), desc="shuffle", delay=2, leave=False, disable=hidden(progress)):
        order = shuffling.permutation(paired.n) if starts is None else move_blocks(starts, paired.n, shuffling)[:]
        other = replace(paired, order=order)
        for name in sound:
            shuffled[name].append(MEASURES[name](other))
    scores = {
        name: _undefined(faults[name]) if faults[name] else _score(values[name], shuffled[name], paired.note(name))
        for name in names
    }
    kept = (paired.x.n_kept, paired.y.n_kept)
    return SpaceComparison(
        scores=scores, n_pairs=paired.n, n_components=kept, n_shuffles=n_shuffles, in_blocks=starts is not None,
        seed=seed,
    )  # fmt: skip


def _score(value: float, shuffled: list[float], note: str) -> SpaceScore:
    chance, reached = float(np.mean(shuffled)), int(np.count_nonzero(np.array(shuffled) >= value - ROUNDING))
    return SpaceScore(
        value=value, chance=chance, chance_95=float(np.quantile(shuffled, 0.95)), excess=value - chance,
        p=(reached + 1) / (len(shuffled) + 1), note=note,
    )  # fmt: skip


def _undefined(reason: str) -> SpaceScore:
    nan = float("nan")
    return SpaceScore(value=nan, chance=nan, chance_95=nan, excess=nan, p=nan, note=reason)


# ---- the measures
def svcca(x: Float[np.ndarray, "n d_x"], y: Float[np.ndarray, "n d_y"]) -> float:
    """Mean canonical correlation of the principal components that hold 99 % of each side's variance, 0 to 1.

    `mean(svdvals(U_x.T @ U_y))`, with `U` the first left singular vectors of the centered rows; the mean is over the
    fewer components. Invariant to rotation, shift and scale of either side. Where pairs are not many times more than
    components it is high for any two spaces, and 1 where they are no more than components. Source: arXiv:1706.05806.

    Row i of `x` is paired with row i of `y`; NaN for fewer than 3 pairs, and where all rows of a side are equal.
    """
    return _measure("svcca", x, y)


def svcca_one(x: Float[np.ndarray, "n d_x"], y: Float[np.ndarray, "n d_y"]) -> float:
    """|Pearson's r| of the two first principal components, 0 to 1: the figure published as SVCCA in arXiv:2410.06981.

    The code behind that paper keeps one component of either side, so its numbers compare with this and not with
    `svcca`. Shuffled pairs give `sqrt(2 / (pi * n))` on average. Pairs and NaN as in `svcca`.
    """
    return _measure("svcca_one", x, y)


def principal_angles(x: Float[np.ndarray, "n d_x"], y: Float[np.ndarray, "n d_y"]) -> float:
    """Mean cosine of the principal angles between the spans of the ten leading components of either side, 0 to 1.

    A compromise between `svcca_one` and `svcca`: hundreds of pairs are enough, and directions of small variance do not
    count. Invariant to rotation, shift and scale. Pairs and NaN as in `svcca`.
    """
    return _measure("principal_angles", x, y)


def linear_cka(x: Float[np.ndarray, "n d_x"], y: Float[np.ndarray, "n d_y"]) -> float:
    """Unbiased linear centered kernel alignment: 1 for equal spaces, 0 on average for unrelated ones.

    `H(x, y) / sqrt(H(x, x) * H(y, y))` with the unbiased estimate H of the Hilbert-Schmidt criterion, computed from
    `X.T @ Y` and the rows' norms, so its cost is linear in n; may fall below 0. Invariant to rotation, shift and scale.
    The plain version is near 1 for any spaces with fewer pairs than dimensions. Sources: arXiv:1905.00414, and
    Song et al. 2012 (JMLR 13) for H.

    Pairs as in `svcca`; NaN for fewer than 4, and where all rows of a side are equal or equally far apart.
    """
    return _measure("linear_cka", x, y)


def procrustes(x: Float[np.ndarray, "n d_x"], y: Float[np.ndarray, "n d_y"]) -> float:
    """Share of the variance of one side that the other explains after shift, rotation and scale, 0 to 1.

    `(sum(svdvals(X.T @ Y)) / (||X|| ||Y||)) ** 2` of centered X and Y: 1 - the relative squared residual of the best
    orthogonal map and scale, the same in both directions. Of unequal widths, the narrower is filled up with zeros.
    Pairs and NaN as in `svcca`.
    """
    return _measure("procrustes", x, y)


def rsa(x: Float[np.ndarray, "n d_x"], y: Float[np.ndarray, "n d_y"], *, seed: int = 0) -> float:
    """Representational similarity analysis: Spearman's rank correlation of the two row-by-row similarity matrices, -1
    to 1.

    Rows are compared by Pearson's r over their coordinates, and every two rows count once. Invariant to scale and shift
    of single rows and to the order of coordinates, not to rotation. Of more than 2,000 rows so many are drawn by
    `seed`. Pairs and NaN as in `svcca`; NaN also where a row is constant, or all rows of a side are equally similar.
    """
    return _measure("rsa", x, y, seed)


def relative_agreement(x: Float[np.ndarray, "n d_x"], y: Float[np.ndarray, "n d_y"], *, seed: int = 0) -> float:
    """Mean cosine of the relative representations of paired rows, -1 to 1.

    A row is represented by its cosines to anchors, which are the same pairs on both sides: 300, or half of the pairs
    where they are fewer, drawn by `seed`, not themselves counted; all centered. Invariant to rotation, shift and
    scale. Of more than 2,000 rows so many are drawn, anchors among them. Source: arXiv:2209.15430.

    Pairs as in `svcca`; NaN for fewer than 6, and where all rows of a side are equal.
    """
    return _measure("relative_agreement", x, y, seed)


def neighbor_overlap(x: Float[np.ndarray, "n d_x"], y: Float[np.ndarray, "n d_y"], *, seed: int = 0) -> float:
    """Mean share of a row's nearest rows that are the same in `x` and `y`, 0 to 1.

    Rows are compared by the cosine of their relative representations: ten neighbors, or a tenth of the rows where
    that is fewer. Anchors, sample, pairs and NaN as in `relative_agreement`.
    """
    return _measure("neighbor_overlap", x, y, seed)


def _measure(name: str, x: np.ndarray, y: np.ndarray, seed: int = 0) -> float:
    paired = Paired.make(x, y, np.random.default_rng(seed).spawn(1)[0])
    return float("nan") if paired.fault(name) else MEASURES[name](paired)

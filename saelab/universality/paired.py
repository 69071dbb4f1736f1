"""`Paired`: two matrices of paired rows, decomposed once, so that a measure of shuffled pairs costs one product."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from jaxtyping import Bool, Float, Int

from saelab.functional.ranking import largest_first

VARIANCE_FRAC = 0.99
"""Share of each side's variance that SVCCA keeps."""
LEADING = 10
"""Principal components whose span `principal_angles` compares."""
ENOUGH = 5
"""Pairs a component, of both sides together, below which canonical correlations are high by chance."""
SAMPLED_ROWS = 2000
"""Rows drawn by seed where a measure compares all rows with each other."""
N_ANCHORS, N_NEIGHBOURS = 300, 10
ROUNDING = 1e-7
"""Differences that say nothing."""


@dataclass(frozen=True, eq=False)
class Side:
    """One matrix, decomposed when first asked; nothing here depends on how the rows are paired."""

    rows: Float[np.ndarray, "n d"]
    sample: Int[np.ndarray, "m"]
    is_anchor: Bool[np.ndarray, "m"]

    @cached_property
    def is_constant(self) -> bool:
        """Whether all rows are equal."""
        return bool((np.ptp(self.rows, axis=0) <= ROUNDING * np.abs(self.rows).max(0)).all())

    @cached_property
    def centred(self) -> Float[np.ndarray, "n d"]:
        """Rows about their mean, in units of the largest number: no measure sees the scale, and no power overflows."""
        centred = self.rows - self.rows.mean(0)
        return centred / np.abs(centred).max()

    @cached_property
    def parts(self) -> tuple[Float[np.ndarray, "n r"], Float[np.ndarray, "r"]]:
        """Principal components with unit norm, and their singular values, as many as there are."""
        u, s, _ = np.linalg.svd(self.centred, full_matrices=False)
        rank = np.count_nonzero(s > s[0] * max(self.rows.shape) * np.finfo(s.dtype).eps)
        return u[:, :rank], s[:rank]

    @cached_property
    def n_kept(self) -> int:
        """Components that hold `VARIANCE_FRAC` of the variance."""
        if len(self.rows) == 0 or self.is_constant:
            return 0
        variance = np.cumsum(self.parts[1] ** 2)
        return int(np.searchsorted(variance, VARIANCE_FRAC * variance[-1])) + 1

    @cached_property
    def squares(self) -> Float[np.ndarray, "n"]:
        """Squared norms of the centred rows."""
        return (self.centred**2).sum(1)

    @cached_property
    def hsic(self) -> float:
        """Of the side with itself."""
        return _hsic(self.squares, self.squares, float((self.parts[1] ** 4).sum()))

    @cached_property
    def flat_rows(self) -> int:
        """Rows of the sample with the same number everywhere, which correlate with nothing."""
        rows = self.rows[self.sample]
        return int(np.count_nonzero(np.ptp(rows, axis=1) <= ROUNDING * np.abs(rows).max(1)))

    @cached_property
    def ranks(self) -> Float[np.ndarray, "m m"]:
        """Of the rows' correlations with each other, every two once: mean 0 and norm 1; all 0 where they are equal."""
        from scipy.stats import rankdata

        likeness = np.corrcoef(self.rows[self.sample])
        below = np.tril_indices(len(likeness), -1)
        ranks = rankdata(likeness[below].round(12))  # equal rows tie, whatever the last bit says
        ranks -= ranks.mean()
        table = np.zeros_like(likeness)
        table[below] = ranks / max(np.linalg.norm(ranks), 1e-300)
        return table + table.T

    @cached_property
    def cosines(self) -> Float[np.ndarray, "m m"]:
        unit = _unit(self.centred[self.sample])
        return unit @ unit.T

    def relate(self, order: Int[np.ndarray, "m"]) -> Float[np.ndarray, "n_items n_anchors"]:
        """Each row's cosines to the anchors, of unit norm, with the rows in another order."""
        return _unit(self.cosines[np.ix_(order[~self.is_anchor], order[self.is_anchor])])

    @cached_property
    def related(self) -> Float[np.ndarray, "n_items n_anchors"]:
        return self.relate(np.arange(len(self.sample)))

    @cached_property
    def nearest(self) -> Bool[np.ndarray, "n_items n_items"]:
        """Whether a row is among the nearest of another."""
        found = np.zeros((len(self.related), len(self.related)), bool)
        np.put_along_axis(found, _nearest(self.related), True, axis=1)
        return found


@dataclass(frozen=True, eq=False)
class Paired:
    """Row i of `x` beside row `order[i]` of `y`."""

    x: Side
    y: Side
    order: Int[np.ndarray, "n"]

    @classmethod
    def make(cls, x: np.ndarray, y: np.ndarray, rng: np.random.Generator) -> "Paired":
        if x.ndim != 2 or y.ndim != 2 or len(x) != len(y):
            raise ValueError(f"`x` and `y` must have one row a pair, as many on both sides, got {x.shape}, {y.shape}.")
        if not (np.isfinite(x).all() and np.isfinite(y).all()):
            raise ValueError("`x` and `y` must be finite, got NaN or infinity; leave those pairs out.")
        n, m = len(x), min(len(x), SAMPLED_ROWS)
        sample, is_anchor = np.sort(rng.permutation(n)[:m]), np.zeros(m, bool)
        is_anchor[rng.permutation(m)[: min(N_ANCHORS, m // 2)]] = True
        left, right = (Side(rows.astype(np.float64), sample, is_anchor) for rows in (x, y))
        return cls(left, right, np.arange(n))

    @property
    def n(self) -> int:
        return len(self.order)

    @cached_property
    def sampled_order(self) -> Int[np.ndarray, "m"]:
        """The shuffle within the sample: the order itself where all rows are in it."""
        return self.order[self.order < len(self.x.sample)]

    @cached_property
    def cross(self) -> Float[np.ndarray, "r_x r_y"]:
        """Correlations of all principal components; all that a shuffle changes for most measures."""
        return self.x.parts[0].T @ self.y.parts[0][self.order]

    @cached_property
    def related(self) -> Float[np.ndarray, "n_items n_anchors"]:
        return self.y.relate(self.sampled_order)

    def fault(self, measure: str) -> str:
        """Why a measure means nothing here, empty where it means something."""
        least = {"linear_cka": 4, "relative_agreement": 6, "neighbour_overlap": 6}.get(measure, 3)
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
        """What a measure was computed from, where that is not all, and warnings."""
        n_kept, m = self.x.n_kept + self.y.n_kept, len(self.x.sample)
        if measure == "svcca" and self.n < ENOUGH * n_kept:
            return f"fewer than {ENOUGH} pairs a component: high by chance, read the excess"
        if measure == "principal_angles":
            return "{} and {} leading components".format(*(min(LEADING, len(s.parts[1])) for s in (self.x, self.y)))
        drawn = f"of {m:,} rows" if m < self.n else "of all rows"
        n_anchors = int(self.x.is_anchor.sum())
        if measure == "relative_agreement":
            return f"{n_anchors} anchors {drawn}"
        if measure == "neighbour_overlap":
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


def _neighbour_overlap(paired: Paired) -> float:
    return float(np.take_along_axis(paired.x.nearest, _nearest(paired.related), axis=1).mean())


MEASURES: dict[str, Callable[[Paired], float]] = {
    "svcca": _svcca,
    "svcca_one": _svcca_one,
    "principal_angles": _principal_angles,
    "linear_cka": _linear_cka,
    "procrustes": _procrustes,
    "rsa": _rsa,
    "relative_agreement": _relative_agreement,
    "neighbour_overlap": _neighbour_overlap,
}


def _scaled(paired: Paired) -> Float[np.ndarray, "r_x r_y"]:
    """`X.T @ Y` of the centred rows, but for a rotation of either side."""
    return paired.x.parts[1][:, None] * paired.cross * paired.y.parts[1]


def _hsic(x: np.ndarray, y: np.ndarray, total: float) -> float:
    """Unbiased Hilbert-Schmidt criterion times n (n - 3), of the squared norms of centred rows and `||X.T @ Y||^2`.

    0 where only rounding is left of it.
    """
    n = len(x)
    value = total - float(x @ y) * n / (n - 2) + float(x.sum() * y.sum()) / ((n - 1) * (n - 2))
    return value if abs(value) > ROUNDING * total else 0.0


def _singular_sum(matrix: np.ndarray) -> float:
    """Of the singular values; by the smaller square, which takes half the time."""
    wide = matrix if len(matrix) <= matrix.shape[1] else matrix.T
    return float(np.sqrt(np.linalg.eigvalsh(wide @ wide.T).clip(min=0)).sum())


def _mean_cosine(cross: np.ndarray) -> float:
    return _singular_sum(cross) / min(cross.shape)


def _unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-300)


def _n_near(n_items: int) -> int:
    return int(np.clip(n_items // N_NEIGHBOURS, 1, N_NEIGHBOURS))


def _nearest(related: np.ndarray) -> Int[np.ndarray, "n_items n_near"]:
    likeness = related @ related.T
    np.fill_diagonal(likeness, -np.inf)
    n_near = _n_near(len(related))
    return largest_first(torch.from_numpy(likeness), n_near).numpy()

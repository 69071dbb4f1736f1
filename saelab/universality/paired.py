"""Representational similarity measures of two matrices with paired rows, decomposed once for many permutations."""

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
"""Number of leading principal components whose span `principal_angles` compares."""
ENOUGH = 5
"""Pairs per component, of both sides together, below which canonical correlations are high by chance."""
SAMPLED_ROWS = 2000
"""Number of rows drawn where a measure compares all rows with each other."""
N_ANCHORS, N_NEIGHBOURS = 300, 10
ROUNDING = 1e-7
"""Differences up to this size are rounding errors."""


@dataclass(frozen=True, eq=False)
class Side:
    """One matrix with its decompositions, computed on first use; nothing here depends on how rows are paired."""

    rows: Float[np.ndarray, "n d"]
    sample: Int[np.ndarray, "m"]
    is_anchor: Bool[np.ndarray, "m"]

    @cached_property
    def is_constant(self) -> bool:
        """Whether all rows are equal."""
        return bool((np.ptp(self.rows, axis=0) <= ROUNDING * np.abs(self.rows).max(0)).all())

    @cached_property
    def centred(self) -> Float[np.ndarray, "n d"]:
        """Centred rows, divided by their largest absolute value: no measure depends on the scale, and no power
        overflows.
        """
        centred = self.rows - self.rows.mean(0)
        return centred / np.abs(centred).max()

    @cached_property
    def parts(self) -> tuple[Float[np.ndarray, "n r"], Float[np.ndarray, "r"]]:
        """Principal components of unit norm and their singular values, as many as the rank."""
        u, s, _ = np.linalg.svd(self.centred, full_matrices=False)
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
        """Squared norms of the centred rows."""
        return (self.centred**2).sum(1)

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
        from scipy.stats import rankdata

        likeness = np.corrcoef(self.rows[self.sample])
        below = np.tril_indices(len(likeness), -1)
        ranks = rankdata(likeness[below].round(12))  # equal rows tie despite rounding errors
        ranks -= ranks.mean()
        table = np.zeros_like(likeness)
        table[below] = ranks / max(np.linalg.norm(ranks), 1e-300)
        return table + table.T

    @cached_property
    def cosines(self) -> Float[np.ndarray, "m m"]:
        """Cosines of every two rows of the sample."""
        unit = _unit(self.centred[self.sample])
        return unit @ unit.T

    def relate(self, order: Int[np.ndarray, "m"]) -> Float[np.ndarray, "n_items n_anchors"]:
        """Relative representations: each row's cosines to the anchors, of unit norm, with rows permuted by `order`."""
        return _unit(self.cosines[np.ix_(order[~self.is_anchor], order[self.is_anchor])])

    @cached_property
    def related(self) -> Float[np.ndarray, "n_items n_anchors"]:
        """Relative representations of the rows in their own order."""
        return self.relate(np.arange(len(self.sample)))

    @cached_property
    def nearest(self) -> Bool[np.ndarray, "n_items n_items"]:
        """Whether each row is among the nearest neighbours of another."""
        found = np.zeros((len(self.related), len(self.related)), bool)
        np.put_along_axis(found, _nearest(self.related), True, axis=1)
        return found


@dataclass(frozen=True, eq=False)
class Paired:
    """Two matrices with paired rows: row i of `x` and row `order[i]` of `y`."""

    x: Side
    y: Side
    order: Int[np.ndarray, "n"]

    @classmethod
    def make(cls, x: np.ndarray, y: np.ndarray, rng: np.random.Generator) -> "Paired":
        """The pairing of row i of `x` with row i of `y`; `rng` draws the sample and the anchors."""
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
        """Number of pairs."""
        return len(self.order)

    @cached_property
    def sampled_order(self) -> Int[np.ndarray, "m"]:
        """The permutation within the sample: the order itself where all rows are sampled."""
        return self.order[self.order < len(self.x.sample)]

    @cached_property
    def cross(self) -> Float[np.ndarray, "r_x r_y"]:
        """Correlations of all principal components of both sides; for most measures the only part that a permutation
        changes.
        """
        return self.x.parts[0].T @ self.y.parts[0][self.order]

    @cached_property
    def related(self) -> Float[np.ndarray, "n_items n_anchors"]:
        """Relative representations of `y` in the order of the pairing."""
        return self.y.relate(self.sampled_order)

    def fault(self, measure: str) -> str:
        """The reason why a measure is undefined for these rows; empty where it is defined."""
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
    """The sum of the singular values; from the smaller Gram matrix, which takes half the time."""
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

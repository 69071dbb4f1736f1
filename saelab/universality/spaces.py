"""Representational similarity of two spaces with paired rows: SVCCA, CKA, RSA, Procrustes and others, with a null.

Row i of `x` and row i of `y` belong together: the decoder rows of a matched pair of features, or the activations at a
token in two models. Pairs that match with a negative sign must be flipped by the caller: pass `y * sign[:, None]`. The
measures alone return NaN where they are undefined; `compare_spaces` gives the reason.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Float, Shaped
from tqdm.auto import tqdm

from saelab.functional.permuting import find_runs, move_blocks
from saelab.stores.progress import hidden
from saelab.stores.results import Result
from saelab.universality.paired import MEASURES, ROUNDING, Paired


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
    """whether rows were shuffled in blocks of neighbours, as rows of tokens should be"""
    seed: int

    def __getitem__(self, measure: str) -> SpaceScore:
        return self.scores[measure]

    def __str__(self) -> str:
        kept = "{} and {}".format(*self.n_components)
        how = "pairings shuffled in blocks" if self.in_blocks else "shuffled pairings"
        lines = [f"{self.n_pairs:,} pairs, {self.n_shuffles:,} {how}, {kept} components"]
        lines.append(f"{'':<19}{'value':>8}{'chance':>8}{'95 %':>8}{'excess':>8}{'p':>10}")
        for name, score in self.scores.items():
            values = (score.value, score.chance, score.chance_95, score.excess)
            marks = "".join(f"{round(value, 3) + 0.0:>8.3f}" for value in values)  # + 0.0: no "-0.000"
            lines.append(f"{name.replace('_', ' '):<19}{marks}{self._p(score.p):>10}  {score.note}".rstrip())
        return "\n".join(lines)

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
        doc_ids: document of each row, where rows are tokens; rows are then shuffled in blocks of neighbours, each
            rotated by a random step, because neighbouring tokens are alike and so are not independent samples. None,
            for features, shuffles rows one by one.
        measures: names among `MEASURES`; None computes all.
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

    `mean(svdvals(U_x.T @ U_y))`, with `U` the first left singular vectors of the centred rows; the mean is over the
    fewer components. Invariant to rotation, shift and scale of either side. Where pairs are not many times more than
    components it is high for any two spaces, and 1 where they are no more than components. Source: arXiv:1706.05806.
    """
    return _measure("svcca", x, y)


def svcca_one(x: Float[np.ndarray, "n d_x"], y: Float[np.ndarray, "n d_y"]) -> float:
    """|Pearson's r| of the two first principal components, 0 to 1: the figure published as SVCCA in arXiv:2410.06981.

    The code behind that paper keeps one component of either side, so its numbers compare with this and not with
    `svcca`. Shuffled pairs give `sqrt(2 / (pi * n))` on average.
    """
    return _measure("svcca_one", x, y)


def principal_angles(x: Float[np.ndarray, "n d_x"], y: Float[np.ndarray, "n d_y"]) -> float:
    """Mean cosine of the principal angles between the spans of the ten leading components of either side, 0 to 1.

    A compromise between `svcca_one` and `svcca`: hundreds of pairs are enough, and directions of small variance do not
    count. Invariant to rotation, shift and scale.
    """
    return _measure("principal_angles", x, y)


def linear_cka(x: Float[np.ndarray, "n d_x"], y: Float[np.ndarray, "n d_y"]) -> float:
    """Unbiased linear centred kernel alignment: 1 for equal spaces, 0 on average for unrelated ones.

    `H(x, y) / sqrt(H(x, x) * H(y, y))` with the unbiased estimate H of the Hilbert-Schmidt criterion, computed from
    `X.T @ Y` and the rows' norms, so its cost is linear in n; may fall below 0. Invariant to rotation, shift and scale.
    The plain version is near 1 for any spaces with fewer pairs than dimensions. Sources: arXiv:1905.00414, and
    Song et al. 2012 (JMLR 13) for H.
    """
    return _measure("linear_cka", x, y)


def procrustes(x: Float[np.ndarray, "n d_x"], y: Float[np.ndarray, "n d_y"]) -> float:
    """Share of the variance of one side that the other explains after shift, rotation and scale, 0 to 1.

    `(sum(svdvals(X.T @ Y)) / (||X|| ||Y||)) ** 2` of centred X and Y: 1 - the relative squared residual of the best
    orthogonal map and scale, the same in both directions. Of unequal widths, the narrower is filled up with zeros.
    """
    return _measure("procrustes", x, y)


def rsa(x: Float[np.ndarray, "n d_x"], y: Float[np.ndarray, "n d_y"], *, seed: int = 0) -> float:
    """Representational similarity analysis: Spearman's rank correlation of the two row-by-row similarity matrices, -1
    to 1.

    Rows are compared by Pearson's r over their coordinates, and every two rows count once. Invariant to scale and shift
    of single rows and to the order of coordinates, not to rotation. Of many rows 2,000 are drawn by `seed`.
    """
    return _measure("rsa", x, y, seed)


def relative_agreement(x: Float[np.ndarray, "n d_x"], y: Float[np.ndarray, "n d_y"], *, seed: int = 0) -> float:
    """Mean cosine of the relative representations of paired rows, -1 to 1.

    A row is represented by its cosines to anchors, which are the same pairs on both sides: 300, or half of the pairs
    where they are fewer, drawn by `seed`, not themselves counted; all centred. Invariant to rotation, shift and
    scale. Of many rows 2,000 are drawn, anchors among them. Source: arXiv:2209.15430.
    """
    return _measure("relative_agreement", x, y, seed)


def neighbour_overlap(x: Float[np.ndarray, "n d_x"], y: Float[np.ndarray, "n d_y"], *, seed: int = 0) -> float:
    """Share of a row's nearest rows that are the same on both sides, 0 to 1, by cosine of relative representations.

    Ten neighbours, or a tenth of the rows where that is fewer; see `relative_agreement`.
    """
    return _measure("neighbour_overlap", x, y, seed)


def _measure(name: str, x: np.ndarray, y: np.ndarray, seed: int = 0) -> float:
    paired = Paired.make(x, y, np.random.default_rng(seed).spawn(1)[0])
    return float("nan") if paired.fault(name) else MEASURES[name](paired)

"""`association_test`: whether two sets of words differ in their similarity to two sets of attributes (WEAT)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
from jaxtyping import Float
from torch import Tensor

from saelab.functional.metrics import exact
from saelab.stores.results import Result

Alternative = Literal["greater", "two-sided"]
"""Whether words of the first set are expected nearer to the first attributes, or nothing is"""
LEVEL = 0.05
BATCH = 2000  # partitions held at a time
LIMITS = (
    "It cannot show that a difference is about the attributes' meaning: whatever else sets their two lists apart "
    "counts as well. Effect sizes are in deviations of these words, and grow where words of one list are alike."
)


@dataclass(frozen=True, kw_only=True)
class AssociationTest(Result):
    """Difference of two sets of words in their similarity to two sets of attributes, with two permutation nulls."""

    effect: float
    """difference of the two sets in mean association, over the standard deviation of all words: -2 to 2 for sets of one
    size"""
    statistic: float
    """the same difference in cosines"""
    p: float
    """share of partitions of the words into sets of the same sizes whose statistic is as large"""
    p_attributes: float
    """the same for partitions of the attributes"""
    n_partitions: tuple[int, int]
    """partitions of the words and of the attributes"""
    is_exact: tuple[bool, bool]
    """whether these are all that there are"""
    sizes: tuple[int, int, int, int]
    """words of both sets, attributes of both"""
    alternative: Alternative
    seed: int

    @property
    def failed(self) -> tuple[str, ...]:
        """Nulls that are no less extreme than the statistic in more than 1 of 20 partitions."""
        told = (("words", self.p), ("attributes", self.p_attributes))
        return tuple(f"{what} permuted reach it with p {p:.3f}" for what, p in told if not p <= LEVEL)

    def __str__(self) -> str:
        x, y, a, b = self.sizes
        counted = [
            f"{'all' if all_of else 'random'} {n:,} partitions of {what}"
            for n, all_of, what in zip(self.n_partitions, self.is_exact, ("words", "attributes"), strict=True)
        ]
        return "\n".join(
            [
                *(f"A null is not passed: {one}" for one in self.failed),
                f"effect size {self.effect:+.2f}, difference of cosines {self.statistic:+.4f} ({self.alternative}): "
                f"p {self.p:.4f} with words permuted, {self.p_attributes:.4f} with attributes permuted",
                f"{x} and {y} words, {a} and {b} attributes; {', '.join(counted)}, seed {self.seed}",
                LIMITS,
            ]
        )


def association_test(
    vectors_x: Float[Tensor, "n_x d"] | Float[np.ndarray, "n_x d"],
    vectors_y: Float[Tensor, "n_y d"] | Float[np.ndarray, "n_y d"],
    attributes_a: Float[Tensor, "n_a d"] | Float[np.ndarray, "n_a d"],
    attributes_b: Float[Tensor, "n_b d"] | Float[np.ndarray, "n_b d"],
    *,
    alternative: Alternative = "greater",
    n_permutations: int = 20_000,
    seed: int = 0,
) -> AssociationTest:
    """Whether words x are nearer to attributes a, and words y to attributes b: the word embedding association test.

        s(w) = mean_a cos(w, a) - mean_b cos(w, b)
        statistic = mean_x s - mean_y s,    effect = statistic / std(s of all words), which divides by their number

    p counts partitions of the words with a statistic as large, all of them where there are at most `n_permutations`,
    else as many random ones and the true one. `p_attributes` exchanges attributes between their sets in the same way:
    words of two topics can be told apart along most directions, by attributes that have nothing to do with them.

    Source: Caliskan et al. 2017, arXiv:1608.07187.

    Args:
        vectors_x: (n_x, d) vectors of the first words.
        vectors_y: (n_y, d) of the second words.
        attributes_a: (n_a, d) of the first attributes.
        attributes_b: (n_b, d) of the second attributes.
        alternative: "greater" for the difference as written, "two-sided" for both.
        n_permutations: most partitions of each null.
        seed: of random partitions.

    Raises:
        ValueError: fewer than two vectors in a set, widths that differ, values that are not finite, vectors of length
            0, or words whose associations are all the same.

    >>> x, y = torch.eye(8)[[0, 0, 0, 0]] + torch.eye(8)[2:6], torch.eye(8)[[1, 1, 1, 1]] + torch.eye(8)[2:6]
    >>> test = association_test(x, y, x.flip(0), y.flip(0))
    >>> round(test.effect, 2), round(test.p * math.comb(8, 4))
    (2.0, 1)
    """
    if alternative not in get_args(Alternative) or n_permutations < 19:
        raise ValueError(
            f"`alternative` must be one of {get_args(Alternative)} and `n_permutations` at least 19, got "
            f"'{alternative}' and {n_permutations}."
        )
    given = {"vectors_x": vectors_x, "vectors_y": vectors_y, "attributes_a": attributes_a, "attributes_b": attributes_b}
    x, y, a, b = (_normalize_rows(value, name) for name, value in given.items())
    if len({one.shape[1] for one in (x, y, a, b)}) > 1:
        raise ValueError(f"Vectors must have one width, got {[one.shape[1] for one in (x, y, a, b)]}; read one layer.")
    words = [one @ (a.mean(0) - b.mean(0)) for one in (x, y)]
    attributes = [one @ (x.mean(0) - y.mean(0)) for one in (a, b)]
    spread = float(np.concatenate(words).std())
    if spread <= 1e-12:
        raise ValueError("Words must differ in their association with the attributes; theirs are all the same.")
    statistic = float(words[0].mean() - words[1].mean())
    p, n, all_of = zip(
        *(_permute(pair, alternative, n_permutations, seed) for pair in (words, attributes)), strict=True
    )
    return AssociationTest(
        effect=statistic / spread,
        statistic=statistic,
        p=p[0],
        p_attributes=p[1],
        n_partitions=n,
        is_exact=all_of,
        sizes=(len(x), len(y), len(a), len(b)),
        alternative=alternative,
        seed=seed,
    )


def _normalize_rows(value: Any, name: str, least: int = 2) -> Float[np.ndarray, "n d"]:
    """Vectors as rows of length 1 in float64; ValueError unless there are `least`, all finite and of some length."""
    rows = read_rows(value, name, least)
    sizes = np.linalg.norm(rows, axis=1, keepdims=True)
    if not (sizes > 0).all():
        raise ValueError(f"`{name}` must be vectors that have a direction, got {int((sizes == 0).sum())} of length 0.")
    return np.asarray(rows / sizes)


def read_rows(value: Any, name: str, least: int = 2) -> Float[np.ndarray, "n d"]:
    """Vectors in float64; ValueError unless there are `least` rows of finite values."""
    rows = exact(value.detach().cpu()).numpy() if isinstance(value, Tensor) else np.asarray(value, np.float64)
    if rows.ndim != 2 or len(rows) < least or not np.isfinite(rows).all():
        raise ValueError(f"`{name}` must be at least {least} rows of finite values, got shape {rows.shape}.")
    return rows


def _permute(
    sets: Sequence[np.ndarray], alternative: Alternative, n_permutations: int, seed: int
) -> tuple[float, int, bool]:
    """p of the difference of two means, how many partitions it counts, and whether these are all."""
    from scipy.stats import permutation_test

    n_all = math.comb(sum(map(len, sets)), len(sets[0]))
    found = permutation_test(
        tuple(sets),
        _subtract_means,
        vectorized=True,
        n_resamples=n_permutations,
        batch=BATCH,
        alternative="greater",
        random_state=np.random.default_rng(seed),
    )
    draws, own = np.asarray(found.null_distribution), float(found.statistic)
    if alternative == "two-sided":
        draws, own = np.abs(draws), abs(own)
    n_as_large = int((draws >= own - 1e-9 * max(abs(own), 1e-12)).sum())
    is_exact = n_all <= n_permutations
    return ((n_as_large + (not is_exact)) / (len(draws) + (not is_exact)), len(draws), is_exact)


def _subtract_means(first: np.ndarray, second: np.ndarray, axis: int = -1) -> np.ndarray:
    return np.asarray(first.mean(axis) - second.mean(axis))

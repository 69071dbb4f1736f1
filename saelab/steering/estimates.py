"""`Estimate` and `Best`: values with bootstrap intervals, or with the reason why there are none."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from saelab.evaluation.bootstrap import find_reach

NAN = float("nan")
N_DRAWS = 500


@dataclass(frozen=True)
class Estimate:
    """A value with its 95 % interval; NaN where there is none, with the reason.

    >>> str(Estimate(1.0, 0.5, 1.5))
    '1 [0.5, 1.5]'
    """

    value: float
    low: float = NAN
    high: float = NAN
    reason: str = ""
    """why there is no value"""

    def __neg__(self) -> "Estimate":
        return Estimate(0.0 - self.value, 0.0 - self.high, 0.0 - self.low, self.reason)

    def __str__(self) -> str:
        if self.value != self.value:
            return "-"
        return f"{self.value:.2g}" + (f" [{self.low:.2g}, {self.high:.2g}]" if self.low == self.low else "")


@dataclass(frozen=True)
class Best:
    """The strength chosen on every other prompt for its balance of effect and fluency, with its scores on the rest.

    The score is the harmonic mean of effect and fluency, each in [0, 1]. The effect is `1 - exp(-gain)` (for a scored
    concept the increase of the score), the fluency `exp(-extra nll) (1 - extra repetition)`. An nll or repetition lower
    than unsteered text's counts as no difference: repetitive text is likely, but broken. A decrease counts as no
    effect, so score and effect are above 0 by chance alone: evidence of an effect is `effect_low` above 0.
    """

    strength: float
    score: float
    """on the rest of the prompts"""
    effect: float
    fluency: float
    chosen_score: float
    """on the prompts that the strength was chosen on"""
    reason: str = ""
    """why no strength was chosen"""
    effect_low: float = NAN
    """lower end of the effect's 95 % interval on the prompts it is measured on; below 0 for a decrease; NaN for one
    prompt"""
    effect_high: float = NAN
    """upper end"""

    @classmethod
    def none(cls, reason: str) -> "Best":
        """The value where no strength can be chosen, with the reason."""
        return cls(NAN, NAN, NAN, NAN, NAN, reason)


def make_estimates(
    values: Float[np.ndarray, "n"],
    draws: Float[np.ndarray, "n n_draws"],
    n_clusters: int,
    reason: str = "",
    n_groups: int = 1,
) -> list[Estimate]:
    """Values with their 95 % intervals, from bootstrap draws by `find_reach`.

    Args:
        values: the numbers themselves.
        draws: the same numbers with clusters drawn with replacement; NaN is left out.
        n_clusters: number of clusters to draw from, such as prompts.
        reason: why a number is NaN.
        n_groups: number of groups that clusters were drawn within.
    """
    reach = find_reach(draws, n_clusters, n_groups)
    return [
        Estimate(value, value - half, value + half, reason)
        for value, half in zip(values.tolist(), reach.tolist(), strict=True)
    ]


def draw_weights(n: int, n_draws: int = N_DRAWS, seed: int = 0) -> Float[np.ndarray, "n_draws n"]:
    """Bootstrap weights: how often each of `n` items is drawn with replacement; NaN where there is only one item.

    >>> draw_weights(4, 2).sum(1).tolist()
    [4.0, 4.0]
    """
    if n < 2:
        return np.full((1, n), NAN)
    return np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), n_draws).astype(float)

"""`Estimate` and `Best`: values with bootstrap intervals, or with the reason why there are none."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from saelab.evaluation.bootstrap import LEVEL

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
    than unsteered text's counts as no difference: repetitive text is likely, but broken.
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

    @classmethod
    def none(cls, reason: str) -> "Best":
        """The value where no strength can be chosen, with the reason."""
        return cls(NAN, NAN, NAN, NAN, NAN, reason)


def make_estimates(
    values: Float[np.ndarray, "n"], draws: Float[np.ndarray, "n n_draws"], reason: str = ""
) -> list[Estimate]:
    """Values with the 95 % intervals of their bootstrap draws; draws that are NaN are left out."""
    tail = (1 - LEVEL) / 2
    low, high = np.full_like(values, NAN), np.full_like(values, NAN)
    known = ~np.isnan(draws).all(1)
    if known.any():
        low[known], high[known] = np.nanquantile(draws[known], [tail, 1 - tail], axis=1)
    return [Estimate(*ends, reason) for ends in zip(values.tolist(), low.tolist(), high.tolist(), strict=True)]


def draw_weights(n: int, n_draws: int = N_DRAWS) -> Float[np.ndarray, "n_draws n"]:
    """Bootstrap weights: how often each of `n` items is drawn with replacement; NaN where there is only one item.

    >>> draw_weights(4, 2).sum(1).tolist()
    [4.0, 4.0]
    """
    if n < 2:
        return np.full((1, n), NAN)
    return np.random.default_rng(0).multinomial(n, np.full(n, 1 / n), n_draws).astype(float)

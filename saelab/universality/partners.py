"""Best partners of one dictionary's features in another, with p values and universal shares."""

from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
from jaxtyping import Bool, Float, Int

from saelab.universality.nearest import Nearest

By = Literal["count", "frequency", "variance"]
BY: tuple[By, ...] = get_args(By)


@dataclass(frozen=True, kw_only=True)
class Untrained:
    """Similarities and universal shares when one of the two dictionaries is untrained, of the same shape on the same
    tokens.
    """

    level: float
    """95th percentile of the live features' best similarities there; universal features must reach it"""
    median: float
    shares: dict[str, float]
    """universal share there, by number, by firings and by variance, tested against chance only"""
    trained: dict[str, float]
    """the same shares of this side's trained dictionary, tested against chance only: compare with `shares`"""

    def to_dict(self) -> dict[str, Any]:
        """All fields, ready for JSON."""
        return {"level": self.level, "median": self.median, "shares": self.shares, "trained": self.trained}


@dataclass(frozen=True, kw_only=True, eq=False)
class Matches:
    """The best partner of each feature of one dictionary in the other; -1 and NaN where there is none."""

    fires: Int[np.ndarray, "d"]
    """number of rows on which each feature fires"""
    variance: Float[np.ndarray, "d"]
    """sum of squared deviations of each feature's codes from their mean; 1 for directions"""
    partners: Int[np.ndarray, "d"]
    """the feature of the other dictionary with the largest similarity"""
    similarity: Float[np.ndarray, "d"]
    n_both: Int[np.ndarray, "d"]
    """number of rows on which both fire; -1 for directions"""
    p: Float[np.ndarray, "d"]
    """probability of so large a similarity under the null; never 0"""
    q: Float[np.ndarray, "d"]
    """smallest false discovery rate at which the match is significant, among all features that fire"""
    universal: Bool[np.ndarray, "d"]
    """whether the match is significant, reaches the minimum effect, and the level of untrained dictionaries where those
    were compared"""
    chance: tuple[float, float]
    """median and 95th percentile of the best similarity under the null; NaN where it was not measured"""
    nearest: Nearest
    """the m best, before significance and counts are tested"""
    untrained: Untrained | None = None
    """matches with an untrained dictionary; None where none was compared"""

    @property
    def live(self) -> Bool[np.ndarray, "d"]:
        """Whether each feature fires at all."""
        return self.fires > 0

    def share(self, by: By = "count") -> float:
        """Share of universal features among those that fire: by number, by firings or by variance; NaN if none fire."""
        weights = {"count": self.live.astype(float), "frequency": self.fires.astype(float), "variance": self.variance}
        total = float(weights[by][self.live].sum())
        return float(weights[by][self.universal].sum()) / total if total else float("nan")

    def to_dict(self) -> dict[str, Any]:
        """All fields, ready for JSON, without the m best."""
        names = ("fires", "variance", "partners", "similarity", "n_both", "p", "q", "universal")
        found = {name: getattr(self, name).tolist() for name in names} | {"chance": list(self.chance)}
        return found | {"untrained": None if self.untrained is None else self.untrained.to_dict()}

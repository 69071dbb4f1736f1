"""`Matches`: the features of one dictionary with their best partners in another."""

from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
from jaxtyping import Bool, Float, Int

from saelab.universality.nearest import Nearest

By = Literal["count", "frequency", "variance"]
BY: tuple[By, ...] = get_args(By)


@dataclass(frozen=True, kw_only=True)
class Untrained:
    """What is shared where one of the two dictionaries is an untrained one, of the same shape on the same tokens."""

    level: float
    """which 5 % of the live features' best similarities exceed there: what is universal reaches it"""
    median: float
    shares: dict[str, float]
    """that would be universal there, by number, by firings and by variance, were chance the only floor"""
    trained: dict[str, float]
    """of this side that would be, were chance the only floor: to be read beside `shares`"""

    def to_dict(self) -> dict[str, Any]:
        """Everything, ready for JSON."""
        return {"level": self.level, "median": self.median, "shares": self.shares, "trained": self.trained}


@dataclass(frozen=True, kw_only=True, eq=False)
class Matches:
    """The features of one dictionary with their best partners in the other; -1 and NaN where there is none."""

    fires: Int[np.ndarray, "d"]
    """rows on which each fires"""
    variance: Float[np.ndarray, "d"]
    """sum of squares about the mean of its codes; 1 for directions"""
    partners: Int[np.ndarray, "d"]
    """the feature of the other dictionary with the largest similarity"""
    similarity: Float[np.ndarray, "d"]
    n_both: Int[np.ndarray, "d"]
    """rows on which both fire; -1 for directions"""
    p: Float[np.ndarray, "d"]
    """how often chance gives so much; never 0"""
    q: Float[np.ndarray, "d"]
    """false discovery rate at which it counts, among all that fire"""
    universal: Bool[np.ndarray, "d"]
    """beats chance, has the effect asked for, and reaches what untrained dictionaries do, where those were compared"""
    chance: tuple[float, float]
    """median and 95 % of the best similarity where nothing is in common; NaN where it was not measured"""
    nearest: Nearest
    """the m best, before chance and counts are looked at"""
    untrained: Untrained | None = None
    """what an untrained dictionary shares; None where none was compared"""

    @property
    def live(self) -> Bool[np.ndarray, "d"]:
        """What fires at all."""
        return self.fires > 0

    def share(self, by: By = "count") -> float:
        """Share of universal features among those that fire: by number, by firings or by variance; NaN if none fire."""
        weights = {"count": self.live.astype(float), "frequency": self.fires.astype(float), "variance": self.variance}
        total = float(weights[by][self.live].sum())
        return float(weights[by][self.universal].sum()) / total if total else float("nan")

    def to_dict(self) -> dict[str, Any]:
        """Everything but the m best, ready for JSON."""
        names = ("fires", "variance", "partners", "similarity", "n_both", "p", "q", "universal")
        found = {name: getattr(self, name).tolist() for name in names} | {"chance": list(self.chance)}
        return found | {"untrained": None if self.untrained is None else self.untrained.to_dict()}

"""What untrained dictionaries share: the floor that stands beside chance."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool

from saelab.universality.partners import BY, Matches, Untrained

LEVEL = 0.95


def measure_floor(side: Matches, beside: Sequence[Matches]) -> Untrained:
    """The larger of what several comparisons with untrained dictionaries give, each by its side that stands for this.

    The share is that of the comparison with the larger one by number.
    """
    sizes = [np.nan_to_num(np.abs(other.similarity[other.live])) for other in beside]
    sizes = [one if len(one) else np.zeros(1) for one in sizes]
    most = max(beside, key=lambda other: np.nan_to_num(other.share()))
    return Untrained(
        level=max(float(np.quantile(one, LEVEL)) for one in sizes),
        median=max(float(np.median(one)) for one in sizes),
        shares={by: most.share(by) for by in BY},
        trained={by: side.share(by) for by in BY},
    )


def above(side: Matches, floor: Untrained) -> Bool[np.ndarray, "d"]:
    """What is universal by chance alone, and reaches the floor of untrained dictionaries too."""
    return side.universal & (np.nan_to_num(np.abs(side.similarity)) >= floor.level)

"""Similarity level of untrained dictionaries, which universal features must exceed."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool

from saelab.universality.partners import BY, Matches, Untrained

LEVEL = 0.95


def measure_floor(side: Matches, beside: Sequence[Matches]) -> Untrained:
    """Similarity level and universal shares of untrained dictionaries, the larger of several comparisons.

    Each comparison is given by its side that stands for this one. Shares are those of the comparison with the largest
    share by number.
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
    """Features that are universal by the null distribution and also reach the level of untrained dictionaries."""
    return side.universal & (np.nan_to_num(np.abs(side.similarity)) >= floor.level)

"""Effect against cost: what is not dominated, the effect at a given cost, and the area below. Plain numbers."""

import numpy as np
from jaxtyping import Float, Int

STEPS = 16  # between two strengths
BUDGETS = 200


def find_frontier(gain: Float[np.ndarray, "n"], cost: Float[np.ndarray, "n"]) -> Int[np.ndarray, "m"]:
    """The points that no other beats, with at least their gain at no more than their cost, by growing cost.

    Of equal points the first counts; NaN is left out.

    >>> find_frontier(np.array([1.0, 3.0, 2.0]), np.array([0.1, 0.2, 0.3])).tolist()
    [0, 1]
    """
    order = np.lexsort((np.arange(len(gain)), -gain, cost))
    order = order[~np.isnan(gain[order] + cost[order])]
    best = np.maximum.accumulate(np.concatenate([[-np.inf], gain[order]]))
    return order[gain[order] > best[:-1]]


def read_gain(gain: Float[np.ndarray, "n"], cost: Float[np.ndarray, "n"], at: float) -> float:
    """The gain where a curve first reaches a cost; NaN where it does not.

    Points stand in the order of growing strength; the curve begins at no gain for no cost. Between two points the gain
    is linear in the square root of the cost, as both are in the strength where it is small: a KL grows with its square.

    >>> read_gain(np.array([1.0, 2.0]), np.array([0.01, 0.04]), 0.01)
    1.0
    """
    gain, root = _from_origin(gain, cost)
    return _meet(root, gain, float(np.sqrt(at)))


def read_cost(gain: Float[np.ndarray, "n"], cost: Float[np.ndarray, "n"], at: float) -> float:
    """The cost at which a curve first reaches a gain, interpolated as in `read_gain`; NaN where it does not.

    >>> round(read_cost(np.array([1.0, 2.0]), np.array([0.01, 0.04]), 1.5), 6)
    0.0225
    """
    gain, root = _from_origin(gain, cost)
    return _meet(gain, root, at) ** 2


def _meet(x: np.ndarray, y: np.ndarray, at: float) -> float:
    """y where a line of points first has x >= at."""
    beyond = np.flatnonzero(x >= at)
    if not len(beyond):
        return float("nan")
    i = int(beyond[0])
    if i == 0:
        return float(y[0])
    share = (at - x[i - 1]) / (x[i] - x[i - 1])
    return float(y[i - 1] + share * (y[i] - y[i - 1]))


def mean_gain(gain: Float[np.ndarray, "n"], cost: Float[np.ndarray, "n"], limit: float) -> float:
    """The area below the frontier over its width: the mean, over budgets from 0 to `limit`, of the best gain in budget.

    The best gain of a budget is the largest of the points on the curve (see `read_gain`) that cost no more; at least 0,
    that of doing nothing.

    >>> round(mean_gain(np.array([1.0]), np.array([0.0]), 1.0), 6)
    1.0
    """
    gain, root = _from_origin(gain, cost)
    places = np.linspace(0, len(gain) - 1, STEPS * (len(gain) - 1) + 1)
    gain, cost = (np.interp(places, np.arange(len(gain)), values) for values in (gain, root))
    order = np.argsort(cost, kind="stable")
    best = np.maximum.accumulate(np.maximum(gain[order], 0))
    budgets = np.sqrt(limit * (np.arange(BUDGETS) + 0.5) / BUDGETS)
    return float(best[np.searchsorted(cost[order], budgets, side="right") - 1].mean())


def _from_origin(gain: np.ndarray, cost: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """With the unsteered model in front; the costs' roots."""
    return np.concatenate([[0.0], gain]), np.sqrt(np.concatenate([[0.0], np.maximum(cost, 0)]))

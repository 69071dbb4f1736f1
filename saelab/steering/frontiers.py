"""Pareto frontier of effect and cost, effect at a given cost, and mean effect over budgets; vectorized over draws."""

import numpy as np
from jaxtyping import Float, Int

STEPS = 16  # between two strengths


def find_frontier(gain: Float[np.ndarray, "n"], cost: Float[np.ndarray, "n"]) -> Int[np.ndarray, "m"]:
    """Indices of the Pareto-optimal points, which no other beats in gain at no higher cost, by increasing cost.

    The first of equal points counts; NaN is left out.

    >>> find_frontier(np.array([1.0, 3.0, 2.0]), np.array([0.1, 0.2, 0.3])).tolist()
    [0, 1]
    """
    order = np.lexsort((np.arange(len(gain)), -gain, cost))
    order = order[~np.isnan(gain[order] + cost[order])]
    best = np.maximum.accumulate(np.concatenate([[-np.inf], gain[order]]))
    return order[gain[order] > best[:-1]]


def read_gain(
    gain: Float[np.ndarray, "n n_draws"], cost: Float[np.ndarray, "n n_draws"], at: float
) -> Float[np.ndarray, "n_draws"]:
    """The gain where a curve first reaches a cost, interpolated; NaN where it does not.

    Points are in order of increasing strength; the curve starts at gain 0 and cost 0. Between points the gain is linear
    in the square root of the cost, since for small strengths a KL grows with the square of the strength.

    >>> read_gain(np.array([[1.0], [2.0]]), np.array([[0.01], [0.04]]), 0.01)
    array([1.])
    """
    gain, root = _from_origin(gain, cost)
    return _meet(root, gain, float(np.sqrt(at)))


def read_cost(
    gain: Float[np.ndarray, "n n_draws"], cost: Float[np.ndarray, "n n_draws"], at: float
) -> Float[np.ndarray, "n_draws"]:
    """The cost at which a curve first reaches a gain, interpolated as in `read_gain`; NaN where it does not.

    >>> read_cost(np.array([[1.0], [2.0]]), np.array([[0.01], [0.04]]), 1.5).round(6)
    array([0.0225])
    """
    gain, root = _from_origin(gain, cost)
    return _meet(gain, root, at) ** 2


def mean_gain(
    gain: Float[np.ndarray, "n n_draws"],
    cost: Float[np.ndarray, "n n_draws"],
    limit: float,
    judged: Float[np.ndarray, "n n_draws"] | None = None,
) -> Float[np.ndarray, "n_draws"]:
    """The mean, over budgets from 0 to `limit`, of the best gain within the budget.

    That is the area under the frontier over its width. The best gain within a budget is the largest of the points on
    the curve (see `read_gain`) that cost no more; at least 0, the gain of no steering.

    Args:
        gain: by strength, the weakest first, and draw; the best point of each budget is chosen by it.
        cost: of the same points.
        limit: the largest budget.
        judged: gains of the same points on other prompts, which are averaged in place of `gain`. The largest of several
            gains is above 0 by chance alone; the gain of the same point on other prompts is not.

    >>> mean_gain(np.array([[1.0]]), np.array([[0.0]]), 1.0)
    array([1.])
    """
    judged = gain if judged is None else judged
    (gain, root), (judged, _) = _from_origin(gain, cost), _from_origin(judged, cost)
    places = np.linspace(0, len(gain) - 1, STEPS * (len(gain) - 1) + 1)
    gain, judged, cost = _between(gain, places), _between(judged, places), _between(root, places) ** 2
    order = np.argsort(cost, axis=0, kind="stable")
    gain, judged, ends = (np.take_along_axis(one, order, 0) for one in (gain, judged, cost.clip(max=limit)))
    best = np.maximum.accumulate(gain.clip(min=0), axis=0)
    is_new = np.diff(best, axis=0, prepend=0.0) > 0
    last = np.maximum.accumulate(is_new * np.arange(len(gain))[:, None], axis=0)  # row 0 is that of doing nothing
    chosen = np.where(best > 0, np.take_along_axis(judged, last, 0), 0.0)
    widths = np.diff(ends, axis=0, append=np.full_like(ends[:1], limit))
    return (chosen * widths).sum(0) / limit


def _from_origin(gain: np.ndarray, cost: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Gains with the unsteered model first, and square roots of the costs."""
    zero = np.zeros_like(gain[:1])
    return np.concatenate([zero, gain]), np.sqrt(np.concatenate([zero, np.maximum(cost, 0)]))


def _meet(x: np.ndarray, y: np.ndarray, at: float) -> np.ndarray:
    """y, interpolated, where a line through points first has x >= at."""
    beyond = x >= at
    after = beyond.argmax(0)
    before = np.maximum(after - 1, 0)
    (x0, x1), (y0, y1) = ([np.take_along_axis(z, i[None], 0)[0] for i in (before, after)] for z in (x, y))
    share = np.divide(at - x0, x1 - x0, out=np.zeros_like(x0), where=x1 > x0)
    return np.where(beyond.any(0), y0 + share * (y1 - y0), np.nan)


def _between(values: np.ndarray, places: np.ndarray) -> np.ndarray:
    """Values interpolated at fractional row numbers."""
    low = np.minimum(places.astype(int), len(values) - 2)
    share = (places - low)[:, None]
    return values[low] * (1 - share) + values[low + 1] * share

"""How far a unit's F1 is above chance, Cohen's kappa, and what it would be with other stories."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float, Int, Shaped

from saelab.evaluation.bootstrap import find_reach
from saelab.evaluation.levels import Levels

if TYPE_CHECKING:
    from scipy.sparse import csr_matrix

N_DRAWS = 500


def kappa_intervals(
    held: Levels, truth: "csr_matrix", units: Sequence[int], story_ids: Shaped[np.ndarray, "n_tokens"], seed: int
) -> Float[np.ndarray, "n_concepts 3"]:
    """Cohen's kappa of each concept's unit with the ends of its 95 % interval, stories drawn with replacement.

    Args:
        held: levels of held-out tokens.
        truth: (n_tokens, n_concepts), of the same tokens.
        units: the unit of each concept.
        story_ids: the story of each token.
        seed: of the draws.
    """
    _, numbers, sizes = np.unique(story_ids, return_inverse=True, return_counts=True)
    weights = np.random.default_rng(seed).multinomial(len(sizes), np.full(len(sizes), 1 / len(sizes)), N_DRAWS)
    weights = np.concatenate([np.ones((1, len(sizes)), np.int64), weights])
    columns, found = truth.tocsc(), np.empty((len(units), 3))
    for c, unit in enumerate(units):
        fires, true = held.tokens(unit), columns[:, [c]].indices
        sums = [np.bincount(numbers[rows], minlength=len(sizes)) for rows in (np.intersect1d(fires, true), fires, true)]
        kappas = _kappa(*(weights @ one for one in (*sums, sizes)))
        [reach] = find_reach(kappas[None, 1:], len(sizes))
        found[c] = kappas[0], kappas[0] - reach, kappas[0] + reach
    return found


def _kappa(
    hits: Int[np.ndarray, "n"], fires: Int[np.ndarray, "n"], true: Int[np.ndarray, "n"], n: Int[np.ndarray, "n"]
) -> Float[np.ndarray, "n"]:
    """F1 above that of as many firings at random; NaN where neither fires nor holds, or both always."""
    whole, chance = fires + true, 2.0 * fires * true / n
    room = whole - chance
    return np.divide(2 * hits - chance, room, out=np.full(len(room), np.nan), where=room > 0)

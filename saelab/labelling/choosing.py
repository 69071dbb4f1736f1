"""Rule search: the predicate, pair or list of predicates with the highest F1 for each feature side."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, Int

from saelab.functional.ranking import largest_first
from saelab.labelling.contingency import Counts, Side, Units
from saelab.labelling.families import DISJOINT
from saelab.labelling.predicates import Predicates

Joined = Literal["", "and", "or"]
FRACTIONS = np.array([0.0, 0.2, 0.4, 0.6, 0.7, 0.8, 0.9])
"""Levels: thresholds as shares of a feature side's largest |z| in training documents."""
HALF_COST = 0.0125
"""F1 that a level must gain for each halving of the firings it covers, because it describes less of the feature."""
PAIR_COST, PART_COST = 0.01, 0.02
"""F1 that a rule of several parts must gain over a single predicate, and for each doubling of its parts."""
GIVEN = ("own", "concept", "document")
FAVOUR = 0.01
"""F1 by which the caller's own predicates are preferred to those found in the text."""
MIN_SHARE = 0.01
"""Share of a feature side's firings that a level must keep."""
N_BY_F1, N_BY_LIFT, LONGEST = 8, 6, 16
PAIR_ROWS = 768
"""Firings in training documents, drawn at random, on which pairs are selected."""


@dataclass(frozen=True)
class Rule:
    """Predicates joined by "and" or "or" that predict where a feature side reaches a level."""

    parts: tuple[int, ...]
    """columns of the predicates"""
    joined: Joined
    level: int
    f1: float
    """F1 in training documents; of two parts, on the firings drawn"""


def choose_rules(
    counts: Counts, units: Units, side: Side, predicates: Predicates, min_count: int, seed: int
) -> list[Rule | None]:
    """For each feature side the rule with the highest F1 after costs; None where no predicate holds on enough firings.

    Args:
        counts: contingency counts of feature sides and predicates in training documents.
        units: firings of each feature side, by level.
        side: the training documents.
        predicates: names and kinds of the predicates.
        min_count: number of firings that a level needs.
        seed: seed of the firings that pairs are selected on.
    """
    favour = np.array([FAVOUR * (kind in GIVEN) for kind in predicates.kinds])
    cost = _cost(counts.fires, min_count)
    best, scores = _singles(counts, favour, min_count)
    families = [_lists(predicates.family(kind), counts) for kind in DISJOINT]
    lists = [family for family in families if family is not None]
    levels = (np.maximum.reduce([scores, *(score for *_, score in lists)]) - cost).argmax(1)
    here = np.arange(len(units))
    f1, both, fires = counts.f1[here, levels], counts.both[here, levels], counts.fires[here, levels]
    near = _candidates(f1 + favour, both, fires, counts)
    rng = np.random.default_rng(seed)
    found: list[Rule | None] = [None] * len(units)
    for unit in np.flatnonzero(np.isfinite((scores - cost)[here, levels])).tolist():
        level = int(levels[unit])
        j = int(best[unit, level])
        options = [(float(scores[unit, level]), Rule((j,), "", level, float(f1[unit, j])))]
        options += [_of_list(unit, level, *one) for one in lists]
        if max(score for score, _ in options) < 1 - PAIR_COST - PART_COST:
            rows = units.of(unit, level)
            if len(rows) > 4 * PAIR_ROWS:
                rows = rows[rng.integers(len(rows), size=4 * PAIR_ROWS)]
            options += _pairs(near[unit], level, side.here(rows), int(fires[unit]), side, favour, rng)
        found[unit] = max(options, key=lambda option: option[0])[1]
    return found


def _cost(fires: Int[np.ndarray, "n_units n_levels"], min_count: int) -> Float[np.ndarray, "n_units n_levels"]:
    """The cost of each level in F1; infinite where too few firings reach it."""
    enough = fires >= np.maximum(min_count, MIN_SHARE * fires[:, :1])
    return np.where(enough, HALF_COST * np.log2(np.maximum(fires[:, :1], 1) / np.maximum(fires, 1)), np.inf)


def _singles(
    counts: Counts, favour: np.ndarray, min_count: int
) -> tuple[Int[np.ndarray, "n_units n_levels"], Float[np.ndarray, "n_units n_levels"]]:
    """The best single predicate of each level, and its score; the score is -inf where there is none."""
    scores = np.where(counts.both >= min(3, min_count), counts.f1 + favour, -np.inf)
    best = scores.argmax(2)
    return best, np.take_along_axis(scores, best[:, :, None], 2)[:, :, 0]


def _lists(
    family: list[int], counts: Counts
) -> tuple[Int[np.ndarray, "n_units n_levels m"], np.ndarray, np.ndarray, np.ndarray] | None:
    """The best list of mutually exclusive predicates of one family: those with the highest F1, the most precise first.

    For each feature side and level: the members in order, how many of them to take, their joint F1 and its score.
    """
    if len(family) < 2:
        return None
    m = min(LONGEST, len(family))
    columns = np.array(family)
    chosen = columns[largest_first(torch.from_numpy(counts.f1[:, :, columns]), m).numpy()]
    hits, size = np.take_along_axis(counts.both, chosen, 2), counts.holds[chosen]
    order = np.argsort(-hits / np.maximum(size, 1), axis=2, kind="stable")
    chosen, hits, size = (np.take_along_axis(one, order, 2) for one in (chosen, hits, size))
    f1 = 2 * hits.cumsum(2) / np.maximum(counts.fires[:, :, None] + size.cumsum(2), 1)
    scores = f1 - PAIR_COST - PART_COST * np.log2(np.arange(1, m + 1))
    scores[:, :, 0] = -np.inf
    at = scores.argmax(2)[:, :, None]
    f1, scores = (np.take_along_axis(one, at, 2)[:, :, 0] for one in (f1, scores))
    return chosen, at[:, :, 0] + 1, f1, scores


def _of_list(
    unit: int, level: int, chosen: np.ndarray, lengths: np.ndarray, f1: np.ndarray, scores: np.ndarray
) -> tuple[float, Rule]:
    parts = chosen[unit, level, : lengths[unit, level]].tolist()
    return float(scores[unit, level]), Rule(tuple(parts), "or", level, float(f1[unit, level]))


def _candidates(
    scores: np.ndarray, both: np.ndarray, fires: np.ndarray, counts: Counts
) -> Int[np.ndarray, "n_units m"]:
    """Predicates that pairs are built from: those with the highest F1, and those that hold far more often than by
    chance.
    """
    expected = fires[:, None] * counts.holds / counts.n_tokens
    lift = (both - expected) / np.sqrt(expected + 1)
    width = scores.shape[1]
    parts = [
        largest_first(torch.from_numpy(values), min(n, width)).numpy()
        for values, n in ((scores, N_BY_F1), (lift, N_BY_LIFT))
    ]
    return np.sort(np.concatenate(parts, axis=1), axis=1)


def _pairs(
    candidates: np.ndarray,
    level: int,
    rows: np.ndarray,
    n_fires: int,
    side: Side,
    favour: np.ndarray,
    rng: np.random.Generator,
) -> list[tuple[float, Rule]]:
    """The best conjunction and the best union of two predicates, with their scores."""
    if len(rows) > PAIR_ROWS:
        rows = rows[rng.integers(len(rows), size=PAIR_ROWS)]
    if len(rows) == 0:  # all that were drawn are of held-out documents
        return []
    columns = np.unique(candidates)
    hits = side.bits.at(rows, columns).astype(np.float32)
    both = (hits.T @ hits) * (n_fires / len(rows))
    single, holds = both.diagonal(), side.holds[columns]
    shared = side.pairs[np.ix_(columns, columns)]
    unions = single[:, None] + single - both, holds[:, None] + holds - shared
    found: list[tuple[float, Rule]] = []
    for joined, (all_hits, size) in (("and", (both, shared)), ("or", unions)):
        f1 = np.triu(2 * all_hits / np.maximum(n_fires + size, 1), 1)
        i, j = divmod(int(f1.argmax()), len(columns))
        if i != j:
            pair = int(columns[i]), int(columns[j])
            score = float(f1[i, j]) - PAIR_COST - PART_COST + float(favour[list(pair)].min())
            found.append((score, Rule(pair, joined, level, float(f1[i, j]))))  # type: ignore[arg-type]
    return found

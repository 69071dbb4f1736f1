"""The best rule of each unit in training documents: one predicate, two of them, or a list of one family."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Float, Int

from saelab.labelling.contingency import Counts, Side, Units
from saelab.labelling.families import DISJOINT
from saelab.labelling.predicates import Predicates

Joined = Literal["", "and", "or"]
FRACTIONS = np.array([0.0, 0.2, 0.4, 0.6, 0.8])
"""Levels: shares of a unit's largest |z| in training documents."""
LEVEL_COST = 0.02
"""F1 that each level must gain over the one below, for it says less about the unit."""
PAIR_COST, PART_COST = 0.01, 0.02
"""F1 that a rule of several parts must gain over one, and for each part beyond the first."""
GIVEN = ("own", "concept", "document")
FAVOUR = 0.01
"""F1 by which what the caller gave is preferred to what was found in the text."""
MIN_SHARE = 0.1
"""Share of a unit's firings that a level must keep."""
N_BY_F1, N_BY_LIFT, LONGEST = 8, 6, 10
PAIR_ROWS = 768
"""Firings that pairs are chosen on, drawn from those of training documents."""


@dataclass(frozen=True)
class Rule:
    """Predicates by column, joined by "and" or "or"; it tells where a unit reaches a level."""

    parts: tuple[int, ...]
    joined: Joined
    level: int
    f1: float
    """in training documents; of two parts, on the firings drawn"""


def choose_rules(
    counts: Counts, units: Units, side: Side, predicates: Predicates, min_count: int, seed: int
) -> list[Rule | None]:
    """For each unit the rule with the highest F1 after costs; None where it fires with no predicate often enough."""
    favour = np.array([FAVOUR * (kind in GIVEN) for kind in predicates.kinds])
    levels, best, scores = _singles(counts, favour, min_count)
    here = np.arange(len(units))
    f1, both, fires = counts.f1[here, levels], counts.both[here, levels], counts.fires[here, levels]
    families = [_lists(predicates.family(kind), f1, both, fires, counts.holds) for kind in DISJOINT]
    lists = [family for family in families if family is not None]
    near = _candidates(f1 + favour, both, fires, counts)
    rng = np.random.default_rng(seed)
    found: list[Rule | None] = [None] * len(units)
    for unit in np.flatnonzero(np.isfinite(scores)).tolist():
        level, j = int(levels[unit]), int(best[unit])
        options = [(float(f1[unit, j] + favour[j]), Rule((j,), "", level, float(f1[unit, j])))]
        options += [_of_list(unit, level, *one) for one in lists]
        if max(score for score, _ in options) < 1 - PAIR_COST - PART_COST:
            rows = units.of(unit, level)
            if len(rows) > 4 * PAIR_ROWS:
                rows = rows[rng.integers(len(rows), size=4 * PAIR_ROWS)]
            options += _pairs(near[unit], level, side.here(rows), int(fires[unit]), side, favour, rng)
        found[unit] = max(options, key=lambda option: option[0])[1]
    return found


def _singles(counts: Counts, favour: np.ndarray, min_count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Level, predicate and score of the best single predicate; the score is -inf where there is none."""
    enough = counts.fires >= np.maximum(min_count, MIN_SHARE * counts.fires[:, :1])
    scores = counts.f1 + favour - LEVEL_COST * np.arange(counts.fires.shape[1])[:, None]
    scores = np.where(enough[:, :, None] & (counts.both >= min(3, min_count)), scores, -np.inf)
    flat = scores.reshape(len(scores), -1)
    at = flat.argmax(1)
    levels, best = np.divmod(at, scores.shape[2])
    return levels, best, flat[np.arange(len(flat)), at]


def _lists(
    family: list[int], f1: np.ndarray, both: np.ndarray, fires: np.ndarray, holds: np.ndarray
) -> tuple[Int[np.ndarray, "n_units m"], Int[np.ndarray, "n_units"], Float[np.ndarray, "n_units"]] | None:
    """The best list of members of a family that do not overlap: those of highest F1, the most precise ones first."""
    if len(family) < 2:
        return None
    m = min(LONGEST, len(family))
    columns = np.array(family)
    chosen = columns[np.argpartition(-f1[:, columns], m - 1, axis=1)[:, :m]]
    hits, size = np.take_along_axis(both, chosen, 1), holds[chosen]
    order = np.argsort(-hits / np.maximum(size, 1), axis=1, kind="stable")
    chosen, hits, size = (np.take_along_axis(one, order, 1) for one in (chosen, hits, size))
    all_f1 = 2 * hits.cumsum(1) / np.maximum(fires[:, None] + size.cumsum(1), 1)
    scores = all_f1 - PAIR_COST - PART_COST * np.arange(m)
    scores[:, 0] = -np.inf
    lengths = scores.argmax(1) + 1
    return chosen, lengths, np.take_along_axis(all_f1, lengths[:, None] - 1, 1).ravel()


def _of_list(unit: int, level: int, chosen: np.ndarray, lengths: np.ndarray, f1: np.ndarray) -> tuple[float, Rule]:
    n = int(lengths[unit])
    score = float(f1[unit]) - PAIR_COST - PART_COST * (n - 1)
    return score, Rule(tuple(chosen[unit, :n].tolist()), "or", level, float(f1[unit]))


def _candidates(
    scores: np.ndarray, both: np.ndarray, fires: np.ndarray, counts: Counts
) -> Int[np.ndarray, "n_units m"]:
    """Predicates that pairs are made of: those of highest F1, and those that hold far more often than by chance."""
    expected = fires[:, None] * counts.holds / counts.n_tokens
    lift = (both - expected) / np.sqrt(expected + 1)
    width = scores.shape[1]
    parts = [
        np.argpartition(-values, min(n, width) - 1, axis=1)[:, :n]
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
    """The best conjunction and the best union of two, with their scores."""
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

"""Counts and F1 of units (a feature with one sign at one threshold), and the choice of the best ones for concepts."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from saelab.evaluation.levels import N_LEVELS, NOTHING, Levels

SPLIT_GAIN, MAX_SPLIT = 0.03, 10


@dataclass(frozen=True, eq=False)
class UnitCounts:
    """How often units fire with each concept, and in total."""

    hits: Int[np.ndarray, "n_concepts n_units"]
    """tokens with the concept on which the unit fires"""
    fires: Int[np.ndarray, "n_units"]
    """tokens on which the unit fires"""
    n_true: Int[np.ndarray, "n_concepts"]
    """tokens with the concept"""
    n_tokens: int

    def f1(self, c: int) -> Float[np.ndarray, "n_units"]:
        """F1 of every unit as classifier of a concept."""
        return 2 * self.hits[c] / np.maximum(self.fires + self.n_true[c], 1)

    def kappa(self, c: int) -> Float[np.ndarray, "n_units"]:
        """F1 above chance, `(F1 - E) / (1 - E)`, E the F1 of as many random firings: Cohen's kappa.

        A unit that always fires has F1 0.67 for a concept on every second token, and kappa 0.
        """
        size = np.maximum(self.fires + self.n_true[c], 1)
        chance = 2.0 * self.fires * (self.n_true[c] / self.n_tokens) / size
        return (self.f1(c) - chance) / np.maximum(1 - chance, 1e-12)


def best_unit(counts: UnitCounts, c: int) -> int:
    """The unit with the highest F1 for a concept; `NOTHING` where none has any."""
    f1 = counts.f1(c)
    unit = int(f1.argmax())
    return unit if f1[unit] > 0 else NOTHING


def best_pair(counts: UnitCounts, a: int, b: int) -> tuple[int, int]:
    """The pair of units of one feature, one sign for a and the other for b, whose lesser kappa is highest."""
    of_a, of_b = (counts.kappa(c).reshape(-1, 2, N_LEVELS) for c in (a, b))
    lesser = np.minimum(of_a.max(2), of_b.max(2)[:, ::-1])
    feature, side = np.unravel_index(int(lesser.argmax()), lesser.shape)
    if lesser[feature, side] <= 0:
        return NOTHING, NOTHING
    first, second = of_a[feature, side].argmax(), of_b[feature, 1 - side].argmax()
    return int((2 * feature + side) * N_LEVELS + first), int((2 * feature + 1 - side) * N_LEVELS + second)


def split_units(levels: Levels, counts: UnitCounts, c: int, first: int, true: Int[np.ndarray, "n_true"]) -> list[int]:
    """The greedy union of at most 10 units for a concept, each added while it raises F1 by more than 0.03.

    A unit's possible gain is bounded by its own counts, so only units are tried whose bound exceeds the best gain so
    far.

    Args:
        levels: quantized codes.
        counts: of units on the same tokens.
        c: index of the concept.
        first: the best unit, which the union starts with; `NOTHING` for an empty union.
        true: tokens with the concept.
    """
    is_true = np.zeros(levels.table.shape[0], bool)
    is_true[true] = True
    predicted = np.zeros_like(is_true)
    units, best = [], first
    while best != NOTHING:
        units.append(best)
        predicted[levels.tokens(best)] = True
        best = _best_addition(levels, counts, c, predicted, is_true) if len(units) < MAX_SPLIT else NOTHING
    return units


def _best_addition(levels: Levels, counts: UnitCounts, c: int, predicted: np.ndarray, is_true: np.ndarray) -> int:
    hits, fires, n_true = int(is_true[predicted].sum()), int(predicted.sum()), int(counts.n_true[c])
    best, goal = NOTHING, 2 * hits / (fires + n_true) + SPLIT_GAIN
    bounds = _bound_unions(counts, c, hits, fires)
    hopeful = np.flatnonzero(bounds > goal)
    for unit in hopeful[np.argsort(-bounds[hopeful], kind="stable")].tolist():
        if bounds[unit] <= goal:
            break
        added = levels.tokens(unit)
        added = added[~predicted[added]]
        union = 2 * (hits + int(is_true[added].sum())) / (fires + len(added) + n_true)
        if union > goal:
            best, goal = unit, union
    return best


def _bound_unions(counts: UnitCounts, c: int, hits: int, fires: int) -> Float[np.ndarray, "n_units"]:
    """Upper bound on F1 of a union with each unit: its hits all new, its false positives old where possible."""
    new_hits = np.minimum(counts.hits[c], counts.n_true[c] - hits)
    new_alarms = np.maximum(counts.fires - counts.hits[c] - (fires - hits), 0)
    return 2 * (hits + new_hits) / (counts.n_true[c] + fires + new_hits + new_alarms)


class Ranks:
    """Ranks of tokens by the codes of one sign of a feature, `max(side z, 0)`, cached for each."""

    def __init__(self, values: Any) -> None:
        self.values = values
        self.known: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def auroc(self, column: int, true: Int[np.ndarray, "n_true"]) -> float:
        """AUROC of one sign of a feature for the tokens `true`; ties count half, `column` is 2 feature + (side < 0)."""
        if column not in self.known:
            self.known[column] = self._rank(column)
        tokens, ranks = self.known[column]
        n, n_true = self.values.shape[0], len(true)
        n_zero = n - len(tokens)
        fired = np.isin(tokens, true, assume_unique=True)
        total = (ranks[fired] + n_zero).sum() + (n_true - fired.sum()) * (n_zero + 1) / 2
        return ratio(total - n_true * (n_true + 1) / 2, n_true * (n - n_true))

    def _rank(self, column: int) -> tuple[np.ndarray, np.ndarray]:
        feature, negative = divmod(column, 2)
        if isinstance(self.values, np.ndarray):
            z, tokens = self.values[:, feature], np.arange(len(self.values))
        else:
            part = slice(*self.values.indptr[feature : feature + 2])
            z, tokens = self.values.data[part], self.values.indices[part]
        there = z < 0 if negative else z > 0
        _, places, counts = np.unique(np.abs(z[there]), return_inverse=True, return_counts=True)
        return tokens[there], (counts.cumsum() - (counts - 1) / 2)[places]  # equal values share their mean rank


def ratio(part: float | np.number, whole: int | np.number) -> float:
    """`part / whole`, NaN where the whole is 0."""
    return float(part / whole) if whole else math.nan

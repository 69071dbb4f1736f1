"""Rows of a text that are chosen, by what is small beside it: a mark a row, or whole runs of rows."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from jaxtyping import Bool, Int, Integer

PART = 2**16
"""Rows that are counted at once."""
SPREAD = 16
"""Rows lie close together where they are at least one of so many between the first and the last."""


@dataclass(frozen=True, eq=False)
class MarkedRows:
    """The rows that are marked, in order: `rows[start:stop]` are made when asked for.

    >>> rows = MarkedRows(np.array([True, False, True, True]))
    >>> len(rows), rows[1:3].tolist()
    (3, [2, 3])
    """

    marks: Bool[np.ndarray, "n_rows"]

    @cached_property
    def _ends(self) -> Int[np.ndarray, "n_parts_1"]:
        """How many are marked before each part of the rows, and in all."""
        counts = [np.count_nonzero(self.marks[start : start + PART]) for start in range(0, len(self.marks), PART)]
        return np.cumsum([0, *counts])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, part: slice) -> Int[np.ndarray, "n"]:
        start, stop, _ = part.indices(len(self))
        first, last = np.searchsorted(self._ends, (start, max(start, stop - 1)), "right") - 1
        rows = np.flatnonzero(self.marks[first * PART : (last + 1) * PART]) + first * PART
        return rows[start - self._ends[first] : max(start, stop) - self._ends[first]]


def number_rows(rows: Integer[np.ndarray, "n"]) -> tuple[Integer[np.ndarray, "m"], Integer[np.ndarray, "n"]]:
    """Every row once, in order, and for each which of these it is: `np.unique`, faster where they lie close together.

    >>> [found.tolist() for found in number_rows(np.array([7, 5, 7]))]
    [[5, 7], [1, 0, 1]]
    """
    first = int(rows.min()) if len(rows) else 0
    width = int(rows.max()) + 1 - first if len(rows) else 0
    if width > SPREAD * len(rows):
        ordered, numbers = np.unique(rows, return_inverse=True)
        return ordered, numbers
    present = np.zeros(width, bool)
    present[rows - first] = True
    return np.flatnonzero(present) + first, (np.cumsum(present) - 1)[rows - first]


@dataclass(frozen=True, eq=False)
class ChosenRuns:
    """Whether each row is of a chosen run, of a training document for instance: read like an array of one bool a row.

    >>> rows = ChosenRuns(np.array([0, 2]), np.array([False, True]), 5)
    >>> len(rows), rows.sum(), rows[1:3].tolist(), (~rows)[np.array([4, 0])].tolist()
    (5, 3, [False, True], [False, True])
    """

    starts: Integer[np.ndarray, "n_runs"]
    """the row that each run begins with"""
    chosen: Bool[np.ndarray, "n_runs"]
    n_rows: int

    def __len__(self) -> int:
        return self.n_rows

    def __getitem__(self, rows: Any) -> Bool[np.ndarray, "n"]:
        if not isinstance(rows, slice):
            return self.chosen[np.searchsorted(self.starts, rows, "right") - 1]
        start, stop, _ = rows.indices(self.n_rows)
        first, end = np.searchsorted(self.starts, start, "right") - 1, np.searchsorted(self.starts, stop)
        borders = np.clip(np.append(self.starts[first:end], stop), start, max(start, stop))
        return np.repeat(self.chosen[first:end], np.diff(borders))

    def __invert__(self) -> "ChosenRuns":
        return ChosenRuns(self.starts, ~self.chosen, self.n_rows)

    def sum(self) -> int:
        """Rows of chosen runs."""
        return int(np.diff(np.append(self.starts, self.n_rows))[self.chosen].sum())


Marks = Callable[[int, int], np.ndarray]
"""Whether each of the rows start..stop is meant."""


def draw_rows(marks: Marks, n_rows: int, n: int, rng: np.random.Generator) -> Integer[np.ndarray, "n"]:
    """`n` of the rows that are marked, drawn with replacement, as `rng.choice` would draw them from a list of all of
    them; empty where none is. Marks are made twice, part by part.

    >>> draw_rows(lambda start, stop: np.arange(start, stop) == 7, 10, 2, np.random.default_rng(0)).tolist()
    [7, 7]
    """
    starts = range(0, n_rows, PART)
    ends = np.cumsum([np.count_nonzero(marks(start, min(start + PART, n_rows))) for start in starts])
    if n_rows == 0 or ends[-1] == 0:
        return np.empty(0, np.int64)
    ranks = rng.integers(ends[-1], size=n)
    parts, found = np.searchsorted(ends, ranks, "right"), np.empty(n, np.int64)
    for part in np.unique(parts).tolist():
        here, start = parts == part, part * PART
        before = ends[part - 1] if part else 0
        found[here] = np.flatnonzero(marks(start, min(start + PART, n_rows)))[ranks[here] - before] + start
    return found

"""Indices as users pass them (Python, NumPy or torch integers, ranges, arrays) as `int`, and rows of a text.

A compact set of rows is one boolean per row, or one boolean per run of rows. Permutations of rows stay within groups,
exchange groups, or move blocks, each shifted circularly by itself.
"""

import operator
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import SupportsIndex, TypeAlias

import numpy as np
from jaxtyping import Bool, Int, Integer, Shaped
from numpy.typing import NDArray

FeatureIds: TypeAlias = Iterable[SupportsIndex]
"""lists, ranges, arrays and tensors of integers"""
PART = 2**16
"""Rows that are processed at a time."""
SPREAD = 16
"""Rows are dense where at least one in this many between the first and the last is among them."""
RowMarker = Callable[[int, int], NDArray[np.bool_]]
"""Function of (start, stop) that returns a boolean for each of the rows `start:stop`."""
BLOCK_ROWS, N_BLOCKS = 256, 64
"""Largest number of rows in a block, and smallest number of blocks where rows are few."""
WINDOW_ROWS = 2**15
"""Rows within which blocks are permuted, so that a store can be read in pieces."""
ROWS_AT_ONCE = 2**18
"""Rows that are processed at a time, so that a memory-mapped column is never held as a whole."""


def read_feature(value: object, name: str = "feature", d_sae: int | None = None) -> int:
    """A feature index as an `int`.

    Args:
        value: an integer of Python, NumPy or torch.
        name: what error messages call the argument.
        d_sae: number of features; without it the range is not checked.

    Raises:
        TypeError: `value` is not an integer; booleans are refused, too.
        ValueError: `d_sae` is given and the index is not in 0..d_sae - 1.

    >>> import numpy as np
    >>> read_feature(np.int64(3)), read_feature(torch.tensor(4))
    (3, 4)
    """
    try:
        is_boolean = isinstance(value, bool) or str(getattr(value, "dtype", "")) in ("bool", "torch.bool")
        if is_boolean or not isinstance(value, SupportsIndex):
            raise TypeError
        number = operator.index(value)
    except TypeError:
        raise TypeError(
            f"`{name}` must be an integer, got {value!r} ({type(value).__name__}). Of a mask give the places that are "
            "true (`mask.nonzero()`)."
        ) from None
    if d_sae is not None and not 0 <= number < d_sae:
        raise ValueError(f"`{name}` must be in 0..{d_sae - 1}, got {number}.")
    return number


def read_features(values: FeatureIds, d_sae: int, name: str = "features") -> list[int]:
    """Feature indices as a list of `int`.

    Raises:
        TypeError: `values` is a single index, or holds something that is not an integer.
        ValueError: an index is not in 0..d_sae - 1.

    >>> import numpy as np
    >>> read_features(np.arange(3), 8)
    [0, 1, 2]
    """
    if not isinstance(values, Iterable) or getattr(values, "ndim", 1) != 1:
        raise TypeError(f"`{name}` must be a list of integers, got {values!r}. Of a single one give a list: [3].")
    wanted = [read_feature(value, name) for value in values]
    if bad := [j for j in wanted if not 0 <= j < d_sae]:
        raise ValueError(f"`{name}` must be in 0..{d_sae - 1}, got {bad[:5]}.")
    return wanted


@dataclass(frozen=True, eq=False)
class MarkedRows:
    """The numbers of the marked rows, ascending; a slice `rows[start:stop]` is computed when it is read.

    >>> rows = MarkedRows(np.array([True, False, True, True]))
    >>> len(rows), rows[1:3].tolist()
    (3, [2, 3])
    """

    marks: Bool[np.ndarray, "n_rows"]

    @cached_property
    def _ends(self) -> Int[np.ndarray, "n_parts_1"]:
        """Number of marked rows before each part, and in total."""
        counts = [np.count_nonzero(self.marks[start : start + PART]) for start in range(0, len(self.marks), PART)]
        return np.cumsum([0, *counts])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, part: slice) -> Int[np.ndarray, "n"]:
        start, stop, _ = part.indices(len(self))
        first, last = np.searchsorted(self._ends, (start, max(start, stop - 1)), "right") - 1
        rows: NDArray[np.int64] = np.flatnonzero(self.marks[first * PART : (last + 1) * PART]) + first * PART
        return rows[start - self._ends[first] : max(start, stop) - self._ends[first]]


def number_rows(rows: Integer[np.ndarray, "n"]) -> tuple[Integer[np.ndarray, "m"], Integer[np.ndarray, "n"]]:
    """The distinct rows, sorted, and the index of each row among them: `np.unique`, faster where rows are dense.

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
    """Boolean mask of the rows of chosen runs, such as training documents: indexed like an array with one bool per row.

    >>> rows = ChosenRuns(np.array([0, 2]), np.array([False, True]), 5)
    >>> len(rows), rows.sum(), rows[1:3].tolist(), (~rows)[np.array([4, 0])].tolist()
    (5, 3, [False, True], [False, True])
    """

    starts: Integer[np.ndarray, "n_runs"]
    """first row of each run"""
    chosen: Bool[np.ndarray, "n_runs"]
    n_rows: int

    def __len__(self) -> int:
        return self.n_rows

    def __getitem__(self, rows: slice | Integer[np.ndarray, "n"]) -> Bool[np.ndarray, "n"]:
        if not isinstance(rows, slice):
            mask: NDArray[np.bool_] = self.chosen[np.searchsorted(self.starts, rows, "right") - 1]
            return mask
        start, stop, _ = rows.indices(self.n_rows)
        first, end = np.searchsorted(self.starts, start, "right") - 1, np.searchsorted(self.starts, stop)
        borders = np.clip(np.append(self.starts[first:end], stop), start, max(start, stop))
        return np.repeat(self.chosen[first:end], np.diff(borders))

    def __invert__(self) -> "ChosenRuns":
        return ChosenRuns(self.starts, ~self.chosen, self.n_rows)

    def sum(self) -> int:
        """Number of rows in chosen runs."""
        return int(np.diff(np.append(self.starts, self.n_rows))[self.chosen].sum())


def draw_rows(marks: RowMarker, n_rows: int, n: int, rng: "np.random.Generator") -> Integer[np.ndarray, "n"]:
    """Random marked rows, drawn with replacement as `rng.choice` draws from the list of them; empty where none is.

    Args:
        marks: function of (start, stop) that returns whether each of these rows is marked; called twice per part.
        n_rows: number of rows, marked or not.
        n: number of draws.
        rng: source of the draws.

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


def permute_within(groups: Shaped[np.ndarray, "n"], rng: "np.random.Generator") -> Int[np.ndarray, "n"]:
    """A random order that keeps every row's group: `rows[order]` are the rows permuted within groups.

    >>> groups = np.array([0, 0, 1, 1, 1])
    >>> bool((groups[permute_within(groups, np.random.default_rng(0))] == groups).all())
    True
    """
    by_group = np.argsort(groups, kind="stable")
    shuffled = np.lexsort((rng.random(len(groups)), groups))
    order = np.empty(len(groups), np.int64)
    order[by_group] = shuffled
    return order


def exchange_groups(groups: Shaped[np.ndarray, "n"], rng: "np.random.Generator") -> Int[np.ndarray, "n"]:
    """An order in which groups change places, each stretched to the length of the one that gets it, and permuted there.

    >>> order = exchange_groups(np.array([4, 4, 7, 7]), np.random.default_rng(1))
    >>> sorted(order[:2].tolist()) in ([0, 1], [2, 3]), sorted(order.tolist())
    (True, [0, 1, 2, 3])
    """
    return np.take(_stretch_exchanged(groups, rng), permute_within(groups, rng))


def shift_groups(groups: Shaped[np.ndarray, "n"], rng: "np.random.Generator") -> Int[np.ndarray, "n"]:
    """An order in which groups change places as in `exchange_groups`, each then shifted circularly by a random step.

    Runs of rows and their order stay, and neither the group nor the place in it says anything about them.

    >>> order = shift_groups(np.array([4, 4, 4, 4]), np.random.default_rng(1))
    >>> sorted(order.tolist()), set((np.diff(order) % 4).tolist())
    ([0, 1, 2, 3], {1})
    """
    _, numbers, sizes = np.unique(groups, return_inverse=True, return_counts=True)
    rows, starts = np.argsort(numbers, kind="stable"), np.cumsum(sizes) - sizes
    steps = np.repeat((rng.random(len(sizes)) * sizes).astype(np.int64), sizes)
    lengths, firsts = np.repeat(sizes, sizes), np.repeat(starts, sizes)
    shifted = np.empty(len(groups), np.int64)
    shifted[rows] = rows[firsts + (np.arange(len(groups)) - firsts + steps) % lengths]
    return np.take(_stretch_exchanged(groups, rng), shifted)


def _stretch_exchanged(groups: Shaped[np.ndarray, "n"], rng: "np.random.Generator") -> Int[np.ndarray, "n"]:
    """An order in which groups change places, each stretched to the length of the one that gets it."""
    _, numbers, sizes = np.unique(groups, return_inverse=True, return_counts=True)
    rows, starts = np.argsort(numbers, kind="stable"), np.cumsum(sizes) - sizes
    source = rng.permutation(len(sizes))
    places = np.arange(len(groups)) - np.repeat(starts, sizes)  # within each group
    lengths = np.repeat(sizes[source], sizes)
    stretched = places * lengths // np.repeat(sizes, sizes)
    order = np.empty(len(groups), np.int64)
    order[rows] = rows[np.repeat(starts[source], sizes) + stretched]
    return order


def find_runs(groups: Shaped[np.ndarray, "n"]) -> Int[np.ndarray, "n_runs"]:
    """First row of each run of rows of one group, such as a document.

    >>> find_runs(np.array([3, 3, 5, 5, 5])).tolist()
    [0, 2]
    """
    found = [np.zeros(min(1, len(groups)), np.int64)]
    for start in range(1, len(groups), ROWS_AT_ONCE):
        part = groups[start - 1 : start + ROWS_AT_ONCE]
        found.append(np.flatnonzero(part[1:] != part[:-1]) + start)
    return np.concatenate(found)


@dataclass(frozen=True, eq=False)
class MovedBlocks:
    """A permutation of rows by blocks: a slice `order[start:stop]` of it is computed when it is read."""

    places: Int[np.ndarray, "n_blocks_1"]
    """place of the first row of each block after the permutation, and the number of rows"""
    first: Int[np.ndarray, "n_blocks"]
    """first row of each block before the permutation"""
    steps: Int[np.ndarray, "n_blocks"]
    """rows by which each block is shifted circularly"""

    def __len__(self) -> int:
        return int(self.places[-1])

    def __getitem__(self, part: slice) -> Int[np.ndarray, "n"]:
        at = np.arange(*part.indices(len(self)))
        block = np.searchsorted(self.places, at, "right") - 1
        begin, length = self.places[block], np.diff(self.places)[block]
        rows: NDArray[np.int64] = self.first[block] + (at - begin + self.steps[block]) % length
        return rows


def move_blocks(doc_starts: Integer[np.ndarray, "n_docs"] | None, n: int, rng: "np.random.Generator") -> MovedBlocks:
    """A random permutation of rows by blocks, each block shifted circularly by a random step of its own.

    A block is at most 256 rows of one document (fewer where there would be less than 64 blocks), so that runs survive
    and periods do not. Blocks are permuted within windows of 32,768 rows.

    Args:
        doc_starts: first row of each document; None where all rows are one document.
        n: number of rows.
        rng: source of the permutation.

    >>> order = move_blocks(None, 1000, np.random.default_rng(0))[:]
    >>> sorted(order.tolist()) == list(range(1000)), bool((np.diff(order) == 1).mean() > 0.5)
    (True, True)
    """
    size = int(np.clip(n // N_BLOCKS, 1, BLOCK_ROWS))
    starts = np.arange(0, n, WINDOW_ROWS)
    starts = starts if doc_starts is None else np.union1d(starts, doc_starts)
    lengths = np.diff(np.append(starts, n))
    pieces = -(-lengths // size)
    first = np.repeat(starts, pieces) + size * (np.arange(pieces.sum()) - np.repeat(np.cumsum(pieces) - pieces, pieces))
    lengths = np.diff(np.append(first, n))
    steps = (rng.random(len(first)) * lengths).astype(np.int64)
    places = np.lexsort((rng.random(len(first)), first // WINDOW_ROWS))
    return MovedBlocks(np.append(0, np.cumsum(lengths[places])), first[places], steps[places])

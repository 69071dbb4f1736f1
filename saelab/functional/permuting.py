"""Permutations of labels and rows for null distributions on text that consists of documents.

A circular shift of all rows keeps whatever is periodic (alternating labels, one template for all documents), so that
the null would equal the result; permuting all rows breaks the runs that widen the null. So labels are permuted within
documents, and rows are moved in blocks, each shifted circularly by itself.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Int, Integer, Shaped
from numpy.typing import NDArray

BLOCK_ROWS, N_BLOCKS = 256, 64
"""Largest number of rows in a block, and smallest number of blocks where rows are few."""
WINDOW_ROWS = 2**15
"""Rows within which blocks are permuted, so that a store can be read in pieces."""
INSIDE = 0.9
"""Tokens are permuted within their documents where at least this share of the label's variance lies within these."""
ROWS_AT_ONCE = 2**18
"""Rows that are processed at a time, so that a memory-mapped column is never held as a whole."""
WITHIN, EXCHANGED = "tokens permuted within documents", "documents exchanged and their tokens permuted"


def permute_within(groups: Shaped[np.ndarray, "n"], rng: np.random.Generator) -> Int[np.ndarray, "n"]:
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


def share_inside(y: Bool[np.ndarray, "n"], groups: Shaped[np.ndarray, "n"]) -> float:
    """Share of a label's variance that lies within groups, 0 to 1; 0 where all rows of each group have the same label.

    >>> share_inside(np.array([True, False, True, False]), np.array([0, 0, 1, 1]))
    1.0
    """
    _, numbers, sizes = np.unique(groups, return_inverse=True, return_counts=True)
    true = np.bincount(numbers, y)
    rate = y.mean()
    return float((true * (1 - true / sizes)).sum() / max(len(y) * rate * (1 - rate), 1e-30))


def permute_labels(
    y: Bool[np.ndarray, "n"], doc_ids: Shaped[np.ndarray, "n"], rng: np.random.Generator
) -> tuple[Bool[np.ndarray, "n"], str]:
    """Permuted labels of a text for a null distribution, and a description of the permutation.

    Where labels vary within documents, they are permuted there: each document keeps its rate, and neither periods nor
    positions survive. Where they vary mostly between documents that would change little, so documents are exchanged
    first: each receives the labels of another, stretched to its length, and these are then permuted within it.

    Args:
        y: label of each token.
        doc_ids: document of each token.
        rng: source of the permutation.
    """
    if share_inside(y, doc_ids) >= INSIDE:
        return y[permute_within(doc_ids, rng)], WITHIN
    return y[exchange_groups(doc_ids, rng)], EXCHANGED


def exchange_groups(groups: Shaped[np.ndarray, "n"], rng: np.random.Generator) -> Int[np.ndarray, "n"]:
    """An order in which groups change places, each stretched to the length of the one that gets it, and permuted there.

    >>> order = exchange_groups(np.array([4, 4, 7, 7]), np.random.default_rng(1))
    >>> sorted(order[:2].tolist()) in ([0, 1], [2, 3]), sorted(order.tolist())
    (True, [0, 1, 2, 3])
    """
    _, numbers, sizes = np.unique(groups, return_inverse=True, return_counts=True)
    rows, starts = np.argsort(numbers, kind="stable"), np.cumsum(sizes) - sizes
    source = rng.permutation(len(sizes))
    places = np.arange(len(groups)) - np.repeat(starts, sizes)  # within each group
    lengths = np.repeat(sizes[source], sizes)
    stretched = places * lengths // np.repeat(sizes, sizes)
    order = np.empty(len(groups), np.int64)
    order[rows] = rows[np.repeat(starts[source], sizes) + stretched]
    return np.take(order, permute_within(groups, rng))


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


def move_blocks(doc_starts: Integer[np.ndarray, "n_docs"] | None, n: int, rng: np.random.Generator) -> MovedBlocks:
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

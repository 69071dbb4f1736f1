"""Chance for data in documents: labels and rows put elsewhere, so that no order of the text survives.

Turning rows round keeps whatever is periodic (alternating labels, one template for all documents) and would give the
result itself as its chance; permuting all rows breaks the runs that make chance wide. So labels are permuted within
documents, and rows are moved in blocks that are turned round one by one.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Int, Integer, Shaped

BLOCK_ROWS, N_BLOCKS = 256, 64
"""Rows of a block at most, and blocks at least where rows are few."""
WINDOW_ROWS = 2**15
"""Rows within which blocks change places, so that a store is read in pieces."""
INSIDE = 0.9
"""Share of a label's variance that lies within documents, from which tokens are permuted within their documents."""
ROWS_AT_ONCE = 2**18
"""Rows that are looked at at once, so that a mapped column is never held."""
WITHIN, EXCHANGED = "tokens permuted within documents", "documents exchanged and their tokens permuted"


def permute_within(groups: Shaped[np.ndarray, "n"], rng: np.random.Generator) -> Int[np.ndarray, "n"]:
    """An order in which every row is followed by one of its own group: `rows[order]` are permuted within groups.

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
    """Share of the variance of a label that lies within groups, 0 to 1: 0 where each group has one label throughout.

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
    """The labels of a text put elsewhere, and how.

    Where they differ within documents, they are permuted there: each document keeps its rate, and no period and no
    place survives. Where they are mostly a matter of whole documents that would leave them as they are, so documents
    change places first; a document's labels are stretched to the length of the one that gets them.
    """
    if share_inside(y, doc_ids) >= INSIDE:
        return y[permute_within(doc_ids, rng)], WITHIN
    _, numbers, sizes = np.unique(doc_ids, return_inverse=True, return_counts=True)
    rows, starts = np.argsort(numbers, kind="stable"), np.cumsum(sizes) - sizes
    source = rng.permutation(len(sizes))
    places = np.arange(len(y)) - np.repeat(starts, sizes)  # within each document
    lengths = np.repeat(sizes[source], sizes)
    stretched = places * lengths // np.repeat(sizes, sizes)
    moved = np.empty_like(y)
    moved[rows] = y[rows[np.repeat(starts[source], sizes) + stretched]]
    return moved[permute_within(doc_ids, rng)], EXCHANGED


def find_runs(groups: Shaped[np.ndarray, "n"]) -> Int[np.ndarray, "n_runs"]:
    """The rows that runs of one group begin with, documents for instance.

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
    """An order of rows in blocks: `order[start:stop]` are the rows that stand at those places, made when asked for."""

    places: Int[np.ndarray, "n_blocks_1"]
    """where each block stands now, and the number of rows"""
    first: Int[np.ndarray, "n_blocks"]
    """the row that each block begins with"""
    steps: Int[np.ndarray, "n_blocks"]
    """rows by which it is turned round"""

    def __len__(self) -> int:
        return int(self.places[-1])

    def __getitem__(self, part: slice) -> Int[np.ndarray, "n"]:
        at = np.arange(*part.indices(len(self)))
        block = np.searchsorted(self.places, at, "right") - 1
        begin, length = self.places[block], np.diff(self.places)[block]
        return self.first[block] + (at - begin + self.steps[block]) % length


def move_blocks(doc_starts: Integer[np.ndarray, "n_docs"] | None, n: int, rng: np.random.Generator) -> MovedBlocks:
    """An order of `n` rows in blocks that change places, each turned round by a step of its own.

    A block is at most 256 rows of one document (fewer where there would be less than 64 blocks), so that runs stay
    together and periods do not. Places change within 32,768 rows. `doc_starts` are the rows that documents begin with;
    without them all rows are one.

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

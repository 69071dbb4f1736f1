"""Contingency counts of features and predicates: by sparse products for all, by packed bits for chosen tokens."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Bool, Float, Int, Int32, Integer

from saelab.labelling.predicates import Predicates
from saelab.stores.features import FeatureStore
from saelab.stores.packing import as_csr

if TYPE_CHECKING:
    from scipy.sparse import csc_matrix, csr_matrix

BLOCK_ENTRIES = 4_000_000
"""Codes held at once, unless one feature alone has more."""
BLOCK_FEATURES = 4096
PACKED_ROWS = 65536


@dataclass(frozen=True, eq=False)
class PackedBits:
    """A boolean matrix packed to eight columns per byte, for fast reads of chosen rows and columns."""

    bits: np.ndarray

    @classmethod
    def pack(cls, matrix: "csr_matrix") -> "PackedBits":
        """The packed form of a sparse matrix, computed a block of rows at a time."""
        bits = np.empty((matrix.shape[0], -(-matrix.shape[1] // 8)), np.uint8)
        for a in range(0, len(bits), PACKED_ROWS):
            bits[a : a + PACKED_ROWS] = np.packbits(matrix[a : a + PACKED_ROWS].toarray() != 0, axis=1)
        return cls(bits)

    def at(self, rows: Integer[np.ndarray, "n"], columns: Integer[np.ndarray, "m"]) -> Bool[np.ndarray, "n m"]:
        """Whether predicates hold at tokens, for chosen rows and columns."""
        masks = (128 >> (columns & 7)).astype(np.uint8)
        return (self.bits[rows][:, columns >> 3] & masks) != 0


def feature_blocks(store: FeatureStore) -> Iterator[tuple[int, int]]:
    """Ranges of features, as first and end, that together have few enough codes to hold."""
    ends = np.cumsum(store.statistics.fires.sum(1))
    start = 0
    while start < store.d_sae:
        before = ends[start - 1] if start else 0
        stop = max(start + 1, int(np.searchsorted(ends, before + BLOCK_ENTRIES, "right")))
        stop = min(stop, start + BLOCK_FEATURES, store.d_sae)
        yield start, stop
        start = stop


@dataclass(frozen=True, eq=False)
class Units:
    """The firings of a block of features by side and level.

    Side 2 j holds the positive codes of feature j, side 2 j + 1 its negative ones. A level is a threshold as a share of
    the side's largest |z| in training documents.
    """

    rows: Int32[np.ndarray, "nnz"]
    """tokens of the store: side by side, within each the highest level first"""
    ends: Int[np.ndarray, "n_units n_levels"]
    """where the codes that reach each level end in `rows`"""
    peaks: Float[np.ndarray, "n_units"]
    """largest |z| of each side in training documents"""

    @classmethod
    def sort(cls, columns: "csc_matrix", is_train: Bool[np.ndarray, "n_tokens"], fractions: np.ndarray) -> "Units":
        """The codes of a block of features, ordered by sign and level."""
        n_units, n_levels = 2 * columns.shape[1], len(fractions)
        sides = np.repeat(np.arange(0, n_units, 2, dtype=np.uint16), np.diff(columns.indptr))
        sides += columns.data < 0
        sizes = np.abs(columns.data)
        peaks = _largest(sizes * is_train[columns.indices], columns)
        share = sizes / np.maximum(peaks, 1e-30).astype(np.float32)[sides]
        cells = sides * np.uint16(n_levels) + np.uint16(n_levels - 1)
        for fraction in fractions[1:].tolist():
            cells -= share >= np.float32(fraction)
        order = np.argsort(cells, kind="stable")  # of 16 bits: a radix sort
        ends = np.cumsum(np.bincount(cells, minlength=n_units * n_levels))
        rows = columns.indices[order].astype(np.int32, copy=False)
        return cls(rows, ends.reshape(n_units, n_levels)[:, ::-1], peaks)

    def __len__(self) -> int:
        return len(self.ends)

    def of(self, unit: int, level: int) -> Int32[np.ndarray, "n"]:
        """The tokens on which a feature side reaches a level."""
        start = self.ends[unit - 1, 0] if unit else 0
        return self.rows[start : self.ends[unit, level]]


def _largest(sizes: np.ndarray, columns: "csc_matrix") -> np.ndarray:
    """Largest |z| of each feature's positive and negative codes."""
    found = np.zeros((columns.shape[1], 2))
    full = np.flatnonzero(np.diff(columns.indptr))
    if len(full):
        for side, signed in enumerate((columns.data > 0, columns.data < 0)):
            found[full, side] = np.maximum.reduceat(sizes * signed, columns.indptr[full])
    return found.ravel()


@dataclass(frozen=True, eq=False)
class Counts:
    """Numbers of tokens on which feature sides fire, predicates hold, and both at once."""

    both: Int[np.ndarray, "n_units n_levels n_predicates"]
    fires: Int[np.ndarray, "n_units n_levels"]
    holds: Int[np.ndarray, "n_predicates"]
    n_tokens: int

    @cached_property
    def f1(self) -> Float[np.ndarray, "n_units n_levels n_predicates"]:
        """F1 of each predicate for each feature side and level: 2 both / (fires + holds)."""
        return 2 * self.both / np.maximum(self.fires[:, :, None] + self.holds, 1)


class Side:
    """Predicates restricted to the training documents, or to the held-out ones; tokens are numbered within these."""

    def __init__(self, predicates: Predicates, chosen: Bool[np.ndarray, "n_tokens"]) -> None:
        self.chosen, self.rows = chosen, np.flatnonzero(chosen).astype(np.int32)
        self.places = np.where(chosen, np.cumsum(chosen, dtype=np.int32) - np.int32(1), np.int32(-1))
        self.matrix = predicates.matrix[self.rows].astype(np.int32)
        self.holds = np.asarray(self.matrix.sum(0)).ravel().astype(np.int64)

    @property
    def n_tokens(self) -> int:
        """Number of tokens on this side of the split."""
        return len(self.rows)

    @cached_property
    def pairs(self) -> Int[np.ndarray, "n_predicates n_predicates"]:
        """Number of tokens on which each two predicates hold together."""
        return (self._by_predicate.T @ self.matrix).toarray().astype(np.int64)

    @cached_property
    def bits(self) -> PackedBits:
        """The predicates as packed bits, by token."""
        return PackedBits.pack(self.matrix)

    @cached_property
    def _by_predicate(self) -> "csc_matrix":
        return self.matrix.tocsc()

    def here(self, rows: Integer[np.ndarray, "n"]) -> Integer[np.ndarray, "m"]:
        """Those of some tokens of the store that are on this side, as ascending positions in it."""
        places = self.places[rows]
        return np.sort(places[places >= 0])

    def mark(self, columns: Sequence[int], joined: str = "") -> Bool[np.ndarray, "n"]:
        """The tokens on which all ("and") or any of some predicates hold."""
        by_predicate, found = self._by_predicate, np.zeros(self.n_tokens, bool)
        lists = [by_predicate.indices[slice(*by_predicate.indptr[j : j + 2])] for j in columns]
        found[lists[0]] = True
        for tokens in lists[1:]:
            if joined == "and":
                both = tokens[found[tokens]]
                found[:] = False
                found[both] = True
            else:
                found[tokens] = True
        return found

    def count(self, units: Units) -> Counts:
        """All contingency counts of a block of features, by one sparse product that counts each code at the level it
        reaches.
        """
        places = self.places[units.rows]
        here = places >= 0
        ends = units.ends[:, ::-1].ravel()
        offsets = np.concatenate([[0], np.cumsum(here)])[np.concatenate([[0], ends])].astype(np.int32)
        codes = as_csr(np.ones(offsets[-1], np.int32), places[here], offsets, (len(ends), self.n_tokens))
        shape = units.ends.shape
        both = (codes @ self.matrix).toarray().reshape(*shape, -1)
        return Counts(_from_above(both), _from_above(np.diff(offsets).reshape(shape)), self.holds, self.n_tokens)


def _from_above(counts: np.ndarray) -> np.ndarray:
    """Cumulative sums over each level and those above, lowest level first, from counts with the highest first."""
    return np.cumsum(counts, axis=1, dtype=np.int64)[:, ::-1]

"""`Levels`: codes quantized to ten thresholds of each feature's range, for F1 at every threshold in one pass."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from jaxtyping import Float, Int, Int8, Shaped
from torch import Tensor

from saelab.functional.codes import SparseCodes

if TYPE_CHECKING:
    from scipy.sparse import csc_matrix, csr_matrix

Codes: TypeAlias = Any
"""Codes or activations of tokens: scipy sparse (n_tokens, d_sae), `SparseCodes`, or a dense tensor or array."""
N_LEVELS = 10
FRACTIONS = np.arange(N_LEVELS) / N_LEVELS
"""Thresholds as fractions of the largest code of that sign in training stories."""
NOTHING = -1
"""In place of a unit's number, for a concept with which no feature fires."""
BLOCK_ENTRIES = 2**22  # entries of a block of columns held at a time


def read_values(codes: Codes) -> Any:
    """Codes as a scipy csr matrix, dense activations as an array; ValueError unless finite and two-dimensional."""
    from scipy.sparse import csr_matrix, issparse

    values: Any
    if isinstance(codes, SparseCodes):
        parts = (codes.values.detach(), codes.indices, codes.offsets)
        data, indices, offsets = (part.cpu().numpy() for part in parts)
        values = csr_matrix((data, indices, offsets), shape=(len(codes), codes.d_sae))
    elif issparse(codes):
        values = codes.tocsr()
    else:
        values = codes.detach().float().cpu().numpy() if isinstance(codes, Tensor) else np.asarray(codes)
    if values.ndim != 2:
        raise ValueError(
            f"`codes` must have two axes, tokens and features, got shape {values.shape}; flatten the batch."
        )
    if not np.isfinite(values.data if issparse(values) else values).all():
        raise ValueError("`codes` must be finite, got NaN or infinity; check the activations they were made from.")
    return values


def select_rows(values: Any, rows: np.ndarray) -> Any:
    """Rows of the result of `read_values`, stored by column: csc without stored zeros, or an array in Fortran order."""
    from scipy.sparse import issparse

    if not issparse(values):
        return np.asfortranarray(values[rows])
    chosen = values[rows].tocsc()
    chosen.sum_duplicates()
    chosen.eliminate_zeros()
    return chosen


def find_peaks(values: Any) -> Float[np.ndarray, "n_features 2"]:
    """The largest magnitude of each feature's positive and negative codes; 0 for a sign that never occurs."""
    from scipy.sparse import issparse

    ends = [values.max(axis=0), -values.min(axis=0)]
    sides = [end.toarray().ravel() if issparse(values) else end for end in ends]
    return np.stack(sides, 1).clip(min=0).astype(np.float64)


@dataclass(frozen=True, eq=False, repr=False)
class Levels:
    """For each token and feature the number of thresholds that the code exceeds, 0 to 10, with the code's sign.

    A unit is one feature with one sign at one threshold; unit `(2 feature + (side < 0)) 10 + i` fires where the level
    of that sign exceeds i, that is `side z > FRACTIONS[i] peak`.
    """

    table: "csc_matrix | Int8[np.ndarray, 'n_tokens n_features']"
    """signed levels, sparse or dense"""

    @property
    def n_features(self) -> int:
        """Number of features, each with two signs."""
        return int(self.table.shape[1])

    def tokens(self, unit: int) -> Int[np.ndarray, "n_fires"]:
        """Indices of the tokens on which a unit fires."""
        if unit == NOTHING:
            return np.zeros(0, np.int64)
        column, level = divmod(unit, N_LEVELS)
        feature, negative = divmod(column, 2)
        if isinstance(self.table, np.ndarray):
            there = self.table[:, feature]
            return np.flatnonzero(there < -level if negative else there > level)
        part = slice(*self.table.indptr[feature : feature + 2])
        there = self.table.data[part]
        return self.table.indices[part][there < -level if negative else there > level]

    def blocks(self) -> Iterator[tuple[slice, Int[np.ndarray, "n"], Int[np.ndarray, "n"]]]:
        """Blocks of features: the slice, and for each entry its token and highest unit.

        Units count from the block's first.
        """
        n_entries = self.table.size if isinstance(self.table, np.ndarray) else self.table.nnz
        width = max(1, BLOCK_ENTRIES * self.n_features // max(1, n_entries))
        for start in range(0, self.n_features, width):
            part = slice(start, min(start + width, self.n_features))
            tokens, columns, levels = self._entries(part)
            yield part, tokens, (2 * columns + (levels < 0)) * N_LEVELS + np.abs(levels) - 1

    def _entries(self, part: slice) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        if isinstance(self.table, np.ndarray):
            columns, tokens = np.nonzero(self.table[:, part].T)
            return tokens, columns, self.table[:, part][tokens, columns]
        block = self.table[:, part]
        return block.indices, np.repeat(np.arange(block.shape[1]), np.diff(block.indptr)), block.data


def grade(values: Any, peaks: Float[np.ndarray, "n_features 2"]) -> Levels:
    """The levels of the result of `select_rows`; codes of a sign whose peak is 0 get level 0."""
    from scipy.sparse import csc_matrix

    ceilings = np.where(peaks > 0, peaks, np.inf)
    if isinstance(values, np.ndarray):
        table = np.empty(values.shape, np.int8, order="F")
        for j in range(values.shape[1]):
            table[:, j] = _grade(values[:, j], ceilings[j])
        return Levels(table)
    data = np.empty(values.nnz, np.int8)
    for j in range(values.shape[1]):
        part = slice(*values.indptr[j : j + 2])
        data[part] = _grade(values.data[part], ceilings[j])
    levels = csc_matrix((data, values.indices, values.indptr), shape=values.shape)
    if not data.all():
        levels = levels.copy()  # or dropping the zeros would change `values`
        levels.eliminate_zeros()
    return Levels(levels)


def _grade(z: Shaped[np.ndarray, "n"], ceilings: Float[np.ndarray, "2"]) -> Int8[np.ndarray, "n"]:
    negative = z < 0
    passed = np.searchsorted(FRACTIONS, np.abs(z) / ceilings[negative.astype(np.int8)])
    return np.where(negative, -passed, passed).astype(np.int8)


def count_units(levels: Levels, truth: "csr_matrix") -> tuple[np.ndarray, np.ndarray]:
    """How often each unit fires with each concept, (n_concepts, n_units), and in total, (n_units,), by sparse products.

    Entries are counted once, at their highest unit; counts of lower thresholds are cumulative sums.
    """
    from scipy.sparse import csr_matrix

    n_tokens, n_concepts = truth.shape
    hits = np.zeros((n_concepts, levels.n_features, 2, N_LEVELS), np.int32)
    fires = np.zeros((levels.n_features, 2, N_LEVELS), np.int32)
    for part, tokens, units in levels.blocks():
        shape = (part.stop - part.start, 2, N_LEVELS)
        n_units = int(np.prod(shape))
        peaks = csr_matrix((np.ones(len(units), np.int32), (units, tokens)), shape=(n_units, n_tokens))
        together = (peaks @ truth).toarray().reshape(*shape, n_concepts)
        hits[:, part] = np.moveaxis(_sum_down(together, axis=2), -1, 0)
        fires[part] = _sum_down(np.bincount(units, minlength=n_units).reshape(shape), axis=2)
    return hits.reshape(n_concepts, -1), fires.reshape(-1)


def _sum_down(counts: np.ndarray, axis: int) -> np.ndarray:
    return np.flip(np.flip(counts, axis).cumsum(axis, dtype=np.int32), axis)

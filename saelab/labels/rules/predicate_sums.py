"""Numbers of tokens on which predicates hold, for many lists of tokens at once.

Most entries of a predicate matrix belong to few columns: the case of a token, its place in word and sentence. The 64
most frequent predicates are packed into one number for each token. Tokens with the same number share a row of a small
dense table, whose rows are summed over each list; the other predicates are counted by a sparse product.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, Integer
from torch.nn.functional import embedding_bag

from saelab.stores.packing import as_csr

if TYPE_CHECKING:
    from scipy.sparse import csr_matrix

N_COMMON = 64
"""Predicates that are summed densely: as many as a number has bits."""
PACKED_ROWS = 4096
EXACT = 2**24
"""Whole numbers up to this one have a float32."""


@dataclass(frozen=True, eq=False)
class PackedBits:
    """A boolean matrix packed to eight columns per byte, for fast reads of chosen rows and columns."""

    bits: np.ndarray

    @classmethod
    def pack(cls, matrix: "csr_matrix") -> "PackedBits":
        """The packed form of a sparse matrix, computed a block of rows at a time."""
        bits = np.empty((matrix.shape[0], -(-matrix.shape[1] // 8)), np.uint8)
        for a in range(0, len(bits), PACKED_ROWS):
            bits[a : a + PACKED_ROWS] = np.packbits(matrix[a : a + PACKED_ROWS].astype(bool).toarray(), axis=1)
        return cls(bits)

    def at(self, rows: Integer[np.ndarray, "n"], columns: Integer[np.ndarray, "m"]) -> Bool[np.ndarray, "n m"]:
        """Whether predicates hold at tokens, for chosen rows and columns."""
        masks = (128 >> (columns & 7)).astype(np.uint8)
        return (self.bits[rows[:, None], columns >> 3] & masks) != 0


@dataclass(frozen=True, eq=False)
class ListCounts:
    """For each of several lists of tokens, the number of them on which each predicate holds."""

    common: Int[np.ndarray, "n_common"]
    """columns of the predicates that are dense"""
    rare: Int[np.ndarray, "n_rare"]
    """columns of the others"""
    dense: Float[np.ndarray, "n_lists n_common"]
    """counts of the common ones: whole numbers"""
    sparse: "csr_matrix"
    """(n_lists, n_rare) counts of the others"""

    def of(self, lists: Int[np.ndarray, "n"]) -> Int[np.ndarray, "n n_predicates"]:
        """The counts of some lists."""
        found = np.empty((len(lists), len(self.common) + len(self.rare)), np.int64)
        found[:, self.common] = self.dense[lists]
        found[:, self.rare] = self.sparse[lists].toarray()
        return found


class PredicateSums:
    """A predicate matrix (n_tokens, n_predicates), arranged to be summed over lists of tokens."""

    def __init__(self, matrix: "csr_matrix", holds: Int[np.ndarray, "n_predicates"]) -> None:
        """`holds`: number of tokens on which each predicate holds."""
        order, self.n_tokens = np.argsort(-holds, kind="stable"), matrix.shape[0]
        self.common, self.rare = np.sort(order[:N_COMMON]), np.sort(order[N_COMMON:])
        bits = PackedBits.pack(matrix[:, self.common]).bits
        packed = np.zeros((self.n_tokens, N_COMMON // 8), np.uint8)
        packed[:, : bits.shape[1]] = bits
        kinds, numbers = np.unique(packed.view(np.uint64)[:, 0], return_inverse=True)
        self._kinds = numbers.astype(np.int32)
        rows = np.unpackbits(kinds.view(np.uint8).reshape(-1, N_COMMON // 8), axis=1, count=len(self.common))
        self._table = torch.from_numpy(rows).to(torch.float32 if self.n_tokens <= EXACT else torch.float64)
        self._others = matrix[:, self.rare].astype(np.int32)

    def over(self, tokens: Integer[np.ndarray, "nnz"], offsets: Integer[np.ndarray, "n_lists_1"]) -> ListCounts:
        """The counts of lists of tokens, list i being `tokens[offsets[i] : offsets[i + 1]]`."""
        kinds, starts = torch.from_numpy(self._kinds[tokens]), torch.from_numpy(offsets.astype(np.int32, copy=False))
        dense = self._table.new_zeros(len(offsets) - 1, len(self.common))
        if len(tokens):
            dense = embedding_bag(kinds, self._table, starts, mode="sum", include_last_offset=True)
        lists = as_csr(np.ones(len(tokens), np.int32), tokens, starts.numpy(), (len(offsets) - 1, self.n_tokens))
        return ListCounts(self.common, self.rare, dense.numpy(), lists @ self._others)

    @cached_property
    def pairs(self) -> Int[np.ndarray, "n_predicates n_predicates"]:
        """Number of tokens on which each two predicates hold together."""
        n, lists = len(self.common) + len(self.rare), self._others.tocsc()
        found = np.empty((n, n), np.int64)
        found[self.rare] = self.over(lists.indices, lists.indptr).of(np.arange(len(self.rare)))
        found[np.ix_(self.common, self.rare)] = found[np.ix_(self.rare, self.common)].T
        uses, table = np.bincount(self._kinds, minlength=len(self._table)), self._table.double().numpy()
        found[np.ix_(self.common, self.common)] = (table.T * uses) @ table
        return found

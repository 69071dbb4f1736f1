"""`RowWords`: the token of each row of a store, or where rows are documents the different words of each."""

from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from typing import TypeAlias

import numpy as np
from jaxtyping import Integer

from saelab.functional.indices import ROWS_AT_ONCE
from saelab.stores.corpus import Places, StoredText

WordPairs: TypeAlias = tuple[Integer[np.ndarray, "n_pairs"], Integer[np.ndarray, "n_pairs"]]
"""Rows in ascending order, and a token id of each."""


@dataclass(frozen=True, eq=False)
class RowWords:
    """The token of each row of a store; of a document its different words, whatever their case, each by its first id.

    Signs are no words of a document. Text is read a part at a time.
    """

    text: StoredText
    where: Places
    """index in the text of each row"""
    n_rows: int

    def span(self, start: int, stop: int) -> tuple[int, int]:
        """Where the text of the documents `start:stop`, at least one, begins and ends."""
        borders = self.where[start : stop + 1]
        return int(borders[0]), int(borders[-1]) if stop < self.n_rows else len(self.text)

    def read(self, start: int, stop: int) -> WordPairs:
        """The words of rows `start:stop`, which are counted from `start`."""
        stop = min(stop, self.n_rows)
        if not self.text.of_documents or start >= stop:
            ids = self.text.token_ids[self.where[start:stop]]
            return np.arange(len(ids)), ids
        first, end = self.span(start, stop)
        words, begins = self.text.same_words[self.text.token_ids[first:end]], np.zeros(end - first, np.int64)
        begins[self.where[start:stop] - first] = 1
        kept = words >= 0
        keys = np.unique(((np.cumsum(begins) - 1)[kept] << 32) | words[kept])
        return keys >> 32, keys & 0xFFFFFFFF

    def at(self, rows: Integer[np.ndarray, "n"]) -> WordPairs:
        """The words of some rows, which are in ascending order and numbered from 0."""
        parts = [(np.zeros(0, np.int64), np.zeros(0, np.int64))]
        if not self.text.of_documents:
            parts = [(np.arange(len(rows)), self.text.token_ids[self.where.at(rows)])]
        for start in (
            range(int(rows[0]), int(rows[-1]) + 1, ROWS_AT_ONCE) if self.text.of_documents and len(rows) else ()
        ):
            low, high = np.searchsorted(rows, (start, start + ROWS_AT_ONCE)).tolist()
            if low < high:
                at, ids = self.read(start, int(rows[high - 1]) + 1)
                place = np.searchsorted(rows[low:high], at + start)
                kept = rows[low + place] == at + start
                parts.append((place[kept] + low, ids[kept]))
        return np.concatenate([at for at, _ in parts]), np.concatenate([ids for _, ids in parts])

    @cached_property
    def counts(self) -> Counter[int]:
        """Number of rows of each token id; of each word, the documents that hold it."""
        counts: Counter[int] = Counter()
        for start in range(0, self.n_rows, ROWS_AT_ONCE):
            ids, n = np.unique(self.read(start, start + ROWS_AT_ONCE)[1], return_counts=True)
            counts.update(dict(zip(ids.tolist(), n.tolist(), strict=True)))
        return counts

    def of_firings(
        self, offsets: Integer[np.ndarray, "n_features_1"], rows: Integer[np.ndarray, "nnz"], start: int, stop: int
    ) -> tuple[Integer[np.ndarray, "n_features_1"], Integer[np.ndarray, "n"]]:
        """The token ids on which features fire, and where those of each begin.

        Args:
            offsets: feature i fires at `rows[offsets[i]:offsets[i + 1]]`.
            rows: counted from `start`.
            start: first row that may be among them.
            stop: row after the last.
        """
        at, ids = self.read(start, stop)
        if not self.text.of_documents:
            return offsets, ids[rows]
        begins = np.searchsorted(at, np.arange(stop - start + 1))
        counts = np.diff(begins)[rows]
        ends = np.append(0, np.cumsum(counts))
        return ends[offsets], ids[np.arange(ends[-1]) + np.repeat(begins[rows] - ends[:-1], counts)]

"""Lazy alignment matrix between the rows of two feature stores with different tokenizers."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from jaxtyping import Bool, Int, Integer

from saelab.functional.marking import MarkedRows, number_rows
from saelab.stores.features import FeatureStore
from saelab.universality.documents import REASONS, TOKENS_AT_ONCE, Spelled, SpelledText, find_overlap
from saelab.universality.versions import Versions

if TYPE_CHECKING:
    from scipy.sparse import csr_matrix


class _Pairs(NamedTuple):
    """Tokens of some documents of both sides that share characters."""

    sides: tuple[Spelled, Spelled]
    at: tuple[np.ndarray, np.ndarray]
    """bytes that belong together, in the order of both"""
    unclear: tuple[np.ndarray, np.ndarray]
    """bytes whose partners are not known"""
    tokens: tuple[np.ndarray, np.ndarray]
    shared: np.ndarray
    """number of characters that both tokens cover"""

    @property
    def sole(self) -> Bool[np.ndarray, "n_pairs"]:
        """Pairs of tokens that cover exactly the same characters."""
        whole = [side.whole(at)[own] for side, at, own in zip(self.sides, self.at, self.tokens, strict=True)]
        return np.logical_and.reduce(whole + [np.bincount(own)[own] == 1 for own in self.tokens])


class AlignedRows:
    """Sparse alignment weights between the rows of two stores, computed slice by slice.

    `self[start:stop] @ z_b` are codes of b for `rows[start:stop]` of a. Memory: a few numbers per document and one bool
    per row of a. Documents of a are processed in groups that do not overlap, mostly one each, so that rows ascend.
    """

    def __init__(self, a: FeatureStore, b: FeatureStore) -> None:
        self.stores = a, b
        self.texts = SpelledText(a.text), SpelledText(b.text)
        versions = Versions(self.texts)
        self.left_out, self.n_cut, self.partners = versions.left_out(), versions.n_cut, versions.partners
        self.documents = np.flatnonzero(self.partners >= 0)
        if len(self.documents) == 0:
            raise ValueError(
                f"`a` and `b` must have documents in common, got none (left out: {self.left_out}). "
                "Harvest both on one text, with tokenizers that tell how their tokens read."
            )
        first, end = self.texts[0].span(self.documents)
        groups = np.flatnonzero(np.append(True, np.maximum.accumulate(end)[:-1] <= first[1:]))
        self._groups = np.append(groups, len(self.documents))
        self._n_tokens = np.cumsum(np.add.reduceat(self.texts[0].sizes[self.documents], groups))
        self._survey(a.where.find(first[groups])[0], [versions.without(k) for k in (0, 1)])

    def _survey(self, borders: Int[np.ndarray, "n_groups"], left: list[list[int]]) -> None:
        """Count the aligned rows of each group, and the unaligned ones by reason."""
        marks, counts = np.zeros(len(self.stores[0]), bool), np.zeros(len(borders), np.int64)
        whys = np.zeros((2, len(REASONS)), np.int64)
        n_sole = n_rows_b = 0
        for first, end in self._batches(0, len(borders)):
            pairs = self._pair(self._members(first, end))
            found = [store.where.find(side.places)[1] for store, side in zip(self.stores, pairs.sides, strict=True)]
            kept, (mine, theirs) = _find_rows(pairs, found)
            n_sole += int(pairs.sole[kept].sum())
            rows, rows_b = number_rows(mine)[0], number_rows(theirs)[0]
            marks[rows], n_rows_b = True, n_rows_b + len(rows_b)
            counts[first:end] = np.diff(np.append(np.searchsorted(rows, borders[first:end]), len(rows)))
            for k, own in enumerate((rows, rows_b)):
                why = pairs.sides[k].judge(pairs.at[k], pairs.unclear[k])
                whys[k] += _count(why, (found[k] >= 0) & ~np.isin(found[k], own))
        for k, (text, store) in enumerate(zip(self.texts, self.stores, strict=True)):
            for batch in text.batches(left[k]):
                spelled = text.spell(batch)
                whys[k] += _count(spelled.why, store.where.find(spelled.places)[1] >= 0)
        self.rows, self._offsets = MarkedRows(marks), np.append(0, np.cumsum(counts))
        self.n_aligned, self.n_sole = (len(self.rows), n_rows_b), n_sole
        self.unaligned = {
            name: {reason: n for reason, n in zip(REASONS, own, strict=True) if n}
            for name, own in zip("ab", whys.tolist(), strict=True)
        }
        if len(self.rows) == 0:
            raise ValueError(
                f"`a` and `b` must have rows in common, got none in {len(self.documents)} common documents (without a "
                f"partner: {self.unaligned}). Harvest with masks that keep the same text."
            )

    @property
    def shape(self) -> tuple[int, int]:
        """Number of aligned rows of a, and of rows of b."""
        return len(self.rows), len(self.stores[1])

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, part: slice) -> "csr_matrix":
        from scipy.sparse import csr_matrix, vstack

        start, stop, _ = part.indices(len(self))
        if stop <= start:
            return csr_matrix((0, self.shape[1]), dtype=np.float32)
        first = int(np.searchsorted(self._offsets, start, "right")) - 1
        end = int(np.searchsorted(self._offsets, stop))
        parts = [self._weigh(self._members(*batch)) for batch in self._batches(first, end)]
        return vstack(parts, format="csr")[start - self._offsets[first] : stop - self._offsets[first]]

    def _batches(self, first: int, end: int) -> Iterator[tuple[int, int]]:
        """Groups of at most TOKENS_AT_ONCE tokens together, or a longer one alone."""
        while first < end:
            before = self._n_tokens[first - 1] if first else 0
            fits = int(np.searchsorted(self._n_tokens, before + TOKENS_AT_ONCE, "right"))
            stop = min(max(fits, first + 1), end)
            yield first, stop
            first = stop

    def _members(self, first: int, end: int) -> Integer[np.ndarray, "n"]:
        """The documents of some groups."""
        return self.documents[self._groups[first] : self._groups[end]]

    def _pair(self, documents: Integer[np.ndarray, "n"]) -> _Pairs:
        """The tokens of some documents and of their partners that share characters."""
        a, b = self.texts[0].spell(documents.tolist()), self.texts[1].spell(self.partners[documents].tolist())
        overlaps = [find_overlap(a, b, k, k) for k in range(len(documents))]
        known = [overlap for overlap in overlaps if overlap is not None]
        assert len(known) == len(overlaps)  # they agreed when they were paired
        at = [np.concatenate([overlap.at[k] for overlap in known]) for k in (0, 1)]
        unclear = [np.concatenate([overlap.unclear[k] for overlap in known]) for k in (0, 1)]
        mine, theirs = a.tokens[at[0]], b.tokens[at[1]]
        first = np.flatnonzero(np.append(True, (np.diff(mine) != 0) | (np.diff(theirs) != 0)))
        shared = np.add.reduceat(np.concatenate([overlap.shares for overlap in known]), first)
        return _Pairs((a, b), (at[0], at[1]), (unclear[0], unclear[1]), (mine[first], theirs[first]), shared)

    def _weigh(self, documents: Integer[np.ndarray, "n"]) -> "csr_matrix":
        """The weights of all aligned rows of some documents, which are whole groups."""
        from scipy.sparse import csr_matrix

        pairs = self._pair(documents)
        found = [store.where.find(side.places)[1] for store, side in zip(self.stores, pairs.sides, strict=True)]
        kept, (mine, theirs) = _find_rows(pairs, found)
        rows, numbers = number_rows(mine)
        shared = pairs.shared[kept]
        weights = (shared / np.bincount(numbers, shared)[numbers]).astype(np.float32)
        return csr_matrix((weights, (numbers, theirs)), shape=(len(rows), self.shape[1]))


def _find_rows(pairs: _Pairs, found: list[np.ndarray]) -> tuple[np.ndarray, list[np.ndarray]]:
    """Which pairs of tokens both masks kept, and the rows of these; `found` are those of all tokens."""
    rows = [own[tokens] for own, tokens in zip(found, pairs.tokens, strict=True)]
    kept = (rows[0] >= 0) & (rows[1] >= 0)
    return kept, [own[kept] for own in rows]


def _count(why: np.ndarray, which: np.ndarray) -> np.ndarray:
    return np.bincount(why[which], minlength=len(REASONS))

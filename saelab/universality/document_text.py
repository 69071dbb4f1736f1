"""Documents as byte strings without white space, and the overlap of two versions of a document.

Tokens whose text is unknown (<unk>) are aligned by the other version, which has the characters they stand for.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Bool, Float, Int, Integer

from saelab.functional.indices import ROWS_AT_ONCE, find_runs
from saelab.labels.rules.token_view import SPECIAL
from saelab.stores.corpus import Places, StoredText

UNKNOWN = 0xFE
"""Byte for a token whose text is not known; UTF-8 has no such byte."""
ANCHOR, REACH = 5, 400
"""Number of bytes that must agree after an unknown token, and number of bytes searched for them."""
PART = 0xFF
"""Byte for a part of a character whose bytes are not known (U+FFFD); UTF-8 has no such byte."""
SIZES = np.repeat([1, 0, 2, 3, 4, 0], [0x80, 0x40, 0x20, 0x10, 8, 8])
"""number of bytes of a character, by its first byte; 0 for bytes inside one"""
SPACES = re.compile(rb"\xc2[\x85\xa0]|\xe1\x9a\x80|\xe2(\x80[\x80-\x8a\xa8\xa9\xaf]|\x81\x9f)|\xe3\x80\x80")
"""white space beyond ASCII, which may be split over tokens"""
HIGH = bytes(range(0x80, 0x100))
BLUR = bytes(range(0x80)) + bytes([PART]) * 0x80
BEGINNING = 16
"""Number of leading ASCII characters by which two documents are recognized as versions of one."""
TOKENS_AT_ONCE = 2**15
"""Number of tokens whose characters are held at once."""
VOCABULARY = 2**22
REASONS = (
    "special tokens",
    "of white space",
    "in documents left out",
    "behind the end of the other's text",
    "in characters split unclearly",
    "masked on the other side",
)
SPECIALS, WHITE, ELSEWHERE, BEHIND, SPLIT, MASKED = range(len(REASONS))


@runtime_checkable
class TextRows(Protocol):
    """Rows of a text, such as those of a feature store: the tokens that a mask kept, and all tokens."""

    def __len__(self) -> int: ...

    @property
    def text(self) -> StoredText:
        """All tokens."""

    @property
    def where(self) -> Places:
        """Index in `text` of each row."""


def bridge(a: bytes, b: bytes) -> tuple[Int[np.ndarray, "n"], Int[np.ndarray, "n"]] | None:
    """Corresponding byte positions in two spellings of one document; None where the texts differ apart from unknown
    tokens.

    Each unknown token may stand for any characters. After one, the spellings continue at the nearest position where the
    next five bytes agree.

    >>> at = bridge(b"the" + bytes([UNKNOWN]) + b"ranaway.", b"thefoxranaway.")
    >>> at[0].tolist(), at[1].tolist()
    ([0, 1, 2, 4, 5, 6, 7, 8, 9, 10, 11], [0, 1, 2, 6, 7, 8, 9, 10, 11, 12, 13])
    """
    x, y = np.frombuffer(a, np.uint8), np.frombuffer(b, np.uint8)
    i = j = 0
    parts: list[tuple[int, int, int]] = []
    while i < len(x) and j < len(y):
        n = _agree(x[i:], y[j:])
        if n:
            parts.append((i, j, n))
            i, j = i + n, j + n
        if i == len(x) or j == len(y):
            break
        if UNKNOWN not in (x[i], y[j]):
            return None
        found = _resume(a, b, i, j)
        if found is None:
            break
        i, j = found
    if not parts:
        return None
    at = [np.concatenate([np.arange(part[k], part[k] + part[2]) for part in parts]) for k in (0, 1)]
    return at[0], at[1]


def _agree(x: np.ndarray, y: np.ndarray) -> int:
    """Number of leading bytes on which two spellings agree, unknown tokens excluded."""
    n = min(len(x), len(y))
    differ = np.flatnonzero((x[:n] != y[:n]) | (x[:n] == UNKNOWN))
    return int(differ[0]) if len(differ) else n


def _resume(a: bytes, b: bytes, i: int, j: int) -> tuple[int, int] | None:
    """The nearest positions from which both spellings agree again."""
    least_a, least_b = int(b[j] == UNKNOWN), int(a[i] == UNKNOWN)  # an unknown token stands for at least one byte
    for start in range(i + least_a, i + REACH):
        anchor = a[start : start + ANCHOR]
        if len(anchor) < ANCHOR:  # too few for an anchor: only the end of both counts
            place = len(b) - len(anchor)
            ends = anchor and start == i + least_a and b.endswith(anchor) and place >= j + least_b
            return (start, place) if ends and UNKNOWN not in anchor else None
        if UNKNOWN in anchor:
            continue
        place = b.find(anchor, j + least_b, j + REACH + ANCHOR)
        if place >= 0:
            return start, place
    return None


@dataclass(frozen=True, eq=False)
class Spelled:
    """The characters of some documents as bytes, without white space.

    Documents, tokens and bytes are numbered within these documents.
    """

    shares: Float[np.ndarray, "n_bytes"]
    """1 / bytes of the character; 0 for a part of a character"""
    tokens: Integer[np.ndarray, "n_bytes"]
    """the token of each byte"""
    places: Integer[np.ndarray, "n_tokens"]
    """position of each token in the text"""
    starts: Integer[np.ndarray, "n_docs_1"]
    """first byte of each document"""
    doc_ids: list[int]
    documents: list[bytes]
    """UTF-8 without white space; bytes PART and UNKNOWN stand for what is not known"""
    opaque: Bool[np.ndarray, "n_docs"]
    """documents with tokens whose text is not known"""
    why: Integer[np.ndarray, "n_tokens"]
    """reason for no characters, SPECIALS or WHITE; ELSEWHERE for tokens with characters"""

    def skeleton(self, i: int) -> bytes:
        """The ASCII characters of a document, which no tokenizer splits."""
        return self.documents[i].translate(None, HIGH)

    def why_left(self, i: int, beginnings: set[bytes]) -> str:
        """The reason why a document has no partner; `beginnings` are those of the other side's left-out documents."""
        if self.opaque[i]:
            return "tokens of unknown text"
        if not self.documents[i]:
            return "no text"
        return "text differs" if self.skeleton(i)[:BEGINNING] in beginnings else "not on the other side"

    def whole(self, at: np.ndarray) -> np.ndarray:
        """Whether each token has all of its bytes among those at `at`."""
        seen = np.zeros(len(self.tokens), bool)
        seen[at] = True
        n = len(self.places)
        return np.bincount(self.tokens[seen], minlength=n) == np.bincount(self.tokens, minlength=n)

    def judge(self, at: np.ndarray, unclear: np.ndarray) -> np.ndarray:
        """For each token the reason why its row has no partner, if it has none; every document must have a partner."""
        why = self.why.copy()
        why[self.tokens] = BEHIND
        why[self.tokens[unclear]] = SPLIT
        why[self.tokens[at]] = MASKED
        return why


class SpelledText:
    """Documents of a text as bytes, computed on demand; memory grows with token ids and documents only.

    Documents are numbered in the order in which they first appear; one may be in several pieces.
    """

    def __init__(self, text: StoredText) -> None:
        self.text = text
        self._ids = find_ids(text.token_ids)
        tokens = [Token.spell(text.strings.get(i), text.parts.get(i)) for i in self._ids.tolist()]
        self._spelled = np.frombuffer(b"".join(token.spelled for token in tokens), np.uint8)
        self._sizes = np.array([len(token.spelled) for token in tokens])
        self._begins = np.cumsum(self._sizes) - self._sizes
        self._opaque = np.array([token.opaque for token in tokens])
        self._why = np.array([token.why for token in tokens], np.int8)
        starts = find_runs(text.doc_ids)
        ids, first, numbers = np.unique(text.doc_ids[starts], return_index=True, return_inverse=True)
        by_place, order = np.argsort(first), np.argsort(first[numbers], kind="stable")
        self.doc_ids = ids[by_place]
        self._runs = np.stack([starts, np.append(starts[1:], len(text))])[:, order]
        self._borders = np.append(0, np.cumsum(np.bincount(numbers)[by_place]))
        self.sizes = np.add.reduceat(np.diff(self._runs, axis=0)[0], self._borders[:-1])
        """tokens of each document"""

    def __len__(self) -> int:
        return len(self.doc_ids)

    def span(self, documents: Integer[np.ndarray, "n"]) -> tuple[np.ndarray, np.ndarray]:
        """The first position of each of some documents, and the end of its last piece."""
        return self._runs[0, self._borders[documents]], self._runs[1, self._borders[documents + 1] - 1]

    def batches(self, documents: Iterable[int]) -> Iterator[list[int]]:
        """Batches of documents with at most TOKENS_AT_ONCE tokens together; a longer document is a batch of its own."""
        batch, size = list[int](), 0
        for i in documents:
            if batch and size + self.sizes[i] > TOKENS_AT_ONCE:
                yield batch
                batch, size = [], 0
            batch.append(i)
            size += int(self.sizes[i])
        if batch:
            yield batch

    @cached_property
    def _numbers(self) -> Int[np.ndarray, "n"] | None:
        """Index of each id among all ids, where ids are no larger than those of a vocabulary: a table is faster than a
        search.
        """
        if len(self._ids) == 0 or self._ids[-1] >= VOCABULARY:
            return None
        numbers = np.zeros(int(self._ids[-1]) + 1, np.int32)
        numbers[self._ids] = np.arange(len(self._ids))
        return numbers

    def _number(self, ids: Integer[np.ndarray, "n"]) -> Integer[np.ndarray, "n"]:
        return np.searchsorted(self._ids, ids) if self._numbers is None else self._numbers[ids]

    def spell(self, documents: Sequence[int]) -> Spelled:
        """The bytes of some documents, in this order."""
        chosen = np.array(documents, np.int64)
        starts, ends = self._runs[:, _expand(self._borders[chosen], self._borders[chosen + 1])]
        places = _expand(starts, ends)
        kinds = self._number(self.text.token_ids[places])
        lengths = self._sizes[kinds]
        spelled = self._spelled[_expand(self._begins[kinds], self._begins[kinds] + lengths)]
        of_documents = np.append(0, np.cumsum(self.sizes[chosen]))  # where tokens of each begin
        borders = np.append(0, np.cumsum(lengths))[of_documents]
        kept = _find_kept(spelled, borders)
        spelled, starts = spelled[kept], np.append(0, np.cumsum(kept))[borders]
        raw = spelled.tobytes()
        return Spelled(
            shares=_share(spelled, starts),
            tokens=np.repeat(np.arange(len(places)), lengths)[kept],
            places=places,
            starts=starts,
            doc_ids=self.doc_ids[chosen].tolist(),
            documents=[raw[i:j] for i, j in zip(starts[:-1].tolist(), starts[1:].tolist(), strict=True)],
            opaque=np.diff(np.append(0, np.cumsum(self._opaque[kinds]))[of_documents]) > 0,
            why=self._why[kinds],
        )


def find_ids(column: Integer[np.ndarray, "n"]) -> Integer[np.ndarray, "n_ids"]:
    """The different ids of a column in increasing order, found part by part."""
    found = column[:0]
    for start in range(0, len(column), ROWS_AT_ONCE):
        found = np.union1d(found, column[start : start + ROWS_AT_ONCE])
    return found


def _expand(starts: Integer[np.ndarray, "n"], ends: Integer[np.ndarray, "n"]) -> Int[np.ndarray, "m"]:
    """The numbers start..end of each pair, one after another."""
    lengths = ends - starts
    behind = np.cumsum(lengths)
    return np.repeat(starts - behind + lengths, lengths) + np.arange(behind[-1] if len(behind) else 0)


def _find_kept(spelled: np.ndarray, borders: np.ndarray) -> np.ndarray:
    """Bytes that are not white space beyond ASCII; ASCII's and that of whole tokens was left out before."""
    kept = np.ones(len(spelled), bool)
    for match in SPACES.finditer(spelled.tobytes()):
        start, stop = match.span()
        if borders[np.searchsorted(borders, start, "right")] >= stop:  # of one document
            kept[start:stop] = False
    return kept


def _share(spelled: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """The share of its character that each byte is; 0 where it is not known. No character spans two documents."""
    if not (spelled >= HIGH[0]).any():
        return np.ones(len(spelled), np.float32)
    sizes = SIZES[spelled]
    begins = sizes > 0
    begins[starts[starts < len(spelled)]] = True
    last = np.maximum.accumulate(np.where(begins, np.arange(len(spelled)), 0))
    shares = 1 / np.maximum(sizes[last], 1)
    return np.where(spelled == PART, 0, shares).astype(np.float32)


class Token(NamedTuple):
    """The bytes that a token id adds to a text."""

    spelled: bytes = b""
    why: int = SPECIALS
    opaque: bool = False

    @classmethod
    def spell(cls, string: str | None, raw: bytes | None = None) -> "Token":
        """The bytes of a token without white space, from its string or, for a part of a character, its raw bytes."""
        if raw is not None:
            return cls(b"".join(raw.split()), ELSEWHERE)
        if string is None or "unk" in (SPECIAL.fullmatch(string) or [""])[0].lower():
            return cls(bytes([UNKNOWN]), ELSEWHERE, opaque=True)
        if SPECIAL.fullmatch(string):
            return cls()
        parts = [
            bytes([PART]) if c == "\ufffd" else c.encode("utf-8", "surrogatepass") for c in "".join(string.split())
        ]
        return cls(b"".join(parts), ELSEWHERE if parts else WHITE)


class Overlap(NamedTuple):
    """The common part of two documents, byte by byte in the order of both."""

    at: tuple[np.ndarray, np.ndarray]
    """bytes of each side that correspond"""
    shares: np.ndarray
    """share of a character that each byte is"""
    ends: tuple[bool, bool]
    """whether the overlap reaches the end of each document"""
    unclear: tuple[np.ndarray, np.ndarray] = (np.arange(0), np.arange(0))
    """bytes whose partners are not known"""


def find_overlap(a: Spelled, b: Spelled, i: int, j: int) -> Overlap | None:
    """The common beginning of two documents; None where they differ before either ends.

    Args:
        a: documents of one side.
        b: documents of the other side.
        i: index of the document in a.
        j: index of the document in b.
    """
    mine, theirs = a.documents[i], b.documents[j]
    if a.opaque[i] or b.opaque[j]:
        return _bridge(a, b, i, j)
    n = min(len(mine), len(theirs))
    if mine[:n] == theirs[:n]:
        at = a.starts[i] + np.arange(n), b.starts[j] + np.arange(n)
        return Overlap(at, _shares(a, b, *at), (n == len(mine), n == len(theirs)))
    if PART not in mine and PART not in theirs:
        return None
    skeletons = a.skeleton(i), b.skeleton(j)
    n = min(map(len, skeletons))
    return _reconcile(a, b, i, j, 2 * n) if skeletons[0][:n] == skeletons[1][:n] else None


def _bridge(a: Spelled, b: Spelled, i: int, j: int) -> Overlap | None:
    """The overlap of two documents with tokens whose text is not known."""
    found = bridge(a.documents[i], b.documents[j])
    if found is None:
        return None
    at = found[0] + a.starts[i], found[1] + b.starts[j]
    sizes = len(a.documents[i]), len(b.documents[j])
    ends = bool(found[0][-1] == sizes[0] - 1), bool(found[1][-1] == sizes[1] - 1)
    within = [side.starts[k] + np.arange(size) for side, k, size in ((a, i, sizes[0]), (b, j, sizes[1]))]
    unclear = np.setdiff1d(within[0][: found[0][-1] + 1], at[0]), np.setdiff1d(within[1][: found[1][-1] + 1], at[1])
    return Overlap(at, _shares(a, b, *at), ends, unclear)


def _shares(a: Spelled, b: Spelled, at_a: np.ndarray, at_b: np.ndarray) -> np.ndarray:
    """The share of a character that each byte is, from the side that knows it; 1 where neither does."""
    known = np.maximum(a.shares[at_a], b.shares[at_b]).astype(np.float64)
    return np.where(known > 0, known, 1.0)


def _reconcile(a: Spelled, b: Spelled, i: int, j: int, last: int) -> Overlap | None:
    """The overlap of two documents with parts of characters, cell by cell; cell number `last` is the end of one of
    them.
    """
    x, y = (np.frombuffer(side.documents[k], np.uint8) for side, k in ((a, i), (b, j)))
    cells = _number_cells(x, last), _number_cells(y, last)
    counts = [np.bincount(mine, minlength=last + 2) for mine in cells]
    parts = np.bincount(np.append(cells[0][x == PART], cells[1][y == PART]), minlength=last + 2) > 0
    if not parts[last]:  # one of them may be cut in it
        n = min(counts[0][last], counts[1][last])
        for mine, n_mine in zip(cells, counts, strict=True):
            mine[np.searchsorted(mine, last) + n :] = last + 1
            n_mine[last] = n
    ends = bool(cells[0][-1] <= last), bool(cells[1][-1] <= last)
    equal = counts[0] == counts[1]
    equal[-1], parts[-1] = False, True  # behind the end
    if not any(ends) or not (equal | parts).all():
        return None
    at = [np.flatnonzero(equal[mine]) for mine in cells]
    wrong = (x[at[0]] != y[at[1]]) & (x[at[0]] != PART) & (y[at[1]] != PART)
    wrong_cells = cells[0][at[0][wrong]]
    if not parts[wrong_cells].all():
        return None
    equal[wrong_cells] = False
    at = [np.flatnonzero(equal[mine]) for mine in cells]
    pieces = [(at[0], at[1], _shares(a, b, at[0] + a.starts[i], at[1] + b.starts[j]))]
    for cell in np.flatnonzero(~equal[:last] & (counts[0][:last] > 0) & (counts[1][:last] > 0)).tolist():
        pieces += _stretch(a, b, i, j, *(slice(*np.searchsorted(mine, [cell, cell + 1])) for mine in cells))
    bytes_a, bytes_b, shares = (np.concatenate(parts) for parts in zip(*pieces, strict=True))
    order = np.argsort(bytes_a, kind="stable")
    found = bytes_a[order] + a.starts[i], bytes_b[order] + b.starts[j]
    within = [side.starts[k] + np.flatnonzero(mine <= last) for side, k, mine in ((a, i, cells[0]), (b, j, cells[1]))]
    return Overlap(found, shares[order], ends, (np.setdiff1d(within[0], found[0]), np.setdiff1d(within[1], found[1])))


def _number_cells(spelled: np.ndarray, last: int) -> np.ndarray:
    """The cell of each byte: ASCII characters have odd numbers, what stands between two of them an even one."""
    high = spelled >= HIGH[0]
    return np.minimum(2 * np.cumsum(~high) - ~high, last + 1)


def _stretch(
    a: Spelled, b: Spelled, i: int, j: int, mine: slice, theirs: slice
) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Bytes of one cell spread over each other, where they are of a single token on one side."""
    at_a, at_b = np.arange(mine.start, mine.stop), np.arange(theirs.start, theirs.stop)
    own_a, own_b = a.tokens[at_a + a.starts[i]], b.tokens[at_b + b.starts[j]]
    single_a, single_b = own_a[0] == own_a[-1], own_b[0] == own_b[-1]
    if not (single_a or single_b):
        return []
    shares = a.shares[at_a + a.starts[i]], b.shares[at_b + b.starts[j]]
    n = max(len(at_a), len(at_b)) if single_a and single_b else len(at_a) if single_b else len(at_b)
    known = next((own for own in shares if len(own) == n and own.all()), None)
    spread = known if known is not None else np.full(n, (max(own.sum() for own in shares) or 1.0) / n)
    return [(at_a[np.arange(n) * len(at_a) // n], at_b[np.arange(n) * len(at_b) // n], spread)]

"""`StoredText`: all tokens of the text behind a feature store, masked ones included, and splits by document.

Also the text of byte-level tokens, with characters that are split over several tokens, and `Places`: the index in the
text of each row of a feature store.
"""

import re
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Int, Integer, Shaped
from numpy.typing import NDArray

from saelab.functional.indices import ROWS_AT_ONCE, find_runs
from saelab.stores.files import checksum, find_inside, save_tensors, write_json
from saelab.stores.packing import smallest_int
from saelab.stores.tensors import TensorFile
from saelab.stores.validation import SEAL, naming, read_sealed, require_object

BYTE = re.compile("<0x([0-9A-Fa-f]{2})>")
"""how a byte that is not a character by itself is written, as in SentencePiece"""
TOKENS, STRINGS = "tokens.safetensors", "strings.json"
COLUMNS = ("token_ids", "doc_ids", "positions")
WHOLE = 8
"""How many times as long a window is where it shows a document from its beginning."""
LONGEST = 4
"""largest number of bytes of a character"""
SAMPLE_TOKENS, SHORT, CHARACTERS = 2**16, 1.5, 4
"""Tokens in the sample that decides whether tokens are mostly characters: mean length below 1.5; a word has about 4."""


def name_bytes(raw: bytes) -> str:
    """Bytes as text: whole characters decoded, bytes of incomplete characters written as <0xE4>.

    >>> name_bytes("c".encode() + "é".encode()[:1])
    'c<0xC3>'
    """
    read = raw.decode("utf-8", "surrogateescape")
    return "".join(_name(c) for c in read) if _is_escaped(read) else read


def read_name(text: str) -> bytes:
    """The bytes of a text that `name_bytes` returned.

    >>> read_name("c<0xC3>")
    b'c\\xc3'
    """
    parts = BYTE.split(text)  # text, two digits, text, ...
    return b"".join(bytes([int(p, 16)]) if i % 2 else p.encode("utf-8", "replace") for i, p in enumerate(parts))


def _is_escaped(text: str) -> bool:
    return any("\udc80" <= c <= "\udcff" for c in text)


def _name(c: str) -> str:
    """The character itself, or <0xE4> for an escaped byte."""
    return f"<0x{ord(c) - 0xDC00:02X}>" if "\udc80" <= c <= "\udcff" else c


@dataclass(frozen=True, eq=False)
class Spelling:
    """Consecutive tokens as one text, decoded from their bytes together."""

    pieces: Sequence[bytes]
    """bytes of each token"""

    @cached_property
    def _read(self) -> tuple[list[str], Int[np.ndarray, "n_chars"], Int[np.ndarray, "n_chars"]]:
        """Characters as they are shown, with the first and the last token of each."""
        chars = b"".join(self.pieces).decode("utf-8", "surrogateescape")
        sizes = _measure(chars)
        ends = np.cumsum(sizes)
        token = np.repeat(np.arange(len(self.pieces)), [len(piece) for piece in self.pieces])
        first, last = (token[at] for at in (ends - sizes, ends - 1))
        return ([_name(c) for c in chars] if _is_escaped(chars) else list(chars)), first, last

    @cached_property
    def text(self) -> str:
        """The text of the tokens; bytes that belong to no character are written as <0xE4>."""
        return "".join(self._read[0])

    @cached_property
    def words(self) -> tuple[str, ...]:
        """The characters that begin in each token, "" where it only continues one; joined they are `text`.

        >>> Spelling(["é".encode()[:1], "é".encode()[1:], b"t"]).words
        ('é', '', 't')
        """
        chars, first, _ = self._read
        found = [""] * len(self.pieces)
        for char, token in zip(chars, first.tolist(), strict=True):
            found[token] += char
        return tuple(found)

    @cached_property
    def touched(self) -> tuple[str, ...]:
        """The characters of which each token holds a byte; a character that is split is listed for all of its tokens.

        >>> Spelling(["é".encode()[:1], "é".encode()[1:], b"t"]).touched
        ('é', 'é', 't')
        """
        chars, first, last = self._read
        found = [""] * len(self.pieces)
        for char, a, b in zip(chars, first.tolist(), last.tolist(), strict=True):
            for token in range(a, b + 1):
                found[token] += char
        return tuple(found)

    @cached_property
    def _borders(self) -> Int[np.ndarray, "n_chars_1"]:
        """Where each character begins in `text`; a byte of no character is written with six characters."""
        return np.cumsum([0, *map(len, self._read[0])])

    def tokens_of(self, start: int, stop: int) -> slice:
        """The range of tokens that hold a byte of `text[start:stop]`, which must not be empty."""
        a, b = np.searchsorted(self._borders, [start, stop - 1], "right") - 1
        return slice(int(self._read[1][a]), int(self._read[2][b]) + 1)

    def find(self, pattern: "re.Pattern[str]") -> Bool[np.ndarray, "n_tokens"]:
        """Boolean mask of the tokens that hold a byte of a match of the pattern in `text`."""
        found = np.zeros(len(self.pieces), bool)
        for match in pattern.finditer(self.text):
            if match.end() > match.start():
                found[self.tokens_of(*match.span())] = True
        return found


def _measure(chars: str) -> Int[np.ndarray, "n_chars"]:
    """Number of bytes of each character in UTF-8; 1 for an escaped byte."""
    codes = np.frombuffer(chars.encode("utf-32-le", "surrogatepass"), np.uint32)
    escaped = (codes >= 0xDC80) & (codes <= 0xDCFF)
    return np.where(escaped, 1, 1 + (codes >= 0x80) + (codes >= 0x800) + (codes >= 0x10000)).astype(np.int64)


def group_words(words: Sequence[str]) -> Iterator[slice]:
    """Iterator over groups of tokens that share characters: one with a word, and those after it whose word is "".

    >>> list(group_words(["a", "é", "", "t"]))
    [slice(0, 1, None), slice(1, 3, None), slice(3, 4, None)]
    """
    start = 0
    for stop in range(1, len(words) + 1):
        if stop == len(words) or words[stop] != "":
            yield slice(start, stop)
            start = stop


def strongest(values: Sequence[float]) -> float:
    """The value of largest magnitude, with its sign, which represents a group of tokens; 0 for none."""
    return max(values, key=abs, default=0.0)


@dataclass(frozen=True, eq=False, kw_only=True)
class StoredText:
    """All tokens in the order of the text, without padding; columns may be memory-mapped."""

    token_ids: Integer[np.ndarray, "n_places"]
    doc_ids: Integer[np.ndarray, "n_places"]
    positions: Integer[np.ndarray, "n_places"]
    """in the sequence, from 0"""
    strings: Mapping[int, str]
    """text of each token id, spaces included; parts of characters as bytes, <0xE4>; a missing id is shown as <id>"""
    of_documents: bool = False
    """whether a row is a document, so that a window is the document from its first token on"""

    def __len__(self) -> int:
        return len(self.token_ids)

    @cached_property
    def parts(self) -> dict[int, bytes]:
        """Bytes of the tokens that hold parts of characters, by token id."""
        return {i: read_name(text) for i, text in self.strings.items() if BYTE.search(text)}

    def widen(self, n: int) -> int:
        """Number of tokens of a readable window: `n`, or four times as many where tokens are hardly longer than a
        character, and eight times as many of a document.
        """
        return WHOLE * n if self.of_documents else CHARACTERS * n if self._has_short_tokens else n

    @cached_property
    def _has_short_tokens(self) -> bool:
        ids, counts = np.unique(self.token_ids[:SAMPLE_TOKENS], return_counts=True)
        length = sum(len(self.strings.get(i, "")) * n for i, n in zip(ids.tolist(), counts.tolist(), strict=True))
        return bool(length < SHORT * counts.sum())

    def window(self, place: int, before: int, after: int) -> tuple[int, int]:
        """Start and end of the window around a token, within its document and sequence.

        Args:
            place: the token.
            before: largest number of tokens before it; the window may begin earlier, never inside a character.
            after: largest number of tokens after it. Where rows are documents, both together are tokens after it.
        """
        if self.of_documents:
            before, after = 0, before + after
        start, stop = max(0, place - before), min(len(self), place + after + 1)
        joined = self._follows(start, stop)
        breaks = np.flatnonzero(~joined) + start + 1
        start = int(breaks[breaks <= place].max(initial=start))
        while start > 0 and self.words(start, start + 1) == [""]:  # inside a character
            start -= 1
        return start, int(breaks[breaks > place].min(initial=stop))

    def _follows(self, start: int, stop: int) -> Bool[np.ndarray, "n"]:
        """Whether each token but the first follows the previous one in the same document and sequence."""
        docs, positions = self.doc_ids[start:stop], self.positions[start:stop].astype(np.int64)
        joined: NDArray[np.bool_] = (docs[1:] == docs[:-1]) & (positions[1:] > positions[:-1])
        return joined

    def words(self, start: int, stop: int) -> list[str]:
        """Text of the tokens `start:stop`; a character of several tokens is at the first of them, the others are ""."""
        ids = self.token_ids[start:stop].tolist()
        if self.parts.keys().isdisjoint(ids):
            return [self.strings.get(i, f"<{i}>") for i in ids]
        first, end = self._reach(start, stop)
        return list(self.spelling(first, end).words[start - first : stop - first])

    def spelling(self, start: int, stop: int) -> Spelling:
        """The tokens `start:stop` as one text in which the tokens of every character can be looked up."""
        known = self._pieces
        return Spelling([known[i] if i in known else f"<{i}>".encode() for i in self.token_ids[start:stop].tolist()])

    @cached_property
    def _pieces(self) -> dict[int, bytes]:
        return {
            i: self.parts[i] if i in self.parts else text.encode("utf-8", "replace") for i, text in self.strings.items()
        }

    def _reach(self, start: int, stop: int) -> tuple[int, int]:
        """Range of the tokens that may share characters with these: a few before and after, in the same document."""
        first, end = max(0, start - LONGEST + 1), min(len(self), stop + LONGEST - 1)
        breaks = np.flatnonzero(~self.goes_on(first, end)) + first + 1
        return int(breaks[breaks <= start].max(initial=first)), int(breaks[breaks >= stop].min(initial=end))

    def goes_on(self, start: int, stop: int) -> Bool[np.ndarray, "n"]:
        """For each token of `start:stop` but the last, whether the next token continues the same text.

        It does within a document, also from one row to the next.
        """
        docs, positions = self.doc_ids[start:stop], self.positions[start:stop].astype(np.int64)
        begins = positions[1:] == 0
        joined: NDArray[np.bool_] = (docs[1:] == docs[:-1]) & ((positions[1:] == positions[:-1] + 1) | begins)
        return joined

    @cached_property
    def same_words(self) -> Int[np.ndarray, "n_ids"]:
        """For each token id, the first id that spells the same word in any case and with any space; -1 for a token
        without a letter or digit, or without a string.
        """
        found = np.full(int(self.token_ids.max()) + 1 if len(self) else 0, -1)
        first: dict[str, int] = {}
        for i, text in sorted(self.strings.items()):
            if i < len(found):
                word = text.strip().casefold()
                found[i] = first.setdefault(word, i) if any(map(str.isalnum, word)) else -1
        return found

    def save(self, folder: Path) -> dict[str, str]:
        """Write columns (in the smallest integers that fit) and strings, and return checksums by file name."""
        columns = {"token_ids": self.token_ids, "doc_ids": self.doc_ids, "positions": self.positions}
        tensors = {name: torch.from_numpy(_shrink(column)) for name, column in columns.items()}
        crc32 = save_tensors(folder / TOKENS, tensors)
        write_json(folder / STRINGS, {str(i): text for i, text in sorted(self.strings.items())}, sealed=True)
        return {TOKENS: crc32, STRINGS: checksum(folder / STRINGS)}

    @classmethod
    def load(cls, folder: Path, of_documents: bool = False) -> "StoredText":
        """The text that `save` wrote, memory-mapped.

        Args:
            folder: the store's folder.
            of_documents: whether a row is a document.

        Raises:
            FileNotFoundError: a file is missing.
            ValueError: a file is damaged, columns differ in length, ids are negative or documents are not in order.
        """
        path = find_inside(folder, TOKENS)
        columns = map_arrays(path)
        shapes = {name: columns[name].shape for name in COLUMNS if name in columns}
        if set(columns) != set(COLUMNS) or len(set(shapes.values())) > 1 or len(shapes["token_ids"]) != 1:
            raise ValueError(
                f"{path} must hold {list(COLUMNS)}, of one length, got {shapes}. Harvest again with resume=False."
            )
        for name, column in columns.items():
            if column.dtype.kind not in "iu" or int(column.min(initial=0)) < 0:
                raise ValueError(
                    f"{path} must hold whole numbers of at least 0 as {name}, got others. "
                    "Harvest again with resume=False."
                )
        if not ascends(columns["doc_ids"]):
            raise ValueError(
                f"{path} must hold documents in their order, got doc_ids that fall. Harvest again with resume=False."
            )
        return cls(**columns, strings=_Strings(folder / STRINGS), of_documents=of_documents)


class _Strings(Mapping[int, str]):
    """Token strings of a JSON file, which is read on first use."""

    def __init__(self, path: Path) -> None:
        self._path = path

    @cached_property
    def _known(self) -> dict[int, str]:
        with naming(self._path):
            found, check_seal = read_sealed(self._path)
            held = require_object(found, "The strings of tokens")
            check_seal()
            held.pop(SEAL, None)
            if wrong := [
                i for i, text in held.items() if not (i.isdecimal() and len(i) < 12 and isinstance(text, str))
            ]:
                raise ValueError(
                    f"Strings must be texts by token id, got {wrong[0][:40]!r}. Harvest again with resume=False."
                )
        return {int(i): text for i, text in held.items()}

    def __getitem__(self, token_id: int) -> str:
        return self._known[token_id]

    def get(self, token_id: int, default: Any = None) -> Any:
        """The string of a token id, or the default: as every mapping's, without a call for each that is found."""
        return self._known.get(token_id, default)

    def __iter__(self) -> Iterator[int]:
        return iter(self._known)

    def __len__(self) -> int:
        return len(self._known)


def split_documents(
    doc_ids: Shaped[Any, "n_tokens"], train_frac: float = 0.5, seed: int = 0
) -> Bool[np.ndarray, "n_tokens"]:
    """Boolean mask of the tokens of training documents.

    Args:
        doc_ids: document of each token.
        train_frac: share of the documents that are drawn for training.
        seed: of the draw.

    >>> int(split_documents(np.array([0, 0, 7, 7])).sum())
    2
    """
    doc_ids = np.asarray(doc_ids)
    starts = find_runs(doc_ids)
    return np.repeat(choose_documents(doc_ids[starts], train_frac, seed), np.diff(np.append(starts, len(doc_ids))))


def choose_documents(run_ids: Shaped[np.ndarray, "n_runs"], train_frac: float, seed: int) -> Bool[np.ndarray, "n_runs"]:
    """Boolean mask of the runs that belong to training documents; ValueError where one side would have no document.

    Args:
        run_ids: document of each run of tokens; a document may have several runs.
        train_frac: share of the documents that are drawn for training.
        seed: of the draw.
    """
    documents, runs = np.unique(run_ids, return_inverse=True)  # a document may be in pieces
    n_train = round(train_frac * len(documents))
    if not 0 < n_train < len(documents):
        raise ValueError(
            f"`train_frac` must leave a document on each side, got {train_frac} of {len(documents)}; give more text."
        )
    chosen = np.zeros(len(documents), bool)
    chosen[np.random.default_rng(seed).permutation(len(documents))[:n_train]] = True
    return chosen[runs]


def ascends(numbers: Integer[np.ndarray, "n"], strictly: bool = False) -> bool:
    """Whether numbers never fall, or with `strictly` always rise; compared in parts, so that a map is never loaded."""
    compare = np.greater if strictly else np.greater_equal
    starts = range(0, len(numbers), ROWS_AT_ONCE)
    parts = (numbers[start : start + ROWS_AT_ONCE + 1] for start in starts)
    return all(bool(compare(part[1:], part[:-1]).all()) for part in parts)


def map_arrays(path: Path) -> dict[str, NDArray[Any]]:
    """Every tensor of a safetensors file as a memory-mapped array, by name; ValueError where a checksum differs."""
    file = TensorFile.open(path)
    return {name: file.read(name).numpy() for name in file.specs}


def _shrink(column: NDArray[np.integer[Any]]) -> NDArray[np.integer[Any]]:
    return column.astype(smallest_int(int(column.max(initial=0))))


class Places:
    """Index in the text of each row, read in pieces of which none is kept; indexed by slices of rows.

    Args:
        sizes: number of rows of each piece.
        read: function of (piece, start, stop) that returns the places of rows `start:stop` of a piece.
        n_text: number of tokens of the text.
        folder: the store's folder, for error messages.

    Raises:
        ValueError: on first use, where places do not ascend within the text.
    """

    def __init__(
        self, sizes: Sequence[int], read: Callable[[int, int, int], np.ndarray], n_text: int, folder: Path
    ) -> None:
        self._starts, self._read = [0, *accumulate(sizes)], read
        self._sizes, self._n_text, self._folder = sizes, n_text, folder

    def __len__(self) -> int:
        return self._starts[-1]

    def __getitem__(self, part: slice) -> Integer[np.ndarray, "n"]:
        start, stop, _ = part.indices(len(self))
        found = [np.zeros(0, np.int32)]
        if start < stop and len(self._first):  # this checks them
            piece = bisect_right(self._starts, start) - 1
            if stop <= self._starts[piece + 1]:
                return self._read(piece, start - self._starts[piece], stop - self._starts[piece])
            for piece in range(bisect_right(self._starts, start) - 1, bisect_left(self._starts, stop)):
                first, end = (min(max(at - self._starts[piece], 0), self._sizes[piece]) for at in (start, stop))
                found.append(self._read(piece, first, end))
        return np.concatenate(found)

    def at(self, rows: Integer[np.ndarray, "n"]) -> Integer[np.ndarray, "n"]:
        """The places of some rows, in ascending order."""
        found = [np.zeros(0, np.int32)]
        bounds = np.searchsorted(rows, self._starts)
        for piece in np.flatnonzero(np.diff(bounds)).tolist() if len(self._first) else ():
            own = rows[bounds[piece] : bounds[piece + 1]] - self._starts[piece]
            found.append(self._read(piece, 0, self._sizes[piece])[own])
        return np.concatenate(found)

    def find(self, places: Integer[np.ndarray, "n"]) -> tuple[Int[np.ndarray, "n"], Int[np.ndarray, "n"]]:
        """Number of rows before each of the given places of the text, and the row at it, -1 where the mask dropped it.

        Args:
            places: indices in the text, in any order.
        """
        before, rows = np.zeros(len(places), np.int64), np.full(len(places), -1)
        pieces = np.searchsorted(self._first, places, "right") - 1
        for piece in np.unique(pieces[pieces >= 0]).tolist():
            own, here = self._read(piece, 0, self._sizes[piece]), pieces == piece
            sought = places[here].astype(own.dtype)  # of another type, the search would convert every place first
            at = np.searchsorted(own, sought)
            before[here] = at + self._starts[piece]
            if len(own):
                rows[here] = np.where(own[np.minimum(at, len(own) - 1)] == sought, before[here], -1)
        return before, rows

    @cached_property
    def _first(self) -> Int[np.ndarray, "n_pieces"]:
        """First place of each piece in the text."""
        first, last = [], -1
        for piece, size in enumerate(self._sizes):
            own = self._read(piece, 0, size)
            if size and (int(own[0]) <= last or int(own[-1]) >= self._n_text or not ascends(own, strictly=True)):
                raise ValueError(
                    f"`places` of {self._folder} must ascend within its {self._n_text} tokens of text, got others. It "
                    "was edited or written wrongly: harvest again."
                )
            first.append(int(own[0]) if size else last + 1)
            last = int(own[-1]) if size else last
        return np.array(first, np.int64)

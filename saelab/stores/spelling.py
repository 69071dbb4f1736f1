"""Text of byte-level tokens: characters that are split over several tokens, and the tokens that hold each character."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from jaxtyping import Bool, Int

BYTE = re.compile("<0x([0-9A-Fa-f]{2})>")
"""how a byte that is not a character by itself is written, as in SentencePiece"""


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

"""Text of a store as arrays over tokens: words of several tokens, sentences, quotes and documents."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
from jaxtyping import Bool, Int, Integer, Shaped

from saelab.functional.indices import number_rows
from saelab.stores.corpus import StoredText

ViewPart = Literal["all", "first", "last"]
"""Which tokens of a split word a predicate marks."""
ENDS = ".?!"
OPENING, CLOSING = "([{", ")]}"
CURLY = "\u201c", "\u201d"
SPECIAL = re.compile(r"\s*(<\|.*\|>|</?s>|<(bos|eos|pad|unk)>|\[(CLS|SEP|PAD|UNK|MASK|BOS|EOS)\])\s*", re.IGNORECASE)
"""Special tokens as tokenizers write them."""


@dataclass(frozen=True, eq=False)
class TokenView:
    """Properties of every token of a text and its context, as arrays with one element per token in the order of the
    text.

    A word is a run of letters, digits and apostrophes, whatever tokens it is split into; a sentence ends with . ? ! or
    a new line. Neither continues from one sequence or document to the next.
    """

    text: StoredText

    def __len__(self) -> int:
        return len(self.text)

    @cached_property
    def token_ids(self) -> Int[np.ndarray, "n"]:
        """The token ids."""
        return np.asarray(self.text.token_ids).astype(np.int64)

    @cached_property
    def doc_ids(self) -> Int[np.ndarray, "n"]:
        """The document of each token."""
        return np.asarray(self.text.doc_ids).astype(np.int64)

    @cached_property
    def strings(self) -> list[str]:
        """The decoded string of each token id, from 0 to the largest in the text."""
        return [self.text.strings.get(i, f"<{i}>") for i in range(int(self.token_ids.max(initial=0)) + 1)]

    @cached_property
    def _readings(self) -> "_Readings":
        return _Readings.of(self.text, self.token_ids, self.strings)

    def mark(self, holds: Callable[[str], Any]) -> Bool[np.ndarray, "n"]:
        """The tokens whose string satisfies a condition, which is evaluated once for each different string.

        For a token that shares a character with others, the condition gets the whole character.
        """
        found = self._readings
        return np.array([bool(holds(string)) for string in found.touched])[found.kinds]

    @cached_property
    def begins(self) -> Bool[np.ndarray, "n"]:
        """The first tokens of sequences and documents."""
        return np.concatenate([[True], ~self.text._follows(0, len(self))])[: len(self)]

    def before(self, values: Shaped[np.ndarray, "n"], n: int = 1, missing: Any = -1) -> Shaped[np.ndarray, "n"]:
        """The value `n` tokens earlier in the same sequence; `missing` where there is none."""
        found = values
        for _ in range(n):
            found = np.where(self.begins, missing, np.roll(found, 1))
        return found

    def after(self, values: Shaped[np.ndarray, "n"], missing: Any = -1) -> Shaped[np.ndarray, "n"]:
        """The value one token later in the same sequence; `missing` where there is none."""
        return np.where(
            np.roll(self.begins, -1) | (np.arange(len(self)) == len(self) - 1), missing, np.roll(values, -1)
        )

    @cached_property
    def special(self) -> Bool[np.ndarray, "n"]:
        """Special tokens, such as <s>."""
        return self.mark(SPECIAL.fullmatch)

    @cached_property
    def in_word(self) -> Bool[np.ndarray, "n"]:
        """Tokens with a letter or digit."""
        return self.mark(lambda string: any(map(str.isalnum, string))) & ~self.special

    @cached_property
    def goes_on(self) -> Bool[np.ndarray, "n"]:
        """Tokens that continue the word of the previous token."""
        opens = self.mark(lambda string: string[:1].isalnum() or string[:1] == "'")
        closes = self.mark(lambda string: string[-1:].isalnum() or string[-1:] == "'")
        within = self.in_word | self.mark(lambda string: string == "'")
        return opens & self.before(closes & within, missing=False)

    @cached_property
    def word_ids(self) -> Int[np.ndarray, "n"]:
        """The index of each token's word in `words`; -1 for tokens outside words."""
        return self._vocabulary[1]

    @property
    def words(self) -> list[str]:
        """The different words, without surrounding spaces."""
        return self._vocabulary[0]

    @cached_property
    def _vocabulary(self) -> tuple[list[str], np.ndarray]:
        starts = np.flatnonzero(~self.goes_on)
        found, (kinds, spelled_by, _) = np.full(len(self), -1), self._readings
        if len(starts) == 0:
            return [], found
        lengths = np.diff(np.append(starts, len(self)))
        _, first, numbers = np.unique(self._hashes(starts, lengths), return_index=True, return_inverse=True)
        spelled = [
            "".join(spelled_by[i] for i in kinds[a : a + n].tolist()).strip().strip("'")
            for a, n in zip(starts[first].tolist(), lengths[first].tolist(), strict=True)
        ]
        words, merged = np.unique(np.array(spelled, dtype=object), return_inverse=True)
        found = np.repeat(merged[numbers], lengths)
        return words.tolist(), np.where(self.in_word | self.goes_on, found, -1)

    def _hashes(self, starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """A hash of the tokens of each word: sums of random numbers by token, weighted by place."""
        rng = np.random.default_rng(0)
        keys = rng.integers(1, 2**63, len(self._readings.spelled), dtype=np.uint64)
        places = np.arange(len(self)) - np.repeat(starts, lengths)
        weights = rng.integers(1, 2**63, int(lengths.max()), dtype=np.uint64) | np.uint64(1)
        return np.add.reduceat(keys[self._readings.kinds] * weights[places], starts)

    @cached_property
    def ends_word(self) -> Bool[np.ndarray, "n"]:
        """The last token of each word; for a word of one token, that token."""
        return (self.word_ids >= 0) & ~self.after(self.goes_on, missing=False)

    @cached_property
    def starts_word(self) -> Bool[np.ndarray, "n"]:
        """The first token of each word."""
        return (self.word_ids >= 0) & ~self.goes_on

    def part(self, part: ViewPart) -> Bool[np.ndarray, "n"]:
        """The tokens that a predicate on words marks; ValueError for a `part` other than all, first, last."""
        if part not in get_args(ViewPart):
            raise ValueError(f"`part` must be one of {list(get_args(ViewPart))}, got {part!r}.")
        return {"all": self.word_ids >= 0, "first": self.starts_word, "last": self.ends_word}[part]

    def mark_words(self, holds: Callable[[str], Any], part: ViewPart = "all") -> Bool[np.ndarray, "n"]:
        """The tokens of the words that satisfy a condition, which is evaluated once for each different word."""
        table = np.array([*(bool(holds(word)) for word in self.words), False])
        return table[self.word_ids] & self.part(part)

    @cached_property
    def starts_sentence(self) -> Bool[np.ndarray, "n"]:
        """First tokens of sentences; closing punctuation belongs to the sentence before."""
        ends = self.special | self.mark(lambda string: "\n" in string or string.rstrip().endswith(tuple(ENDS)))
        closing = self.mark(lambda string: not any(map(str.isalnum, string)) and string[:1] != " ")
        closing &= ~self.mark(lambda string: string.startswith((*OPENING, CURLY[0])))
        closing |= self.special
        kept = np.flatnonzero(~closing)
        so_far = np.concatenate([[0], np.cumsum(ends)])
        found = self.begins.copy()
        found[kept] |= np.diff(so_far[kept], prepend=0) > 0
        return found

    @cached_property
    def sentence_ids(self) -> Int[np.ndarray, "n"]:
        """The number of each token's sentence, counted through the text."""
        return np.cumsum(self.starts_sentence) - 1

    @cached_property
    def in_sentence(self) -> Int[np.ndarray, "n"]:
        """Number of tokens of the sentence before each token."""
        return _count_since(self.sentence_ids, ~self.special)

    @cached_property
    def in_document(self) -> Int[np.ndarray, "n"]:
        """Number of text tokens of the document before each token."""
        return _count_since(self.doc_ids, ~self.special)

    @cached_property
    def to_end(self) -> Int[np.ndarray, "n"]:
        """Number of text tokens of the document after each token."""
        return _count_since(self.doc_ids[::-1], ~self.special[::-1])[::-1]

    def sentences_with(self, tokens: Bool[np.ndarray, "n"]) -> Bool[np.ndarray, "n"]:
        """All tokens of the sentences that contain one of the given tokens."""
        found = np.zeros(int(self.sentence_ids[-1]) + 1, bool)
        found[self.sentence_ids[tokens]] = True
        return found[self.sentence_ids]

    def depth(self, opening: str, closing: str) -> Int[np.ndarray, "n"]:
        """Number of brackets open at each token, counted from the start of its sequence; closing ones are inside."""
        change = self._count(opening) - self._count(closing)
        level = np.cumsum(change)
        starts = np.flatnonzero(self.begins)
        base = np.repeat(level[starts] - change[starts], np.diff(np.append(starts, len(self))))
        return level - base - np.minimum(change, 0)

    @cached_property
    def in_quotes(self) -> Bool[np.ndarray, "n"]:
        """Tokens between quotation marks: straight ones alternate within a paragraph, curly ones go by their shape."""
        marks = self._count('"') % 2
        fresh = self.begins | self.mark(lambda string: "\n" in string)
        level = np.cumsum(marks)
        starts = np.flatnonzero(fresh)
        base = np.repeat(level[starts] - marks[starts], np.diff(np.append(starts, len(self))))
        inside = ((level - base) % 2 == 1) & (marks == 0)
        curly = (self.depth(*CURLY) > 0) & (self._count("".join(CURLY)) == 0)
        return inside | curly

    def _count(self, characters: str) -> Int[np.ndarray, "n"]:
        found = self._readings
        return np.array([sum(map(string.count, characters)) for string in found.spelled])[found.kinds]

    def seen(self, values: Integer[np.ndarray, "n"]) -> Bool[np.ndarray, "n"]:
        """Whether the same value, 0 or more, occurs earlier in the document."""
        keys = (self.doc_ids - self.doc_ids.min()) * (int(values.max()) + 2) + values + 1
        found, numbers = number_rows(keys)
        first = np.empty(len(found), np.int64)
        first[numbers[::-1]] = np.arange(len(keys))[::-1]  # the last that is written remains
        again = np.ones(len(self), bool)
        again[first] = False
        return again & (values >= 0)

    def find(self, pattern: "str | re.Pattern[str]") -> Bool[np.ndarray, "n"]:
        """The tokens that overlap a match of a regular expression in the running text, sequence by sequence."""
        compiled, found = re.compile(pattern), np.zeros(len(self), bool)
        kinds, spelled, touched = self._readings
        lengths = np.array([len(string) for string in spelled])[kinds]
        shares = np.array([a != b for a, b in zip(spelled, touched, strict=True)])[kinds]
        starts = np.append(np.flatnonzero(self.begins), len(self)).tolist()
        for a, b in pairwise(starts):
            ends = np.cumsum(lengths[a:b])
            for match in compiled.finditer("".join(spelled[i] for i in kinds[a:b].tolist())):
                if match.end() > match.start():
                    first, last = np.searchsorted(ends, (match.start(), match.end() - 1), "right") + a
                    found[first : last + 1] = True
                    while last < b - 1 and shares[last + 1] and ends[last - a] == match.end():
                        last += 1  # goes on with the match's last character
                        found[last] = True
        return found


class _Readings(NamedTuple):
    """The decoded text of each token in its context; `kinds` numbers the different ones."""

    kinds: Int[np.ndarray, "n"]
    """a token's id, unless it shares characters with its neighbors"""
    spelled: list[str]
    """the characters that begin in the token"""
    touched: list[str]
    """the characters of which the token holds a part"""

    @classmethod
    def of(cls, text: StoredText, token_ids: Int[np.ndarray, "n"], strings: list[str]) -> "_Readings":
        kinds, spelled, touched = token_ids.copy(), list(strings), list(strings)
        parts = np.array([i for i in text.parts if i < len(strings)], np.int64)
        at = np.flatnonzero(np.isin(token_ids, parts))
        if len(at) == 0:
            return cls(kinds, spelled, touched)
        numbers: dict[tuple[int, str, str], int] = {}
        joined = np.append(text.goes_on(0, len(text)), False)[at[:-1]] & (np.diff(at) == 1)
        for run in np.split(at, np.flatnonzero(~joined) + 1):
            read = text.spelling(int(run[0]), int(run[-1]) + 1)
            for place, *key in zip(run.tolist(), token_ids[run].tolist(), read.words, read.touched, strict=True):
                if (number := numbers.setdefault(tuple(key), len(spelled))) == len(spelled):
                    spelled.append(key[1])
                    touched.append(key[2])
                kinds[place] = number
        return cls(kinds, spelled, touched)


def _count_since(groups: np.ndarray, counted: np.ndarray) -> np.ndarray:
    """For each element, the number of counted elements before it in its run of one group."""
    before = np.cumsum(counted) - counted
    starts = np.flatnonzero(np.diff(groups, prepend=groups[:1] - 1))
    return before - np.repeat(before[starts], np.diff(np.append(starts, len(groups))))

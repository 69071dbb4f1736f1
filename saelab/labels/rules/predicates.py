"""Predicates on the tokens of a store, as a sparse boolean matrix with one named column each.

There is a fixed list of conditions, and families made of the most frequent tokens, words and affixes.
"""

import re
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Bool, Int

from saelab.functional.indices import number_rows
from saelab.labels.rules.token_view import CLOSING, CURLY, ENDS, OPENING, TokenView, ViewPart
from saelab.lm.token_labels import LabelsLike, TokenLabels
from saelab.stores.feature_store import FeatureStore

if TYPE_CHECKING:
    from scipy.sparse import csr_matrix

TokenMarks = Bool[np.ndarray, "n"]
SUFFIXES, PREFIXES, ENDINGS = (2, 3, 4), (2, 3), ("ing", "ed", "es", "ly", "er", "s")
SHARES = {
    "token": 0.3, "word": 0.15, "word end": 0.12, "bigram": 0.12, "previous token": 0.08, "next token": 0.05,
    "suffix": 0.08, "prefix": 0.04, "stem": 0.06,
}  # fmt: skip
"""share of each family among the predicates that are taken from the text"""
WORD, PHRASE = "document word", "document phrase"
DOCUMENT_SHARES = {WORD: 0.7, PHRASE: 0.1, "suffix": 0.06, "prefix": 0.04, "stem": 0.1}
"""the same where rows are documents, in which a condition holds if it holds anywhere in the document"""
LENGTHS = (8, 16, 32, 64, 128, 256)
DISJOINT = ("token", "word", "word end", "bigram", "previous token", "next token")
"""Families of which at most one member holds on each token."""
N_PREDICATES = 1000
N_FIXED = 60
"""Approximate number of conditions that do not depend on the text; the rest of `size` is taken from the text."""


def fixed(view: TokenView) -> Iterator[tuple[str, str, TokenMarks]]:
    """Kind, name and tokens of each condition that does not depend on the text."""
    yield from _shapes(view)
    yield from _neighbors(view)
    yield from _sentences(view)
    yield from _positions(view)
    yield from _repetitions(view)


def describe_documents(view: TokenView) -> Iterator[tuple[str, str, TokenMarks]]:
    """Kind, name and tokens of each condition on a document that does not depend on the text."""
    signs: dict[str, Callable[[str], bool]] = {
        "a question mark": lambda s: "?" in s,
        "an exclamation mark": lambda s: "!" in s,
        "quotation marks": lambda s: any(c in s for c in ('"', *CURLY)),
        "brackets": lambda s: any(c in s for c in OPENING + CLOSING),
        "a comma": lambda s: "," in s,
        "a new line": lambda s: "\n" in s,
        "digits": lambda s: any(map(str.isdigit, s)),
        "letters that are not ASCII": lambda s: any(map(str.isalnum, s)) and not s.isascii(),
    }
    yield from (("document", f"documents with {name}", view.mark(test)) for name, test in signs.items())
    yield "case", "documents with words in capitals", view.mark_words(lambda w: len(w) > 1 and w.isupper())
    named = view.mark_words(lambda w: w[:1].isupper() and w != "I") & ~view.starts_sentence
    yield "case", "documents with a capitalized word inside a sentence", named
    starts = np.flatnonzero(view.begins)
    n_words = np.add.reduceat(view.starts_word, starts, dtype=np.int64)
    lengths = np.repeat(n_words, np.diff(np.append(starts, len(view))))
    yield from (("length", f"documents of fewer than {n} words", lengths < n) for n in LENGTHS)
    yield from (("length", f"documents of {n} words or more", lengths >= n) for n in LENGTHS)


def _shapes(view: TokenView) -> Iterator[tuple[str, str, TokenMarks]]:
    def strip(test: Callable[[str], bool]) -> Callable[[str], bool]:
        return lambda string: test(string.strip())

    tokens: dict[str, list[tuple[str, Callable[[str], bool]]]] = {
        "case": [
            ("tokens with a capital letter", lambda s: any(map(str.isupper, s))),
            ("tokens of small letters", lambda s: s.islower()),
            ("single letters", strip(lambda s: len(s) == 1 and s.isalpha())),
        ],
        "digits": [("tokens with a digit", lambda s: any(map(str.isdigit, s)))],
        "punctuation": [
            ("punctuation", strip(lambda s: bool(s) and not any(map(str.isalnum, s)))),
            ("sentence-final punctuation", strip(lambda s: s.endswith(tuple(ENDS)))),
            ("quotation marks", lambda s: any(c in s for c in ('"', *CURLY))),
            ("brackets", lambda s: any(c in s for c in OPENING + CLOSING)),
            ("new lines", lambda s: "\n" in s),
            ("blanks", lambda s: s != "" and s.strip() == ""),
        ],
        "shape": [
            ("tokens that are not ASCII", lambda s: not s.isascii()),
            ("tokens with a space before them", lambda s: s[:1] == " " and s.strip() != ""),
        ],
    }
    for kind, listed in tokens.items():
        yield from ((kind, name, view.mark(test)) for name, test in listed)
    yield "case", "capitalized words", view.mark_words(lambda w: w[:1].isupper() and not w[1:].isupper())
    yield "case", "words in capitals", view.mark_words(lambda w: len(w) > 1 and w.isupper())
    yield "digits", "numbers", view.mark_words(str.isdigit)
    yield "shape", "words of one or two letters", view.mark_words(lambda w: len(w) < 3)
    yield "shape", "words of eight letters or more", view.mark_words(lambda w: len(w) > 7)
    yield "shape", "tokens that go on with a word", view.goes_on
    yield "shape", "last tokens of words", view.ends_word
    whole = view.starts_word & view.ends_word
    yield "shape", "words that are one token", whole
    yield "shape", "first tokens of words of several tokens", view.starts_word & ~whole
    yield "shape", "last tokens of words of several tokens", view.ends_word & ~whole
    yield "shape", "second tokens of words", view.goes_on & view.before(view.starts_word, missing=False)


def _neighbors(view: TokenView) -> Iterator[tuple[str, str, TokenMarks]]:
    comma, ends = view.mark(lambda s: "," in s), view.mark(lambda s: s.rstrip().endswith(tuple(ENDS)))
    for name, marks in (("a comma", comma), ("sentence-final punctuation", ends)):
        yield "previous", f"after {name}", view.before(marks, missing=False)
        yield "next", f"before {name}", view.after(marks, missing=False)
    quote = view.mark(lambda s: any(c in s for c in ('"', *CURLY)))
    yield "previous", "after a quotation mark", view.before(quote, missing=False)
    yield "previous", "after a new line", view.before(view.mark(lambda s: "\n" in s), missing=False)
    named = view.mark_words(lambda w: w[:1].isupper()) & ~view.starts_sentence
    yield "previous", "after a capitalized word", view.before(named & view.ends_word, missing=False)
    yield "next", "before a new word", view.after(view.starts_word, missing=False)


def _sentences(view: TokenView) -> Iterator[tuple[str, str, TokenMarks]]:
    yield "sentence", "first token of a sentence", view.in_sentence == 0
    yield "sentence", "second token of a sentence", view.in_sentence == 1
    yield "sentence", "first five tokens of a sentence", view.in_sentence < 5
    yield "sentence", "beyond the tenth token of a sentence", view.in_sentence >= 10
    yield "sentence", "first word of a sentence", _first_words(view)
    yield "sentence", "in a question", view.sentences_with(view.mark(lambda s: "?" in s))
    yield "sentence", "in an exclamation", view.sentences_with(view.mark(lambda s: "!" in s))
    yield (
        "case",
        "capitalized words inside a sentence",
        (view.mark_words(lambda w: w[:1].isupper() and w != "I") & ~_first_words(view)),
    )
    yield "quotes", "inside quotation marks", view.in_quotes
    inside = (view.depth(OPENING, CLOSING) > 0) & ~view.mark(lambda s: any(c in s for c in OPENING + CLOSING))
    yield "quotes", "inside brackets", inside


def _first_words(view: TokenView) -> TokenMarks:
    """The tokens of the first word of each sentence."""
    words = np.cumsum(~view.goes_on)
    at_start = np.zeros(int(words[-1]) + 1, bool)
    at_start[words[view.starts_sentence]] = True
    return at_start[words]


def _positions(view: TokenView) -> Iterator[tuple[str, str, TokenMarks]]:
    for n in (1, 4, 16, 64):
        name = "first token" if n == 1 else f"first {n} tokens"
        yield "position", f"{name} of the document", view.in_document < n
        if n < 64:
            last = "last token" if n == 1 else f"last {n} tokens"
            yield "position", f"{last} of the document", view.to_end < n
    share = view.in_document / np.maximum(view.in_document + view.to_end, 1)
    yield "position", "first half of the document", share < 0.5
    yield "position", "last quarter of the document", share >= 0.75
    positions = np.asarray(view.text.positions).astype(np.int64)
    for n in (1, 2, 3):
        yield "position", f"position {n} of the sequence", positions == n
    for a in (4, 8, 16, 32, 64, 128):
        if positions.max(initial=0) >= a:
            yield "position", f"positions {a} to {2 * a - 1} of the sequence", (positions >= a) & (positions < 2 * a)


def _repetitions(view: TokenView) -> Iterator[tuple[str, str, TokenMarks]]:
    yield "repetition", "tokens seen before in the document", view.seen(view.token_ids)
    again = view.seen(np.where(view.starts_word, view.word_ids, -1))
    words = np.cumsum(~view.goes_on)
    starts = np.zeros(int(words[-1]) + 1, bool)
    starts[words[again]] = True
    yield "repetition", "words seen before in the document", starts[words] & (view.word_ids >= 0)
    yield "repetition", "words new in the document", ~starts[words] & (view.word_ids >= 0)
    yield "repetition", "tokens that repeat the one before", view.before(view.token_ids) == view.token_ids


def one_of_each(view: TokenView, kind: str, n: int) -> tuple[list[str], Int[np.ndarray, "n"]]:
    """Names of the `n` most frequent members of a family, and the index of the one that holds on each token, or -1."""
    if kind == "token":
        keys, spell = view.token_ids, lambda i: f"the token {view.strings[i]!r}"
    elif kind == "previous token":
        keys, spell = view.before(view.token_ids), lambda i: f"after the token {view.strings[i]!r}"
    elif kind == "next token":
        keys, spell = view.after(view.token_ids), lambda i: f"before the token {view.strings[i]!r}"
    elif kind == "word":
        keys, spell = view.word_ids, lambda i: f"the word {view.words[i]!r}"
    elif kind == "word end":
        split = view.ends_word & view.goes_on
        keys, spell = np.where(split, view.word_ids, -1), lambda i: f"the last token of the word {view.words[i]!r}"
    elif kind == PHRASE:
        keys, spell = _phrases(view)
    else:
        keys, spell = _bigrams(view)
    return _most_frequent(keys, spell, n)


def _bigrams(view: TokenView) -> tuple[np.ndarray, Callable[[int], str]]:
    previous, size = view.before(view.token_ids), len(view.strings)
    keys = np.where(previous < 0, -1, previous * size + view.token_ids)
    return keys, lambda key: f"the token {view.strings[key % size]!r} after {view.strings[key // size]!r}"


def _phrases(view: TokenView) -> tuple[np.ndarray, Callable[[int], str]]:
    """Keys of two words next to each other, at the second, and their text."""
    ids, size = view.word_ids, len(view.words)
    previous = view.before(ids)
    keys = np.where((previous < 0) | (ids < 0) | view.goes_on, -1, previous * size + ids)
    return keys, lambda key: f"the words {view.words[key // size] + ' ' + view.words[key % size]!r}"


def _most_frequent(keys: np.ndarray, spell: Callable[[int], str], n: int) -> tuple[list[str], np.ndarray]:
    found, where = number_rows(keys)
    counts = np.bincount(where, minlength=len(found))
    counts[found < 0] = 0
    chosen = np.argsort(-counts, kind="stable")[: min(n, int((counts > 0).sum()))]
    numbers = np.full(len(found), -1)
    numbers[chosen] = np.arange(len(chosen))
    names, uses = [spell(int(key)) for key in found[chosen]], Counter(spell(int(key)) for key in found[chosen])
    named = [name if uses[name] == 1 else f"{name} <{key}>" for name, key in zip(names, found[chosen], strict=True)]
    return named, numbers[where]


def affixes(view: TokenView, kind: str, n: int) -> tuple[list[str], list[list[int]]]:
    """Names of the `n` most frequent suffixes, prefixes or stems that several words share, and the words of each.

    Args:
        view: tokens of the text.
        kind: "suffix", "prefix" or "stem"; or "document word", each word in any case, also one alone.
        n: largest number of predicates.
    """
    uses = np.bincount(view.word_ids[view.ends_word], minlength=len(view.words))
    counts: Counter[str] = Counter()
    members: defaultdict[str, set[int]] = defaultdict(set)
    for i, word in enumerate(view.words):
        for piece in pieces(word.lower(), kind):
            counts[piece] += int(uses[i])
            members[piece].add(i)
    alone = kind == WORD
    shared = [
        piece for piece, _ in counts.most_common() if alone or len({view.words[i].lower() for i in members[piece]}) > 1
    ]
    spell = {
        WORD: "the word {!r}",
        "suffix": "words ending in {!r}",
        "prefix": "words beginning with {!r}",
        "stem": "words of the stem {!r}",
    }
    return [spell[kind].format(piece) for piece in shared[:n]], [sorted(members[piece]) for piece in shared[:n]]


def pieces(word: str, kind: str) -> list[str]:
    """The suffixes, prefixes or the stem of a word; each leaves at least two letters of it.

    >>> pieces("jumping", "suffix"), pieces("jumping", "stem")
    (['ng', 'ing', 'ping'], ['jump'])
    """
    if kind == WORD:
        return [word]
    if not word.isalpha():
        return []
    if kind == "suffix":
        return [word[-n:] for n in SUFFIXES if len(word) > n + 1]
    if kind == "prefix":
        return [word[:n] for n in PREFIXES if len(word) > n + 1]
    ending = next((e for e in ENDINGS if word.endswith(e) and len(word) - len(e) > 2), "")
    stem = word[: len(word) - len(ending)]
    return [stem.rstrip("e") if len(stem) > 3 else stem] if len(stem) > 2 else []


@dataclass(frozen=True)
class Predicate:
    """A user-defined condition: `holds` returns a boolean for each token of a `TokenView`.

    >>> Predicate("three-letter words", lambda view: view.mark_words(lambda word: len(word) == 3)).kind
    'own'
    """

    name: str
    holds: Callable[[TokenView], Any]
    kind: str = "own"


def word_pattern(pattern: str, name: str | None = None, part: ViewPart = "all") -> Predicate:
    """A predicate for words that a regular expression matches completely.

    `part` chooses which tokens of a split word it marks.
    """
    compiled = re.compile(pattern)
    return Predicate(name or f"words like /{pattern}/", lambda view: view.mark_words(compiled.fullmatch, part))


def text_pattern(pattern: str, name: str | None = None) -> Predicate:
    """A predicate for tokens that overlap a match of a regular expression in the running text of a sequence."""
    re.compile(pattern)
    return Predicate(name or f"text like /{pattern}/", lambda view: view.find(pattern))


@dataclass(frozen=True, eq=False)
class Predicates:
    """Conditions on the tokens of a store: column j of `matrix` is true where the condition `names[j]` holds."""

    matrix: "csr_matrix"
    """(n_tokens, n_predicates), boolean"""
    names: tuple[str, ...]
    kinds: tuple[str, ...]
    left_out: Mapping[str, str] = field(default_factory=dict)
    """reason for each condition that was left out, by name"""

    def __len__(self) -> int:
        return len(self.names)

    def __repr__(self) -> str:
        n, per_token = self.matrix.shape[0], self.matrix.nnz / max(1, self.matrix.shape[0])
        return f"Predicates({len(self)} on {n:,} tokens, {per_token:.1f} true of a token)"

    @cached_property
    def places(self) -> dict[str, int]:
        """The column of each name."""
        return {name: j for j, name in enumerate(self.names)}

    def column(self, name: str) -> Bool[np.ndarray, "n_tokens"]:
        """The tokens on which a predicate holds; KeyError where there is none of that name."""
        return self.matrix[:, [self.places[name]]].toarray().ravel()

    def family(self, kind: str) -> list[int]:
        """The columns of one kind."""
        return [j for j, mine in enumerate(self.kinds) if mine == kind]

    def without(self, *kinds: str) -> "Predicates":
        """The predicates without some kinds."""
        kept = [j for j, kind in enumerate(self.kinds) if kind not in kinds]
        names, kinds = (tuple(listed[j] for j in kept) for listed in (self.names, self.kinds))
        return Predicates(self.matrix[:, kept], names, kinds, self.left_out)


def make_predicates(
    store: FeatureStore,
    *,
    size: int = N_PREDICATES,
    sizes: Mapping[str, int] | None = None,
    metadata: Mapping[int, str] | None = None,
    concepts: LabelsLike | None = None,
    own: Sequence[Predicate] = (),
) -> Predicates:
    """About `size` conditions on the tokens of a store, and the caller's own, from which rules are built.

    About sixty do not depend on the text: case, digits, punctuation, place in word, sentence, document and sequence,
    quotes, brackets, repetition, neighbors. The others are the most frequent tokens, words, pairs of tokens, previous
    and next tokens, suffixes, prefixes and stems of the text. A predicate on words holds on all tokens of a word; "word
    end" holds on the last token of words of several tokens, where the word is complete.

    Where rows are documents, a condition holds of a document if it holds anywhere in it; the families are words, two
    words next to each other, affixes and stems, and some twenty conditions are on signs and length.

    Predicates that hold on no token or on all, or have the name of another, are left out: `left_out` has the reasons,
    and a warning names those that the caller gave.

    Args:
        store: feature store whose text is described.
        size: approximate number of predicates.
        sizes: number of predicates of single families: "token", "word", "word end", "bigram", "previous token", "next
            token", "suffix", "prefix", "stem"; of documents "document word", "document phrase", "suffix", "prefix",
            "stem".
        metadata: a value for each document id; each different value becomes a predicate.
        concepts: labels of the tokens of the store, as `TokenLabels.of` reads them; each becomes a predicate.
        own: the caller's own conditions.

    Raises:
        ValueError: a family does not exist, or an array has another length than the store.
    """
    shares = DOCUMENT_SHARES if store.of_documents else SHARES
    wanted = {kind: round(share * max(0, size - N_FIXED)) for kind, share in shares.items()} | dict(sizes or {})
    if unknown := set(wanted) - set(shares):
        raise ValueError(f"`sizes` must name families among {list(shares)}, got {sorted(unknown)}.")
    view = TokenView(store.text)
    parts = _Parts(store)
    for kind, name, marks in describe_documents(view) if store.of_documents else fixed(view):
        parts.add(kind, name, marks)
    for kind, n in wanted.items():
        if kind in DISJOINT or kind == PHRASE:
            parts.add_family(kind, *one_of_each(view, kind, n))
        else:
            parts.add_words(kind, *affixes(view, kind, n), view)
    if metadata is not None:
        values = [metadata.get(int(doc), "") for doc in np.unique(view.doc_ids)]
        listed = sorted(set(values) - {""})
        numbers = np.array([listed.index(value) if value else -1 for value in values])
        where = numbers[np.searchsorted(np.unique(view.doc_ids), view.doc_ids)]
        parts.add_family("document", [f"documents of {value!r}" for value in listed], where)
    for predicate in own:
        parts.add(predicate.kind, predicate.name, _asked(predicate, view))
    if concepts is not None:
        parts.add_labels("concept", TokenLabels.of(concepts))
    joined = parts.join()
    given = [predicate.name for predicate in own] + list(concepts or ())
    if lost := [f"'{name}' ({joined.left_out[name]})" for name in given if name in joined.left_out]:
        warnings.warn(f"Predicates that carry no information are left out: {', '.join(lost[:5])}.", stacklevel=2)
    return joined


def _asked(predicate: Predicate, view: TokenView) -> np.ndarray:
    found = np.asarray(predicate.holds(view))
    if found.shape != (len(view),) or found.dtype != bool:
        raise ValueError(
            f"Predicate '{predicate.name}' must give one boolean for each of the {len(view)} tokens of the view, got "
            f"{found.dtype} of shape {found.shape}."
        )
    return found


class _Parts:
    """Columns collected for the rows of a store."""

    def __init__(self, store: FeatureStore) -> None:
        self.places, self.n_tokens, self.whole = store.places, len(store), store.of_documents
        self.row_of = np.full(len(store.text), -1, np.int32)
        self.row_of[self.places] = np.arange(self.n_tokens, dtype=np.int32)
        if self.whole:  # what holds of a token holds of its document
            self.row_of = np.maximum.accumulate(self.row_of)
            self.places = np.arange(len(store.text))
        self.rows: list[np.ndarray] = []
        self.columns: list[np.ndarray] = []
        self.counts: list[np.ndarray] = []
        """tokens of each condition, by part"""
        self.names: list[str] = []
        self.kinds: list[str] = []

    def add(self, kind: str, name: str, marks: Bool[np.ndarray, "n"]) -> None:
        """Add one condition, given for every token of the text."""
        rows = self.row_of[np.flatnonzero(marks)]
        rows = rows[rows >= 0]
        self._append(kind, [name], rows, np.zeros(len(rows), np.int32))

    def add_family(self, kind: str, names: Sequence[str], numbers: np.ndarray) -> None:
        """Add conditions of which at most one holds on each token, given as its number, or -1."""
        here = numbers[self.places]
        at = np.flatnonzero(here >= 0)
        self._append(kind, names, self.row_of[self.places[at]], here[at].astype(np.int32))

    def add_words(self, kind: str, names: Sequence[str], members: Sequence[Sequence[int]], view: TokenView) -> None:
        """Add conditions that hold on all tokens of some words, given by their indices in the words of the text."""
        columns = np.repeat(np.arange(len(names)), [len(words) for words in members])
        words = np.array([word for listed in members for word in listed], np.int64)
        uses = np.bincount(words, minlength=len(view.words) + 1)  # the last place is for tokens outside of words
        starts, here = np.cumsum(uses) - uses, view.word_ids[self.places]
        n = uses[here]
        entries = np.arange(n.sum()) + np.repeat(starts[here] - (np.cumsum(n) - n), n)
        rows = np.repeat(self.row_of[self.places], n)
        self._append(kind, names, rows, columns[np.argsort(words, kind="stable")][entries].astype(np.int32))

    def add_labels(self, kind: str, labels: TokenLabels) -> None:
        """Add labels that exist already."""
        if labels.n_tokens != self.n_tokens:
            raise ValueError(f"`concepts` must label the {self.n_tokens} tokens of the store, got {labels.n_tokens}.")
        rows, columns = labels.matrix.nonzero()
        self._append(kind, labels.names, rows.astype(np.int32), columns.astype(np.int32))

    def _append(self, kind: str, names: Sequence[str], rows: np.ndarray, columns: np.ndarray) -> None:
        if self.whole:  # a document may have it several times
            keys = np.unique(columns.astype(np.int64) << 32 | rows)
            rows, columns = (keys & 0xFFFFFFFF).astype(np.int32), (keys >> 32).astype(np.int32)
        self.rows.append(rows)
        self.columns.append(columns)
        self.counts.append(np.bincount(columns, minlength=len(names)))
        self.names += list(names)
        self.kinds += [kind] * len(names)

    def join(self) -> Predicates:
        """All conditions that hold on some but not all tokens, each name once."""
        from scipy.sparse import csr_matrix

        counts = np.concatenate(self.counts)
        first = {name: j for j, name in reversed(list(enumerate(self.names)))}
        kept = [j for j, name in enumerate(self.names) if first[name] == j and 0 < counts[j] < self.n_tokens]
        numbers = np.full(len(self.names), -1, np.int32)
        numbers[kept] = np.arange(len(kept), dtype=np.int32)
        why = {name: self._tell(int(counts[j])) for j, name in enumerate(self.names) if numbers[first[name]] < 0}
        why |= {name: "another has its name" for j, name in enumerate(self.names) if first[name] != j}
        starts = np.cumsum([0, *map(len, self.counts)])
        for i, (start, stop) in enumerate(pairwise(starts.tolist())):
            self.columns[i] = numbers[start:stop][self.columns[i]]
            if (numbers[start:stop] < 0).any():
                inside = self.columns[i] >= 0
                self.rows[i], self.columns[i] = self.rows[i][inside], self.columns[i][inside]
        rows, columns = np.concatenate(self.rows), np.concatenate(self.columns)
        shape = (self.n_tokens, len(kept))
        matrix = csr_matrix((np.ones(len(rows), bool), (rows, columns)), shape=shape)
        return Predicates(matrix, tuple(self.names[j] for j in kept), tuple(self.kinds[j] for j in kept), why)

    def _tell(self, n: int) -> str:
        return "holds of no token" if n == 0 else f"holds of {n:,} of {self.n_tokens:,} tokens"

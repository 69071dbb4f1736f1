"""Predicates on tokens: a fixed list of conditions, and families of the most frequent tokens, words and affixes."""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator

import numpy as np
from jaxtyping import Bool, Int

from saelab.labelling.views import CLOSING, CURLY, ENDS, OPENING, Part, TokenView

Marks = Bool[np.ndarray, "n"]
SUFFIXES, PREFIXES, ENDINGS = (2, 3, 4), (2, 3), ("ing", "ed", "es", "ly", "er", "s")
SHARES = {
    "token": 0.3, "word": 0.15, "word end": 0.12, "bigram": 0.12, "previous token": 0.08, "next token": 0.05,
    "suffix": 0.08, "prefix": 0.04, "stem": 0.06,
}  # fmt: skip
"""share of each family among the predicates that are taken from the text"""
DISJOINT = ("token", "word", "word end", "bigram", "previous token", "next token")
"""Families of which at most one member holds on each token."""


def fixed(view: TokenView) -> Iterator[tuple[str, str, Marks]]:
    """Kind, name and tokens of each condition that does not depend on the text."""
    yield from _shapes(view)
    yield from _neighbours(view)
    yield from _sentences(view)
    yield from _positions(view)
    yield from _repetitions(view)


def _shapes(view: TokenView) -> Iterator[tuple[str, str, Marks]]:
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
    yield "case", "capitalised words", view.mark_words(lambda w: w[:1].isupper() and not w[1:].isupper())
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


def _neighbours(view: TokenView) -> Iterator[tuple[str, str, Marks]]:
    comma, ends = view.mark(lambda s: "," in s), view.mark(lambda s: s.rstrip().endswith(tuple(ENDS)))
    for name, marks in (("a comma", comma), ("sentence-final punctuation", ends)):
        yield "previous", f"after {name}", view.before(marks, missing=False)
        yield "next", f"before {name}", view.after(marks, missing=False)
    quote = view.mark(lambda s: any(c in s for c in ('"', *CURLY)))
    yield "previous", "after a quotation mark", view.before(quote, missing=False)
    yield "previous", "after a new line", view.before(view.mark(lambda s: "\n" in s), missing=False)
    named = view.mark_words(lambda w: w[:1].isupper()) & ~view.starts_sentence
    yield "previous", "after a capitalised word", view.before(named & view.ends_word, missing=False)
    yield "next", "before a new word", view.after(view.starts_word, missing=False)


def _sentences(view: TokenView) -> Iterator[tuple[str, str, Marks]]:
    yield "sentence", "first token of a sentence", view.in_sentence == 0
    yield "sentence", "second token of a sentence", view.in_sentence == 1
    yield "sentence", "first five tokens of a sentence", view.in_sentence < 5
    yield "sentence", "beyond the tenth token of a sentence", view.in_sentence >= 10
    yield "sentence", "first word of a sentence", _first_words(view)
    yield "sentence", "in a question", view.sentences_with(view.mark(lambda s: "?" in s))
    yield "sentence", "in an exclamation", view.sentences_with(view.mark(lambda s: "!" in s))
    yield (
        "case",
        "capitalised words inside a sentence",
        (view.mark_words(lambda w: w[:1].isupper() and w != "I") & ~_first_words(view)),
    )
    yield "quotes", "inside quotation marks", view.in_quotes
    inside = (view.depth(OPENING, CLOSING) > 0) & ~view.mark(lambda s: any(c in s for c in OPENING + CLOSING))
    yield "quotes", "inside brackets", inside


def _first_words(view: TokenView) -> Marks:
    """The tokens of the first word of each sentence."""
    words = np.cumsum(~view.goes_on)
    at_start = np.zeros(int(words[-1]) + 1, bool)
    at_start[words[view.starts_sentence]] = True
    return at_start[words]


def _positions(view: TokenView) -> Iterator[tuple[str, str, Marks]]:
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


def _repetitions(view: TokenView) -> Iterator[tuple[str, str, Marks]]:
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
    else:
        keys, spell = _bigrams(view)
    return _most_frequent(keys, spell, n)


def _bigrams(view: TokenView) -> tuple[np.ndarray, Callable[[int], str]]:
    previous, size = view.before(view.token_ids), len(view.strings)
    keys = np.where(previous < 0, -1, previous * size + view.token_ids)
    return keys, lambda key: f"the token {view.strings[key % size]!r} after {view.strings[key // size]!r}"


def _most_frequent(keys: np.ndarray, spell: Callable[[int], str], n: int) -> tuple[list[str], np.ndarray]:
    found, where, counts = np.unique(keys, return_inverse=True, return_counts=True)
    counts[found < 0] = 0
    chosen = np.argsort(-counts, kind="stable")[: min(n, int((counts > 0).sum()))]
    numbers = np.full(len(found), -1)
    numbers[chosen] = np.arange(len(chosen))
    names, uses = [spell(int(key)) for key in found[chosen]], Counter(spell(int(key)) for key in found[chosen])
    named = [name if uses[name] == 1 else f"{name} <{key}>" for name, key in zip(names, found[chosen], strict=True)]
    return named, numbers[where]


def affixes(view: TokenView, kind: str, n: int, part: Part = "all") -> Iterator[tuple[str, str, Marks]]:
    """Kind, name and tokens of the `n` most frequent suffixes, prefixes or stems that several words share.

    Args:
        view: tokens of the text.
        kind: "suffix", "prefix" or "stem".
        n: largest number of predicates.
        part: which tokens of a split word a predicate marks.
    """
    uses = np.bincount(view.word_ids[view.ends_word], minlength=len(view.words))
    counts: Counter[str] = Counter()
    members: defaultdict[str, set[int]] = defaultdict(set)
    for i, word in enumerate(view.words):
        for piece in pieces(word.lower(), kind):
            counts[piece] += int(uses[i])
            members[piece].add(i)
    shared = [piece for piece, _ in counts.most_common() if len({view.words[i].lower() for i in members[piece]}) > 1]
    names = {"suffix": "words ending in {!r}", "prefix": "words beginning with {!r}", "stem": "words of the stem {!r}"}
    marked = view.part(part)
    for piece in shared[:n]:
        table = np.zeros(len(view.words) + 1, bool)
        table[list(members[piece])] = True
        yield kind, names[kind].format(piece), table[view.word_ids] & marked


def pieces(word: str, kind: str) -> list[str]:
    """The suffixes, prefixes or the stem of a word; each leaves at least two letters of it.

    >>> pieces("jumping", "suffix"), pieces("jumping", "stem")
    (['ng', 'ing', 'ping'], ['jump'])
    """
    if not word.isalpha():
        return []
    if kind == "suffix":
        return [word[-n:] for n in SUFFIXES if len(word) > n + 1]
    if kind == "prefix":
        return [word[:n] for n in PREFIXES if len(word) > n + 1]
    ending = next((e for e in ENDINGS if word.endswith(e) and len(word) - len(e) > 2), "")
    stem = word[: len(word) - len(ending)]
    return [stem.rstrip("e") if len(stem) > 3 else stem] if len(stem) > 2 else []

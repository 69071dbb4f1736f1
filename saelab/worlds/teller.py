"""Base class for story grammars: random choices with their surprisal, and words with their concept labels.

Each choice is made just before the first token that depends on it, and different choices never give the same text: the
surprisal of the choices is the surprisal of the text, and no model's loss is below it on average.
"""

import functools
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TypeVar

from saelab.worlds import templates as lines

T = TypeVar("T")

OPEN, CLOSE = "\u201c", "\u201d"
NOTHING: frozenset[str] = frozenset()


@functools.cache
def compile_line(line: str) -> tuple[tuple[str, frozenset[str]], ...]:
    """A template as words and slots, each with the concepts that its position in the line implies.

    >>> [(piece, sorted(states)) for piece, states in compile_line("+They ran .")][0]
    ('They', ['past', 'plural-subject'])
    """
    subject = {"+": {"plural-subject"}, "!": set()}.get(line[0], {"singular-subject"})
    tense = next((name for name, groups in _TENSES.items() if any(line in group for group in groups)), "past")
    pieces: list[tuple[str, frozenset[str]]] = []
    for sentence, quoted in _sentences(line.lstrip("+!").split()):
        states = {tense, *subject}
        if quoted:
            states = {"quote", "future" if "will" in sentence else "present"}
            states |= {"question"} if "?" in sentence else set()
        pieces += [(piece, frozenset(states)) for piece in sentence]
    return tuple(pieces)


_TENSES = {"present": lines.PRESENT, "future": lines.FUTURE}


def _sentences(pieces: list[str]) -> Iterator[tuple[list[str], bool]]:
    """Runs of words that share their states, and whether they are quoted; quotation marks belong to the quote."""
    run: list[str] = []
    quoted = False
    for piece in pieces:
        if piece == OPEN:
            yield run, quoted
            run, quoted = [], True
        run.append(piece)
        if piece == CLOSE or (quoted and piece == "."):
            yield run, quoted
            run, quoted = [], quoted and piece != CLOSE
    yield run, quoted


class Teller:
    """A story under construction; `forced` fixes choices by name, for counterfactuals that differ in these alone."""

    def __init__(self, rng: random.Random, forced: Mapping[str, object] | None = None) -> None:
        self.rng, self.forced = rng, dict(forced or {})
        self.words: list[str] = []
        self.states: list[frozenset[str]] = []
        self.surprisal: list[float] = []
        self.marks: list[tuple[str, int]] = []
        self.known: dict[str, object] = {}
        self._pending = 0.0
        self._lasting = self._spans = self._implied = NOTHING
        self._starts = True

    # drawing

    def pick(self, options: Sequence[T], name: str = "") -> T:
        """A random option, uniform over the sequence; an option listed several times is accordingly likelier."""
        chosen = options[int(self.rng.random() * len(options))]
        chosen = self.forced.get(name, chosen)  # type: ignore[assignment]
        self._pending += math.log(len(options) / options.count(chosen))
        return chosen

    def recall(self, name: str, options: Sequence[T]) -> T:
        """The option chosen under this name before, or a new choice."""
        if name not in self.known:
            self.known[name] = self.pick(options, name)
        return self.known[name]  # type: ignore[return-value]

    def forget(self, *names: str) -> None:
        """Drop the choices of these names, so that the next `recall` chooses again."""
        for name in names:
            self.known.pop(name, None)

    # writing

    def write(self, words: str, *concepts: str) -> None:
        """Append words, with these concepts and those that currently hold."""
        active = self._lasting | self._spans | self._implied
        active = active | set(concepts) if concepts else active
        for word in words.split():
            self.words.append(word[0].upper() + word[1:] if self._starts else word)
            self.states.append(active)
            self.surprisal.append(self._pending)
            self._pending = 0.0
            self._starts = word in (".", "?", OPEN)

    def say(self, line: str) -> None:
        """Append a template, with its slots filled in."""
        for piece, implied in compile_line(line):
            self._implied = implied
            if piece[0] == "{":
                getattr(self, "slot_" + piece[1:-1].lower())()
            else:
                self.write(piece)
        self._implied = NOTHING

    @contextmanager
    def during(self, *states: str) -> Iterator[None]:
        """A context in which these concepts hold for all words written."""
        before = self._spans
        self._spans = before | set(states)
        yield
        self._spans = before

    def last(self, state: str) -> None:
        """Let a concept hold until the paragraph ends."""
        self._lasting |= {state}

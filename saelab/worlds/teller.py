"""Drawing and writing: what every grammar of a world needs, whatever its sentences.

Whatever is drawn is drawn just before the first token that shows it, and two different draws never give the same text:
the surprisal of the draws is the surprisal of the text, and no model's loss is below it on average.
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
    """Split a line into words and slots, each with the states that its place in the line implies.

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
    """One story in the making; `forced` fixes draws by name, for counterfactuals that differ in them alone."""

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
        """One of the options, all alike; equal options count as one that is likelier."""
        chosen = options[int(self.rng.random() * len(options))]
        chosen = self.forced.get(name, chosen)  # type: ignore[assignment]
        self._pending += math.log(len(options) / options.count(chosen))
        return chosen

    def recall(self, name: str, options: Sequence[T]) -> T:
        """What was drawn under this name, or a draw now."""
        if name not in self.known:
            self.known[name] = self.pick(options, name)
        return self.known[name]  # type: ignore[return-value]

    def forget(self, *names: str) -> None:
        for name in names:
            self.known.pop(name, None)

    # writing

    def write(self, words: str, *concepts: str) -> None:
        """Words as they are, with concepts that hold for them beside the states of their place."""
        active = self._lasting | self._spans | self._implied
        active = active | set(concepts) if concepts else active
        for word in words.split():
            self.words.append(word[0].upper() + word[1:] if self._starts else word)
            self.states.append(active)
            self.surprisal.append(self._pending)
            self._pending = 0.0
            self._starts = word in (".", "?", OPEN)

    def say(self, line: str) -> None:
        """A line of a template, its slots filled in."""
        for piece, implied in compile_line(line):
            self._implied = implied
            if piece[0] == "{":
                getattr(self, "slot_" + piece[1:-1].lower())()
            else:
                self.write(piece)
        self._implied = NOTHING

    @contextmanager
    def during(self, *states: str) -> Iterator[None]:
        """States that hold for what is written inside."""
        before = self._spans
        self._spans = before | set(states)
        yield
        self._spans = before

    def last(self, state: str) -> None:
        """A state that holds until the paragraph ends."""
        self._lasting |= {state}

"""The vocabulary and tokenizer of the synthetic stories, and the base class of story grammars.

A grammar makes random choices with their surprisal, and words with their concept labels. Each choice is made just
before the first token that depends on it, and different choices never give the same text: the surprisal of the choices
is the surprisal of the text, and no model's loss is below it on average.
"""

import functools
import math
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from saelab.lm.tokenizers import SpecialWords, word_tokenizer
from saelab.synthetic import lexicon as lex, templates, templates as lines

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


BOS, EOS, PAD, UNK = "<bos>", "<eos>", "<pad>", "<unk>"
SPECIAL = (PAD, BOS, EOS, UNK)
SPECIAL_WORDS = SpecialWords(bos=BOS, eos=EOS, pad=PAD, unk=UNK)


def _lexicon_words() -> set[str]:
    """Every word that a slot can write."""
    lists = [*lex.TOWNS, *lex.PLURALS, *lex.VEGETABLES, *lex.YOUNG.values(), *lex.HOMES.values(), *lex.DIRECTIONS]
    lists += [*lex.NUMBERS, *lex.PARTNERS, *lex.PARTNERS.values(), "soup", "stew", "girl", "boy", "a", "an", "A", "An"]
    lists += [line for town in lex.TOWNS.values() for line in town]
    lists += [name for names in lex.HEROES.values() for name in names]
    lists += [word for root, classes in lex.CLASSES.items() for word in (root, *classes, *classes.values())]
    axes = (*lex.AXES.values(), *lex.ONE_SIDED.values(), lex.DISTANCE)
    lists += [line for axis in axes for line in (*axis.words, *axis.results)]
    lists += [line for kinds in lex.MOODS.values() for line in kinds.values()]
    lists += [
        line for topic in lex.TOPICS.values() for line in (topic.places, topic.things, topic.workers, *topic.deeds)
    ]
    lists += [form for forms in lex.PRONOUNS.values() for word in forms.values() for form in (word, word.capitalize())]
    return {word for line in lists for word in line.split()}


def _template_words() -> set[str]:
    groups = [
        group for name, group in vars(templates).items() if name.isupper() and name not in ("BODY", "PRESENT", "FUTURE")
    ]
    return {word for group in groups for line in group for word in line.lstrip("+!").split()}


VOCABULARY: tuple[str, ...] = (
    *SPECIAL,
    *sorted(word for word in _lexicon_words() | _template_words() if word[0] != "{"),
)
"""the word of each token id"""


def write_out(words: list[str]) -> str:
    """Words as running text, with normal spacing of punctuation and quotation marks.

    >>> write_out(["Once", ",", "he", "ran", "."])
    'Once, he ran.'
    """
    text = " ".join(words)
    return re.sub(f" ([.,?{CLOSE}])", r"\1", text).replace(OPEN + " ", OPEN)


def make_tokenizer() -> Any:
    """A word-level Hugging Face tokenizer over `VOCABULARY`; it decodes to the spacing of `write_out`."""
    return word_tokenizer(VOCABULARY, SPECIAL_WORDS, no_space_before=".,?" + CLOSE, no_space_after=OPEN)


def save_tokenizer(folder: Path) -> None:
    """Write the tokenizer's files into a folder, such as a model's."""
    make_tokenizer().save_pretrained(folder)

"""`generate_stories` and `Stories`: synthetic stories as token ids, with concept labels and losses by token.

The loss is the surprisal under the grammar, which no model can beat on average. Also the table of concepts of the
stories, and the concepts of each word.
"""

import random
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Float32, Int, Int32
from torch import Tensor

from saelab.lm.token_labels import Concept, TokenLabels
from saelab.lm.tokens import PADDING, Tokens
from saelab.synthetic import lexicon as lex
from saelab.synthetic.grammar import Tale
from saelab.synthetic.vocabulary import BOS, EOS, PAD, SPECIAL, VOCABULARY, write_out

if TYPE_CHECKING:
    from scipy.sparse import csr_matrix

STATES = ["quote", "question", "past", "present", "future", "singular-subject", "plural-subject", "opening", "ending"]
ROLES = ["giver", "receiver", "first-mention"]
REGISTERS = ["recipe", "weather-report"]
RELATIONS = ["young-of", "home-of", "partner-of"]
FALLBACKS = ("punctuation", "function word", "plain word")
FEMALE = ["girl", "she", "her", "woman", "queen", "princess", "mother", "sister", "aunt"]
MALE = ["boy", "he", "his", "him", "man", "king", "prince", "father", "brother", "uncle"]
FUNCTION = [
    "a",
    "an",
    "the",
    "there",
    "was",
    "were",
    "is",
    "are",
    "be",
    "to",
    "of",
    "in",
    "on",
    "at",
    "with",
    "for",
    "so",
    "and",
    "that",
    "it",
    "they",
    "them",
    "this",
    "no",
    "not",
    "had",
    "has",
    "have",
    "i",
    "my",
    "who",
    "where",
    "some",
    "two",
    "every",
    "will",
    "then",
    "near",
    "under",
    "behind",
    "because",
    "once",
    "upon",
    "one",
    "what",
    "whose",
    "all",
    "such",
    "than",
]
CTX_LEN = 256
"""fits every story with its BOS and EOS"""


def _nouns() -> list[Concept]:
    table = []
    for root, classes in lex.CLASSES.items():
        table.append(Concept(root, "root"))
        for name, words in classes.items():
            table.append(Concept(name, "class", parent=root))
            table += [Concept(word, "word", parent=name) for word in words.split()]
    return table


def _names() -> list[Concept]:
    table = [Concept("name", "root")]
    for gender, names in lex.HEROES.items():
        table.append(Concept(f"{gender} name", "class", parent="name"))
        table += [Concept(name, "word", parent=f"{gender} name") for name in names]
    return table


def _poles() -> list[Concept]:
    pairs = [axis.poles for axis in (*lex.AXES.values(), lex.DISTANCE)]
    pairs += [("glad", "sad"), ("female", "male")]
    table = [Concept(a, "pole", opposite=b) for pair in pairs for a, b in (pair, pair[::-1])]
    return table + [Concept(name, "one-sided") for name in lex.ONE_SIDED]


def _states() -> list[Concept]:
    opposite = {"past": "future", "future": "past"}
    opposite |= {"singular-subject": "plural-subject", "plural-subject": "singular-subject"}
    table = [Concept(name, "state", opposite=opposite.get(name)) for name in STATES]
    table += [
        Concept(f"story of a {a}", "state", opposite=f"story of a {b}") for a, b in (("girl", "boy"), ("boy", "girl"))
    ]
    table += [Concept(f"topic {name}", "topic", topic=name) for name in lex.TOPICS]
    table += [Concept(name, "role") for name in ROLES]
    table += [Concept(name, "register") for name in REGISTERS]
    table += [Concept(name, "relation") for name in RELATIONS]
    table += [Concept(f"about {town}", "fact") for town in lex.TOWNS]
    kinds = ("town", "people", "language", "young animal", "animal home", "weather")
    return table + [Concept(name, "class") for name in kinds] + [Concept(name, "grammar") for name in FALLBACKS]


CONCEPTS: tuple[Concept, ...] = (*_nouns(), *_names(), *_poles(), *_states())
CONCEPT_IDS = {concept.name: i for i, concept in enumerate(CONCEPTS)}


def concepts_of_word(word: str) -> tuple[str, ...]:
    """The concepts that a word has in every context, in any capitalization.

    >>> concepts_of_word("queen")
    ('queen', 'noble', 'person', 'female')
    """
    return _WORDS.get(word) or _WORDS.get(word.lower()) or _fallback(word.lower())


def _fallback(word: str) -> tuple[str, ...]:
    if not word.isalpha():
        return ("punctuation",)
    return ("function word",) if word in FUNCTION else ("plain word",)


def _word_concepts() -> dict[str, tuple[str, ...]]:
    words: dict[str, tuple[str, ...]] = {}
    for root, classes in lex.CLASSES.items():
        for name, members in classes.items():
            words |= {word: (word, name, root) for word in members.split()}
            words[name], words[root] = (name, root), (root,)
    singular = {"wolves": "wolf", "foxes": "fox"}
    words |= {plural: words[singular.get(plural, plural[:-1])] for plural in (*lex.PLURALS, *lex.VEGETABLES)}
    for axis in (*lex.AXES.values(), *lex.ONE_SIDED.values(), lex.DISTANCE):
        words |= {word: (pole,) for pole, listed in zip(axis.poles, axis.words, strict=True) for word in listed.split()}
    for gender, pole in (("girl", "female"), ("boy", "male")):
        words |= {name: (name, f"{gender} name", "name", pole) for name in lex.HEROES[gender]}
    for name, town in lex.TOWNS.items():
        words |= {name: ("town",), town.people: ("people",), town.language: ("language",), town.weather: ("weather",)}
    words |= dict.fromkeys(lex.YOUNG.values(), ("young animal",)) | dict.fromkeys(lex.HOMES.values(), ("animal home",))
    for pole, listed in (("female", FEMALE), ("male", MALE)):
        words |= {word: (*words.get(word, ()), pole) for word in listed}
    return words


_WORDS = _word_concepts()


@dataclass(frozen=True, eq=False, repr=False)
class Stories:
    """Stories as one sequence of token ids, with concept labels for each token; `len()` is the number of stories.

    A story is BOS, its words, EOS; BOS and EOS have no concepts. Story i has the tokens `offsets[i]` to `offsets[i +
    1]`.
    """

    token_ids: Int32[np.ndarray, "n_tokens"]
    offsets: np.ndarray
    """start of each story, and the end of the last"""
    labels: TokenLabels
    """which concepts each token has, and the story it is in"""
    surprisal: Float32[np.ndarray, "n_tokens"]
    """surprisal of each token under the generating process, in nats: what the best possible model loses, on average
    over stories"""
    source: str

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __repr__(self) -> str:
        size = f"n_stories={len(self)}, n_tokens={len(self.token_ids)}, n_concepts={len(self.labels)}"
        return f"Stories({size}, source={self.source!r})"

    @property
    def story_ids(self) -> Int32[np.ndarray, "n_tokens"]:
        """The index of each token's story."""
        return np.repeat(np.arange(len(self), dtype=np.int32), np.diff(self.offsets))

    @cached_property
    def oracle_loss(self) -> float:
        """The loss of the best possible model: mean surprisal in nats per predicted token (all but BOS).

        A model's loss is below it by chance of the sample alone.
        """
        return float(self.surprisal.sum() / (len(self.token_ids) - len(self)))

    def text(self, i: int) -> str:
        """Story i as running text."""
        words = [VOCABULARY[j] for j in self.token_ids[self.offsets[i] + 1 : self.offsets[i + 1] - 1]]
        return write_out(words)

    def tokens(self, ctx_len: int = CTX_LEN) -> Tokens:
        """The stories as `Tokens`, one per row, padded to `ctx_len`, for `collect`, `stream` and `evaluate`.

        ValueError where a story does not fit.
        """
        lengths = np.diff(self.offsets)
        if lengths.max(initial=0) > ctx_len:
            raise ValueError(f"`ctx_len` must hold the longest story ({lengths.max()} tokens), got {ctx_len}.")
        ids = np.full((len(self), ctx_len), VOCABULARY.index(PAD), np.int32)
        doc_ids = np.full((len(self), ctx_len), PADDING, np.int32)
        rows = self.story_ids
        columns = np.arange(len(rows)) - np.repeat(self.offsets[:-1], lengths)
        ids[rows, columns], doc_ids[rows, columns] = self.token_ids, rows
        special = tuple(range(len(SPECIAL)))
        return Tokens(
            ids=torch.from_numpy(ids),
            doc_ids=torch.from_numpy(doc_ids),
            special_ids=special,
            source=self.source,
            bos=True,
            packed=False,
        )

    def labels_at(
        self, story_ids: Int[np.ndarray | Tensor, "n"], positions: Int[np.ndarray | Tensor, "n"]
    ) -> TokenLabels:
        """Concept labels of n chosen tokens, as (n,), by index of the story and position in it (BOS is at 0).

        ValueError for a position or a story that there is not.
        """
        stories, places = np.asarray(story_ids), np.asarray(positions)
        if len(stories) and not (stories.min() >= 0 and stories.max() < len(self)):
            raise ValueError(
                f"`story_ids` must be 0 to {len(self) - 1}, got {stories.min()} to {stories.max()}; a store of other "
                "stories has other numbers."
            )
        lengths = np.diff(self.offsets)[stories]
        if (wrong := (places < 0) | (places >= lengths)).any():
            i = int(wrong.argmax())
            raise ValueError(
                f"`positions` must lie inside their stories, got {places[i]} in story {stories[i]} of {lengths[i]} "
                "tokens."
            )
        return self.labels.select(self.offsets[stories] + places)


def generate_stories(n_stories: int, seed: int = 0, first: int = 0) -> Stories:
    """Synthetic stories with concept labels: numbers `first` to `first + n_stories` of a seed.

    Each story depends on the seed and its own number alone, so disjoint ranges are disjoint samples: train on some,
    score on others. ValueError for a negative number.

    >>> stories = generate_stories(2, seed=0)
    >>> len(stories), stories.text(0)[:4] in ("Once", "Long", "Ther")
    (2, True)
    """
    if n_stories < 0 or first < 0:
        raise ValueError(f"`n_stories` and `first` must not be negative, got {n_stories} and {first}.")
    tales = (Tale(random.Random(f"{seed}/{i}")).generate() for i in range(first, first + n_stories))
    return gather(tales, f"tales seed {seed}, stories {first} to {first + n_stories}")


def gather(tales: Iterable[Tale], source: str) -> Stories:
    """Stories as token ids and concept labels, one after another; `source` describes them."""
    place = {word: i for i, word in enumerate(VOCABULARY)}
    ids, meanings, surprisal, offsets = [], [], [], [0]
    known: dict[tuple[str, frozenset[str]], int] = {(BOS, frozenset()): 0}
    for tale in tales:
        words, states = [BOS, *tale.words, EOS], [frozenset[str](), *tale.states, frozenset[str]()]
        ids += [place[word] for word in words]
        surprisal += [0.0, *tale.surprisal, 0.0]
        # few different (word, states) pairs make up all tokens
        meanings += [known.setdefault(pair, len(known)) for pair in zip(words, states, strict=True)]
        offsets.append(len(ids))
    matrix = _concept_matrix(np.array(meanings, np.int64), list(known))
    story_ids = np.repeat(np.arange(len(offsets) - 1, dtype=np.int32), np.diff(offsets))
    return Stories(
        token_ids=np.array(ids, np.int32),
        offsets=np.array(offsets, np.int64),
        labels=TokenLabels(CONCEPTS, matrix, (len(ids),), story_ids),
        surprisal=np.array(surprisal, np.float32),
        source=source,
    )


def _concept_matrix(meanings: np.ndarray, known: list[tuple[str, frozenset[str]]]) -> "csr_matrix":
    """One row a token, from the concepts of each (word, states) pair."""
    from scipy.sparse import csr_matrix

    sets = [_concept_ids(word, states) for word, states in known]
    table = csr_matrix(
        (np.ones(sum(map(len, sets)), bool), np.concatenate(sets), np.cumsum([0, *map(len, sets)])),
        shape=(len(sets), len(CONCEPTS)),
    )
    return table[meanings]


def _concept_ids(word: str, states: frozenset[str]) -> np.ndarray:
    names = set() if word in SPECIAL else {*concepts_of_word(word), *states}
    return np.array(sorted(CONCEPT_IDS[name] for name in names), np.int32)

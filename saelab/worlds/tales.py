"""`tell` and `Stories`: synthetic stories as token ids, with concept labels and optimal loss for every token."""

import random
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Float32, Int32
from torch import Tensor

from saelab.lm.tokens import PADDING, Tokens
from saelab.worlds.concepts import CONCEPT_IDS, CONCEPTS, concepts_of_word
from saelab.worlds.grammar import Tale
from saelab.worlds.lexicon import Concept
from saelab.worlds.vocabulary import BOS, EOS, PAD, SPECIAL, VOCABULARY, write_out

if TYPE_CHECKING:
    from scipy.sparse import csr_matrix

CTX_LEN = 256
"""fits every story with its BOS and EOS"""


@dataclass(frozen=True, eq=False, repr=False)
class Stories:
    """Stories as one sequence of token ids, with concept labels for each token; `len()` is the number of stories.

    A story is BOS, its words, EOS; BOS and EOS have no concepts. Story i has the tokens `offsets[i]` to `offsets[i +
    1]`.
    """

    token_ids: Int32[np.ndarray, "n_tokens"]
    offsets: np.ndarray
    """start of each story, and the end of the last"""
    concepts: "csr_matrix"
    """(n_tokens, n_concepts), true where a token has a concept; columns as in `table`"""
    surprisal: Float32[np.ndarray, "n_tokens"]
    """surprisal of each token under the generating process, in nats: what the best possible model loses, on average
    over stories"""
    source: str
    table: tuple[Concept, ...] = CONCEPTS

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __repr__(self) -> str:
        n_tokens, n_concepts = self.concepts.shape
        return f"Stories(n_stories={len(self)}, n_tokens={n_tokens}, n_concepts={n_concepts}, source={self.source!r})"

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
        """The stories as `Tokens`, one a row, for `collect`, `stream` and `evaluate`.

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

    def concepts_at(self, story_ids: Int32[Tensor, "n"], positions: Int32[Tensor, "n"]) -> "csr_matrix":
        """Concept labels of chosen tokens: rows of `concepts`, by story and position in the story (BOS is at 0)."""
        rows = torch.from_numpy(self.offsets)[story_ids.long()] + positions.long()
        return self.concepts[rows.numpy()]


def tell(n_stories: int, seed: int = 0, first: int = 0) -> Stories:
    """Synthetic stories with concept labels: numbers `first` to `first + n_stories` of a seed.

    Each story depends on the seed and its own number alone, so disjoint ranges are disjoint samples: train on some,
    score on others. ValueError for a negative number.

    >>> stories = tell(2, seed=0)
    >>> len(stories), stories.text(0)[:4] in ("Once", "Long", "Ther")
    (2, True)
    """
    if n_stories < 0 or first < 0:
        raise ValueError(f"`n_stories` and `first` must not be negative, got {n_stories} and {first}.")
    tales = (Tale(random.Random(f"{seed}/{i}")).tell() for i in range(first, first + n_stories))
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
    return Stories(
        token_ids=np.array(ids, np.int32),
        offsets=np.array(offsets, np.int64),
        concepts=_concept_matrix(np.array(meanings, np.int64), list(known)),
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

"""Tokens of a synthetic corpus with their true concepts, and example sentences of features in it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Bool, Float, Int

from saelab.pictures.tokens import Sentence
from saelab.worlds.lexicon import Concept

if TYPE_CHECKING:
    from scipy.sparse import csr_matrix

ENDS = frozenset(".?!")
CLOSE = "\u201d"
SHORT = 9  # tokens: a shorter sentence is shown with the one before


@dataclass(frozen=True, eq=False)
class Corpus:
    """Tokens in the order of the text, story after story, with one row of codes each."""

    words: Sequence[str]
    story_ids: Int[np.ndarray, "n_tokens"]
    truth: "csr_matrix"
    """(n_tokens, n_concepts), true where a concept holds on a token"""
    table: Sequence[Concept]
    """concepts, in the order of the columns of `truth`"""
    shown: Bool[np.ndarray, "n_tokens"]
    """tokens of the stories that sentences are taken from"""

    def holds(self, name: str) -> Int[np.ndarray, "n"]:
        """The tokens of the shown stories on which a concept holds."""
        column = next(i for i, concept in enumerate(self.table) if concept.name == name)
        return np.flatnonzero(self.truth[:, [column]].toarray().ravel() & self.shown)

    def span(self, token: int) -> tuple[int, int]:
        """First token and end of a token's sentence; a short sentence includes the one before it in the story."""
        start, stop = self._start(token), token + 1
        while not self._ends(stop - 1):
            stop += 1
        if stop - start < SHORT and start > 0 and self.story_ids[start - 1] == self.story_ids[start]:
            start = self._start(start - 1)
        return start, stop

    def _start(self, token: int) -> int:
        while token > 0 and not self._ends(token - 1):
            token -= 1
        return token

    def _ends(self, token: int) -> bool:
        after = token + 1
        if after == len(self.words) or self.story_ids[after] != self.story_ids[token]:
            return True
        return self.words[token] in ENDS and self.words[after] != CLOSE

    def sentence(self, token: int, column: Float[np.ndarray, "n_tokens"], note: str = "") -> Sentence:
        """The sentence around a token, with a feature's activations (a dense column)."""
        start, stop = self.span(token)
        names = [[self.table[i].name for i in self.truth[row].indices] for row in range(start, stop)]
        return Sentence(self.words[start:stop], column[start:stop].tolist(), names, note)


def examples(
    corpus: Corpus, column: Float[np.ndarray, "n_tokens"], side: int, threshold: float, name: str, n: int = 4
) -> list[Sentence]:
    """Up to `n` sentences of different stories: the strongest firings, one on the median token, and a mistake if any.

    Where that side of the feature never fires, sentences in which the concept holds are returned instead.

    Args:
        corpus: tokens with their true concepts.
        column: the feature's code at every token.
        side: 1 or -1, the sign of the codes looked at.
        threshold: the feature predicts the concept where `side * column` is larger.
        name: name of the concept.
        n: largest number of sentences.
    """
    z, true = np.where(corpus.shown, side * column, 0), corpus.holds(name)
    firing = np.flatnonzero(z > 0)
    firing = firing[np.argsort(-z[firing], kind="stable")].tolist()
    strong = [(token, "fires among the most strongly") for token in firing]
    median = [(token, "fires as on its median token") for token in firing[len(firing) // 2 :]]
    silent = [(token, "the concept holds here; the feature never fires") for token in true.tolist() if not firing]
    wanted = [(strong, 2), (median, 1), (_mistakes(z, true, threshold) if firing else [], 1), (strong, n), (silent, n)]
    chosen: dict[int, Sentence] = {}  # by story
    for candidates, n_more in wanted:
        limit = min(n, len(chosen) + n_more)
        for token, note in candidates:
            if len(chosen) == limit:
                break
            if (story := int(corpus.story_ids[token])) not in chosen:
                chosen[story] = corpus.sentence(token, column, f"{corpus.words[token]}: {note}")
    return list(chosen.values())


def _mistakes(z: Float[np.ndarray, "n_tokens"], true: Int[np.ndarray, "n"], threshold: float) -> list[tuple[int, str]]:
    """The tokens of the more frequent kind of error: false positives, strongest first, or misses from the middle on."""
    says = np.flatnonzero(z > threshold)
    false_alarms, misses = np.setdiff1d(says, true), np.setdiff1d(true, says)
    if len(false_alarms) > len(misses):
        strongest = false_alarms[np.argsort(-z[false_alarms], kind="stable")].tolist()
        return [(token, "a false alarm: above its threshold, but the concept does not hold") for token in strongest]
    order = np.roll(misses, -(len(misses) // 2)).tolist()
    return [(token, "a miss: the concept holds, but it stays below its threshold") for token in order]

"""Tests of chosen rules on held-out documents."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Int, Integer

from saelab.analyses.lens import LogitLens
from saelab.labelling.contingency import Side
from saelab.labelling.significance import adjust, dispersion, tail, window_auroc
from saelab.labelling.views import TokenView
from saelab.stores.features import FeatureStore

N_BLOCKS = 64
"""Smallest number of blocks that are shifted independently when the null is measured."""
PROMOTED_SHARE = 0.5
"""A token counts as promoted if its effect is at least this share of the largest."""


@dataclass(frozen=True)
class Verdict:
    """Result of one rule for one feature side on held-out tokens."""

    hits: int
    """number of tokens on which the feature fires and the rule holds"""
    fires: int
    """number of tokens on which the feature fires"""
    holds: int
    """number of tokens on which the rule holds"""
    n_tokens: int
    auroc: float
    """AUROC of the rule in windows around firings; 0.5 is chance"""
    spread: float
    """variance of the hits under the null, relative to independent tokens"""

    @property
    def precision(self) -> float:
        """Share of the rule's tokens on which the feature fires; NaN where the rule holds on none."""
        return self.hits / self.holds if self.holds else float("nan")

    @property
    def recall(self) -> float:
        """Share of the firings that the rule covers; NaN where there are none."""
        return self.hits / self.fires if self.fires else float("nan")

    @property
    def f1(self) -> float:
        """2 hits / (fires + holds)."""
        return 2 * self.hits / max(1, self.fires + self.holds)

    @property
    def f1_chance(self) -> float:
        """F1 of a rule that holds as often, independently of the feature."""
        return 2 * self.fires * self.holds / self.n_tokens / max(1, self.fires + self.holds)

    @property
    def skill(self) -> float:
        """(F1 - F1_chance) / (1 - F1_chance): 0 is chance, 1 is perfect."""
        return (self.f1 - self.f1_chance) / max(1e-12, 1 - self.f1_chance)

    @property
    def lift(self) -> float:
        """Firing rate where the rule holds, divided by the firing rate on all tokens."""
        return self.precision / (self.fires / self.n_tokens) if self.fires else float("nan")


class Judge:
    """The held-out documents, on which each chosen rule is tested once."""

    def __init__(self, side: Side, doc_ids: np.ndarray, seed: int) -> None:
        self.side, self.doc_ids, self.seed = side, doc_ids[side.rows], seed
        self._active = np.zeros(side.n_tokens, bool)
        # blocks that are shifted together: documents, cut into pieces where there are few
        size = max(1, side.n_tokens // N_BLOCKS) if len(np.unique(self.doc_ids)) < N_BLOCKS else side.n_tokens
        _, documents = np.unique(self.doc_ids, return_inverse=True)
        self._blocks = documents * N_BLOCKS + np.minimum(np.arange(side.n_tokens) // size, N_BLOCKS - 1)

    def test(
        self, holds: Callable[[np.ndarray], np.ndarray], size: int, fires: Integer[np.ndarray, "n"], unit: int
    ) -> Verdict:
        """The result of one rule for one feature side on the held-out tokens.

        Args:
            holds: function from token positions to whether the rule holds there.
            size: number of held-out tokens on which the rule holds.
            fires: positions at which the feature side fires.
            unit: number of the feature side, which seeds the random draws.
        """
        rng = np.random.default_rng((self.seed, unit))
        n, hits = self.side.n_tokens, int(np.count_nonzero(holds(fires)))
        auroc, spread = float("nan"), 1.0
        if hits:
            self._active[fires] = True
            auroc = window_auroc(holds, fires, self._active, self.doc_ids, rng)
            self._active[fires] = False
        if hits * n > len(fires) * size:
            spread = dispersion(holds, fires, size / n, n, rng, self._blocks)
        return Verdict(hits, len(fires), size, n, auroc, spread)


def q_values(verdicts: list[Verdict]) -> tuple[np.ndarray, np.ndarray]:
    """The p value of each result, and its false discovery rate among all of them (Benjamini-Hochberg)."""
    if not verdicts:
        return np.empty(0), np.empty(0)
    columns = np.array([(v.hits, v.fires, v.holds, v.spread) for v in verdicts], float)
    hits, fires, holds, spread = columns.T
    p = tail(hits, fires, holds, verdicts[0].n_tokens, spread)
    return p, adjust(p)


class NextTokens:
    """Tokens that follow each token of a store, for rules on what a feature promotes."""

    def __init__(self, store: FeatureStore, lens: LogitLens, side: Side) -> None:
        view = TokenView(store.text)
        self.next_ids = view.after(view.token_ids)[store.places[side.rows]]
        self.counts = np.bincount(self.next_ids + 1, minlength=len(view.strings) + 1)[1:]
        self.lens = lens
        self._ids: dict[str, list[int]] = {}
        for i in np.unique(view.token_ids).tolist():
            self._ids.setdefault(view.strings[i], []).append(i)

    def promoted(self, feature: int, sign: int) -> tuple[list[str], Int[np.ndarray, "n"]]:
        """The tokens that a sign of a feature promotes most, and the ids of those that occur in the text."""
        try:
            found = self.lens[feature]
        except KeyError:
            return [], np.empty(0, np.int64)
        listed = found.promoted if sign > 0 else found.suppressed
        largest = listed[0][1] * sign if listed else 0.0
        words = [text for text, effect in listed if largest > 0 and effect * sign >= PROMOTED_SHARE * largest]
        return words, np.array([i for word in words for i in self._ids.get(word, [])], np.int64)

    def follow(self, ids: Int[np.ndarray, "n"]) -> tuple[Callable[[np.ndarray], Bool[np.ndarray, "*n"]], int]:
        """Whether one of these tokens follows each given position, as a function, and the number of positions where it
        does.
        """
        table = np.zeros(len(self.counts) + 1, bool)
        table[ids] = True  # the last place is for tokens with none after them
        return lambda at: table[self.next_ids[at]], int(self.counts[ids].sum())

"""What chosen rules are worth on held-out documents."""

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
"""Blocks that are moved on their own, at least, where chance is measured."""
PROMOTED_SHARE = 0.5
"""Tokens count as promoted whose effect is this share of the largest."""


@dataclass(frozen=True)
class Verdict:
    """A rule against a unit on held-out tokens."""

    hits: int
    """tokens on which the unit fires and the rule holds"""
    fires: int
    holds: int
    n_tokens: int
    auroc: float
    spread: float
    """how much wider than of independent tokens the hits spread by chance"""

    @property
    def precision(self) -> float:
        """Share of the rule's tokens on which the unit fires; NaN where the rule holds of none."""
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
        """F1 if the rule held as often, but on any tokens."""
        return 2 * self.fires * self.holds / self.n_tokens / max(1, self.fires + self.holds)

    @property
    def skill(self) -> float:
        """F1 above chance, as a share of what there is: 0 is chance, 1 is perfect."""
        return (self.f1 - self.f1_chance) / max(1e-12, 1 - self.f1_chance)

    @property
    def lift(self) -> float:
        """Firing where the rule holds, over firing anywhere."""
        return self.precision / (self.fires / self.n_tokens) if self.fires else float("nan")


class Judge:
    """Held-out documents, on which each chosen rule is tried once."""

    def __init__(self, side: Side, doc_ids: np.ndarray, seed: int) -> None:
        self.side, self.doc_ids, self.seed = side, doc_ids[side.rows], seed
        self._active = np.zeros(side.n_tokens, bool)
        # documents, cut where they are few: what is moved together
        size = max(1, side.n_tokens // N_BLOCKS) if len(np.unique(self.doc_ids)) < N_BLOCKS else side.n_tokens
        _, documents = np.unique(self.doc_ids, return_inverse=True)
        self._blocks = documents * N_BLOCKS + np.minimum(np.arange(side.n_tokens) // size, N_BLOCKS - 1)

    def test(
        self, holds: Callable[[np.ndarray], np.ndarray], size: int, fires: Integer[np.ndarray, "n"], unit: int
    ) -> Verdict:
        """One rule, which holds of `size` tokens, against the tokens of the side on which a unit fires."""
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
    """p of each verdict, and the false discovery rate at which it counts among all of them."""
    if not verdicts:
        return np.empty(0), np.empty(0)
    columns = np.array([(v.hits, v.fires, v.holds, v.spread) for v in verdicts], float)
    hits, fires, holds, spread = columns.T
    p = tail(hits, fires, holds, verdicts[0].n_tokens, spread)
    return p, adjust(p)


class NextTokens:
    """The token after each of a store, against those that features promote."""

    def __init__(self, store: FeatureStore, lens: LogitLens, side: Side) -> None:
        view = TokenView(store.text)
        self.next_ids = view.after(view.token_ids)[store.places[side.rows]]
        self.counts = np.bincount(self.next_ids + 1, minlength=len(view.strings) + 1)[1:]
        self.lens = lens
        self._ids: dict[str, list[int]] = {}
        for i in np.unique(view.token_ids).tolist():
            self._ids.setdefault(view.strings[i], []).append(i)

    def promoted(self, feature: int, sign: int) -> tuple[list[str], Int[np.ndarray, "n"]]:
        """The tokens that a sign pushes most, and the ids among them that occur in the text."""
        try:
            found = self.lens[feature]
        except KeyError:
            return [], np.empty(0, np.int64)
        listed = found.promoted if sign > 0 else found.suppressed
        largest = listed[0][1] * sign if listed else 0.0
        words = [text for text, effect in listed if largest > 0 and effect * sign >= PROMOTED_SHARE * largest]
        return words, np.array([i for word in words for i in self._ids.get(word, [])], np.int64)

    def follow(self, ids: Int[np.ndarray, "n"]) -> tuple[Callable[[np.ndarray], Bool[np.ndarray, "*n"]], int]:
        """Whether one of these comes next after tokens of the side, and after how many of all it does."""
        table = np.zeros(len(self.counts) + 1, bool)
        table[ids] = True  # the last place is for tokens with none after them
        return lambda at: table[self.next_ids[at]], int(self.counts[ids].sum())

"""Token baseline of simulation: how well a feature's codes are predicted by the current token, or the last two."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Integer

from saelab.functional.indices import find_runs, move_blocks
from saelab.functional.statistics import correlation_of_sums
from saelab.labels.rules.token_view import TokenView
from saelab.stores.feature_store import FeatureStore
from saelab.stores.results import Result, format_table

CELLS = 2**22
"""Number of sums held at once."""
MIN_PAIR = 3
"""Pairs of tokens with fewer occurrences in training documents are looked up by the last token alone."""
BACK_OFF = 5.0
"""Weight of the last token's mean in the value of a pair, as a number of tokens."""


@dataclass(frozen=True, kw_only=True, eq=False)
class TokenBaseline(Result):
    """Pearson's r of predicted and true codes over all held-out tokens, for each feature.

    NaN where a feature does not fire on both sides of the split.
    """

    by_token: Float[np.ndarray, "d_sae"]
    """prediction: the token's mean code in training documents"""
    by_pair: Float[np.ndarray, "d_sae"]
    """prediction: the mean code of the pair of previous and current token, backing off to the current token where it is
    rare"""
    by_token_chance: Float[np.ndarray, "d_sae"]
    """`by_token` against codes that were moved to other places of the held-out documents"""
    by_pair_chance: Float[np.ndarray, "d_sae"]
    n_train: int
    n_tokens: int
    """number of held-out tokens"""
    n_pairs: int
    train_frac: float
    seed: int

    def scores(self, feature: int) -> dict[str, float]:
        """The four values of a feature, as entries of a label's scores."""
        names = ("by_token", "by_pair", "by_token_chance", "by_pair_chance")
        return {f"simulation_{name}": float(getattr(self, name)[feature]) for name in names}

    def __str__(self) -> str:
        lines = [f"codes simulated from tokens, Pearson's r on {self.n_tokens:,} held-out tokens"]
        table = [["", "median", "5 %", "95 %", "r > 0.5"]]
        for name in ("by_token", "by_pair", "by_token_chance", "by_pair_chance"):
            values = getattr(self, name)[~np.isnan(getattr(self, name))]
            if len(values) == 0:
                continue
            marks = [f"{np.quantile(values, q):.3f}" for q in (0.5, 0.05, 0.95)]
            table.append([name.replace("_", " "), *marks, f"{(values > 0.5).mean():.1%}"])
        return "\n".join([*lines, *format_table(table)])


def token_baseline(store: FeatureStore, *, train_frac: float = 0.5, seed: int = 0) -> TokenBaseline:
    """Correlation of every feature's signed codes with their prediction from the token, and from the last two tokens.

    Predictions are means over training documents, compared with the codes of held-out ones: the simplest explanation of
    a feature, which a good label should beat, or match in fewer words. A pair's mean is shrunk toward that of its last
    token. Chance is measured with codes moved in blocks within the held-out documents, each block rotated by a random
    step, so that it falls on periodic text too.
    """
    is_train = store.split(train_frac, seed)
    tables = _Tables.make(store, is_train, np.random.default_rng(seed))
    found = {
        name: np.full(store.d_sae, np.nan) for name in ("by_token", "by_pair", "by_token_chance", "by_pair_chance")
    }
    for start, stop in _blocks(store.d_sae, tables.n_groups):
        for name, values in tables.correlate(store, start, stop):
            found[name][start:stop] = values
    return TokenBaseline(
        **found, n_train=int(is_train.sum()), n_tokens=int((~is_train).sum()), n_pairs=tables.n_groups - tables.n_ids,
        train_frac=train_frac, seed=seed,
    )  # fmt: skip


def _blocks(d_sae: int, n_groups: int) -> Iterator[tuple[int, int]]:
    width = max(1, CELLS // n_groups)
    return ((a, min(a + width, d_sae)) for a in range(0, d_sae, width))


@dataclass(frozen=True, eq=False)
class _Tables:
    """Groups of tokens that share a prediction: first one for each token id, then one for each frequent pair."""

    groups: Integer[np.ndarray, "n_tokens"]
    """the pair of each token of the store, or its id where the pair is rare"""
    moved: Integer[np.ndarray, "n_tokens"]
    """the group of the token to which a held-out token's code is moved"""
    last: Integer[np.ndarray, "n_groups"]
    """the token id of each group"""
    is_train: Bool[np.ndarray, "n_tokens"]
    n_ids: int

    @property
    def n_groups(self) -> int:
        """Number of token ids and frequent pairs."""
        return len(self.last)

    @classmethod
    def make(cls, store: FeatureStore, is_train: np.ndarray, rng: np.random.Generator) -> "_Tables":
        """The groups of a store's tokens, with the pairs that are frequent in training documents."""
        view = TokenView(store.text)
        _, ids = np.unique(view.token_ids, return_inverse=True)
        previous, n_ids = view.before(ids), int(ids.max()) + 1
        pairs, ids = (previous * n_ids + ids)[store.places], ids[store.places]
        known, counts = np.unique(pairs[is_train & (pairs >= 0)], return_counts=True)
        known = known[counts >= MIN_PAIR]
        at = np.minimum(np.searchsorted(known, pairs), max(len(known) - 1, 0))
        groups = ids if len(known) == 0 else np.where(known[at] == pairs, n_ids + at, ids)
        held, moved = np.flatnonzero(~is_train), groups.copy()
        moved[held] = groups[held[move_blocks(find_runs(store.doc_ids[held]), len(held), rng)[:]]]
        return cls(groups, moved, np.concatenate([np.arange(n_ids), known % n_ids]), is_train, n_ids)

    def correlate(self, store: FeatureStore, start: int, stop: int) -> Iterator[tuple[str, np.ndarray]]:
        """Pearson's r of a block of features, by name of the prediction."""
        columns = store.columns(start, stop)
        features = np.repeat(np.arange(stop - start), np.diff(columns.indptr))
        rows, values = columns.indices, columns.data.astype(np.float64)
        here = self.is_train[rows]
        learned = self._sums(self.groups[rows[here]], features[here], values[here], stop - start)
        n_train, n_held = (
            np.bincount(self.groups[side], minlength=self.n_groups) for side in (self.is_train, ~self.is_train)
        )
        means = self._means(learned, n_train)
        rows, features, values = rows[~here], features[~here], values[~here]
        moments = [np.bincount(features, values**n, minlength=stop - start) for n in (1, 2)]
        fires = np.bincount(features, minlength=stop - start) > 0
        for ending, groups in (("", self.groups), ("_chance", self.moved)):
            seen = self._sums(groups[rows], features, values, stop - start)
            for name, table in zip(("by_token", "by_pair"), means, strict=True):
                yield name + ending, np.where(fires, _correlate(table, seen, n_held, moments), np.nan)

    def _sums(self, groups: np.ndarray, features: np.ndarray, values: np.ndarray, width: int) -> np.ndarray:
        cells = groups.astype(np.int64) * width + features
        return np.bincount(cells, values, minlength=self.n_groups * width).reshape(self.n_groups, width)

    def _means(self, sums: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The prediction of each group from its last token alone, and from the pair where there is one."""
        by_token, n = np.zeros((self.n_ids, sums.shape[1])), np.zeros(self.n_ids)
        np.add.at(by_token, self.last, sums)
        np.add.at(n, self.last, counts)
        alone = (by_token / np.maximum(n, 1)[:, None])[self.last]
        pairs = (sums + BACK_OFF * alone) / (counts + BACK_OFF)[:, None]
        pairs[: self.n_ids] = alone[: self.n_ids]
        return alone, pairs


def _correlate(
    table: np.ndarray, sums: np.ndarray, counts: np.ndarray, moments: list[np.ndarray]
) -> Float[np.ndarray, "n_features"]:
    """Pearson's r of codes, summed by group, with the prediction of each group, over all held-out tokens."""
    x, xx = counts @ table, counts @ table**2
    return correlation_of_sums(counts.sum(), x, moments[0], xx, moments[1], (table * sums).sum(0))

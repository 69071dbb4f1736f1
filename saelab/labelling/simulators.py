"""`simulate_by_tokens`: how well a feature's codes follow from its token, or from two, without a language model."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Integer

from saelab.functional.permuting import find_runs, move_blocks
from saelab.labelling.views import TokenView
from saelab.stores.features import FeatureStore
from saelab.stores.results import Result

CELLS = 2**22
"""Sums held at once."""
MIN_PAIR = 3
"""Training tokens of a pair of tokens below which the last token alone is looked up."""
BACK_OFF = 5.0
"""Tokens' worth of weight that the last token alone has in the value of a pair."""


@dataclass(frozen=True, kw_only=True, eq=False)
class TokenSimulation(Result):
    """Pearson's r of simulated and true codes over all held-out tokens, by feature; NaN where it does not fire on
    both sides of the split.
    """

    by_token: Float[np.ndarray, "d_sae"]
    """each token has the mean code that it had in training documents"""
    by_pair: Float[np.ndarray, "d_sae"]
    """each pair of previous and present token has, backing off to the present token where it is rare"""
    by_token_chance: Float[np.ndarray, "d_sae"]
    """the same against codes that stand elsewhere in the held-out documents"""
    by_pair_chance: Float[np.ndarray, "d_sae"]
    n_train: int
    n_tokens: int
    """held-out tokens"""
    n_pairs: int
    train_frac: float
    seed: int

    def scores(self, feature: int) -> dict[str, float]:
        """The four values of a feature, as a label's scores have them."""
        names = ("by_token", "by_pair", "by_token_chance", "by_pair_chance")
        return {f"simulation_{name}": float(getattr(self, name)[feature]) for name in names}

    def __str__(self) -> str:
        lines = [f"codes simulated from tokens, Pearson's r on {self.n_tokens:,} held-out tokens"]
        lines.append(f"{'':<24}{'median':>8}{'5 %':>8}{'95 %':>8}{'r > 0.5':>9}")
        for name in ("by_token", "by_pair", "by_token_chance", "by_pair_chance"):
            values = getattr(self, name)[~np.isnan(getattr(self, name))]
            if len(values) == 0:
                continue
            marks = "".join(f"{np.quantile(values, q):>8.3f}" for q in (0.5, 0.05, 0.95))
            lines.append(f"{name.replace('_', ' '):<24}{marks}{(values > 0.5).mean():>9.1%}")
        return "\n".join(lines)


def simulate_by_tokens(store: FeatureStore, *, train_frac: float = 0.5, seed: int = 0) -> TokenSimulation:
    """Look up every feature's signed code by its token, and by that and the one before; compare on held-out documents.

    A table of means from training documents, the simplest explanation of a feature there is: a name worth having
    should do better, or say the same in fewer words. A pair's mean is drawn towards that of its last token. Chance is
    the same tables against codes moved in blocks within the held-out documents, each turned round on its own, so that
    it falls on periodic text too.
    """
    is_train = store.split(train_frac, seed)
    tables = _Tables.make(store, is_train, np.random.default_rng(seed))
    found = {
        name: np.full(store.d_sae, np.nan) for name in ("by_token", "by_pair", "by_token_chance", "by_pair_chance")
    }
    for start, stop in _blocks(store.d_sae, tables.n_groups):
        for name, values in tables.correlate(store, start, stop):
            found[name][start:stop] = values
    return TokenSimulation(
        **found, n_train=int(is_train.sum()), n_tokens=int((~is_train).sum()), n_pairs=tables.n_groups - tables.n_ids,
        train_frac=train_frac, seed=seed,
    )  # fmt: skip


def _blocks(d_sae: int, n_groups: int) -> Iterator[tuple[int, int]]:
    width = max(1, CELLS // n_groups)
    return ((a, min(a + width, d_sae)) for a in range(0, d_sae, width))


@dataclass(frozen=True, eq=False)
class _Tables:
    """Groups of tokens that are looked up together: first one for each token id, then one for each frequent pair."""

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
        """Tokens and pairs."""
        return len(self.last)

    @classmethod
    def make(cls, store: FeatureStore, is_train: np.ndarray, rng: np.random.Generator) -> "_Tables":
        """Number the tokens and the pairs that are frequent in training documents."""
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
        """Pearson's r of a block of features by name of the table."""
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
        moments = [np.bincount(features, values**n, minlength=stop - start) / n_held.sum() for n in (1, 2)]
        fires = np.bincount(features, minlength=stop - start) > 0
        for ending, groups in (("", self.groups), ("_chance", self.moved)):
            seen = self._sums(groups[rows], features, values, stop - start)
            for name, table in zip(("by_token", "by_pair"), means, strict=True):
                yield name + ending, np.where(fires, _pearson(table, seen, n_held, moments), np.nan)

    def _sums(self, groups: np.ndarray, features: np.ndarray, values: np.ndarray, width: int) -> np.ndarray:
        cells = groups.astype(np.int64) * width + features
        return np.bincount(cells, values, minlength=self.n_groups * width).reshape(self.n_groups, width)

    def _means(self, sums: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The value of each group by its last token alone, and by the pair as far as there is one."""
        by_token, n = np.zeros((self.n_ids, sums.shape[1])), np.zeros(self.n_ids)
        np.add.at(by_token, self.last, sums)
        np.add.at(n, self.last, counts)
        alone = (by_token / np.maximum(n, 1)[:, None])[self.last]
        pairs = (sums + BACK_OFF * alone) / (counts + BACK_OFF)[:, None]
        pairs[: self.n_ids] = alone[: self.n_ids]
        return alone, pairs


def _pearson(
    table: np.ndarray, sums: np.ndarray, counts: np.ndarray, moments: list[np.ndarray]
) -> Float[np.ndarray, "n_features"]:
    """Of the codes, summed by group, with the table's value for each group; sums over all held-out tokens."""
    n = counts.sum()
    mean, square = (counts @ table) / n, (counts @ table**2) / n
    both = (table * sums).sum(0) / n
    spread = np.sqrt(np.maximum(square - mean**2, 0) * np.maximum(moments[1] - moments[0] ** 2, 0))
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(spread > 0, (both - mean * moments[0]) / spread, np.nan)

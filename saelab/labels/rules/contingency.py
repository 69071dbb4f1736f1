"""Contingency counts of features and predicates, and tests of chosen rules on held-out documents.

Tokens that predict a single feature side become predicates, however rare they are.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, TypeVar

import numpy as np
from jaxtyping import Bool, Float, Int, Int32, Integer

from saelab.analysis.direct_logits import LogitLens
from saelab.analysis.top_tokens import count_ids
from saelab.functional.indices import number_rows
from saelab.functional.statistics import adjust, correlation_of_sums, dispersion, tail, window_auroc
from saelab.labels.rules.predicate_sums import ListCounts, PackedBits, PredicateSums
from saelab.labels.rules.predicates import Predicates, one_of_each
from saelab.labels.rules.token_view import TokenView
from saelab.stores.feature_store import FeatureStore
from saelab.training.ranks import ALONE, RankGrid, Steps, run_together

if TYPE_CHECKING:
    from scipy.sparse import csc_matrix

T = TypeVar("T")
U = TypeVar("U")
BLOCK_ENTRIES = 4_000_000
"""Codes held at once, unless one feature alone has more."""
BLOCK_FEATURES = 4096
N_BLOCKS = 64
"""Smallest number of blocks that are shifted independently when the null is measured."""
PROMOTED_SHARE = 0.5
"""A token counts as promoted if its effect is at least this share of the largest."""
LEVELS = (0.0, 0.4, 0.7)
"""Shares of a side's largest |z| at which tokens are compared with it."""
LEAST_F1 = 0.5
"""Smallest F1 with which a token becomes a predicate."""


def feature_blocks(store: FeatureStore) -> Iterator[tuple[int, int]]:
    """Ranges of features, as first and end, that together have few enough codes to hold."""
    ends = np.cumsum(store.statistics.fires.sum(1))
    start = 0
    while start < store.d_sae:
        before = ends[start - 1] if start else 0
        stop = max(start + 1, int(np.searchsorted(ends, before + BLOCK_ENTRIES, "right")))
        stop = min(stop, start + BLOCK_FEATURES, store.d_sae)
        yield start, stop
        start = stop


def read_columns(store: FeatureStore, features: Int[np.ndarray, "m"]) -> "csc_matrix":
    """The codes of some features in increasing order, one at least; those between them are read, too."""
    start, stop = int(features[0]), int(features[-1]) + 1
    columns = store.columns(start, stop)
    return columns if len(features) == stop - start else columns[:, features - start]


@dataclass(frozen=True, eq=False)
class SideFirings:
    """The firings of a block of features by side and level.

    Side 2 j holds the positive codes of feature j, side 2 j + 1 its negative ones. A level is a threshold as a share of
    the side's largest |z| in training documents.
    """

    rows: Int32[np.ndarray, "nnz"]
    """tokens of the store: side by side, within each the highest level first"""
    sizes: Float[np.ndarray, "nnz"]
    """|z| there"""
    ends: Int[np.ndarray, "n_sides n_levels"]
    """where the codes that reach each level end in `rows`"""
    peaks: Float[np.ndarray, "n_sides"]
    """largest |z| of each side in training documents"""

    @classmethod
    def sort(
        cls, columns: "csc_matrix", is_train: Bool[np.ndarray, "n_tokens"], fractions: np.ndarray
    ) -> "SideFirings":
        """The codes of a block of features, ordered by sign and level."""
        n_sides, n_levels = 2 * columns.shape[1], len(fractions)
        sides = np.repeat(np.arange(0, n_sides, 2, dtype=np.uint16), np.diff(columns.indptr))
        sides += columns.data < 0
        sizes = np.abs(columns.data)
        peaks = _largest(sizes * is_train[columns.indices], columns)
        share = sizes / np.maximum(peaks, 1e-30).astype(np.float32)[sides]
        cells = sides * np.uint16(n_levels) + np.uint16(n_levels - 1)
        for fraction in fractions[1:].tolist():
            cells -= share >= np.float32(fraction)
        order = np.argsort(cells, kind="stable")  # of 16 bits: a radix sort
        ends = np.cumsum(np.bincount(cells, minlength=n_sides * n_levels))
        rows = columns.indices[order].astype(np.int32, copy=False)
        return cls(rows, sizes[order], ends.reshape(n_sides, n_levels)[:, ::-1], peaks)

    def __len__(self) -> int:
        return len(self.ends)

    def of(self, side: int, level: int) -> Int32[np.ndarray, "n"]:
        """The tokens on which a feature side reaches a level."""
        return self.rows[self._part(side, level)]

    def codes(self, side: int) -> tuple[Int32[np.ndarray, "n"], Float[np.ndarray, "n"]]:
        """The tokens on which a feature side fires, and |z| there."""
        return self.rows[self._part(side, 0)], self.sizes[self._part(side, 0)]

    def _part(self, side: int, level: int) -> slice:
        return slice(self.ends[side - 1, 0] if side else 0, self.ends[side, level])


def _largest(sizes: np.ndarray, columns: "csc_matrix") -> np.ndarray:
    """Largest |z| of each feature's positive and negative codes."""
    found = np.zeros((columns.shape[1], 2))
    full = np.flatnonzero(np.diff(columns.indptr))
    if len(full):
        for side, signed in enumerate((columns.data > 0, columns.data < 0)):
            found[full, side] = np.maximum.reduceat(sizes * signed, columns.indptr[full])
    return found.ravel()


@dataclass(frozen=True, eq=False)
class Counts:
    """Numbers of tokens on which feature sides fire, predicates hold, and both at once."""

    both: Int[np.ndarray, "n_sides n_levels n_predicates"]
    fires: Int[np.ndarray, "n_sides n_levels"]
    holds: Int[np.ndarray, "n_predicates"]
    n_tokens: int

    @cached_property
    def f1(self) -> Float[np.ndarray, "n_sides n_levels n_predicates"]:
        """F1 of each predicate for each feature side and level: 2 both / (fires + holds)."""
        return 2 * self.both / np.maximum(self.fires[:, :, None] + self.holds, 1)


@dataclass(frozen=True, eq=False)
class SideCounts:
    """The counts of a block of features, of which those of a few sides at a time are made dense."""

    hits: ListCounts
    """n_sides * n_levels lists of tokens, by the level that the code reaches, highest first"""
    fires: Int[np.ndarray, "n_sides n_levels"]
    holds: Int[np.ndarray, "n_predicates"]
    n_tokens: int

    def of(self, sides: Int[np.ndarray, "n"]) -> Counts:
        """The counts of some sides."""
        n_levels = self.fires.shape[1]
        rows = (sides[:, None] * n_levels + np.arange(n_levels)).ravel()
        both = _from_above(self.hits.of(rows).reshape(len(sides), n_levels, -1))
        return Counts(both, self.fires[sides], self.holds, self.n_tokens)


class SplitCounts:
    """Predicates restricted to the training documents, or to the held-out ones; tokens are numbered within these."""

    def __init__(self, predicates: Predicates, chosen: Bool[np.ndarray, "n_tokens"]) -> None:
        self.chosen, self.rows = chosen, np.flatnonzero(chosen).astype(np.int32)
        self.places = np.where(chosen, np.cumsum(chosen, dtype=np.int32) - np.int32(1), np.int32(-1))
        self.matrix = predicates.matrix[self.rows]
        self.holds = np.asarray(self.matrix.sum(0)).ravel().astype(np.int64)

    @classmethod
    def prepare(cls, predicates: Predicates, chosen: Bool[np.ndarray, "n_tokens"]) -> "SplitCounts":
        """The counts with everything that is otherwise computed on first use."""
        found = cls(predicates, chosen)
        found.bits, found.sums.pairs  # noqa: B018
        return found

    @property
    def n_tokens(self) -> int:
        """Number of tokens in this part of the split."""
        return len(self.rows)

    @property
    def pairs(self) -> Int[np.ndarray, "n_predicates n_predicates"]:
        """Number of tokens on which each two predicates hold together."""
        return self.sums.pairs

    @cached_property
    def sums(self) -> PredicateSums:
        """The predicates, arranged to be counted over lists of tokens."""
        return PredicateSums(self.matrix, self.holds)

    @cached_property
    def bits(self) -> PackedBits:
        """The predicates as packed bits, by token."""
        return PackedBits.pack(self.matrix)

    @cached_property
    def _by_predicate(self) -> "csc_matrix":
        return self.matrix.tocsc()

    def here(self, rows: Integer[np.ndarray, "n"]) -> Integer[np.ndarray, "m"]:
        """Those of some tokens of the store that are in this part, as ascending positions in it."""
        places = self.places[rows]
        return np.sort(places[places >= 0])

    def mark(self, columns: Sequence[int], joined: str = "") -> Bool[np.ndarray, "n"]:
        """The tokens on which all ("and") or any of some predicates hold."""
        by_predicate, found = self._by_predicate, np.zeros(self.n_tokens, bool)
        lists = [by_predicate.indices[slice(*by_predicate.indptr[j : j + 2])] for j in columns]
        found[lists[0]] = True
        for tokens in lists[1:]:
            if joined == "and":
                both = tokens[found[tokens]]
                found[:] = False
                found[both] = True
            else:
                found[tokens] = True
        return found

    def count(self, sides: SideFirings) -> "SideCounts":
        """The contingency counts of a block of features, each code counted at the level it reaches."""
        places = self.places[sides.rows]
        here = places >= 0
        ends = sides.ends[:, ::-1].ravel()
        offsets = np.concatenate([[0], np.cumsum(here)])[np.concatenate([[0], ends])].astype(np.int32)
        fires = _from_above(np.diff(offsets).reshape(sides.ends.shape))
        return SideCounts(self.sums.over(places[here], offsets), fires, self.holds, self.n_tokens)


def _from_above(counts: np.ndarray) -> np.ndarray:
    """Cumulative sums over each level and those above, lowest level first, from counts with the highest first."""
    return np.cumsum(counts, axis=1, dtype=np.int64)[:, ::-1]


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
    """AUROC of the rule in windows around firings, or on all rows where they are documents; 0.5 is chance"""
    spread: float
    """variance of the hits under the null, relative to independent tokens"""
    r: float
    """Pearson's r of whether the rule holds with |z|, 0 where the side does not fire"""

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

    def __init__(self, split: SplitCounts, doc_ids: np.ndarray, seed: int) -> None:
        self.split, self.doc_ids, self.seed = split, doc_ids[split.rows], seed
        self._active = np.zeros(split.n_tokens, bool)
        self._single = len(np.unique(self.doc_ids)) == split.n_tokens
        # blocks that are shifted together: documents, cut into pieces where there are few
        size = max(1, split.n_tokens // N_BLOCKS) if len(np.unique(self.doc_ids)) < N_BLOCKS else split.n_tokens
        _, documents = np.unique(self.doc_ids, return_inverse=True)
        pieces = documents * N_BLOCKS + np.minimum(np.arange(split.n_tokens) // size, N_BLOCKS - 1)
        self._blocks = number_rows(pieces)[1]

    def test(
        self,
        holds: Callable[[np.ndarray], np.ndarray],
        size: int,
        fires: Integer[np.ndarray, "n"],
        side: int,
        codes: tuple[Integer[np.ndarray, "m"], Float[np.ndarray, "m"]],
    ) -> Verdict:
        """The result of one rule for one feature side on the held-out tokens.

        Args:
            holds: function from token positions to whether the rule holds there.
            size: number of held-out tokens on which the rule holds.
            fires: positions at which the feature side fires.
            side: number of the feature side, which seeds the random draws.
            codes: tokens of the store on which the side fires at all, and |z| there.
        """
        rng = np.random.default_rng((self.seed, side))
        n, hits = self.split.n_tokens, int(np.count_nonzero(holds(fires)))
        auroc, spread = float("nan"), 1.0
        if self._single and 0 < len(fires) < n:  # a row is a document: all of them are the window
            auroc = (1 + hits / len(fires) - (size - hits) / (n - len(fires))) / 2
        elif hits:
            self._active[fires] = True
            auroc = window_auroc(holds, fires, self._active, self.doc_ids, rng)
            self._active[fires] = False
        if hits * n > len(fires) * size:
            spread = dispersion(holds, fires, size / n, n, rng, self._blocks)
        return Verdict(hits, len(fires), size, n, auroc, spread, self._correlate(holds, size, *codes))

    def _correlate(
        self, holds: Callable[[np.ndarray], np.ndarray], size: int, rows: np.ndarray, sizes: np.ndarray
    ) -> float:
        places = self.split.places[rows]
        x, inside = sizes[places >= 0].astype(np.float64), holds(places[places >= 0])
        return float(correlation_of_sums(self.split.n_tokens, x.sum(), size, x @ x, size, x[inside].sum()))


def q_values(counts: Float[np.ndarray, "n 4"], n_tokens: int) -> tuple[Float[np.ndarray, "n"], Float[np.ndarray, "n"]]:
    """The p value of each result, and its false discovery rate among all of them (Benjamini-Hochberg).

    Args:
        counts: hits, fires, holds and spread of each `Verdict`.
        n_tokens: number of held-out tokens.
    """
    if not len(counts):
        return np.empty(0), np.empty(0)
    hits, fires, holds, spread = counts.T
    p = tail(hits, fires, holds, n_tokens, spread)
    return p, adjust(p)


class NextTokens:
    """Tokens that follow each token of a store, for rules on what a feature promotes."""

    def __init__(self, store: FeatureStore, lens: LogitLens, split: SplitCounts) -> None:
        view = TokenView(store.text)
        self.next_ids = view.after(view.token_ids)[store.places[split.rows]]
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


def add_side_tokens(
    store: FeatureStore, predicates: Predicates, is_train: Bool[np.ndarray, "n_tokens"], ranks: RankGrid = ALONE
) -> Predicates:
    """The predicates, with one more for each token that predicts some feature side in training documents.

    Tokens count from F1 0.5 on. Predicates without any of kind "token" are returned unchanged, as they were selected by
    the caller.

    Args:
        store: feature store that holds codes and text.
        predicates: conditions on its tokens.
        is_train: which tokens are of training documents.
        ranks: processes, each of which looks at a share of the features; all get the same predicates.
    """
    if not predicates.family("token"):
        return predicates
    from scipy.sparse import csr_matrix, hstack

    wanted = find_side_tokens(store, is_train, ranks)
    names, numbers = one_of_each(TokenView(store.text), "token", len(store.text))
    here = numbers[store.places]
    candidates = np.unique(here[np.isin(store.token_ids, wanted)])
    new = np.array([j for j in candidates.tolist() if names[j] not in predicates.places], np.int64)
    if len(new) == 0:
        return predicates
    columns = np.full(len(names), -1)
    columns[new] = np.arange(len(new))
    rows = np.flatnonzero(columns[here] >= 0)
    added = csr_matrix((np.ones(len(rows), bool), (rows, columns[here[rows]])), shape=(len(store), len(new)))
    return Predicates(
        hstack([predicates.matrix, added], format="csr"),
        predicates.names + tuple(names[j] for j in new.tolist()),
        predicates.kinds + ("token",) * len(new),
    )


def find_side_tokens(
    store: FeatureStore, is_train: Bool[np.ndarray, "n_tokens"], ranks: RankGrid = ALONE
) -> Integer[np.ndarray, "n"]:
    """The tokens that best predict some side of some feature in training documents, found by several processes."""
    ids, numbers = number_rows(store.token_ids)
    holds = np.bincount(numbers[is_train], minlength=len(ids))
    found = np.zeros(len(ids), bool)
    numbers = numbers.astype(np.int32)

    def read(block: tuple[int, int]) -> "csc_matrix | None":
        features = np.arange(*block)
        features = features[features % ranks.size == ranks.index]
        return read_columns(store, features) if len(features) else None

    def search() -> Steps:
        for columns in one_ahead(read, feature_blocks(store)):
            if columns is not None:
                kept = is_train[columns.indices]
                side = np.repeat(np.arange(0, 2 * columns.shape[1], 2, dtype=np.int32), np.diff(columns.indptr))[kept]
                codes, tokens = columns.data[kept], numbers[columns.indices[kept]]
                side += codes < 0
                sizes = np.abs(codes)
                peaks = np.zeros(2 * columns.shape[1], sizes.dtype)
                np.maximum.at(peaks, side, sizes)
                for level in LEVELS:
                    here = np.flatnonzero(sizes >= (level * peaks)[side])
                    found[_best_tokens(side[here], tokens[here], holds)] = True
            yield

    run_together(search(), ranks)
    return np.unique(np.concatenate(ranks.gather_arrays(ids[found])))


def _best_tokens(side: np.ndarray, tokens: np.ndarray, holds: np.ndarray) -> np.ndarray:
    """The best token of each side, where its F1 is large enough."""
    pairs, both = count_ids(side.astype(np.int64) * len(holds) + tokens)
    sides, which = pairs // len(holds), pairs % len(holds)
    f1 = 2 * both / (np.bincount(side)[sides] + holds[which])
    order = np.lexsort((-f1, sides))
    first = order[np.append(True, np.diff(sides[order]) != 0)[: len(order)]]
    return which[first[f1[first] >= LEAST_F1]]


def one_ahead(work: Callable[[T], U], items: Iterable[T]) -> Iterator[U]:
    """Results of `work` for each item in order, the next one computed in the background, as it leaves the interpreter
    free.
    """
    with ThreadPoolExecutor(max_workers=1) as background:
        waiting: deque[Future[U]] = deque()
        for item in items:
            waiting.append(background.submit(work, item))
            if len(waiting) > 1:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()

"""Example windows of one feature: training windows to explain it by, and held-out windows to score labels on."""

from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Bool

from saelab.analysis.max_activating import Example, FeatureExamples, draw_examples, max_activating_examples
from saelab.analysis.top_tokens import find_centers
from saelab.functional.indices import ChosenRuns, RowMarker
from saelab.labels.label import BOTH
from saelab.stores.feature_store import FeatureStore

LEVELS = 10
"""Number of levels to which codes are rounded in prompts."""
SPARE = 4
"""Near misses drawn for each one wanted: in the others the feature fires somewhere, or they repeat a window."""
FEWEST = 4
"""Held-out windows, firing or silent, below which no label is scored."""


@dataclass(frozen=True, kw_only=True)
class ExampleConfig:
    """Numbers of example windows per feature, and the documents they are taken from."""

    n_top: int = 8
    """strongest windows, for explaining"""
    n_quantiles: int = 5
    """groups of equally many firings"""
    n_each: int = 2
    """windows of each quantile group, for explaining"""
    n_silent: int = 5
    """near misses, for explaining"""
    n_scored: int = 4
    """held-out windows of each quantile group, for scoring; as many windows without firing are added, half hard"""
    width: int = 24
    """tokens of a window; the default is four times as large where tokens are hardly more than characters"""
    train_frac: float = 0.5
    """share of the documents used for explaining; the rest is used for scoring"""
    seed: int = 0
    """seed of the split and of all draws"""


@dataclass(frozen=True, kw_only=True)
class FeatureExamplesSplit:
    """Example windows of one feature, or of one of its signs.

    ValueError where a document is on both sides of the split.
    """

    feature: int
    sign: int
    """1 or -1; 0 for both"""
    peak: float
    """the largest |z| of this sign in the training documents"""
    shown: tuple[Example, ...]
    """firing windows of training documents: the strongest, then the quantiles, strongest first"""
    silent: tuple[Example, ...]
    """training windows with the same tokens in which the feature does not fire anywhere"""
    fires: tuple[Example, ...]
    """held-out windows in which it fires"""
    hard: tuple[Example, ...]
    """held-out windows in which it does not fire although the same token occurs or the other sign fires"""
    easy: tuple[Example, ...]
    """held-out windows in which it does not fire, drawn at random"""

    def __post_init__(self) -> None:
        explaining = {example.doc_id for example in (*self.shown, *self.silent)}
        scoring = {example.doc_id for example in (*self.fires, *self.hard, *self.easy)}
        if both := sorted(explaining & scoring):
            raise ValueError(f"Explaining and scoring must share no document, got {both[:5]} on both sides.")

    @property
    def problem(self) -> str:
        """The reason why labels cannot be scored on these windows; empty where they can."""
        n_silent = len(self.hard) + len(self.easy)
        if min(len(self.fires), n_silent) >= FEWEST:
            return ""
        return f"{len(self.fires)} firing and {n_silent} silent held-out windows, {FEWEST} of each are needed"

    def fires_at(self, example: Example) -> list[bool]:
        """For each token of a window, whether the feature fires with this sign."""
        return _hits(example, self.sign)

    def level(self, value: float) -> int:
        """A code rounded to a whole number: 1 to 10 by |z| relative to the peak, 0 where this sign does not fire."""
        if value == 0 or value * self.sign < 0:
            return 0
        return int(min(LEVELS, max(1, np.ceil(LEVELS * abs(value) / self.peak))))


def build_case(
    store: FeatureStore, feature: int, sign: int, train: Bool[np.ndarray, "n_tokens"] | ChosenRuns, cfg: ExampleConfig
) -> FeatureExamplesSplit | None:
    """The example windows of one side of a feature; None where it does not fire in training documents.

    Args:
        store: feature store that holds the codes and the text.
        feature: number of the feature.
        sign: 1 or -1 for codes of one sign, 0 for both.
        train: rows of training documents, from `store.split(...)` or `split_runs`.
        cfg: numbers and width of the windows.
    """
    learnt = max_activating_examples(
        store, feature, rows=train, n_top=cfg.n_top, n_quantiles=cfg.n_quantiles, n_each=cfg.n_each,
        n_near=SPARE * cfg.n_silent, n_random=0, seed=cfg.seed, **_halves(cfg.width),
    )  # fmt: skip
    peak = max((group.high for group in learnt.groups if _is_side(group.side, sign)), default=0.0)
    if peak == 0:
        return None
    shown = _unlike([*_pick(learnt, sign, "top"), *_pick(learnt, sign, "quantile")[::-1]])
    silent = [example for example in _pick(learnt, BOTH, "near miss") if not _has_hit(example, sign)]
    fires, hard, easy = _hold_out(store, feature, sign, ~train, {example.words for example in shown}, cfg)
    return FeatureExamplesSplit(
        feature=feature, sign=sign, peak=peak, shown=tuple(shown), silent=tuple(silent[: cfg.n_silent]),
        fires=fires, hard=hard, easy=easy,
    )  # fmt: skip


def _hold_out(
    store: FeatureStore,
    feature: int,
    sign: int,
    rows: Bool[np.ndarray, "n_tokens"] | ChosenRuns,
    seen: set[tuple[str, ...]],
    cfg: ExampleConfig,
) -> tuple[tuple[Example, ...], ...]:
    """Held-out firing windows, and as many without firing, half of them hard if there are so many."""
    n, rng = cfg.n_scored * cfg.n_quantiles, np.random.default_rng((cfg.seed, feature, sign % 3))
    # Wider than a window on both sides: cut, so that the firing token may stand at any place.
    wide = {"before": cfg.width - 1, "after": cfg.width - 1, "seed": cfg.seed}
    held = max_activating_examples(
        store, feature, rows=rows, n_top=n, n_quantiles=cfg.n_quantiles, n_each=cfg.n_scored, n_near=0, n_random=0,
        **wide,
    )  # fmt: skip

    def cut(found: Iterable[Example]) -> list[Example]:
        return _unlike((_crop(example, cfg.width, rng) for example in found), seen)

    fires = cut(_pick(held, sign, "quantile"))
    silent, alike = _find_quiet(store, feature, sign, cfg.width), _alike(store, fires)

    def quiet(start: int, stop: int) -> np.ndarray:
        return rows[start:stop] & silent(start, stop)

    def hard_rows(start: int, stop: int) -> np.ndarray:
        return quiet(start, stop) & alike(start, stop)

    near = draw_examples(store, feature, hard_rows, SPARE * n // 2, **wide)
    opposite = _pick(held, -sign, "top") if sign != BOTH else []
    hard = [example for example in cut([*near, *opposite]) if not _has_hit(example, sign)][: len(fires) // 2]
    taken = {example.words for example in hard}
    plain = cut(draw_examples(store, feature, quiet, 2 * n, **wide))
    easy = [example for example in plain if not _has_hit(example, sign) and example.words not in taken]
    return tuple(fires), tuple(hard), tuple(easy[: len(fires) - len(hard)])


def _halves(width: int) -> dict[str, int]:
    return {"before": width // 2, "after": width - 1 - width // 2}


def _find_quiet(store: FeatureStore, feature: int, sign: int, width: int) -> RowMarker:
    """Rows with no firing of a sign in the window around them.

    Random draws would rarely find any for a feature that fires often. Rows are at least as near to each other as their
    positions in the text.
    """
    column = store.feature(feature)
    around = {"before": 0, "after": 0} if store.of_documents else _halves(width)
    hits = column.indices[(column.values != 0) if sign == BOTH else (column.values * sign > 0)]

    def marks(start: int, stop: int) -> np.ndarray:
        first, end = np.searchsorted(hits, (start - around["before"], stop + around["after"]))
        own, n = hits[first:end] - start, stop - start
        begins, ends = np.maximum(own - around["after"], 0), np.minimum(own + around["before"] + 1, n)
        edges = np.bincount(begins, minlength=n + 1) - np.bincount(ends, minlength=n + 1)
        return np.cumsum(edges[:-1]) == 0

    return marks


def _alike(store: FeatureStore, fires: Iterable[Example]) -> RowMarker:
    """Rows of all tokens on which a feature fires in the given windows, or documents with a word that marks these."""
    ids = find_centers(store, np.unique(np.array([example.token for example in fires], np.int64)))

    def marks(start: int, stop: int) -> np.ndarray:
        rows, tokens = store.words.read(start, stop)
        found = np.zeros(stop - start, bool)
        found[rows[np.isin(tokens, ids)]] = True
        return found

    return marks


def _pick(found: FeatureExamples, sign: int, name: str) -> list[Example]:
    """The windows of the groups with a given name and sign; sign 0 takes all."""
    groups = [group for group in found.groups if group.name.startswith(name)]
    return [example for group in groups if _is_side(group.side, sign) for example in group.examples]


def _is_side(side: int, sign: int) -> bool:
    return sign in (BOTH, side)


def _has_hit(example: Example, sign: int) -> bool:
    return any(_hits(example, sign))


def _hits(example: Example, sign: int) -> list[bool]:
    return [value != 0 if sign == BOTH else value * sign > 0 for value in example.values]


def _unlike(found: Iterable[Example], seen: set[tuple[str, ...]] | None = None) -> list[Example]:
    """Each different window once, without those seen before."""
    seen, kept = set(seen or ()), []
    for example in found:
        if example.words not in seen:
            seen.add(example.words)
            kept.append(example)
    return kept


def _crop(example: Example, width: int, rng: np.random.Generator) -> Example:
    """A window of `width` tokens around the center, which is placed at random in the last three quarters.

    A random place gives nothing away, and most of the context stands before the token, where the code was computed
    from.
    """
    first, last = max(0, example.center - width + 1), min(example.center - width // 4, len(example.words) - width)
    start = int(rng.integers(first, max(first, last) + 1))
    part = slice(start, start + width)
    return replace(example, words=example.words[part], values=example.values[part], center=example.center - start)

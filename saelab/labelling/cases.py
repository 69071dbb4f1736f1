"""`Case`: the windows by which one side of a feature is explained, and those by which that is scored."""

from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Bool

from saelab.analyses.contexts import Example, FeatureExamples, draw_examples, examples
from saelab.functional.marking import ChosenRuns, Marks
from saelab.labelling.label import BOTH
from saelab.stores.features import FeatureStore

LEVELS = 10
SPARE = 4
"""Near misses drawn for each one wanted: in the others the feature fires somewhere, or they were shown already."""
FEWEST = 4
"""Held-out windows of either kind below which nothing is scored."""


@dataclass(frozen=True, kw_only=True)
class CaseConfig:
    """How many windows a feature is shown by, and from which documents."""

    n_top: int = 8
    """strongest windows, for explaining"""
    n_quantiles: int = 5
    """groups of equally many firings"""
    n_each: int = 2
    """windows of each group, for explaining"""
    n_silent: int = 5
    """near misses, for explaining"""
    n_scored: int = 4
    """held-out windows of each group, for scoring; as many more in which the feature is silent, half of them hard"""
    width: int = 24
    """tokens of a window; of the default settings four times as many where tokens are hardly more than characters"""
    train_frac: float = 0.5
    """of the documents: they explain, the others score"""
    seed: int = 0
    """of the split, and of what is drawn"""


@dataclass(frozen=True, kw_only=True)
class Case:
    """One feature, or one of its signs. ValueError where a document is on both sides."""

    feature: int
    sign: int
    """1 or -1; 0 for both"""
    peak: float
    """the largest |z| of this sign in the training documents"""
    shown: tuple[Example, ...]
    """it fires here: the strongest windows, then the quantiles, strongest first; training documents"""
    silent: tuple[Example, ...]
    """the same tokens, and it does not fire anywhere in the window; training documents"""
    fires: tuple[Example, ...]
    """it fires here; held-out documents"""
    hard: tuple[Example, ...]
    """it does not fire, though the same token stands there, or the other sign fires; held-out documents"""
    easy: tuple[Example, ...]
    """it does not fire, drawn at random; held-out documents"""

    def __post_init__(self) -> None:
        explaining = {example.doc_id for example in (*self.shown, *self.silent)}
        scoring = {example.doc_id for example in (*self.fires, *self.hard, *self.easy)}
        if both := sorted(explaining & scoring):
            raise ValueError(f"Explaining and scoring must share no document, got {both[:5]} on both sides.")

    @property
    def problem(self) -> str:
        """Why it cannot be scored; empty where it can."""
        n_silent = len(self.hard) + len(self.easy)
        if min(len(self.fires), n_silent) >= FEWEST:
            return ""
        return f"{len(self.fires)} firing and {n_silent} silent held-out windows, {FEWEST} of each are needed"

    def fires_at(self, example: Example) -> list[bool]:
        """At which tokens of a window it fires with this sign."""
        return _hits(example, self.sign)

    def level(self, value: float) -> int:
        """A code as a whole number: 1 to 10 by |z| beside the peak, 0 where this sign does not fire."""
        if value == 0 or value * self.sign < 0:
            return 0
        return int(min(LEVELS, max(1, np.ceil(LEVELS * abs(value) / self.peak))))


def build_case(
    store: FeatureStore, feature: int, sign: int, train: Bool[np.ndarray, "n_tokens"] | ChosenRuns, cfg: CaseConfig
) -> Case | None:
    """The case of one side of a feature; `train` is `store.split(...)`, or `split_runs`. None where it does not fire in
    training.
    """
    learnt = examples(
        store, feature, rows=train, n_top=cfg.n_top, n_quantiles=cfg.n_quantiles, n_each=cfg.n_each,
        n_near=SPARE * cfg.n_silent, n_random=0, seed=cfg.seed, **_halves(cfg.width),
    )  # fmt: skip
    peak = max((group.high for group in learnt.groups if _is_side(group.side, sign)), default=0.0)
    if peak == 0:
        return None
    shown = _unlike([*_pick(learnt, sign, "top"), *_pick(learnt, sign, "quantile")[::-1]])
    silent = [example for example in _pick(learnt, BOTH, "near miss") if not _has_hit(example, sign)]
    fires, hard, easy = _hold_out(store, feature, sign, ~train, {example.words for example in shown}, cfg)
    return Case(
        feature=feature, sign=sign, peak=peak, shown=tuple(shown), silent=tuple(silent[: cfg.n_silent]),
        fires=fires, hard=hard, easy=easy,
    )  # fmt: skip


def _hold_out(
    store: FeatureStore,
    feature: int,
    sign: int,
    rows: Bool[np.ndarray, "n_tokens"] | ChosenRuns,
    seen: set[tuple[str, ...]],
    cfg: CaseConfig,
) -> tuple[tuple[Example, ...], ...]:
    """Firing windows, and as many verified silent ones, half of them hard where there are so many."""
    n, rng = cfg.n_scored * cfg.n_quantiles, np.random.default_rng((cfg.seed, feature, sign % 3))
    # Wider than a window on both sides: cut, so that the firing token may stand at any place.
    wide = {"before": cfg.width - 1, "after": cfg.width - 1, "seed": cfg.seed}
    held = examples(
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


def _find_quiet(store: FeatureStore, feature: int, sign: int, width: int) -> Marks:
    """Rows with no firing of a sign in the window around them: drawing at random would rarely find any of a feature
    that fires often. Rows are at least as near to each other as their places in the text.
    """
    column, around = store.feature(feature), _halves(width)
    hits = column.indices[(column.values != 0) if sign == BOTH else (column.values * sign > 0)]

    def marks(start: int, stop: int) -> np.ndarray:
        first, end = np.searchsorted(hits, (start - around["before"], stop + around["after"]))
        own, n = hits[first:end] - start, stop - start
        begins, ends = np.maximum(own - around["after"], 0), np.minimum(own + around["before"] + 1, n)
        edges = np.bincount(begins, minlength=n + 1) - np.bincount(ends, minlength=n + 1)
        return np.cumsum(edges[:-1]) == 0

    return marks


def _alike(store: FeatureStore, fires: Iterable[Example]) -> Marks:
    """Rows of the tokens on which a feature fires."""
    ids = sorted({int(store.read_tokens(example.token, example.token + 1)[0]) for example in fires})
    return lambda start, stop: np.isin(store.read_tokens(start, stop), ids)


def _pick(found: FeatureExamples, sign: int, name: str) -> list[Example]:
    """The windows of the groups of a name and sign; all signs for 0."""
    groups = [group for group in found.groups if group.name.startswith(name)]
    return [example for group in groups if _is_side(group.side, sign) for example in group.examples]


def _is_side(side: int, sign: int) -> bool:
    return sign in (BOTH, side)


def _has_hit(example: Example, sign: int) -> bool:
    return any(_hits(example, sign))


def _hits(example: Example, sign: int) -> list[bool]:
    return [value != 0 if sign == BOTH else value * sign > 0 for value in example.values]


def _unlike(found: Iterable[Example], seen: set[tuple[str, ...]] | None = None) -> list[Example]:
    """Each window once, and none of those seen before."""
    seen, kept = set(seen or ()), []
    for example in found:
        if example.words not in seen:
            seen.add(example.words)
            kept.append(example)
    return kept


def _crop(example: Example, width: int, rng: np.random.Generator) -> Example:
    """`width` tokens around the center, which stands anywhere in their last three quarters: its place must not give it
    away, and what stands before it is what it was made from.
    """
    first, last = max(0, example.center - width + 1), min(example.center - width // 4, len(example.words) - width)
    start = int(rng.integers(first, max(first, last) + 1))
    part = slice(start, start + width)
    return replace(example, words=example.words[part], values=example.values[part], center=example.center - start)

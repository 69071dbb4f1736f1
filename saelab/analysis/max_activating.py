"""Max-activating examples: windows of text around firings of each strength, near misses and random tokens."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import SupportsIndex

import numpy as np
from jaxtyping import Bool, Float16, Float32, Int, Integer

from saelab.analysis.top_tokens import find_centers
from saelab.functional.indices import ROWS_AT_ONCE, ChosenRuns, RowMarker, draw_rows, read_feature
from saelab.stores.corpus import group_words, strongest
from saelab.stores.feature_store import Feature, FeatureStore, Firings
from saelab.stores.packing import smallest_int
from saelab.stores.results import Result

CANDIDATES = 8
"""Candidate windows drawn for each one shown; windows that repeat one already shown are skipped."""
BEFORE, AFTER = 16, 8
"""Default numbers of tokens before and after the center of a window."""
MANY_VALUES = 2**14
"""Values of which so many are sorted by their bits."""
_Ranks = tuple[list[int], list[np.ndarray]]
"""Ids of tokens, and of each the ranks among its occurrences that are asked for."""
MANY = 2048
"""Near misses are drawn from at most so many occurrences of one token."""


@dataclass(frozen=True, kw_only=True)
class Example:
    """A window of text with one feature's code at each word; or a document, as one word, with its picture."""

    words: tuple[str, ...]
    """decoded tokens, spaces included; tokens that share a character are one word, and so is a document"""
    values: tuple[float, ...]
    """codes, 0 where the feature does not fire or the mask left the token out; of several tokens the largest |z|"""
    center: int
    """index of the word that the window was chosen for"""
    token: int
    """the store's row of that word"""
    doc_id: int
    image: str = ""
    """picture of a document as a data URI; empty where it has none"""

    @property
    def value(self) -> float:
        """The code at the center."""
        return self.values[self.center]

    @property
    def text(self) -> str:
        """The words joined."""
        return "".join(self.words)


@dataclass(frozen=True, kw_only=True)
class ExampleGroup:
    """Windows that were selected by the same rule."""

    name: str
    """top, quantile i of n (from the weakest), near miss, random"""
    side: int
    """1 or -1, the sign of the codes; 0 where the feature does not fire at the centers"""
    low: float
    """the smallest |z| among the firings that the group was chosen from"""
    high: float
    """the largest |z| among them"""
    n_firings: int
    """firings it was chosen from"""
    examples: tuple[Example, ...]


@dataclass(frozen=True, kw_only=True)
class FeatureExamples(Result):
    """Example windows of one feature, with positive and negative codes kept apart."""

    feature: int
    n_tokens: int
    """tokens among which firings were searched"""
    groups: tuple[ExampleGroup, ...]
    counted: str = "tokens"
    """what `n_tokens` counts: tokens, or documents"""

    def group(self, name: str, side: int = 1) -> ExampleGroup:
        """The group with a given name and side; KeyError where there is none."""
        for group in self.groups:
            if (group.name, group.side) == (name, side):
                return group
        have = [(group.name, group.side) for group in self.groups]
        raise KeyError(f"There must be a group ({name!r}, {side}), got only {have}.")

    def __str__(self) -> str:
        lines = [f"feature {self.feature} on {self.n_tokens:,} {self.counted}"]
        for group in self.groups:
            sign = {1: "+", -1: "-", 0: " "}[group.side]
            lines.append(f"{sign} {group.name}: {group.n_firings:,} firings, |z| {group.low:.3g} to {group.high:.3g}")
            lines += [f"    {example.value:+8.3f}  {_mark(example)}" for example in group.examples]
        return "\n".join(lines)


def max_activating_examples(
    store: FeatureStore,
    feature: SupportsIndex,
    *,
    n_top: int = 10,
    n_quantiles: int = 5,
    n_each: int = 4,
    n_near: int = 4,
    n_random: int = 4,
    before: int | None = None,
    after: int | None = None,
    rows: Bool[np.ndarray, "n_tokens"] | ChosenRuns | None = None,
    seed: int = 0,
) -> FeatureExamples:
    """Windows of text around a feature's firings, each within one document, none shown twice.

    For each sign of the codes there is a group "top" and one group per quantile; for both signs together the groups
    "near miss" and "random". A group with nothing in it is left out.

    Args:
        store: feature store that holds the feature's codes and the text.
        feature: number of the feature, 0 to d_sae - 1.
        n_top: windows with the largest |z|, for each sign.
        n_quantiles: number of groups of equally many firings, weakest first, for each sign.
        n_each: windows drawn from each quantile.
        n_near: near misses: windows whose center is a token that is also the center of a top window, but where
            the feature does not fire.
        n_random: windows around tokens drawn from all.
        before: tokens shown before the center; None is 16, or 64 where tokens are hardly more than characters.
        after: tokens shown after the center; None is 8, or 32 where tokens are hardly more than characters.
        rows: rows of the store to search, one side of `store.split()` for instance; None searches all.
        seed: seed of all draws.
    """
    feature = read_feature(feature, d_sae=store.d_sae)
    sizes = {"n_top": n_top, "n_quantiles": n_quantiles, "n_each": n_each, "n_near": n_near, "n_random": n_random}
    choice = ExampleChoice(**sizes, before=before, after=after, rows=rows, seed=seed)
    return next(find_examples(store, [store.feature(feature)], choice))


@dataclass(frozen=True, eq=False)
class ExampleChoice:
    """Options of `max_activating_examples`."""

    n_top: int = 10
    n_quantiles: int = 5
    n_each: int = 4
    n_near: int = 4
    n_random: int = 4
    before: int | None = None
    after: int | None = None
    rows: Bool[np.ndarray, "n_tokens"] | ChosenRuns | None = None
    seed: int = 0


def find_examples(store: FeatureStore, features: Sequence[Feature], choice: ExampleChoice) -> Iterator[FeatureExamples]:
    """The windows of several features, each as `max_activating_examples` chooses them; the text is read once for all.

    Args:
        store: feature store that holds the text.
        features: codes of the features.
        choice: options of the search.
    """
    searches = [_search(store, one, choice) for one in features]
    found = _rows_of_tokens(store, [ranks for ranks, _ in searches])
    for (_, finish), rows in zip(searches, found, strict=True):
        yield finish(rows)


def _search(
    store: FeatureStore, column: Feature, choice: ExampleChoice
) -> tuple[_Ranks, Callable[[list[np.ndarray]], FeatureExamples]]:
    """Windows around one feature's firings: which occurrences of tokens are needed besides, and a function from their
    rows to all windows.
    """
    rng = np.random.default_rng((choice.seed, column.feature))
    widths = ((choice.before, BEFORE), (choice.after, AFTER))
    before, after = (store.text.widen(n) if own is None else own for own, n in widths)
    view = _View(store, column, choice.rows, before, after)
    groups: list[ExampleGroup] = []
    for side in (1, -1):
        at = view.firings(side)
        if len(at) == 0:
            continue
        order = sort_by_size(at.values)
        groups.append(view.choose("top", side, at.indices[order], at, choice.n_top))
        parts = np.array_split(order[::-1], choice.n_quantiles) if choice.n_quantiles else ()
        for i, part in enumerate(parts):
            if len(part) == 0:  # fewer firings than groups
                continue
            chosen = rng.permutation(at.indices[part])
            name = f"quantile {i + 1} of {choice.n_quantiles}"
            groups.append(view.choose(name, side, chosen, Firings(at.indices[part], at.values[part]), choice.n_each))
    quiet = choice.n_near or choice.n_random  # what is drawn second depends on what was drawn first

    def finish(found: list[np.ndarray]) -> FeatureExamples:
        if quiet:
            near = _near_misses(view, found, rng)
            groups.append(view.choose("near miss", 0, near, None, choice.n_near))
            drawn = view.draw(CANDIDATES * choice.n_random, rng)
            groups.append(view.choose("random", 0, drawn, None, choice.n_random))
        kept = tuple(group for group in groups if group.examples)
        return FeatureExamples(feature=column.feature, n_tokens=view.n_tokens, groups=kept, counted=store.counted)

    return _choose_ranks(view, groups, rng) if quiet else ([], []), finish


def draw_examples(
    store: FeatureStore, feature: SupportsIndex, marks: RowMarker, n: int, before: int, after: int, seed: int = 0
) -> tuple[Example, ...]:
    """Windows around random rows of those that are marked, as in the group "random" of `max_activating_examples`.

    No list with one entry per row of the store is held.

    Args:
        store: feature store that holds the feature's codes and the text.
        feature: number of the feature, 0 to d_sae - 1.
        marks: the rows to draw from.
        n: windows to return; fewer where fewer differ.
        before: tokens shown before the center.
        after: tokens shown after the center.
        seed: seed of the draw.
    """
    feature = read_feature(feature, d_sae=store.d_sae)
    view = _View(store, store.feature(feature), None, before, after)
    drawn = draw_rows(marks, len(store), CANDIDATES * n, np.random.default_rng((seed, feature)))
    return view.choose("random", 0, drawn, None, n).examples


def expand_example(store: FeatureStore, feature: SupportsIndex, row: int, before: int, after: int) -> Example:
    """The window around one row of a store, with the codes of a feature.

    Args:
        store: feature store that holds the feature's codes and the text.
        feature: number of the feature, 0 to d_sae - 1.
        row: the row at the window's center.
        before: tokens shown before the center, within the row's document and sequence.
        after: tokens shown after the center.

    Raises:
        ValueError: the feature or the row does not exist.
    """
    feature = read_feature(feature, d_sae=store.d_sae)
    if not 0 <= row < len(store):
        raise ValueError(f"`row` must be in 0..{len(store) - 1}, got {row}.")
    view = _View(store, store.feature(feature), None, before, after)
    return view.choose("row", 0, np.array([row]), None, 1).examples[0]


class _View:
    """One feature's firings within the rows that are searched."""

    def __init__(
        self, store: FeatureStore, column: Firings, rows: np.ndarray | ChosenRuns | None, before: int, after: int
    ) -> None:
        if rows is not None and len(rows) != len(store):
            raise ValueError(
                f"`rows` must say of each of the {len(store)} tokens whether to look at it, got {len(rows)}."
            )
        self.store, self.column, self.rows = store, column, rows
        self.before, self.after = before, after
        self.places: dict[int, int] = {}
        self.n_tokens = len(store) if rows is None else int(rows.sum())

    def firings(self, side: int) -> Firings:
        """Firings of one sign in the rows that are searched."""
        kept = self.column.values * side > 0
        if self.rows is not None:
            kept &= self.rows[self.column.indices]
        return Firings(self.column.indices[kept], self.column.values[kept])

    def draw(self, n: int, rng: "np.random.Generator") -> Integer[np.ndarray, "n"]:
        """Random rows among those that are searched, drawn with replacement."""
        if self.rows is None:
            return rng.integers(len(self.store), size=n)
        rows = self.rows
        return draw_rows(lambda start, stop: rows[start:stop], len(self.store), n, rng)

    def choose(
        self, name: str, side: int, candidates: Integer[np.ndarray, "n"], pool: Firings | None, n: int
    ) -> ExampleGroup:
        """The first `n` candidates whose windows differ."""
        sizes = np.abs(pool.values) if pool is not None else np.zeros(1)
        return ExampleGroup(
            name=name,
            side=side,
            low=float(sizes.min()),
            high=float(sizes.max()),
            n_firings=len(pool) if pool is not None else 0,
            examples=tuple(self._unlike(candidates[: CANDIDATES * n].tolist(), n)),
        )

    def _unlike(self, tokens: Iterable[int], n: int) -> Iterator[Example]:
        """Windows whose words were not seen and that no earlier window's center lies in."""
        seen: set[tuple[str, ...]] = set()
        spans: list[tuple[int, int]] = []
        for token in tokens:
            if len(spans) == n:
                return
            place = int(self.store.where[token : token + 1][0])
            start, stop = self.store.text.window(place, self.before, self.after)
            words = tuple(self.store.text.words(start, stop))
            image = self.store.draw_document(token)
            if (*words, image) in seen or any(a <= place < b for a, b in spans):
                continue
            seen.add((*words, image))
            spans.append((start, stop))
            self.places[token] = place
            if self.store.of_documents:
                yield self._document(token, place, stop, words, image)
            else:
                yield self._example(token, place, start, stop, words)

    def _document(self, token: int, place: int, stop: int, words: tuple[str, ...], image: str) -> Example:
        """A document as one word; one that goes on ends with an ellipsis."""
        text = self.store.text
        cut = stop < len(text) and bool(text.goes_on(stop - 1, stop + 1)[0])
        at = int(np.searchsorted(self.column.indices, token))
        fires = at < len(self.column) and self.column.indices[at] == token
        return Example(
            words=("".join(words) + "\u2026" * cut,),
            values=(float(self.column.values[at]) if fires else 0.0,),
            center=0,
            token=token,
            doc_id=int(text.doc_ids[place]),
            image=image,
        )

    def _example(self, token: int, place: int, start: int, stop: int, words: tuple[str, ...]) -> Example:
        least = max(0, token - (place - start))  # rows are at least as near to each other as their places
        places = self.store.where[least : token + stop - place]
        first, end = least + np.searchsorted(places, (start, stop))
        values = np.zeros(stop - start, np.float32)
        a, b = np.searchsorted(self.column.indices, (first, end))
        values[places[self.column.indices[a:b] - least] - start] = self.column.values[a:b]
        doc_id = int(self.store.text.doc_ids[place])
        center = place - start
        if "" not in words[1:]:  # every token is a word of its own
            return Example(words=words, values=tuple(values.tolist()), center=center, token=token, doc_id=doc_id)
        groups = list(group_words(words))
        return Example(
            words=tuple("".join(words[group]) for group in groups),
            values=tuple(strongest(values[group].tolist()) for group in groups),
            center=next(i for i, group in enumerate(groups) if center < group.stop),
            token=token,
            doc_id=doc_id,
        )


def _choose_ranks(view: _View, groups: list[ExampleGroup], rng: "np.random.Generator") -> _Ranks:
    """The tokens at the centers of top windows, and which occurrences of each are near misses at most."""
    tops = [example.token for group in groups if group.name == "top" for example in group.examples]
    ids = find_centers(view.store, np.unique(np.array(tops, np.int64)))
    counts = view.store.count_tokens(ids)
    ranks = (np.arange(n) if n <= MANY else rng.choice(n, MANY, replace=False) for n in counts)
    return ids, [own.astype(np.int32) for own in ranks]


def _near_misses(view: _View, found: list[np.ndarray], rng: "np.random.Generator") -> Integer[np.ndarray, "n"]:
    """Rows, in random order, whose token is at a top window's center but where the feature does not fire."""
    rows = np.concatenate([np.empty(0, np.int32), *found])
    if view.store.of_documents:
        rows = np.unique(rows)  # a document may hold several of the words
    fires = view.column.indices
    places = np.minimum(np.searchsorted(fires, rows), max(len(fires) - 1, 0))
    silent = fires[places] != rows if len(fires) else np.ones(len(rows), bool)
    if view.rows is not None:
        silent &= view.rows[rows]
    return rng.permutation(rows[silent])


def _rows_of_tokens(store: FeatureStore, wanted: Sequence[_Ranks]) -> list[list[np.ndarray]]:
    """Of the rows at which each token stands those at some ranks among them; all are found in one pass."""
    found = [[np.empty(len(own), np.int32) for own in ranks] for _, ranks in wanted]
    ids = sorted({token for tokens, _ in wanted for token in tokens})
    at = {token: k for k, token in enumerate(ids)}
    asked = [
        (at[token], own, rows)
        for (tokens, ranks), into in zip(wanted, found, strict=True)
        for token, own, rows in zip(tokens, ranks, into, strict=True)
    ]
    numbers = np.full(max(ids, default=0) + 2, len(ids), smallest_int(len(ids)))  # the last is of all tokens beyond
    numbers[ids] = np.arange(len(ids))
    seen = np.zeros(len(ids), np.int64)
    for start in range(0, len(store), ROWS_AT_ONCE) if ids else ():
        own_rows, tokens_here = store.words.read(start, start + ROWS_AT_ONCE)
        here = numbers.take(tokens_here, mode="clip")
        hits = np.argsort(here, kind="stable")
        ends = np.cumsum(np.bincount(here, minlength=len(ids) + 1)[:-1])
        counts = np.diff(ends, prepend=0)
        firsts = (ends - counts - seen).tolist()
        for k, ranks, rows in asked:
            low, high = int(seen[k]), int(seen[k] + counts[k])
            own = (ranks >= low) & (ranks < high)
            rows[own] = own_rows[hits[firsts[k] + ranks[own]]] + start
        seen += counts
    return found


def _mark(example: Example) -> str:
    """The text with the center in brackets, on one line."""
    words = list(example.words)
    words[example.center] = f"[{words[example.center]}]"
    return "".join(words).replace("\n", " ")


def sort_by_size(values: Float32[np.ndarray, "n"]) -> Int[np.ndarray, "n"]:
    """Indices of values by |value|, largest first; of equal ones the lowest index comes first.

    >>> sort_by_size(np.array([1, -3, 3], np.float32)).tolist()
    [1, 2, 0]
    """
    halves = as_halves(values)
    if halves is None:
        return np.argsort(-np.abs(values), kind="stable")
    sizes = np.abs(halves).view(np.uint16)  # of floats from 0 on, bits rise with values; such integers sort in one pass
    return np.argsort(np.uint16(0xFFFF) - sizes, kind="stable")


def as_halves(values: Float32[np.ndarray, "n"]) -> Float16[np.ndarray, "n"] | None:
    """The values as float16 where they are many and none changes by it, as in most stores; else None."""
    if len(values) < MANY_VALUES:
        return None
    with np.errstate(over="ignore"):
        halves = values.astype(np.float16)
    return halves if np.array_equal(halves, values) else None

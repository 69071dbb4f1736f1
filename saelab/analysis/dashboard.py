"""Feature dashboards: statistics, histogram, examples, logit effects and similar features of one feature.

Also the table of all features of a store: firing density, counts and sizes by sign, and most frequent tokens.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from typing import Any, SupportsIndex

import numpy as np

from saelab.analysis.direct_logits import LogitLens, Promoted
from saelab.analysis.feature_similarity import NearestFeatures
from saelab.analysis.max_activating import ExampleChoice, FeatureExamples, as_halves, find_examples
from saelab.analysis.top_tokens import top_words
from saelab.stores.feature_store import Feature, FeatureStore, Firings
from saelab.stores.results import Result, format_table

N_BINS = 40
HELD_FEATURES, HELD_CODES = 16, 2**17
"""Features that are described at a time, and codes of them that are held, unless one alone has more."""
N_WORDS = 6
COLUMNS = ("feature", "density", "n_positive", "n_negative", "balance", "mean", "peak")


@dataclass(frozen=True, kw_only=True)
class FeatureSide:
    """Statistics of the firings of one sign of the codes."""

    sign: int
    n_firings: int
    mean: float
    """of |z|"""
    peak: float
    """the largest |z|"""
    words: tuple[tuple[str, float], ...]
    """the tokens that carry most of these firings, and their share of them"""


@dataclass(frozen=True, kw_only=True)
class FeatureCard(Result):
    """Everything measured about one feature, with positive and negative codes kept apart."""

    feature: int
    n_tokens: int
    label: str
    """empty where it has none"""
    sides: tuple[FeatureSide, ...]
    """of the signs that occur, that with the largest |z| first; examples are in the same order"""
    edges: tuple[float, ...]
    """of the histogram's bins, in the units of the codes"""
    counts: tuple[int, ...]
    """firings in each bin"""
    examples: FeatureExamples
    effects: Promoted | None
    """direct effect of a code of +1 on the logits; None where it was not measured"""
    neighbors: tuple[tuple[int, float], ...]
    """the most similar features and their similarity"""
    likeness: str
    """name of the similarity measure; empty where it was not measured"""
    neighbor_labels: tuple[str, ...] = ()
    """of the similar features, empty where one has none"""

    @property
    def n_firings(self) -> int:
        """Number of tokens on which the feature fires."""
        return sum(side.n_firings for side in self.sides)

    @property
    def density(self) -> float:
        """Share of tokens on which the feature fires."""
        return self.n_firings / self.n_tokens

    def named_neighbors(self) -> list[tuple[str, str, float]]:
        """Number, label and similarity of the most similar features."""
        labels = self.neighbor_labels or [""] * len(self.neighbors)
        return [(str(j), label, value) for (j, value), label in zip(self.neighbors, labels, strict=True)]

    def __str__(self) -> str:
        lines = [f"feature {self.feature} {self.label}".rstrip()]
        on = f"{self.n_tokens:,} {self.examples.counted}"
        lines.append(f"fires on {self.n_firings:,} of {on} ({self.density:.2e})")
        for side in self.sides:
            words = "  ".join(f"{word!r} {share:.0%}" for word, share in side.words)
            sizes = f"mean |z| {side.mean:.3g}, peak {side.peak:.3g}"
            lines.append(f"{'+' if side.sign > 0 else '-'} {side.n_firings:,} firings, {sizes}: {words}")
        if self.effects is not None:
            for name, tokens in (("promotes", self.effects.promoted), ("suppresses", self.effects.suppressed)):
                lines.append(f"{name}: " + "  ".join(f"{token!r} {effect:+.2f}" for token, effect in tokens))
        if self.neighbors:
            near = "  ".join(f"{' '.join(filter(None, row[:2]))} {row[2]:+.2f}" for row in self.named_neighbors())
            lines.append(f"nearest by {self.likeness}: {near}")
        return "\n".join([*lines, str(self.examples)])


def describe_feature(
    store: FeatureStore,
    feature: SupportsIndex,
    *,
    label: str = "",
    labels: Mapping[int, str] | None = None,
    lens: LogitLens | None = None,
    neighbors: NearestFeatures | None = None,
    **choice: Any,
) -> FeatureCard:
    """The dashboard of one feature: firings by sign, histogram, examples and, where given, logit effects and similar
    features.

    Args:
        store: feature store that holds the feature's codes.
        feature: number of the feature, 0 to d_sae - 1.
        label: text shown as the feature's name; empty takes that in `labels`, if it is there.
        labels: texts shown as names, by feature; None for none.
        lens: result of `logit_lens` for the same SAE; None leaves the logit effects out.
        neighbors: result of `nearest_features` for the same SAE or store; None leaves the similar features out.
        **choice: options of `max_activating_examples`, such as `n_top`.

    Raises:
        IndexError: the feature does not exist.
        KeyError: `lens` does not include the feature.
    """
    own = ExampleChoice(**choice)
    firings = store.feature(feature)
    names = {**(labels or {}), **({firings.feature: label} if label else {})}
    return _describe(firings, next(find_examples(store, [firings], own)), names, lens, neighbors)


def describe_features(
    store: FeatureStore,
    features: Sequence[int],
    *,
    labels: Mapping[int, str] | None = None,
    lens: LogitLens | None = None,
    neighbors: NearestFeatures | None = None,
    **choice: Any,
) -> Iterator[FeatureCard]:
    """The dashboards of several features, as `describe_feature` makes each; the text is read once for several of them.

    Args:
        store: feature store that holds the features' codes.
        features: numbers of the features, 0 to d_sae - 1.
        labels: texts shown as names, by feature; None for none.
        lens: as in `describe_feature`.
        neighbors: as in `describe_feature`.
        **choice: options of `max_activating_examples`, such as `n_top`.

    Raises:
        IndexError, KeyError: as in `describe_feature`.
    """
    own = ExampleChoice(**choice)
    for part in _split(store, features):
        firings = [store.feature(j) for j in part]
        for one, found in zip(firings, find_examples(store, firings, own), strict=True):
            yield _describe(one, found, labels or {}, lens, neighbors)


def _split(store: FeatureStore, features: Sequence[int]) -> Iterator[list[int]]:
    """Features in their order, few enough at a time that their codes are held."""
    fires, part, n = store.statistics.fires.sum(1), list[int](), 0
    for j in features:
        n += int(fires[j])
        if part and (n > HELD_CODES or len(part) == HELD_FEATURES):
            yield part
            part, n = [], int(fires[j])
        part.append(j)
    if part:
        yield part


def _describe(
    firings: Feature,
    found: FeatureExamples,
    labels: Mapping[int, str],
    lens: LogitLens | None,
    neighbors: NearestFeatures | None,
) -> FeatureCard:
    store = firings.store
    near = tuple(neighbors.of(firings.feature)) if neighbors is not None else ()
    counts, edges = _count(firings)
    sides = [side for sign in (1, -1) if (side := _look(store, firings, sign)) is not None]
    sides.sort(key=lambda side: -side.peak)
    order = [side.sign for side in sides] + [0]
    groups = sorted((group for group in found.groups), key=lambda group: order.index(group.side))
    return FeatureCard(
        feature=firings.feature,
        n_tokens=len(store),
        label=labels.get(firings.feature, ""),
        sides=tuple(sides),
        edges=edges,
        counts=counts,
        examples=replace(found, groups=tuple(groups)),
        effects=lens[firings.feature] if lens is not None else None,
        neighbors=near,
        likeness=neighbors.by if neighbors is not None else "",
        neighbor_labels=tuple(labels.get(j, "") for j, _ in near),
    )


def _look(store: FeatureStore, firings: Firings, sign: int) -> FeatureSide | None:
    of_sign = firings.values * sign > 0
    if not of_sign.any():
        return None
    sizes = np.abs(firings.values[of_sign])
    words = top_words(store, Firings(firings.indices[of_sign], sizes), N_WORDS)
    return FeatureSide(
        sign=sign, n_firings=len(sizes), mean=float(sizes.mean()), peak=float(sizes.max()), words=tuple(words)
    )


def _count(firings: Firings) -> tuple[tuple[int, ...], tuple[float, ...]]:
    """Histogram with bins of equal width over the codes and 0; 0 is an edge, so no bin mixes the two signs."""
    if len(firings) == 0:
        return (), ()
    low, high = min(0.0, float(firings.values.min())), max(0.0, float(firings.values.max()))
    width = (high - low) / N_BINS
    edges = width * np.arange(-np.ceil(-low / width), np.ceil(high / width) + 1)
    edges[0], edges[-1] = min(low, edges[0]), max(high, edges[-1])  # rounding must not leave the extremes out
    halves = as_halves(firings.values)
    if halves is None:
        counts, _ = np.histogram(firings.values, edges)
    else:  # there are 65,536 values at most, which are binned once each
        times = np.bincount(halves.view(np.uint16), minlength=2**16)
        bits = np.flatnonzero(times).astype(np.uint16)
        counts, _ = np.histogram(bits.view(np.float16).astype(np.float32), edges, weights=times[bits])
        counts = counts.astype(np.int64)
    return tuple(counts.tolist()), tuple(edges.tolist())


@dataclass(frozen=True, kw_only=True)
class FeatureTable(Result):
    """A table of features and the number of tokens it was measured on; `pandas.DataFrame(table.rows)` converts it."""

    n_tokens: int
    d_sae: int
    sort: str
    rows: tuple[dict[str, Any], ...]
    """one per feature, with density, the share of tokens on which it fires; n_positive and n_negative, its firings by
    sign; balance, the share of the less frequent sign among them, 0 to 0.5, NaN without firings; mean and peak |z| over
    firings; words, the three tokens with most firings"""

    counted: str = "tokens"
    """what `n_tokens` counts: tokens, or documents, whose words mark off those on which a feature fires"""

    def __str__(self) -> str:
        lines = [f"{len(self.rows):,} of {self.d_sae:,} features on {self.n_tokens:,} {self.counted}, by {self.sort}"]
        table = [["feature", "density", "+", "-", "balance", "mean", "peak", "words"]]
        for row in self.rows:
            counts = f"{row['n_positive']:,}", f"{row['n_negative']:,}", f"{row['balance']:.2f}"
            sizes = f"{row['mean']:.3g}", f"{row['peak']:.3g}"
            words = "  ".join(repr(word) for word in row["words"])
            table.append([str(row["feature"]), f"{row['density']:.2e}", *counts, *sizes, words])
        return "\n".join([*lines, *format_table(table, left=(len(table[0]) - 1,))])


def list_features(
    store: FeatureStore, *, sort: str = "density", top: int | None = 20, descending: bool = True
) -> FeatureTable:
    """The first `top` features sorted by one column of the table; equal values by feature number, NaN last.

    Args:
        store: feature store that is summarized.
        sort: column to sort by: feature, density, n_positive, n_negative, balance, mean or peak.
        top: number of rows; None returns all features.
        descending: True puts the largest values first.

    Raises:
        ValueError: the column does not exist, or `top` is below 1.
    """
    if sort not in COLUMNS:
        near = get_close_matches(sort, COLUMNS, n=5) or list(COLUMNS[:5])
        raise ValueError(f"`sort` must be a column, got '{sort}'. Did you mean one of {near}?")
    if top is not None and top < 1:
        raise ValueError(f"`top` must be at least 1, or None for all, got {top}.")
    columns = _measure(store)
    keys = -columns[sort] if descending else columns[sort]
    order = np.argsort(keys, kind="stable")[:top].tolist()  # NaN sorts last either way
    rows = tuple({name: columns[name][j].item() for name in COLUMNS} | {"words": _words(store, j)} for j in order)
    return FeatureTable(n_tokens=len(store), d_sae=store.d_sae, sort=sort, rows=rows, counted=store.counted)


def _measure(store: FeatureStore) -> dict[str, np.ndarray]:
    seen = store.statistics
    fires = seen.fires.sum(1)
    with np.errstate(invalid="ignore"):
        balance, mean = seen.fires.min(1) / fires, seen.sums.sum(1) / fires
    values = (
        np.arange(store.d_sae), fires / len(store), seen.fires[:, 0], seen.fires[:, 1], balance, mean, seen.peaks.max(1)
    )  # fmt: skip
    return dict(zip(COLUMNS, values, strict=True))


def _words(store: FeatureStore, feature: int) -> list[str]:
    return [word for word, _ in top_words(store, store.feature(feature), 3)]

"""Report sections on a feature's best partner in another store."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from saelab.analyses.cards import FeatureCard, Side, describe_feature
from saelab.analyses.contexts import Example
from saelab.pictures.cards import list_windows, show_code
from saelab.pictures.comparisons import draw_comparison
from saelab.pictures.page import decimal, escape, section
from saelab.stores.features import FeatureStore
from saelab.universality.comparison import compare
from saelab.universality.matches import Comparison
from saelab.universality.relations import Relation
from saelab.universality.table import check_stores, split_side, tell_p

N_SHOWN = 3
"""number of windows shown of each sign"""
CHOICE: dict[str, Any] = {"n_top": N_SHOWN, "n_quantiles": 0, "n_near": 0, "n_random": 0}
MOST_PARTNERS = 6
MARKS = {1: "+", 0: "", -1: "\u2212"}
SEVERAL = {"split": "split there into", "halves": "its signs are apart there:", "copies": "there several times:"}


@dataclass(frozen=True, eq=False)
class Matched:
    """A comparison from the point of view of its first store's features."""

    comparison: Comparison
    other: FeatureStore
    name: str
    """name of the other store"""
    labels: Mapping[int, str]
    """labels of the other store's features"""

    @classmethod
    def make(
        cls,
        store: FeatureStore,
        other: FeatureStore,
        comparison: Comparison | None,
        labels: Mapping[int, str],
        progress: bool,
    ) -> "Matched":
        """The matches of a store's features in another store, from a given comparison or a new one.

        Args:
            store: store of the report.
            other: store that it is compared with.
            comparison: result of `compare(store, other)`; None computes it with default options.
            labels: labels of the other store's features.
            progress: whether to show a progress bar.

        Raises:
            ValueError: the comparison is not of these stores.
        """
        if comparison is None:
            comparison = compare(store, other, progress=progress)
        check_stores(comparison, store, other)
        return cls(comparison, other, _tell_apart(store, other), labels)

    def summarise(self) -> str:
        """The section of the report's summary on the comparison, as HTML."""
        return section(f"Compared with {self.name}", draw_comparison(self.comparison))

    def describe(self, feature: int) -> dict[str, Any]:
        """Fields of a feature in the report's list: similarity, None without a partner, and whether it is universal."""
        side = self.comparison.a
        known = [number for number in self._numbers(feature) if side.partners[number] >= 0]
        if not known:
            return {"similarity": None, "partner": "", "universal": False}
        best = max(known, key=lambda number: abs(side.similarity[number]))
        partner = int(side.partners[best])
        row = {"similarity": float(side.similarity[best]), "universal": bool(side.universal[best])}
        called = self.labels.get(split_side(self.comparison, partner)[0], "")
        return row | {"partner": " ".join(filter(None, (self._name(partner), called)))}

    def draw(self, card: FeatureCard) -> str:
        """The partner of a feature as HTML for its card; text is escaped."""
        parts = "".join(self._draw(card, number) for number in self._numbers(card.feature))
        return f'<section class="match">{parts}</section>'

    def _numbers(self, feature: int) -> tuple[int, ...]:
        """The numbers of a feature in the comparison: itself, or its two sides."""
        return (2 * feature, 2 * feature + 1) if self.comparison.sides else (feature,)

    def _name(self, number: int) -> str:
        feature, sign = split_side(self.comparison, number)
        return f"{feature}{MARKS[sign]}"

    def _draw(self, card: FeatureCard, number: int) -> str:
        side = self.comparison.a
        partner, here = int(side.partners[number]), split_side(self.comparison, number)[1]
        own = f" of {MARKS[here]}" if here else ""
        if partner < 0:
            why = "nothing there fires with it often enough" if side.fires[number] else "it never fires"
            return f"<h3>No partner{own} in {escape(self.name)}: {why}</h3>"
        feature, there = split_side(self.comparison, partner)
        label = self.labels.get(feature, "")
        shown = describe_feature(self.other, feature, label=label, **CHOICE)
        named = escape(label) if label else '<span class="dim">no label</span>'
        head = f"<h3>Partner{own} in {escape(self.name)}: {self._name(partner)} {named}</h3>"
        turned = -1 if side.similarity[number] < 0 else 1
        signs = [(here, there)] if here else [(sign, sign * turned) for sign in _signs(card, shown, turned)]
        columns = (_draw_side(*one) for a, b in signs for one in (("Here", card, a), ("There", shown, b)))
        return f'{head}<p class="dim">{escape(self._tell(number))}</p><div class="both">{"".join(columns)}</div>'

    def _tell(self, number: int) -> str:
        """Similarity, significance and relation of a match, as text."""
        found, side = self.comparison, self.comparison.a
        partner, unit = int(side.partners[number]), "documents" if found.similarity == "documents" else "tokens"
        median, high = (decimal(level) for level in side.chance)
        said = [f"{found.similarity} {side.similarity[number]:+.3f} (chance {median}, 95 % {high})"]
        said.append(f"p {tell_p(side, number)}, q {side.q[number]:.2g}")
        if side.n_both[number] >= 0:
            said.append(f"both fire on {side.n_both[number]:,} {unit}")
        flipped = ["flipped"] if side.similarity[number] < 0 else []
        said += [*flipped, "universal" if side.universal[number] else "not universal"]
        back = int(found.b.partners[partner])
        said.append("each other\u2019s best" if back == number else f"whose own best is {self._name(back)}")
        if (single := self._one_to_one.get(number, partner)) != partner:
            said.append(f"one to one with {self._name(single)}")
        several = self._several.get(number)
        return "; ".join([*said, *([self._list(several)] if several else [])])

    def _list(self, several: Relation) -> str:
        pairs = list(zip(several.partners, several.similarities, strict=True))
        pairs.sort(key=lambda pair: -abs(pair[1]))
        listed = ", ".join(f"{self._name(partner)} ({value:+.2f})" for partner, value in pairs[:MOST_PARTNERS])
        more = f" and {len(pairs) - MOST_PARTNERS} more" if len(pairs) > MOST_PARTNERS else ""
        return f"{SEVERAL[several.kind]} {listed}{more}"

    @cached_property
    def _one_to_one(self) -> dict[int, int]:
        return {int(a): int(b) for a, b in self.comparison.pairs}

    @cached_property
    def _several(self) -> dict[int, Relation]:
        return {one.feature: one for one in self.comparison.relations[0] if one.kind in SEVERAL}


def _tell_apart(store: FeatureStore, other: FeatureStore) -> str:
    """The name of the other store's folder, with the parent folder where both stores have the same name."""
    folder = other.folder.resolve()
    return folder.name if folder.name != store.folder.resolve().name else f"{folder.parent.name}/{folder.name}"


def _signs(card: FeatureCard, partner: FeatureCard, turned: int) -> list[int]:
    """The signs that occur in the feature, or in the partner where that is flipped."""
    found = {side.sign for side in card.sides} | {side.sign * turned for side in partner.sides}
    return sorted(found, reverse=True)


def _draw_side(place: str, card: FeatureCard, sign: int) -> str:
    """One sign of a feature as HTML: its tokens and its strongest windows."""
    side = next((side for side in card.sides if side.sign == sign), None)
    head = f"<h4>{place} {MARKS[sign]}</h4>"
    if side is None:
        return f'<div>{head}<p class="dim">never</p></div>'
    scale = max(one.peak for one in card.sides)
    windows: list[Example] = [
        example
        for group in card.examples.groups
        if (group.name, group.side) == ("top", sign)
        for example in group.examples
    ]
    return f"<div>{head}<p>{_words(side)}</p>{list_windows(windows[:N_SHOWN], scale)}</div>"


def _words(side: Side) -> str:
    return " ".join(f'{show_code(word)} <span class="dim">{share:.0%}</span>' for word, share in side.words)

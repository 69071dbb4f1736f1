"""Figures and tables of comparisons: similarity histograms with their null, heat maps by layer, best partners."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np

from saelab.analysis.dashboard import FeatureCard, describe_feature
from saelab.stores.feature_store import FeatureStore
from saelab.stores.results import register_drawing
from saelab.stores.sharing import tell_apart
from saelab.universality.comparison import compare
from saelab.universality.matching import Comparison, Matches, Relation
from saelab.universality.universal_features import UniversalTable, check_stores, format_p, format_words, split_side
from saelab.visualization.card_data import describe_side, describe_window, shorten
from saelab.visualization.html import (
    MINUS,
    OTHER,
    OWN,
    PLUS,
    apply_layout,
    count_rows,
    decimal,
    escape_plotly,
    paragraph,
    section,
    table,
)

if TYPE_CHECKING:
    from plotly.graph_objects import Bar, Figure

N_BINS = 40
NONE = -2.5 / N_BINS
"""Position of the bar of features without a partner."""
Value = Literal["count", "variance", "one_to_one", "median"]
VALUES: dict[str, str] = {
    "count": "Share of features that are universal",
    "variance": "Share of the codes' variance that is of universal features",
    "one_to_one": "Mean similarity of one-to-one pairs",
    "median": "Median similarity to the best partner",
}
ABOVE_CHANCE = [[0.0, "rgba(128,128,128,0.08)"], [1.0, "rgba(55,145,154,0.65)"]]
"""Colors on which text is readable with light and dark backgrounds."""
N_SHOWN = 3
"""number of windows shown of each sign"""
CHOICE: dict[str, Any] = {"n_top": N_SHOWN, "n_quantiles": 0, "n_near": 0, "n_random": 0}
MOST_PARTNERS = 6
MARKS = {1: "+", 0: "", -1: "\u2212"}
SEVERAL = {"split": "split there into", "halves": "its signs are apart there:", "copies": "there several times:"}


def plot_matches(comparison: Comparison) -> "Figure":
    """A histogram of the similarity of every live feature's best partner, for both dictionaries, with null
    distribution.

    x: |similarity|, 0 to 1; y: number of features. Universal features have a color of their own, as have flipped
    matches where codes are signed. Features without a partner, which fire together with none often enough, are a
    separate bar at the left. Lines mark the median and the 95th percentile under the null.
    """
    from plotly.subplots import make_subplots

    figure = make_subplots(rows=2, cols=1, shared_xaxes=True, vertical_spacing=0.12)
    for row, (name, side) in enumerate((("a", comparison.a), ("b", comparison.b)), 1):
        for kind, (color, chosen) in _kinds(side, comparison.signed).items():
            figure.add_trace(_count_matches(side, chosen, kind, color, row == 1), row=row, col=1)
        for share, level in zip(("chance, median", "95 %"), side.chance, strict=True):
            if level == level:
                _mark_chance(figure, row, share, level)
        figure.update_yaxes(title_text=f"features of {name}", row=row, col=1)
    ticks = np.linspace(0, 1, 6)
    figure.update_xaxes(
        tickvals=[NONE, *ticks], ticktext=["none", *(f"{x:.1f}" for x in ticks)], range=[NONE - 0.03, 1.01],
        showgrid=False, zeroline=False,
    )  # fmt: skip
    figure.update_xaxes(title_text=f"similarity to the best partner, |{comparison.similarity}|", row=2, col=1)
    figure.update_layout(barmode="stack", bargap=0, legend={"orientation": "h", "y": 1.07, "yanchor": "bottom"})
    shares = (f"{name}: {side.share():.1%}" for name, side in (("a", comparison.a), ("b", comparison.b)))
    note = f"universal (q <= {comparison.fdr:g}, at least {comparison.min_effect:g}) of {', of '.join(shares)} of live "
    return apply_layout(figure, "How similar the best partners are", f"{note}features; {_basis([comparison])}", 460)


def _kinds(side: Matches, signed: bool) -> dict[str, tuple[str, np.ndarray]]:
    """Color and features of each kind of match, from the lowest in the stack."""
    common, flipped = side.live & side.universal, np.nan_to_num(side.similarity) < 0
    rest = "not universal", (OTHER, side.live & ~side.universal)
    if not signed:
        return {"universal": (OWN, common), rest[0]: rest[1]}
    same = "universal, same sign", (PLUS, common & ~flipped)
    return dict([same, ("universal, flipped", (MINUS, common & flipped)), rest])


def _count_matches(side: Matches, chosen: np.ndarray, name: str, color: str, legend: bool) -> "Bar":
    from plotly.graph_objects import Bar

    sizes = np.abs(side.similarity[chosen])
    alone, edges = np.isnan(sizes), np.linspace(0, 1, N_BINS + 1)
    counts = np.histogram(np.minimum(sizes[~alone], 1), edges)[0]
    said = [f"{low:.3g} to {high:.3g}" for low, high in pairwise(edges)]
    return Bar(
        name=name,
        legendgroup=name,
        showlegend=legend,
        x=[NONE, *((edges[1:] + edges[:-1]) / 2)],
        y=[int(alone.sum()), *counts.tolist()],
        width=0.92 / N_BINS,
        marker={"color": color, "line": {"width": 0}},
        customdata=["no partner", *said],
        hovertemplate="%{y:,} features: %{customdata}<extra>%{fullData.name}</extra>",
    )


def _mark_chance(figure: "Figure", row: int, name: str, level: float) -> None:
    """Add a vertical line named at its top: the median on its left, the 95th percentile on its right."""
    label = {"text": f" {name} {level:.2f} ", "font": {"size": 12}, "showarrow": False, "yanchor": "bottom"}
    anchor = "left" if name == "95 %" else "right"
    figure.add_vline(level, line={"dash": "dot" if anchor == "left" else "solid", "width": 1.5}, row=row, col=1)
    figure.add_annotation(x=level, y=1, yref="y domain", xanchor=anchor, row=row, col=1, **label)


def plot_layers(comparisons: Mapping[tuple[str, str], Comparison], value: Value = "count") -> "Figure":
    """A heat map of comparisons, layers by layers: how many of the row's features are found in the column.

    The color is (value - chance) / (1 - chance): 0 at chance, whatever its level. Names that occur as rows and columns
    make the map square: a pair that is given once fills both cells, each for its own row's features. ValueError for no
    comparisons or another value.

    - "count", "variance": share of universal features, by number or by variance; chance is the `fdr` of it that may be
    false.
    - "median": median best similarity of live features; chance is the same under the null.
    - "one_to_one": mean similarity of the one-to-one assignment; chance is the median best similarity under the null.

    Args:
        comparisons: results of `compare(row, column)` by the names (row, column).
        value: quantity shown.
    """
    from plotly.graph_objects import Figure, Heatmap

    if value not in get_args(Value) or not comparisons:
        raise ValueError(
            f"`value` must be one of {list(get_args(Value))} and `comparisons` not empty, got {value!r} and "
            f"{len(comparisons)} of them."
        )
    rows, columns = _order(comparisons)
    cells = [[_read(comparisons, row, column, value) for column in columns] for row in rows]
    figure = Figure(
        Heatmap(
            z=[[cell.excess if cell else None for cell in line] for line in cells],
            hovertext=[[cell.hover if cell else "" for cell in line] for line in cells],
            hoverinfo="text",
            hoverongaps=False,
            zmin=0,
            zmax=1,
            xgap=2,
            ygap=2,
            colorscale=ABOVE_CHANCE,
            colorbar={"title": {"text": "above<br>chance"}, "tickvals": [0, 1], "ticktext": ["none", "all"]},
        )
    )
    for i, line in enumerate(cells):
        for j, cell in enumerate(line):
            if cell is not None:  # annotations are in the color of the page's text, whatever is behind them
                figure.add_annotation(x=j, y=i, text=cell.text, showarrow=False, font={"size": 13})
    grid = {"showgrid": False, "zeroline": False}
    figure.update_xaxes(title_text="found in", tickvals=list(range(len(columns))), ticktext=_names(columns), **grid)
    figure.update_yaxes(title_text="features of", tickvals=list(range(len(rows))), ticktext=_names(rows), **grid)
    figure.update_yaxes(autorange="reversed", automargin=True)
    kinds = sorted({one.similarity for one in comparisons.values()})
    below = "how much of it may be false" if value in ("count", "variance") else "the median of best partners by chance"
    note = f"by {', '.join(kinds)}; under each number {below}; {_basis(list(comparisons.values()))}"
    return apply_layout(figure, VALUES[value], note, 120 + 64 * len(rows))


@dataclass(frozen=True)
class _Cell:
    value: float
    chance: float
    hover: str

    @property
    def excess(self) -> float | None:
        """(value - chance) / (1 - chance); None where the value is not known."""
        level = 0.0 if self.chance != self.chance else self.chance
        return None if self.value != self.value else max(0.0, (self.value - level) / max(1 - level, 1e-9))

    @property
    def text(self) -> str:
        chance = "" if self.chance != self.chance else f'<br><span style="font-size:11px">{self.chance:.3f}</span>'
        return "-" if self.value != self.value else f"{self.value:.3f}{chance}"


def _order(comparisons: Mapping[tuple[str, str], Comparison]) -> tuple[list[str], list[str]]:
    """Names of rows and of columns: one list for both where they share names."""
    rows, columns = (list(dict.fromkeys(pair[i] for pair in comparisons)) for i in (0, 1))
    if not set(rows) & set(columns):
        return rows, columns
    both = list(dict.fromkeys([*rows, *columns]))
    return both, both


def _read(comparisons: Mapping[tuple[str, str], Comparison], row: str, column: str, value: str) -> _Cell | None:
    turned = (row, column) not in comparisons
    found = comparisons.get((column, row) if turned else (row, column))
    if found is None:
        return None
    side = found.b if turned else found.a
    number, chance = _measure(found, side, value)
    level = "chance was not measured" if chance != chance else f"chance: {chance:.3f}"
    lines = [
        f"{escape_plotly(row)} in {escape_plotly(column)}: {number:.3f}",
        level,
        f"{side.live.sum():,} live features",
    ]
    return _Cell(number, chance, "<br>".join([*lines, _basis([found])]))


def _measure(found: Comparison, side: Matches, value: str) -> tuple[float, float]:
    """The value of a cell and its chance level."""
    nan = float("nan")
    if value in ("count", "variance"):
        share = side.share("count" if value == "count" else "variance")
        return share, found.fdr * share if found.n_shifts else nan
    sizes = found.values if value == "one_to_one" else side.similarity[~np.isnan(side.similarity)]
    if not len(sizes):
        return nan, side.chance[0]
    return float(np.mean(np.abs(sizes)) if value == "one_to_one" else np.median(np.abs(sizes))), side.chance[0]


def _names(names: list[str]) -> list[str]:
    return [escape_plotly(name, 24) for name in names]


def _basis(comparisons: list[Comparison]) -> str:
    """Number of tokens, as text, that the comparisons were measured on."""
    counts = [one.n_tokens for one in comparisons if one.n_tokens is not None]
    kinds = " or ".join(sorted({one.counted for one in comparisons if one.n_tokens is not None}))
    return f"over {count_rows(counts, kinds)}" if counts else "of directions, no tokens"


def draw_comparison(comparison: Comparison) -> str:
    """An HTML view of a comparison: its printed summary with the numbers as a table; text is escaped."""
    first, *lines = str(comparison).split("\n")
    header = ["", "live", "median", "chance", "95 %", "universal", "by frequency", "by variance"]
    sides = [_describe_side(name, side) for name, side in (("a", comparison.a), ("b", comparison.b))]
    sources = f"a: {comparison.sources[0]}; b: {comparison.sources[1]}"
    return paragraph(first) + table(header, sides) + "".join(paragraph(line) for line in [*lines[3:], sources])


def _describe_side(name: str, side: Matches) -> list[str]:
    known = np.abs(side.similarity[~np.isnan(side.similarity)])
    levels = (float(np.median(known)) if len(known) else float("nan"), *side.chance)
    shares = (side.share("count"), side.share("frequency"), side.share("variance"))
    percent = ("-" if share != share else f"{share:.1%}" for share in shares)
    return [name, f"{side.live.sum():,}", *(decimal(x, 3) for x in levels), *percent]


register_drawing(Comparison, draw_comparison)


def draw_universal(found: UniversalTable) -> str:
    """Universal pairs as an HTML table; text is escaped."""
    header = ["a", "b", "similarity", "p", "both fire", "a is called", "b is called", "a fires on", "b fires on"]
    rows = []
    for row in found.rows:
        labels, words = [row["label_a"], row["label_b"]], [format_words(row["words_a"]), format_words(row["words_b"])]
        cells = [cell.replace(" ", "\u00a0") for cell in found.cells(row)]
        rows.append([*cells, *labels, *words])
    said = f"{len(rows):,} of {found.n_pairs:,} universal pairs by {found.similarity}"
    return paragraph(said) + table(header, rows)


register_drawing(UniversalTable, draw_universal)


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
        return cls(comparison, other, tell_apart(store.folder, other.folder)[1], labels)

    def summarize(self) -> str:
        """The section of the report's summary on the comparison, as HTML."""
        return section(f"Compared with {self.name}", draw_comparison(self.comparison))

    def describe(self, feature: int) -> dict[str, Any]:
        """Fields of a feature in the report's list: match, the similarity to its partner, or None; the partner; and
        whether the feature is universal.
        """
        side = self.comparison.a
        known = [number for number in self._numbers(feature) if side.partners[number] >= 0]
        if not known:
            return {"match": None, "partner": "", "universal": False}
        best = max(known, key=lambda number: abs(side.similarity[number]))
        partner = int(side.partners[best])
        row = {"match": float(side.similarity[best]), "universal": bool(side.universal[best])}
        return row | {"partner": self._call(partner)}

    def describe_partners(self, card: FeatureCard) -> list[dict[str, Any]]:
        """The partner of a feature, or those of its two sides, ready for JSON: as its card shows them."""
        return [self._describe_partner(card, number) for number in self._numbers(card.feature)]

    def _numbers(self, feature: int) -> tuple[int, ...]:
        """The numbers of a feature in the comparison: itself, or its two sides."""
        return (2 * feature, 2 * feature + 1) if self.comparison.sides else (feature,)

    def _name(self, number: int) -> str:
        feature, sign = split_side(self.comparison, number)
        return f"{feature}{MARKS[sign]}"

    def _call(self, number: int) -> str:
        """Name and label of a feature of the other store."""
        label = self.labels.get(split_side(self.comparison, number)[0], "")
        return " ".join(filter(None, (self._name(number), label)))

    def _describe_partner(self, card: FeatureCard, number: int) -> dict[str, Any]:
        side = self.comparison.a
        partner, here = int(side.partners[number]), split_side(self.comparison, number)[1]
        own = f" of {MARKS[here]}" if here else ""
        if partner < 0:
            why = "nothing there fires with it often enough" if side.fires[number] else "it never fires"
            return {"title": f"No partner{own} in {self.name}: {why}"}
        feature, there = split_side(self.comparison, partner)
        label = self.labels.get(feature, "")
        shown = describe_feature(self.other, feature, label=label, **CHOICE)
        turned = -1 if side.similarity[number] < 0 else 1
        signs = [(here, there)] if here else [(sign, sign * turned) for sign in _signs(card, shown, turned)]
        return {
            "title": f"Partner{own} in {self.name}",
            "name": self._name(partner),
            "label": label,
            "about": self._describe_pair(number),
            "columns": [_describe_place(*one) for a, b in signs for one in (("Here", card, a), ("There", shown, b))],
        }

    def _describe_pair(self, number: int) -> str:
        """Similarity, significance and relation of a match, as text."""
        found, side = self.comparison, self.comparison.a
        partner, rows_are = int(side.partners[number]), found.rows_are
        median, high = (decimal(level) for level in side.chance)
        said = [f"{found.similarity} {side.similarity[number]:+.3f} (chance {median}, 95 % {high})"]
        said.append(f"p {format_p(side, number)}, q {side.q[number]:.2g}")
        if side.n_both[number] >= 0:
            said.append(f"both fire on {side.n_both[number]:,} {rows_are}")
        flipped = ["flipped"] if side.similarity[number] < 0 else []
        said += [*flipped, "universal" if side.universal[number] else "not universal"]
        back = int(found.b.partners[partner])
        said.append("each other\u2019s best" if back == number else f"whose own best is {self._name(back)}")
        if (single := self._one_to_one.get(number, partner)) != partner:
            said.append(f"one to one with {self._call(single)}")
        several = self._several.get(number)
        return "; ".join([*said, *([self._list(several)] if several else [])])

    def _list(self, several: Relation) -> str:
        pairs = list(zip(several.partners, several.similarities, strict=True))
        pairs.sort(key=lambda pair: -abs(pair[1]))
        listed = ", ".join(f"{self._call(partner)} ({value:+.2f})" for partner, value in pairs[:MOST_PARTNERS])
        more = f" and {len(pairs) - MOST_PARTNERS} more" if len(pairs) > MOST_PARTNERS else ""
        return f"{SEVERAL[several.kind]} {listed}{more}"

    @cached_property
    def _one_to_one(self) -> dict[int, int]:
        return {int(a): int(b) for a, b in self.comparison.pairs}

    @cached_property
    def _several(self) -> dict[int, Relation]:
        return {one.feature: one for one in self.comparison.relations[0] if one.kind in SEVERAL}


def _describe_difference(store: FeatureStore, other: FeatureStore) -> str:
    """The name of the other store's folder, with the parent folder where both stores have the same name."""
    folder = other.folder.resolve()
    return folder.name if folder.name != store.folder.resolve().name else f"{folder.parent.name}/{folder.name}"


def _signs(card: FeatureCard, partner: FeatureCard, turned: int) -> list[int]:
    """The signs that occur in the feature, or in the partner where that is flipped."""
    found = {side.sign for side in card.sides} | {side.sign * turned for side in partner.sides}
    return sorted(found, reverse=True)


def _describe_place(place: str, card: FeatureCard, sign: int) -> dict[str, Any]:
    """One sign of a feature, ready for JSON: its tokens and its strongest windows."""
    side = next((side for side in card.sides if side.sign == sign), None)
    if side is None:
        return {"place": place, "sign": sign}
    windows = [
        describe_window(example)
        for group in card.examples.groups
        if (group.name, group.side) == ("top", sign)
        for example in group.examples[:N_SHOWN]
    ]
    peak = shorten(max(one.peak for one in card.sides))
    return {"place": place, "sign": sign, "side": describe_side(side), "windows": windows, "peak": peak}

"""Plots of interventions: dose-response curves, steered texts side by side, attribution and patching heat maps.

Dose-response and trade-off figures show effects and side effects by strength; tokens of steered texts are colored by
how steering changed their log-probability.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float

from saelab.interventions.attribution import Attribution
from saelab.interventions.patching import Patching
from saelab.steering.curves import SIDES, AnyMeasure, Measure, MeasureName, SteeringCurve
from saelab.steering.text_comparison import UNSTEERED, GenerationComparison, ScoredText, TextRow
from saelab.stores.results import register_drawing
from saelab.visualization.feature_cards import STRONGEST, show_text, style_card
from saelab.visualization.html import (
    CLEAR,
    LEGEND_WIDTH,
    MINUS,
    OTHER,
    PLUS,
    apply_layout,
    embed,
    escape,
    escape_plotly,
    line_of,
    make_page,
    paragraph,
    section,
    table,
    write_over,
)

if TYPE_CHECKING:
    from plotly.graph_objects import Figure, Scatter

AXES: dict[MeasureName, str] = {
    "lift": "lift, nats",
    "prompt_lift": "lift on prompts, nats",
    "selectivity": "lift less that of others, nats",
    "prompt_selectivity": "selectivity on prompts, nats",
    "gain": "gain of the concept, nats",
    "kl": "KL to the unsteered model, nats",
    "prompt_kl": "KL on prompts, nats",
    "mass": "expected share of the concept",
    "rate": "share of the concept in the text",
    "share": "share of texts with the concept",
    "score": "score of the text",
    "nll": "nll of the text, nats",
    "perplexity": "perplexity to the<br>unsteered model",
    "repetition": "repeated 4-grams",
    "entropy": "entropy of predictions, nats",
    "distinct_1": "different tokens",
    "distinct_2": "different pairs of tokens",
}
LOG = ("kl", "prompt_kl", "perplexity")
BAND = 0.16  # opacity of an interval
# the figure is drawn on a canvas of its own: the color of its text is the page's, again when that turns dark or light
FOLLOW_THE_PAGE = """
const plot = document.getElementById("{plot_id}");
function paint() {
  Plotly.relayout(plot, {"font.color": getComputedStyle(document.documentElement).getPropertyValue("--ink").trim()});
}
paint();
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", paint);
"""
SCALE = 6.0  # nats at which a color is strongest
ROW = "border-top: 1px solid var(--rule); padding: .2rem 0 .6rem; margin: .6rem 0 0"
COLUMNS = "grid-template-columns: repeat(auto-fit, minmax(min(16rem, 100%), 1fr)); gap: 0 1.6rem"
SIGNED = [[0.0, MINUS], [0.5, "rgba(56,125,223,0.04)"], [0.5, "rgba(224,116,34,0.04)"], [1.0, PLUS]]
EFFECT_OPACITY = 0.7  # opacity of the largest effect: the text stays readable on it
WIDEST = 40  # columns whose names are still written out
N_COLUMNS = 12  # of a table
RGB = {True: "222 110 24", False: "38 112 214"}


def plot_dose_response(curve: SteeringCurve, measures: Sequence[AnyMeasure] = ()) -> "Figure":
    """Dose-response curves: one panel per measure against strength, one line per source, bands for 95 % intervals.

    Each measure is given by its name or as a `Measure`. By default the effect on the concept (gain, and selectivity or,
    without other concepts, lift; for a scored concept its score and the repetition), the KL divergence that it costs in
    nats, and the perplexity of the generated text under the unsteered model; KL and perplexity on a log axis. Lines
    pass through the unsteered model at the strength that changes nothing, but for KL, which is 0 there. ValueError for
    a measure that the curve does not have.
    """
    from plotly.subplots import make_subplots

    second: MeasureName = "repetition" if curve.effect.extra else "selectivity" if curve.others else "lift"
    chosen = [Measure.of(one) for one in measures or (curve.effect, second, "kl", "perplexity")]
    n_rows = (len(chosen) + 1) // 2
    figure = make_subplots(n_rows, 2, horizontal_spacing=0.13, vertical_spacing=0.3 / max(2, n_rows))
    for panel, measure in enumerate(chosen):
        place = {"row": panel // 2 + 1, "col": panel % 2 + 1}
        found = curve.estimate(measure)
        values, low, high = (np.array([getattr(one, end) for one in found]) for end in ("value", "low", "high"))
        for i, source in enumerate(curve.sources):
            order, strengths = _order(curve, source, neutral=measure.name not in ("kl", "prompt_kl"))
            figure.add_trace(_draw_band(strengths, low[order], high[order], i), **place)
            line = _draw_line(strengths, values[order], source, str(measure), i)
            figure.add_trace(line.update(showlegend=panel == 0), **place)
        scale = {"type": "log", "tickformat": "~g", "nticks": 5} if measure.name in LOG and not measure.extra else {}
        figure.update_yaxes(title_text=_axis(measure), **scale, **place)
        figure.update_xaxes(title_text="strength", **place)
    legend = {"orientation": "h", "y": 1.02, "yanchor": "bottom"}
    figure.update_layout(legend=legend)
    note = f"{curve.title}; bands: 95 % intervals over {_clusters(curve)}"
    return apply_layout(figure, "What each strength does", note, 60 + 290 * n_rows)


def plot_tradeoff(curve: SteeringCurve, measure: AnyMeasure | None = None) -> "Figure":
    """Effect against cost: the change of the concept and the KL divergence at every strength of every source.

    x: KL to the unsteered model on text that it wrote, log scale; y: the gain (for a scored concept, the score above
    unsteered text) or another measure, up where the concept is raised. Each source is a line through its strengths, on
    each side from the weakest; bars are 95 % intervals. The broad line behind joins the Pareto-optimal points.
    """
    from plotly.graph_objects import Figure

    measure = Measure.of(measure or curve.effect)
    found, kl = curve.estimate(measure), curve.values("kl")
    figure = Figure()
    for side in curve.sides:
        figure.add_trace(_draw_frontier(curve, measure, side))
    for i, source in enumerate(curve.sources):
        for side in curve.sides:
            line = [j for j in curve.along(source, side).points if kl[j] > 0]
            values = [found[j] for j in line]
            trace = _draw_line(
                kl[line], np.array([one.value for one in values]), source, str(measure), i, " at KL %{x:.3g}"
            )
            trace.update(
                showlegend=side == curve.sides[0],
                customdata=[f"{curve.points[j][1]:+g}" for j in line],
                error_y={
                    "type": "data",
                    "symmetric": False,
                    "array": [one.high - one.value for one in values],
                    "arrayminus": [one.value - one.low for one in values],
                    "thickness": 1,
                    "width": 2,
                },
            )
            figure.add_trace(trace)
    figure.update_xaxes(title_text="KL to the unsteered model, nats (log scale)", type="log", tickformat="~g", nticks=8)
    figure.update_yaxes(title_text=_axis(measure))
    figure.update_layout(showlegend=True)
    note = f"{curve.title}; bars: 95 % intervals over {_clusters(curve)}; broad: what nothing beats"
    return apply_layout(figure, "Effect and cost", note)


def show_curve(curve: SteeringCurve, note: str = "") -> str:
    """A self-contained HTML page of a steering curve: summary, both figures, and all numbers; text is escaped.

    `note` is added to the line under the title.
    """
    figures = [plot_tradeoff(curve), plot_dose_response(curve)]
    drawn = [
        embed(figure.update_layout(paper_bgcolor=CLEAR), f"figure-{i}", FOLLOW_THE_PAGE, first=not i)
        for i, figure in enumerate(figures)
    ]
    described = [paragraph(f"{name}: {what}", "small") for name, what in curve.sources.items()]
    sections = [
        section("In short", paragraph(curve.baseline), _summarize(curve), *described),
        section("At what cost", drawn[0]),
        section("Every strength", drawn[1], _list_points(curve)),
    ]
    return make_page(f"Steering {curve.concept}", f"{curve.title}. {note}".strip(), sections)


def _order(curve: SteeringCurve, source: str, neutral: bool) -> tuple[list[int], np.ndarray]:
    """A source's points sorted by strength, the unsteered model included."""
    mine = [(s, i) for i, (name, s) in enumerate(curve.points) if name == source and i]
    zero = curve.neutral[source]
    if neutral and zero not in [s for s, _ in mine]:
        mine.append((zero, 0))
    mine = [(s, i) for s, i in sorted(mine) if neutral or s != zero]
    return [i for _, i in mine], np.array([s for s, _ in mine])


def _draw_line(x: np.ndarray, y: np.ndarray, source: str, measure: str, i: int, more: str = "") -> "Scatter":
    from plotly.graph_objects import Scatter

    strength = "%{customdata}" if more else "%{x:+g}"
    return Scatter(
        x=x,
        y=y,
        mode="lines+markers",
        name=escape_plotly(source, LEGEND_WIDTH),
        legendgroup=str(i),
        line=line_of(i),
        marker={"size": 7},
        meta=escape_plotly(measure, 40),
        hovertemplate=f"%{{meta}} %{{y:.3g}}{more}, strength {strength}<extra>%{{fullData.name}}</extra>",
    )


def _draw_band(x: np.ndarray, low: np.ndarray, high: np.ndarray, i: int) -> "Scatter":
    """The area between the ends of intervals; empty where there are none."""
    from plotly.graph_objects import Scatter

    known = ~np.isnan(low + high)
    red, green, blue = (int(line_of(i)["color"][part : part + 2], 16) for part in (1, 3, 5))
    return Scatter(
        x=[*x[known], *x[known][::-1]],
        y=[*high[known], *low[known][::-1]],
        fill="toself",
        fillcolor=f"rgba({red},{green},{blue},{BAND})",
        line={"width": 0},
        mode="lines",
        hoverinfo="skip",
        legendgroup=str(i),
        showlegend=False,
    )


def _draw_frontier(curve: SteeringCurve, measure: Measure, side: int) -> "Scatter":
    from plotly.graph_objects import Scatter

    places = [curve.points.index(point) for point in curve.frontier(None, side, measure)]
    kl, values = curve.values("kl"), curve.values(measure)
    places = [i for i in places if kl[i] > 0]
    return Scatter(
        x=kl[places],
        y=values[places],
        mode="lines",
        line={"width": 9, "color": OTHER},
        opacity=0.35,
        hoverinfo="skip",
        showlegend=False,
    )


def _axis(measure: Measure) -> str:
    if measure.concept is not None:
        return f"{measure.name} of {escape_plotly(measure.concept, 20)}"
    if measure == Measure("score", extra=True):
        return "score above unsteered text"
    return AXES[measure.name] + (",<br>above unsteered text" if measure.extra else "")


def _clusters(curve: SteeringCurve) -> str:
    return "prompts" if len(curve.prompts) > 1 else "texts"


def _summarize(curve: SteeringCurve) -> str:
    header, rows = curve.format_rows()
    return table(header, rows, own=frozenset(row[0] for row in rows if row[0].split(",")[0] in SIDES.values()))


def _list_points(curve: SteeringCurve) -> str:
    measures = [one for one in curve.measures if one.name not in ("nll", "mass")]
    columns = [curve.values(one) for one in measures]
    rows = [
        [f"{name} {strength:+g}" if i else name, *("-" if x[i] != x[i] else f"{x[i]:.3g}" for x in columns)]
        for i, (name, strength) in enumerate(curve.points)
    ]
    return table(["", *map(str, measures)], rows)


def draw_curve(curve: SteeringCurve) -> str:
    """An HTML view of a steering curve for Jupyter: summary, and all points in a closed section; text is escaped."""
    points = f"<details><summary>every strength</summary>{_list_points(curve)}</details>"
    return paragraph(curve.title) + paragraph(curve.baseline) + _summarize(curve) + points


register_drawing(SteeringCurve, draw_curve)


def draw_texts(texts: GenerationComparison) -> str:
    """Texts in columns as one HTML element, a card for each prompt; all text is escaped.

    A token's color is log p' - log p, its log-probability under the steered model minus that under the unsteered one:
    orange where steering made it more likely, blue where less likely, strongest at six nats. Both are in the token's
    title. Unsteered text next to several steered ones is not colored.
    """
    legend = "Orange: tokens that steering made likelier, blue: less likely; strongest at 6 nats."
    described = "".join(f'<p class="dim">{escape(f"{name}: {what}")}</p>' for name, what in texts.interventions.items())
    rows = "".join(_draw_row(texts, row) for row in texts.rows)
    return f'<article class="fcard">{described}<p class="dim">{legend}</p>{rows}</article>'


def _draw_row(texts: GenerationComparison, row: TextRow) -> str:
    columns = [_draw_column(UNSTEERED, f"perplexity {row.unsteered.perplexity():.3g}", row.unsteered)]
    columns += [_draw_column(name, texts.format_cost(row, name), text) for name, text in row.steered.items()]
    prompt = f'<h3 class="win">{show_text(row.prompt)}</h3>'
    return f'<section style="{ROW}">{prompt}<div class="both" style="{COLUMNS}">{"".join(columns)}</div></section>'


def _draw_column(name: str, cost: str, text: ScoredText) -> str:
    readers = [reader for reader in text.log_probs if reader != UNSTEERED]
    inside = []
    for i, word in enumerate(text.words):
        at = {reader: values[i] for reader, values in text.log_probs.items()}
        inside.append(_draw_token(word, at, readers[0] if len(readers) == 1 else None))
    head = f'<h4>{escape(name)}</h4><p class="dim">{escape(cost)}</p>'
    return f'<div>{head}<div class="win">{"".join(inside).lstrip()}</div></div>'


def _draw_token(word: str, log_probs: Mapping[str, float], steered: str | None) -> str:
    """A token with its log-probabilities as the title, colored by their difference where there is one."""
    title = "log p: " + ", ".join(f"{reader} {value:.2f}" for reader, value in log_probs.items())
    change = log_probs[steered] - log_probs[UNSTEERED] if steered is not None else 0.0
    alpha = STRONGEST * min(1.0, abs(change) / SCALE)
    kind = f' class="{"p" if change > 0 else "m"}" style="--a:{alpha:.2f}"' if alpha >= 0.005 else ""
    return f'<b{kind} title="{escape(title)}">{show_text(word)}</b>'


def show_generations(texts: GenerationComparison) -> str:
    """A self-contained HTML page with steered and unsteered texts in columns; text is escaped."""
    return make_page("Steered and unsteered", texts.title, [_draw_alone(texts)])


def _draw_alone(texts: GenerationComparison) -> str:
    return style_card() + draw_texts(texts)


register_drawing(GenerationComparison, _draw_alone)


def plot_attribution(attribution: Attribution, n: int = 15, labels: Mapping[int, str] | None = None) -> "Figure":
    """A heat map of attribution effects: the features with the largest effects by tokens of the prompt.

    Two more rows show the summed effects of all other features and of the reconstruction errors. x: tokens; y: the `n`
    features whose effects have the largest summed size; color: change of the metric when the code is replaced, in the
    metric's units, blue where the metric falls; `labels`, text by feature, stand beside the numbers. ValueError for `n`
    below 1.

    >>> sae = sl.SAE(sl.SAEConfig(d_in=32, d_sae=64, activation=sl.TopK(k=4)))
    >>> from saelab.interventions.attribution import attribute
    >>> found = attribute(sl.lm.tiny_model(), sae, "Hello", "!", hook_point="blocks.1.hook_resid_post")
    >>> len(plot_attribution(found, n=3).data[0].y)
    5
    """
    if n < 1:
        raise ValueError(f"`n` must be at least 1 feature, got {n}.")
    sizes = np.bincount(attribution.features, np.abs(attribution.effects), 1)
    chosen = [int(i) for i in np.argsort(-sizes, kind="stable")[:n] if sizes[i] > 0]
    rows = [_effects_of(attribution, attribution.features == i) for i in chosen]
    rows += [_effects_of(attribution, ~np.isin(attribution.features, chosen)), attribution.errors]
    said = labels or {}
    names = [*(" ".join(filter(None, (f"feature {i}", said.get(i)))) for i in chosen), "other features", "errors"]
    figure = _draw_cells(np.stack(rows), names, _number(attribution.tokens))
    how = f"{attribution.method}, {attribution.n_steps} steps" if attribution.n_steps else attribution.method
    ends = f"{attribution.clean:.4g} as it is, {attribution.patched:.4g} with all replaced ({attribution.baseline})"
    how += f", completeness {attribution.completeness:.3f}"
    note = f"{attribution.metric} at {attribution.hook_point}; {ends}; {how}"
    return apply_layout(figure, "Effects of features", note, 120 + 26 * len(rows))


def _effects_of(attribution: Attribution, chosen: np.ndarray) -> Float[np.ndarray, "n_tokens"]:
    effects = np.bincount(attribution.positions[chosen], attribution.effects[chosen], len(attribution.tokens))
    return effects.astype(np.float64)  # integers where nothing is chosen


def plot_patching(patching: Patching) -> "Figure":
    """A heat map of denoising scores from activation patching, with the first source at the bottom.

    x: positions, as corrupt>clean where the prompts differ; y: what was patched; color: share of the difference
    between corrupt (0) and clean (1) that the patch restores. Without scores, the figure shows the reason as text.
    """
    columns = [patching.name_column(i) for i in range(len(patching.positions))]
    differ = [i for i, name in enumerate(columns) if ">" in name]
    figure = _draw_cells(patching.scores[::-1], list(patching.sources[::-1]), columns, 1.0, differ)
    if patching.reason:
        write_over(figure, f"No scores: {patching.reason}.")
    note = (
        f"{patching.metric}: clean {patching.clean:.4g}, corrupt {patching.corrupt:.4g}; share restored by each patch"
    )
    return apply_layout(figure, "What carries the answer", note, 140 + 30 * len(patching.sources))


def _number(tokens: Sequence[str]) -> list[str]:
    return [f"{i} {token.strip() or ' '}" for i, token in enumerate(tokens)]


def _draw_cells(
    cells: np.ndarray, rows: list[str], columns: list[str], most: float | None = None, named: Sequence[int] = ()
) -> "Figure":
    """A heat map with colors from -most to most and rows from the top; columns in `named` always show their names."""
    from plotly.graph_objects import Figure, Heatmap

    known = np.abs(cells[np.isfinite(cells)])
    most = most or float(known.max(initial=0)) or 1.0
    hover = [
        [
            f"{escape_plotly(row)}<br>{escape_plotly(column)}<br>{value:+.4g}"
            for column, value in zip(columns, line, strict=True)
        ]
        for row, line in zip(rows, cells.tolist(), strict=True)
    ]
    shown = [[None if value != value else value for value in line] for line in cells.tolist()]
    scale: dict[str, Any] = {"colorscale": SIGNED, "zmin": -most, "zmax": most, "colorbar": {"thickness": 12}}
    figure = Figure(
        Heatmap(z=shown, x=list(range(len(columns))), y=list(range(len(rows))), hovertext=hover, hoverinfo="text",
                xgap=1, ygap=1, **scale)
    )  # fmt: skip
    grid = {"showgrid": False, "zeroline": False}
    step = max(1, -(-len(columns) // WIDEST))
    ticks = sorted({*range(0, len(columns), step), *named})
    figure.update_xaxes(tickvals=ticks, ticktext=[escape_plotly(columns[i], 24) for i in ticks], tickangle=-60, **grid)
    figure.update_yaxes(tickvals=list(range(len(rows))), ticktext=[escape_plotly(row, 40) for row in rows], **grid)
    figure.update_yaxes(autorange="reversed", automargin=True)
    figure.update_xaxes(automargin=True)
    return figure


def draw_attribution(attribution: Attribution, pages: str = "", labels: Mapping[int, str] | None = None) -> str:
    """An HTML view of an attribution: the prompt with tokens colored by effect, and the largest effects; text is
    escaped.

    Args:
        attribution: result of `attribute`.
        pages: what the addresses of features' pages begin with, before the number; empty makes no links.
        labels: text by feature, in a column of its own; None leaves it out.
    """
    lines = str(attribution).split("\n")
    said = lines[: 2 + (attribution.agreement is not None)]
    scale = float(np.abs(attribution.by_token).max(initial=0)) or 1.0
    words = zip(attribution.tokens, attribution.by_token.tolist(), strict=True)
    text = "".join(_color(token, effect, scale) for token, effect in words)
    header = ["effect", "code", "feature", "token", *(["label"] if labels else [])]
    rows = [
        [f"{effect:+.4f}", f"{code:+.3f}", str(feature), f"{position} {attribution.tokens[position]}"]
        + ([labels.get(feature, "")] if labels else [])
        for position, feature, code, effect in attribution.top()
    ]
    head = "".join(paragraph(line) for line in said)
    shown = table(header, rows, links={"feature": pages} if pages else None)
    return f"{head}<p>{text}</p>{shown}"


def _color(token: str, effect: float, scale: float) -> str:
    alpha = EFFECT_OPACITY * min(1.0, abs(effect) / scale)
    style = f"background:rgb({RGB[effect > 0]} / {alpha:.2f});border-radius:3px;white-space:pre-wrap"
    return f'<span style="{style}" title="{effect:+.4g}">{show_text(token)}</span>'


register_drawing(Attribution, draw_attribution)


def draw_patching(patching: Patching) -> str:
    """An HTML table of denoising scores, sources by the positions where most is restored; text is escaped."""
    if patching.reason:
        return paragraph(str(patching).split("\n")[0])
    scores = patching.scores
    shown = np.sort(np.argsort(-np.abs(scores).max(0), kind="stable")[:N_COLUMNS]).tolist()
    header = ["", *(patching.name_column(i) for i in shown)]
    rows = [
        [name, *(f"{score:.2f}" for score in line[shown])] for name, line in zip(patching.sources, scores, strict=True)
    ]
    ends = f"{patching.metric}: clean {patching.clean:.4g}, corrupt {patching.corrupt:.4g}"
    counted = f"{len(shown)} of {scores.shape[1]} positions, where patches do most"
    return paragraph(f"{ends}; share restored, {counted}") + table(header, rows)


register_drawing(Patching, draw_patching)

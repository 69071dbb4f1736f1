"""Dose-response and trade-off figures of steering: effects and side effects by strength."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from saelab.pictures.canvas import CLEAR, LEGEND_WIDTH, OTHER, dress, line_of, say
from saelab.pictures.page import make_page, paragraph, section, table
from saelab.steering.curves import SIDES, SteeringCurve
from saelab.stores.results import register_drawing

if TYPE_CHECKING:
    from plotly.graph_objects import Figure, Scatter

AXES = {
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
    "extra_score": "score above unsteered text",
    "nll": "nll of the text, nats",
    "perplexity": "perplexity to the<br>unsteered model",
    "repetition": "repeated 4-grams",
    "entropy": "entropy of predictions, nats",
    "distinct_1": "different tokens",
    "distinct_2": "different pairs of tokens",
}
LOG = ("kl", "prompt_kl", "perplexity")
BAND = 0.16  # opacity of an interval
# the figure is drawn on a canvas of its own: the colour of its text is the page's, again when that turns dark or light
FOLLOW_THE_PAGE = """
const plot = document.getElementById("{plot_id}");
function paint() {
  Plotly.relayout(plot, {"font.color": getComputedStyle(document.documentElement).getPropertyValue("--ink").trim()});
}
paint();
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", paint);
"""


def plot_doses(curve: SteeringCurve, measures: Sequence[str] = ()) -> "Figure":
    """Dose-response curves: measures against steering strength, a panel each, a line per source, bands for intervals.

    By default: the effect on the concept (gain and selectivity, or score), the KL divergence it costs, and the
    perplexity of the generated text under the unsteered model; KL and perplexity on a log axis. Lines pass through the
    unsteered model at the strength that changes nothing. ValueError for a measure that the curve does not have.
    """
    from plotly.subplots import make_subplots

    effects = ["extra_score", "repetition"] if curve.scored else ["gain", "selectivity" if curve.others else "lift"]
    names = list(measures) or [*effects, "kl", "perplexity"]
    n_rows = (len(names) + 1) // 2
    figure = make_subplots(n_rows, 2, horizontal_spacing=0.13, vertical_spacing=0.3 / max(2, n_rows))
    for panel, measure in enumerate(names):
        place = {"row": panel // 2 + 1, "col": panel % 2 + 1}
        found = curve.estimate(measure)
        values, low, high = (np.array([getattr(one, end) for one in found]) for end in ("value", "low", "high"))
        for i, source in enumerate(curve.sources):
            order, strengths = _order(curve, source, neutral=measure not in ("kl", "prompt_kl"))
            figure.add_trace(_draw_band(strengths, low[order], high[order], i), **place)
            line = _draw_line(strengths, values[order], source, measure, i)
            figure.add_trace(line.update(showlegend=panel == 0), **place)
        scale = {"type": "log", "tickformat": "~g", "nticks": 5} if measure in LOG else {}
        figure.update_yaxes(title_text=_axis(measure), **scale, **place)
        figure.update_xaxes(title_text="strength", **place)
    legend = {"orientation": "h", "y": 1.02, "yanchor": "bottom"}
    figure.update_layout(legend=legend)
    note = f"{curve.title}; bands: 95 % intervals over {_clusters(curve)}"
    return dress(figure, "What each strength does", note, 60 + 290 * n_rows)


def plot_tradeoff(curve: SteeringCurve, measure: str | None = None) -> "Figure":
    """Effect against cost: the change of the concept and the KL divergence at every strength of every source.

    x: KL to the unsteered model on text that it wrote, log scale; y: the gain (for a scored concept, the score above
    unsteered text) or another measure, up where the concept is raised. Each source is a line through its strengths, on
    each side from the weakest; bars are 95 % intervals. The broad line behind joins the Pareto-optimal points.
    """
    from plotly.graph_objects import Figure

    measure = measure or curve.effect
    found, kl = curve.estimate(measure), curve.values("kl")
    figure = Figure()
    for side in curve.sides:
        figure.add_trace(_draw_frontier(curve, measure, side))
    for i, source in enumerate(curve.sources):
        for side in curve.sides:
            line = [j for j in curve.line(source, side) if kl[j] > 0]
            values = [found[j] for j in line]
            trace = _draw_line(kl[line], np.array([one.value for one in values]), source, measure, i, " at KL %{x:.3g}")
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
    return dress(figure, "Effect and cost", note)


def show_curve(curve: SteeringCurve, note: str = "") -> str:
    """A self-contained HTML page of a steering curve: summary, both figures, and all numbers; text is escaped."""
    figures = [plot_tradeoff(curve), plot_doses(curve)]
    drawn = [figure.update_layout(paper_bgcolor=CLEAR).to_html(**_embed(i)) for i, figure in enumerate(figures)]
    told = [paragraph(f"{name}: {what}", "small") for name, what in curve.sources.items()]
    sections = [
        section("In short", paragraph(curve.baseline), _summarise(curve), *told),
        section("At what cost", drawn[0]),
        section("Every strength", drawn[1], _list_points(curve)),
    ]
    return make_page(f"Steering {curve.concept}", f"{curve.title}. {note}".strip(), sections)


def _embed(i: int) -> dict:
    """Arguments of `to_html` for the i-th figure of a page, with a fixed id so that equal figures have equal bytes."""
    config = {"displayModeBar": False, "responsive": True}
    how = {"full_html": False, "include_plotlyjs": i == 0, "config": config, "post_script": FOLLOW_THE_PAGE}
    return how | {"div_id": f"figure-{i}"}


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
        name=say(source, LEGEND_WIDTH),
        legendgroup=str(i),
        line=line_of(i),
        marker={"size": 7},
        meta=say(measure, 40),
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


def _draw_frontier(curve: SteeringCurve, measure: str, side: int) -> "Scatter":
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


def _axis(measure: str) -> str:
    if measure.startswith("gain "):
        return f"gain of {say(measure.removeprefix('gain '), 20)}"
    if measure.startswith("extra_") and measure not in AXES:
        return f"{AXES.get(measure.removeprefix('extra_'), say(measure, 30))},<br>above unsteered text"
    return AXES.get(measure, say(measure, 30))


def _clusters(curve: SteeringCurve) -> str:
    return "prompts" if len(curve.prompts) > 1 else "texts"


def _summarise(curve: SteeringCurve) -> str:
    header, rows = curve.tell_rows()
    return table(header, rows, own=frozenset(row[0] for row in rows if row[0].split(",")[0] in SIDES.values()))


def _list_points(curve: SteeringCurve) -> str:
    measures = [name for name in curve.measures if name not in ("nll", "mass")]
    columns = [curve.values(name) for name in measures]
    rows = [
        [f"{name} {strength:+g}" if i else name, *("-" if x[i] != x[i] else f"{x[i]:.3g}" for x in columns)]
        for i, (name, strength) in enumerate(curve.points)
    ]
    return table(["", *measures], rows)


def draw_curve(curve: SteeringCurve) -> str:
    """An HTML view of a steering curve for Jupyter: summary, and all points in a closed section; text is escaped."""
    points = f"<details><summary>every strength</summary>{_list_points(curve)}</details>"
    return paragraph(curve.title) + paragraph(curve.baseline) + _summarise(curve) + points


register_drawing(SteeringCurve, draw_curve)

"""Bar chart that compares dictionaries on concept scores, as self-contained HTML."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

PANELS = ("coverage", "parent recall", "opposed pairs")
# plotly draws on a canvas of its own: its colours are read from the page, again when the page turns dark or light
FOLLOW_THE_PAGE = """
const plot = document.getElementById("{plot_id}");
function paint() {
  const style = getComputedStyle(document.documentElement), at = name => style.getPropertyValue(name).trim();
  const look = {"font.color": at("--ink")};
  for (const axis of ["xaxis", "xaxis2", "xaxis3"]) look[axis + ".gridcolor"] = at("--line");
  Plotly.relayout(plot, look);
  plot.data.forEach((trace, i) => Plotly.restyle(plot, {"marker.color": [trace.meta.own.map(
    own => trace.type == "bar" ? at(own ? "--own" : "--other") : at("--ink"))]}, [i]));
}
paint();
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", paint);
"""


@dataclass(frozen=True)
class Bar:
    """One dictionary's values in the three panels, shares in [0, 1] or NaN; `own` marks dictionaries trained here."""

    name: str
    own: bool
    coverage: float
    parent_recall: float
    opposed: float
    """share of opposed pairs that are on the two sides of one feature"""
    control: float
    """the same share of control pairs"""


def draw_comparison(bars: Sequence[Bar]) -> str:
    """Three panels of horizontal bars, one row per dictionary, as HTML; a mark at each bar shows its control pairs'
    share.
    """
    from plotly.graph_objects import Bar as Bars
    from plotly.graph_objects import Scatter
    from plotly.subplots import make_subplots

    names, meta = [bar.name for bar in bars], {"own": [bar.own for bar in bars]}
    figure = make_subplots(rows=1, cols=3, shared_yaxes=True, horizontal_spacing=0.08, subplot_titles=PANELS)
    values = ([bar.coverage for bar in bars], [bar.parent_recall for bar in bars], [bar.opposed for bar in bars])
    for i, (panel, column) in enumerate(zip(PANELS, values, strict=True)):
        said = f"%{{y}}: {panel} %{{x:.2f}}<extra></extra>"
        figure.add_trace(
            Bars(x=_plain(column), y=names, orientation="h", meta=meta, hovertemplate=said), row=1, col=i + 1
        )
    control = Scatter(
        x=_plain([bar.control for bar in bars]),
        y=names,
        mode="markers",
        cliponaxis=False,
        meta=meta,
        marker={"symbol": "line-ns-open", "size": 11, "line": {"width": 2}},
        hovertemplate="%{y}: control pairs %{x:.2f}<extra></extra>",
    )
    figure.add_trace(control, row=1, col=3)
    figure.update_xaxes(range=[0, 1.02], tickvals=[0, 0.5, 1], fixedrange=True, zeroline=False)
    figure.update_yaxes(autorange="reversed", fixedrange=True, ticksuffix=" ")
    figure.update_annotations(font_size=13)
    figure.update_layout(
        height=90 + 27 * len(bars),
        margin={"l": 8, "r": 8, "t": 36, "b": 28},
        showlegend=False,
        bargap=0.3,
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        font={"family": "system-ui, sans-serif", "size": 12},
    )
    config = {"displayModeBar": False, "responsive": True}
    how = {"config": config, "post_script": FOLLOW_THE_PAGE, "div_id": "comparison"}  # the only one of its page
    drawn: str = figure.to_html(full_html=False, include_plotlyjs=True, **how)
    return drawn.replace("\r\n", "\n")  # as a browser reads it, and so hashes it


def _plain(column: Sequence[float]) -> list[float | None]:
    return [None if math.isnan(x) else x for x in column]

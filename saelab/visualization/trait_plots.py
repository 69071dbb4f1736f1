"""Plots of traits over a conversation: levels by token, means by message, and what chance does."""

from typing import TYPE_CHECKING

import numpy as np

from saelab.steering.monitoring import MessageReading, TraitReadings
from saelab.visualization.html import CLEAR, OTHER, apply_layout, count_rows, escape_plotly, line_of

if TYPE_CHECKING:
    from plotly.graph_objects import Figure, Scatter

FAINT = 0.45  # opacity of single tokens
BAND = "rgba(128,128,128,0.16)"


def plot_levels(readings: TraitReadings) -> "Figure":
    """A line plot of the levels of traits over a conversation.

    x: tokens, with the messages' roles below; y: level, 0 and 1 at the means of the negative and positive descriptions.
    Thin lines are tokens, thick ones the mean of a message; the gray area is the range of 95 % of the first
    trait's pairs with ends exchanged.
    """
    from plotly.graph_objects import Figure

    figure = Figure()
    for row in readings.rows:
        figure.add_trace(_draw_chance(row, readings.traits[0]))
    places = np.flatnonzero(readings.kept)
    for i, name in enumerate(readings.traits):
        figure.add_trace(_draw_tokens(readings, i, places))
        for j, row in enumerate(readings.rows):
            figure.add_trace(_draw_mean(row, name, i, named=j == 0))
    for level in (0, 1):
        figure.add_hline(level, line={"dash": "dot", "width": 1, "color": OTHER})
    middles = [(row.start + row.stop - 1) / 2 for row in readings.rows]
    names = [escape_plotly(row.role, 12) for row in readings.rows]
    figure.update_xaxes(tickvals=middles, ticktext=names, showgrid=False, zeroline=False, title_text="messages")
    figure.update_yaxes(title_text="level", zeroline=False)
    figure.update_layout(legend={"orientation": "h", "y": 1.02, "yanchor": "bottom"}, plot_bgcolor=CLEAR)
    n = count_rows([int(readings.kept.sum())])
    note = f"{n}; 0 and 1: means of the negative and positive descriptions; gray: 95 % of exchanges of ends"
    return apply_layout(figure, "Traits over a conversation", note, 340)


def _draw_chance(row: MessageReading, name: str) -> "Scatter":
    from plotly.graph_objects import Scatter

    low, high = row.chance[name]
    start, stop = row.start - 0.5, row.stop - 0.5
    return Scatter(
        x=[start, stop, stop, start],
        y=[low, low, high, high],
        fill="toself",
        fillcolor=BAND,
        line={"width": 0},
        mode="lines",
        hoverinfo="skip",
        showlegend=False,
    )


def _draw_tokens(readings: TraitReadings, i: int, places: np.ndarray) -> "Scatter":
    from plotly.graph_objects import Scatter

    words = [escape_plotly(repr(readings.tokens[place])) for place in places]
    return Scatter(
        x=places,
        y=readings.levels[i, places],
        mode="lines",
        line={**line_of(i), "width": 1},
        opacity=FAINT,
        customdata=words,
        hovertemplate="%{customdata}: %{y:.2f}<extra>%{fullData.name}</extra>",
        name=escape_plotly(readings.traits[i]),
        legendgroup=str(i),
        showlegend=False,
    )


def _draw_mean(row: MessageReading, name: str, i: int, named: bool) -> "Scatter":
    from plotly.graph_objects import Scatter

    told = f"{escape_plotly(row.role)}, {row.n_tokens:,} tokens"
    return Scatter(
        x=[row.start - 0.4, row.stop - 0.6],
        y=[row.levels[name]] * 2,
        mode="lines",
        line={**line_of(i), "width": 3.5},
        hovertemplate=f"{told}: %{{y:.2f}}<extra>%{{fullData.name}}</extra>",
        name=escape_plotly(name, 30),
        legendgroup=str(i),
        showlegend=named,
    )

"""Common style of all figures: colours for light and dark backgrounds, layout, and escaping of text for plotly."""

import html
import textwrap
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

# between the light and the dark of the page's style
PLUS, MINUS, OWN, OTHER = "#e07422", "#387ddf", "#37919a", "#848e99"
SERIES = (OWN, "#c2559d", "#b58a1a", "#8066cf", "#6f9440", OTHER)
"""Colours of lines that stand for no sign."""
DASHES = ("solid", "dash", "dot", "dashdot")
CLEAR, GRID = "rgba(0,0,0,0)", "rgba(128,128,128,0.25)"
TITLE_HEIGHT, LINE_HEIGHT, LEGEND_WIDTH = 44, 22, 28


def say(text: object, width: int = 60) -> str:
    """Text escaped so that plotly shows it literally, without tags or formulas, in at most four lines of `width`.

    >>> say("<b>$x$</b>")
    '&lt;b&gt;&#36;x&#36;&lt;/b&gt;'
    """
    lines = textwrap.wrap(str(text), width, max_lines=4, placeholder=" ...")
    return "<br>".join(html.escape(line, quote=False).replace("$", "&#36;") for line in lines)


def dress(figure: "Figure", title: str, note: str, height: int = 420) -> "Figure":
    """The figure with the common layout: title and note above, light grid lines, the template's background.

    Args:
        figure: plotly figure, changed in place.
        title: plain text.
        note: plain text below the title, such as the number of tokens.
        height: height of the plot area in pixels; title and note come on top.
    """
    small = say(note, 105)
    top = TITLE_HEIGHT + LINE_HEIGHT * (small.count("<br>") + 1)
    figure.update_layout(
        title={
            "text": f'{say(title, 80)}<br><span style="font-size:12px">{small}</span>',
            "font": {"size": 17},
            "x": 0.01,
            "y": 1,
            "yref": "container",
            "yanchor": "top",
            "pad": {"t": 24},
        },
        font={"family": "system-ui, sans-serif"},
        plot_bgcolor=CLEAR,
        height=height + top,
        margin={"l": 72, "r": 24, "t": top + 30, "b": 56},
        hoverlabel={"align": "left"},
        legend={"bgcolor": CLEAR},
    )
    figure.update_xaxes(gridcolor=GRID, linecolor=GRID, zerolinecolor=GRID, title_standoff=8)
    figure.update_yaxes(gridcolor=GRID, linecolor=GRID, zerolinecolor=GRID, title_standoff=8)
    return figure


def write_over(figure: "Figure", text: str) -> None:
    """Write the reason why a figure is empty into its middle."""
    figure.add_annotation(text=say(text), showarrow=False, xref="paper", yref="paper", x=0.5, y=0.5, font={"size": 15})


def line_of(i: int) -> dict[str, Any]:
    """Colour and dash of the i-th line of a figure with many."""
    return {"color": SERIES[i % len(SERIES)], "dash": DASHES[i // len(SERIES) % len(DASHES)]}


def count_tokens(counts: Iterable[int]) -> str:
    """Number of tokens of one result, or the range of several, as text.

    >>> count_tokens([4096]), count_tokens([4096, 1024])
    ('4,096 tokens', '1,024 to 4,096 tokens')
    """
    low, high = min(counts := list(counts)), max(counts)
    return f"{high:,} tokens" if low == high else f"{low:,} to {high:,} tokens"

"""What figures share: colours that are read on white and on dark, one layout, text that plotly shows as it is."""

import html
import textwrap
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

# between the light and the dark of the page's style
PLUS, MINUS, OWN, OTHER = "#e07422", "#387ddf", "#37919a", "#848e99"
SERIES = (OWN, "#c2559d", "#b58a1a", "#8066cf", "#6f9440", OTHER)
"""Of lines that mean no sign."""
DASHES = ("solid", "dash", "dot", "dashdot")
CLEAR, GRID = "rgba(0,0,0,0)", "rgba(128,128,128,0.25)"
TITLE_HEIGHT, LINE_HEIGHT, LEGEND_WIDTH = 44, 22, 28


def say(text: object, width: int = 60) -> str:
    """Anybody's text as plotly shows it word for word: no tag, no formula, in lines of `width`, at most four.

    >>> say("<b>$x$</b>")
    '&lt;b&gt;&#36;x&#36;&lt;/b&gt;'
    """
    lines = textwrap.wrap(str(text), width, max_lines=4, placeholder=" ...")
    return "<br>".join(html.escape(line, quote=False).replace("$", "&#36;") for line in lines)


def dress(figure: "Figure", title: str, note: str, height: int = 420) -> "Figure":
    """The layout of all figures: a title and a note (plain text) above, light lines, the background of the template."""
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
    """Say in the middle of a figure why there is nothing to see."""
    figure.add_annotation(text=say(text), showarrow=False, xref="paper", yref="paper", x=0.5, y=0.5, font={"size": 15})


def line_of(i: int) -> dict[str, Any]:
    """Colour and dash of the i-th of many lines."""
    return {"color": SERIES[i % len(SERIES)], "dash": DASHES[i // len(SERIES) % len(DASHES)]}


def count_tokens(counts: Iterable[int]) -> str:
    """Of one or several results.

    >>> count_tokens([4096]), count_tokens([4096, 1024])
    ('4,096 tokens', '1,024 to 4,096 tokens')
    """
    low, high = min(counts := list(counts)), max(counts)
    return f"{high:,} tokens" if low == high else f"{low:,} to {high:,} tokens"

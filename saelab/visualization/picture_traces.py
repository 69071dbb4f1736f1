"""Lines, bars and heat maps of plotly figures as matplotlib draws them; plotly's colors, texts and arrays."""

import base64
import re
from collections.abc import Mapping, Sequence
from html import unescape
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Colormap

POINT = 0.72
"""Points of a pixel: plotly's sizes are pixels, of which a picture has 100 an inch."""
COLORS = (
    "#636efa", "#EF553B", "#00cc96", "#ab63fa", "#FFA15A", "#19d3f3", "#FF6692", "#B6E880", "#FF97FF", "#FECB52",
)  # fmt: skip
"""of traces that name none, as plotly chooses them"""
DASHES = {
    "solid": "-",
    "dash": "--",
    "dot": ":",
    "dashdot": "-.",
    "longdash": (0, (8, 3)),
    "longdashdot": (0, (8, 3, 1, 3)),
}
SYMBOLS = {
    "circle": "o", "triangle-up": "^", "triangle-down": "v", "diamond": "D", "square": "s", "x": "X", "x-thin": "x",
    "cross": "P", "star": "*",
}  # fmt: skip
TAG = re.compile(r"<[^>]*>")
GROUP_GAP = 0.2
"""Share of a bar's place that is left empty, unless the figure says otherwise."""


def read_array(values: Any) -> np.ndarray:
    """An array of a figure, also where plotly wrote it as base64."""
    if isinstance(values, Mapping):
        flat = np.frombuffer(base64.b64decode(values["bdata"]), np.dtype(values["dtype"]))
        shape = values.get("shape")
        return flat.reshape([int(n) for n in str(shape).split(",")]) if shape else flat
    return np.asarray(values)


def read_numbers(values: Any) -> np.ndarray:
    """An array of numbers, NaN for None."""
    found = read_array(values)
    return np.array([np.nan if x is None else x for x in found.ravel()], float).reshape(found.shape)


def plain_text(text: str) -> str:
    """Text of a figure without its tags; exponents are set by matplotlib.

    >>> plain_text("10<sup>-3</sup><br>a &lt;b&gt;")
    '10$^{-3}$\\na <b>'
    """
    parts = re.split(r"<sup>(.*?)</sup>", str(text).replace("<br>", "\n"))
    said = [unescape(TAG.sub("", part)).replace("$", r"\$") for part in parts]
    return "".join(f"$^{{{part}}}$" if i % 2 else part for i, part in enumerate(said))


def read_color(color: Any) -> Any:
    """A color of plotly, such as "rgba(0,128,255,0.5)", as matplotlib takes it."""
    found = re.fullmatch(r"rgba?\(([^)]*)\)", str(color))
    if not found:
        return color
    *rgb, alpha = [float(part) for part in found[1].split(",")] + ([1.0] if color.startswith("rgb(") else [])
    return (*(part / 255 for part in rgb), alpha)


def read_scale(stops: Sequence[Sequence[Any]]) -> "Colormap":
    """A color scale of plotly, pairs of a share and a color, as matplotlib has it."""
    from matplotlib.colors import LinearSegmentedColormap

    return LinearSegmentedColormap.from_list("", [(share, read_color(color)) for share, color in stops])


def draw_scatter(axes: "Axes", trace: Mapping[str, Any], color: str, legend: bool) -> Any:
    """Draw lines, points, areas and their error bars; what a color bar describes comes back, else None.

    Args:
        axes: panel to draw in.
        trace: plotly's scatter trace.
        color: color of a trace that names none.
        legend: whether the legend names it.
    """
    x, y = read_array(trace.get("x", ())), read_array(trace.get("y", ()))
    mode, line, marker = trace.get("mode", "lines"), trace.get("line", {}), trace.get("marker", {})
    name = plain_text(trace.get("name", "")) if legend else None
    own = read_color(
        line.get("color") or (marker.get("color") if isinstance(marker.get("color"), str) else None) or color
    )
    alpha = trace.get("opacity")
    if trace.get("fill") == "toself":
        axes.fill(x, y, color=read_color(trace.get("fillcolor", color)), linewidth=0)
        return None
    if "lines" in mode:
        width, dash = line.get("width", 2) * POINT, DASHES.get(line.get("dash", "solid"), "-")
        axes.plot(x, y, color=own, linewidth=width, linestyle=dash, alpha=alpha, label=name, solid_capstyle="round")
        name = None
    if "error_y" in trace:
        axes.errorbar(x, y, _read_errors(trace["error_y"]), fmt="none", ecolor=own, elinewidth=1, capsize=3)
    return _draw_markers(axes, x, y, trace, own, name) if "markers" in mode and len(x) else None


def _draw_markers(axes: "Axes", x: Any, y: Any, trace: Mapping[str, Any], own: Any, name: str | None) -> Any:
    marker = trace.get("marker", {})
    symbol = str(marker.get("symbol", "circle"))
    sizes = np.broadcast_to(np.asarray(marker.get("size", 6), float), np.shape(x)) * POINT
    values = marker.get("color")
    scaled = "colorscale" in marker
    how: dict[str, Any] = {"marker": SYMBOLS.get(symbol.removesuffix("-open"), "o"), "s": sizes**2, "label": name}
    if scaled:
        how |= {"c": read_numbers(values), "cmap": read_scale(marker["colorscale"])}
    elif symbol.endswith("-open") and not symbol.startswith("x-thin"):
        how |= {"facecolors": "none", "edgecolors": own}
    else:
        how |= {"color": own}
    drawn = axes.scatter(x, y, alpha=marker.get("opacity", trace.get("opacity")), zorder=3, **how)
    return drawn if scaled else None


def _read_errors(error: Mapping[str, Any]) -> Any:
    above = read_numbers(error["array"])
    below = read_numbers(error["arrayminus"]) if "arrayminus" in error else above
    return np.nan_to_num(np.stack([below, above]))


def draw_bars(axes: "Axes", traces: Sequence[tuple[Mapping[str, Any], str, bool]], layout: Mapping[str, Any]) -> None:
    """Draw the bars of one panel side by side, stacked or over one another, as the figure's `barmode` has it.

    Args:
        axes: panel to draw in.
        traces: bars, each with its color and whether the legend names it.
        layout: the figure's layout.
    """
    flat = [trace.get("orientation") == "h" for trace, _, _ in traces]
    across = [read_array(trace["y" if lies else "x"]) for (trace, _, _), lies in zip(traces, flat, strict=True)]
    places, ticks = _place(across)
    every = np.concatenate(places) if places else np.zeros(0)
    distinct = np.unique(every)
    free = (float(np.diff(distinct).min()) if len(distinct) > 1 else 1.0) * (1 - layout.get("bargap", GROUP_GAP))
    beside = layout.get("barmode", "group") == "group" and len(distinct) < len(every)
    stacked: dict[tuple[float, bool], float] = {}
    for i, ((trace, color, legend), at, lies) in enumerate(zip(traces, places, flat, strict=True)):
        sizes = np.nan_to_num(read_numbers(trace["x" if lies else "y"]))
        width = trace.get("width", free / (len(traces) if beside else 1))
        at = at + (i - (len(traces) - 1) / 2) * width if beside else at
        start = np.zeros(len(sizes))
        if layout.get("barmode") == "stack":
            keys = [(float(place), bool(size < 0)) for place, size in zip(at, sizes, strict=True)]
            start = np.array([stacked.get(key, 0.0) for key in keys])
            stacked |= {key: base + size for key, base, size in zip(keys, start, sizes, strict=True)}
        _draw_bar(axes, trace, at, sizes, start, width, lies, color, legend)
    if ticks:
        (axes.set_yticks if flat[0] else axes.set_xticks)(list(range(len(ticks))), [plain_text(tick) for tick in ticks])


def _place(across: Sequence[np.ndarray]) -> tuple[list[np.ndarray], list[str]]:
    """Places of bars and, of those that stand for names, the names."""
    if all(values.dtype.kind in "fiu" for values in across):
        return [values.astype(float) for values in across], []
    names = list(dict.fromkeys(str(value) for values in across for value in values))
    return [np.array([names.index(str(value)) for value in values], float) for values in across], names


def _draw_bar(
    axes: "Axes", trace: Mapping[str, Any], at: Any, sizes: Any, start: Any, width: float, lies: bool, color: str,
    legend: bool,
) -> None:  # fmt: skip
    own = trace.get("marker", {}).get("color", color)
    colors = [read_color(one) for one in own] if isinstance(own, list | tuple) else read_color(own)
    how: dict[str, Any] = {
        "color": colors,
        "linewidth": 0,
        "label": plain_text(trace.get("name", "")) if legend else None,
    }
    draw = axes.barh if lies else axes.bar
    bars = draw(at, sizes, width, **how, **{"left" if lies else "bottom": start})
    if "text" in trace:
        ink = read_color(trace.get("textfont", {}).get("color", "#000000"))
        axes.bar_label(
            bars, [plain_text(text) for text in trace["text"]], label_type="center", color=ink, fontsize=12 * POINT
        )
    if "error_y" in trace:
        axes.errorbar(
            at, sizes + start, _read_errors(trace["error_y"]), fmt="none", ecolor="#19212b", elinewidth=1, capsize=3
        )


def draw_heatmap(axes: "Axes", trace: Mapping[str, Any]) -> Any:
    """Draw a heat map with gaps between its cells; unknown values stay empty."""
    z = np.ma.masked_invalid(read_numbers(trace["z"]))
    columns, rows = (
        read_numbers(trace[name]) if name in trace else np.arange(n, dtype=float)
        for name, n in zip("xy", z.shape[::-1], strict=True)
    )
    limits: dict[str, Any] = {"vmin": trace.get("zmin"), "vmax": trace.get("zmax")}
    edges: dict[str, Any] = {"edgecolors": "white", "linewidth": trace.get("xgap", 0) * POINT}
    return axes.pcolormesh(
        _find_edges(columns), _find_edges(rows), z, cmap=read_scale(trace["colorscale"]), **limits, **edges
    )


def _find_edges(centers: np.ndarray) -> np.ndarray:
    if len(centers) == 1:
        return np.array([centers[0] - 0.5, centers[0] + 0.5])
    middle = [(a + b) / 2 for a, b in pairwise(centers)]
    return np.array([2 * centers[0] - middle[0], *middle, 2 * centers[-1] - middle[-1]])

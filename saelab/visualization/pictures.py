"""`draw_picture`: a plotly figure as a PNG, drawn by matplotlib, for viewers that do not run plotly; `with_picture`.

No browser is needed, and nothing is started. What saelab's figures are made of is drawn: lines, points and areas, bars,
heat maps, panels, annotations, and lines across panels.
"""

import base64
import io
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import cache
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import numpy as np

from saelab.visualization.picture_traces import (
    COLORS,
    DASHES,
    POINT,
    draw_bars,
    draw_heatmap,
    draw_scatter,
    plain_text,
    read_color,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.transforms import Transform
    from plotly.graph_objects import Figure

SIZE = 900, 450
"""Pixels of a figure that names no size."""
MARGIN = {"l": 80, "r": 80, "t": 100, "b": 80}
DPI, N_COLORS = 140, 128
FRAME, GRID = "#d5dbe1", (0.5, 0.5, 0.5, 0.25)
RUN = ("application/vnd.plotly.v1+json", "text/html")
"""what plotly displays for viewers that run it"""
TRACES = ("scatter", "bar", "heatmap")
LARGE = 10_000
"""What is shown in thousands or millions."""
COLORBAR = 0.012
"""Width of a color bar, as a share of the picture's."""


def can_draw_pictures() -> bool:
    """Whether matplotlib is installed, with which pictures are drawn."""
    return find_spec("matplotlib") is not None


def draw_picture(figure: Any, dpi: int = DPI) -> bytes:
    """A plotly figure as a PNG file's bytes, on white, at the figure's own size of 100 pixels an inch.

    Args:
        figure: plotly figure, or its JSON as notebooks store it.
        dpi: pixels an inch; 200 draws twice the figure's size.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: the figure has traces other than lines, points, bars and heat maps.
    """
    plain = figure if isinstance(figure, Mapping) else figure.to_dict()
    data, layout = plain.get("data", []), plain.get("layout", {})
    if unknown := [trace.get("type", "scatter") for trace in data if trace.get("type", "scatter") not in TRACES]:
        raise ValueError(f"A picture's traces must be of {', '.join(TRACES)}, got {unknown[0]}. Remove them.")
    with _style():
        return _Picture(layout).draw(data, dpi)


def with_picture(figure: "Figure") -> "Figure":
    """The figure, changed in place: notebooks display and store it with a PNG beside what plotly draws.

    Viewers that run no scripts, as GitHub's, show the picture. It is left out where matplotlib is not installed, and
    where the figure was given traces that `draw_picture` refuses. In all else the figure is plotly's, of a subclass.
    """
    figure.__class__ = _pictured()  # which adds methods alone; a copy would forget its panels
    return figure


@cache
def _pictured() -> type:
    """The subclass of plotly's figure that displays itself with a picture."""
    import plotly.io as pio
    from plotly.graph_objects import Figure

    class PicturedFigure(Figure):
        """A plotly figure whose display bundle holds a PNG too."""

        def _repr_mimebundle_(self, *args: Any, **kwargs: Any) -> Any:
            bundle = super()._repr_mimebundle_(*args, **kwargs)
            if any(kind in bundle for kind in RUN) and can_draw_pictures():
                with suppress(ValueError):  # of traces that were added
                    bundle.setdefault("image/png", base64.b64encode(draw_picture(self)).decode())
            return bundle

        def _ipython_display_(self) -> None:
            if pio.renderers.render_on_display:
                self.show()
            else:
                super()._ipython_display_()

        def show(self, *args: Any, **kwargs: Any) -> None:
            """Display the figure as plotly does; with its default renderer in a notebook, with a picture beside it."""
            bundle = {} if args or kwargs else self._repr_mimebundle_()
            if not bundle:
                super().show(*args, **kwargs)
                return
            from IPython.display import display

            display(bundle, raw=True)

        def __reduce__(self) -> Any:
            return with_picture, (Figure(self.to_dict()),)

    return PicturedFigure


@contextmanager
def _style() -> Iterator[None]:
    """Context manager with matplotlib's own defaults, whatever the user has set, which is the same afterwards."""
    try:
        from matplotlib import style
    except ImportError:
        raise ImportError("Pictures need matplotlib, which is not installed. `pip install matplotlib`.") from None
    with style.context("default", after_reset=True):
        yield


def _shrink(file: io.BytesIO) -> bytes:
    """A PNG with a palette, a third as large: few colors are in a figure. Pillow comes with matplotlib."""
    from PIL import Image

    small = io.BytesIO()
    Image.open(file).convert("RGB").quantize(N_COLORS, dither=Image.Dither.NONE).save(small, "png", optimize=True)
    return small.getvalue()


class _Picture:
    """A picture in the making: a canvas with a panel for each pair of axes of the layout."""

    def __init__(self, layout: Mapping[str, Any]) -> None:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure as Canvas
        from matplotlib.transforms import Bbox, BboxTransformTo

        self.layout = layout
        width, height = layout.get("width") or SIZE[0], layout.get("height") or SIZE[1]
        self.canvas = Canvas(figsize=(width / 100, height / 100), facecolor="white")
        FigureCanvasAgg(self.canvas)
        margin = MARGIN | layout.get("margin", {})
        self.box = Bbox.from_extents(
            margin["l"] / width, margin["b"] / height, 1 - margin["r"] / width, 1 - margin["t"] / height
        )
        self.paper = BboxTransformTo(self.box) + self.canvas.transFigure
        self.panels: dict[tuple[str, str], Axes] = {}
        self.legend: list[tuple[Any, str]] = []

    def draw(self, data: Any, dpi: int) -> bytes:
        """Draw all traces and everything around them; the bytes of the PNG."""
        bars: dict[tuple[str, str], list[Any]] = {}
        named = self.layout.get("showlegend", len([trace for trace in data if trace.get("showlegend", True)]) > 1)
        for i, trace in enumerate(data):
            place = trace.get("xaxis", "x"), trace.get("yaxis", "y")
            panel, color = self._find_panel(*place), COLORS[i % len(COLORS)]
            legend = bool(named and trace.get("showlegend", True) and trace.get("name"))
            kind = trace.get("type", "scatter")
            if kind == "bar":
                bars.setdefault(place, []).append((trace, color, legend))
            elif kind == "heatmap":
                scaled = draw_heatmap(panel, trace)
                if trace.get("showscale", True):
                    self._add_colorbar(panel, scaled, trace.get("colorbar", {}))
            elif (scaled := draw_scatter(panel, trace, color, legend)) is not None:
                self._add_colorbar(panel, scaled, trace.get("marker", {}).get("colorbar", {}))
        for place, traces in bars.items():
            draw_bars(self.panels[place], traces, self.layout)
        self._scale()
        for shape in self.layout.get("shapes", ()):
            self._draw_shape(shape)
        for note in self.layout.get("annotations", ()):
            self._annotate(note)
        self._add_legend()
        self._add_title()
        file = io.BytesIO()
        self.canvas.savefig(file, format="png", dpi=dpi, bbox_inches="tight", pad_inches=0.12)
        return _shrink(file)

    def _find_panel(self, x: str, y: str) -> "Axes":
        """The panel of two axes, made on first use."""
        if (x, y) not in self.panels:
            left, right = self._axis(x).get("domain", (0, 1))
            low, high = self._axis(y).get("domain", (0, 1))
            box = self.box
            place = box.x0 + left * box.width, box.y0 + low * box.height
            panel = self.canvas.add_axes((*place, (right - left) * box.width, (high - low) * box.height))
            for axis in (x, y):
                if self._axis(axis).get("type") == "log":
                    (panel.set_xscale if axis[0] == "x" else panel.set_yscale)("log")
            self.panels[x, y] = panel
        return self.panels[x, y]

    def _axis(self, name: str) -> Mapping[str, Any]:
        """The layout of an axis by its short name, such as "x2"."""
        found: Mapping[str, Any] = self.layout.get(f"{name[0]}axis{name[1:]}", {})
        return found

    # ---- axes
    def _scale(self) -> None:
        """Limits, ticks, grid lines and titles of all axes."""
        for (x, y), panel in self.panels.items():
            panel.set_axisbelow(True)
            for side, spine in panel.spines.items():
                spine.set_visible(side in ("left", "bottom"))
                spine.set_color(FRAME)
            for name, axis in ((x, panel.xaxis), (y, panel.yaxis)):
                about = self._axis(name)
                self._limit(panel, name, about)
                self._set_ticks(axis, about)
                axis.set_tick_params(labelsize=12 * POINT, color=FRAME)
                if about.get("showgrid", True):
                    axis.grid(True, color=GRID, linewidth=0.8)
                title = about.get("title", {})
                text = title.get("text", "") if isinstance(title, Mapping) else title
                axis.set_label_text(plain_text(text or ""), fontsize=13 * POINT)
        self._match()

    def _limit(self, panel: "Axes", name: str, about: Mapping[str, Any]) -> None:
        read, write = (panel.get_xlim, panel.set_xlim) if name[0] == "x" else (panel.get_ylim, panel.set_ylim)
        if about.get("range"):
            low, high = (10**end if about.get("type") == "log" else end for end in about["range"])
            write(low, high)
        if about.get("rangemode") == "tozero":
            low, high = read()
            write(min(low, 0), max(high, 0))
        if about.get("autorange") == "reversed":
            write(*sorted(read(), reverse=True))

    def _set_ticks(self, axis: Any, about: Mapping[str, Any]) -> None:
        from matplotlib import ticker

        if not about.get("showticklabels", True):
            axis.set_major_formatter(ticker.NullFormatter())
            axis.set_minor_formatter(ticker.NullFormatter())
            axis.set_tick_params(which="both", length=0)
        elif about.get("tickvals") is not None:
            texts = [plain_text(text) for text in about.get("ticktext") or about["tickvals"]]
            angle = -about.get("tickangle", 0)
            turned = {"rotation": angle, "ha": "right", "rotation_mode": "anchor"} if angle else {}
            axis.set_ticks(list(about["tickvals"]), texts, **turned)
            axis.set_minor_locator(ticker.NullLocator())
        elif about.get("type") == "log":
            low, high = sorted(axis.get_view_interval())
            wide = about.get("dtick") == 1 or np.log10(high / max(low, 1e-300)) > 3
            axis.set_major_locator(ticker.LogLocator(subs=(1,) if wide else (1, 2, 5)))
            axis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:g}"))
            axis.set_minor_locator(ticker.NullLocator())
        elif str(about.get("tickformat", "")).endswith("%"):
            axis.set_major_formatter(ticker.PercentFormatter(1, decimals=0))
        elif np.abs(axis.get_view_interval()).max() >= LARGE:
            axis.set_major_formatter(ticker.EngFormatter(sep=""))

    def _match(self) -> None:
        """Give axes that match others the range of all of these."""
        for direction in "xy":
            groups: dict[str, list[Axes]] = {}
            for pair, panel in self.panels.items():
                name = pair[direction == "y"]
                groups.setdefault(self._axis(name).get("matches", name), []).append(panel)
            for panels in groups.values():
                ends = [panel.get_xlim() if direction == "x" else panel.get_ylim() for panel in panels]
                limits = (
                    (min if ends[0][0] <= ends[0][1] else max)(low for low, _ in ends),
                    (max if ends[0][0] <= ends[0][1] else min)(high for _, high in ends),
                )
                for panel in panels:
                    (panel.set_xlim if direction == "x" else panel.set_ylim)(limits)

    # ---- what stands around the panels
    def _find_transform(self, x: str, y: str) -> "Transform":
        """The transform of places in two references, such as "x2", "y domain" and "paper"."""
        from matplotlib.transforms import blended_transform_factory

        parts = []
        for reference in (x, y):
            name = reference.removesuffix(" domain")
            panel = next((panel for pair, panel in self.panels.items() if name in pair), None)
            if reference == "paper" or panel is None:
                parts.append(self.paper)
            else:
                parts.append(panel.transAxes if reference.endswith("domain") else panel.transData)
        return blended_transform_factory(*parts)

    def _find_value(self, reference: str, value: Any) -> Any:
        return 10**value if self._axis(reference).get("type") == "log" else value

    def _draw_shape(self, shape: Mapping[str, Any]) -> None:
        from matplotlib.lines import Line2D

        if shape.get("type") != "line":
            return
        x, y, line = shape.get("xref", "x"), shape.get("yref", "y"), shape.get("line", {})
        dash, color = DASHES.get(line.get("dash", "solid"), "-"), read_color(line.get("color", "#19212b"))
        # a shape's places on a log axis are values, those of annotations exponents
        ends = [shape["x0"], shape["x1"]], [shape["y0"], shape["y1"]]
        drawn = Line2D(*ends, transform=self._find_transform(x, y), color=color, linestyle=dash)
        drawn.set_linewidth(line.get("width", 2) * POINT)
        self.canvas.add_artist(drawn)

    def _annotate(self, note: Mapping[str, Any]) -> None:
        x, y = note.get("xref", "x"), note.get("yref", "y")
        sides = {"top": "top", "bottom": "bottom", "middle": "center"}
        self.canvas.text(
            self._find_value(x, note["x"]),
            self._find_value(y, note["y"]),
            plain_text(note["text"]),
            transform=self._find_transform(x, y),
            ha=note.get("xanchor") if note.get("xanchor") in ("left", "right") else "center",
            va=sides.get(note.get("yanchor", ""), "center"),
            fontsize=note.get("font", {}).get("size", 12) * POINT,
        )

    def _add_colorbar(self, panel: "Axes", drawn: Any, about: Mapping[str, Any]) -> None:
        box = panel.get_position()
        place = self.canvas.add_axes((box.x1 + COLORBAR, box.y0, COLORBAR, box.height))
        bar = self.canvas.colorbar(drawn, cax=place)
        bar.outline.set_visible(False)
        bar.ax.tick_params(labelsize=11 * POINT)
        if "tickvals" in about:
            bar.set_ticks(list(about["tickvals"]), labels=[plain_text(text) for text in about["ticktext"]])
        bar.ax.set_title(plain_text(about.get("title", {}).get("text", "")), fontsize=11 * POINT, loc="left", pad=10)

    def _add_legend(self) -> None:
        found = [
            pair for panel in self.panels.values() for pair in zip(*panel.get_legend_handles_labels(), strict=True)
        ]
        if not found:
            return
        about, lies = self.layout.get("legend", {}), self.layout.get("legend", {}).get("orientation") == "h"
        place = (about.get("x", 0), about.get("y", -0.1)) if lies else (about.get("x", 1.02), about.get("y", 1))
        corner = "lower" if about.get("yanchor") == "bottom" else "upper"
        self.canvas.legend(
            *zip(*found, strict=True),
            loc=f"{corner} left",
            bbox_to_anchor=place,
            bbox_transform=self.paper,
            ncols=len(found) if lies else 1,
            frameon=False,
            fontsize=12 * POINT,
            borderaxespad=0,
        )

    def _add_title(self) -> None:
        """The title and, smaller, the note below it."""
        title = self.layout.get("title", {})
        text = title.get("text", "") if isinstance(title, Mapping) else title
        if not text:
            return
        first, _, note = map(plain_text, text.partition("<br>"))
        size = title.get("font", {}).get("size", 17) if isinstance(title, Mapping) else 17
        _, height = self.canvas.get_size_inches()
        # above the legend and all else, which may reach higher than the margin
        top = self.canvas.get_tightbbox().y1 / height + 10 / (100 * height)
        drawn = self.canvas.text(0.01, top, note, fontsize=12 * POINT, va="bottom", color="#5b6673", linespacing=1.4)
        above = drawn.get_window_extent().y1 / self.canvas.bbox.height + 6 / (100 * height)
        self.canvas.text(0.01, above, first, fontsize=size * POINT, va="bottom")

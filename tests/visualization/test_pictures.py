"""Pictures of figures: what is drawn and where, what viewers get beside plotly's figure; nothing is started."""

import base64
import copy
import importlib.util
import io
import json
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from saelab.visualization import pictures, plot_training
from saelab.visualization.picture_traces import plain_text, read_color, read_numbers
from saelab.visualization.pictures import draw_picture

PNG, PLOTLY = "image/png", "application/vnd.plotly.v1+json"
RED, BLUE = "#ff0000", "#0000ff"
HISTORY: list[dict[str, Any]] = [{"n_tokens": 64, "l0": 4.0}, {"n_tokens": 128, "l0": 3.5}]
NEEDS = pytest.mark.skipif(importlib.util.find_spec("matplotlib") is None, reason="matplotlib is not installed")


def see(figure: Any) -> np.ndarray:
    """The pixels of a figure's picture, rows by columns by red, green, blue."""
    image = pytest.importorskip("PIL.Image").open(io.BytesIO(draw_picture(figure)))
    return np.asarray(image.convert("RGB")).astype(int)


def find(pixels: np.ndarray, color: str) -> tuple[np.ndarray, np.ndarray]:
    """Rows and columns, as shares of the picture, of the pixels of nearly a color."""
    wanted = [int(color[i : i + 2], 16) for i in (1, 3, 5)]
    rows, columns = np.nonzero(np.abs(pixels - wanted).sum(2) < 60)
    assert len(rows), f"there is no {color}"
    return rows / pixels.shape[0], columns / pixels.shape[1]


@NEEDS
def test_bars_lie_where_their_values_are() -> None:
    names = ["a", "b"]
    pixels = see({"data": [{"type": "bar", "x": names, "y": [4, 1], "marker": {"color": [RED, BLUE]}}], "layout": {}})
    red, blue = find(pixels, RED), find(pixels, BLUE)
    assert red[1].max() < blue[1].min() and len(red[0]) == pytest.approx(4 * len(blue[0]), rel=0.1)
    stacked = {"data": [{"type": "bar", "x": names, "y": [1, 1], "marker": {"color": color}} for color in (RED, BLUE)]}
    third = {"type": "bar", "x": names, "y": [1, 1], "marker": {"color": "#00ff00"}}
    pixels = see({"data": [*stacked["data"], third], "layout": {"barmode": "stack"}})
    assert find(pixels, "#00ff00")[0].max() <= find(pixels, BLUE)[0].min() + 0.02
    pixels = see({**stacked, "layout": {"barmode": "stack"}})
    red, blue = find(pixels, RED), find(pixels, BLUE)
    assert blue[0].max() <= red[0].min() + 0.02 and abs(np.median(red[1]) - np.median(blue[1])) < 0.05
    pixels = see({**stacked, "layout": {"barmode": "group"}})
    assert abs(find(pixels, RED)[0].min() - find(pixels, BLUE)[0].min()) < 0.01
    lying = {"type": "bar", "orientation": "h", "y": names, "x": [1, 3], "marker": {"color": [RED, BLUE]}}
    red, blue = (find(see({"data": [lying], "layout": {}}), color) for color in (RED, BLUE))
    assert red[0].min() > blue[0].max() - 0.02 and np.ptp(blue[1]) == pytest.approx(3 * np.ptp(red[1]), rel=0.1)
    turned = see({"data": [lying], "layout": {"yaxis": {"autorange": "reversed"}}})
    assert find(turned, RED)[0].max() < find(turned, BLUE)[0].min() + 0.02


@NEEDS
def test_lines_follow_log_axes_and_panels_their_domains() -> None:
    line = {"x": [1, 10, 100], "y": [1, 10, 100], "mode": "lines", "line": {"color": RED}}
    rows, columns = find(see({"data": [line], "layout": {"xaxis": {"type": "log"}, "yaxis": {"type": "log"}}}), RED)
    assert np.corrcoef(rows, columns)[0, 1] < -0.99  # a power law is straight there
    rows, columns = find(see({"data": [line], "layout": {"xaxis": {"type": "log"}}}), RED)
    assert np.corrcoef(rows, columns)[0, 1] > -0.95
    panels = {
        "xaxis": {"domain": [0, 0.4]},
        "xaxis2": {"domain": [0.6, 1.0], "anchor": "y2"},
        "yaxis2": {"anchor": "x2"},
    }
    other = {**line, "xaxis": "x2", "yaxis": "y2", "line": {"color": BLUE}}
    pixels = see({"data": [line, other], "layout": {**panels, "showlegend": False}})
    assert find(pixels, RED)[1].max() < 0.5 < find(pixels, BLUE)[1].min()


@NEEDS
def test_cells_and_notes_of_a_heat_map_have_their_places() -> None:
    cells = {
        "type": "heatmap",
        "z": [[-1, None], [None, 1]],
        "zmin": -1,
        "zmax": 1,
        "colorscale": [[0, BLUE], [1, RED]],
    }
    blank = {"showticklabels": False, "showgrid": False}
    marks = [{"x": 1, "y": 0, "text": "\u2588\u2588", "font": {"size": 30}, "showarrow": False}]
    pixels = see({"data": [cells], "layout": {"xaxis": blank, "yaxis": blank, "annotations": marks}})[
        :, : -pixels_of_bar()
    ]
    assert find(pixels, BLUE)[0].min() > 0.4 and find(pixels, BLUE)[1].max() < 0.6
    assert find(pixels, RED)[0].max() < 0.6 and find(pixels, RED)[1].min() > 0.4
    rows, columns = find(pixels, "#000000")
    assert np.median(rows) > 0.6 and np.median(columns) > 0.6  # in an empty cell


@NEEDS
def test_a_heat_map_without_a_scale_has_no_bar() -> None:
    cells = {"type": "heatmap", "z": [[-1, 1]], "zmin": -1, "zmax": 1, "colorscale": [[0, BLUE], [1, RED]]}
    ends = [
        find(see({"data": [{**cells, "showscale": shown}], "layout": {}}), BLUE)[1].max() for shown in (True, False)
    ]
    assert ends[1] < 0.6 < 0.9 < ends[0]


def pixels_of_bar() -> int:
    return 120  # of the color bar at the right, which has all colors


@NEEDS
def test_a_figure_is_displayed_with_a_picture_beside_it(monkeypatch: pytest.MonkeyPatch) -> None:
    import matplotlib
    import plotly.io as pio

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a program was started")

    monkeypatch.setattr(subprocess, "Popen", refuse)
    monkeypatch.setattr(pio.renderers, "default", "plotly_mimetype")
    monkeypatch.setitem(matplotlib.rcParams, "axes.facecolor", "black")
    before, loaded = dict(matplotlib.rcParams), "matplotlib.pyplot" in sys.modules
    figure = plot_training({"<b>$x$</b>": HISTORY, "other": HISTORY})
    bundle = figure._repr_mimebundle_()
    assert set(bundle) == {PLOTLY, PNG} and base64.b64decode(bundle[PNG]).startswith(b"\x89PNG")
    assert dict(matplotlib.rcParams) == before and ("matplotlib.pyplot" in sys.modules) == loaded
    shown: list[Any] = []
    monkeypatch.setattr("IPython.display.display", lambda bundle, raw: shown.append((set(bundle), raw)))
    figure.show()
    figure._ipython_display_()
    assert shown == [({PLOTLY, PNG}, True)] * 2
    again = pickle.loads(pickle.dumps(figure))
    assert again == figure and type(again) is type(figure) is type(copy.deepcopy(figure))
    figure.add_violin(y=[1, 2, 3], row=1, col=1)  # the figure still knows its panels
    assert set(figure._repr_mimebundle_()) == {PLOTLY}
    with pytest.raises(ValueError, match="got violin"):
        draw_picture(figure)


@NEEDS
def test_a_picture_has_the_size_of_its_figure() -> None:
    figure = plot_training({"": [{**entry, "lr": 1.0} for entry in HISTORY]})
    small, large = (pictures.draw_picture(figure, dpi) for dpi in (100, 200))
    sizes = [np.array(pytest.importorskip("PIL.Image").open(io.BytesIO(one)).size) for one in (small, large)]
    assert np.allclose(sizes[1], 2 * sizes[0], atol=3) and abs(sizes[0][0] - 900) < 100
    assert draw_picture(figure) == draw_picture(json.loads(figure.to_json())), "as notebooks store it"


def test_without_matplotlib_figures_are_displayed_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    import plotly.io as pio

    monkeypatch.setattr(pio.renderers, "default", "plotly_mimetype")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr("saelab.visualization.pictures.can_draw_pictures", lambda: False)
    figure = plot_training({"": HISTORY})
    assert set(figure._repr_mimebundle_()) == {PLOTLY}
    with pytest.raises(ImportError, match="pip install matplotlib"):
        draw_picture(figure)


def test_arrays_colors_and_texts_are_read_as_plotly_writes_them() -> None:
    packed = {"bdata": base64.b64encode(np.arange(6, dtype="f4").tobytes()).decode(), "dtype": "f4", "shape": "2, 3"}
    assert read_numbers(packed).tolist() == [[0, 1, 2], [3, 4, 5]] and np.isnan(read_numbers([1, None])).tolist() == [
        False,
        True,
    ]
    assert read_color("rgba(255, 0,51,0.5)") == (1, 0, 0.2, 0.5) and read_color("rgb(0,0,0)") == (0, 0, 0, 1)
    assert read_color("#37919a") == "#37919a" and plain_text("<b>a</b> &lt;$&#36;") == r"a <\$\$"


def test_every_figure_of_the_notebooks_has_a_picture() -> None:
    folder = Path(__file__).resolve().parents[2] / "notebooks"
    if not folder.is_dir():
        pytest.skip("no notebooks here: installed without its repository")
    cells = [cell for path in folder.glob("*.ipynb") for cell in json.loads(path.read_text("utf-8"))["cells"]]
    figures = [out["data"] for cell in cells for out in cell.get("outputs", []) if PLOTLY in out.get("data", {})]
    assert len(figures) >= 12
    for data in figures:
        assert base64.b64decode(data[PNG]).startswith(b"\x89PNG\r\n")

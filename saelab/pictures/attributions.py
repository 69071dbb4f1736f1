"""Heat maps of attribution and activation patching results, and their display in Jupyter."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float

from saelab.pictures.canvas import MINUS, PLUS, dress, say, write_over
from saelab.pictures.cards import show_text
from saelab.pictures.page import paragraph, table
from saelab.steering.effects import Attribution
from saelab.steering.patching import Patching
from saelab.stores.results import register_drawing

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

SIGNED = [[0.0, MINUS], [0.5, "rgba(56,125,223,0.04)"], [0.5, "rgba(224,116,34,0.04)"], [1.0, PLUS]]
STRONGEST = 0.7  # opacity of the largest effect: the text stays readable on it
WIDEST = 40  # columns whose names are still written out
N_COLUMNS = 12  # of a table
RGB = {True: "222 110 24", False: "38 112 214"}


def plot_attribution(attribution: Attribution, n: int = 15) -> "Figure":
    """A heat map of attribution effects: the features with the largest effects by tokens of the prompt.

    Two more rows show the summed effects of all other features and of the reconstruction errors. x: tokens; y: the `n`
    features whose effects have the largest summed size; colour: change of the metric when the code is replaced, in the
    metric's units, blue where the metric falls. ValueError for `n` below 1.

    >>> sae = sl.SAE(sl.SAEConfig(d_in=32, d_sae=64, activation=sl.TopK(k=4)))
    >>> from saelab.steering.attribution import attribute
    >>> found = attribute(sl.tiny_model(), sae, "Hello", "!", hook_point="blocks.1.hook_resid_post")
    >>> len(plot_attribution(found, n=3).data[0].y)
    5
    """
    if n < 1:
        raise ValueError(f"`n` must be at least 1 feature, got {n}.")
    sizes = np.bincount(attribution.features, np.abs(attribution.effects), 1)
    chosen = [int(i) for i in np.argsort(-sizes, kind="stable")[:n] if sizes[i] > 0]
    rows = [_effects_of(attribution, attribution.features == i) for i in chosen]
    rows += [_effects_of(attribution, ~np.isin(attribution.features, chosen)), attribution.errors]
    names = [*(f"feature {i}" for i in chosen), "other features", "errors"]
    figure = _draw_cells(np.stack(rows), names, _number(attribution.tokens))
    how = f"{attribution.method}, {attribution.n_steps} steps" if attribution.n_steps else attribution.method
    ends = f"{attribution.clean:.4g} as it is, {attribution.patched:.4g} with all replaced ({attribution.baseline})"
    how += f", completeness {attribution.completeness:.3f}"
    note = f"{attribution.metric} at {attribution.hook_point}; {ends}; {how}"
    return dress(figure, "Effects of features", note, 120 + 26 * len(rows))


def _effects_of(attribution: Attribution, chosen: np.ndarray) -> Float[np.ndarray, "n_tokens"]:
    return np.bincount(attribution.positions[chosen], attribution.effects[chosen], len(attribution.tokens))


def plot_patching(patching: Patching) -> "Figure":
    """A heat map of denoising scores from activation patching, with the first source at the bottom.

    x: positions, as corrupt>clean where the prompts differ; y: what was patched; colour: share of the difference
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
    return dress(figure, "What carries the answer", note, 140 + 30 * len(patching.sources))


def _number(tokens: Sequence[str]) -> list[str]:
    return [f"{i} {token.strip() or ' '}" for i, token in enumerate(tokens)]


def _draw_cells(
    cells: np.ndarray, rows: list[str], columns: list[str], most: float | None = None, named: Sequence[int] = ()
) -> "Figure":
    """A heat map with colours from -most to most and rows from the top; columns in `named` always show their names."""
    from plotly.graph_objects import Figure, Heatmap

    known = np.abs(cells[np.isfinite(cells)])
    most = most or float(known.max(initial=0)) or 1.0
    hover = [
        [f"{say(row)}<br>{say(column)}<br>{value:+.4g}" for column, value in zip(columns, line, strict=True)]
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
    figure.update_xaxes(tickvals=ticks, ticktext=[say(columns[i], 24) for i in ticks], tickangle=-60, **grid)
    figure.update_yaxes(tickvals=list(range(len(rows))), ticktext=[say(row, 40) for row in rows], **grid)
    figure.update_yaxes(autorange="reversed", automargin=True)
    figure.update_xaxes(automargin=True)
    return figure


def draw_attribution(attribution: Attribution) -> str:
    """An HTML view of an attribution: the prompt with tokens coloured by effect, and the largest effects; text is
    escaped.
    """
    lines = str(attribution).split("\n")
    said = lines[: 2 + (attribution.agreement is not None)]
    scale = float(np.abs(attribution.by_token).max(initial=0)) or 1.0
    words = zip(attribution.tokens, attribution.by_token.tolist(), strict=True)
    text = "".join(_colour(token, effect, scale) for token, effect in words)
    rows = [
        [f"{effect:+.4f}", f"{code:+.3f}", str(feature), f"{position} {attribution.tokens[position]}"]
        for position, feature, code, effect in attribution.top()
    ]
    head = "".join(paragraph(line) for line in said)
    return f"{head}<p>{text}</p>{table(['effect', 'code', 'feature', 'token'], rows)}"


def _colour(token: str, effect: float, scale: float) -> str:
    alpha = STRONGEST * min(1.0, abs(effect) / scale)
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

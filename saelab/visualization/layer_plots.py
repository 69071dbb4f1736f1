"""Plots of a model's layers: measures beside their nulls, words read from each layer, and how near a lens comes."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from saelab.analysis.layer_profiles import LayerMeasure, LayerProfile
from saelab.analysis.token_lens import TokenLens
from saelab.analysis.tuned_lens import READERS, LensScores, TunedLens
from saelab.analysis.word_vectors import WordGeometry
from saelab.stores.results import register_drawing
from saelab.visualization.feature_cards import show_text
from saelab.visualization.html import (
    MINUS,
    OTHER,
    OWN,
    apply_layout,
    decimal,
    escape,
    escape_plotly,
    line_of,
    paragraph,
    table,
)

if TYPE_CHECKING:
    from plotly.graph_objects import Figure, Scatter

N_COLUMNS = 3
PANEL, LEGEND = 190, 28
"""heights of a row of panels and of the legend above them, in pixels"""
SHOWN = 32
"""tokens of a prompt that are drawn, the last ones"""
WIDEST = 12
"""characters of a word in a figure"""
DEEP = [[0.0, "rgba(128,128,128,0.05)"], [1.0, "rgba(55,145,154,0.65)"]]
"""colors on which text is readable with light and dark backgrounds"""
CELL = "padding:1px 6px;white-space:pre;text-align:left;font-size:12px;border:1px solid rgba(128,128,128,.15)"
NULLS = {"text": OWN, "shuffled": MINUS, "chance": OTHER}


def plot_layer_profile(profile: LayerProfile, measures: Sequence[str] | None = None) -> "Figure":
    """A panel for each measure of a profile: the text as it is, with shuffled tokens, and by chance.

    x: blocks that were run; y: mean over groups of prompts, bars their standard deviation. `measures` are names, None
    is all; KeyError for one that is not there.

    >>> model = sl.lm.tiny_model()
    >>> tokens = sl.tokenize(model, [f"{n} owls see {2 * n} cats" for n in range(10, 40)], ctx_len=12)
    >>> found = sl.analysis.layer_profile(model, tokens, length=10, n_groups=3, progress=False)
    >>> len(plot_layer_profile(found, ["entropy", "rank"]).data)
    5
    """
    from plotly.subplots import make_subplots

    chosen = [profile[name] for name in measures] if measures is not None else list(profile.measures)
    n_rows = math.ceil(len(chosen) / N_COLUMNS)
    cells: list[list[Any]] = [
        [{} if N_COLUMNS * row + column < len(chosen) else None for column in range(N_COLUMNS)] for row in range(n_rows)
    ]
    titles = [one.name.replace("_", " ") for one in chosen]
    gaps = {"horizontal_spacing": 0.08, "vertical_spacing": 0.3 / n_rows}
    figure = make_subplots(n_rows, N_COLUMNS, subplot_titles=titles, specs=cells, **gaps)
    for i, one in enumerate(chosen):
        place = {"row": i // N_COLUMNS + 1, "col": i % N_COLUMNS + 1}
        for line in _draw_measure(one, is_first=i == 0):
            figure.add_trace(line, **place)
    figure.update_xaxes(rangemode="tozero", dtick=max(1, len(profile.hook_points) // 6))
    note = (
        f"{profile.model}, {profile.source}: {profile.n_tokens:,} tokens of {profile.n_prompts:,} prompts in "
        f"{profile.n_groups} groups, seed {profile.seed}; x: blocks run; bars: standard deviation over groups"
    )
    return _lay_out_panels(figure, "Layers", note, n_rows)


def _lay_out_panels(figure: "Figure", title: str, note: str, n_rows: int) -> "Figure":
    """The common layout, with room for a legend in a row between the note and the panels' titles."""
    figure = apply_layout(figure, title, note, PANEL * n_rows + 30)
    figure.update_layout(
        legend={"orientation": "h", "y": 1.0 + 0.2 / n_rows, "yanchor": "bottom"},
        height=figure.layout.height + LEGEND,
        margin={"t": figure.layout.margin.t + LEGEND},
    )
    return figure


def _draw_measure(one: LayerMeasure, is_first: bool) -> "list[Scatter]":
    from plotly.graph_objects import Scatter

    sides = {"text": one.text, "shuffled": one.shuffled} | ({} if one.chance is None else {"chance": one.chance})
    lines = []
    for name, values in sides.items():
        known = ~np.isnan(values).any(1)
        lines.append(
            Scatter(
                x=np.flatnonzero(known),
                y=values[known].mean(1),
                error_y={"type": "data", "array": values[known].std(1, ddof=1), "thickness": 1, "width": 3},
                mode="lines+markers",
                name=name,
                legendgroup=name,
                showlegend=is_first,
                line={"color": NULLS[name], "dash": "solid" if name == "text" else "dot"},
                marker={"size": 5},
                hovertemplate="%{y:.4g} after %{x} blocks<extra>%{fullData.name}</extra>",
            )
        )
    return lines


def plot_word_geometry(found: WordGeometry, measures: Sequence[str] | None = None) -> "Figure":
    """A panel for each measure of words: its value by layer, and where 95 % of permuted words would be.

    x: layers, or blocks where it is of attention; y: the measure. `measures` are names, None is all.
    """
    from plotly.graph_objects import Scatter
    from plotly.subplots import make_subplots

    names = list(dict.fromkeys(row.measure for row in found.rows)) if measures is None else list(measures)
    n_rows = math.ceil(len(names) / N_COLUMNS)
    gaps = {"horizontal_spacing": 0.08, "vertical_spacing": 0.3 / n_rows}
    titles = [name.replace("_", " ") for name in names]
    figure = make_subplots(n_rows, N_COLUMNS, subplot_titles=titles, **gaps)
    for i, name in enumerate(names):
        place = {"row": i // N_COLUMNS + 1, "col": i % N_COLUMNS + 1}
        rows = [row for row in found.rows if row.measure == name]
        x = list(range(len(rows)))
        value = Scatter(x=x, y=[row.value for row in rows], mode="lines+markers", name="text", line={"color": OWN},
                        showlegend=i == 0, legendgroup="text")  # fmt: skip
        reach = [1.96 * row.chance_std for row in rows]
        null = Scatter(x=x, y=[row.chance for row in rows], error_y={"type": "data", "array": reach}, mode="markers",
                       name="words permuted, 95 %", marker={"color": OTHER, "size": 4}, showlegend=i == 0,
                       legendgroup="null")  # fmt: skip
        figure.add_trace(value, **place)
        figure.add_trace(null, **place)
    figure.update_xaxes(dtick=1)
    note = (
        f"{found.model}, {found.source}: {found.n_words:,} words, {found.n_in_topics:,} in {len(found.topics)} topics, "
        f"{found.n_tokens:,} tokens, {found.n_permutations} permutations, seed {found.seed}; x: layers"
    )
    return _lay_out_panels(figure, "Words in each layer", note, n_rows)


def plot_lens(found: TokenLens) -> "Figure":
    """A heat map of a prompt: tokens by layers, each with the likeliest next word, colored by its probability.

    Of a long prompt the last 32 tokens. The layers begin at the left, the model's own predictions are at the right.

    >>> found = sl.analysis.lens(sl.lm.tiny_model(), "Hello")
    >>> len(plot_lens(found).layout.annotations)
    24
    """
    from plotly.graph_objects import Figure, Heatmap

    first = max(0, len(found.tokens) - SHOWN)
    n_tokens, columns = len(found.tokens) - first, range(len(found.hook_points))
    hover = [[_list_words(found, layer, first + i) for layer in columns] for i in range(n_tokens)]
    figure = Figure(
        Heatmap(
            z=[[float(found.probabilities[layer, first + i, 0]) for layer in columns] for i in range(n_tokens)],
            x=list(columns), y=list(range(n_tokens)), hovertext=hover, hoverinfo="text", zmin=0, zmax=1, xgap=1, ygap=1,
            colorscale=DEEP, colorbar={"thickness": 12, "title": {"text": "p"}},
        )
    )  # fmt: skip
    for i in range(n_tokens):
        for layer in columns:
            word = _cut(found.words[layer][first + i][0])
            figure.add_annotation(x=layer, y=i, text=escape_plotly(word) or " ", showarrow=False, font={"size": 12})
    grid = {"showgrid": False, "zeroline": False}
    figure.update_xaxes(tickvals=list(columns), ticktext=[escape_plotly(name, 24) for name in found.columns], **grid)
    names = [escape_plotly(f"{first + i} {_cut(found.tokens[first + i])}") for i in range(n_tokens)]
    figure.update_yaxes(tickvals=list(range(n_tokens)), ticktext=names, autorange="reversed", automargin=True, **grid)
    kl = ", ".join(f"{x:.2f}" for x in found.kl.mean(1))
    permuted = ", ".join(f"{x:.2f}" for x in found.kl_permuted)
    note = f"{found.model}; mean KL by layer {kl} nats; between different tokens {permuted}"
    return apply_layout(figure, f"What each layer predicts ({found.lens} lens)", note, 90 + 24 * n_tokens)


def _list_words(found: TokenLens, layer: int, token: int) -> str:
    words = zip(found.words[layer][token], found.probabilities[layer, token].tolist(), strict=True)
    listed = "<br>".join(f"{escape_plotly(repr(word))} {p:.3f}" for word, p in words)
    return f"{escape_plotly(found.columns[layer])}, KL {found.kl[layer, token]:.3f}<br>{listed}"


def _cut(word: str) -> str:
    shown = repr(word)[1:-1].strip()
    return shown if len(shown) <= WIDEST else f"{shown[: WIDEST - 1]}\u2026"


def plot_lens_scores(scores: LensScores) -> "Figure":
    """KL of the model's predictions from those of each layer, by the logit lens, the tuned lens, and both nulls.

    x: layers; y: nats a token, on held-out documents; bars are 95 % intervals.
    """
    from plotly.graph_objects import Figure, Scatter

    figure = Figure()
    for i, name in enumerate(READERS):
        kl = np.array([row.kl[name] for row in scores.rows])
        ends = np.array([row.kl_interval[name] for row in scores.rows]).T
        figure.add_trace(
            Scatter(
                x=list(range(len(kl))), y=kl, mode="lines+markers", name=f"{name} lens" if i < 2 else name,
                error_y={"type": "data", "symmetric": False, "array": (ends[1] - kl).clip(0),
                         "arrayminus": (kl - ends[0]).clip(0)},
                line=line_of(i), hovertemplate="%{y:.3f} nats<extra>%{fullData.name}</extra>",
            )
        )  # fmt: skip
    names = [escape_plotly(row.hook_point, 24) for row in scores.rows]
    figure.update_xaxes(tickvals=list(range(len(names))), ticktext=names)
    figure.update_yaxes(title_text="KL to the model, nats", rangemode="tozero")
    note = (
        f"{scores.source}: {scores.n_train:,} tokens trained in {scores.n_steps:,} steps, {scores.n_tokens:,} held out "
        f"of {scores.n_documents:,} documents; seed {scores.seed}"
    )
    return apply_layout(figure, "How near each layer's predictions come", note)


def draw_lens(found: TokenLens) -> str:
    """An HTML table of the words read from each layer, colored by probability, with the others in titles; text is
    escaped.
    """
    lines = str(found).split("\n")
    first = max(0, len(found.tokens) - SHOWN)
    head = "".join(f'<th style="{CELL}">{escape(name)}</th>' for name in ("token", *found.columns))
    rows = []
    for i in range(first, len(found.tokens)):
        cells = [f'<th style="{CELL}">{show_text(found.tokens[i])}</th>']
        for layer in range(len(found.hook_points)):
            words, p = found.words[layer][i], found.probabilities[layer, i].tolist()
            title = ", ".join(f"{word!r} {x:.3f}" for word, x in zip(words, p, strict=True))
            color = f"background:rgb(55 145 154 / {0.65 * p[0]:.2f})"
            told = f'title="{escape(title)}; KL {found.kl[layer, i]:.3f}"'
            cells.append(f'<td style="{CELL};{color}" {told}>{show_text(words[0])}</td>')
        rows.append(f"<tr>{''.join(cells)}</tr>")
    for name, values in (("KL, mean", found.kl.mean(1)), ("KL, permuted", found.kl_permuted)):
        means = "".join(f'<td style="{CELL}">{decimal(x)}</td>' for x in values.tolist())
        rows.append(f'<tr><th style="{CELL}">{name}</th>{means}</tr>')
    shown = (
        f'<table style="border-collapse:collapse"><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table>'
    )
    return paragraph(lines[0]) + paragraph(lines[1]) + shown + paragraph(found.limits)


register_drawing(TokenLens, draw_lens)


def draw_layer_profile(profile: LayerProfile) -> str:
    """HTML tables of a profile: what is not told from a null, then every measure by layer; text is escaped."""
    lines = str(profile).split("\n")
    untold = [[one.measure, one.null, ", ".join(map(str, one.layers))] for one in profile.untold]
    parts = [paragraph(line) for line in lines[:3]]
    if untold:
        parts.append(table(["measure", "no different from", "layers"], untold))
    header = ["layer", *(one.name for one in profile.measures)]
    rows = [[str(i), *(_describe(one, i) for one in profile.measures)] for i in range(len(profile.hook_points))]
    return "".join(
        [*parts, paragraph("mean \u00b1 sd of groups (shuffled)"), table(header, rows), paragraph(profile.limits)]
    )


def _describe(one: LayerMeasure, layer: int) -> str:
    value = one.mean[layer]
    return "-" if math.isnan(value) else f"{value:.3g} \u00b1 {one.std[layer]:.2g} ({one.shuffled[layer].mean():.3g})"


register_drawing(LayerProfile, draw_layer_profile)


def draw_tuned_lens(lens: TunedLens) -> str:
    """An HTML table of a tuned lens' scores; text is escaped."""
    return paragraph(repr(lens)) + (draw_lens_scores(lens.scores) if lens.scores is not None else "")


def draw_lens_scores(scores: LensScores) -> str:
    """An HTML table of how near each reader comes to the model, the nulls that it fails first; text is escaped."""
    lines = str(scores).split("\n")
    header = ["", *(f"KL {name}" for name in READERS), *(f"same, {name}" for name in READERS)]
    rows = [
        [row.hook_point, *(decimal(row.kl[name], 3) for name in READERS),
         *(decimal(row.agreement[name], 3) for name in READERS)]
        for row in scores.rows
    ]  # fmt: skip
    return paragraph(lines[0]) + paragraph(lines[1]) + table(header, rows) + paragraph(scores.limits)


register_drawing(LensScores, draw_lens_scores)
register_drawing(TunedLens, draw_tuned_lens)

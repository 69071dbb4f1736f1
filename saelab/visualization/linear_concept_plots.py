"""Figures of linear concepts: exchanged subspaces, effects by positions, cosines of concepts, contrast pairs."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from saelab.interventions.effect_positions import EffectPositions
from saelab.probing.contrast_pairs import UnsupervisedDirections
from saelab.probing.distributed_alignment import AlignmentSearch
from saelab.probing.unembedding_geometry import ConceptGeometry
from saelab.visualization.html import MINUS, PLUS, apply_layout, escape_plotly, line_of, write_over

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

SPACES = {"euclidean": "plain inner product", "causal": "causal inner product"}
OPPOSED = [[0.0, MINUS], [0.5, "rgba(128,128,128,0.08)"], [1.0, PLUS]]


def plot_alignment(found: AlignmentSearch) -> "Figure":
    """Interchange accuracy and score of each kind of subspace, a point for each seed; nulls at the top.

    x: share, 0 as the base and 1 as the source; y: the kind of subspace.

    >>> model = sl.lm.tiny_model()
    >>> pairs = [(f"{a} sees Ann", f"{a} sees Tom", "R", "^") for a in ("I", "He", "She", "It", "Who", "One")]
    >>> how = {"seeds": [0], "n_epochs": 1, "progress": False}
    >>> len(plot_alignment(sl.probing.align(model, pairs, "blocks.2.hook_resid_post", **how)).data)
    2
    """
    names = [f"{row.name} ({row.rank})" for row in found.rows]
    values = {"accuracy": [row.accuracies for row in found.rows], "score": [row.scores for row in found.rows]}
    figure = _draw_points(names, values, "share of what the source has")
    of = f"{found.hook_point}, {found.position}, rank {found.rank}"
    note = f"{of}; {found.n_held} held-out pairs, {len(found.seeds)} seeds"
    return apply_layout(figure, "What exchanges the answer", note, 170 + 34 * len(names))


def plot_effect_positions(found: EffectPositions) -> "Figure":
    """Share of a direction's effect at groups of positions, beside as many random positions, a point for each seed.

    Without shares the figure says why.
    """
    names = [f"{row.name} ({row.n_tokens:,})" for row in found.rows]
    values = {
        "random positions": [found.random_shares(row.name) for row in found.rows],
        "the group": [found.shares(row.name) for row in found.rows],
    }
    figure = _draw_points(names, values, "share of the effect at all positions")
    if found.reason:
        write_over(figure, f"No shares: {found.reason}.")
    note = f"{found.name} at {found.hook_point}; {found.metric}; {found.n_texts:,} texts, {len(found.seeds)} seeds"
    return apply_layout(figure, "Where the effect passes", note, 190 + 40 * len(names))


def plot_contrasts(found: UnsupervisedDirections) -> "Figure":
    """Held-out accuracies of directions found without labels, on the label and on a planted distractor."""
    names = [row.name for row in found.rows]
    values = {"label": [row.accuracies for row in found.rows]}
    if found.distractors:
        values["label, distractor appended"] = [row.distracted for row in found.rows]
        values["the distractor"] = [row.distractor for row in found.rows]
    figure = _draw_points(names, values, "held-out accuracy, either sign")
    figure.update_xaxes(range=[0.48, 1.02])
    note = f"{found.hook_point}; {found.n_held} held-out pairs, {len(found.seeds)} seeds; no labels but in the last row"
    return apply_layout(figure, "What is found without labels", note, 190 + 40 * len(names))


def plot_concepts(found: ConceptGeometry) -> "Figure":
    """Heat maps of the cosines of concepts' directions in the unembedding, by the plain and causal inner products."""
    from plotly.subplots import make_subplots

    figure = make_subplots(1, 2, horizontal_spacing=0.04, shared_yaxes=True, subplot_titles=list(SPACES.values()))
    names = [escape_plotly(name, 24) for name in found.names]
    ticks = {"tickvals": list(range(len(names))), "ticktext": names, "automargin": True, "showgrid": False}
    for column, space in enumerate(SPACES, 1):
        pairs = [[f"{a}, {b}" for b in names] for a in names]
        figure.add_heatmap(
            z=found.cosines[space], x=ticks["tickvals"], y=ticks["tickvals"], hovertext=pairs, zmin=-1, zmax=1,
            colorscale=OPPOSED, xgap=1, ygap=1, hovertemplate="%{hovertext}: %{z:.3f}<extra></extra>",
            showscale=column == 2, colorbar={"thickness": 12}, row=1, col=column,
        )  # fmt: skip
    figure.update_yaxes(autorange="reversed", zeroline=False, **ticks)
    figure.update_xaxes(tickangle=-60, zeroline=False, **ticks)
    drawn = ", ".join(
        f"{space} {found.between(space):.3f} (random {np.mean(found.random_cosines[space]):.3f})" for space in SPACES
    )
    return apply_layout(figure, "Concepts in the unembedding", f"mean |cosine| of independent ones: {drawn}", 460)


def _draw_points(names: Sequence[str], values: Mapping[str, Sequence[Sequence[float]]], title: str) -> "Figure":
    """Points of several series for each name, from the top, and a line from 0 to their mean."""
    from plotly.graph_objects import Figure, Scatter

    figure, step = Figure(), 0.6 / max(1, len(values))
    for i, (series, rows) in enumerate(values.items()):
        at = [(j + step * (i - (len(values) - 1) / 2), value) for j, row in enumerate(rows) for value in row]
        places, shown = zip(*at, strict=True) if at else ((), ())
        figure.add_trace(
            Scatter(
                x=[None if value != value else value for value in shown],
                y=places,
                mode="markers",
                name=escape_plotly(series),
                marker={"size": 9, "opacity": 0.8, "color": line_of(i)["color"]},
                hovertemplate="%{x:.3f}<extra>%{fullData.name}</extra>",
            )
        )
    figure.update_yaxes(
        tickvals=list(range(len(names))), ticktext=[escape_plotly(name, 40) for name in names], autorange="reversed",
        zeroline=False, automargin=True,
    )  # fmt: skip
    figure.update_xaxes(title_text=title)
    figure.update_layout(showlegend=True, legend={"orientation": "h", "y": 1.02, "yanchor": "bottom"})
    return figure

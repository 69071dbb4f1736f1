"""Figures of the geometry of features: lobes by their number, spectra of clouds of directions, and crystals."""

from typing import TYPE_CHECKING

import numpy as np

from saelab.geometry.direction_clouds import UNTRAINED, Galaxy
from saelab.geometry.lobe_results import Lobes
from saelab.geometry.relation_crystals import RANDOM, Crystals
from saelab.visualization.html import OTHER, OWN, apply_layout, line_of

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

Z_LIMIT = 3


def plot_lobes(found: Lobes) -> "Figure":
    """How far lobes are groups of directions, by their number: z of the contrast of cosines above, agreement (AMI) with
    what features mean below; without labels that with clusters of directions.

    Each baseline has a line of its own; Gaussian directions and permuted meanings are gray.
    """
    from plotly.graph_objects import Scatter
    from plotly.subplots import make_subplots

    figure = make_subplots(rows=2, cols=1, shared_xaxes=True, vertical_spacing=0.1)
    value = "meaning" if found.scores[0].meaning == found.scores[0].meaning else "ami"
    lines = {"SAE": found, **found.baselines}
    x = [str(score.n_lobes) for score in found.scores]
    for row, what in ((1, "contrast_z"), (2, value)):
        for i, (name, one) in enumerate(lines.items()):
            y = [getattr(score, what) for score in one.scores]
            line = Scatter(x=x, y=y, name=name, legendgroup=name, showlegend=row == 1, line=line_of(i))
            figure.add_trace(line, row=row, col=1)
        null = "Gaussian directions" if what != "meaning" else "meanings permuted"
        y = [_null(score, what) for score in found.scores]
        line = Scatter(x=x, y=y, name=null, line={"color": OTHER, "dash": "dot"})
        figure.add_trace(line, row=row, col=1)
    figure.update_yaxes(title_text="z of the contrast", row=1, col=1)
    told = "topics and the like" if value == "meaning" else "clusters of directions"
    figure.update_yaxes(title_text=f"AMI with<br>{told}", row=2, col=1)
    figure.update_xaxes(type="category")
    figure.update_xaxes(title_text="lobes", row=2, col=1)
    note = (
        f"{found.n_features:,} features, {found.n_windows:,} windows of {found.window} {found.counted}, affinity "
        f"{found.affinity}; z against lobes of the same sizes at random"
    )
    return apply_layout(figure, "Do features that fire together lie together?", note, 440)


def _null(score: object, what: str) -> float:
    if what == "meaning":
        return float(score.meaning_permuted)  # type: ignore[attr-defined]
    return float(np.mean(getattr(score, "contrast_z_random" if what == "contrast_z" else "ami_random")))


def plot_galaxy(found: Galaxy) -> "Figure":
    """Spectra of clouds of directions: variance along each principal component, as a share, both axes logarithmic.

    Each dictionary has a line, the first draw of an untrained one of the first is gray.
    """
    from plotly.graph_objects import Figure

    figure = Figure()
    for i, row in enumerate(found.rows):
        name = f"{row.name or 'directions'}, slope {row.cloud.slope:.2f}"
        figure.add_trace(_spectrum(row.cloud.variances, name, line_of(i)))
    null = found.rows[0].nulls[UNTRAINED][0]
    gray = {"color": OTHER, "dash": "dot"}
    figure.add_trace(_spectrum(null.variances, f"untrained, slope {null.slope:.2f}", gray))
    figure.update_xaxes(title_text="rank of the principal component", type="log")
    figure.update_yaxes(title_text="share of the variance", type="log")
    sizes = ", ".join(f"{row.n_rows:,} rows of {row.d:,} dimensions" for row in found.rows[:1])
    excess = ", ".join(f"{row.name + ' ' if row.name else ''}{row.excess():+.1f}" for row in found.rows)
    note = f"{sizes}; clustering entropy above Gaussian rows of norm 1, nats: {excess}"
    return apply_layout(figure, "The cloud of directions", note)


def _spectrum(variances: np.ndarray, name: str, line: dict[str, str]) -> object:
    from plotly.graph_objects import Scatter

    kept = variances > 1e-9
    return Scatter(x=np.flatnonzero(kept) + 1, y=variances[kept], name=name, mode="lines", line=line)


def plot_crystals(found: Crystals) -> "Figure":
    """Parallelism of the differences of pairs, for each treatment of the vectors, beside both nulls.

    Bars of nulls are means over draws; whiskers are the smallest and the largest.
    """
    from plotly.graph_objects import Bar, Figure

    scores = [score for score in found.scores if score.space != RANDOM]
    x = [score.space for score in scores]
    figure = Figure(Bar(x=x, y=[score.contrast for score in scores], name="pairs", marker={"color": OWN}))
    for i, what in enumerate(("permuted_pairs", "permuted_relations")):
        draws = [np.array(getattr(score, what)) for score in scores]
        means = [float(one.mean()) for one in draws]
        bars = {
            "type": "data",
            "array": [float(one.max()) - mean for one, mean in zip(draws, means, strict=True)],
            "arrayminus": [mean - float(one.min()) for one, mean in zip(draws, means, strict=True)],
        }
        color = (OTHER, "rgba(132,142,153,0.45)")[i]
        name = what.replace("_", " ")
        figure.add_trace(Bar(x=x, y=means, name=name, error_y=bars, marker={"color": color}))
    figure.update_yaxes(title_text="cosine within relations<br>less across")
    figure.update_layout(barmode="group")
    note = f"{found.n_pairs:,} pairs of {len(found.relations)} relations; {found.n_draws} draws of each null"
    return apply_layout(figure, "Do pairs of one relation differ by one vector?", note)

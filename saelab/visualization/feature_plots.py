"""Plots of features: histograms of firing rates and codes, dead features, detectors of concepts, and a t-SNE map."""

import math
from collections.abc import Mapping
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Bool, Float, Int

from saelab.analysis.density import KINDS, DeadFeatures
from saelab.analysis.feature_similarity import NearestFeatures
from saelab.evaluation.dissection import Dissection
from saelab.sae.sae import SAE
from saelab.stores.feature_store import FeatureStore
from saelab.visualization.html import MINUS, OTHER, OWN, PLUS, apply_layout, count_rows, escape_plotly, write_over

if TYPE_CHECKING:
    from plotly.graph_objects import Bar, Figure, Scatter

PER_DECADE = 5  # as fine as bins can be when 1, 2, 3, 4 firings are to leave none of them empty
N_BINS = 40  # on each side of 0
KIND_COLORS = dict(zip(KINDS, (OTHER, "#b58a1a", OWN, "#c2559d", "#8066cf"), strict=True))
LEGIBLE = 0.05  # share of a bar from which its count is written inside
FEWEST = 4
PERPLEXITY = 30.0
LABELED, UNLABELED = 11, 6
RATES = [[0.0, OTHER], [0.5, OWN], [1.0, "#c2559d"]]


def plot_density(store: FeatureStore, *, near_dead_rate: float = 1e-5, dense_rate: float = 0.1) -> "Figure":
    """A histogram of the features' firing rates, from the counts of a store.

    x: share of tokens on which a feature fires (z != 0), log10, five bins per decade; y: number of features. Features
    that never fire in N tokens are a separate bar at the left, as their rate is only known to be below 3 / N. For
    signed codes two more panels count the firings of each sign alone. Lines mark the limits of near-dead and of dense
    features. ValueError where the limits are not in order.
    """
    from plotly.subplots import make_subplots

    if not 0 <= near_dead_rate < dense_rate <= 1:
        raise ValueError(
            f"Rates must satisfy 0 <= near_dead_rate < dense_rate <= 1, got {near_dead_rate} and {dense_rate}."
        )
    fires, n = store.statistics.fires, len(store)
    sides = [("any firing" if store.signed else "", fires.sum(1), OWN)]
    if store.signed:
        sides += [("positive", fires[:, 0], PLUS), ("negative", fires[:, 1], MINUS)]
    figure = make_subplots(rows=len(sides), cols=1, shared_xaxes=True, vertical_spacing=0.07)
    for row, (name, counts, color) in enumerate(sides, 1):
        figure.add_trace(_count_rates(store, counts, name, color), row=row, col=1)
        figure.update_yaxes(title_text=f"features<br>{name}".removesuffix("<br>"), row=row, col=1)
    for name, rate in (("near-dead", near_dead_rate), ("dense", dense_rate)):
        if rate * n >= 1:  # or the line would stand among those that never fire
            _mark_rate(figure, name, rate)
    _scale_rates(figure, n)
    figure.update_xaxes(
        title_text=f"share of {store.counted} on which a feature fires (log scale)", row=len(sides), col=1
    )
    never = f"never: no firing, so a rate below 3/N = {3 / n:.2g} (95 %)"
    note = f"{store.d_sae:,} features on {count_rows([n], store.counted)}; {never}"
    return apply_layout(figure, "How often features fire", note, 300 if len(sides) == 1 else 560)


def _mark_rate(figure: "Figure", name: str, rate: float) -> None:
    x, label = math.log10(rate), {"text": name, "font": {"size": 12}, "showarrow": False, "yanchor": "bottom"}
    figure.add_vline(x, line={"dash": "dot", "color": OTHER}, row="all", col=1)
    figure.add_annotation(x=x, y=1, yref="y domain", **label)


def _scale_rates(figure: "Figure", n_tokens: int) -> None:
    decades = range(math.ceil(-math.log10(n_tokens)), 1)
    figure.update_xaxes(
        tickvals=[_never(n_tokens), *decades],
        ticktext=["never", *(f"10<sup>{e}</sup>" for e in decades)],
        range=[_never(n_tokens) - 0.3, 1.2 / PER_DECADE],
        showgrid=False,
        zeroline=False,
    )
    figure.update_yaxes(range=[0, 1.05 * max(max(bar.y) for bar in figure.data)])
    figure.update_layout(showlegend=False)


def _never(n_tokens: int) -> float:
    """Position of the bar of features that never fire: left of a single firing."""
    return -math.log10(n_tokens) - 2.5 / PER_DECADE


def _count_rates(store: FeatureStore, fires: np.ndarray, name: str, color: str) -> "Bar":
    """Bars of features by the logarithm of their firing counts; bin borders are exact for integers."""
    from plotly.graph_objects import Bar

    n_tokens, counted = len(store), store.counted
    n_bins = math.floor(PER_DECADE * math.log10(n_tokens) + 1e-9) + 1
    bins = np.floor(PER_DECADE * np.log10(fires[fires > 0]) + 1e-9).astype(int)
    edges = [min(n_tokens + 1, math.ceil(10 ** (i / PER_DECADE) - 1e-9)) for i in range(n_bins + 1)]
    said = [
        f"{a:,} to {b - 1:,} {counted}" if b - 1 > a else f"{a:,} {counted[: -1 if a == 1 else None]}"
        for a, b in pairwise(edges)
    ]
    return Bar(
        name=name,
        x=[_never(n_tokens), *((np.arange(n_bins) + 0.5) / PER_DECADE - math.log10(n_tokens))],
        y=[int((fires == 0).sum()), *np.bincount(bins, minlength=n_bins).tolist()],
        width=0.92 / PER_DECADE,
        marker={"color": [OTHER, *[color] * n_bins], "line": {"width": 0}},
        customdata=[f"none of {n_tokens:,} {counted}", *said],
        hovertemplate="%{y:,} features fire on %{customdata}<extra>%{fullData.name}</extra>",
    )


def plot_activations(store: FeatureStore, feature: int) -> "Figure":
    """A histogram of one feature's codes where it fires, negative ones left of 0 and positive ones right.

    x: the code z, in the SAE's own units; y: number of tokens, log scale. No bin holds both signs. For a feature that
    never fires the figure is empty, with a note; IndexError for a feature that does not exist.
    """
    from plotly.graph_objects import Bar, Figure

    values, n = store.feature(feature).values, len(store)
    figure, edges = Figure(), np.linspace(0, float(np.abs(values).max(initial=0)), N_BINS + 1)
    heights = {side: np.histogram(side * values[side * values > 0], edges)[0] for side in (-1, 1) if len(values)}
    for side, name, color in ((-1, "negative", MINUS), (1, "positive", PLUS)):
        shown = np.flatnonzero(heights.get(side, ()))
        if len(shown) == 0:
            continue
        low, high = side * edges[shown], side * edges[shown + 1]
        bar = Bar(
            name=name,
            x=(low + high) / 2,
            y=heights[side][shown],
            width=edges[1],
            marker={"color": color, "line": {"width": 0}},
            customdata=np.stack([low, high], 1),
            hovertemplate="%{y:,} "
            + store.counted
            + " with z from %{customdata[0]:.3g} to %{customdata[1]:.3g}<extra></extra>",
        )
        figure.add_trace(bar)
    top = max((int(counts.max()) for counts in heights.values()), default=10)
    figure.update_yaxes(
        title_text=f"{store.counted} (log scale)", type="log", range=[math.log10(0.5), math.log10(2 * top)], dtick=1
    )
    figure.update_xaxes(title_text="code z where the feature fires (the SAE's units)", zeroline=True)
    figure.update_layout(bargap=0, showlegend=True)
    if len(values) == 0:
        figure.update_xaxes(range=[-1, 1], showticklabels=False)
        write_over(figure, f"It never fires in {n:,} {store.counted}: its rate is below {3 / n:.2g}.")
    signs = f"{(values > 0).sum():,} positive, {(values < 0).sum():,} negative"
    rows = count_rows([n], store.counted)
    note = f"fires on {len(values):,} of {rows} ({len(values) / n:.2g}): {signs}; zeros are not drawn"
    return apply_layout(figure, f"Codes of feature {feature % store.d_sae}", note, 320)


def plot_dead_features(dead: DeadFeatures) -> "Figure":
    """Stacked bars of the features of each kind (dead, near-dead, live, ...) by prefix group.

    x: share of the group's features; y: the group, as a range of feature numbers. Counts are written in the bars and
    shown on hover.
    """
    from plotly.graph_objects import Bar, Figure

    figure, groups = Figure(), dead.groups
    sizes = [sum(counts.values()) for counts in groups.values()]
    names = [f"{escape_plotly(name)}<br>({size:,})" for name, size in zip(groups, sizes, strict=True)]
    for kind in KINDS:
        counts = [group.get(kind, 0) for group in groups.values()]
        shares = [count / size for count, size in zip(counts, sizes, strict=True)]
        bar = Bar(
            name=kind,
            x=shares,
            y=names,
            orientation="h",
            marker={"color": KIND_COLORS[kind], "line": {"width": 0}},
            customdata=counts,
            text=[f"{count:,}" if share >= LEGIBLE else "" for count, share in zip(counts, shares, strict=True)],
            textposition="inside",
            insidetextanchor="middle",
            textangle=0,
            textfont={"color": "#ffffff"},
            hovertemplate=f"%{{customdata:,}} {kind}, %{{x:.2%}} of them<extra></extra>",
        )
        figure.add_trace(bar)
    figure.update_layout(
        barmode="stack", bargap=0.3, legend={"orientation": "h", "traceorder": "normal", "y": 1, "yanchor": "bottom"}
    )
    figure.update_xaxes(title_text="share of the group's features", range=[0, 1], tickformat=".0%")
    figure.update_yaxes(title_text="features", type="category", autorange="reversed", ticksuffix=" ", automargin=True)
    never = dead.high[dead.fires == 0]
    note = f"{len(dead.kinds):,} features on {count_rows([dead.n_tokens], dead.counted)}; dead: no firing"
    note += f", so a rate below {never[0]:.2g} ({dead.confidence:.0%})" if len(never) else ""
    note += f"; near-dead: below {dead.near_dead_rate:g}; dense: above {dead.dense_rate:g}"
    return apply_layout(figure, "Features by how often they fire", note, 150 + 52 * len(groups))


def plot_dissection(found: Dissection) -> "Figure":
    """Bars of what a dissection found, for the codes and for each baseline and null: means over random draws.

    Left: share of sides that are detectors, which random directions reach too; right: different concepts of the clear
    ones. Smallest and largest of several draws are shown on hover.
    """
    from plotly.graph_objects import Bar
    from plotly.subplots import make_subplots

    names = list(dict.fromkeys(row.name for row in found.rows))
    groups = [[row for row in found.rows if row.name == name] for name in names]
    titles = f"sides that are detectors, IoU > {found.detector:g}", f"concepts with IoU >= {found.clear:g}"
    figure = make_subplots(rows=1, cols=2, shared_yaxes=True, horizontal_spacing=0.06, subplot_titles=titles)
    for column, key in enumerate(("detector_frac", "n_unique_clear"), 1):
        values = [[float(getattr(row, key)) for row in group] for group in groups]
        form = ".1%" if column == 1 else ".3g"
        bar = Bar(
            x=[np.mean(one) for one in values],
            y=[escape_plotly(name) for name in names],
            orientation="h",
            marker={"color": [OWN, *[OTHER] * (len(names) - 1)]},
            customdata=[f"{min(one):{form}} to {max(one):{form}}, {len(one)} drawn" for one in values],
            hovertemplate="%{y}: %{x:" + form + "} (%{customdata})<extra></extra>",
            showlegend=False,
        )
        figure.add_trace(bar, row=1, col=column)
    figure.update_xaxes(tickformat=".0%", rangemode="tozero", row=1, col=1)
    figure.update_yaxes(autorange="reversed", automargin=True, ticksuffix=" ")
    size = f"{count_rows([found.n_tokens])} of {found.n_documents:,} held-out documents"
    note = f"{len(found.concepts)} concepts on {size}"
    return apply_layout(figure, "Features that detect concepts", note, 120 + 28 * len(names))


def plot_feature_map(
    source: SAE | NearestFeatures,
    *,
    store: FeatureStore | None = None,
    labels: Mapping[int, str] | None = None,
    limit: int = 2000,
    seed: int = 0,
) -> "Figure":
    """A t-SNE map of features in which similar ones are near each other; large distances mean little.

    Similarity is the cosine of decoder rows, its absolute value where codes are signed, or the cosine of rows of a
    `NearestFeatures` result, without signs, so that features with the same neighbors are near. The axes have no unit.
    Hovering shows a feature's number, label and, with a store, firings, and the color is then the firing rate. Dead
    features are left out: those that never fire in the `store` or, without one, were dead at the end of training; and
    features without any neighbor.

    Args:
        source: SAE whose decoder rows are compared, or result of `nearest_features`.
        store: feature store of the same features, for firing rates; None leaves them out.
        labels: text by feature, shown on the map.
        limit: largest number of features shown, at least 4; of more live ones so many are drawn at random, those with
            labels first. 2,000 take about ten seconds.
        seed: seed of the draw and of t-SNE.

    Raises:
        ValueError: the store has another width, a label is of a feature that does not exist, or fewer than 4 features
            remain.

    >>> sae = sl.SAE(sl.SAEConfig(d_in=4, d_sae=12, activation=sl.TopK(k=2)))
    >>> len(plot_feature_map(sae, labels={3: "cats"}).data[0].x)
    12
    """
    from plotly.graph_objects import Figure

    width, labels = source.cfg.d_sae if isinstance(source, SAE) else len(source.indices), labels or {}
    if store is not None and store.d_sae != width:
        raise ValueError(f"`store` must be of the {width} features mapped, got {store.d_sae}; give theirs.")
    if unknown := [j for j in labels if not 0 <= j < width][:5]:
        raise ValueError(f"`labels` must be of features 0..{width - 1}, got {unknown}; remove them.")
    alive = np.flatnonzero(_is_alive(source, store))
    if len(alive) < FEWEST or limit < FEWEST:
        raise ValueError(f"A map needs {FEWEST} live features and a `limit` no lower, got {len(alive)} and {limit}.")
    shown = _choose(alive, labels, limit, seed)
    figure = Figure(_draw_places(_place(_compare(source, shown), seed), shown, labels, store))
    figure.update_xaxes(title_text="t-SNE 1 (no unit)", showticklabels=False, showgrid=False, zeroline=False)
    figure.update_yaxes(title_text="t-SNE 2 (no unit)", showticklabels=False, showgrid=False, zeroline=False)
    drawn = f"{len(shown):,} of {len(alive):,} live features, drawn with seed {seed}"
    counted = drawn if len(shown) < len(alive) else f"{len(alive):,} live features"
    counted += f"; {width - len(alive):,} dead left out"
    note = f"{counted}; near: similar by {_measure(source)}; {_tokens(source, store)}"
    return apply_layout(figure, "Features by similarity", note, 520)


def _is_alive(source: SAE | NearestFeatures, store: FeatureStore | None) -> Bool[np.ndarray, "d_sae"]:
    alive: Any = (source.indices >= 0).any(1) if isinstance(source, NearestFeatures) else _has_direction(source)
    if store is not None:
        return alive & (store.statistics.fires.sum(1) > 0)
    if isinstance(source, SAE):
        alive[(source.training_ or {}).get("dead", [])] = False
    return alive


def _has_direction(sae: SAE) -> Bool[np.ndarray, "d_sae"]:
    return (sae.W_dec.detach().norm(dim=1) > 0).cpu().numpy()


def _choose(alive: Int[np.ndarray, "n"], labels: Mapping[int, str], limit: int, seed: int) -> Int[np.ndarray, "m"]:
    drawn = np.random.default_rng(seed).permutation(alive).tolist()
    return np.sort(sorted(drawn, key=lambda j: j not in labels)[:limit])


def _compare(source: SAE | NearestFeatures, shown: Int[np.ndarray, "n"]) -> Float[np.ndarray, "n n"]:
    """Cosines between the features shown, of their decoder rows or of their rows of similarities."""
    if isinstance(source, SAE):
        rows = source.W_dec.detach().float().cpu().numpy()[shown]
        cosines = (rows := rows / np.linalg.norm(rows, axis=1, keepdims=True)) @ rows.T
        return np.abs(cosines) if source.cfg.activation.signed else cosines
    from scipy.sparse import csr_matrix

    # neighbors outside the drawn sample count for similarity too
    known = source.indices[shown] >= 0
    entries = np.abs(source.values[shown])[known], (np.nonzero(known)[0], source.indices[shown][known])
    itself = np.ones(len(shown)), (np.arange(len(shown)), shown)
    size = len(shown), len(source.indices)
    table = csr_matrix(entries, size) + csr_matrix(itself, size)
    scale = 1 / np.sqrt(np.asarray(table.multiply(table).sum(1)).ravel())
    return (table @ table.T).toarray() * scale[:, None] * scale


def _place(likeness: Float[np.ndarray, "n n"], seed: int) -> Float[np.ndarray, "n 2"]:
    from sklearn.manifold import TSNE

    distances = np.clip(1 - likeness, 0, None)
    np.fill_diagonal(distances, 0)
    perplexity = min(PERPLEXITY, (len(distances) - 1) / 3)
    # a coarser angle than by default halves the time and costs 1 % of the objective
    tsne = TSNE(metric="precomputed", init="random", perplexity=perplexity, angle=0.8, random_state=seed)
    places: np.ndarray = tsne.fit_transform(distances)
    return places


def _draw_places(
    places: Float[np.ndarray, "n 2"], shown: Int[np.ndarray, "n"], labels: Mapping[int, str], store: FeatureStore | None
) -> "Scatter":
    from plotly.graph_objects import Scatter

    sizes = [LABELED if j in labels else UNLABELED for j in shown.tolist()]
    return Scatter(
        x=places[:, 0],
        y=places[:, 1],
        mode="markers",
        marker={"size": sizes, "opacity": 0.9, "line": {"width": 0}, **_colors(store, shown)},
        hovertext=[_describe(j, labels, store) for j in shown.tolist()],
        hoverinfo="text",
        customdata=shown,
    )


def _colors(store: FeatureStore | None, shown: Int[np.ndarray, "n"]) -> dict[str, Any]:
    if store is None:
        return {"color": OWN}
    bar = {"title": {"text": f"share of {store.counted}<br>(log10)"}, "thickness": 12}
    rates = store.statistics.fires.sum(1)[shown] / len(store)
    return {"color": np.log10(rates), "colorscale": RATES, "colorbar": bar}


def _describe(feature: int, labels: Mapping[int, str], store: FeatureStore | None) -> str:
    lines = [f"feature {feature}", *([escape_plotly(labels[feature])] if feature in labels else [])]
    if store is not None:
        positive, negative = store.statistics.fires[feature].tolist()
        lines.append(
            f"fires on {(positive + negative) / len(store):.2g} of {store.counted}: {positive:,} +, {negative:,} -"
        )
    return "<br>".join(lines)


def _measure(source: SAE | NearestFeatures) -> str:
    if isinstance(source, NearestFeatures):
        return f"|{source.by}| and by the neighbors they share"
    return "|cosine| of decoder rows" if source.cfg.activation.signed else "cosine of decoder rows"


def _tokens(source: SAE | NearestFeatures, store: FeatureStore | None) -> str:
    """Number of tokens, as text, that the figure was measured on."""
    if store is not None:
        return f"firing rates over {count_rows([len(store)], store.counted)}"
    if isinstance(source, NearestFeatures):
        return "of directions, no tokens" if source.n_tokens is None else f"over {count_rows([source.n_tokens])}"
    seen = (source.training_ or {}).get("n_tokens_seen")
    return f"trained on {count_rows([seen])}" if seen else "not trained"

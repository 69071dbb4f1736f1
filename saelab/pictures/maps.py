"""Two-dimensional map (t-SNE) of features by similarity."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Bool, Float, Int

from saelab.analyses.likeness import Neighbours
from saelab.pictures.canvas import OTHER, OWN, count_tokens, dress, say
from saelab.sae.sae import SAE
from saelab.stores.features import FeatureStore

if TYPE_CHECKING:
    from plotly.graph_objects import Figure, Scatter

FEWEST = 4
PERPLEXITY = 30.0
LABELLED, UNLABELLED = 11, 6
RATES = [[0.0, OTHER], [0.5, OWN], [1.0, "#c2559d"]]


def plot_neighbours(
    source: SAE | Neighbours,
    *,
    store: FeatureStore | None = None,
    labels: Mapping[int, str] | None = None,
    limit: int = 2000,
    seed: int = 0,
) -> "Figure":
    """A t-SNE map of features in which similar ones are near each other; large distances mean little.

    Similarity is the cosine of decoder rows, its size where codes are signed, or the cosine of rows of a `Neighbours`
    result, without signs, so that features with the same neighbours are near. The axes have no unit. Hovering shows a
    feature's number, label and, with a store, firings, and the colour is then the firing rate. Dead features are left
    out: those that never fire in the `store` or, without one, were dead at the end of training; and features without
    any neighbour.

    Args:
        source: SAE whose decoder rows are compared, or result of `neighbours`.
        store: feature store of the same features, for firing rates; None leaves them out.
        labels: text by feature, shown on the map.
        limit: largest number of features shown, at least 4; of more live ones so many are drawn at random, those with
            labels first. 2,000 take about ten seconds.
        seed: seed of the draw and of t-SNE.

    Raises:
        ValueError: the store has another width, a label is of a feature that does not exist, or fewer than 4 features
            remain.

    >>> sae = sl.SAE(sl.SAEConfig(d_in=4, d_sae=12, activation=sl.TopK(k=2)))
    >>> len(plot_neighbours(sae, labels={3: "cats"}).data[0].x)
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
    note = (
        f"{counted}; {width - len(alive):,} dead left out; near: alike by {_measure(source)}; {_tokens(source, store)}"
    )
    return dress(figure, "Features by likeness", note, 520)


def _is_alive(source: SAE | Neighbours, store: FeatureStore | None) -> Bool[np.ndarray, "d_sae"]:
    alive: Any = (source.indices >= 0).any(1) if isinstance(source, Neighbours) else _has_direction(source)
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


def _compare(source: SAE | Neighbours, shown: Int[np.ndarray, "n"]) -> Float[np.ndarray, "n n"]:
    """Cosines between the features shown, of their decoder rows or of their rows of similarities."""
    if isinstance(source, SAE):
        rows = source.W_dec.detach().float().cpu().numpy()[shown]
        cosines = (rows := rows / np.linalg.norm(rows, axis=1, keepdims=True)) @ rows.T
        return np.abs(cosines) if source.cfg.activation.signed else cosines
    from scipy.sparse import csr_matrix

    # neighbours outside the drawn sample count for similarity too
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

    sizes = [LABELLED if j in labels else UNLABELLED for j in shown.tolist()]
    return Scatter(
        x=places[:, 0],
        y=places[:, 1],
        mode="markers",
        marker={"size": sizes, "opacity": 0.9, "line": {"width": 0}, **_colours(store, shown)},
        hovertext=[_describe(j, labels, store) for j in shown.tolist()],
        hoverinfo="text",
        customdata=shown,
    )


def _colours(store: FeatureStore | None, shown: Int[np.ndarray, "n"]) -> dict[str, Any]:
    if store is None:
        return {"color": OWN}
    bar = {"title": {"text": "share of tokens<br>(log10)"}, "thickness": 12}
    rates = store.statistics.fires.sum(1)[shown] / len(store)
    return {"color": np.log10(rates), "colorscale": RATES, "colorbar": bar}


def _describe(feature: int, labels: Mapping[int, str], store: FeatureStore | None) -> str:
    lines = [f"feature {feature}", *([say(labels[feature])] if feature in labels else [])]
    if store is not None:
        positive, negative = store.statistics.fires[feature].tolist()
        lines.append(f"fires on {(positive + negative) / len(store):.2g} of tokens: {positive:,} +, {negative:,} -")
    return "<br>".join(lines)


def _measure(source: SAE | Neighbours) -> str:
    if isinstance(source, Neighbours):
        return f"|{source.by}| and by the neighbours they share"
    return "|cosine| of decoder rows" if source.cfg.activation.signed else "cosine of decoder rows"


def _tokens(source: SAE | Neighbours, store: FeatureStore | None) -> str:
    """Number of tokens, as text, that the figure was measured on."""
    if store is not None:
        return f"firing rates over {count_tokens([len(store)])}"
    if isinstance(source, Neighbours):
        return "of directions, no tokens" if source.n_tokens is None else f"over {count_tokens([source.n_tokens])}"
    seen = (source.training_ or {}).get("n_tokens_seen")
    return f"trained on {count_tokens([seen])}" if seen else "not trained"

"""`write_graph_page`: an attribution graph as a page to read, pin, group and name; and a drawing for Jupyter."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from saelab.analysis.max_activating import max_activating_examples
from saelab.circuits.graph import KINDS, AttributionGraph
from saelab.circuits.graph_files import make_node_ids
from saelab.circuits.graph_views import (
    GraphView,
    NodeLabels,
    influence_shares,
    kind_of,
    name_nodes,
    reads_attention,
)
from saelab.labels.label_store import LabelStore
from saelab.stores.feature_store import FeatureStore
from saelab.stores.files import as_file_name, write_atomic
from saelab.stores.results import register_drawing
from saelab.stores.sharing import shareable
from saelab.visualization.html import MINUS, PLUS, bundle, escape, read_asset, write_policy
from saelab.visualization.reports import to_script

N_WINDOWS, N_AROUND = 3, 6
BLOCK = re.compile(r"\w*blocks\.\d+\.")
DIGITS = 4
"""significant digits of the weights on a page"""
NO_SCRIPT = "The graph needs JavaScript, which this page carries; nothing is fetched from the network."
N_DRAWN, N_LINES = 60, 150
"""most nodes and edges of the drawing in Jupyter"""
ROW, COLUMN, NODE, LEFT, HEAD, FOOT = 46, 15, 4.5, 70, 22, 30


def write_graph_page(
    graph: AttributionGraph,
    path: str | Path,
    *,
    labels: NodeLabels | None = None,
    stores: Mapping[str, FeatureStore] | None = None,
    view: GraphView | None = None,
    influence: Float[np.ndarray, "n_nodes"] | None = None,
    title: str = "",
) -> Path:
    """Write a graph as an HTML page that needs neither a server nor the network; returns its path.

    A row for each dictionary, a column for each token, logits on top. The page lists inputs and outputs of a node,
    shows nodes and edges up to a share of influence, searches, pins nodes to a subgraph, groups them into supernodes
    and changes their names. All of this is kept in its address, and saved and loaded as JSON with circuit-tracer's
    `qParams`, which `read_view` reads. Pages of a thousand nodes and 50,000 edges are 1 MiB large. Neither local path
    nor user name is written.

    Args:
        graph: the graph.
        path: file to write, of a name that ends in .html.
        labels: for each hook point of the graph's dictionaries, texts by feature or a label store.
        stores: for each hook point, the feature store of its dictionary: the clicked feature is shown with the text
            that it fires on most, and its chosen labels are taken where `labels` has none.
        view: what the page shows at first.
        influence: share of each node, as `influence_shares` computes it from the whole graph before it was pruned; None
            computes it from this one.
        title: title of the page; empty takes the prompt.

    Raises:
        ValueError: `path` has another ending, `view` has nodes of another graph, `labels` or `stores` have hook points
            of no dictionary, or a store has fewer features than the graph.
    """
    path, view = Path(path), view or GraphView()
    require_page_name(path)
    view.require_nodes(graph)
    stores = stores or {}
    _check_stores(graph, stores)
    books = {hook: LabelStore.open(store) for hook, store in stores.items() if hook not in (labels or {})}
    try:
        names = name_nodes(graph, {**books, **(labels or {})})
    finally:
        for book in books.values():
            book.close()
    data = describe_graph(graph, names, view, influence) | {
        "slug": as_file_name(path.stem),
        "windows": _find_windows(graph, stores),
    }
    write_atomic(path, _fill(title or graph.prompt, _lead(graph), data).encode())
    return path


def require_page_name(path: Path) -> None:
    """Raise ValueError unless the file's name ends in .html."""
    if path.suffix not in (".html", ".htm"):
        raise ValueError(f"`path` must end in .html, got {path}. Graphs as JSON are written by `write_graph_json`.")


def _check_stores(graph: AttributionGraph, stores: Mapping[str, FeatureStore]) -> None:
    for hook, store in stores.items():
        if hook not in graph.dictionaries:
            raise ValueError(
                f"`stores` must have hook points of the graph's dictionaries, got {hook!r}; "
                f"there are {list(graph.dictionaries)[:5]}."
            )
        point = store.provenance.hook_point
        blocks = [BLOCK.match(name) for name in (hook, point)]  # a transcoder reads and writes in one
        if all(blocks) and blocks[0][0] != blocks[1][0]:  # type: ignore[index]
            raise ValueError(
                f"The store of {hook} must be of the graph's dictionary, but it is of '{point}'. Give the store that "
                "was harvested with this dictionary."
            )
        own = graph.features[graph.sources == graph.dictionaries.index(hook)]
        if (largest := int(own.max(initial=-1))) >= store.d_sae:
            raise ValueError(
                f"The store of {hook} must be of the graph's dictionary, but it has {store.d_sae} features, got "
                f"feature {largest}. Give the store that was harvested with this dictionary."
            )


def _fill(title: str, lead: str, data: Mapping[str, Any]) -> str:
    script = bundle("graph_page.js")
    style = "".join(map(read_asset, ("page.css", "components.css", "graph_page.css")))
    return "\n".join(
        [
            '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
            write_policy([script]),
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{escape(title)}</title>\n<style>{style}</style>\n</head>",
            f'<body>\n<header><h1>{escape(title)}</h1><p class="soft small">{escape(lead)}</p></header>',
            f'<main id="graph"><noscript>{NO_SCRIPT}</noscript></main>',
            f'<script type="application/json" id="data">{to_script(data)}</script>',
            f"<script>{script}</script>\n</body>\n</html>\n",
        ]
    )


def _lead(graph: AttributionGraph) -> str:
    kinds = {kind: int(graph.is_kind(kind).sum()) for kind in KINDS}
    counted = ", ".join(
        f"{n:,} {kind}{'' if n == 1 else 'es' if kind == 'bias' else 's'}"
        for kind, n in kinds.items()
        if n or kind != "score"
    )
    return f"Attribution graph of {shareable(graph.model)}: {counted}; {len(graph.edge_weights):,} direct effects."


def describe_graph(
    graph: AttributionGraph, names: Sequence[str], view: GraphView, influence: Float[np.ndarray, "n_nodes"] | None
) -> dict[str, Any]:
    """The data of a graph's page, ready for JSON: nodes by column, edges from the most to the least influential.

    `counts` has the number of edges up to each hundredth of influence.

    Args:
        graph: the graph.
        names: a text for each node, as `name_nodes` gives it.
        view: what the page shows at first.
        influence: share of each node; None computes it.
    """
    nodes, edges = influence_shares(graph)
    shares = nodes if influence is None else influence
    order = np.argsort(edges, kind="stable")
    ids = make_node_ids(graph)
    return {
        "tokens": list(graph.tokens),
        "dictionaries": list(graph.dictionaries),
        "parts": [name_place(hook) for hook in graph.dictionaries],
        "attention": [reads_attention(hook) for hook in graph.dictionaries],
        "nodes": {
            "id": ids,
            "kind": [kind_of(graph, i) for i in range(len(ids))],
            "layer": graph.layers.tolist(),
            "position": graph.positions.tolist(),
            "source": graph.sources.tolist(),
            "feature": graph.features.tolist(),
            "activation": _shorten(graph.activations),
            "value": _shorten(graph.values),
            "share": _shorten(shares),
            "text": list(names),
        },
        "edges": {
            "source": graph.edge_sources[order].tolist(),
            "target": graph.edge_targets[order].tolist(),
            "weight": _shorten(graph.edge_weights[order]),
        },
        "counts": np.searchsorted(edges[order], np.arange(101) / 100 + 1e-9, side="right").tolist(),
        "params": view.to_params(ids) | {"clerps": [[ids[i], text] for i, text in view.labels.items()]},
    }


def name_place(hook_point: str) -> str:
    """What a hook point is called beside its layer.

    >>> name_place("blocks.3.mlp.hook_out"), name_place("blocks.3.hook_attn_out")
    ('mlp out', 'attn out')
    """
    return re.sub(r"^blocks\.\d+\.(hook_)?", "", hook_point).replace(".hook_", " ").replace("_", " ")


def _shorten(values: Float[np.ndarray, "n"]) -> list[float | None]:
    """Numbers with few digits; None for NaN and infinities."""
    return [float(f"{x:.{DIGITS}g}") if np.isfinite(x) else None for x in values.tolist()]


def _find_windows(graph: AttributionGraph, stores: Mapping[str, FeatureStore]) -> dict[str, list[list[str]]]:
    """For each feature and sign of the graph, the text around its largest codes: before, the token, and after."""
    found: dict[str, list[list[str]]] = {}
    for i in np.flatnonzero(graph.is_kind("feature")).tolist():
        source, feature = int(graph.sources[i]), int(graph.features[i])
        sign = -1 if graph.activations[i] < 0 else 1
        key = f"{source}:{feature}:{sign}"
        store = stores.get(graph.dictionaries[source])
        if store is None or key in found:
            continue
        examples = max_activating_examples(store, feature, n_top=N_WINDOWS, n_each=0, n_near=0, n_random=0)
        own = [one for group in examples.groups if group.side == sign for one in group.examples]
        found[key] = [
            [
                "".join(one.words[max(0, one.center - N_AROUND) : one.center]),
                one.words[one.center],
                "".join(one.words[one.center + 1 : one.center + 1 + N_AROUND]),
            ]
            for one in own[:N_WINDOWS]
        ]
    return found


# ---- the drawing in Jupyter
@dataclass(frozen=True, eq=False)
class _Drawing:
    """Nodes of a small drawing with their places."""

    graph: AttributionGraph
    shown: Int[np.ndarray, "n_shown"]
    x: Float[np.ndarray, "n_nodes"]
    y: Float[np.ndarray, "n_nodes"]
    rows: list[str]
    columns: list[float]

    @classmethod
    def make(cls, graph: AttributionGraph) -> "_Drawing":
        shown = np.flatnonzero(_choose(graph, influence_shares(graph)[0]))
        order = graph.layers * (len(graph.dictionaries) + 1) + np.maximum(graph.sources, 0)
        order = np.where(graph.is_kind("score"), order.max(initial=0) + 1, order)
        places = np.unique(order[shown])
        rows = np.searchsorted(places, order)
        counts = np.zeros((len(places), max(1, len(graph.tokens))), dtype=np.int64)
        x, y = np.zeros(len(order)), np.zeros(len(order))
        for i in shown.tolist():
            counts[rows[i], graph.positions[i]] += 1
        widths = np.maximum(counts.max(axis=0, initial=1), 2) * COLUMN + COLUMN
        starts = LEFT + np.cumsum(widths) - widths
        seen = np.zeros_like(counts)
        for i in shown.tolist():
            row, column = int(rows[i]), int(graph.positions[i])
            offset = seen[row, column] - (counts[row, column] - 1) / 2
            x[i] = starts[column] + widths[column] / 2 + COLUMN * offset
            y[i] = HEAD + ROW * (len(places) - 1 - row) + NODE
            seen[row, column] += 1
        first = {int(row): i for i, row in reversed(list(enumerate(rows.tolist()))) if i in set(shown.tolist())}
        named = [_name_row(graph, first[row]) for row in range(len(places))]
        return cls(graph, shown, x, y, named, (starts + widths / 2).tolist())

    def draw(self) -> str:
        height = HEAD + ROW * (len(self.rows) - 1) + 2 * NODE + FOOT
        width = max(self.columns, default=LEFT) + 3 * COLUMN
        style = "max-width:100%;height:auto;font:11px system-ui,sans-serif"
        rows = [
            f'<text x="0" y="{HEAD + ROW * (len(self.rows) - 1 - i) + 2 * NODE:.0f}" opacity=".7">{escape(name)}</text>'
            for i, name in enumerate(self.rows)
        ]
        tokens = [
            f'<text x="{x:.0f}" y="{height - 6:.0f}" text-anchor="middle" opacity=".7">{escape(_cut(token))}</text>'
            for x, token in zip(self.columns, self.graph.tokens, strict=True)
        ]
        parts = "".join([*rows, *tokens, *self._lines(), *map(self._node, self.shown.tolist())])
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height:.0f}" width="{width:.0f}" '
            f'fill="currentColor" role="img" aria-label="attribution graph" style="{style}">{parts}</svg>'
        )

    def _lines(self) -> list[str]:
        graph = self.graph
        inside = np.isin(graph.edge_sources, self.shown) & np.isin(graph.edge_targets, self.shown)
        sizes = np.abs(graph.edge_weights)
        kept = np.flatnonzero(inside)
        kept = kept[np.argsort(-sizes[kept], kind="stable")[:N_LINES]][::-1]
        largest = sizes[kept].max(initial=0) or 1.0
        lines = []
        for e in kept.tolist():
            source, target, weight = (
                int(graph.edge_sources[e]),
                int(graph.edge_targets[e]),
                float(graph.edge_weights[e]),
            )
            share = abs(weight) / largest
            lines.append(
                f'<line x1="{self.x[source]:.0f}" y1="{self.y[source]:.0f}" x2="{self.x[target]:.0f}" '
                f'y2="{self.y[target]:.0f}" stroke="{PLUS if weight > 0 else MINUS}" '
                f'stroke-width="{0.4 + 2 * share:.2f}" opacity="{0.15 + 0.7 * share:.2f}"/>'
            )
        return lines

    def _node(self, i: int) -> str:
        kind, x, y = kind_of(self.graph, i), self.x[i], self.y[i]
        code = f", code {float(self.graph.activations[i]):+.3g}" if kind == "feature" else ""
        shape = {
            "feature": f'<circle cx="{x:.0f}" cy="{y:.0f}" r="{NODE}"',
            "error": f'<path d="M{x:.0f},{y - 5:.0f}l5,5l-5,5l-5,-5z"',
            "bias": f'<path d="M{x - 5:.0f},{y:.0f}h10m-5,-5v10"',
        }.get(kind, f'<rect x="{x - NODE:.1f}" y="{y - NODE:.1f}" width="{2 * NODE}" height="{2 * NODE}"')
        paint = 'fill="none"' if kind == "bias" else f'fill="{"#848e99" if kind == "error" else "#37919a"}"'
        said = escape(self.graph.describe(i) + code)
        return f'{shape} {paint} stroke="currentColor" stroke-width=".8"><title>{said}</title></{_tag(shape)}>'


def _tag(shape: str) -> str:
    return shape[1:].partition(" ")[0]


def _choose(graph: AttributionGraph, shares: Float[np.ndarray, "n_nodes"]) -> Bool[np.ndarray, "n_nodes"]:
    """At most `N_DRAWN` nodes: logits and scores first, then the most influential."""
    ranked = np.where(graph.is_kind("logit", "score"), -1.0, shares)
    chosen = np.zeros(len(shares), dtype=bool)
    chosen[np.argsort(ranked, kind="stable")[:N_DRAWN]] = True
    return chosen


ROWS = {"embedding": "tokens", "logit": "logits", "score": "score"}


def _name_row(graph: AttributionGraph, i: int) -> str:
    kind = kind_of(graph, i)
    if kind in ROWS:
        return ROWS[kind]
    place = name_place(graph.dictionaries[int(graph.sources[i])]) if graph.sources[i] >= 0 else ""
    return f"L{int(graph.layers[i])} {place}".strip() if graph.layers[i] >= 0 else "tokens"


def _cut(text: str) -> str:
    return text.strip() if len(text) <= 8 else text.strip()[:7] + "\u2026"


def draw_graph(graph: AttributionGraph) -> str:
    """The most influential nodes of a graph, 60 at most, and the strongest edges between them as HTML with one picture;
    all text is escaped.

    Orange edges raise their target, blue ones lower it.
    """
    return f"<p>{escape(_lead(graph))}</p>" + (_Drawing.make(graph).draw() if len(graph.kinds) else "")


register_drawing(AttributionGraph, draw_graph)

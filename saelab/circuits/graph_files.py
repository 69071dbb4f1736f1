"""`write_graph_json`: an attribution graph as a file for circuit-tracer's and Neuronpedia's pages.

Both tools read the same JSON: metadata, the state of a page as `qParams`, nodes, links. What it has no field for stands
under names of ours (`saelab` in the metadata; `dictionary` and `value` of a node), which both ignore.
"""

import math
import re
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from saelab.circuits.graph import AttributionGraph, NodeKind
from saelab.circuits.graph_views import (
    GraphView,
    NodeLabels,
    influence_shares,
    kind_of,
    name_nodes,
    reads_attention,
)
from saelab.stores.files import as_file_name, write_json
from saelab.stores.jobs import hold_folder
from saelab.stores.sharing import shareable
from saelab.stores.validation import read_json, require_object

SCHEMA_VERSION = 1
"""1 says that `feature` of a feature's node is its layer and latent in one number, by Cantor's pairing"""
THRESHOLD = 0.8
INDEX = "graph-metadata.json"
"""file in which circuit-tracer's server looks for the graphs of a folder"""
FEATURE, ATTENTION_FEATURE = "cross layer transcoder", "lorsa"
TYPES: dict[str, NodeKind] = {
    FEATURE: "feature",
    ATTENTION_FEATURE: "feature",
    "unexplored node": "feature",
    "mlp reconstruction error": "error",
    "lorsa error": "error",
    "embedding": "embedding",
    "logit": "logit",
    "bias": "bias",
}


def pair(layer: int, latent: int) -> int:
    """Two numbers as one, by Cantor's pairing (x + y)(x + y + 1) / 2 + y.

    >>> pair(2, 3), unpair(18)
    (18, (2, 3))
    """
    return (layer + latent) * (layer + latent + 1) // 2 + latent


def unpair(number: int) -> tuple[int, int]:
    """The two numbers that `pair` made one of."""
    diagonal = (math.isqrt(8 * number + 1) - 1) // 2
    second = number - diagonal * (diagonal + 1) // 2
    return diagonal - second, second


def write_graph_json(
    graph: AttributionGraph,
    path: str | Path,
    *,
    labels: NodeLabels | None = None,
    view: GraphView | None = None,
    slug: str = "",
    scan: str = "",
    influence: Float[np.ndarray, "n_nodes"] | None = None,
    biases: bool = True,
    description: str = "",
    source_set: str = "",
    listed: bool = False,
) -> Path:
    """Write a graph as JSON that circuit-tracer's and Neuronpedia's pages show; returns the file's path.

    Codes keep their sign, and a negative one's label is marked with a minus sign. Features of attention's output have
    the type "lorsa", all others the type "cross layer transcoder", the two that these pages know. No local path, user
    or host name is written, and no time: equal graphs give equal bytes.

    Args:
        graph: the graph; prune it before, as pages show at most a few thousand nodes.
        path: file to write; Neuronpedia takes at most 100 MiB.
        labels: for each hook point of the graph's dictionaries, texts by feature or a label store.
        view: pins, supernodes, thresholds and names given by hand.
        slug: name of the graph, of letters, digits, ".", "_" and "-"; empty takes that of the file.
        scan: name of the model at Neuronpedia, such as gemma-2-2b, of the same characters; empty takes the graph's.
        influence: share of each node, as `influence_shares` computes it from the whole graph before it was pruned; None
            computes it from this one. NaN is written as null.
        biases: whether nodes of biases are written. Neuronpedia shows them, but its replacement and completeness scores
            are wrong with them; circuit-tracer's own graphs have none.
        description: text for readers of Neuronpedia's page.
        source_set: Neuronpedia's source set with the dashboards of these features.
        listed: whether to add the graph to `graph-metadata.json` beside it, where circuit-tracer's server looks.

    Raises:
        ValueError: `slug` or `scan` has other characters, a weight or value is not finite, the graph is of a score of
            attention, `view` has nodes of another graph, or `labels` has other hook points.
    """
    path, view = Path(path), view or GraphView()
    view.require_nodes(graph)
    slug = _check_name(slug, "slug") or as_file_name(path.stem)
    scan = _check_name(scan, "scan") or as_file_name(shareable(graph.model).rpartition("/")[2])
    for name in ("edge_weights", "values"):
        if not np.isfinite(getattr(graph, name)).all():
            raise ValueError(f"`{name}` must be finite to be written as JSON, got NaN or an infinity. Trace again.")
    if influence is None:
        influence = influence_shares(graph)[0]
    ids = make_node_ids(graph)
    texts = name_nodes(graph, labels)
    kept = [i for i in range(len(ids)) if biases or kind_of(graph, i) != "bias"]
    known = {ids[i] for i in kept}
    sources, targets, weights = graph.edge_sources.tolist(), graph.edge_targets.tolist(), shorten(graph.edge_weights)
    links = [
        {"source": ids[source], "target": ids[target], "weight": weight}
        for source, target, weight in zip(sources, targets, weights, strict=True)
        if ids[source] in known and ids[target] in known
    ]
    metadata = _describe(graph, slug, scan, view, description, source_set)
    nodes = [
        _write_node(graph, i, ids[i], texts[i], view.labels.get(i), float(influence[i])) for i in _arrange(graph, kept)
    ]
    params = view.to_params(ids)
    write_json(path, {"metadata": metadata, "qParams": params, "nodes": nodes, "links": links})
    if listed:
        _list_graph(path.parent, metadata)
    return path


def _arrange(graph: AttributionGraph, nodes: list[int]) -> list[int]:
    """Nodes in the order of the file: logits, where they come last, by token.

    Neuronpedia sorts them so, and takes their probabilities in the order of the file.
    """
    logits = np.flatnonzero(graph.is_kind("logit")).tolist()
    if nodes[len(nodes) - len(logits) :] != logits:
        return nodes
    return [*nodes[: len(nodes) - len(logits)], *sorted(logits, key=lambda i: int(graph.features[i]))]


def _check_name(name: str, argument: str) -> str:
    if re.search(r"[^a-zA-Z0-9_.-]", name):
        raise ValueError(
            f"`{argument}` must have letters, digits, '.', '_' and '-' only, which Neuronpedia asks for, got {name!r}."
        )
    return name


def _describe(
    graph: AttributionGraph, slug: str, scan: str, view: GraphView, description: str, source_set: str
) -> dict[str, Any]:
    try:
        generator = {"name": "saelab", "version": version("saelab")}
    except PackageNotFoundError:  # a checkout that was never installed
        generator = {"name": "saelab"}
    n_layers = int(graph.layers.max(initial=0))
    return {
        "slug": slug,
        "scan": scan,
        "transcoder_list": list(graph.dictionaries),
        "prompt_tokens": list(graph.tokens),
        "prompt": graph.prompt,
        "node_threshold": THRESHOLD if view.node_threshold is None else view.node_threshold,
        "schema_version": SCHEMA_VERSION,
        **({"feature_details": {"neuronpedia_source_set": source_set}} if source_set else {}),
        "info": {**({"description": description} if description else {}), "generator": generator},
        "saelab": {
            "schema_version": 1,
            "model": shareable(graph.model),
            "token_ids": graph.token_ids.tolist(),
            "n_layers": n_layers,
            "completeness_error": graph.completeness_error,
            "n_left_out": graph.n_left_out,
        },
    }


def make_node_ids(graph: AttributionGraph) -> list[str]:
    """The id of each node, as files and addresses name it.

    layer_latent_position for features of the layer's first dictionary outside of attention, as in circuit-tracer;
    layer_dN_latent_position for those of further dictionaries at the layer, of index N; layer_error_dN_position,
    layer_bias_dN_position, with E for the layer of the model's biases; E_token_position; and for logits, whose layer is
    n_layers + 1 as in circuit-tracer, layer_token_position.

    circuit-tracer gives the error of layer L the id 0_L_position, which is also that of latent L of layer 0: with such
    ids links of one are taken for links of the other. ValueError for a graph of a score, for which there is no id.
    """
    if graph.is_kind("score").any():
        raise ValueError(
            "A graph must lead to logits or features to be shown on these pages, got one of a score of attention, for "
            "which they have no node. Print it, or keep it by `save`."
        )
    main: dict[int, int] = {}
    order = sorted(range(len(graph.dictionaries)), key=lambda i: (reads_attention(graph.dictionaries[i]), i))
    layers = {int(source): int(layer) for source, layer in zip(graph.sources, graph.layers, strict=True) if source >= 0}
    for source in order:
        if source in layers:
            main.setdefault(layers[source], source)
    columns = (graph.layers, graph.sources, graph.features, graph.positions)
    found = []
    for i, (layer, source, feature, position) in enumerate(zip(*(x.tolist() for x in columns), strict=True)):
        kind = kind_of(graph, i)
        if kind == "embedding":
            found.append(f"E_{feature}_{position}")
        elif kind == "logit":
            found.append(f"{layer + 1}_{feature}_{position}")
        elif kind != "feature":
            of = f"d{source}" if source >= 0 else "model"
            found.append(f"{_name_layer(layer)}_{kind}_{of}_{position}")
        else:
            tag = "" if main[layer] == source else f"d{source}_"
            found.append(f"{layer}_{tag}{feature}_{position}")
    if len(set(found)) < len(found):
        twice = next(name for name in found if found.count(name) > 1)
        raise ValueError(f"A graph's nodes must differ in kind, layer, feature or position, got {twice} twice.")
    return found


def _name_layer(layer: int) -> str:
    return str(layer) if layer >= 0 else "E"


def shorten(values: Float[np.ndarray, "n"]) -> list[float]:
    """Numbers as float32, with as few digits as tell them apart.

    >>> shorten(np.array([0.1], np.float32))
    [0.1]
    """
    return [float(text) for text in values.astype(np.float32).astype(str)]


def _write_node(
    graph: AttributionGraph, i: int, node_id: str, text: str, given: str | None, influence: float
) -> dict[str, Any]:
    kind, layer = kind_of(graph, i), int(graph.layers[i])
    position, latent = int(graph.positions[i]), int(graph.features[i])
    activation, value = shorten(np.array([graph.activations[i], graph.values[i]]))
    first = kind == "logit" and not (graph.activations[graph.is_kind("logit")] > graph.activations[i]).any()
    made = {
        "node_id": node_id,
        "feature": pair(layer, latent) if kind == "feature" else {"embedding": position, "logit": latent}.get(kind, -1),
        "layer": str(layer + 1) if kind == "logit" else _name_layer(layer),
        "ctx_idx": position,
        "feature_type": _name_type(graph, i),
        "token_prob": activation if kind == "logit" else 0.0,
        "is_target_logit": first,
        "run_idx": 0,
        "reverse_ctx_idx": 0,
        "jsNodeId": f"{layer}_{latent}-0" if kind == "feature" else node_id,
        "clerp": given if given is not None else _write_label(graph, i, text),
        "influence": None if kind == "logit" else influence,
        "activation": activation if kind == "feature" else None,
    }
    if kind not in ("embedding", "logit"):
        made["dictionary"] = int(graph.sources[i])
    if kind in ("feature", "logit"):
        made["value"] = value
    if kind == "logit":
        made["rank"] = int(graph.is_kind("logit")[:i].sum())
    for name, own in (("slope", graph.slopes), ("target_weight", graph.target_weights)):
        if own is not None:
            made[name] = shorten(own[i : i + 1])[0]
    return made


def _name_type(graph: AttributionGraph, i: int) -> str:
    kind, source = kind_of(graph, i), int(graph.sources[i])
    attention = source >= 0 and reads_attention(graph.dictionaries[source])
    if kind == "feature":
        return ATTENTION_FEATURE if attention else FEATURE
    if kind == "error":
        return "lorsa error" if attention else "mlp reconstruction error"
    return kind


def _write_label(graph: AttributionGraph, i: int, text: str) -> str:
    """The label of a node that nobody has named."""
    kind, source = kind_of(graph, i), int(graph.sources[i])
    if kind == "logit":
        return f'Output "{text}" (p={float(graph.activations[i]):.3f})'
    if kind == "embedding":
        return f'Emb: "{text}"'
    if kind == "feature":
        return text
    where = "attn" if source >= 0 and reads_attention(graph.dictionaries[source]) else "mlp"
    return f'{"Err" if kind == "error" else "Bias"}: {where} "{graph.tokens[int(graph.positions[i])]}"'


def _list_graph(folder: Path, metadata: Mapping[str, Any]) -> None:
    file = folder / INDEX
    with hold_folder(folder):
        held = require_object(read_json(file), str(file)) if file.is_file() else {}
        graphs = held.get("graphs", [])
        if not isinstance(graphs, list):
            raise ValueError(f"{file} must hold a list of graphs, got {type(graphs).__name__}. Remove it.")
        others = [one for one in graphs if not (isinstance(one, dict) and one.get("slug") == metadata["slug"])]
        write_json(file, {**held, "graphs": [*others, dict(metadata)]})

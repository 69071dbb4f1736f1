"""`read_graph_file`: attribution graphs from files of circuit-tracer and Neuronpedia, with the state of their page."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from jaxtyping import Float, Int

from saelab.circuits.graph import KINDS, AttributionGraph, NodeKind
from saelab.circuits.graph_files import SCHEMA_VERSION, TYPES, unpair
from saelab.circuits.graph_views import LINK_TYPES, GraphView
from saelab.stores.results import Result
from saelab.stores.validation import parse_json, read_json, require_object

T = TypeVar("T")
Edge = tuple[int, int, float]
LOGIT_TEXT = re.compile(r"""[^"'“]*["'“](?P<token>.*)["'”] \(p=(?P<p>[0-9.eE+-]+)\)""", re.DOTALL)
"""the label of a logit, such as `Output " the" (p=0.123)`, from which pages read its probability"""
MADE = re.compile(r"(Emb|Err|(L\d+ )?Bias|Output|output|Logit)\b")
"""labels that no person gave, of nodes other than features"""
EMBEDDING = re.compile(r"E_(\d+)_\d+")
PICKLES = (b"PK\x03\x04", b"\x80")


@dataclass(frozen=True, kw_only=True, eq=False)
class GraphFile(Result):
    """Content of a graph's JSON file."""

    graph: AttributionGraph
    view: GraphView
    """the state of its page; what features are called is among its labels"""
    slug: str
    """name of the graph"""
    scan: str
    """name of the model, or of its set of transcoders"""
    node_ids: tuple[str, ...]
    influence: Float[np.ndarray, "n_nodes"] = field(repr=False)
    """see `influence_shares`; NaN where the file has none"""
    metadata: Mapping[str, Any] = field(repr=False)
    """all of the file's metadata"""


def read_graph_json(path: str | Path) -> AttributionGraph:
    """The graph of a JSON file of saelab, circuit-tracer or Neuronpedia; `read_graph_file` has the rest of the file.

    Args:
        path: the file.

    Raises:
        FileNotFoundError, ValueError: as for `read_graph_file`.
    """
    return read_graph_file(path).graph


def read_graph_file(path: str | Path) -> GraphFile:
    """All of a graph's JSON file, as saelab, circuit-tracer or Neuronpedia writes it.

    What a file does not have is known by what it has: `values` are the sums of the links into a node, dictionaries the
    outputs of the MLP or of attention, one for each layer and kind; unknown codes and probabilities are NaN, unknown
    token ids -1. Nodes that the file's page state names and the file does not have, such as pruned ones, are left out
    of the view.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is none of these, is broken, has two nodes of one id or links that lead back, or is a `.pt`
            file of circuit-tracer, which is a pickle.
    """
    path = Path(path)
    _refuse_pickle(path)
    plain = require_object(read_json(path), str(path))
    if "kinds" in plain and "metadata" not in plain:
        raise ValueError(f"`path` must be JSON of a graph's page, got {path}, which `AttributionGraph.load` reads.")
    try:
        return _build(plain)
    except ValueError as error:
        raise ValueError(f"{path} must hold an attribution graph, but {error}. Was it edited or cut off?") from None


def read_view(path: str | Path, node_ids: Sequence[str]) -> GraphView:
    """The view that a page of `write_graph_page` saved, or that of a graph's file.

    Args:
        path: JSON file with `qParams`.
        node_ids: id of each node of the graph that is viewed: `make_node_ids(graph)`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file has no `qParams`, or these are broken.
    """
    plain = require_object(read_json(path), str(path))
    places = {name: i for i, name in enumerate(node_ids)}
    try:
        return _read_params(_take(plain, "qParams", dict), places, {}, {}, None)
    except ValueError as error:
        raise ValueError(f"{path} must hold the view of a graph, but {error}. Was it edited or cut off?") from None


def _refuse_pickle(path: Path) -> None:
    if not path.is_file():
        return
    with path.open("rb") as file:
        head = file.read(4)
    if head.startswith(PICKLES):
        raise ValueError(
            f"`path` must be a graph's JSON, got {path}, a pickle: circuit-tracer's .pt files hold objects of its own "
            "classes, and loading them runs whatever code is in the file. Convert it where it was made, with "
            "circuit-tracer's `create_graph_files`."
        )


@dataclass(frozen=True)
class _Read:
    """A node of a file, checked."""

    plain: dict[str, Any]
    kind: NodeKind
    layer: int
    position: int
    latent: int
    source: int = -1

    @property
    def label(self) -> str:
        text = _take(self.plain, "clerp", str, "")
        return "" if self.kind != "feature" and MADE.match(text) else text

    @property
    def activation(self) -> float:
        if self.kind == "feature":
            return _number(self.plain, "activation")
        if self.kind != "logit":
            return 1.0
        known = _number(self.plain, "token_prob")
        said = LOGIT_TEXT.fullmatch(_take(self.plain, "clerp", str, ""))
        return float(said["p"]) if np.isnan(known) and said else known


def _build(plain: dict[str, Any]) -> GraphFile:
    metadata: dict[str, Any] = _take(plain, "metadata", dict)
    own: dict[str, Any] = _take(metadata, "saelab", dict, {})
    tokens = tuple(_take_texts(metadata, "prompt_tokens"))
    nodes, dictionaries = _read_nodes(_take(plain, "nodes", list), metadata, own, len(tokens))
    places = _index(nodes)
    edges = [_read_link(i, link, places) for i, link in enumerate(_take(plain, "links", list))]
    order = _order(nodes, edges)
    nodes = [nodes[i] for i in order]
    rank = np.empty(len(order), dtype=np.int64)
    rank[order] = np.arange(len(order))
    starts, ends = (rank[np.array([edge[side] for edge in edges], dtype=np.int64)] for side in (0, 1))
    weights = np.array([edge[2] for edge in edges], dtype=np.float64)
    sums, values = np.bincount(ends, weights, len(nodes)), _numbers(nodes, "value")
    slopes, targets = _numbers(nodes, "slope"), _numbers(nodes, "target_weight")
    graph = AttributionGraph(
        prompt=_take(metadata, "prompt", str),
        tokens=tokens,
        token_ids=_read_token_ids(own, nodes, len(tokens)),
        model=_take(own, "model", str, _take(metadata, "scan", str)),
        dictionaries=dictionaries,
        kinds=_column([KINDS.index(node.kind) for node in nodes]),
        layers=_column([node.layer for node in nodes]),
        positions=_column([node.position for node in nodes]),
        sources=_column([node.source for node in nodes]),
        features=_column([node.latent for node in nodes]),
        activations=np.array([node.activation for node in nodes], dtype=np.float32),
        values=np.where(np.isnan(values), sums, values).astype(np.float32),
        edge_sources=starts,
        edge_targets=ends,
        edge_weights=weights.astype(np.float32),
        target_weights=None if np.isnan(targets).any() else targets.astype(np.float32),
        slopes=None if np.isnan(slopes).any() else slopes.astype(np.float32),
        logit_tokens=tuple(_read_token(node) for node in nodes if node.kind == "logit"),
        completeness_error=_number(own, "completeness_error"),
        n_left_out=_take(own, "n_left_out", int, 0),
    )
    named = {i: node.label for i, node in enumerate(nodes) if node.label}
    params: dict[str, Any] = _take(plain, "qParams", dict, {})
    threshold = _number(metadata, "node_threshold")
    view = _read_params(
        params, _index(nodes), named, _by_number(nodes), None if np.isnan(threshold) else float(threshold)
    )
    return GraphFile(
        graph=graph,
        view=view,
        slug=_take(metadata, "slug", str),
        scan=_take(metadata, "scan", str),
        node_ids=tuple(node.plain["node_id"] for node in nodes),
        influence=_numbers(nodes, "influence"),
        metadata=metadata,
    )


# ---- nodes
def _read_nodes(
    plain: list[Any], metadata: dict[str, Any], own: dict[str, Any], n_tokens: int
) -> tuple[list[_Read], tuple[str, ...]]:
    objects = [_need(node, f"node {i}") for i, node in enumerate(plain)]
    kinds = [_read_kind(node) for node in objects]
    layers = _read_layers(objects, kinds, own)
    paired = metadata.get("schema_version") == SCHEMA_VERSION
    nodes = []
    for node, kind, layer in zip(objects, kinds, layers, strict=True):
        position = _take(node, "ctx_idx", int)
        if not 0 <= position < n_tokens:
            raise ValueError(f"node {node['node_id']} is at token {position} of {n_tokens}")
        latent = _read_latent(node, kind, layer, position, paired)
        nodes.append(_Read(node, kind, layer, position, latent))
    return _find_sources(nodes, metadata, own)


def _read_kind(node: dict[str, Any]) -> NodeKind:
    name, kind = _take(node, "node_id", str), _take(node, "feature_type", str)
    if kind not in TYPES:
        raise ValueError(f"node {name} has the feature_type {kind!r}, which is none of {list(TYPES)}")
    return TYPES[kind]


def _read_layers(nodes: list[dict[str, Any]], kinds: list[NodeKind], own: dict[str, Any]) -> list[int]:
    """Layers as numbers: -1 for embeddings, the number of layers for logits."""
    inside, tops = [-1], []
    for node, kind in zip(nodes, kinds, strict=True):
        if kind == "embedding":
            continue
        text = str(node.get("layer"))
        if kind == "logit":
            tops += [int(text)] if text.isdecimal() else []
        elif text.isdecimal():
            inside.append(int(text))
        elif not (kind == "bias" and text == "E"):  # the model's own, of no layer
            raise ValueError(f"node {node['node_id']} has the layer {text!r}, which is no number")
    n_layers = max(inside) + 1
    if tops and max(tops) > n_layers:  # circuit-tracer has logits one above the number of layers, others at it
        n_layers = max(tops) - 1
    n_layers = _take(own, "n_layers", int, n_layers)
    return [
        n_layers if kind == "logit" else -1 if kind == "embedding" or node["layer"] == "E" else int(str(node["layer"]))
        for node, kind in zip(nodes, kinds, strict=True)
    ]


def _read_latent(node: dict[str, Any], kind: NodeKind, layer: int, position: int, paired: bool) -> int:
    """The number of the latent, or of the token of an embedding or logit."""
    name, number = node["node_id"], node.get("feature")
    if kind == "embedding":
        said = EMBEDDING.fullmatch(name)
        return int(said[1]) if said else -1
    if kind in ("error", "bias"):
        return -1
    if not isinstance(number, int) or isinstance(number, bool) or number < 0:
        raise ValueError(f"node {name} must have the number of its latent as `feature`, got {number!r}")
    if kind == "logit":
        return number
    parts = name.split("_")
    if paired and unpair(number)[0] == layer:
        latent = unpair(number)[1]
        if len(parts) == 3 and parts != [str(layer), str(latent), str(position)]:
            raise ValueError(f"node {name} is latent {latent} of layer {layer} at token {position} by its fields")
        return latent
    if len(parts) > 2 and (parts[0], parts[-1]) == (str(layer), str(position)) and parts[-2].isdecimal():
        return int(parts[-2])
    return number


def _find_sources(
    nodes: list[_Read], metadata: dict[str, Any], own: dict[str, Any]
) -> tuple[list[_Read], tuple[str, ...]]:
    """The nodes with the dictionaries that they belong to, and these: named by us, or by layer and kind."""
    if own:
        dictionaries = tuple(_take_texts(metadata, "transcoder_list"))
        sources = [
            -1 if node.kind in ("embedding", "logit") else _take(node.plain, "dictionary", int) for node in nodes
        ]
        if wrong := [source for source in sources if not -1 <= source < len(dictionaries)]:
            raise ValueError(f"a node's dictionary is {wrong[0]}, but there are {len(dictionaries)} of them")
    else:
        places = [_name_source(node) for node in nodes]
        found = sorted({place for place in places if place is not None})
        dictionaries = tuple(f"blocks.{layer}.hook_{part}_out" for layer, part in found)
        sources = [-1 if place is None else found.index(place) for place in places]
    return [
        _Read(node.plain, node.kind, node.layer, node.position, node.latent, source)
        for node, source in zip(nodes, sources, strict=True)
    ], dictionaries


def _name_source(node: _Read) -> tuple[int, str] | None:
    if node.kind in ("embedding", "logit"):
        return None
    attention = "lorsa" in node.plain["feature_type"] or (node.kind == "bias" and "attn" in node.plain["node_id"])
    return node.layer, "attn" if attention else "mlp"


def _index(nodes: list[_Read]) -> dict[str, int]:
    places: dict[str, int] = {}
    for i, node in enumerate(nodes):
        name = node.plain["node_id"]
        if name in places:
            raise ValueError(
                f"two nodes have the id {name}, so that their links cannot be told apart; circuit-tracer gives the "
                "error of layer L the id of latent L of layer 0 at the same token"
            )
        places[name] = i
    return places


def _by_number(nodes: list[_Read]) -> dict[str, list[int]]:
    """Nodes of each `feature`, by which circuit-tracer's pages name them."""
    found: dict[str, list[int]] = {}
    for i, node in enumerate(nodes):
        if node.kind == "feature":
            found.setdefault(str(node.plain["feature"]), []).append(i)
    return found


def _read_token_ids(own: dict[str, Any], nodes: list[_Read], n_tokens: int) -> Int[np.ndarray, "n_tokens"]:
    ids = np.full(n_tokens, -1, dtype=np.int64)
    for node in nodes:
        if node.kind == "embedding":
            ids[node.position] = node.latent
    given = _take(own, "token_ids", list, ids.tolist())
    if len(given) != n_tokens or not all(type(number) is int for number in given):
        raise ValueError(f"its token_ids must be {n_tokens} numbers")
    return _column(given)


def _read_token(node: _Read) -> str:
    """The text of a logit's token."""
    said = LOGIT_TEXT.fullmatch(_take(node.plain, "clerp", str, ""))
    return _take(node.plain, "token", str, said["token"] if said else f"<{node.latent}>")


# ---- links
def _read_link(i: int, link: Any, places: dict[str, int]) -> Edge:
    link = _need(link, f"link {i}")
    source, target = (_take(link, name, str) for name in ("source", "target"))
    for name in (source, target):
        if name not in places:
            raise ValueError(f"link {i} is of a node {name!r}, which is not there")
    weight = _number(link, "weight")
    if not np.isfinite(weight):
        raise ValueError(f"link {i} has no weight")
    return places[source], places[target], weight


def _order(nodes: list[_Read], edges: list[Edge]) -> list[int]:
    """The nodes with sources before their targets: as in the file, or else by layer, attention before the MLP."""
    if all(source < target for source, target, _ in edges):
        return _rank_logits(nodes)
    rest = ("bias", "error", "feature", "embedding", "logit")
    keys = [
        (node.layer, "lorsa" not in node.plain["feature_type"], rest.index(node.kind), node.position, i)
        for i, node in enumerate(nodes)
    ]
    order = sorted(range(len(nodes)), key=keys.__getitem__)
    for source, target, _ in edges:
        if keys[source] > keys[target]:
            names = [nodes[i].plain["node_id"] for i in (source, target)]
            raise ValueError(f"a link leads back from {names[0]} to {names[1]}")
    return order


def _rank_logits(nodes: list[_Read]) -> list[int]:
    """The nodes as in the file, but logits in the order that they had before they were written."""
    logits = [i for i, node in enumerate(nodes) if node.kind == "logit"]
    ranked = iter(sorted(logits, key=lambda i: _take(nodes[i].plain, "rank", int, 0)))
    return [next(ranked) if node.kind == "logit" else i for i, node in enumerate(nodes)]


# ---- the page's state
def _read_params(
    params: dict[str, Any],
    places: dict[str, int],
    named: dict[int, str],
    numbers: dict[str, list[int]],
    threshold: float | None,
) -> GraphView:
    pinned = params.get("pinnedIds") or []
    pinned = pinned.split(",") if isinstance(pinned, str) else pinned
    groups = params.get("supernodes") or []
    if not isinstance(pinned, list) or not isinstance(groups, list) or not all(isinstance(g, list) for g in groups):
        raise ValueError("its pinnedIds and supernodes must be lists")
    supernodes = []
    for group in groups:
        if not all(isinstance(name, str) for name in group) or not group:
            raise ValueError("each of its supernodes must be a list of a name and of node ids")
        members = tuple(places[name] for name in group[1:] if name in places)
        supernodes += [(group[0], members)] if members else []
    labels = dict(named)
    for name, text in _read_names(params.get("clerps")):
        labels.update(dict.fromkeys([places[name]] if name in places else numbers.get(name, []), text))
    link_type = params.get("linkType")
    limits = [_number(params, name) for name in ("pruningThreshold", "edgeThreshold")]
    node_limit, edge_limit = (None if np.isnan(limit) else float(limit) for limit in limits)
    return GraphView(
        pinned=tuple(dict.fromkeys(places[name] for name in pinned if name in places)),
        supernodes=tuple(supernodes),
        clicked=places.get(str(params.get("clickedId"))),
        link_type=link_type if link_type in LINK_TYPES else "both",
        positions=str(params.get("sg_pos") or ""),
        node_threshold=threshold if node_limit is None else node_limit,
        edge_threshold=edge_limit,
        labels=labels,
    )


def _read_names(plain: Any) -> list[tuple[str, str]]:
    """Pairs of a node and its name; circuit-tracer keeps them as JSON in a text."""
    pairs = parse_json(plain) if isinstance(plain, str) and plain else plain or []
    if not isinstance(pairs, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in pairs):
        raise ValueError("its clerps must be pairs of a node and a name")
    return [(str(name), str(text)) for name, text in pairs if text]


# ---- checked fields
def _take(plain: dict[str, Any], name: str, kind: type[T], default: T | None = None) -> T:
    """A field of this type; ValueError where it is missing without a default, or another type's."""
    value = plain.get(name)
    if value is None and default is not None:
        return default
    if not isinstance(value, kind) or isinstance(value, bool):
        said = "it is missing" if value is None else f"it is a {type(value).__name__}"
        raise ValueError(f"`{name}` must be a {kind.__name__}, but {said} ({_name_owner(plain)})")
    return value


def _name_owner(plain: dict[str, Any]) -> str:
    owner = plain.get("node_id") or plain.get("slug")
    return f"in {owner}" if isinstance(owner, str) else f"among {', '.join(map(str, list(plain)[:5]))}"


def _take_texts(plain: dict[str, Any], name: str) -> list[str]:
    texts: list[Any] = _take(plain, name, list)
    if not all(isinstance(text, str) for text in texts):
        raise ValueError(f"`{name}` must be a list of texts")
    return texts


def _need(plain: Any, what: str) -> dict[str, Any]:
    if not isinstance(plain, dict):
        raise ValueError(f"{what} must be an object, but it is a {type(plain).__name__}")
    return plain


def _number(plain: dict[str, Any], name: str) -> float:
    """A number, or NaN where there is none."""
    value = plain.get(name)
    if value is None:
        return float("nan")
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise ValueError(f"`{name}` must be a number, but it is {str(value)[:40]!r} ({_name_owner(plain)})")
    return float(value)


def _numbers(nodes: list[_Read], name: str) -> Float[np.ndarray, "n_nodes"]:
    return np.array([_number(node.plain, name) for node in nodes], dtype=np.float64)


def _column(numbers: list[int]) -> Int[np.ndarray, "n"]:
    return np.array(numbers, dtype=np.int64)

"""How a graph is shown: names of nodes, shares of influence, and `GraphView`: pins, supernodes, thresholds."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import numpy as np
from jaxtyping import Float

from saelab.circuits.graph import KINDS, AttributionGraph, NodeKind
from saelab.circuits.graph_scores import SupernodeGraph
from saelab.stores.feature_names import FeatureNames, name_sides, require_names
from saelab.stores.results import Result

LinkType = Literal["input", "output", "either", "both"]
"""Which links of the clicked node a page draws: those into it, those out of it, or all. circuit-tracer has two words
for all, which differ with several pinned nodes."""
LINK_TYPES: tuple[LinkType, ...] = get_args(LinkType)
ATTENTION = ("attn", "hook_z", "hook_result")
"""parts of the names of hook points behind attention"""


NodeLabels = Mapping[str, FeatureNames]
"""For each hook point of `dictionaries`, texts by feature or a label store."""


@dataclass(frozen=True, kw_only=True)
class GraphView(Result):
    """How a graph is shown: what circuit-tracer and Neuronpedia keep as `qParams` beside it.

    >>> GraphView(pinned=(3, 5), supernodes=(("fruit", (3, 4)),)).supernodes[0][0]
    'fruit'
    """

    pinned: tuple[int, ...] = ()
    """nodes of the subgraph"""
    supernodes: tuple[tuple[str, tuple[int, ...]], ...] = ()
    """name and nodes of each group"""
    clicked: int | None = None
    """the node whose links are listed"""
    link_type: LinkType = "both"
    positions: str = ""
    """places of the subgraph's boxes, x and y in turns, in 0..1000; empty for places by layer and token"""
    node_threshold: float | None = None
    """nodes are shown up to this cumulative share of influence, in 0..1"""
    edge_threshold: float | None = None
    """the same for edges"""
    labels: Mapping[int, str] = field(default_factory=dict)
    """names of nodes, instead of those of label stores"""

    def __post_init__(self) -> None:
        if self.link_type not in LINK_TYPES:
            raise ValueError(f"`link_type` must be one of {list(LINK_TYPES)}, got {self.link_type!r}.")
        for name in ("node_threshold", "edge_threshold"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 1:
                raise ValueError(f"`{name}` must be a share in 0..1, got {value:g}.")

    def require_nodes(self, graph: AttributionGraph) -> None:
        """Check that all nodes of the view are the graph's; ValueError where one is not."""
        grouped = [node for _, nodes in self.supernodes for node in nodes]
        clicked = [] if self.clicked is None else [self.clicked]
        for node in (*self.pinned, *grouped, *clicked, *self.labels):
            if not 0 <= node < len(graph.kinds):
                raise ValueError(
                    f"A view's nodes must be in 0..{len(graph.kinds) - 1}, got {node}. Is it the view of another graph?"
                )

    def to_params(self, ids: Sequence[str]) -> dict[str, Any]:
        """The view as `qParams`, with the names that circuit-tracer's pages give them.

        `ids` has the id of each node. Labels are not among them: in a graph's file they stand with the nodes.
        """
        thresholds = {"pruningThreshold": self.node_threshold, "edgeThreshold": self.edge_threshold}
        return {
            "pinnedIds": [ids[node] for node in self.pinned],
            "supernodes": [[name, *(ids[node] for node in nodes)] for name, nodes in self.supernodes],
            "linkType": self.link_type,
            "clickedId": "" if self.clicked is None else ids[self.clicked],
            "sg_pos": self.positions,
            **{name: float(value) for name, value in thresholds.items() if value is not None},
        }


def kind_of(graph: AttributionGraph, node: int) -> NodeKind:
    """The kind of a node."""
    return KINDS[int(graph.kinds[node])]


def reads_attention(hook_point: str) -> bool:
    """Whether a dictionary of this hook point has attention's output as its target.

    >>> reads_attention("blocks.0.hook_attn_out"), reads_attention("blocks.0.hook_mlp_out")
    (True, False)
    """
    return any(part in hook_point for part in ATTENTION)


def name_nodes(graph: AttributionGraph, labels: NodeLabels | None = None) -> list[str]:
    """A text for each node: labels of features, tokens of embeddings and logits; empty for all others.

    A feature with a negative code has the label of its negative side, or else that of the whole feature behind a minus
    sign; one with a positive code that of its positive side, or else that of the whole feature. `labels` has texts by
    feature or a label store for each hook point of the graph's dictionaries; hook points may be missing. ValueError for
    a hook point of none of them.
    """
    if unknown := [hook for hook in labels or {} if hook not in graph.dictionaries]:
        raise ValueError(
            f"`labels` must have hook points of the graph's dictionaries, got {unknown[0]!r}; "
            f"there are {list(graph.dictionaries)[:5]}."
        )
    for names in (labels or {}).values():
        require_names(names)
    logits = dict(zip(np.flatnonzero(graph.is_kind("logit")).tolist(), graph.logit_tokens, strict=False))
    named = {
        hook: _name_features(graph, i, (labels or {})[hook])
        for i, hook in enumerate(graph.dictionaries)
        if hook in (labels or {})
    }
    found = []
    for node, (source, feature) in enumerate(zip(graph.sources.tolist(), graph.features.tolist(), strict=True)):
        kind = kind_of(graph, node)
        text = ""
        if kind == "embedding":
            text = graph.tokens[int(graph.positions[node])]
        elif kind == "logit":
            text = logits.get(node, f"token {feature}")
        elif kind == "feature" and graph.dictionaries[source] in named:
            text = named[graph.dictionaries[source]](feature, -1 if graph.activations[node] < 0 else 1)
        found.append(text)
    return found


def group_by_label(graph: AttributionGraph, labels: NodeLabels) -> SupernodeGraph:
    """The graph whose supernodes are the labels: features of one label are joined, whatever their token and layer.

    Edges between features of one label are inside their supernode, and not shown. Features without a label, and all
    other nodes, stay alone. Labels of negative codes are named as in `name_nodes`.

    Args:
        graph: the graph, pruned or not.
        labels: for each hook point of the graph's dictionaries, texts by feature or a label store; some may be missing.

    Raises:
        ValueError: a hook point of none of the dictionaries.
    """
    names, is_feature = name_nodes(graph, labels), graph.is_kind("feature")
    return graph.group([name if own else "" for name, own in zip(names, is_feature.tolist(), strict=True)])


def _name_features(graph: AttributionGraph, source: int, labels: FeatureNames) -> Callable[[int, float | int], str]:
    """Function from a feature and the sign of its code to its text."""
    own = (graph.sources == source) & graph.is_kind("feature")
    return name_sides(labels, graph.features[own].tolist())


def influence_shares(graph: AttributionGraph) -> tuple[Float[np.ndarray, "n_nodes"], Float[np.ndarray, "n_edges"]]:
    """For each node and each edge, the share of all influence that it and those with more influence have together.

    Nodes are ranked by `influence`, edges as in `prune`: by their share of the target's inputs, times the target's
    influence and weight. Nodes up to a share of .8 are the most influential ones that have at most .8 of it; pages of
    circuit-tracer and Neuronpedia hide nodes by this number. It is 0 for targets, 1 for biases.
    """
    inputs = ~graph.is_kind("bias")[graph.edge_sources]
    parts = graph.edges[inputs].normalized()
    scores = np.zeros(len(inputs))
    scores[inputs] = parts.weights * (graph.influence + graph.start)[parts.targets]
    return np.where(graph.start > 0, 0.0, _cumulate(graph.influence)), _cumulate(scores)


def _cumulate(scores: Float[np.ndarray, "n"]) -> Float[np.ndarray, "n"]:
    order = np.argsort(-scores, kind="stable")
    shares = np.ones_like(scores)
    if total := scores.sum():
        shares[order] = np.minimum(np.cumsum(scores[order]) / total, 1.0)
    return shares

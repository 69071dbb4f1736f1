"""`AttributionGraph`: which embeddings, features and errors of a prompt cause which features and logits."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Float, Int

from saelab.circuits.graph_scores import EdgeList, SupernodeGraph, choose_kept, follow_back
from saelab.stores.results import Result, format_table
from saelab.stores.validation import naming, read_json, refuse_unknown, require_object

NodeKind = Literal["embedding", "feature", "error", "bias", "logit", "score"]
KINDS: tuple[NodeKind, ...] = ("embedding", "feature", "error", "bias", "logit", "score")
N_SHOWN = 10
SCORES = ("replacement_score", "completeness_score")
"""what a file has besides the fields"""


@dataclass(frozen=True, kw_only=True, eq=False)
class NodeTable(Result):
    """Nodes of a prompt: embeddings, features, errors and biases. Entry i of each array of nodes is node i."""

    tokens: tuple[str, ...]
    """the tokens of the prompt, as text"""
    dictionaries: tuple[str, ...]
    """hook point that each dictionary writes to, in the order of the model"""
    kinds: Int[np.ndarray, "n_nodes"] = field(repr=False)
    """index in `KINDS`"""
    layers: Int[np.ndarray, "n_nodes"] = field(repr=False)
    """layer of the node, of a score the head's; -1 for embeddings, the number of layers for logits"""
    positions: Int[np.ndarray, "n_nodes"] = field(repr=False)
    """token that the node belongs to"""
    sources: Int[np.ndarray, "n_nodes"] = field(repr=False)
    """index in `dictionaries`; -1 for embeddings, logits and scores, for what an MLP without a dictionary writes (an
    error), and for the bias that stands for all biases of the model and the encoders
    """
    features: Int[np.ndarray, "n_nodes"] = field(repr=False)
    """latent of the dictionary; token id for embeddings and logits; head of a score; -1 for errors and biases"""
    activations: Float[np.ndarray, "n_nodes"] = field(repr=False)
    """z of features, probability of logits, 1 for the others"""

    def __len__(self) -> int:
        return len(self.kinds)

    def is_kind(self, *kinds: NodeKind) -> np.ndarray:
        """Mask of the nodes of one of these kinds."""
        return np.isin(self.kinds, [KINDS.index(kind) for kind in kinds])

    def describe(self, node: int) -> str:
        """A node in words: its kind, layer or hook point, feature and token."""
        kind, source = KINDS[int(self.kinds[node])], int(self.sources[node])
        position, feature = int(self.positions[node]), int(self.features[node])
        token = f"{position} {self.tokens[position]!r}" if 0 <= position < len(self.tokens) else str(position)
        if kind == "bias" and source < 0:
            return "biases of the model"
        place = self.dictionaries[source] if source >= 0 else f"MLP {int(self.layers[node])}"
        of = {"embedding": "", "feature": f" {feature} of {place}"}.get(kind, f" of {place}")
        return f"{kind}{of} at {token}"


@dataclass(frozen=True, kw_only=True, eq=False)
class AttributionGraph(NodeTable):
    """Result of `trace`: nodes and the direct effects between them, on one prompt.

    Nodes are in the order in which the model computes them, so that a source
    comes before its targets. In the model whose attention patterns and norm scales are frozen at the prompt's, an edge
    is what its target's value loses when its source is taken away, everything else that is written held fixed.
    """

    prompt: str
    """the text"""
    token_ids: Int[np.ndarray, "n_tokens"] = field(repr=False)
    model: str
    """name of the model"""
    values: Float[np.ndarray, "n_nodes"] = field(repr=False)
    """what the edges into the node sum to: its pre-activation, its logit less the mean of all, or its score; 0 for
    nodes that nothing leads to"""
    edge_sources: Int[np.ndarray, "n_edges"] = field(repr=False)
    edge_targets: Int[np.ndarray, "n_edges"] = field(repr=False)
    edge_weights: Float[np.ndarray, "n_edges"] = field(repr=False)
    """direct effect of the source on the target's value"""
    target_weights: Float[np.ndarray, "n_nodes"] | None = field(default=None, repr=False)
    """weight of each node as a target that was asked for, in influence: the probability of a logit, 1 for a feature or
    a score, 0 for all others; None takes the probabilities of logits"""
    slopes: Float[np.ndarray, "n_nodes"] | None = field(default=None, repr=False)
    """derivative of z by the pre-activation, of features; None is 1"""
    logit_tokens: tuple[str, ...] = field(default=(), repr=False)
    """text of each logit's token, or a score in words, in the order of the nodes"""
    completeness_error: float = float("nan")
    """largest difference between a target's value and the sum of its edges, relative to the value, or to the mean
    magnitude of the values of its dictionary where that is larger"""
    n_left_out: int = 0
    """features that fired beyond `max_features`: they are parts of the errors at their place"""

    @cached_property
    def start(self) -> Float[np.ndarray, "n_nodes"]:
        """Weight of each node as a target: `target_weights`, or the logits' probabilities, all equal where unknown."""
        if self.target_weights is not None:
            return self.target_weights.astype(np.float64)
        found = np.where(self.is_kind("logit"), np.nan_to_num(self.activations.astype(np.float64)), 0.0)
        return found if found.any() else self.is_kind("logit").astype(np.float64)

    @cached_property
    def edges(self) -> EdgeList:
        """All edges."""
        return EdgeList(len(self), self.edge_sources, self.edge_targets, self.edge_weights)

    @cached_property
    def _explained(self) -> EdgeList:
        """Shares of each target's inputs, without biases, which no prompt changes."""
        return self.edges[~self.is_kind("bias")[self.edge_sources]].normalized()

    @cached_property
    def influence(self) -> Float[np.ndarray, "n_nodes"]:
        """Influence of each node on the targets, along all paths: w (A + A^2 + ...) of shares A_ts = |edge s to t| over
        the sum of |edges into t|, and target weights w; 0 for biases, which are not among the inputs.
        """
        return self._explained.spread(self.start)

    @property
    def replacement_score(self) -> float:
        """Influence of embeddings over that of embeddings and errors, in 0..1: how much of the targets is led back to
        the prompt's tokens through features.
        """
        tokens, errors = (float(self.influence[self.is_kind(kind)].sum()) for kind in ("embedding", "error"))
        return tokens / (tokens + errors) if tokens + errors else float("nan")

    @property
    def completeness_score(self) -> float:
        """Share of inputs that are no errors, in 0..1: the mean over all nodes, weighted by influence. Nodes without
        inputs count as complete, errors among them, as in circuit-tracer.
        """
        shares = self._explained
        is_error = self.is_kind("error")[shares.sources]
        errors = np.bincount(shares.targets[is_error], shares.weights[is_error], len(self))
        weights = self.influence + self.start
        return float(((1 - errors) * weights).sum() / weights.sum()) if weights.any() else float("nan")

    def effects(self, target: int | None = None) -> Float[np.ndarray, "n_nodes"]:
        """What a target's value loses when a node is taken away, along all paths, for every node.

        Exact in the frozen model as long as the same features fire: those downstream lose what their pre-activations
        lose. An edge is the part of it that no other feature passes on.

        Args:
            target: the target's node; None is the target of the largest weight.
        """
        target = int(np.argmax(self.start)) if target is None else target
        if not 0 <= target < len(self):
            raise ValueError(f"`target` must be a node in 0..{len(self) - 1}, got {target}.")
        slopes = np.ones(len(self)) if self.slopes is None else self.slopes.astype(np.float64)
        z = self.activations.astype(np.float64)
        passed = np.where(self.is_kind("feature") & (z != 0), slopes / np.where(z == 0, 1, z), 0.0)
        passed[target] = 1.0
        weights = self.edge_weights * passed[self.edge_targets]
        start = np.zeros(len(self))
        start[target] = 1.0
        return EdgeList(len(self), self.edge_sources, self.edge_targets, weights).spread(start)

    def find_path(self, source: int, target: int | None = None) -> tuple[int, ...]:
        """Nodes of the strongest path from a node to a target: that with the largest product of shares.

        Args:
            source: node that the path begins with.
            target: node that it ends with; None is the target of the largest weight.

        Raises:
            ValueError: a node that the graph does not have, and where no path leads from the one to the other.
        """
        target = int(np.argmax(self.start)) if target is None else target
        for name, node in (("source", source), ("target", target)):
            if not 0 <= node < len(self):
                raise ValueError(f"`{name}` must be a node in 0..{len(self) - 1}, got {node}.")
        shares = self._explained
        best, last = np.zeros(len(self)), np.full(len(self), -1)
        best[source] = 1.0
        order = np.argsort(shares.targets, kind="stable")  # a node's inputs are done before it
        bounds = np.searchsorted(shares.targets[order], np.arange(len(self) + 1))
        for node in range(source + 1, target + 1):
            into = order[bounds[node] : bounds[node + 1]]
            if len(into):
                products = best[shares.sources[into]] * shares.weights[into]
                most = int(np.argmax(products))
                best[node], last[node] = products[most], shares.sources[into[most]]
        if not best[target] > 0:
            raise ValueError(f"A path must lead from node {source} to node {target}, got none. Is one of them pruned?")
        path = [target]
        while path[-1] != source:
            path.append(int(last[path[-1]]))
        return tuple(path[::-1])

    def prune(self, nodes: float = 0.8, edges: float = 0.98) -> "AttributionGraph":
        """The graph of the most influential nodes and edges.

        The fewest nodes are kept that have a share `nodes` of all influence, and of the edges between them the fewest
        that have a share `edges` of their scores: the source's share of the target's inputs times the target's
        influence. Embeddings and targets stay, biases do not. Features and errors that then lead nowhere are dropped,
        and features that nothing leads to.

        Args:
            nodes: share of influence, in (0, 1].
            edges: share of the edges' scores, in (0, 1].
        """
        for name, share in (("nodes", nodes), ("edges", edges)):
            if not 0 < share <= 1:
                raise ValueError(f"`{name}` must be a share in (0, 1], got {share}.")
        always = self.is_kind("embedding") | (self.start > 0)
        of_all = ~self.is_kind("bias")[self.edge_sources]
        keep, kept = choose_kept(self.edges[of_all], self.start, always, self.is_kind("feature"), nodes, edges)
        chosen = np.zeros(len(of_all), bool)
        chosen[np.flatnonzero(of_all)[kept]] = True
        return self.select(keep, chosen)

    def follow(self, share: float = 0.8, target: int | None = None) -> "AttributionGraph":
        """The graph found from a target back: of each node reached, the fewest inputs with this share of its inputs.

        The first step keeps the target's contributors, the next theirs, down to embeddings, errors and biases, which
        count as inputs here. Unlike `prune` it weighs each node by itself, however little of the target comes through.
        Source: arXiv:2402.12201.

        Args:
            share: share of the sum of a node's inputs, by magnitude, in (0, 1].
            target: node to begin with; None are all targets that were asked for.
        """
        if not 0 < share <= 1:
            raise ValueError(f"`share` must be a share in (0, 1], got {share}.")
        targets = self.start > 0
        if target is not None:
            if not 0 <= target < len(self):
                raise ValueError(f"`target` must be a node in 0..{len(self) - 1}, got {target}.")
            targets = np.arange(len(self)) == target
        return self.select(*follow_back(self.edges, targets, share))

    def select(self, nodes: np.ndarray, edges: np.ndarray | None = None) -> "AttributionGraph":
        """The graph of some nodes and the edges between them.

        Args:
            nodes: (n_nodes,) mask.
            edges: (n_edges,) mask; None is all.
        """
        inside = nodes[self.edge_sources] & nodes[self.edge_targets]
        inside = inside if edges is None else inside & edges
        number = np.cumsum(nodes) - 1
        changed: dict[str, Any] = {}
        for name in PER_NODE:
            value = getattr(self, name)
            changed[name] = None if value is None else value[nodes]
        logits = np.flatnonzero(self.is_kind("logit", "score"))
        texts = tuple(text for node, text in zip(logits, self.logit_tokens, strict=False) if nodes[node])
        return replace(
            self,
            **changed,
            edge_sources=number[self.edge_sources[inside]],
            edge_targets=number[self.edge_targets[inside]],
            edge_weights=self.edge_weights[inside],
            logit_tokens=texts,
        )

    def group(self, supernodes: Mapping[str, Sequence[int]] | Sequence[str]) -> SupernodeGraph:
        """Nodes joined to supernodes, whose edges are the sums of those of their nodes.

        Args:
            supernodes: nodes by name; or a name for each node of the graph, empty for nodes that stay alone.

        Raises:
            ValueError: a node that the graph does not have or that is in two supernodes, and names for another number
                of nodes.
        """
        groups = _read_groups(supernodes, len(self))
        where = np.full(len(self), -1)
        for i, nodes in enumerate(groups.values()):
            where[list(nodes)] = i
        alone = np.flatnonzero(where < 0)
        where[alone] = len(groups) + np.arange(len(alone))
        n = len(groups) + len(alone)
        pairs = where[self.edge_targets] * n + where[self.edge_sources]
        known, inverse = np.unique(pairs, return_inverse=True)
        sums = np.bincount(inverse, self.edge_weights, len(known))
        between = known // n != known % n
        return SupernodeGraph(
            names=(*groups, *(self.describe(int(i)) for i in alone)),
            members=(*(tuple(nodes) for nodes in groups.values()), *((int(i),) for i in alone)),
            edge_sources=(known % n)[between],
            edge_targets=(known // n)[between],
            edge_weights=sums[between],
        )

    def describe(self, node: int) -> str:
        """A node in words: its kind, layer or hook point, feature and token; of a logit its token alone."""
        if not self.is_kind("logit", "score")[node]:
            return super().describe(node)
        rank, feature = int(self.is_kind("logit", "score")[:node].sum()), int(self.features[node])
        text = self.logit_tokens[rank] if rank < len(self.logit_tokens) else None
        if self.is_kind("score")[node]:
            return f"score of {text or f'head {int(self.layers[node])}.{feature}'}"
        return f"logit token {feature}" if text is None else f"logit {text!r}"

    def to_dict(self) -> dict[str, Any]:
        """Every field and the scores, ready for JSON; numbers of float32 as short as they can be."""
        found = super().to_dict()
        for name in NUMBERS:
            value = getattr(self, name)
            found[name] = None if value is None else [float(text) for text in value.astype(np.float32).astype(str)]
        return found | {name: getattr(self, name) for name in SCORES}

    @classmethod
    def load(cls, path: str | Path) -> "AttributionGraph":
        """The graph that `save` wrote; FileNotFoundError, or ValueError for a file that holds something else."""
        with naming(path):
            plain = require_object(read_json(path), "An attribution graph")
            if "metadata" in plain and "nodes" in plain:
                raise ValueError(
                    "An attribution graph must be one that `save` wrote, got JSON of circuit-tracer and Neuronpedia; "
                    "read it with `read_graph_json`."
                )
            known = [one.name for one in fields(cls)]
            refuse_unknown(plain, [*known, *SCORES], "An attribution graph")
            if missing := sorted(set(known) - set(plain)):
                raise ValueError(f"An attribution graph must have every field, got none for `{missing[0]}`.")
            read = {name: _read_field(name, plain[name]) for name in known}
            _check(read)
            return cls(**read)

    def __str__(self) -> str:
        counts = Counter(KINDS[kind] for kind in self.kinds.tolist())
        named = ", ".join(
            f"{counts[kind]:,} {kind}{'' if counts[kind] == 1 else 's'}" for kind in KINDS if counts[kind]
        )
        lines = [
            f"{self.model}: {len(self.tokens)} tokens, {len(self):,} nodes ({named.replace('biass', 'biases')}), "
            f"{len(self.edge_weights):,} edges",
            f"replacement {self.replacement_score:.3f}, completeness {self.completeness_score:.3f}, "
            f"edges add up to within {self.completeness_error:.0e}",
        ]
        if self.n_left_out:
            lines.append(f"{self.n_left_out:,} features beyond the most influential ones are counted as errors")
        targets = [f"{self.describe(int(i))} ({self.start[i]:.2f})" for i in np.flatnonzero(self.start > 0)]
        lines.append(f"targets: {', '.join(targets[:N_SHOWN])}")
        order = np.argsort(-np.where(self.start > 0, 0, self.influence), kind="stable")[:N_SHOWN]
        rows = [[f"{self.influence[i]:.3f}", f"{self.activations[i]:+.3f}", self.describe(int(i))] for i in order]
        return "\n".join([*lines, *format_table([["influence", "activation", "node"], *rows], left=(2,))])


NUMBERS = ("activations", "values", "edge_weights", "target_weights", "slopes")
PER_NODE = ("kinds", "layers", "positions", "sources", "features", *NUMBERS[:2], *NUMBERS[3:])
INDICES = ("token_ids", *PER_NODE[:5], "edge_sources", "edge_targets")


def _read_groups(supernodes: Mapping[str, Sequence[int]] | Sequence[str], n: int) -> dict[str, list[int]]:
    groups: dict[str, list[int]] = {}
    if isinstance(supernodes, Mapping):
        groups = {name: [int(node) for node in nodes] for name, nodes in supernodes.items()}
    else:
        if len(supernodes) != n or isinstance(supernodes, str):
            raise ValueError(f"`supernodes` must have a name for each of {n} nodes, got {len(supernodes)}.")
        for node, name in enumerate(supernodes):
            if name:
                groups.setdefault(name, []).append(node)
    for node, times in Counter(node for nodes in groups.values() for node in nodes).items():
        if not 0 <= node < n or times > 1:
            raise ValueError(f"A supernode's nodes must be in 0..{n - 1} and in no other, got {node}.")
    return groups


def _read_field(name: str, value: Any) -> Any:
    """A field of a graph from JSON; numbers that are not finite were written as null."""
    try:
        if name in INDICES:
            return _column([int(number) for number in value], np.int64)
        if name in NUMBERS:
            return None if value is None else _column([np.nan if x is None else x for x in value], np.float32)
        if name in ("tokens", "dictionaries", "logit_tokens"):
            return tuple(map(str, value))
        if name == "completeness_error":
            return float("nan") if value is None else float(value)
        return int(value) if name == "n_left_out" else str(value)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"An attribution graph must have numbers or texts in `{name}`, got others ({error})."
        ) from None


def _column(values: list[Any], kind: Any) -> np.ndarray:
    found = np.array(values, kind)
    if found.ndim != 1:
        raise ValueError("it is no list of numbers")
    return found


def _check(read: Mapping[str, Any]) -> None:
    """Raise ValueError unless the arrays go together and every edge leads from a node to a later one."""
    n = len(read["kinds"])
    sizes = [(name, n) for name in PER_NODE] + [("token_ids", len(read["tokens"]))]
    sizes += [(name, len(read["edge_weights"])) for name in ("edge_sources", "edge_targets")]
    if wrong := [name for name, size in sizes if read[name] is not None and len(read[name]) != size]:
        raise ValueError(f"An attribution graph's arrays must be of one length, got another for `{wrong[0]}`.")
    first, then = read["edge_sources"], read["edge_targets"]
    ordered = (first >= 0) & (first < then) & (then < n)
    known = (read["kinds"] >= 0) & (read["kinds"] < len(KINDS))
    known &= (read["sources"] >= -1) & (read["sources"] < len(read["dictionaries"]))
    if not (ordered.all() and known.all()):
        raise ValueError("An attribution graph's edges must lead from its nodes to later ones, of known kinds.")

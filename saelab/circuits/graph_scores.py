"""Influence of the nodes of a graph, which nodes and edges a pruned graph keeps, and graphs of supernodes.

Edges are three arrays: source, target and weight. A source comes before its target.
"""

from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Bool, Float, Int

from saelab.stores.results import Result, format_table

N_SHOWN = 10


@dataclass(frozen=True, eq=False)
class EdgeList:
    """Weighted edges between `n` nodes, as indices of nodes."""

    n: int
    sources: Int[np.ndarray, "n_edges"]
    targets: Int[np.ndarray, "n_edges"]
    weights: Float[np.ndarray, "n_edges"]

    def __getitem__(self, keep: Bool[np.ndarray, "n_edges"]) -> "EdgeList":
        return EdgeList(self.n, self.sources[keep], self.targets[keep], self.weights[keep])

    def normalized(self) -> "EdgeList":
        """Share of each source in its target's inputs: |A_ts| / sum_s |A_ts|."""
        sizes = np.abs(self.weights.astype(np.float64))
        totals = np.bincount(self.targets, sizes, self.n)
        shares = np.divide(sizes, totals[self.targets], out=np.zeros_like(sizes), where=sizes > 0)
        return EdgeList(self.n, self.sources, self.targets, shares)

    def spread(self, start: Float[np.ndarray, "n_nodes"]) -> Float[np.ndarray, "n_nodes"]:
        """start (A + A^2 + ...), for A_ts the weight from s to t: what reaches each node from later ones.

        Exact: a path visits a node once, so that the sum ends.
        """
        total, current = np.zeros(self.n), start.astype(np.float64)
        for _ in range(self.n):
            parts = current[self.targets] * self.weights
            current = np.bincount(self.sources, parts, self.n).astype(np.float64)
            total += current
            if not current.any():
                break
        return total


def keep_largest(scores: Float[np.ndarray, "n"], share: float) -> Bool[np.ndarray, "n"]:
    """The fewest of the scores, the largest first, that add up to a share of their sum.

    >>> keep_largest(np.array([1.0, 5.0, 0.0, 4.0]), 0.8)
    array([False,  True, False,  True])
    """
    order = np.argsort(-scores, kind="stable")
    reached = np.cumsum(scores[order])
    n_kept = 0
    if len(scores) and reached[-1] > 0:  # with room for the rounding of sums
        n_kept = int(np.searchsorted(reached, share * reached[-1] * (1 - 1e-12))) + 1
    keep = np.zeros(len(scores), bool)
    keep[order[:n_kept]] = scores[order[:n_kept]] > 0
    return keep


def choose_kept(
    edges: EdgeList,
    start: Float[np.ndarray, "n_nodes"],
    always: Bool[np.ndarray, "n_nodes"],
    inner: Bool[np.ndarray, "n_nodes"],
    nodes: float,
    share: float,
) -> tuple[Bool[np.ndarray, "n_nodes"], Bool[np.ndarray, "n_edges"]]:
    """Nodes and edges of a pruned graph.

    Nodes are kept by their influence, then edges among these by their share of the target's inputs times the target's
    influence. What then leads nowhere is dropped, and features that nothing leads to, until nothing more has to be.

    Args:
        edges: all edges.
        start: weight of each node as a target.
        always: nodes that are kept in any case.
        inner: nodes that have to be led to: features.
        nodes: share of influence that the nodes kept add up to.
        share: share of their scores that the edges kept add up to.
    """
    keep = always | keep_largest(edges.normalized().spread(start), nodes)
    inside = keep[edges.sources] & keep[edges.targets]
    shares = edges[inside].normalized()
    scores = np.zeros(len(inside))
    scores[inside] = shares.weights * (shares.spread(start) + start)[shares.targets]
    kept = inside & keep_largest(scores, share)
    while True:
        leads = np.bincount(edges.sources[kept], minlength=edges.n) > 0
        is_led_to = np.bincount(edges.targets[kept], minlength=edges.n) > 0
        stays = keep & (always | (leads & (is_led_to | ~inner)))
        if (stays == keep).all():
            return keep, kept
        keep = stays
        kept = kept & keep[edges.sources] & keep[edges.targets]


def follow_back(
    edges: EdgeList, targets: Bool[np.ndarray, "n_nodes"], share: float
) -> tuple[Bool[np.ndarray, "n_nodes"], Bool[np.ndarray, "n_edges"]]:
    """Nodes and edges found from the targets back: of each node reached, the fewest inputs that have a share of it.

    Args:
        edges: all edges.
        targets: nodes to begin with.
        share: share of the sum of a node's inputs, by magnitude, that those kept have.
    """
    order = np.argsort(edges.targets, kind="stable")
    bounds = np.searchsorted(edges.targets[order], np.arange(edges.n + 1))
    reached, kept = targets.copy(), np.zeros(len(edges.weights), bool)
    for node in range(edges.n - 1, -1, -1):  # a source comes before its target
        into = order[bounds[node] : bounds[node + 1]]
        if reached[node] and len(into):
            chosen = into[keep_largest(np.abs(edges.weights[into].astype(np.float64)), share)]
            kept[chosen] = True
            reached[edges.sources[chosen]] = True
    return reached, kept


@dataclass(frozen=True, kw_only=True, eq=False)
class SupernodeGraph(Result):
    """Result of `AttributionGraph.group`: supernodes, and the sums of the edges between their nodes.

    Nodes in no supernode are there alone.
    """

    names: tuple[str, ...]
    members: tuple[tuple[int, ...], ...] = field(repr=False)
    """nodes of each in the graph that was grouped"""
    edge_sources: Int[np.ndarray, "n_edges"] = field(repr=False)
    edge_targets: Int[np.ndarray, "n_edges"] = field(repr=False)
    edge_weights: Float[np.ndarray, "n_edges"] = field(repr=False)
    """sum of the direct effects of all nodes of the source on all of the target"""

    def edge(self, source: str, target: str) -> float:
        """The weight between two supernodes by name, 0 where there is no edge; KeyError for an unknown name."""
        pair = [self.names.index(name) if name in self.names else None for name in (source, target)]
        if None in pair:
            raise KeyError(f"A supernode must be one of {list(self.names)[:5]}, got {source!r} and {target!r}.")
        return float(self.edge_weights[(self.edge_sources == pair[0]) & (self.edge_targets == pair[1])].sum())

    def __str__(self) -> str:
        order = np.argsort(-np.abs(self.edge_weights), kind="stable")[:N_SHOWN]
        rows = [
            [f"{self.edge_weights[i]:+.3f}", self.names[self.edge_sources[i]], self.names[self.edge_targets[i]]]
            for i in order
        ]
        head = f"{len(self.names):,} supernodes and single nodes, {len(self.edge_weights):,} edges"
        return "\n".join([head, *format_table([["weight", "from", "to"], *rows], left=(1, 2))])

"""`split_by_head`: direct effects on a feature or a logit, head by head."""

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Float

from saelab.circuits.graph import AttributionGraph
from saelab.circuits.linear_effects import EMBEDDING, FEATURE, LOGITS, LinearEffects, Targets, Written, read_written
from saelab.circuits.placement import Dictionaries, Placement, find_stack, place_dictionaries
from saelab.lm.huggingface import AnyModel, as_model
from saelab.lm.model_checks import Model
from saelab.stores.results import Result, format_table

N_SHOWN = 10


@dataclass(frozen=True, kw_only=True, eq=False)
class HeadEffects(Result):
    """Result of `split_by_head`: what each source adds to a feature or a logit through each head's frozen pattern and
    OV map.
    """

    target: str
    """the feature or logit, and the heads' layer, in words"""
    tokens: tuple[str, ...]
    sources: tuple[str, ...] = field(repr=False)
    """each node of the graph in words"""
    positions: np.ndarray = field(repr=False)
    """(n_nodes,) token of each node"""
    effects: Float[np.ndarray, "n_heads n_nodes"] = field(repr=False)
    """for a feature of an attention output, summed over heads they are the graph's edges into it, but for those of
    biases"""

    @property
    def by_token(self) -> Float[np.ndarray, "n_heads n_tokens"]:
        """Effects summed over the sources of each token."""
        return np.stack([np.bincount(self.positions, row, len(self.tokens)) for row in self.effects])

    def __str__(self) -> str:
        order = np.argsort(-np.abs(self.effects), axis=None, kind="stable")[:N_SHOWN]
        pairs = zip(*(part.tolist() for part in np.unravel_index(order, self.effects.shape)), strict=True)
        rows = [[f"{self.effects[head, node]:+.3f}", str(head), self.sources[node]] for head, node in pairs]
        return "\n".join([self.target, *format_table([["effect", "head", "source"], *rows], left=(2,))])


@torch.inference_mode(False)
def split_by_head(
    graph: AttributionGraph,
    model: AnyModel,
    transcoders: Dictionaries,
    node: int,
    *,
    layer: int | None = None,
    allow_mismatch: bool = False,
) -> HeadEffects:
    """The direct effects on a feature or a logit through the attention of a layer, split into those through each head.

        A_ts through head h = sum over tokens q, p of a^h_qp <w_tq, W_O^h W_V^h norm(x_p)>    for what s writes into x_p

    with the pattern a^h and the norm's scale frozen, and w_tq the gradient of the target by the attention's output at
    q: for a feature of that output's SAE the encoder's row, at its own token.

    Args:
        graph: the graph.
        model: the model it was traced in.
        transcoders: the dictionaries it was traced with.
        node: a feature, or a logit.
        layer: layer of the heads; None is that of a feature of an attention output.
        allow_mismatch: accept dictionaries of another model, weight processing or hook point.

    Raises:
        ValueError: for a node of another kind, other dictionaries than the graph's, heads that lie behind the node or
            behind an SAE, and a model that has no hook point in front of the heads' common output map.
    """
    model = as_model(model)
    placement = place_dictionaries(model, transcoders, allow_missing=True, allow_mismatch=allow_mismatch)
    points = tuple(one.write for one in placement.dictionaries)
    if points != graph.dictionaries:
        raise ValueError(f"The dictionaries must be the graph's, {list(graph.dictionaries)}, got {list(points)}.")
    if not 0 <= node < len(graph) or not graph.is_kind("feature", "logit")[node]:
        raise ValueError(f"`node` must be a feature or a logit of the graph to be split by head, got {node}.")
    heads = _find_heads(model, placement, int(graph.sources[node]), layer)
    ids = torch.from_numpy(graph.token_ids)[None]
    effects = LinearEffects.make(model, ids, read_written(model, ids, placement), (heads,))
    output, row = effects.start(_make_target(graph, effects, node))
    z, n_heads = effects.readings.watched[heads], int(model.cfg.n_heads)  # type: ignore[attr-defined]
    (into,) = torch.autograd.grad(output, z, row[0], retain_graph=True, allow_unused=True)
    if into is None:
        raise ValueError(
            f"Heads must reach the node past no dictionary, which those of '{heads}' do not: {graph.describe(node)}. "
            "Take a layer in front of it, or split the features of the SAE of this layer's attention output."
        )
    masks = torch.eye(n_heads, device=into.device).to(into)
    rows = into.reshape(1, -1, n_heads, into.numel() // (len(graph.tokens) * n_heads)) * masks[:, None, :, None]
    found = effects.effects_on(z, rows.reshape(n_heads, *z.shape), len(effects.written))
    number = {key: i for i, key in enumerate(_name_nodes(graph))}
    split = np.zeros((n_heads, len(graph)), np.float32)
    for start, one in zip(effects.starts, effects.written, strict=False):
        known = [number.get(key, -1) for key in _name_sources(one, points, graph)]
        own = np.flatnonzero(np.array(known) >= 0)
        split[:, np.array(known)[own]] = found[:, start + own]
    return HeadEffects(
        target=f"{graph.describe(node)}, through layer {heads.split('.')[1]}",
        tokens=graph.tokens,
        sources=tuple(graph.describe(i) for i in range(len(graph))),
        positions=graph.positions,
        effects=split,
    )


def _find_heads(model: Model, placement: Placement, source: int, layer: int | None) -> str:
    """Hook point of the heads' outputs in front of their common map."""
    own = placement.dictionaries[source] if source >= 0 else None
    stack, n_layers = find_stack(model)
    if layer is None:
        if own is None or own.place.part != "attention":
            raise ValueError("`node` must be a feature of an attention output, or `layer` be given, got neither.")
        layer = own.place.layer
    if not 0 <= layer < n_layers:
        raise ValueError(f"`layer` must be in 0..{n_layers - 1}, got {layer}.")
    heads = f"{stack}.{layer}.attn.hook_z"
    if any(one.write == heads for one in placement.dictionaries):
        raise ValueError(f"The heads must be behind what the dictionary reads, got one at '{heads}' itself.")
    return heads


def _make_target(graph: AttributionGraph, effects: LinearEffects, node: int) -> Targets:
    device, place = effects.frozen.ids.device, LOGITS
    if graph.is_kind("feature")[node]:
        point = graph.dictionaries[int(graph.sources[node])]
        place = [one.point for one in effects.written].index(point)
    position, feature = (
        torch.tensor([int(column[node])], device=device) for column in (graph.positions, graph.features)
    )
    return Targets(place, position, feature)


def _name_nodes(graph: AttributionGraph) -> Iterator[tuple[int, ...]]:
    columns = (graph.kinds, graph.layers, graph.sources, graph.positions, graph.features)
    return zip(*(column.tolist() for column in columns), strict=True)


def _name_sources(one: Written, points: tuple[str, ...], graph: AttributionGraph) -> Iterator[tuple[int, ...]]:
    """The same for the sources of a place; the model's biases, which have none, differ from them."""
    source = -1 if one.dictionary is None else points.index(one.point)
    kinds, positions = one.kinds.tolist(), one.positions.tolist()
    features = one.features.tolist()
    for kind, position, feature in zip(kinds, positions, features, strict=True):
        shown = int(graph.token_ids[position]) if kind == EMBEDDING else feature if kind == FEATURE else -1
        yield kind, one.layer, source, position, shown

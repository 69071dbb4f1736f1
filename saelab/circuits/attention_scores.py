"""`attention_score`: one score of an attention head, as the sum over pairs of what is written at query and key."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float

from saelab.circuits.graph import NodeTable
from saelab.circuits.linear_effects import BIAS, LinearEffects, allow_error, read_written
from saelab.circuits.placement import Dictionaries, find_stack, place_dictionaries
from saelab.interventions.prompt_metrics import Prompt, read_one_text
from saelab.lm.hook_points import hook_points_of
from saelab.lm.huggingface import AnyModel, as_model
from saelab.lm.model_checks import Model
from saelab.stores.results import format_table

N_SHOWN = 10


@dataclass(frozen=True)
class ScoreTarget:
    """A score of an attention head, as a target of `trace`: how much the head looks from a query to a key.

    >>> ScoreTarget(layer=1, head=0, key=2).place(6).describe("abcdef")
    "head 1.0, 5 'f' to 2 'c'"
    """

    layer: int
    head: int
    key: int
    """position of the key"""
    query: int | None = None
    """position of the query; None is the last token"""
    against: int | None = None
    """position of a key whose score is subtracted; None subtracts nothing"""

    def place(self, n: int) -> "ScoreTarget":
        """The same with its query, on a prompt of n tokens; ValueError for positions that are not there."""
        query = n - 1 if self.query is None else self.query
        if not 0 <= query < n:
            raise ValueError(f"`query` must be a position in 0..{n - 1}, got {query}.")
        for name, key in (("key", self.key), ("against", self.against)):
            if key is not None and not 0 <= key <= query:
                raise ValueError(f"`{name}` must be a position in 0..{query}, up to the query, got {key}.")
        if self.key == self.against:
            raise ValueError(f"`against` must be another key, got {self.key} for both.")
        return replace(self, query=query)

    def describe(self, tokens: Sequence[str]) -> str:
        """The head and its places, in words."""
        query, key, *other = (f"{i} {tokens[i]!r}" for i in (self.query, self.key, self.against) if i is not None)
        less = f" less that of {other[0]}" if other else ""
        return f"head {self.layer}.{self.head}, {query} to {key}{less}"


@dataclass(frozen=True, kw_only=True, eq=False)
class AttentionScore(NodeTable):
    """Result of `attention_score`: nodes, and what each gives to the head's query and to its key.

    A pair of nodes i, j gives the score `queries[i] @ keys[j]`; all pairs and `offset` add up to `score`.
    """

    target: ScoreTarget
    score: float
    """before the softmax, scale and softcap included; less that of `target.against`"""
    offset: float
    """part of the score that no product has: a bias of positions (ALiBi)"""
    queries: Float[np.ndarray, "n_nodes d_head"] = field(repr=False)
    """what each node gives to the query, rotated and scaled; 0 for nodes that do not reach it"""
    keys: Float[np.ndarray, "n_nodes d_head"] = field(repr=False)
    """the same for the key, less that of `target.against`"""
    completeness_error: float
    """difference of the score and its parts' sum, relative to the score, or to what queries and keys of this length
    give on average where that is larger"""

    @property
    def pairs(self) -> Float[np.ndarray, "n_nodes n_nodes"]:
        """What each node at the query (row) gives with each at the key (column)."""
        return self.queries @ self.keys.T

    @property
    def by_query(self) -> Float[np.ndarray, "n_nodes"]:
        """What each node gives by way of the query, with all that is at the key."""
        return self.queries @ self.keys.sum(0)

    @property
    def by_key(self) -> Float[np.ndarray, "n_nodes"]:
        """What each node gives by way of the key, with all that is at the query."""
        return self.keys @ self.queries.sum(0)

    def top_pairs(self, n: int = N_SHOWN) -> list[tuple[float, int, int]]:
        """The `n` largest pairs by magnitude: what they give, the node at the query, the node at the key."""
        pairs = self.pairs
        order = np.argsort(-np.abs(pairs), axis=None, kind="stable")[:n]
        return [
            (float(pairs[i, j]), int(i), int(j)) for i, j in zip(*np.unravel_index(order, pairs.shape), strict=True)
        ]

    def __str__(self) -> str:
        name, error = self.target.describe(self.tokens), self.completeness_error
        head = f"{name}: {self.score:+.3f}, parts add up to within {error:.0e}"
        rows = [[f"{value:+.3f}", self.describe(i), self.describe(j)] for value, i, j in self.top_pairs()]
        lines = [head, *format_table([["score", "at the query", "at the key"], *rows], left=(1, 2))]
        for name, values in (("by way of the query", self.by_query), ("by way of the key", self.by_key)):
            order = np.argsort(-np.abs(values), kind="stable")[:N_SHOWN]
            rows = [[f"{values[i]:+.3f}", self.describe(int(i))] for i in order if values[i]]
            lines += format_table([["score", name], *rows], left=(1,))
        return "\n".join(lines)


@torch.inference_mode(False)  # gradients are needed wherever it is called
def attention_score(
    model: AnyModel,
    transcoders: Dictionaries,
    prompt: Prompt,
    *,
    head: tuple[int, int],
    key: int,
    query: int | None = None,
    against: int | None = None,
    allow_missing: bool = False,
    allow_mismatch: bool = False,
) -> AttentionScore:
    """A score of an attention head, split into what pairs of features, errors, embeddings and biases give.

        score = q k^T / sqrt(d_head) = sum over nodes i, j of z_i z_j (d_i J_q) (d_j J_k)^T / sqrt(d_head)

    J_q and J_k lead from where a node writes to the head's query and key: the residual stream, earlier attention with
    its patterns frozen, the norm with its scale frozen, W_Q or W_K, norms of queries and keys, and the rotation of the
    position. With SAEs of all attention outputs, nothing but what is written at the two tokens reaches them. Nodes are
    those of `trace`; the biases of the model are one node of each side. The scale that the model has in place of 1 /
    sqrt(d_head), and the slope of a softcap, are part of the pairs. Source: arXiv:2402.12201.

    What all keys have in common moves no attention; `against` subtracts the score of another key.

    Args:
        model: the language model.
        transcoders: dictionaries as in `trace`; those of the layers below the head's.
        prompt: a text, which gets a BOS, or token ids.
        head: layer and head.
        key: position of the key.
        query: position of the query; None is the last token.
        against: position of a key whose score is subtracted; None subtracts nothing.
        allow_missing: accept layers below whose MLP no dictionary replaces; what such an MLP writes is an error.
        allow_mismatch: accept dictionaries of another model, weight processing or hook point.

    Raises:
        ValueError: for a layer, head or position that does not exist, a key behind the query or hidden by a mask,
            dictionaries or a prompt that `trace` refuses, and a model whose scores are not products of a query and a
            key that are linear after freezing.

    >>> model = sl.lm.tiny_model(n_layers=1)
    >>> coder = sl.SAE(sl.SAEConfig(d_in=32, d_out=32, d_sae=64, activation=sl.TopK(k=4)))
    >>> transcoders = {("blocks.0.mlp.hook_in", "blocks.0.mlp.hook_out"): coder}
    >>> found = attention_score(model, transcoders, "Hello", head=(0, 1), key=2)
    >>> abs(float(found.pairs.sum()) - found.score) < 1e-4
    True
    """
    model = as_model(model)
    if not isinstance(head, Sequence) or len(head) != 2:
        raise ValueError(f"`head` must be (layer, head), got {head!r}.")
    target = ScoreTarget(*head, key=key, query=query, against=against)
    attention = find_attention(model, target)
    placement = place_dictionaries(
        model, transcoders, allow_missing=allow_missing, allow_mismatch=allow_mismatch, below=target.layer
    )
    texts = read_one_text(model, prompt)
    target = target.place(int(texts.lengths[0]))
    effects = LinearEffects.make(model, texts.ids, read_written(model, texts.ids, placement), attention=attention)
    split = ScoreSplit.make(model, effects, target)
    return _build(effects, [one.write for one in placement.dictionaries], split, texts.strings(model), target)


def find_attention(model: Model, target: ScoreTarget) -> tuple[str, str]:
    """Hook points in front of and behind the attention of a score; ValueError for a head that does not exist."""
    stack, n_layers = find_stack(model)
    n_heads = int(model.cfg.n_heads)  # type: ignore[attr-defined]
    for name, value, n in (("layer", target.layer, n_layers), ("head", target.head, n_heads)):
        if not 0 <= value < n:
            raise ValueError(f"`head` must be (layer, head) with the {name} in 0..{n - 1}, got {value}.")
    points = hook_points_of(model).points
    found = f"{stack}.{target.layer}.attn.hook_in", f"{stack}.{target.layer}.attn.hook_out"
    if any(name not in points for name in found):
        others = [i for i in range(n_layers) if f"{stack}.{i}.attn.hook_in" in points]
        raise ValueError(
            f"A head must be one of attention, which layer {target.layer} does not have; layers {others} do."
        )
    return found


@dataclass(frozen=True, eq=False)
class ScoreSplit:
    """What each source, and the biases of the model last, give to a query and a key."""

    score: float
    offset: float
    queries: Float[np.ndarray, "n d_head"]
    keys: Float[np.ndarray, "n d_head"]
    error: float

    @property
    def by_source(self) -> Float[np.ndarray, "n"]:
        """Half of what each pair gives for either of the two: they add up to the score, less its offset."""
        return (self.queries @ self.keys.sum(0) + self.keys @ self.queries.sum(0)) / 2

    @classmethod
    def make(cls, model: Model, effects: LinearEffects, target: ScoreTarget) -> "ScoreSplit":
        """The parts of a score, whose places are known.

        ValueError where the model's scores are no such sums, and for a key that is hidden by a mask.
        """
        head, query, places = target.head, target.query, (target.key, target.against)
        assert query is not None
        terms, at_zero = effects.readings.terms, effects.at_zero.terms
        if terms is None or at_zero is None:
            raise ValueError(
                "Scores must be products of queries and keys by `torch.matmul` or fused attention to be split, got "
                f"{model.cfg.architecture}, which computes them otherwise."
            )
        read = [(1 - 2 * i, key, *terms.read(head, query, key)) for i, key in enumerate(places) if key is not None]
        factor = read[0][3]
        queries = _split_vector(effects, terms.queries, at_zero.queries, head, query)
        grouped = head // (terms.queries.shape[1] // terms.keys.shape[1])
        keys = np.zeros_like(queries)
        for sign, key, _, own, _ in read:  # a softcap's slope differs between keys
            keys += sign * own / factor * _split_vector(effects, terms.keys, at_zero.keys, grouped, key)
        score, offset = (sum(sign * one[i] for sign, _, *one in read) for i in (0, 2))
        summed = factor * queries.sum(0) @ keys.sum(0) + offset
        size = abs(factor) * float(np.linalg.norm(queries.sum(0)) * np.linalg.norm(keys.sum(0)))
        error = float(abs(summed - score) / max(abs(score), size / len(queries[0]) ** 0.5, 1e-30))
        _require_complete(model, error, allow_error(model, effects.written))
        return cls(float(score), float(offset), factor * queries, keys, error)


def _split_vector(
    effects: LinearEffects, x: torch.Tensor, at_zero: torch.Tensor, head: int, position: int
) -> Float[np.ndarray, "n d_head"]:
    """What each source gives to the vector of a head at a position, and last what is there without any."""
    d_head = x.shape[-1]
    rows = torch.zeros(d_head, *x.shape, dtype=x.dtype, device=x.device)
    rows[torch.arange(d_head), 0, head, position, torch.arange(d_head)] = 1
    found = effects.effects_on(x, rows, len(effects.written)).T
    rest = at_zero[0, head, position].detach().double().cpu().numpy()
    return np.concatenate([found.astype(np.float64), rest[None]])


def _require_complete(model: Model, error: float, allowed: float) -> None:
    if not error <= allowed:
        raise ValueError(
            f"The parts of a score must add up to it within {allowed:g}, got a difference of {error:.2g} on this "
            f"{model.cfg.architecture}: its queries or keys are not linear with norm scales frozen. Take another model."
        )


def _build(
    effects: LinearEffects,
    points: list[str],
    split: ScoreSplit,
    tokens: tuple[str, ...],
    target: ScoreTarget,
) -> AttentionScore:
    """The nodes that reach the query or the key, the biases of the model last."""
    columns = effects.list_sources(points)
    del columns["slopes"]
    own: dict[str, Any] = dict.fromkeys(columns, -1) | {"kinds": BIAS, "positions": 0, "activations": 1}
    reach = np.append(split.queries[:-1].any(1) | split.keys[:-1].any(1), True)
    nodes = {name: np.append(column, own[name])[reach] for name, column in columns.items()}
    return AttentionScore(
        tokens=tokens,
        dictionaries=tuple(points),
        **{name: nodes[name].astype(np.int64) for name in ("kinds", "layers", "positions", "sources", "features")},
        activations=nodes["activations"].astype(np.float32),
        target=target,
        score=split.score,
        offset=split.offset,
        queries=split.queries[reach].astype(np.float32),
        keys=split.keys[reach].astype(np.float32),
        completeness_error=split.error,
    )

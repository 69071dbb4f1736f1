"""`trace`: the attribution graph of a prompt."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from jaxtyping import Float, Int

from saelab.circuits.attention_scores import ScoreSplit, ScoreTarget, find_attention
from saelab.circuits.graph import KINDS, AttributionGraph
from saelab.circuits.linear_effects import (
    BIAS,
    ERROR,
    FEATURE,
    LOGIT,
    LOGITS,
    SCORE,
    LinearEffects,
    Targets,
    allow_error,
    read_written,
)
from saelab.circuits.placement import Dictionaries, place_dictionaries
from saelab.interventions.prompt_metrics import Prompt, Texts, find_token, read_one_text
from saelab.lm.huggingface import AnyModel, as_model
from saelab.lm.model_checks import Model
from saelab.lm.models import describe_model
from saelab.lm.tokenizers import token_strings

MOST_LOGITS, LOGIT_SHARE = 10, 0.95
N_RANKINGS, MOST_RANKED = 5, 1000
"""features that wait are ranked at least 5 times, at most 1,000 of them followed in between, whatever the batch size"""
FeatureTarget: TypeAlias = tuple[str, int, int]
"""A feature at a token: hook point that its dictionary writes to, feature, position."""
TraceTargets: TypeAlias = Literal["top"] | str | int | Sequence[str | int] | FeatureTarget | ScoreTarget


@torch.inference_mode(False)  # gradients are needed wherever it is called
def trace(
    model: AnyModel,
    transcoders: Dictionaries,
    prompt: Prompt,
    *,
    targets: TraceTargets = "top",
    batch_size: int = 256,
    max_features: int | None = 5000,
    allow_missing: bool = False,
    allow_mismatch: bool = False,
) -> AttributionGraph:
    """The attribution graph of a prompt: which embeddings, features and errors cause which features and logits.

        u_t = sum over sources s of A_ts,     A_ts = <du_t/dx at the place of s, z_s d_s>

    Attention patterns, the scales of norms, gates and softcaps are frozen at what they are on the prompt. What each
    dictionary writes is replaced by constants: z_s d_s of its features, its error and its bias at every token. Then all
    that is left is linear, and the direct effects A_ts on a target, through the residual stream and attention but no
    other dictionary, add up to its value: the pre-activation u_t of a feature that fires, or a logit less the mean of
    all. One gradient a target gives all its edges. Skip connections of transcoders are linear and stay; attention stays
    linear where no SAE replaces its output. An SAE of an MLP's output reads through the MLP's own weights, the gates of
    its neurons frozen: post / pre of each, so that an MLP with gates of its own is linear by way of its other factor.
    A score of attention is a product of a query and a key; half of what each pair of nodes gives counts for either
    (`attention_score` has the pairs). Sources: arXiv:2406.11944, arXiv:2402.12201, circuit-tracer.

    Args:
        model: the language model.
        transcoders: transcoders of MLPs, each of one layer or a cross-layer one (`sl.sae.CLT`), and SAEs of outputs of
            attention and MLPs or of the residual stream; one, several, or by hook point ((input, target) of a
            transcoder, a tuple of such pairs of a cross-layer one) where their provenance does not have it. A feature
            of a cross-layer transcoder is one node, whose edges have what it writes at all layers before the target.
        prompt: a text, which gets a BOS, or token ids.
        targets: "top" (most probable next tokens, up to a probability of .95 together and at most 10), a token or its
            id, several of them, a feature as (hook point that its dictionary writes to, feature, position), or a
            `ScoreTarget`.
        batch_size: gradients that are in memory at a time.
        max_features: features that are targets themselves, the most influential ones; further ones that fire are
            counted as errors at their place. None is all.
        allow_missing: accept layers whose MLP no dictionary replaces; what such an MLP writes is an error.
        allow_mismatch: accept dictionaries of another model, weight processing or hook point.

    Raises:
        ValueError: for dictionaries that do not belong to the model or leave out a layer (see `allow_missing`), a
            prompt that is blank or too long, a target that does not exist, and a model whose targets do not add up to
            within 1e-4: it computes something between its blocks that is not linear after freezing.

    >>> model = sl.lm.tiny_model(n_layers=1)
    >>> coder = sl.SAE(sl.SAEConfig(d_in=32, d_out=32, d_sae=64, activation=sl.TopK(k=4)))
    >>> graph = trace(model, {("blocks.0.mlp.hook_in", "blocks.0.mlp.hook_out"): coder}, "Hello")
    >>> int(graph.is_kind("feature").sum()), graph.completeness_error < 1e-4
    (24, True)
    """
    model = as_model(model)
    for name, value in (("batch_size", batch_size), ("max_features", max_features)):
        if value is not None and value < 1:
            raise ValueError(f"`{name}` must be at least 1, got {value}.")
    below = targets.layer if isinstance(targets, ScoreTarget) else None  # what is behind the head causes nothing
    placement = place_dictionaries(
        model, transcoders, allow_missing=allow_missing, allow_mismatch=allow_mismatch, below=below
    )
    points = [one.write for one in placement.dictionaries]
    texts = read_one_text(model, prompt)
    wanted = _read_targets(model, targets, points, texts)
    attention = find_attention(model, wanted) if isinstance(wanted, ScoreTarget) else None
    written = read_written(model, texts.ids, placement)
    effects = LinearEffects.make(model, texts.ids, written, attention=attention)
    score = ScoreSplit.make(model, effects, wanted) if isinstance(wanted, ScoreTarget) else None
    tracing = _Tracing(effects, wanted, batch_size, score)
    tracing.follow(max_features)
    _require_complete(model, tracing)
    return _build(model, texts, points, tracing, prompt)


def _read_targets(
    model: Model, targets: TraceTargets, points: list[str], texts: Texts
) -> Literal["top"] | list[int] | FeatureTarget | ScoreTarget:
    """Ids of tokens, a feature, or a score; ValueError for what does not exist."""
    if isinstance(targets, ScoreTarget):
        return targets.place(int(texts.lengths[0]))
    if targets == "top":
        return "top"
    if isinstance(targets, tuple) and len(targets) == 3 and targets[0] in points:
        point, feature, position = targets
        n = int(texts.lengths[0])
        if isinstance(feature, str) or isinstance(position, str) or not 0 <= position < n:
            raise ValueError(f"A feature must be (hook point, feature, position in 0..{n - 1}), got {targets}.")
        return str(point), int(feature), int(position)
    several = [targets] if isinstance(targets, str | int | np.integer) else list(targets)
    if isinstance(targets, tuple) and any(isinstance(one, str) and one.startswith("blocks.") for one in several):
        raise ValueError(f"A feature's hook point must be one that a dictionary writes to, {points}, got {targets}.")
    ids = [find_token(model, one) for one in several]
    if not ids or len(set(ids)) < len(ids) or not all(0 <= i < model.cfg.d_vocab for i in ids):
        raise ValueError(f"`targets` must be different tokens of the model, got {several[:5]}.")
    return ids


@dataclass(eq=False)
class _Tracing:
    """The targets followed so far, and the effects on them."""

    effects: LinearEffects
    wanted: Literal["top"] | list[int] | FeatureTarget | ScoreTarget
    batch_size: int
    score: ScoreSplit | None
    """of the score that is the target"""
    rows: list[Float[np.ndarray, "n_targets n_sources"]] = field(default_factory=list)
    numbers: list[Int[np.ndarray, "n_targets"]] = field(default_factory=list)
    """of each row: the source that the target is, or the number of sources plus that of the logit or the score"""
    values: list[Float[np.ndarray, "n_targets"]] = field(default_factory=list)
    biases: list[Float[np.ndarray, "n_targets"]] = field(default_factory=list)
    places: list[Int[np.ndarray, "n_targets"]] = field(default_factory=list)

    @cached_property
    def n_sources(self) -> int:
        return self.effects.starts[-1]

    @cached_property
    def probabilities(self) -> Float[np.ndarray, "d_vocab"]:
        return self.effects.readings.logits.detach().double().softmax(0).cpu().numpy()

    @cached_property
    def logits(self) -> Int[np.ndarray, "n_logits"]:
        """Ids of the logits that are targets."""
        if isinstance(self.wanted, list):
            return np.array(self.wanted, np.int64)
        if self.wanted != "top":
            return np.zeros(0, np.int64)
        order = np.argsort(-self.probabilities, kind="stable")[:MOST_LOGITS]
        return order[: int(np.searchsorted(np.cumsum(self.probabilities[order]), LOGIT_SHARE)) + 1]

    @cached_property
    def features(self) -> Int[np.ndarray, "n_features"]:
        """Sources that are features, of all places that can cause a target."""
        kinds = np.concatenate([one.kinds.cpu().numpy() for one in self.effects.written])
        return np.flatnonzero(kinds[: self.end] == FEATURE)

    @cached_property
    def root(self) -> int | None:
        """The feature that is the target; None where logits are."""
        if not isinstance(self.wanted, tuple):
            return None
        point, feature, position = self.wanted
        place = [one.point for one in self.effects.written].index(point)
        one = self.effects.written[place]
        found = ((one.features == feature) & (one.positions == position)).nonzero()[:, 0].tolist()
        if not found:
            here = one.features[(one.positions == position) & (one.kinds == FEATURE)].tolist()
            raise ValueError(
                f"A feature must fire at the token to be traced, got {feature} of '{point}' at {position}, where "
                f"{here[:5]} fire."
            )
        return self.effects.starts[place] + int(found[0])

    @cached_property
    def end(self) -> int:
        """Number of the first source that can cause no target."""
        if self.score is not None:
            last = int(np.flatnonzero(self.score.by_source[:-1]).max(initial=0))
            return min(start for start in self.effects.starts if start > last)
        if self.root is None:
            return self.n_sources
        return max(start for start in self.effects.starts if start <= self.root)

    @property
    def n_last(self) -> int:
        """Number of targets that are no sources."""
        return len(self.logits) if self.score is None else 1

    def start(self) -> tuple[Int[np.ndarray, "n"], Float[np.ndarray, "n"]]:
        """Numbers and weights of the targets that were asked for."""
        if self.root is not None or self.score is not None:
            return np.array([self.n_sources if self.root is None else self.root]), np.ones(1)
        return self.n_sources + np.arange(len(self.logits)), self.probabilities[self.logits]

    def follow(self, most: int | None) -> None:
        """Compute the effects on the targets asked for, then those on features, the most influential first where there
        are more than `most`.
        """
        if self.score is not None:
            self._add_score(self.score)
        elif self.root is not None:
            self._compute(np.array([self.root]))
        elif len(self.logits):
            ids = torch.from_numpy(self.logits).to(self.effects.frozen.ids.device)
            logits = Targets(LOGITS, torch.zeros_like(ids), ids)
            self._add(logits, self.n_sources + np.arange(len(ids)))
        waiting = self.features
        if most is None or len(waiting) <= most:
            self._compute(waiting)
            return
        at_once = min(MOST_RANKED, -(-most // N_RANKINGS))
        while most > 0:
            scores = self._influence()[waiting]
            chosen = np.argsort(-scores, kind="stable")[: min(most, at_once)]
            self._compute(np.sort(waiting[chosen]))
            waiting, most = np.delete(waiting, chosen), most - len(chosen)

    def _influence(self) -> Float[np.ndarray, "n_sources"]:
        """Influence of all sources on the targets asked for, along the targets followed so far."""
        total = np.zeros(self.n_sources + self.n_last)
        targets, weights = self.start()
        current = np.zeros_like(total)
        current[targets] = weights
        sums = [np.abs(rows).sum(1) for rows in self.rows]
        while current.any():  # a path ends at the latest with the embeddings
            reached = np.zeros_like(total)
            for rows, numbers, sizes in zip(self.rows, self.numbers, sums, strict=True):
                of = np.divide(current[numbers], sizes, out=np.zeros(len(sizes)), where=sizes > 0)
                if of.any():
                    reached[: self.n_sources] += of.astype(np.float32) @ np.abs(rows)
            total += reached
            current = reached
        return total[: self.n_sources]

    @cached_property
    def miss(self) -> float:
        """Largest difference between a target's value and what the effects on it add up to, see
        `AttributionGraph.completeness_error`.
        """
        values, biases, places = (np.concatenate(parts) for parts in (self.values, self.biases, self.places))
        sums = np.concatenate([rows.sum(1, dtype=np.float64) for rows in self.rows])
        worst = 0.0
        for place in np.unique(places):
            own = places == place
            sizes = np.maximum(np.abs(values[own]), max(np.abs(values[own]).mean(), 1e-30))
            worst = max(worst, float((np.abs(sums + biases - values)[own] / sizes).max()))
        return worst

    def _compute(self, numbers: Int[np.ndarray, "n"]) -> None:
        """Effects on features, given by their numbers as sources, in rising order."""
        starts = self.effects.starts
        for place, one in enumerate(self.effects.written):
            own = numbers[(numbers >= starts[place]) & (numbers < starts[place + 1])]
            if len(own):
                at = torch.from_numpy(own - starts[place]).to(one.positions.device)
                self._add(Targets(place, one.positions[at], one.features[at]), own)

    def _add_score(self, score: ScoreSplit) -> None:
        by_source = score.by_source
        self.values.append(np.array([score.score]))
        self.biases.append(np.array([by_source[-1] + score.offset]))
        self.places.append(np.array([-2]))  # that of no dictionary, nor of logits
        self.rows.append(by_source[None, :-1].astype(np.float32))
        self.numbers.append(np.array([self.n_sources]))

    def _add(self, targets: Targets, numbers: Int[np.ndarray, "n"]) -> None:
        effects = self.effects
        self.values.append(effects.values(targets, effects.readings))
        self.biases.append(effects.values(targets, effects.at_zero))
        self.places.append(np.full(len(targets), targets.place))
        for first in range(0, len(targets), self.batch_size):
            self.rows.append(effects.effects(targets[first : first + self.batch_size]))
            self.numbers.append(numbers[first : first + self.batch_size])


def _require_complete(model: Model, tracing: _Tracing) -> None:
    """ValueError where the effects do not add up to the values of the targets."""
    worst, allowed = tracing.miss, allow_error(model, tracing.effects.written)
    if not worst <= allowed:
        raise ValueError(
            f"Direct effects must add up to the values of their targets within {allowed:g}, got a difference of "
            f"{worst:.2g} on this {model.cfg.architecture}: it computes something that is not linear with attention "
            "patterns, norm scales and gates frozen. Trace another model, or replace that part, too."
        )


def _build(model: Model, texts: Texts, points: list[str], tracing: _Tracing, prompt: Prompt) -> AttributionGraph:
    effects, end = tracing.effects, tracing.end
    columns = effects.list_sources(points)
    rows, numbers = np.concatenate(tracing.rows), np.concatenate(tracing.numbers)
    left_out = np.setdiff1d(tracing.features, numbers)
    _count_as_errors(effects, rows, left_out)
    keep = np.zeros(tracing.n_sources, bool)
    keep[:end] = True
    keep[left_out] = False
    if tracing.root is not None:
        keep[tracing.root] = True
    after, words = _list_last(model, texts, tracing)
    n_last, n_first = tracing.n_last, effects.starts[1]
    # nodes: embeddings, the model's biases, the other sources, logits
    number = np.full(tracing.n_sources + n_last, -1)
    number[:n_first] = np.arange(n_first)
    others = np.flatnonzero(keep[n_first:]) + n_first
    number[others] = n_first + 1 + np.arange(len(others))
    number[tracing.n_sources :] = n_first + 1 + len(others) + np.arange(n_last)
    own = {
        "kinds": BIAS,
        "layers": -1,
        "positions": 0,
        "sources": -1,
        "features": -1,
        "activations": 1.0,
        "slopes": 1.0,
    }
    nodes = {
        name: np.concatenate([column[:n_first], [own[name]], column[others], after[name]])
        for name, column in columns.items()
    }
    values, weights = np.zeros(len(nodes["kinds"])), np.zeros(len(nodes["kinds"]))
    values[number[numbers]] = np.concatenate(tracing.values)
    asked, of = tracing.start()
    weights[number[asked]] = of
    which, sources = (rows * keep).nonzero()
    targets = number[numbers]
    n_rows = len(numbers)
    return AttributionGraph(
        prompt=prompt if isinstance(prompt, str) else "".join(texts.strings(model)),
        tokens=texts.strings(model),
        token_ids=texts.ids[0].numpy(),
        model=describe_model(model).name,
        dictionaries=tuple(points),
        **{name: nodes[name].astype(np.int64) for name in ("kinds", "layers", "positions", "sources", "features")},
        **{name: nodes[name].astype(np.float32) for name in ("activations", "slopes")},
        values=values.astype(np.float32),
        edge_sources=np.concatenate([number[sources], np.full(n_rows, n_first)]),
        edge_targets=np.concatenate([targets[which], targets]),
        edge_weights=np.concatenate([rows[which, sources], np.concatenate(tracing.biases).astype(np.float32)]),
        target_weights=weights.astype(np.float32),
        logit_tokens=words,
        completeness_error=tracing.miss,
        n_left_out=len(left_out),
    )


def _list_last(model: Model, texts: Texts, tracing: _Tracing) -> tuple[dict[str, np.ndarray], tuple[str, ...]]:
    """Fields of the nodes of logits, or of a score, and these in words."""
    if isinstance(target := tracing.wanted, ScoreTarget):
        last: dict[str, Any] = {"kinds": SCORE, "layers": target.layer, "positions": target.query, "sources": -1}
        last |= {"features": target.head, "activations": 1.0, "slopes": 1.0}
        return {name: np.array([value]) for name, value in last.items()}, (target.describe(texts.strings(model)),)
    ids = tracing.logits
    last = {"kinds": LOGIT, "layers": model.cfg.n_layers, "positions": int(texts.lengths[0]) - 1, "sources": -1}
    columns = {name: np.full(len(ids), value) for name, value in (last | {"slopes": 1.0}).items()}
    columns |= {"features": ids, "activations": tracing.probabilities[ids]}
    words = token_strings(model.tokenizer, ids.tolist()) if model.tokenizer is not None else {}
    return columns, tuple(words.get(int(i), f"<{i}>") for i in ids)


def _count_as_errors(
    effects: LinearEffects, rows: Float[np.ndarray, "n_targets n_sources"], left_out: Int[np.ndarray, "n"]
) -> None:
    """Add the effects of features that are left out to those of the errors at their place, in place."""
    for start, one in zip(effects.starts, effects.written, strict=False):
        own = left_out[(left_out >= start) & (left_out < start + len(one.positions))]
        if not len(own):
            continue
        positions, kinds = one.positions.cpu().numpy(), one.kinds.cpu().numpy()
        errors = np.flatnonzero(kinds == ERROR)  # in the order of tokens
        np.add.at(rows.T, start + errors[positions[own - start]], rows[:, own].T)


assert KINDS[LOGIT] == "logit"

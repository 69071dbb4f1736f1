"""`validate`: the effects of a graph held against the model, by ablating and by steering its features."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from saelab.circuits.frozen_model import FrozenModel
from saelab.circuits.graph import AttributionGraph
from saelab.circuits.linear_effects import FEATURE, Written, read_written
from saelab.circuits.placement import Dictionaries, place_dictionaries
from saelab.functional.indices import permute_within
from saelab.functional.statistics import correlation, rank_correlation
from saelab.interventions.edited_runs import EditedRuns, EditRuns
from saelab.interventions.prompt_metrics import Texts, read_last
from saelab.lm.huggingface import AnyModel, as_model
from saelab.lm.model_checks import Model, find_known_ids
from saelab.lm.unwrapped import Tap
from saelab.stores.results import Result, format_table

N_SHUFFLES = 99
ROUNDING = 1e-3
"""largest difference of a code from the graph's, relative to the largest code of its dictionary"""


@dataclass(frozen=True, kw_only=True)
class EffectAgreement:
    """Correlations of a graph's effects with exact ones, in [-1, 1]; higher is better."""

    spearman: float
    """rank correlation of effects along all paths"""
    shuffled: float
    """mean of the same with the graph's effects shuffled among the features of the same token"""
    shuffled_95: float
    """what 5 % of the shuffles exceed: what is below is no agreement"""
    pearson: float
    """correlation of effects along all paths"""
    direct: float
    """rank correlation of the edges into the target alone"""
    size: float
    """rank correlation of influence with |exact effect|"""
    size_shuffled_95: float
    """what 5 % of the shuffles exceed"""

    def __str__(self) -> str:
        return (
            f"Spearman {self.spearman:.3f} (shuffled {self.shuffled:.3f}, 95 % below {self.shuffled_95:.3f}), Pearson "
            f"{self.pearson:.3f}, edges alone {self.direct:.3f}, by size {self.size:.3f} (95 % below "
            f"{self.size_shuffled_95:.3f})"
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class GraphValidation(Result):
    """Result of `validate`; entry i of the arrays is feature node `nodes[i]` of the graph."""

    target: str
    """the target's node in words"""
    held: EffectAgreement
    """agreement with exact effects where attention patterns, norm scales and gates are held at the prompt's, as in the
    graph, and the model's MLPs respond
    """
    live: EffectAgreement
    """agreement with exact effects where everything responds"""
    factor: float
    """what the codes of the steered features were multiplied by"""
    steered: tuple[int, ...]
    """nodes of the steered features: those of the largest effects"""
    steered_effects: Float[np.ndarray, "n_steered"] = field(repr=False)
    """change of the target's value by steering each, patterns and scales held"""
    steered_estimates: Float[np.ndarray, "n_steered"] = field(repr=False)
    """the same by the graph"""
    others: tuple[int, ...]
    """as many other features, drawn at random and steered likewise"""
    other_effects: Float[np.ndarray, "n_others"] = field(repr=False)
    nodes: Int[np.ndarray, "n_nodes"] = field(repr=False)
    estimates: Float[np.ndarray, "n_nodes"] = field(repr=False)
    """what the target's value loses without the feature, by the graph"""
    exact: Float[np.ndarray, "n_nodes"] = field(repr=False)
    """the same in the model, patterns and scales held"""
    exact_live: Float[np.ndarray, "n_nodes"] = field(repr=False)
    """the same where everything responds"""

    @property
    def signs(self) -> float:
        """Share of the steered features whose effect has the sign that the graph gives."""
        same = np.sign(self.steered_effects) == np.sign(self.steered_estimates)
        return float(same.mean()) if len(same) else float("nan")

    def __str__(self) -> str:
        lines = [
            f"{self.target}: the {len(self.nodes):,} features of the largest effects ablated",
            f"patterns and scales held: {self.held}",
            f"all responds:             {self.live}",
        ]
        rows = [
            [name, str(len(changes)), f"{np.abs(changes).mean():.3f}", signs]
            for name, changes, signs in (
                ("the largest", self.steered_effects, f"{self.signs:.0%}"),
                ("others", self.other_effects, ""),
            )
            if len(changes)
        ]
        head = [f"codes times {self.factor:g}", "n", "mean |change|", "of the graph's sign"]
        return "\n".join([*lines, *format_table([head, *rows])])


def validate(
    graph: AttributionGraph,
    model: AnyModel,
    transcoders: Dictionaries,
    *,
    target: int | None = None,
    n_ablated: int | None = 200,
    n_steered: int = 10,
    factor: float = 2.0,
    seed: int = 0,
    allow_mismatch: bool = False,
    progress: bool = True,
) -> GraphValidation:
    """How well a graph's effects on a logit agree with those in the model itself.

    Each feature is taken away at its token alone: what it writes is subtracted from the model's own activation, and
    what is behind it is computed again, with the model's MLPs and not the transcoders. Of a cross-layer transcoder's
    feature that is what it writes at its own layer: what it writes at later ones stands for what their MLPs make of
    that, and these are computed; to subtract it, too, would take it away twice. So its effects agree where the model
    goes through its layers, and not where the feature skips them without cause. `AttributionGraph.effects` are
    exact where all else is linear; here they are estimates. That is done twice: with attention patterns and norm scales
    held at the prompt's, which is what a graph speaks of, and with everything live. Then the features of the largest
    effects are steered, their codes multiplied, beside others.

    Args:
        graph: the graph, pruned or not.
        model: the model it was traced in.
        transcoders: the dictionaries it was traced with.
        target: node of a logit; None is the target of the largest weight.
        n_ablated: features that are ablated, those of the largest effects by the graph; None is all.
        n_steered: features that are steered.
        factor: what their codes are multiplied by.
        seed: seed of what is drawn and shuffled.
        allow_mismatch: accept dictionaries of another model, weight processing or hook point.
        progress: whether to show a progress bar.

    Raises:
        ValueError: a target that is no logit, a graph without features, other dictionaries than the graph's, and
            features that do not fire on the prompt as the graph says.
    """
    model = as_model(model)
    target = int(np.argmax(graph.start)) if target is None else target
    if not 0 <= target < len(graph) or not graph.is_kind("logit")[target]:
        raise ValueError(f"`target` must be the node of a logit to be validated, got {target}.")
    for name, value, least in (("n_ablated", n_ablated, 1), ("n_steered", n_steered, 0)):
        if value is not None and value < least:
            raise ValueError(f"`{name}` must be at least {least}, got {value}.")
    features = np.flatnonzero(graph.is_kind("feature"))
    if not len(features):
        raise ValueError("A graph must have features to be validated, got none.")
    effects, rng = graph.effects(target), np.random.default_rng(seed)
    ranked = features[np.argsort(-np.abs(effects[features]), kind="stable")]
    nodes, top = np.sort(ranked[:n_ablated]), ranked[:n_steered]
    others = np.sort(rng.choice(ranked[n_steered:], min(n_steered, len(ranked[n_steered:])), replace=False))
    ablation = _Ablation.make(graph, model, transcoders, allow_mismatch, target, progress)
    exact, exact_live = -ablation.run(nodes, -1.0, held=True), -ablation.run(nodes, -1.0, held=False)
    return GraphValidation(
        target=graph.describe(target),
        held=_compare(graph, target, nodes, effects[nodes], exact, rng),
        live=_compare(graph, target, nodes, effects[nodes], exact_live, rng),
        factor=factor,
        steered=tuple(top.tolist()),
        steered_effects=ablation.run(top, factor - 1, held=True),
        steered_estimates=(factor - 1) * effects[top],
        others=tuple(others.tolist()),
        other_effects=ablation.run(others, factor - 1, held=True),
        nodes=nodes,
        estimates=effects[nodes],
        exact=exact,
        exact_live=exact_live,
    )


def _compare(
    graph: AttributionGraph,
    target: int,
    nodes: Int[np.ndarray, "n"],
    estimates: Float[np.ndarray, "n"],
    exact: Float[np.ndarray, "n"],
    rng: np.random.Generator,
) -> EffectAgreement:
    edges = graph.edge_targets == target
    direct = np.bincount(graph.edge_sources[edges], graph.edge_weights[edges], len(graph))[nodes]
    influence, sizes = graph.influence[nodes], np.abs(exact)
    orders = [permute_within(graph.positions[nodes], rng) for _ in range(N_SHUFFLES)]
    nulls = [rank_correlation(estimates[order], exact) for order in orders]
    return EffectAgreement(
        spearman=rank_correlation(estimates, exact),
        shuffled=float(np.mean(nulls)),
        shuffled_95=float(np.quantile(nulls, 0.95)),
        pearson=correlation(estimates, exact),
        direct=rank_correlation(direct, exact),
        size=rank_correlation(influence, sizes),
        size_shuffled_95=float(np.quantile([rank_correlation(influence[order], sizes) for order in orders], 0.95)),
    )


@dataclass(frozen=True, eq=False)
class _Ablation:
    """Runs of the prompt in which what a feature writes is multiplied."""

    graph: AttributionGraph
    runs: EditedRuns
    read: Callable[[Tensor], Tensor]
    """from logits (batch, d_vocab) to the target's value (batch,)"""
    frozen: FrozenModel
    written: dict[str, Written]
    """by hook point"""
    progress: bool

    @classmethod
    def make(
        cls,
        graph: AttributionGraph,
        model: Model,
        transcoders: Dictionaries,
        allow_mismatch: bool,
        target: int,
        progress: bool,
    ) -> "_Ablation":
        placement = place_dictionaries(model, transcoders, allow_missing=True, allow_mismatch=allow_mismatch)
        points = tuple(one.write for one in placement.dictionaries)
        if points != graph.dictionaries:
            raise ValueError(f"The dictionaries must be the graph's, {list(graph.dictionaries)}, got {list(points)}.")
        ids = torch.from_numpy(graph.token_ids)[None]
        token, known = int(graph.features[target]), find_known_ids(model).nonzero()[:, 0]

        def read(logits: Tensor) -> Tensor:
            wide = logits.double()
            return wide[:, token] - wide[:, known.to(wide.device)].mean(1)

        texts = Texts(ids, torch.tensor([ids.shape[1]]))
        runs = EditedRuns(model, texts, lambda logits, texts, rows: read(read_last(logits, texts, rows)))
        written = {one.point: one for one in read_written(model, ids, placement) if one.dictionary is not None}
        return cls(graph, runs, read, FrozenModel.make(model, ids, points), written, progress)

    @cached_property
    def clean(self) -> tuple[float, list[Tensor]]:
        """The target's value, and the constants of the prompt."""
        logits, constants = self.frozen.forward([])
        return float(self.read(logits)[0]), constants

    @torch.no_grad()
    def run(self, nodes: Int[np.ndarray, "n"], factor: float, *, held: bool) -> Float[np.ndarray, "n"]:
        """Change of the target's value when `factor` times what each feature writes is added; with `held`, patterns
        and scales stay those of the prompt.
        """
        found = np.zeros(len(nodes))
        for source, point in enumerate(self.graph.dictionaries):
            own = np.flatnonzero(self.graph.sources[nodes] == source)
            if not len(own):
                continue
            vectors = factor * self._find_vectors(self.written[point], nodes[own])
            edit = _make_edit(vectors, torch.from_numpy(self.graph.positions[nodes[own]]))
            if held:
                parts = torch.arange(len(own)).split(self.runs.batch_size)
                values = torch.cat([self._run_held(point, edit, part) for part in parts])
            else:
                rows = torch.zeros(len(own), dtype=torch.long)
                values = self.runs.run({point: edit}, rows, progress="ablated" if self.progress else None)
            found[own] = values.cpu().numpy() - self.clean[0]
        return found

    def _run_held(self, point: str, edit: EditRuns, runs: Int[Tensor, "batch"]) -> Float[Tensor, "batch"]:
        taps: list[tuple[str, Tap]] = [(point, lambda x: edit(x.clone(), runs))]
        logits, _ = self.frozen.forward(taps, self.clean[1], len(runs))
        return self.read(logits)

    def _find_vectors(self, one: Written, nodes: Int[np.ndarray, "n"]) -> Float[Tensor, "n d"]:
        """What the features write; ValueError where they do not fire as the graph says."""
        is_feature = one.kinds == FEATURE
        positions, features = one.positions[is_feature].tolist(), one.features[is_feature].tolist()
        rows = {pair: row for row, pair in enumerate(zip(positions, features, strict=True))}
        pairs = zip(self.graph.positions[nodes].tolist(), self.graph.features[nodes].tolist(), strict=True)
        chosen = [rows.get(pair, -1) for pair in pairs]
        z = one.z[is_feature].cpu().numpy()
        differs = np.abs(z[chosen] - self.graph.activations[nodes]) > ROUNDING * np.abs(z).max(initial=0)
        if min(chosen) < 0 or differs.any():
            first = int(nodes[next(i for i, row in enumerate(chosen) if row < 0 or differs[i])])
            raise ValueError(
                f"A graph's features must fire as they did when it was traced, got another code for "
                f"{self.graph.describe(first)}. Give the model and the dictionaries of the graph."
            )
        vectors: Tensor = one.vectors[is_feature][chosen]
        return vectors


def _make_edit(vectors: Float[Tensor, "n d"], positions: Int[Tensor, "n"]) -> EditRuns:
    def edit(x: Tensor, runs: Tensor) -> Tensor:
        x[torch.arange(len(runs)), positions[runs]] += vectors[runs.to(vectors.device)].to(x)
        return x

    return edit

"""`validate`: the effects of a graph held against the model, by ablating and by steering its features."""

from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from saelab.circuits.graph import AttributionGraph
from saelab.circuits.linear_effects import FEATURE, Written, read_written
from saelab.circuits.placement import Dictionaries, place_dictionaries
from saelab.functional.indices import permute_within
from saelab.functional.statistics import correlation, rank_correlation
from saelab.interventions.edited_runs import EditedRuns, EditRuns
from saelab.interventions.prompt_metrics import Texts, read_last
from saelab.lm.model_checks import Model, find_known_ids
from saelab.stores.results import Result, format_table

N_SHUFFLES = 99
ROUNDING = 1e-3
"""largest difference of a code from the graph's, relative to the largest code of its dictionary"""


@dataclass(frozen=True, kw_only=True, eq=False)
class GraphValidation(Result):
    """Result of `validate`; entry i of the arrays is feature node `nodes[i]` of the graph."""

    target: str
    """the target's node in words"""
    spearman: float
    """rank correlation of the graph's effects along all paths with exact effects, in [-1, 1]; higher is better"""
    pearson: float
    """correlation of the same"""
    direct: float
    """rank correlation of the edges into the target alone with exact effects"""
    size: float
    """rank correlation of influence with |exact effect|"""
    shuffled: float
    """mean of `spearman` with the graph's effects shuffled among the features of the same token"""
    shuffled_95: float
    """what 5 % of the shuffles exceed: what is below is no agreement"""
    factor: float
    """what the codes of the steered features were multiplied by"""
    steered: tuple[int, ...]
    """nodes of the steered features: those of the largest effects"""
    steered_effects: Float[np.ndarray, "n_steered"] = field(repr=False)
    """change of the target's value by steering each"""
    steered_estimates: Float[np.ndarray, "n_steered"] = field(repr=False)
    """the same by the graph"""
    others: tuple[int, ...]
    """as many other features, drawn at random and steered likewise"""
    other_effects: Float[np.ndarray, "n_others"] = field(repr=False)
    nodes: Int[np.ndarray, "n_nodes"] = field(repr=False)
    estimates: Float[np.ndarray, "n_nodes"] = field(repr=False)
    """what the target's value loses without the feature, by the graph"""
    exact: Float[np.ndarray, "n_nodes"] = field(repr=False)
    """the same in the model"""

    @property
    def signs(self) -> float:
        """Share of the steered features whose effect has the sign that the graph gives."""
        same = np.sign(self.steered_effects) == np.sign(self.steered_estimates)
        return float(same.mean()) if len(same) else float("nan")

    def __str__(self) -> str:
        lines = [
            f"{self.target}: {len(self.nodes):,} features ablated",
            f"with exact effects: Spearman {self.spearman:.3f} (shuffled {self.shuffled:.3f}, 95 % below "
            f"{self.shuffled_95:.3f}), Pearson {self.pearson:.3f}; edges alone {self.direct:.3f}, influence by size "
            f"{self.size:.3f}",
        ]
        rows = [
            ["the largest", str(len(self.steered)), f"{np.abs(self.steered_effects).mean():.3f}", f"{self.signs:.0%}"],
            ["others", str(len(self.others)), f"{np.abs(self.other_effects).mean():.3f}", ""],
        ]
        head = [f"codes times {self.factor:g}", "n", "mean |change|", "of the graph's sign"]
        return "\n".join([*lines, *format_table([head, *(row for row in rows if row[1] != "0")])])


def validate(
    graph: AttributionGraph,
    model: Model,
    transcoders: Dictionaries,
    *,
    target: int | None = None,
    n_ablated: int | None = 1000,
    n_steered: int = 10,
    factor: float = 2.0,
    seed: int = 0,
    allow_mismatch: bool = False,
    progress: bool = True,
) -> GraphValidation:
    """How well a graph's effects on a logit agree with those in the model itself, where nothing is frozen.

    Each feature is taken away at its token alone: what it writes is subtracted from the model's own activation, and
    everything behind it is computed again, the model's MLPs and not the transcoders. `AttributionGraph.effects` of a
    feature are exact in the frozen model; here they are estimates. Then the features of the largest effects are
    steered, their codes multiplied, beside others.

    Args:
        graph: the graph, pruned or not.
        model: the model it was traced in.
        transcoders: the dictionaries it was traced with.
        target: node of a logit; None is the target of the largest weight.
        n_ablated: features that are ablated, drawn at random where the graph has more; None is all.
        n_steered: features that are steered.
        factor: what their codes are multiplied by.
        seed: seed of what is drawn and shuffled.
        allow_mismatch: accept dictionaries of another model, weight processing or hook point.
        progress: whether to show a progress bar.

    Raises:
        ValueError: a target that is no logit, a graph without features, other dictionaries than the graph's, and
            features that do not fire on the prompt as the graph says.
    """
    target = int(np.argmax(graph.start)) if target is None else target
    if not 0 <= target < len(graph) or not graph.is_kind("logit")[target]:
        raise ValueError(f"`target` must be the node of a logit to be validated, got {target}.")
    rng = np.random.default_rng(seed)
    nodes = np.flatnonzero(graph.is_kind("feature"))
    if not len(nodes):
        raise ValueError("A graph must have features to be validated, got none.")
    if n_ablated is not None and len(nodes) > n_ablated:
        nodes = np.sort(rng.choice(nodes, n_ablated, replace=False))
    ablation = _Ablation.make(graph, model, transcoders, allow_mismatch, target, "ablated" if progress else None)
    effects, exact = graph.effects(target), -ablation.run(nodes, -1.0)
    estimates = effects[nodes]
    edges = graph.edge_targets == target
    direct = np.bincount(graph.edge_sources[edges], graph.edge_weights[edges], len(graph))[nodes]
    shuffles = [estimates[permute_within(graph.positions[nodes], rng)] for _ in range(N_SHUFFLES)]
    nulls = [rank_correlation(one, exact) for one in shuffles]
    every = np.flatnonzero(graph.is_kind("feature"))
    top = every[np.argsort(-np.abs(effects[every]), kind="stable")[:n_steered]]
    rest = np.setdiff1d(every, top)
    others = np.sort(rng.choice(rest, min(n_steered, len(rest)), replace=False))
    return GraphValidation(
        target=graph.describe(target),
        spearman=rank_correlation(estimates, exact),
        pearson=correlation(estimates, exact),
        direct=rank_correlation(direct, exact),
        size=rank_correlation(graph.influence[nodes], np.abs(exact)),
        shuffled=float(np.mean(nulls)),
        shuffled_95=float(np.quantile(nulls, 0.95)),
        factor=factor,
        steered=tuple(top.tolist()),
        steered_effects=ablation.run(top, factor - 1),
        steered_estimates=(factor - 1) * effects[top],
        others=tuple(others.tolist()),
        other_effects=ablation.run(others, factor - 1),
        nodes=nodes,
        estimates=estimates,
        exact=exact,
    )


@dataclass(frozen=True, eq=False)
class _Ablation:
    """Runs of the prompt in which what a feature writes is multiplied."""

    graph: AttributionGraph
    runs: EditedRuns
    written: dict[str, Written]
    """by hook point"""
    progress: str | None

    @classmethod
    def make(
        cls,
        graph: AttributionGraph,
        model: Model,
        transcoders: Dictionaries,
        allow_mismatch: bool,
        target: int,
        progress: str | None,
    ) -> "_Ablation":
        placement = place_dictionaries(model, transcoders, allow_missing=True, allow_mismatch=allow_mismatch)
        points = tuple(one.write for one in placement.dictionaries)
        if points != graph.dictionaries:
            raise ValueError(f"The dictionaries must be the graph's, {list(graph.dictionaries)}, got {list(points)}.")
        ids = torch.from_numpy(graph.token_ids)[None]
        texts = Texts(ids, torch.tensor([ids.shape[1]]))
        token, known = int(graph.features[target]), find_known_ids(model).nonzero()[:, 0]

        def read(logits: Tensor, texts: Texts, rows: Tensor) -> Tensor:
            last = read_last(logits, texts, rows).double()
            return last[:, token] - last[:, known.to(last.device)].mean(1)

        written = {one.point: one for one in read_written(model, ids, placement) if one.dictionary is not None}
        return cls(graph, EditedRuns(model, texts, read), written, progress)

    def run(self, nodes: Int[np.ndarray, "n"], factor: float) -> Float[np.ndarray, "n"]:
        """Change of the target's value when `factor` times what each feature writes is added."""
        found = np.zeros(len(nodes))
        clean = float(self.runs.run()[0])
        for source, point in enumerate(self.graph.dictionaries):
            own = np.flatnonzero(self.graph.sources[nodes] == source)
            if not len(own):
                continue
            vectors = factor * self._find_vectors(self.written[point], nodes[own])
            positions = torch.from_numpy(self.graph.positions[nodes[own]])
            edit = _make_edit(vectors, positions)
            rows = torch.zeros(len(own), dtype=torch.long)
            found[own] = self.runs.run({point: edit}, rows, progress=self.progress).numpy() - clean
        return found

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

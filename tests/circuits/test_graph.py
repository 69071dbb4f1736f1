"""Scores, pruning, supernodes, paths and files of graphs, held against naive ones on random and planted graphs."""

from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
from transcoders_made import cover

from saelab.circuits.graph import KINDS, AttributionGraph
from saelab.circuits.graph_scores import keep_largest
from saelab.circuits.tracing import trace
from saelab.stores.files import write_json

SEEDS = range(6)


def make(seed: int, n_tokens: int = 4, n_layers: int = 3, density: float = 0.5) -> AttributionGraph:
    """A random graph: embeddings, a bias, features and errors by layer, two logits."""
    rng = np.random.default_rng(seed)
    kinds, layers, positions, sources = (
        [0] * n_tokens + [3],
        [-1] * (n_tokens + 1),
        [*range(n_tokens), 0],
        [-1] * (n_tokens + 1),
    )
    for layer in range(n_layers):
        for position in range(n_tokens):
            kinds += [1, 1, 2]
            layers, positions, sources = layers + [layer] * 3, positions + [position] * 3, sources + [layer] * 3
    kinds, layers = [*kinds, 4, 4], layers + [n_layers] * 2
    positions, sources = positions + [n_tokens - 1] * 2, [*sources, -1, -1]
    n, kind, layer = len(kinds), np.array(kinds), np.array(layers)
    pairs = [
        (s, t) for t in range(n) for s in range(t)
        if kind[t] in (1, 4) and layer[s] < layer[t] and positions[s] <= positions[t] and rng.random() < density
    ]  # fmt: skip
    chosen = np.array(pairs).T
    is_feature = kind == 1
    z = np.where(is_feature, rng.standard_normal(n), 1)
    z[-2:] = 0.6, 0.3
    return AttributionGraph(
        prompt="abcd", tokens=tuple("abcd"), token_ids=np.arange(n_tokens), model="none",
        dictionaries=tuple(f"blocks.{i}.hook_mlp_out" for i in range(n_layers)), kinds=kind, layers=layer,
        positions=np.array(positions), sources=np.array(sources),
        features=np.where(is_feature, np.arange(n), np.where(kind == 4, np.arange(n) - n + 2, -1)),
        activations=z.astype(np.float32),
        values=np.zeros(n, np.float32), edge_sources=chosen[0], edge_targets=chosen[1],
        edge_weights=rng.standard_normal(len(pairs)).astype(np.float32), logit_tokens=("x", "y"),
    )  # fmt: skip


def to_dense(graph: AttributionGraph) -> np.ndarray:
    """Weights by target and source, biases left out."""
    dense = np.zeros((len(graph), len(graph)))
    dense[graph.edge_targets, graph.edge_sources] = graph.edge_weights
    dense[:, graph.is_kind("bias")] = 0
    return dense


def normalize(dense: np.ndarray) -> np.ndarray:
    sizes = np.abs(dense)
    return sizes / np.maximum(sizes.sum(1, keepdims=True), 1e-30)


@pytest.mark.parametrize("seed", SEEDS)
def test_scores_are_those_of_the_whole_matrix(seed: int) -> None:
    graph = make(seed)
    shares, start = normalize(to_dense(graph)), graph.start
    assert start[-2:].tolist() == pytest.approx([0.6, 0.3]) and not start[:-2].any()
    influence = start @ np.linalg.inv(np.eye(len(graph)) - shares) - start
    np.testing.assert_allclose(graph.influence, influence, atol=1e-12)
    tokens, errors = influence[graph.is_kind("embedding")].sum(), influence[graph.is_kind("error")].sum()
    assert graph.replacement_score == pytest.approx(tokens / (tokens + errors))
    of_errors = shares[:, graph.is_kind("error")].sum(1)
    assert graph.completeness_score == pytest.approx(
        ((1 - of_errors) * (influence + start)).sum() / (influence + start).sum()
    )


def prune_naively(graph: AttributionGraph, nodes: float, edges: float) -> tuple[set[int], set[tuple[int, int]]]:
    """The same as `prune`, written down step by step on the whole matrix."""
    dense, start = to_dense(graph), graph.start
    inner = graph.is_kind("feature", "error")

    def influence(matrix: np.ndarray) -> np.ndarray:
        return start @ np.linalg.inv(np.eye(len(graph)) - normalize(matrix)) - start

    def most(scores: np.ndarray, share: float) -> set[int]:
        found: set[int] = set()
        for i in sorted(range(len(scores)), key=lambda i: -scores[i]):
            if sum(scores[j] for j in found) >= share * scores.sum() * (1 - 1e-12) or scores[i] <= 0:
                break
            found.add(i)
        return found

    keep = most(influence(dense), nodes) | {i for i in range(len(graph)) if graph.is_kind("embedding", "logit")[i]}
    out = [i for i in range(len(graph)) if i not in keep]
    dense[out], dense[:, out] = 0, 0
    scores = normalize(dense) * (influence(dense) + start)[:, None]
    kept = {(i // len(graph), i % len(graph)) for i in most(scores.ravel(), edges)}
    while True:
        bad = {
            i for i in keep
            if (inner[i] and not any(s == i for _, s in kept))
            or (graph.kinds[i] == 1 and not any(t == i for t, _ in kept))
        }  # fmt: skip
        if not bad:
            return keep, kept
        keep -= bad
        kept = {(t, s) for t, s in kept if t in keep and s in keep}


@pytest.mark.parametrize("seed", SEEDS)
def test_pruning_is_that_of_a_naive_one(seed: int) -> None:
    graph = make(seed, density=0.4)
    shares = {0: (0.8, 0.98), 1: (0.5, 0.7), 2: (1.0, 1.0)}[seed % 3]
    keep, kept = prune_naively(graph, *shares)
    pruned = graph.prune(*shares)
    assert [graph.describe(i) for i in sorted(keep)] == [pruned.describe(i) for i in range(len(pruned))]
    number = {old: new for new, old in enumerate(sorted(keep))}
    assert {(number[t], number[s]) for t, s in kept} == set(
        zip(pruned.edge_targets.tolist(), pruned.edge_sources.tolist(), strict=True)
    )
    assert not pruned.is_kind("bias").any() and pruned.logit_tokens == ("x", "y")
    assert 0 <= pruned.replacement_score <= 1
    with pytest.raises(ValueError, match=r"`edges` must be a share in \(0, 1\], got 0"):
        graph.prune(0.5, 0.0)


def test_largest_of_nothing_is_nothing() -> None:
    assert not keep_largest(np.zeros(3), 0.9).any() and keep_largest(np.zeros(0), 0.9).shape == (0,)
    assert keep_largest(np.array([1.0, 2.0, 0.0]), 1.0).tolist() == [True, True, False]


def chain() -> AttributionGraph:
    """Embedding b over a feature of layer 0 and one of layer 1 to the logit x; and a weak way straight to it."""
    graph = make(0)
    one, two = (
        int(np.flatnonzero((graph.layers == i) & (graph.kinds == 1) & (graph.positions == 1))[0]) for i in (0, 1)
    )
    logit = len(graph) - 2
    edges = np.array([[1, one], [one, two], [two, logit], [1, logit], [0, logit]]).T
    z = graph.activations.copy()
    z[[one, two]] = [2.0, -4.0]
    weights = np.array([2.0, 3.0, 5.0, 0.1, -1.0], np.float32)
    slopes = np.ones(len(graph), np.float32)
    slopes[two] = 0.5
    return replace(
        graph, edge_sources=edges[0], edge_targets=edges[1], edge_weights=weights, activations=z, slopes=slopes
    )


def test_effects_and_paths_of_a_chain() -> None:
    graph = chain()
    one, two, logit = (int(graph.edge_targets[i]) for i in range(3))
    # what the embedding's loss takes from u_1 is 2 of z = 2; that takes 3 from u_2, half of which of z = -4
    effects = graph.effects()
    assert effects[two] == pytest.approx(5.0) and effects[one] == pytest.approx(3 * 0.5 / -4 * 5)
    assert effects[1] == pytest.approx(2 / 2 * effects[one] + 0.1) and effects[0] == pytest.approx(-1.0)
    assert graph.find_path(1) == (1, one, two, logit) and graph.find_path(0) == (0, logit)
    with pytest.raises(ValueError, match="must lead from node 2 to node"):
        graph.find_path(2)
    with pytest.raises(ValueError, match="`target` must be a node"):
        graph.effects(1000)
    for path, name in (((1000,), "source"), ((-1,), "source"), ((0, 1000), "target")):
        with pytest.raises(ValueError, match=f"`{name}` must be a node in 0.."):
            graph.find_path(*path)


def test_supernodes_sum_edges() -> None:
    graph = make(3)
    dense = np.zeros((len(graph), len(graph)))
    dense[graph.edge_targets, graph.edge_sources] = graph.edge_weights
    features = np.flatnonzero(graph.is_kind("feature"))
    groups = {
        "early": features[graph.layers[features] == 0].tolist(),
        "late": features[graph.layers[features] == 2].tolist(),
    }
    found = graph.group(groups)
    assert found.edge("early", "late") == pytest.approx(dense[np.ix_(groups["late"], groups["early"])].sum())
    logit = graph.describe(len(graph) - 1)
    assert found.edge("late", logit) == pytest.approx(dense[len(graph) - 1, groups["late"]].sum()) and "late" in str(
        found
    )
    names = ["early" if i in groups["early"] else "late" if i in groups["late"] else "" for i in range(len(graph))]
    by_name = graph.group(names)
    assert by_name.names == found.names and (by_name.edge_weights == found.edge_weights).all()
    for wrong in ({"a": [1], "b": [1]}, {"a": [len(graph)]}):
        with pytest.raises(ValueError, match="A supernode's nodes must be in"):
            graph.group(wrong)
    with pytest.raises(ValueError, match="a name for each of"):
        graph.group(["a"])
    with pytest.raises(KeyError, match="A supernode must be one of"):
        found.edge("early", "nowhere")


def test_a_graph_is_saved_and_read_again(tiny, tmp_path: Path) -> None:
    graph = trace(tiny, cover(tiny), "A fox")
    graph.save(tmp_path / "graph.json")
    again = AttributionGraph.load(tmp_path / "graph.json")
    for one in fields(graph):
        np.testing.assert_array_equal(getattr(graph, one.name), getattr(again, one.name))
    assert str(again) == str(graph) and "targets: logit" in str(graph) and "replacement 0." in str(graph)
    plain = again.to_dict()
    last = len(graph) - 1
    for changed, complaint in (
        ({"kinds": plain["kinds"][1:]}, "of one length"),
        ({"edge_sources": [last] * len(plain["edge_sources"])}, "to later ones"),
        ({"sources": [9] * len(graph)}, "to later ones"),
        ({"values": "none"}, "numbers or texts in `values`"),
        ({"more": 1}, "more"),
    ):
        write_json(tmp_path / "wrong.json", plain | changed)
        with pytest.raises(ValueError, match=complaint):
            AttributionGraph.load(tmp_path / "wrong.json")
    write_json(tmp_path / "wrong.json", {name: value for name, value in plain.items() if name != "kinds"})
    with pytest.raises(ValueError, match="got none for `kinds`"):
        AttributionGraph.load(tmp_path / "wrong.json")
    assert KINDS[int(graph.kinds[last])] == "logit"


def follow_naively(graph: AttributionGraph, targets: list[int], share: float) -> tuple[set[int], set[tuple[int, int]]]:
    reached, kept, waiting = set(targets), set(), list(targets)
    while waiting:
        node = waiting.pop()
        into = [
            (abs(float(w)), int(s))
            for s, t, w in zip(graph.edge_sources, graph.edge_targets, graph.edge_weights, strict=True)
            if t == node
        ]
        total, have = sum(size for size, _ in into), 0.0
        for size, source in sorted(into, reverse=True):
            if have >= share * total * (1 - 1e-9):
                break
            have += size
            kept.add((source, node))
            waiting += [source] if source not in reached else []
            reached.add(source)
    return reached, kept


@pytest.mark.parametrize("share", [0.3, 0.8, 1.0])
@pytest.mark.parametrize("seed", SEEDS)
def test_contributors_are_followed_back_until_they_make_up_their_share(seed: int, share: float) -> None:
    graph = make(seed)
    names = [
        (int(k), int(p), int(f), int(s))
        for k, p, f, s in zip(graph.kinds, graph.positions, graph.features, graph.sources, strict=True)
    ]
    for targets, found in (
        ([len(graph) - 2, len(graph) - 1], graph.follow(share)),
        ([len(graph) - 1], graph.follow(share, target=len(graph) - 1)),
    ):
        reached, kept = follow_naively(graph, targets, share)
        assert len(found) == len(reached) and len(found.edge_weights) == len(kept)
        own = [
            (int(k), int(p), int(f), int(s))
            for k, p, f, s in zip(found.kinds, found.positions, found.features, found.sources, strict=True)
        ]
        assert sorted(own) == sorted(names[i] for i in reached)
        sums = np.bincount(found.edge_targets, np.abs(found.edge_weights), len(found))
        whole = np.bincount(graph.edge_targets, np.abs(graph.edge_weights), len(graph))[sorted(reached)]
        assert (sums >= share * whole * (1 - 1e-6)).all()
    for options, complaint in (
        ({"share": 0.0}, "`share` must be"),
        ({"target": len(graph)}, "`target` must be a node"),
    ):
        with pytest.raises(ValueError, match=complaint):
            graph.follow(**options)  # type: ignore[arg-type]

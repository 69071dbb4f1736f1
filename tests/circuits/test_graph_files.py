"""Graphs as files: all of a graph comes back, others' files are read, and what is broken is named."""

import getpass
import json
import socket
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from graphs_made import make_graph
from unchecked import unchecked

import saelab as sl
from saelab.circuits import (
    AttributionGraph,
    GraphView,
    influence_shares,
    make_node_ids,
    read_graph_file,
    read_graph_json,
    read_view,
    write_graph_json,
)
from saelab.circuits.graph import KINDS
from saelab.circuits.graph_files import pair, unpair
from saelab.circuits.graph_views import group_by_label, name_nodes
from saelab.labels.label import Label

FEATURE, LOGIT = KINDS.index("feature"), KINDS.index("logit")
SHAPE: dict[str, dict[str, Any]] = {
    "metadata": {"slug": str, "scan": str, "prompt_tokens": list, "prompt": str, "transcoder_list": list,
                 "node_threshold": float, "schema_version": int, "info": dict},
    "qParams": {"pinnedIds": list, "supernodes": list, "linkType": str, "clickedId": str, "sg_pos": str},
    "nodes": {"node_id": str, "feature": int, "layer": str, "ctx_idx": int, "feature_type": str, "token_prob": float,
              "is_target_logit": bool, "run_idx": int, "reverse_ctx_idx": int, "jsNodeId": str, "clerp": str,
              "influence": (float, type(None)), "activation": (float, type(None))},
    "links": {"source": str, "target": str, "weight": float},
}  # fmt: skip
"""The fields that circuit-tracer 0.5.0 and Neuronpedia's schema ask for, with their types"""


def load(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def same(one: AttributionGraph, other: AttributionGraph) -> None:
    for field in fields(AttributionGraph):
        a, b = getattr(one, field.name), getattr(other, field.name)
        if isinstance(a, np.ndarray):
            assert np.array_equal(a, b, equal_nan=a.dtype.kind == "f"), field.name
        else:
            assert a == b, field.name


@pytest.fixture
def graph() -> AttributionGraph:
    return make_graph(40, 600, n_layers=3)


@pytest.mark.parametrize("seed", range(3))
def test_all_of_a_graph_comes_back(tmp_path: Path, seed: int) -> None:
    graph = make_graph(40, 600, n_layers=3, seed=seed)
    features = np.flatnonzero(graph.kinds == FEATURE).tolist()
    view = GraphView(
        pinned=(features[3], 1, len(graph.kinds) - 1), supernodes=(("a, \"b\" <c>", tuple(features[:2])),),
        clicked=features[1], link_type="input", positions="0 500 1000 20", node_threshold=0.75, edge_threshold=0.5,
        labels={features[0]: "first", features[5]: "\u2212 fifth"},
    )  # fmt: skip
    shares = np.linspace(0, 1, len(graph.kinds))
    path = write_graph_json(graph, tmp_path / "a.json", view=view, slug="my-graph", scan="tiny", influence=shares)
    found = read_graph_file(path)
    same(graph, found.graph)
    same(graph, read_graph_json(path))
    assert found.view == view
    assert (found.slug, found.scan, list(found.node_ids)) == ("my-graph", "tiny", make_node_ids(graph))
    logits = graph.kinds == LOGIT
    assert np.array_equal(found.influence[~logits], shares[~logits]) and np.isnan(found.influence[logits]).all()
    again = write_graph_json(
        found.graph, tmp_path / "b.json", view=found.view, slug=found.slug,
        scan=found.scan, influence=found.influence,
    )  # fmt: skip
    assert again.read_bytes() == path.read_bytes()


def test_the_file_has_the_fields_that_other_tools_ask_for(graph: AttributionGraph, tmp_path: Path) -> None:
    plain = load(write_graph_json(graph, tmp_path / "tom-saw.json"))
    for part, shape in SHAPE.items():
        for one in plain[part] if isinstance(plain[part], list) else [plain[part]]:
            for name, kind in shape.items():
                assert isinstance(one[name], kind), (part, name, one[name])
    nodes = {node["node_id"]: node for node in plain["nodes"]}
    assert plain["metadata"]["slug"] == "tom-saw" and plain["metadata"]["scan"] == "tiny-model"
    for i, name in enumerate(make_node_ids(graph)):
        node = nodes[name]
        kind, layer = KINDS[graph.kinds[i]], int(graph.layers[i])
        assert node["layer"] == ("E" if layer < 0 else str(layer + (kind == "logit")))
        assert node["activation"] == (float(str(graph.activations[i])) if kind == "feature" else None)
        if kind == "feature":
            assert unpair(node["feature"]) == (layer, graph.features[i])
            attention = "attn" in graph.dictionaries[graph.sources[i]]
            assert node["feature_type"] == ("lorsa" if attention else "cross layer transcoder")
        if kind == "logit":
            assert node["clerp"].endswith(f"(p={graph.activations[i]:.3f})") and node["token_prob"] > 0
    tokens = [node["feature"] for node in plain["nodes"] if node["feature_type"] == "logit"]
    assert tokens == sorted(tokens) != graph.features[graph.kinds == LOGIT].tolist(), (
        "as Neuronpedia's scores need them"
    )
    assert [node["is_target_logit"] for node in plain["nodes"]].count(True) == 1
    assert any(node["activation"] and node["activation"] < 0 for node in plain["nodes"]), "codes keep their sign"


def test_no_two_nodes_have_one_id_where_circuit_tracer_gives_them_one() -> None:
    """Latent 2 of layer 0 and the error of layer 2, both at token 1."""
    graph = make_graph(60, 10, n_layers=3)
    ids = make_node_ids(graph)
    assert len(set(ids)) == len(ids)
    node = next(i for i in np.flatnonzero(graph.kinds == FEATURE) if graph.sources[i] == 1)
    moved = replace(graph, features=np.where(np.arange(len(ids)) == node, 2, graph.features))
    made = make_node_ids(moved)
    error = np.flatnonzero((graph.kinds == KINDS.index("error")) & (graph.layers == 2))
    assert made[node] == f"0_2_{graph.positions[node]}" and made[node] not in {made[i] for i in error}


def test_pairs_of_numbers_are_told_apart() -> None:
    pairs = [(x, y) for x in range(40) for y in range(40)] + [(25, 2**20 + 7), (95, 10_000_019)]
    assert [unpair(pair(*one)) for one in pairs] == pairs and len({pair(*one) for one in pairs}) == len(pairs)


def test_shares_of_influence_are_those_of_the_whole_sum_of_paths() -> None:
    """The series w(A + A^2 + ...) summed by solving for it, biases left out, and the shares counted one by one."""
    graph = make_graph(30, 400, seed=4)
    n, bias = len(graph.kinds), graph.kinds == KINDS.index("bias")
    matrix = np.zeros((n, n))
    matrix[graph.edge_targets, graph.edge_sources] = np.abs(graph.edge_weights)
    matrix[:, bias] = 0
    matrix /= np.where(matrix.sum(1, keepdims=True) > 0, matrix.sum(1, keepdims=True), 1)
    start = np.where(graph.kinds == LOGIT, graph.activations, 0.0)
    influence = start @ matrix @ np.linalg.inv(np.eye(n) - matrix)
    nodes, edges = influence_shares(graph)
    scores = matrix[graph.edge_targets, graph.edge_sources] * (influence + start)[graph.edge_targets]
    for shares, own in ((nodes, influence), (edges, scores)):
        expected = [own[own >= x].sum() / own.sum() if x else 1.0 for x in own]
        if own is influence:
            expected = np.where(start > 0, 0.0, expected)
        assert np.allclose(shares, expected, atol=1e-9)


def test_logits_without_probability_count_the_same() -> None:
    graph = make_graph()
    blank = np.where(graph.kinds == LOGIT, np.nan, graph.activations)
    even = np.where(graph.kinds == LOGIT, 0.5, graph.activations)
    made = [influence_shares(replace(graph, activations=x, target_weights=None)) for x in (blank, even)]
    for one, other in zip(*made, strict=True):
        assert np.allclose(one, other, atol=1e-12)


@unchecked()
def test_the_path_of_a_store_is_no_label_store(graph: AttributionGraph) -> None:
    with pytest.raises(TypeError, match="or a label store, got str; open a store"):
        group_by_label(graph, {graph.dictionaries[0]: "a/store"})  # type: ignore[dict-item]


def test_labels_are_those_of_the_code_s_side(graph: AttributionGraph, tmp_path: Path) -> None:
    hook = graph.dictionaries[1]
    own = np.flatnonzero((graph.sources == 1) & (graph.kinds == FEATURE))
    negative = next(i for i in own if graph.activations[i] < 0)
    positive = next(i for i in own if graph.activations[i] > 0 and graph.features[i] != graph.features[negative])
    low, high = int(graph.features[negative]), int(graph.features[positive])
    with sl.labels.LabelStore(tmp_path / "labels.sqlite") as book:
        book.add([Label(feature=low, sign=sign, text=text, author="me") for sign, text in ((1, "hot"), (-1, "cold"))])
        book.set(high, "whole", author="me")
        texts, grouped = name_nodes(graph, {hook: book}), group_by_label(graph, {hook: book})
    for text, member in (("cold", negative), ("whole", positive)):
        own = grouped.members[grouped.names.index(text)]
        assert member in own and {texts[i] for i in own} == {text}
        assert [i for i, name in enumerate(texts) if name == text and graph.kinds[i] == FEATURE] == list(own)
    assert sum(map(len, grouped.members)) == len(graph) and graph.describe(len(graph) - 1) in grouped.names
    by_hand = graph.group({"cold": grouped.members[grouped.names.index("cold")]})
    assert by_hand.edge("cold", graph.describe(len(graph) - 1)) == grouped.edge("cold", graph.describe(len(graph) - 1))
    with pytest.raises(ValueError, match="`labels` must have hook points"):
        group_by_label(graph, {"blocks.9.hook_mlp_out": {}})
    assert (texts[negative], texts[positive]) == ("cold", "whole")
    texts = name_nodes(graph, {hook: {low: "axis"}})
    assert texts[negative] == "\u2212 axis" and texts[positive] == ""
    path = write_graph_json(graph, tmp_path / "a.json", labels={hook: {low: "axis"}})
    assert read_graph_file(path).view.labels[int(negative)] == "\u2212 axis"
    assert texts[1] == graph.tokens[1] and texts[-1] == graph.logit_tokens[-1]
    unknown = name_nodes(replace(graph, logit_tokens=()))
    assert unknown[-1] == f"token {graph.features[-1]}"
    with pytest.raises(ValueError, match=r"`labels` must have hook points .* got 'blocks.9.hook_mlp_out'"):
        name_nodes(graph, {"blocks.9.hook_mlp_out": {}})


def test_nothing_private_is_written(graph: AttributionGraph, tmp_path: Path) -> None:
    local = replace(graph, model=f"/home/{getpass.getuser()}/secret place/my-model")
    text = write_graph_json(local, tmp_path / "a.json", listed=True).read_text()
    text += (tmp_path / "graph-metadata.json").read_text()
    for private in (str(tmp_path), str(Path.home()), socket.gethostname(), "secret place", "/home/"):
        assert private not in text
    assert read_graph_json(tmp_path / "a.json").model == "my-model"


def test_biases_may_be_left_out(graph: AttributionGraph, tmp_path: Path) -> None:
    found = read_graph_json(write_graph_json(graph, tmp_path / "a.json", biases=False))
    bias = graph.kinds == KINDS.index("bias")
    assert len(found.kinds) == (~bias).sum() and not (found.kinds == KINDS.index("bias")).any()
    assert len(found.edge_weights) == (~bias[graph.edge_sources]).sum()
    assert np.array_equal(found.values, graph.values[~bias]), "what a node sums to is known without its bias"


def test_a_folder_lists_its_graphs_for_circuit_tracer_s_server(graph: AttributionGraph, tmp_path: Path) -> None:
    for name in ("a", "b", "a"):
        write_graph_json(graph, tmp_path / f"{name}.json", listed=True)
    held = load(tmp_path / "graph-metadata.json")
    assert [one["slug"] for one in held["graphs"]] == ["b", "a"]
    assert held["graphs"][1] == load(tmp_path / "a.json")["metadata"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"slug": "a b"}, r"`slug` must have letters.*got 'a b'"),
        ({"scan": "org/model"}, r"`scan` must have letters.*got 'org/model'"),
        ({"view": GraphView(pinned=(999,))}, r"A view's nodes must be in 0..\d+, got 999"),
        ({"view": GraphView(labels={-1: "x"})}, r"got -1"),
    ],
)
def test_what_cannot_be_written_is_refused(arguments: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        write_graph_json(make_graph(), tmp_path / "a.json", **arguments)
    assert not list(tmp_path.iterdir())


def test_numbers_that_json_does_not_have_are_refused(tmp_path: Path) -> None:
    graph = make_graph()
    weights = graph.edge_weights.copy()
    weights[3] = np.inf
    with pytest.raises(ValueError, match=r"`edge_weights` must be finite"):
        write_graph_json(replace(graph, edge_weights=weights), tmp_path / "a.json")
    with pytest.raises(ValueError, match=r"`node_threshold` must be a share in 0..1, got 80"):
        GraphView(node_threshold=80.0)


# ---- files that others wrote, in content made up here
def tracer() -> dict[str, Any]:
    """As circuit-tracer 0.5.0 writes them: features, errors, tokens, logits; three layers, none of the last."""

    def node(name: str, feature: int, layer: str, at: int, kind: str, **more: Any) -> dict[str, Any]:
        base = {"node_id": name, "feature": feature, "layer": layer, "ctx_idx": at, "feature_type": kind}
        base |= {"token_prob": 0.0, "is_target_logit": False, "run_idx": 0, "reverse_ctx_idx": 0, "jsNodeId": name}
        return base | {"clerp": "", "influence": 0.5, "activation": None} | more

    code = {"kind": "cross layer transcoder"}
    nodes = [
        node("1_7_1", pair(1, 7), "1", 1, activation=2.5, clerp="fruit", **code),
        node("0_300_0", pair(0, 300), "0", 0, activation=0.5, **code),
        node("0_1_1", -1, "1", 1, "mlp reconstruction error"),
        node("E_2_0", 0, "E", 0, "embedding"),
        node("E_40_1", 1, "E", 1, "embedding"),
        node("4_11_1", 11, "4", 1, "logit", token_prob=0.75, influence=None, clerp='Output " pear" (p=0.750)'),
    ]
    links = [("E_2_0", "0_300_0", 1.5), ("0_300_0", "1_7_1", -0.25), ("E_40_1", "1_7_1", 2), ("0_1_1", "4_11_1", 0.5),
             ("1_7_1", "4_11_1", 1.0)]  # fmt: skip
    return {
        "metadata": {"slug": "pears", "scan": "some-model", "transcoder_list": [], "prompt_tokens": ["<bos>", " a"],
                     "prompt": "<bos> a", "node_threshold": 0.8, "schema_version": 1},
        "qParams": {"pinnedIds": ["1_7_1", "E_40_1", "2_9_9"], "supernodes": [["fruit", "1_7_1"], ["gone", "2_9_9"]],
                    "linkType": "both", "clickedId": "4_11_1", "sg_pos": ""},
        "nodes": nodes,
        "links": [{"source": a, "target": b, "weight": w} for a, b, w in links],
    }  # fmt: skip


def store(plain: object, path: Path) -> Path:
    path.write_text(json.dumps(plain))
    return path


def test_a_graph_of_circuit_tracer_is_read(tmp_path: Path) -> None:
    found = read_graph_file(store(tracer(), tmp_path / "a.json"))
    graph = found.graph
    names = ["E_2_0", "E_40_1", "0_300_0", "0_1_1", "1_7_1", "4_11_1"]
    assert list(found.node_ids) == names, "sources come before targets"
    assert [KINDS[i] for i in graph.kinds] == ["embedding", "embedding", "feature", "error", "feature", "logit"]
    assert graph.layers.tolist() == [-1, -1, 0, 1, 1, 3] and graph.features.tolist() == [2, 40, 300, -1, 7, 11]
    assert graph.token_ids.tolist() == [2, 40] and graph.tokens == ("<bos>", " a") and graph.model == "some-model"
    assert graph.dictionaries == ("blocks.0.hook_mlp_out", "blocks.1.hook_mlp_out")
    assert graph.sources.tolist() == [-1, -1, 0, 1, 1, -1]
    assert graph.activations.tolist() == [1, 1, 0.5, 1, 2.5, 0.75] and graph.values.tolist() == [
        0,
        0,
        1.5,
        0,
        1.75,
        1.5,
    ]
    pairs = {
        (names[a], names[b]): w
        for a, b, w in zip(graph.edge_sources, graph.edge_targets, graph.edge_weights, strict=True)
    }
    assert pairs == {(one["source"], one["target"]): one["weight"] for one in tracer()["links"]}
    assert found.view == GraphView(
        pinned=(4, 1), supernodes=(("fruit", (4,)),), clicked=5, node_threshold=0.8, labels={4: "fruit"}
    )
    assert graph.logit_tokens == (" pear",) and found.influence[4] == 0.5
    assert graph.slopes is None and graph.target_weights is None


def test_a_graph_of_neuronpedia_s_server_is_read(tmp_path: Path) -> None:
    """Attention's features beside those of the MLP, layers as numbers, `feature` null, and no state of a page."""
    plain = tracer()
    plain["metadata"] = {
        key: plain["metadata"][key] for key in ("slug", "scan", "prompt_tokens", "prompt", "schema_version")
    }
    plain["qParams"] = {}
    plain["qk_only_nodes"] = {"0_bias_attn_bO_0": {"node_id": "0_bias_attn_bO_0"}}
    keep = ("node_id", "feature", "layer", "ctx_idx", "feature_type", "jsNodeId", "clerp", "activation")
    plain["nodes"] = [{name: node[name] for name in keep} for node in plain["nodes"]]
    one, two, error, *_, logit = plain["nodes"]
    one |= {"node_id": "1_cro_7_1", "layer": 1}
    two |= {"node_id": "0_lor_300_0", "layer": 0, "feature_type": "lorsa"}
    error |= {"node_id": "1_error_attn_1", "feature": None, "feature_type": "lorsa error", "layer": 1}
    logit |= {"node_id": "2_11_1", "layer": 2, "token": " pear"}
    plain["nodes"].append(dict(error) | {"node_id": "1_bias_mlp_bout_0", "feature_type": "bias", "ctx_idx": 0})
    new = {"1_7_1": "1_cro_7_1", "0_300_0": "0_lor_300_0", "0_1_1": "1_error_attn_1", "4_11_1": "2_11_1"}
    plain["links"] = [
        link | {end: new.get(link[end], link[end]) for end in ("source", "target")} for link in plain["links"]
    ]
    plain["links"].append({"source": "1_bias_mlp_bout_0", "target": "2_11_1", "weight": 0.125})
    found = read_graph_file(store(plain, tmp_path / "a.json"))
    graph = found.graph
    assert graph.dictionaries == ("blocks.0.hook_attn_out", "blocks.1.hook_attn_out", "blocks.1.hook_mlp_out")
    kinds = {name: (KINDS[graph.kinds[i]], int(graph.sources[i])) for i, name in enumerate(found.node_ids)}
    assert kinds["0_lor_300_0"] == ("feature", 0) and kinds["1_cro_7_1"] == ("feature", 2)
    assert kinds["1_error_attn_1"] == ("error", 1) and kinds["1_bias_mlp_bout_0"] == ("bias", 2)
    assert graph.layers[graph.kinds == LOGIT].tolist() == [2] and (graph.edge_sources < graph.edge_targets).all()
    assert graph.activations[graph.kinds == LOGIT].tolist() == [0.75], "its probability stands in its label"
    assert (
        found.view == GraphView(labels={found.node_ids.index("1_cro_7_1"): "fruit"}) and np.isnan(found.influence).all()
    )


def test_latents_of_old_files_stand_in_their_ids(tmp_path: Path) -> None:
    """Before schema_version 1, `feature` had other meanings: a number of all layers, or layer and latent in digits."""
    plain = tracer()
    del plain["metadata"]["schema_version"]
    plain["nodes"][0]["feature"] = 100007
    assert read_graph_json(store(plain, tmp_path / "a.json")).features.tolist() == [2, 40, 300, -1, 7, 11]
    plain["nodes"][0] |= {"node_id": "neuron", "feature": 12345}
    plain["links"] = plain["links"][:1]
    assert 12345 in read_graph_json(store(plain, tmp_path / "b.json")).features


BREAKS: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "no metadata": (lambda d: d.pop("metadata"), "`metadata` must be a dict, but it is missing"),
    "no prompt": (lambda d: d["metadata"].pop("prompt"), "`prompt` must be a str, but it is missing .in pears"),
    "tokens": (lambda d: d["metadata"].update(prompt_tokens=[1, 2]), "`prompt_tokens` must be a list of texts"),
    "no nodes": (lambda d: d.update(nodes={}), "`nodes` must be a list, but it is a dict"),
    "a node": (lambda d: d["nodes"].append(3), "node 6 must be an object, but it is a int"),
    "type": (lambda d: d["nodes"][0].update(feature_type="neuron"), "1_7_1 has the feature_type 'neuron'"),
    "place": (lambda d: d["nodes"][1].update(ctx_idx=2), "0_300_0 is at token 2 of 2"),
    "layer": (lambda d: d["nodes"][1].update(layer="x"), "0_300_0 has the layer 'x', which is no number"),
    "latent": (lambda d: d["nodes"][1].update(feature=None), "0_300_0 must have the number of its latent"),
    "other latent": (lambda d: d["nodes"][0].update(feature=pair(1, 8)), "1_7_1 is latent 8 of layer 1 at token 1"),
    "twice": (lambda d: d["nodes"].append(d["nodes"][2]), "two nodes have the id 0_1_1, so that their links"),
    "unknown": (lambda d: d["links"][0].update(source="9_9_9"), "link 0 is of a node '9_9_9', which is not there"),
    "weight": (lambda d: d["links"][2].update(weight=None), "link 2 has no weight"),
    "text weight": (lambda d: d["links"][2].update(weight="1"), "`weight` must be a number, but it is '1'"),
    "back": (lambda d: d["links"].append({"source": "4_11_1", "target": "E_2_0", "weight": 1}),
             "a link leads back from 4_11_1 to E_2_0"),
    "pins": (lambda d: d["qParams"].update(pinnedIds=3), "its pinnedIds and supernodes must be lists"),
    "group": (lambda d: d["qParams"].update(supernodes=[[1, 2]]), "must be a list of a name and of node ids"),
    "threshold": (lambda d: d["metadata"].update(node_threshold=80), "`node_threshold` must be a share in 0..1"),
}  # fmt: skip


@pytest.mark.parametrize("name", list(BREAKS))
def test_a_broken_file_is_named_with_its_fault(name: str, tmp_path: Path) -> None:
    plain = tracer()
    breaks, message = BREAKS[name]
    breaks(plain)
    with pytest.raises(ValueError, match=rf"a\.json must hold an attribution graph, but .*{message}"):
        read_graph_file(store(plain, tmp_path / "a.json"))


def test_a_pickle_is_refused_and_nothing_of_it_runs(tmp_path: Path) -> None:
    torch.save({"adjacency_matrix": torch.zeros(1)}, tmp_path / "graph.pt")
    with pytest.raises(ValueError, match=r"got .*graph.pt, a pickle: .* loading them runs whatever code"):
        read_graph_json(tmp_path / "graph.pt")
    with pytest.raises(FileNotFoundError, match=r"`path` must be an existing JSON file"):
        read_graph_json(tmp_path / "none.json")


def test_a_saved_view_is_read_for_its_graph(graph: AttributionGraph, tmp_path: Path) -> None:
    ids = make_node_ids(graph)
    params = GraphView(pinned=(4, 2), clicked=7, edge_threshold=0.5).to_params(ids)
    named = [[ids[2], "two"], ["gone", "x"], [ids[3], ""]]
    path = store({"qParams": params | {"clerps": named}}, tmp_path / "view.json")
    assert read_view(path, ids) == GraphView(pinned=(4, 2), clicked=7, edge_threshold=0.5, labels={2: "two"})
    with pytest.raises(ValueError, match=r"must hold the view of a graph, but `qParams` must be a dict"):
        read_view(store({}, tmp_path / "no.json"), ids)


@pytest.mark.parametrize("targets", ["top", "feature"])
def test_a_traced_graph_comes_back_whole_and_pruned(targets: str, tmp_path: Path) -> None:
    model = sl.lm.tiny_model(n_layers=2)
    hooks = [tuple(f"blocks.{layer}.mlp.hook_{end}" for end in ("in", "out")) for layer in range(2)]
    cfg = sl.SAEConfig(d_in=32, d_out=32, d_sae=64, activation=sl.AbsTopK(k=4))
    coders = {hook: sl.SAE(cfg, seed=i) for i, hook in enumerate(hooks)}
    graph = sl.circuits.trace(model, coders, "Hello")
    if targets == "feature":
        node = int(np.flatnonzero(graph.is_kind("feature") & (graph.sources == 1))[-1])
        target = (hooks[1][1], int(graph.features[node]), int(graph.positions[node]))
        graph = sl.circuits.trace(model, coders, "Hello", targets=target)
        assert not graph.is_kind("logit").any()
    assert graph.is_kind("bias").any() and (graph.activations < 0).any()
    for name, one in (("whole", graph), ("pruned", graph.prune())):
        same(one, read_graph_json(write_graph_json(one, tmp_path / f"{name}.json")))

"""Graphs of cross-layer transcoders: edges add up over all layers that a feature writes, and are felt by the model."""

from typing import Any

import numpy as np
import pytest
import torch
from transcoders_made import cover, make_coder

import saelab as sl
from saelab.circuits.graph import AttributionGraph
from saelab.circuits.graph_validation import validate
from saelab.circuits.linear_effects import FEATURE, LinearEffects, Targets, read_written
from saelab.circuits.placement import place_dictionaries
from saelab.circuits.tracing import trace
from saelab.sae import CLT, CLTConfig

N, D, PROMPT = 3, 32, "A fox"
PLACES = tuple((f"blocks.{i}.mlp.hook_in", f"blocks.{i}.hook_mlp_out") for i in range(N))


def make_clt(seed: int = 0, **axes: Any) -> CLT:
    """Untrained, with random biases and normalizers."""
    base = {"n_layers": N, "d_in": D, "d_sae": 48, "activation": sl.TopK(k=4)}
    clt = CLT(CLTConfig(**(base | axes)), seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in (clt.b_dec, *(layer.b_enc for layer in clt.layers)):
            weight.copy_(torch.randn(weight.shape, generator=generator) / 5)
        for normalizer in (*clt.normalizers, *clt.target_normalizers):
            normalizer.fit(torch.randn(60, clt.cfg.d_in, generator=generator))
    return clt


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def model(request: pytest.FixtureRequest) -> Any:
    return sl.lm.tiny_model(architecture=request.param, n_layers=N)


@pytest.mark.parametrize("normalizer", ["none", "scale", "whiten"])
def test_edges_add_up(model: Any, normalizer: str) -> None:
    clt = make_clt(normalizer=normalizer)
    graph = trace(model, {PLACES: clt}, PROMPT)
    assert graph.completeness_error < 1e-4 and graph.dictionaries == tuple(place[1] for place in PLACES)
    sums = np.bincount(graph.edge_targets, graph.edge_weights.astype(np.float64), len(graph))
    is_target = graph.is_kind("feature", "logit")
    np.testing.assert_allclose(sums[is_target], graph.values[is_target], rtol=1e-3, atol=1e-3)
    # one node for a feature at a token, wherever it writes
    n_tokens = len(graph.tokens)
    assert graph.is_kind("feature").sum() == N * 4 * n_tokens and graph.is_kind("error").sum() == N * n_tokens
    features = graph.is_kind("feature")
    np.testing.assert_allclose(graph.values[features], graph.activations[features], rtol=1e-3, atol=1e-3)


def test_errors_are_what_all_earlier_layers_leave(model: Any) -> None:
    clt, ids = make_clt(), torch.arange(3, 9)[None]
    written = read_written(model, ids, place_dictionaries(model, {PLACES: clt}))
    cache = sl.lm.capture(model, ids, [name for place in PLACES for name in place])
    x, y = (torch.cat([cache[place[side]][0] for place in PLACES], dim=1) for side in (0, 1))
    rest = y - clt(x)
    for i, one in enumerate(written[1:]):
        error = one.vectors[one.kinds == FEATURE + 1]
        torch.testing.assert_close(error, rest[:, i * D : (i + 1) * D], rtol=1e-3, atol=1e-4)
        summed = sum(
            torch.zeros(6, D).index_add_(0, other.positions, vectors)
            for other in written[1:]
            if (vectors := other.at(one.point)) is not None
        )
        torch.testing.assert_close(summed, y[:, i * D : (i + 1) * D], rtol=1e-3, atol=1e-4)


def test_an_edge_is_what_the_frozen_model_loses(model: Any) -> None:
    """Taking away all that one feature writes, at every layer, changes each target by its edge."""
    clt, ids = make_clt(normalizer="none"), torch.arange(3, 9)[None]
    written = read_written(model, ids, place_dictionaries(model, {PLACES: clt}))
    effects = LinearEffects.make(model, ids, written)
    source = int((written[1].kinds == FEATURE).nonzero()[7])
    position = int(written[1].positions[source])
    at = (written[3].kinds == FEATURE).nonzero()[:, 0][-6:]
    targets = Targets(3, written[3].positions[at], written[3].features[at])
    made = effects.effects(targets)[:, effects.starts[1] + source]
    less = [one.constant.clone() for one in written]
    for place, one in enumerate(written):
        if (vectors := written[1].at(one.point)) is not None:
            less[place][position] -= vectors[source]
    with torch.no_grad():
        lost = effects.values(targets, effects.readings) - effects.values(
            targets, effects.read(less, effects.readings.constants)
        )
    assert np.abs(made).max() > 1e-4
    np.testing.assert_allclose(made, lost, rtol=1e-3, atol=1e-5)
    own = [one.constant.clone() for one in written]
    own[1][position] -= written[1].vectors[source]  # at its own layer alone: not the edge
    with torch.no_grad():
        part = effects.values(targets, effects.readings) - effects.values(
            targets, effects.read(own, effects.readings.constants)
        )
    assert np.abs(part - made).max() > 0.01 * np.abs(made).max()


def test_one_that_writes_only_its_own_layer_is_a_set_of_transcoders(model: Any) -> None:
    clt = make_clt(normalizer="none")
    with torch.no_grad():
        for layer in clt.layers:
            layer.W_dec[:, D:] = 0
    alone = {place: clt.layer(i, writes=i) for i, place in enumerate(PLACES)}
    graphs = [trace(model, given, PROMPT) for given in ({PLACES: clt}, alone)]
    assert len(graphs[0]) == len(graphs[1])
    one, other = (graph_matrix(graph) for graph in graphs)
    np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-4)
    assert graphs[0].replacement_score == pytest.approx(graphs[1].replacement_score, abs=1e-3)


def test_placing_takes_no_memory_where_nothing_has_to_be_folded(model: Any) -> None:
    for normalizer in ("none", "scale"):
        clt = make_clt(normalizer=normalizer)
        before = {name: weight.clone() for name, weight in clt.state_dict().items()}
        placed = place_dictionaries(model, {PLACES: clt}).dictionaries
        for layer, one in zip(clt.layers, placed, strict=True):
            for name in ("W_enc", "W_dec"):
                shared = getattr(layer, name).data_ptr() == getattr(one.sae, name).data_ptr()
                assert shared == (normalizer == "none"), name
        trace(model, {PLACES: clt}, PROMPT)
        assert all(torch.equal(weight, before[name]) for name, weight in clt.state_dict().items())
        assert clt.layers[0].W_dec.grad is None and clt.layers[0].W_dec.requires_grad
    alone = make_clt(normalizer="none")
    with torch.no_grad():
        alone.layer(1).W_dec.zero_()  # a copy, unless it is asked for otherwise
    assert alone.layers[1].W_dec.any()


def test_validation_takes_away_what_a_feature_writes_at_its_own_layer(model: Any) -> None:
    clt = make_clt(normalizer="scale")
    graph = trace(model, {PLACES: clt}, PROMPT, targets="a")
    checked = validate(graph, model, {PLACES: clt}, n_ablated=None, n_steered=2, progress=False)
    ids, token = torch.from_numpy(graph.token_ids)[None], int(graph.features[-1])

    def value() -> float:
        logits = sl.lm.logits(model, ids)[0, -1].double()
        return float(logits[token] - logits[: model.tokenizer.vocab_size].mean())

    clean = value()
    for layer in range(N):
        node = int(np.flatnonzero(graph.layers[checked.nodes] == layer)[3])
        j, position = int(graph.features[checked.nodes[node]]), int(graph.positions[checked.nodes[node]])
        row = clt.layer(layer, writes=layer).directions([j])[0] * float(graph.activations[checked.nodes[node]])

        def edit(x: torch.Tensor, position: int = position, row: torch.Tensor = row) -> torch.Tensor:
            x[0, position] -= row
            return x

        with sl.splice(model, {PLACES[layer][1]: edit}):
            assert checked.exact_live[node] == pytest.approx(clean - value(), rel=1e-3, abs=1e-5)
    # of the last layer that is all, and what is behind it is linear when patterns and scales are held
    last = graph.layers[checked.nodes] == N - 1
    np.testing.assert_allclose(checked.exact[last], checked.estimates[last], rtol=1e-2, atol=1e-4)
    assert not np.allclose(checked.exact[~last], checked.estimates[~last], rtol=1e-2, atol=1e-4)


def test_validation_of_one_that_writes_only_its_own_layer_is_that_of_transcoders(model: Any) -> None:
    clt = make_clt(normalizer="none")
    with torch.no_grad():
        for layer in clt.layers:
            layer.W_dec[:, D:] = 0
    alone = {place: clt.layer(i, writes=i) for i, place in enumerate(PLACES)}
    one, other = (
        validate(trace(model, given, PROMPT), model, given, n_ablated=None, n_steered=2, progress=False)
        for given in ({PLACES: clt}, alone)
    )
    np.testing.assert_allclose(one.exact, other.exact, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(one.exact_live, other.exact_live, rtol=1e-4, atol=1e-6)
    assert one.held.spearman == pytest.approx(other.held.spearman, abs=1e-3)


def graph_matrix(graph: AttributionGraph) -> np.ndarray:
    found = np.zeros((len(graph), len(graph)))
    np.add.at(found, (graph.edge_targets, graph.edge_sources), graph.edge_weights)
    return found


def test_with_attention_and_features_left_out(model: Any) -> None:
    clt, attention = make_clt(), make_coder(D, 5, is_transcoder=False)
    given: Any = {PLACES: clt, "blocks.1.hook_attn_out": attention}
    graph = trace(model, given, PROMPT, max_features=20)
    assert graph.completeness_error < 1e-4 and graph.n_left_out > 0
    assert graph.dictionaries.index("blocks.1.hook_attn_out") == 1
    feature = int(np.flatnonzero(graph.is_kind("feature") & (graph.layers == 2))[-1])
    target = (PLACES[2][1], int(graph.features[feature]), int(graph.positions[feature]))
    assert trace(model, given, PROMPT, targets=target).completeness_error < 1e-4


def test_what_is_refused(model: Any) -> None:
    clt = make_clt()
    cases: list[tuple[Any, str]] = [
        (clt, "without provenance must be given with its hook points"),
        ({PLACES[:2]: clt}, "for each of 3 layers"),
        ({(PLACES[1], PLACES[0], PLACES[2]): clt}, "in the order of the model"),
        ({PLACES: clt, PLACES[0]: make_coder(D)}, "one dictionary"),
        ({PLACES: make_clt(d_in=16)}, "must have the model's width|must fit|of width"),
    ]
    for given, complaint in cases:
        with pytest.raises(ValueError, match=complaint):
            trace(model, given, PROMPT)
    with pytest.raises(ValueError, match="must cover the MLPs of all 3 layers"):
        trace(model, {PLACES[:2]: CLT(CLTConfig(n_layers=2, d_in=D, d_sae=48, activation=sl.TopK(k=4)))}, PROMPT)
    assert cover(model)  # as many transcoders as layers


def test_the_provenance_tells_the_hook_points() -> None:
    model = sl.lm.tiny_model(n_layers=N)
    acts = sl.collect(
        model, sl.tokenize(model, ["a fox and a hen"] * 20, ctx_len=16), [n for p in PLACES for n in p], progress=False
    )
    pair = tuple(sl.Activations.join({place[side]: acts[place[side]] for place in PLACES}) for side in (0, 1))
    clt = CLT(CLTConfig(n_layers=N, d_in=D, d_sae=48, activation=sl.TopK(k=4)))
    clt.fit(pair, sl.TrainConfig(n_tokens=200, batch_size=50), progress=False)
    graph = trace(model, clt, PROMPT)
    assert clt.places == PLACES and graph.completeness_error < 1e-4
    other = sl.lm.tiny_model(n_layers=N, seed=3)
    with pytest.raises(ValueError, match="must be used where it was trained"):
        trace(other, clt, PROMPT)
    assert trace(other, clt, PROMPT, allow_mismatch=True).completeness_error < 1e-4


def test_a_transcoder_in_half_precision_is_traced_to_its_own_rounding(model: Any) -> None:
    clt = make_clt().bfloat16()
    assert 1e-4 < trace(model, {PLACES: clt}, PROMPT).completeness_error < 0.05

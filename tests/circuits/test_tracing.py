"""Graphs: edges add up, are what the weights say, and are felt by the frozen model; bad input is refused first."""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from families.table import build
from torch import Tensor
from transcoders_made import cover, make_coder
from unchecked import unchecked

import saelab as sl
from saelab.circuits.attention_scores import ScoreTarget, attention_score
from saelab.circuits.graph import AttributionGraph
from saelab.circuits.graph_files import write_graph_json
from saelab.circuits.graph_validation import validate
from saelab.circuits.linear_effects import FEATURE, LinearEffects, Targets, read_written
from saelab.circuits.placement import place_dictionaries
from saelab.circuits.tracing import trace
from saelab.lm.freezing import FREEZING_RULES
from saelab.lm.hook_points import hook_points_of
from saelab.lm.models import _byte_tokenizer
from saelab.sae.encoders import MatchingPursuit
from saelab.visualization.graph_page import write_graph_page

PROMPT = "A fox"
ATTENTION, STREAM = "blocks.1.hook_attn_out", "blocks.1.hook_resid_post"
ATTENTION_TOO = "blocks.1.attn.hook_out"


def sum_edges(graph: AttributionGraph) -> np.ndarray:
    return np.bincount(graph.edge_targets, graph.edge_weights.astype(np.float64), len(graph))


def load(name: str, backend: Any = "auto") -> Any:
    if name in ("llama", "gpt2"):
        return sl.lm.tiny_model(architecture=name)  # type: ignore[arg-type]
    return sl.load_model(build(name), tokenizer=_byte_tokenizer(("<s>", "</s>", "<pad>")), backend=backend)


FAMILIES = {
    "llama": "RMSNorm, rotary",
    "gpt2": "LayerNorm, learned positions, biases",
    "Gemma2ForCausalLM": "norms behind, softcaps",
    "GPTNeoXForCausalLM": "attention and MLP in parallel",
    "BloomForCausalLM": "ALiBi, norm of embeddings",
    "GraniteForCausalLM": "multipliers",
    "MixtralForCausalLM": "experts",
}


@pytest.mark.parametrize("name", FAMILIES)
def test_edges_add_up_in_every_family(name: str) -> None:
    model = load(name)
    coders = cover(model, skip=name == "gpt2")
    graph = trace(model, coders, PROMPT)
    assert graph.completeness_error < 1e-5
    is_target = graph.is_kind("feature", "logit")
    np.testing.assert_allclose(sum_edges(graph)[is_target], graph.values[is_target], rtol=1e-4, atol=1e-4)
    assert not sum_edges(graph)[~is_target].any()
    # TopK: a code is its pre-activation, and that is the code of the model's own activation
    features = graph.is_kind("feature")
    np.testing.assert_allclose(graph.values[features], graph.activations[features], rtol=1e-3, atol=1e-4)
    ids = torch.from_numpy(graph.token_ids)[None]
    acts = sl.lm.capture(model, ids, [read for read, _ in coders])
    expected = torch.cat([coder.encode_sparse(acts[read][0]).values for (read, _), coder in coders.items()])
    np.testing.assert_allclose(np.sort(graph.activations[features]), expected.sort().values.numpy(), rtol=1e-4)
    logits = sl.lm.logits(model, ids)[0, -1].double()
    chosen = graph.features[graph.is_kind("logit")]
    mean = logits[: len(model.tokenizer)].mean()  # ids without a token do not count
    np.testing.assert_allclose(graph.values[graph.is_kind("logit")], (logits - mean)[chosen], rtol=1e-3)
    np.testing.assert_allclose(graph.activations[graph.is_kind("logit")], logits.softmax(0)[chosen], rtol=1e-3)


def test_edges_are_what_the_weights_say() -> None:
    """By hand: embeddings to features of the first layer through attention, and features of the last to logits."""
    model = sl.lm.tiny_model(n_layers=2)
    coders = cover(model)
    graph = trace(model, coders, PROMPT, targets=[70, 80])
    theirs = hook_points_of(model).running
    assert theirs is not None
    block, ids = theirs.model.layers[0], torch.from_numpy(graph.token_ids)[None]
    with torch.no_grad():
        x = theirs.model.embed_tokens(ids)[0].double()
        middle = sl.lm.capture(model, ids, ["blocks.0.ln2.hook_in", "ln_final.hook_in"])
        scales = [
            (one[0].double().square().mean(-1, keepdim=True) + 1e-6).rsqrt() for one in (x[None], *middle.values())
        ]
        pattern = find_pattern(model, ids)
        norm = block.input_layernorm.weight.double()
        value = (block.self_attn.v_proj.weight.double() * norm).view(2, 8, 32).repeat_interleave(2, 0)
        out = block.self_attn.o_proj.weight.double().view(32, 4, 8)
        coder = coders["blocks.0.mlp.hook_in", "blocks.0.hook_mlp_out"]
        read = block.post_attention_layernorm.weight.double()[:, None] * coder.W_enc.double()
        # effect of the embedding at s on the feature f at p
        moved = torch.einsum("hps,s,hed,sd,meh->psm", pattern, scales[0][:, 0], value, x, out.permute(0, 2, 1))
        moved += torch.diag_embed(x.T).permute(1, 2, 0)
        expected = torch.einsum("p,psm,mf->psf", scales[1][:, 0], moved, read)
        last = coders["blocks.1.mlp.hook_in", "blocks.1.hook_mlp_out"]
        head = theirs.model.norm.weight.double() * theirs.lm_head.weight.double()
        by_logit = scales[2][-1] * last.W_dec.double() @ (head - head.mean(0)).T
    n_checked = 0
    for s, t, weight in zip(graph.edge_sources, graph.edge_targets, graph.edge_weights, strict=True):
        if graph.is_kind("embedding")[s] and graph.is_kind("feature")[t] and graph.layers[t] == 0:
            want = expected[graph.positions[t], graph.positions[s], graph.features[t]]
        elif graph.is_kind("feature")[s] and graph.is_kind("logit")[t] and graph.layers[s] == 1:
            want = by_logit[graph.features[s], graph.features[t]] * float(graph.activations[s])
        else:
            continue
        assert weight == pytest.approx(float(want), rel=1e-3, abs=1e-5)
        n_checked += 1
    n_tokens, k = len(graph.tokens), 4
    assert n_checked == k * n_tokens * (n_tokens + 1) // 2 + 2 * k


@pytest.mark.parametrize("name", ["llama", "gpt2", "Gemma2ForCausalLM", "GPTNeoXForCausalLM", "Phi3ForCausalLM"])
def test_saes_of_attention_and_mlp_outputs_add_up(name: str) -> None:
    """The setting of arXiv:2402.12201: embeddings, attention outputs, MLP outputs, gates of the MLPs frozen."""
    model = load(name)
    places = [f"blocks.{i}.hook_{part}_out" for i in range(model.cfg.n_layers) for part in ("attn", "mlp")]
    coders = {place: make_coder(32, i, is_transcoder=False) for i, place in enumerate(places)}
    if name == "Phi3ForCausalLM":  # one matrix makes gates and neurons, which a bridge parts
        with pytest.raises(ValueError, match=r"one layer of neurons.*backend='transformer_lens'"):
            trace(model, coders, PROMPT)
        model = load(name, "transformer_lens")
    graph = trace(model, coders, PROMPT)
    assert graph.completeness_error < 1e-5 and graph.dictionaries == tuple(places)
    is_target = graph.is_kind("feature", "logit")
    np.testing.assert_allclose(sum_edges(graph)[is_target], graph.values[is_target], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(
        graph.values[graph.is_kind("feature")], graph.activations[graph.is_kind("feature")], rtol=1e-3, atol=1e-4
    )
    into_mlp = (
        np.array(["mlp" in places[i] for i in graph.sources])[graph.edge_targets]
        & graph.is_kind("feature")[graph.edge_targets]
    )
    same_token = graph.positions[graph.edge_sources] == graph.positions[graph.edge_targets]
    assert (same_token | graph.is_kind("bias")[graph.edge_sources])[into_mlp].all()


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_effects_through_an_mlp_are_what_the_weights_say(name: str) -> None:
    """Naively, neuron by neuron, with the gate g = post / pre: from embeddings to features of an MLP's output."""
    model = load(name)
    coders = {f"blocks.{i}.hook_mlp_out": make_coder(32, i, is_transcoder=False) for i in range(model.cfg.n_layers)}
    coders["blocks.0.hook_attn_out"] = make_coder(32, 9, is_transcoder=False)
    graph = trace(model, coders, PROMPT)
    at, ids = 4, torch.from_numpy(graph.token_ids)[None]
    x, before = (
        one[0, at].double() for one in sl.lm.capture(model, ids, ["blocks.0.hook_in", "blocks.0.ln2.hook_in"]).values()
    )
    twin = hook_points_of(model).running
    assert twin is not None
    with torch.no_grad():
        if name == "gpt2":
            block = twin.transformer.h[0]
            through = (x - x.mean()) * (before.var(unbiased=False) + 1e-5).rsqrt() * block.ln_2.weight.double()
            pre = torch.nn.functional.layer_norm(
                before, (32,), block.ln_2.weight.double(), block.ln_2.bias.double(), 1e-5
            )
            up, down = block.mlp.c_fc.weight.double().T, block.mlp.c_proj.weight.double().T
            h = up @ pre + block.mlp.c_fc.bias.double()
            gates = block.mlp.act(h) / h
        else:
            block = twin.model.layers[0]
            scale = (before.square().mean() + 1e-6).rsqrt() * block.post_attention_layernorm.weight.double()
            through, up, down = x * scale, block.mlp.up_proj.weight.double(), block.mlp.down_proj.weight.double()
            gates = torch.nn.functional.silu(block.mlp.gate_proj.weight.double() @ (before * scale))
    source = int(np.flatnonzero(graph.is_kind("embedding") & (graph.positions == at))[0])
    own = graph.sources == graph.dictionaries.index("blocks.0.hook_mlp_out")
    for node in np.flatnonzero(graph.is_kind("feature") & own & (graph.positions == at)):
        row = coders["blocks.0.hook_mlp_out"].W_enc[:, int(graph.features[node])].detach().double()
        naive = sum(float(through @ up[n]) * float(gates[n]) * float(down[:, n] @ row) for n in range(len(gates)))
        (edge,) = graph.edge_weights[(graph.edge_sources == source) & (graph.edge_targets == node)]
        assert edge == pytest.approx(naive, rel=1e-3, abs=1e-5)


def test_an_sae_of_experts_needs_a_transcoder() -> None:
    model = load("MixtralForCausalLM")
    with pytest.raises(ValueError, match="needs an MLP of one layer of neurons"):
        trace(model, {"blocks.0.hook_mlp_out": make_coder(32, is_transcoder=False)}, PROMPT, allow_missing=True)


def find_pattern(model: Any, ids: Tensor) -> Tensor:
    """(n_heads, n, n) attention of the first layer, by Hugging Face's own eager attention."""
    twin = copy.deepcopy(hook_points_of(model).running)
    assert twin is not None
    twin.set_attn_implementation("eager")
    return twin(ids, output_attentions=True, use_cache=False).attentions[0][0].double()


def frozen_loss(effects: LinearEffects, number: int, held: bool) -> np.ndarray:
    """What the logits lose without a source, by running the frozen model: naive, with every code computed anew."""
    z = [one.z.clone() for one in effects.written]
    places = [i for i, start in enumerate(effects.starts[:-1]) if start <= number]
    place, at = places[-1], number - effects.starts[places[-1]]
    z[place][at] = 0
    with torch.no_grad():
        for _ in range(len(z)):
            parts = [one.vectors * (own / one.z)[:, None] for one, own in zip(effects.written, z, strict=True)]
            written = [
                torch.zeros_like(one.constant).index_add(0, one.positions, part)
                for one, part in zip(effects.written, parts, strict=True)
            ]
            found = effects.read(written, effects.readings.constants)
            if held:
                break
            for i, one in enumerate(effects.written):
                rows = (one.kinds == FEATURE).nonzero()[:, 0]
                if one.dictionary is not None and len(rows):
                    u = effects.values(Targets(i, one.positions[rows], one.features[rows]), found)
                    z[i][rows] = torch.from_numpy(u).float()
            z[place][at] = 0
    return (effects.readings.logits.detach() - found.logits).double().numpy()


@unchecked()
def test_a_source_taken_from_the_frozen_model_is_missed_as_the_graph_says(tiny) -> None:
    """Signed codes, skip connections, normalizers, an SAE of attention and one of the residual stream."""
    coders = cover(tiny, activation=sl.AbsTopK(k=4), skip=True, normalizer="scale")
    coders[ATTENTION] = make_coder(seed=7, is_transcoder=False, activation=sl.AbsTopK(k=3), normalizer="token_norm")
    coders[STREAM] = make_coder(seed=8, is_transcoder=False, activation=sl.TopK(k=6), normalizer="whiten")
    graph = trace(tiny, coders, PROMPT, targets=["a"])
    assert graph.completeness_error < 1e-5
    assert (graph.activations[graph.is_kind("feature")] < 0).any()
    ids = torch.from_numpy(graph.token_ids)[None]
    effects = LinearEffects.make(tiny, ids, read_written(tiny, ids, place_dictionaries(tiny, coders)))
    target = len(graph) - 1
    along, direct = graph.effects(target), np.zeros(len(graph))
    direct[graph.edge_sources[graph.edge_targets == target]] = graph.edge_weights[graph.edge_targets == target]
    first = len(graph.tokens)
    chosen = [*range(0, first, 3), *range(first, effects.starts[-1], 1 + effects.starts[-1] // 20)]
    for number in chosen:
        node = number + (number >= first)  # the model's biases are a node behind the embeddings
        for held, expected in ((True, direct[node]), (False, along[node])):
            lost = frozen_loss(effects, number, held)
            found = lost[graph.features[target]] - lost.mean()
            assert found == pytest.approx(expected, rel=1e-3, abs=2e-4), graph.describe(node)
    passed_on = np.abs(along - direct)[graph.is_kind("feature")]
    assert (passed_on > 1e-2).sum() > 10  # the two are not the same thing


def test_an_sae_of_the_residual_stream_stops_what_is_before_it(tiny) -> None:
    coders = cover(tiny)
    coders[STREAM] = make_coder(seed=8, is_transcoder=False)
    graph = trace(tiny, coders, PROMPT)
    later = graph.layers[graph.edge_targets] > 1
    early = (graph.layers[graph.edge_sources] < 2) & ~graph.is_kind("bias")[graph.edge_sources]
    own = graph.sources[graph.edge_sources] == graph.dictionaries.index(STREAM)
    assert early[later].any() and own[later & early].all()


def test_the_batch_of_targets_changes_nothing(tiny) -> None:
    coders = cover(tiny)
    graphs = [trace(tiny, coders, PROMPT, batch_size=size) for size in (1, 7, 256)]
    for other in graphs[1:]:
        assert (other.edge_sources == graphs[0].edge_sources).all()
        np.testing.assert_allclose(other.edge_weights, graphs[0].edge_weights, rtol=1e-3, atol=1e-6)


def test_features_beyond_the_most_influential_are_errors(tiny) -> None:
    coders = cover(tiny)
    whole, cut, again = (
        trace(tiny, coders, PROMPT, max_features=n, batch_size=size) for n, size in ((None, 2), (16, 2), (16, 256))
    )
    assert (again.features == cut.features).all(), "memory does not choose features"
    n_features = int(whole.is_kind("feature").sum())
    assert cut.n_left_out == n_features - 16 == len(whole) - len(cut) and f"{cut.n_left_out} features beyond" in str(
        cut
    )
    is_target = cut.is_kind("feature", "logit")
    np.testing.assert_allclose(sum_edges(cut)[is_target], cut.values[is_target], rtol=1e-4, atol=1e-4)
    names, known = [whole.describe(i) for i in range(len(whole))], whole.influence
    kept = {cut.describe(int(i)) for i in np.flatnonzero(cut.is_kind("feature"))}
    best = int(np.argmax(np.where(whole.is_kind("feature"), known, 0)))
    assert names[best] in kept and kept <= set(names)
    with pytest.raises(ValueError, match="`max_features` must be at least 1, got 0"):
        trace(tiny, coders, PROMPT, max_features=0)


def test_a_feature_is_a_target(tiny) -> None:
    coders = cover(tiny)
    whole = trace(tiny, coders, PROMPT)
    node = int(np.flatnonzero(whole.is_kind("feature") & (whole.layers == 1))[-1])
    name = whole.dictionaries[1], int(whole.features[node]), int(whole.positions[node])
    graph = trace(tiny, coders, PROMPT, targets=name)
    assert not graph.is_kind("logit").any() and graph.start.tolist() == [0.0] * (len(graph) - 1) + [1.0]
    assert set(graph.layers.tolist()) == {-1, 0, 1} and graph.describe(len(graph) - 1) == whole.describe(node)
    np.testing.assert_allclose(graph.values[-1], whole.values[node])
    np.testing.assert_allclose(sum_edges(graph)[-1], whole.values[node], rtol=1e-4)
    silent = next(i for i in range(48) if i not in whole.features[whole.layers == 1])
    with pytest.raises(ValueError, match=f"must fire at the token to be traced, got {silent}"):
        trace(tiny, coders, PROMPT, targets=(name[0], silent, 1))


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_a_score_of_attention_is_a_target(architecture: str, tmp_path: Path) -> None:
    """Half of what each pair gives for either node, and behind that the graph of a feature."""
    model = sl.lm.tiny_model(architecture=architecture)  # type: ignore[arg-type]
    coders = cover(model)
    target = ScoreTarget(layer=2, head=1, key=2, query=4)
    graph = trace(model, coders, PROMPT, targets=target)
    pairs = attention_score(model, coders, PROMPT, head=(2, 1), key=2, query=4)
    assert graph.completeness_error < 1e-5 and graph.values[-1] == pytest.approx(pairs.score, rel=1e-5)
    assert sum_edges(graph)[-1] == pytest.approx(pairs.score, rel=1e-4)
    assert graph.is_kind("score").nonzero()[0].tolist() == [len(graph) - 1] and not graph.is_kind("logit").any()
    assert set(graph.layers[:-1].tolist()) == {-1, 0, 1} and graph.start.tolist() == [0.0] * (len(graph) - 1) + [1.0]
    halves = (pairs.by_query + pairs.by_key) / 2
    names = [graph.describe(i) for i in range(len(graph))]
    own = (graph.edge_targets == len(graph) - 1) & (graph.edge_weights != 0)
    into = {names[s]: float(w) for s, w in zip(graph.edge_sources[own], graph.edge_weights[own], strict=True)}
    expected = {pairs.describe(i): float(half) for i, half in enumerate(halves) if half}
    assert into == pytest.approx(expected, rel=1e-3, abs=1e-5)
    assert names[-1] == "score of head 2.1, 4 'o' to 2 ' '" and names[-1] in str(graph)
    feature = int(np.flatnonzero(graph.is_kind("feature") & (graph.layers == 1))[-1])
    name = graph.dictionaries[1], int(graph.features[feature]), int(graph.positions[feature])
    alone = trace(model, coders, PROMPT, targets=name)
    np.testing.assert_allclose(sum_edges(graph)[feature], sum_edges(alone)[-1], rtol=1e-4)
    graph.save(tmp_path / "graph.json")
    assert AttributionGraph.load(tmp_path / "graph.json").describe(len(graph) - 1) == names[-1]
    assert graph.prune(0.5).describe(len(graph.prune(0.5)) - 1) == names[-1]
    for write in (write_graph_json, write_graph_page):
        with pytest.raises(ValueError, match="got one of a score of attention"):
            write(graph, tmp_path / "graph.html")
    with pytest.raises(ValueError, match="must be the node of a logit"):
        validate(graph, model, coders)
    below = {place: coders[place] for place in list(coders)[:2]}
    assert len(trace(model, below, PROMPT, targets=target)) == len(graph)
    small = trace(model, coders, PROMPT, targets=target, max_features=4)
    assert small.n_left_out and sum_edges(small)[-1] == pytest.approx(pairs.score, rel=1e-4)


def test_top_targets_are_the_most_probable(tiny) -> None:
    coders = cover(tiny)
    top = trace(tiny, coders, PROMPT)
    probabilities = sl.lm.logits(tiny, torch.from_numpy(top.token_ids)[None])[0, -1].softmax(0)
    n = min(10, int((probabilities.sort(descending=True).values.cumsum(0) < 0.95).sum()) + 1)
    assert top.features[top.is_kind("logit")].tolist() == probabilities.topk(n).indices.tolist()
    one = trace(tiny, coders, PROMPT, targets="a")
    assert one.logit_tokens == ("a",) and one.start[-1] == pytest.approx(float(probabilities[67]), rel=1e-4)


def test_missing_layers_are_errors_where_asked_for(tiny) -> None:
    coders = cover(tiny)
    del coders["blocks.1.mlp.hook_in", "blocks.1.hook_mlp_out"]
    with pytest.raises(ValueError, match=r"cover the MLPs of all 3 layers, got none for \[1\]"):
        trace(tiny, coders, PROMPT)
    graph = trace(tiny, coders, PROMPT, allow_missing=True)
    missing = graph.is_kind("error") & (graph.sources == -1)
    assert missing.sum() == len(graph.tokens) and set(graph.layers[missing]) == {1}
    assert graph.describe(int(np.flatnonzero(missing)[1])) == "error of MLP 1 at 1 'A'"
    assert graph.completeness_error < 1e-5


def test_a_model_that_is_not_linear_when_frozen_is_refused(tiny, monkeypatch) -> None:
    for function in (torch.rsqrt, Tensor.rsqrt):
        monkeypatch.delitem(FREEZING_RULES, function)
    with pytest.raises(ValueError, match="not linear with attention patterns, norm scales and gates frozen"):
        trace(tiny, cover(tiny), PROMPT)


def placed(tiny: Any, tiny_tokens: Any) -> sl.SAE:
    """A transcoder of another model's weights."""
    acts = sl.collect(tiny, tiny_tokens[:2], "blocks.0.hook_resid_post", progress=False)
    coder = make_coder(is_transcoder=False)
    coder.provenance = acts.provenance
    return coder


@pytest.mark.parametrize(
    ("places", "axes", "complaint"),
    [
        ([("blocks.0.mlp.hook_in", "blocks.1.hook_mlp_out")], {}, "must read and write in one block"),
        ([("blocks.0.hook_mlp_out", "blocks.0.hook_attn_out")], {}, "must read before it writes"),
        ([("blocks.0.hook_mlp_out", "blocks.0.mlp.hook_out")], {}, "must read before it writes"),
        (["blocks.0.mlp.out.hook_in"], {"is_transcoder": False}, "must be one of its output"),
        ([ATTENTION, ATTENTION_TOO], {"is_transcoder": False}, "one dictionary, got two"),
        ([("blocks.0.mlp.hook_in", "blocks.0.hook_mlp_out")], {"width": 16}, r"model's width \(32\)"),
        (["ln_final.hook_out"], {"is_transcoder": False}, "at an MLP, at an attention output or in the residual"),
        (["blocks.0.hook_nothing"], {"is_transcoder": False}, "must be a hook point of this model"),
        (["blocks.0.mlp.hook_in"], {}, "must have the hook point of its target"),
        ([STREAM], {"is_transcoder": False, "encoder": MatchingPursuit()}, "must read by one linear map"),
        ([STREAM], {"is_transcoder": False, "activation": sl.BatchTopK(k=4)}, "inference threshold"),
        ([STREAM], {"is_transcoder": False}, r"cover the MLPs of all 3 layers, got none for \[0, 1, 2\]"),
        ([], {}, "must hold at least one"),
    ],
)
def test_dictionaries_that_do_not_belong_are_refused_before_any_pass(
    tiny, monkeypatch, places, axes, complaint
) -> None:
    monkeypatch.setattr("saelab.circuits.tracing.read_written", None)
    coders = {place: make_coder(seed=i, **axes) for i, place in enumerate(places)}
    with pytest.raises(ValueError, match=complaint):
        trace(tiny, coders, PROMPT)


def test_two_names_of_one_place_are_one_without_a_bridge(tiny) -> None:
    coders = {place: make_coder(seed=i, is_transcoder=False) for i, place in enumerate((ATTENTION, ATTENTION_TOO))}
    with pytest.raises(ValueError, match="one dictionary, got two"):
        trace(sl.load_model(tiny, backend="huggingface"), coders, PROMPT)


def test_dictionaries_of_other_weights_are_refused(tiny, tiny_tokens) -> None:
    coder = placed(tiny, tiny_tokens)
    with pytest.raises(ValueError, match="An SAE must be used where it was trained"):
        trace(sl.lm.tiny_model(seed=1), [coder], PROMPT, allow_missing=True)
    graph = trace(tiny, coder, PROMPT, allow_missing=True)  # its provenance says where
    assert graph.dictionaries == ("blocks.0.hook_resid_post",)


@pytest.mark.parametrize(
    ("prompt", "options", "complaint"),
    [
        (" ", {}, "must hold text, got a blank one"),
        ("long " * 80, {}, "fit the model's context of 256"),
        (torch.zeros(0, dtype=torch.long), {}, "1 to 256 tokens"),
        (
            torch.zeros(1, 4, dtype=torch.long),
            {},
            r"tensor of token ids, \(n_tokens,\) integers, got .* shape \(1, 4\)",
        ),
        (torch.ones(2), {}, "integers, got torch.float32"),
        ([70, 71], {}, "must be a text or a tensor of token ids, .*, got int"),
        (PROMPT, {"batch_size": 0}, "`batch_size` must be at least 1, got 0"),
        (PROMPT, {"targets": []}, "must be different tokens"),
        (PROMPT, {"targets": [70, 70]}, "must be different tokens"),
        (PROMPT, {"targets": 1000}, "must be different tokens"),
        (PROMPT, {"targets": "no token"}, "must be"),
        (PROMPT, {"targets": ("blocks.0.hook_mlp_out", 3, 9)}, r"position in 0\.\.5"),
        (PROMPT, {"targets": ("blocks.0.hook_attn_out", 3, 1)}, "one that a dictionary writes to"),
        (PROMPT, {"targets": ScoreTarget(layer=3, head=0, key=1)}, r"the layer in 0\.\.2, got 3"),
        (PROMPT, {"targets": ScoreTarget(layer=1, head=4, key=1)}, r"the head in 0\.\.3, got 4"),
        (PROMPT, {"targets": ScoreTarget(layer=1, head=0, query=2, key=3)}, "up to the query, got 3"),
    ],
)
def test_prompts_and_targets_that_are_none_are_refused(tiny, monkeypatch, prompt, options, complaint) -> None:
    monkeypatch.setattr("saelab.circuits.tracing.read_written", None)
    with unchecked(), pytest.raises(ValueError, match=complaint):
        trace(tiny, cover(tiny), prompt, **options)


def test_what_is_no_sae_is_refused(tiny) -> None:
    with unchecked(), pytest.raises(ValueError, match=r"must be SAEs, got a str; load it: SAE.from_pretrained"):
        trace(tiny, ["runs/sae"], PROMPT)  # type: ignore[list-item]


def test_tracing_leaves_model_and_random_state_as_they_were_also_when_interrupted(tiny, monkeypatch) -> None:
    """In inference mode, where no gradients are, the graph is the same."""
    coders = cover(tiny)

    def read_state() -> list[Any]:
        modules, params = (
            list(tiny.modules()),
            [*tiny.parameters(), *(p for c in coders.values() for p in c.parameters())],
        )
        return [
            torch.get_rng_state().tolist(), torch.is_grad_enabled(), torch.get_num_threads(),
            np.random.get_state()[1].tolist(),  # noqa: NPY002
            [(one.training, len(one._forward_hooks), len(one._forward_pre_hooks)) for one in modules],
            [(one.requires_grad, one.grad is None) for one in params],
        ]  # fmt: skip

    graph = trace(tiny, coders, PROMPT)  # the first one looks the model's hook points up
    before = read_state()
    with torch.inference_mode():
        np.testing.assert_array_equal(trace(tiny, coders, PROMPT).edge_weights, graph.edge_weights)

    def interrupt(self: Any, targets: Any) -> Any:
        if targets.place != -1:
            raise KeyboardInterrupt
        return effects(self, targets)

    effects = LinearEffects.effects
    monkeypatch.setattr(LinearEffects, "effects", interrupt)
    with pytest.raises(KeyboardInterrupt):
        trace(tiny, coders, PROMPT)
    assert read_state() == before

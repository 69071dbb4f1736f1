"""Effects on a feature of an attention output, head by head: they add up, and each is of its own head."""

import copy
import re
from typing import Any

import numpy as np
import pytest
import torch
from induction_made import COPIES, FIRST, LAST, WORDS, make_induction, make_saes
from transcoders_made import cover, make_coder

import saelab as sl
from saelab.circuits.attention_heads import split_by_head
from saelab.circuits.tracing import trace
from saelab.lm.hook_points import hook_points_of

ATTENTION = "blocks.1.hook_attn_out"


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_heads_add_up_and_a_head_without_output_adds_nothing(architecture: str) -> None:
    model = sl.lm.tiny_model(architecture=architecture)  # type: ignore[arg-type]
    parameters = model.original_model.named_parameters()
    out = next(weight for name, weight in parameters if re.search(r"\.1\..*(o_proj|attn\.c_proj)\..*weight", name))
    with torch.no_grad():  # of head 2, of width 8
        (out[:, 16:24] if architecture == "llama" else out[16:24]).zero_()
    coders = cover(model)
    coders[ATTENTION] = make_coder(seed=7, is_transcoder=False, activation=sl.AbsTopK(k=3))
    graph = trace(model, coders, "A fox")
    node = int(np.flatnonzero(graph.is_kind("feature") & (graph.sources == graph.dictionaries.index(ATTENTION)))[-1])
    split = split_by_head(graph, model, coders, node)
    with torch.inference_mode():
        np.testing.assert_array_equal(split_by_head(graph, model, coders, node).effects, split.effects)
    into = (graph.edge_targets == node) & ~(graph.is_kind("bias") & (graph.sources < 0))[graph.edge_sources]
    expected = np.bincount(graph.edge_sources[into], graph.edge_weights[into], len(graph))
    np.testing.assert_allclose(split.effects.sum(0), expected, rtol=1e-3, atol=1e-5)
    sizes = np.abs(split.effects).sum(1)
    assert sizes[2] < 1e-6 and (sizes[[0, 1, 3]] > 1e-3).all()
    assert split.by_token.shape == (4, len(graph.tokens)) and graph.describe(node) in str(split)
    other = int(np.flatnonzero(graph.is_kind("feature") & (graph.sources == 0))[0])
    for chosen, options, complaint in (
        (other, {}, "must be a feature of an attention output, or `layer` be given"),
        (0, {}, "must be a feature or a logit of the graph"),
        (other, {"layer": 3}, r"`layer` must be in 0\.\.2, got 3"),
        (other, {"layer": 2}, "must reach the node past no dictionary"),
        (len(graph) - 1, {"layer": 1}, "must reach the node past no dictionary"),
    ):
        with pytest.raises(ValueError, match=complaint):
            split_by_head(graph, model, coders, chosen, **options)
    with pytest.raises(ValueError, match="The dictionaries must be the graph's"):
        split_by_head(graph, model, cover(model), node)


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_effects_through_a_head_are_what_the_weights_say(architecture: str) -> None:
    """Naively, head by head and token by token: from embeddings to a feature of the first MLP."""
    model = sl.lm.tiny_model(architecture=architecture)  # type: ignore[arg-type]
    coders = cover(model)
    graph = trace(model, coders, "A fox")
    node = int(np.flatnonzero(graph.is_kind("feature") & (graph.layers == 0) & (graph.positions == 4))[0])
    split = split_by_head(graph, model, coders, node, layer=0)
    ids = torch.from_numpy(graph.token_ids)[None]
    twin = copy.deepcopy(hook_points_of(model).running)
    twin.set_attn_implementation("eager")
    names = ["blocks.0.hook_in", "blocks.0.ln2.hook_in"]
    x, middle = (one[0].double() for one in sl.lm.capture(model, ids, names).values())
    row = coders["blocks.0.mlp.hook_in", "blocks.0.hook_mlp_out"].W_enc[:, int(graph.features[node])].detach().double()
    with torch.no_grad():
        pattern = twin(ids, output_attentions=True, use_cache=False).attentions[0][0].double()
        for head in range(4):
            for token in range(len(graph.tokens)):
                through = one_head(twin, architecture, head, x[token])
                weight = read_norm(twin, architecture, middle[4], through)
                expected = float(pattern[head, 4, token] * (weight @ row))
                assert split.effects[head, token] == pytest.approx(expected, rel=1e-3, abs=1e-5)
    assert "through layer 0" in str(split)


def one_head(twin: Any, architecture: str, head: int, x: torch.Tensor) -> torch.Tensor:
    """What a head writes for an embedding that it attends to, without biases."""
    if architecture == "gpt2":
        block = twin.transformer.h[0]
        value = (
            scale(block.ln_1, x, x, centers=True)
            @ block.attn.c_attn.weight.double()[:, 64:][:, 8 * head : 8 * head + 8]
        )
        return value @ block.attn.c_proj.weight.double()[8 * head : 8 * head + 8]
    block, own = twin.model.layers[0], head // 2
    value = block.self_attn.v_proj.weight.double()[8 * own : 8 * own + 8] @ scale(
        block.input_layernorm, x, x, centers=False
    )
    return block.self_attn.o_proj.weight.double()[:, 8 * head : 8 * head + 8] @ value


def read_norm(twin: Any, architecture: str, x: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    if architecture == "gpt2":
        return scale(twin.transformer.h[0].ln_2, x, v, centers=True)
    return scale(twin.model.layers[0].post_attention_layernorm, x, v, centers=False)


def scale(norm: Any, x: torch.Tensor, v: torch.Tensor, centers: bool) -> torch.Tensor:
    """A vector through a norm whose scale is that of `x`."""
    if centers:
        return (v - v.mean()) * (x.var(unbiased=False) + 1e-5).rsqrt() * norm.weight.double()
    return v * (x.square().mean() + 1e-6).rsqrt() * norm.weight.double()


def test_the_planted_head_carries_what_is_copied() -> None:
    model, saes = make_induction(), make_saes()
    graph = trace(model, saes, "a b c d e a", targets=["b"], allow_missing=True)
    copied = graph.sources == graph.dictionaries.index(LAST)
    node = int(np.flatnonzero(graph.is_kind("feature") & copied & (graph.positions == 6))[0])
    assert graph.features[node] == WORDS.index("b")
    split = split_by_head(graph, model, saes, node)
    assert np.unravel_index(np.abs(split.effects).argmax(), split.effects.shape) == (COPIES[1], 2)
    assert split.effects[COPIES[1]].sum() > 20 * abs(split.effects[1 - COPIES[1]].sum())
    logit = len(graph) - 1
    alone = trace(model, {FIRST: saes[FIRST]}, "a b c d e a", targets=["b"], allow_missing=True)
    by_head = split_by_head(alone, model, {FIRST: saes[FIRST]}, len(alone) - 1, layer=1).by_token
    assert by_head.argmax() == 2 and by_head[COPIES[1], 2] > 0.8 * alone.values[-1]
    assert [graph.describe(i) for i in graph.find_path(2, logit)][1] == graph.describe(node)

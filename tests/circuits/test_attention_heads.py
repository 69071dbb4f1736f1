"""Effects on a feature of an attention output, head by head: they add up, and each is of its own head."""

import re

import numpy as np
import pytest
import torch
from transcoders_made import cover, make_coder

import saelab as sl
from saelab.circuits.attention_heads import split_by_head
from saelab.circuits.tracing import trace

ATTENTION = "blocks.1.hook_attn_out"


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_heads_add_up_and_a_head_without_output_adds_nothing(architecture: str) -> None:
    model = sl.lm.tiny_model(architecture=architecture)  # type: ignore[arg-type]
    parameters = model.original_model.named_parameters()
    out = next(weight for name, weight in parameters if re.search(r"\.1\..*(o_proj|attn\.o)\..*weight", name))
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
    with pytest.raises(ValueError, match="must be a feature of an attention output"):
        split_by_head(graph, model, coders, other)
    with pytest.raises(ValueError, match="The dictionaries must be the graph's"):
        split_by_head(graph, model, cover(model), node)

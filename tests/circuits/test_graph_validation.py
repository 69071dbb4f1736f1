"""Effects of a graph against the model: exact where nothing is behind a feature but the logits, and nulls."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from transcoders_made import cover, make_coder

import saelab as sl
from saelab.circuits.graph_validation import validate
from saelab.circuits.tracing import trace


def test_features_of_the_last_layer_have_exact_effects_when_norms_are_held(tiny) -> None:
    coders = cover(tiny)
    graph = trace(tiny, coders, "A fox sees", targets=["a", "b"])
    checked = validate(graph, tiny, coders, target=len(graph) - 1, n_ablated=None, n_steered=4, progress=False)
    last = graph.layers[checked.nodes] == 2
    np.testing.assert_allclose(checked.exact[last], checked.estimates[last], rtol=1e-2, atol=1e-4)
    assert not np.allclose(checked.exact_live[last], checked.estimates[last], rtol=1e-2, atol=1e-4)
    assert len(checked.nodes) == graph.is_kind("feature").sum() and checked.target == graph.describe(len(graph) - 1)
    assert checked.held.spearman > checked.held.shuffled_95 and checked.live.spearman < checked.held.spearman
    assert len(checked.steered) == len(checked.others) == 4 and not set(checked.steered) & set(checked.others)
    assert np.abs(checked.steered_estimates).min() >= np.abs(graph.effects(len(graph) - 1)[list(checked.others)]).max()
    assert "patterns and scales held: Spearman" in str(checked)


def test_live_effects_are_those_of_splicing(tiny) -> None:
    """Each is what an edit of that activation does, by hand."""
    coders = cover(tiny)
    graph = trace(tiny, coders, "A fox", targets="a")
    checked = validate(graph, tiny, coders, n_ablated=5, n_steered=2, progress=False)
    ids = torch.from_numpy(graph.token_ids)[None]
    clean = sl.lm.logits(tiny, ids)[0, -1].double()
    for node, exact in zip(checked.nodes, checked.exact_live, strict=True):
        point, position = graph.dictionaries[graph.sources[node]], int(graph.positions[node])
        coder = next(coder for (_, write), coder in coders.items() if write == point)
        written = float(graph.activations[node]) * coder.directions([int(graph.features[node])])[0]

        def edit(x, position=position, written=written):
            x[0, position] -= written
            return x

        with sl.splice(tiny, {point: edit}):
            changed = sl.lm.logits(tiny, ids)[0, -1].double()
        token = int(graph.features[-1])
        lost = (clean[token] - clean.mean()) - (changed[token] - changed.mean())
        assert exact == pytest.approx(float(lost), rel=1e-3, abs=1e-5)


def test_what_does_not_go_with_the_graph_is_refused(tiny) -> None:
    coders = cover(tiny)
    graph = trace(tiny, coders, "A fox")
    with pytest.raises(ValueError, match="`target` must be the node of a logit"):
        validate(graph, tiny, coders, target=0)
    with pytest.raises(ValueError, match="The dictionaries must be the graph's"):
        validate(graph, tiny, dict(list(coders.items())[:2]))
    others = {place: make_coder(seed=9) for place in coders}
    with pytest.raises(ValueError, match="must fire as they did when it was traced"):
        validate(graph, tiny, others)
    with pytest.raises(ValueError, match="must fire as they did when it was traced"):
        validate(replace(graph, activations=2 * graph.activations), tiny, coders)
    for wrong in ({"n_ablated": 0}, {"n_steered": -1}):
        with pytest.raises(ValueError, match=f"`{next(iter(wrong))}` must be at least"):
            validate(graph, tiny, coders, **wrong)
    with pytest.raises(ValueError, match="must have features"):
        validate(graph.select(~graph.is_kind("feature")), tiny, coders)

"""Scores of attention: all pairs add up, are what the weights say, and show a circuit that was planted."""

from typing import Any

import numpy as np
import pytest
import torch
from families.table import build
from induction_made import COPIES, FIRST, make_induction, make_saes
from transcoders_made import cover, make_coder
from unchecked import unchecked

import saelab as sl
from saelab.circuits.attention_scores import AttentionScore, attention_score
from saelab.circuits.linear_effects import read_written
from saelab.circuits.placement import place_dictionaries
from saelab.lm.hook_points import hook_points_of
from saelab.lm.models import _byte_tokenizer
from saelab.lm.unwrapped import set_attention

PROMPT = "A fox ran"


def load(name: str) -> Any:
    if name in ("llama", "gpt2"):
        return sl.lm.tiny_model(architecture=name)  # type: ignore[arg-type]
    return sl.load_model(build(name), tokenizer=_byte_tokenizer(("<s>", "</s>", "<pad>")))


def cover_all(model: Any, **axes: Any) -> dict[str, sl.SAE]:
    """An SAE of each attention output and of each MLP output."""
    names = [f"blocks.{i}.hook_{part}_out" for i in range(model.cfg.n_layers) for part in ("attn", "mlp")]
    return {name: make_coder(model.cfg.d_model, i, is_transcoder=False, **axes) for i, name in enumerate(names)}


def name_nodes(found: AttentionScore) -> list[str]:
    return [found.describe(i) for i in range(len(found))]


FAMILIES = {
    "llama": "rotary, keys of two queries each",
    "gpt2": "LayerNorm, biases, learned positions",
    "Gemma2ForCausalLM": "softcap, sliding window, norms behind",
    "Gemma3ForCausalLM": "norms of queries and keys",
    "GPTNeoXForCausalLM": "a part of the dimensions is rotated, MLP in parallel",
    "OPTForCausalLM": "queries are scaled before",
    "MptForCausalLM": "a bias of positions",
    "DeepseekV3ForCausalLM": "keys from a latent vector",
    "GraniteForCausalLM": "another scale",
}


@pytest.mark.parametrize("name", FAMILIES)
def test_pairs_add_up_to_the_model_s_own_score(name: str) -> None:
    """Differences of scores are differences of log probabilities of the pattern, by eager attention of the model."""
    model = load(name)
    found = attention_score(model, cover(model), PROMPT, head=(1, 3), query=7, key=5, against=2)
    assert found.completeness_error < 1e-5 and (name == "MptForCausalLM") == (abs(found.offset) > 1e-5)
    assert float(found.pairs.astype(np.float64).sum()) + found.offset == pytest.approx(found.score, abs=1e-5)
    np.testing.assert_allclose(found.by_query.sum(), found.pairs.sum(), atol=1e-4)
    np.testing.assert_allclose(found.by_key.sum(), found.pairs.sum(), atol=1e-4)
    twin, ids = hook_points_of(model).running, sl.tokenize(model, [PROMPT], ctx_len=10, packed=False).ids.long()
    assert twin is not None
    set_attention(twin, "eager")
    twin.config.output_attentions = True
    with torch.no_grad():
        pattern = twin(ids, use_cache=False, output_attentions=True).attentions[1][0, 3, 7].double()
    assert float((pattern[5] / pattern[2]).log()) == pytest.approx(found.score, abs=1e-4)
    alone = [attention_score(model, cover(model), PROMPT, head=(1, 3), query=7, key=key).score for key in (5, 2)]
    assert alone[0] - alone[1] == pytest.approx(found.score, abs=1e-5)


@unchecked()
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_pairs_are_what_the_weights_say(name: str) -> None:
    """Naively, from Hugging Face's weights: one product of two projected vectors a pair."""
    model = load(name)
    coders = cover_all(model, activation=sl.AbsTopK(k=3))
    layer, head, query, key = 1, 2, 7, 4
    found = attention_score(model, coders, PROMPT, head=(layer, head), query=query, key=key)
    ids = sl.tokenize(model, [PROMPT], ctx_len=10, packed=False).ids.long()
    written = read_written(model, ids, place_dictionaries(model, coders))[:3]  # embeddings and two dictionaries
    into = sl.lm.capture(model, ids, [f"blocks.{layer}.hook_resid_pre"])[f"blocks.{layer}.hook_resid_pre"][0].double()
    sides: list[list[torch.Tensor]] = []
    for which, at in ((0, query), (1, key)):
        vectors = [
            (one.vectors[i].double(), one)
            for one in written
            for i in range(len(one.positions))
            if one.positions[i] == at
        ]
        sides.append([project(model, name, layer, head, which, at, v, into[at]) for v, _ in vectors])
        sides[-1].append(project(model, name, layer, head, which, at, torch.zeros(32).double(), into[at], bias=True))
    naive = torch.tensor([[float(q @ k) / 8**0.5 for k in sides[1]] for q in sides[0]])
    rows = [i for i in range(len(found)) if found.positions[i] == query and i < len(found) - 1] + [len(found) - 1]
    columns = [i for i in range(len(found)) if found.positions[i] == key and i < len(found) - 1] + [len(found) - 1]
    assert len(rows) == len(sides[0]) and len(rows) + len(columns) == len(found) + 1
    np.testing.assert_allclose(found.pairs[np.ix_(rows, columns)], naive, rtol=1e-3, atol=1e-5)
    rest = found.pairs.copy()
    rest[np.ix_(rows, columns)] = 0
    assert np.abs(rest).max() == 0, "nothing else reaches the two"


def project(
    model: Any,
    name: str,
    layer: int,
    head: int,
    which: int,
    at: int,
    v: torch.Tensor,
    x: torch.Tensor,
    bias: bool = False,
) -> torch.Tensor:
    """Of a vector: through the norm at the scale of `x`, the query's (0) or key's (1) weights, and the rotation."""
    twin = hook_points_of(model).running
    with torch.no_grad():
        if name == "gpt2":
            block = twin.transformer.h[layer]
            scale = (x.var(unbiased=False) + 1e-5).rsqrt()
            weight = block.attn.c_attn.weight.double()[:, 32 * which + 8 * head :][:, :8]
            out = ((v - v.mean()) * scale * block.ln_1.weight.double()) @ weight
            added = block.ln_1.bias.double() @ weight + block.attn.c_attn.bias.double()[32 * which + 8 * head :][:8]
            return out + added if bias else out
        block = twin.model.layers[layer]
        own = head if which == 0 else head // 2
        weight = (block.self_attn.q_proj, block.self_attn.k_proj)[which].weight.double()[8 * own : 8 * own + 8]
        out = weight @ (v * (x.square().mean() + 1e-6).rsqrt() * block.input_layernorm.weight.double())
        angles = at * 10000.0 ** (-torch.arange(4).double() / 4)
        turned = torch.cat([-out[4:], out[:4]])
        return out * angles.cos().repeat(2) + turned * angles.sin().repeat(2)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_attention_before_is_part_of_the_path_where_no_sae_replaces_it(name: str) -> None:
    """With transcoders alone, earlier tokens reach the query; with SAEs of attention outputs only the two tokens do."""
    model = load(name)
    open_, closed = (
        attention_score(model, coders, PROMPT, head=(1, 0), query=7, key=4)
        for coders in (cover(model), cover_all(model))
    )
    assert open_.score == pytest.approx(closed.score, rel=1e-5)
    rows = np.flatnonzero(np.abs(open_.queries).max(1) > 0)
    assert set(open_.positions[rows]) == set(range(8))
    assert set(closed.positions[np.abs(closed.queries[:-1]).max(1).nonzero()]) == {7}
    assert set(closed.positions[np.abs(closed.keys[:-1]).max(1).nonzero()]) == {4}


def test_a_planted_pair_is_found_and_none_where_nothing_is_repeated(tmp_path) -> None:
    """The induction head asks for the token before: its own token meets the feature of the first attention."""
    model, saes = make_induction(), make_saes()
    found = attention_score(model, saes, "a b c d e a", head=COPIES, key=2, against=4, allow_missing=True)
    value, i, j = found.top_pairs(1)[0]
    assert (found.describe(i), found.describe(j)) == ("embedding at 6 ' a'", f"feature 4 of {FIRST} at 2 ' b'")
    assert value > 0.8 * found.score > 0 and found.completeness_error < 1e-5
    assert int(np.argmax(found.by_query)) == i and int(np.argmax(found.by_key)) == j
    other = attention_score(model, saes, "a b c d e f", head=COPIES, key=2, against=4, allow_missing=True)
    assert other.describe(i) != "embedding at 6 ' a'" and abs(other.score) < found.score / 4
    quiet = attention_score(model, saes, "a b c d e a", head=(1, 1), key=2, against=4, allow_missing=True)
    assert abs(quiet.score) < found.score / 10
    assert found.describe(i) in str(found).splitlines()[2] and "+0.000" not in str(found)
    found.save(tmp_path / "score.json")


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"head": (3, 0)}, r"the layer in 0\.\.2, got 3"),
        ({"head": (0, 4)}, r"the head in 0\.\.3, got 4"),
        ({"key": 8}, r"`key` must be a position in 0\.\.7, up to the query, got 8"),
        ({"key": -1}, "`key` must be a position"),
        ({"query": 10}, r"`query` must be a position in 0\.\.9"),
        ({"against": 9}, "`against` must be a position"),
        ({"against": 2}, "`against` must be another key"),
        ({"coders": [0]}, r"cover the MLPs of the layers below 2, got none for \[1\]"),
    ],
)
def test_places_that_are_none_are_refused_before_any_pass(tiny, monkeypatch, options, complaint) -> None:
    monkeypatch.setattr("saelab.circuits.attention_scores.read_written", None)
    coders = cover(tiny)
    chosen = [list(coders)[i] for i in options.pop("coders", range(3))]
    with pytest.raises(ValueError, match=complaint):
        attention_score(
            tiny, {name: coders[name] for name in chosen}, PROMPT, **{"head": (2, 1), "query": 7, "key": 2, **options}
        )


@unchecked()
@pytest.mark.parametrize("head", [2, (2,), (2, 1, 0)])
def test_a_head_has_a_layer(tiny, head) -> None:
    with pytest.raises(ValueError, match=r"`head` must be \(layer, head\), got"):
        attention_score(tiny, cover(tiny), PROMPT, head=head, key=2)


def test_models_without_such_scores_are_refused() -> None:
    bloom = load("BloomForCausalLM")
    with pytest.raises(ValueError, match="must be products of queries and keys"):
        attention_score(bloom, cover(bloom), PROMPT, head=(1, 0), key=2)
    sinks = load("GptOssForCausalLM")
    coders = {name: make_coder(32, i, is_transcoder=False) for i, name in enumerate(["blocks.0.hook_attn_out"])}
    with pytest.raises(ValueError, match="made of one product"):
        attention_score(sinks, coders, PROMPT, head=(1, 0), key=2, allow_missing=True)
    window = load("MistralForCausalLM")
    prompt = "A fox ran over there"
    assert attention_score(window, cover(window), prompt, head=(1, 0), query=15, key=10).completeness_error < 1e-5
    with pytest.raises(ValueError, match="hidden from 15 by a mask"):
        attention_score(window, cover(window), prompt, head=(1, 0), query=15, key=1)
    mixed = load("Lfm2ForCausalLM")
    with pytest.raises(ValueError, match=r"layer 0 does not have; layers \[1\] do"):
        attention_score(mixed, cover(mixed), PROMPT, head=(0, 0), key=2)


def test_model_and_random_state_stay_as_they_were(tiny) -> None:
    coders, before = cover(tiny), torch.get_rng_state()
    first = attention_score(tiny, coders, PROMPT, head=(1, 0), key=2)
    with torch.inference_mode():
        again = attention_score(tiny, coders, PROMPT, head=(1, 0), key=2)
    np.testing.assert_array_equal(first.pairs, again.pairs)
    assert torch.equal(torch.get_rng_state(), before)
    assert not any(one._forward_hooks or one._forward_pre_hooks for one in hook_points_of(tiny).running.modules())  # type: ignore[union-attr]

"""Attribution: exact where the model is linear, complete along a path, and the same as ablating one by one."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import jaxtyping
import numpy as np
import pytest
import torch
from unchecked import unchecked

import saelab as sl
from saelab.interventions.attribution import Attribution, attribute
from saelab.interventions.patching import patch
from saelab.interventions.prompt_metrics import find_token, make_prompt_metric, read_texts
from saelab.visualization.intervention_plots import draw_attribution, plot_attribution

HOOK = "blocks.0.hook_resid_post"
PROMPT = "A fox sees"
EPS = 1e12  # so large that norms only divide


@pytest.fixture(scope="module")
def linear():
    """A model whose logits are linear in the residual stream: norms that only scale, attention to all alike, no MLP."""
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = sl.lm.tiny_model().tokenizer
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2,
        intermediate_size=16, rms_norm_eps=EPS, initializer_range=0.3, bos_token_id=0, eos_token_id=1, pad_token_id=2,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        hf_model = LlamaForCausalLM(config)
        for name, weight in hf_model.named_parameters():
            if "norm" in name:
                weight.fill_(math.sqrt(EPS))
            if "q_proj" in name or "down_proj" in name:
                weight.zero_()
    return sl.load_model(hf_model.eval(), tokenizer=tokenizer)


def make_sae(model, hook_point, activation=None, normalizer="none"):
    cfg = sl.SAEConfig(
        d_in=model.cfg.d_model, d_sae=48, activation=activation or sl.AbsTopK(k=4), normalizer=normalizer
    )
    sae = sl.SAE(cfg, seed=3)
    tokens = sl.tokenize(model, ["The owl hears the cat and the dog."], ctx_len=32)
    x = sl.lm.capture(model, tokens.ids, [hook_point])[hook_point].flatten(0, 1)
    sae.normalizer.fit(x)
    if normalizer == "none":
        sae.b_dec.data += x.mean(0)
    return sae


@pytest.fixture(scope="module")
def tiny_sae(tiny):
    return make_sae(tiny, HOOK, normalizer="scale")


def read_effects(model, sae, position, feature, a, b):
    """By hand: the feature's row through uniform attention, or along the residual stream, to two logits."""
    weights = dict(model.original_model.named_parameters())

    def find(name):
        return next(w for key, w in weights.items() if name in key.replace("_original_component.", "")).detach()

    n = len(read_texts(model, PROMPT).ids[0])
    readout = find("lm_head.weight")[a] - find("lm_head.weight")[b]
    mixed = find("layers.1.self_attn.o_proj.weight") @ find("layers.1.self_attn.v_proj.weight")
    through = readout @ mixed / n + (readout if position == n - 1 else 0)
    return float(sae.directions()[feature] @ through)


@pytest.mark.parametrize("normalizer", ["token_norm", "layer_norm"])
def test_features_of_normalizers_that_measure_tokens_add_up(linear, normalizer):
    sae = make_sae(linear, HOOK, normalizer=normalizer)
    other = "A cat sees"
    for options in ({}, {"counterfactual": other}):
        found = attribute(linear, sae, PROMPT, ("f", "c"), method="exact", hook_point=HOOK, **options)
        total = found.effects.sum() + found.errors.sum()
        assert total == pytest.approx(found.patched - found.clean, abs=1e-4) and abs(found.effects.sum()) > 0.05
    whole = patch(linear, other, PROMPT, ("f", "c"), sources=HOOK, positions="all")
    assert found.patched == pytest.approx(float(whole.values[0, 0]), abs=1e-4)

    def empty(x):
        x[:, 1:] = sae.decode(torch.zeros(1, x.shape[1] - 1, 48), x=x[:, 1:])  # BOS is left as it is
        return x

    texts, outcome = read_texts(linear, PROMPT), make_prompt_metric(linear, ("f", "c"))
    with sl.splice(linear, {HOOK: empty}):
        bare = outcome(sl.lm.logits(linear, texts.ids), texts, torch.tensor([0]))
    found = attribute(linear, sae, PROMPT, ("f", "c"), method="exact", hook_point=HOOK)
    assert found.patched == pytest.approx(float(bare), abs=1e-4)


def test_in_a_linear_model_every_method_gives_the_truth(linear):
    sae = make_sae(linear, HOOK)
    a, b = find_token(linear, "x"), find_token(linear, "y")
    found = {
        method: attribute(linear, sae, PROMPT, ("x", "y"), method=method, hook_point=HOOK, n_steps=2)
        for method in ("gradient", "integrated", "relp", "exact")
    }
    one = found["exact"]
    zipped = zip(one.positions, one.features, one.codes, strict=True)
    truth = np.array([-z * read_effects(linear, sae, p, i, a, b) for p, i, z in zipped])
    assert np.abs(truth).max() > 0.01
    for result in found.values():
        np.testing.assert_allclose(result.effects, truth, rtol=1e-3, atol=1e-4)
        assert result.completeness == pytest.approx(1, abs=1e-3)


def test_attnlrp_passes_half_through_attention(linear):
    """Uniform attention: half goes to the values, and the other half ends in a softmax of equal scores."""
    sae, n = make_sae(linear, HOOK), len(read_texts(linear, PROMPT).ids[0])
    options = {"hook_point": HOOK, "where": list(range(1, n - 1))}  # the last token acts along the residual stream too
    half, whole = (attribute(linear, sae, PROMPT, ("x", "y"), method=m, **options) for m in ("attnlrp", "relp"))
    np.testing.assert_allclose(half.effects, whole.effects / 2, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("point", [HOOK, "blocks.1.hook_resid_pre"])
def test_relevance_of_all_nodes_adds_up_to_the_metric(tiny, point):
    """The tiny model has no biases: RelP's relevance of features and errors of all tokens is the logit difference."""
    sae = make_sae(tiny, point)
    sae.b_dec.data.zero_()
    options = {"where": sl.interventions.TokenSelector(special=True), "hook_point": point}
    relp, lrp, slopes = (
        attribute(tiny, sae, PROMPT, ("a", "b"), method=m, **options) for m in ("relp", "attnlrp", "gradient")
    )
    sums = [float(-found.effects.sum() - found.errors.sum()) for found in (relp, lrp, slopes)]
    assert sums[0] == pytest.approx(relp.clean, rel=1e-4)
    assert all(abs(other / relp.clean - 1) > 0.01 for other in sums[1:])
    assert (relp.clean, relp.patched, relp.n_steps) == (slopes.clean, slopes.patched, 0)
    assert relp.method == "relp" and relp.agreement is None


def test_relevance_keeps_the_gradient_of_the_metric(tiny, tiny_sae):
    """A log-probability's relevance is that of the logits, weighed by the derivative of log softmax."""
    token, options = find_token(tiny, "!"), {"method": "relp", "hook_point": HOOK}
    texts = read_texts(tiny, PROMPT)
    weights = -sl.lm.logits(tiny, texts.ids)[0, -1].softmax(-1)
    weights[token] += 1
    linear = attribute(tiny, tiny_sae, PROMPT, lambda out: out[:, -1] @ weights, **options)
    np.testing.assert_allclose(
        attribute(tiny, tiny_sae, PROMPT, token, **options).effects, linear.effects, atol=1e-6, rtol=1e-4
    )


def test_constant_patterns_pass_nothing_to_queries(tiny):
    point = "blocks.1.attn.hook_q"
    sae = sl.SAE(sl.SAEConfig(d_in=32, d_sae=48, activation=sl.TopK(k=4)))
    with pytest.raises(ValueError, match=r"patterns are constant, got 'blocks\.1\.attn\.hook_q'"):
        attribute(tiny, sae, PROMPT, "!", method="relp", hook_point=point)
    assert np.abs(attribute(tiny, sae, PROMPT, "!", method="attnlrp", hook_point=point).effects).max() > 0


def test_estimates_agree_with_exact_effects_in_a_linear_model(linear):
    found = attribute(linear, make_sae(linear, HOOK), PROMPT, "x", check=True, hook_point=HOOK)
    # log-probabilities bend, but little over one feature
    assert found.agreement.pearson > 0.98
    assert found.agreement.spearman > 0.95
    assert abs(found.agreement.shuffled) < 0.6


def test_exact_effects_are_those_of_ablating_one_by_one(tiny, tiny_sae):
    found = attribute(tiny, tiny_sae, PROMPT, "!", method="exact", hook_point=HOOK, progress=False)
    texts, outcome = read_texts(tiny, PROMPT), make_prompt_metric(tiny, "!")
    clean = outcome(sl.lm.logits(tiny, texts.ids), texts, torch.tensor([0]))
    for i in range(0, len(found.features), 5):
        where = [int(found.positions[i])]
        with sl.steer(tiny, tiny_sae, [int(found.features[i])], mode="ablate", where=where, hook_point=HOOK):
            ablated = outcome(sl.lm.logits(tiny, texts.ids), texts, torch.tensor([0]))
        assert found.effects[i] == pytest.approx(float(ablated - clean), abs=2e-5)
    assert np.abs(found.effects).max() > 1e-3


def test_error_of_a_token_is_what_dropping_it_does(tiny, tiny_sae):
    found = attribute(tiny, tiny_sae, PROMPT, "!", method="exact", hook_point=HOOK)
    texts, outcome = read_texts(tiny, PROMPT), make_prompt_metric(tiny, "!")
    clean = outcome(sl.lm.logits(tiny, texts.ids), texts, torch.tensor([0]))
    with sl.splice(tiny, tiny_sae, error="drop", where=[4], hook_point=HOOK):
        dropped = outcome(sl.lm.logits(tiny, texts.ids), texts, torch.tensor([0]))
    assert found.errors[4] == pytest.approx(float(dropped - clean), abs=2e-5)
    assert found.errors[0] == 0, "BOS is left as it is"


@pytest.mark.parametrize("metric", ["!", ("a", "b"), "loss"])
def test_integrated_gradients_add_up(tiny, tiny_sae, metric):
    found = attribute(tiny, tiny_sae, PROMPT, metric, method="integrated", hook_point=HOOK)
    assert found.completeness == pytest.approx(1, abs=0.005)
    assert abs(attribute(tiny, tiny_sae, PROMPT, metric, hook_point=HOOK).completeness - 1) > 0.02


def test_a_counterfactual_moves_the_whole_activation(tiny, tiny_sae):
    other = "A cat sees"
    found = attribute(
        tiny, tiny_sae, PROMPT, ("f", "c"), method="integrated", counterfactual=other, n_steps=8, hook_point=HOOK
    )
    whole = patch(tiny, other, PROMPT, ("f", "c"), sources=HOOK, positions="all")
    assert found.patched == pytest.approx(float(whole.values[0, 0]), abs=1e-4)
    assert found.completeness == pytest.approx(1, abs=0.01)
    assert set(found.positions.tolist()) == set(range(3, 11)), "before the first difference nothing changes"


def test_mean_baseline_takes_means_where_features_fire(tiny, tiny_tokens, tmp_path):
    sae = make_sae(tiny, HOOK, normalizer="scale")
    acts = sl.collect(tiny, tiny_tokens[:4], HOOK, progress=False)
    sae.provenance = acts.provenance
    store = sl.harvest(sae, tiny, tiny_tokens[:4], tmp_path, progress=False)
    found = attribute(tiny, sae, PROMPT, "!", baseline="mean", store=store, method="exact")
    means = sae.encode(acts[:]).detach().mean(0)
    i = int(np.abs(found.effects).argmax())
    feature = int(found.features[i])
    texts, outcome = read_texts(tiny, PROMPT), make_prompt_metric(tiny, "!")
    clean = outcome(sl.lm.logits(tiny, texts.ids), texts, torch.tensor([0]))
    with sl.steer(tiny, sae, {feature: float(means[feature])}, mode="clamp", where=[int(found.positions[i])]):
        moved = outcome(sl.lm.logits(tiny, texts.ids), texts, torch.tensor([0]))
    assert found.effects[i] == pytest.approx(float(moved - clean), abs=1e-3)
    with pytest.raises(ValueError, match="needs `store`"):
        attribute(tiny, sae, PROMPT, "!", baseline="mean")


def test_places_limit_what_is_attributed(tiny, tiny_sae):
    found = attribute(tiny, tiny_sae, PROMPT, "!", where=[2, -1], hook_point=HOOK)
    assert set(found.positions.tolist()) == {2, 10}
    special = attribute(
        tiny, tiny_sae, PROMPT, "!", where=sl.interventions.TokenSelector(special=True), hook_point=HOOK
    )
    assert 0 in special.positions
    with pytest.raises(ValueError, match="got a condition"):
        attribute(tiny, tiny_sae, PROMPT, "!", where=sl.interventions.ActivationCondition(tiny_sae, 1), hook_point=HOOK)


def test_users_functions_are_metrics(tiny, tiny_sae):
    token = find_token(tiny, "!")
    own = attribute(tiny, tiny_sae, PROMPT, lambda out: out[:, -1].log_softmax(-1)[:, token], hook_point=HOOK)
    known = attribute(tiny, tiny_sae, PROMPT, token, hook_point=HOOK)
    np.testing.assert_allclose(own.effects, known.effects, atol=1e-6)
    with pytest.raises(ValueError, match=r"a number a row, shape \(2,\)"):
        attribute(tiny, tiny_sae, PROMPT, lambda out: out.sum(), hook_point=HOOK)


def test_nothing_stays_behind(tiny, tiny_sae):
    ids = read_texts(tiny, PROMPT).ids
    before = sl.lm.logits(tiny, ids)
    with torch.no_grad():
        quiet = attribute(tiny, tiny_sae, PROMPT, "!", hook_point=HOOK)
    loud = attribute(tiny, tiny_sae, PROMPT, "!", hook_point=HOOK)
    np.testing.assert_array_equal(quiet.effects, loud.effects)
    assert all(weight.grad is None for weight in (*tiny.original_model.parameters(), *tiny_sae.parameters()))
    with pytest.raises(ZeroDivisionError):
        attribute(tiny, tiny_sae, PROMPT, lambda out: out[:, 0, 0] / (1 // 0), hook_point=HOOK)
    assert torch.equal(sl.lm.logits(tiny, ids), before)


def test_inside_a_block_the_steered_model_is_attributed(tiny, tiny_sae):
    plain = attribute(tiny, tiny_sae, PROMPT, "!", hook_point=HOOK)
    with sl.steer(tiny, tiny_sae, {7: 20.0}, hook_point=HOOK):
        steered = attribute(tiny, tiny_sae, PROMPT, "!", hook_point=HOOK)
    assert steered.clean != plain.clean
    assert 7 in steered.features


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"method": "guess"}, "`method` must be one of"),
        ({"baseline": "one"}, "`baseline` must be one of"),
        ({"n_steps": 0}, "`n_steps` must be at least 1"),
        ({"metric": "hello"}, "must be one token"),
        ({"metric": 9999}, r"must be a token id in 0\.\.258"),
        ({"prompt": " "}, "must hold text"),
        ({"prompt": "a" * 300}, "must fit the model's context"),
        ({"counterfactual": "A cat"}, "equally many tokens, got 11 and 6"),
        ({"hook_point": None}, "`hook_point` must be given"),
    ],
)
@unchecked()
def test_what_does_not_exist_is_refused(tiny, tiny_sae, settings, complaint):
    asked = {"prompt": PROMPT, "metric": "!", "hook_point": HOOK} | settings
    with pytest.raises(ValueError, match=complaint):
        attribute(tiny, tiny_sae, asked.pop("prompt"), asked.pop("metric"), **asked)


def make_result(**settings) -> Attribution:
    n = np.arange(4)
    plain = Attribution(
        hook_point=HOOK, metric="<m>", method="exact", baseline="zero", n_steps=0, clean=1.0, patched=0.0,
        tokens=("<a>", "b", "c"), positions=np.array([0, 0, 1, 2]), features=np.array([5, 6, 5, 7]),
        codes=n + 1.0, sizes=n + 1.0, effects=np.array([-1.0, 0.25, 0.5, -0.5]), errors=np.array([0.0, -0.25, 0.0]),
    )  # fmt: skip
    return replace(plain, **settings)


def test_result_sums_prints_and_saves(tmp_path):
    found = make_result(exact=np.array([-1.0, 0.3, 0.6, -0.4]))
    assert found.completeness == 1.0
    assert found.by_token.tolist() == [-0.75, 0.5, -0.5]
    assert found.by_feature == {5: -0.5, 7: -0.5, 6: 0.25}
    assert found.top(2) == [(0, 5, 1.0, -1.0), (1, 5, 3.0, 0.5)]
    assert "completeness 1.0000" in str(found)
    assert f"Pearson {np.corrcoef(found.effects, found.exact)[0, 1]:.3f}" in str(found)
    found.save(tmp_path / "found.json")
    kept = json.loads((tmp_path / "found.json").read_text())
    assert kept["completeness"] == 1.0 and kept["effects"] == [-1.0, 0.25, 0.5, -0.5]
    assert kept["agreement"]["spearman"] == pytest.approx(1.0)


def test_completeness_of_rounding_is_unknown():
    found = make_result(patched=1.0 + 1e-9)
    assert math.isnan(found.completeness)
    assert "unknown" in str(found)


def test_figures_hold_every_effect_and_no_tags():
    found = make_result()
    figure = plot_attribution(found, n=1)
    assert [list(row) for row in figure.data[0].z] == [[-1.0, 0.5, 0.0], [0.25, 0.0, -0.5], [0.0, -0.25, 0.0]]
    feature = int(found.features[0])
    assert f"feature {feature} &lt;b&gt;" in plot_attribution(found, labels={feature: "<b>"}).layout.yaxis.ticktext
    named = draw_attribution(found, labels={feature: "<b>"})
    assert "<th>label</th>" in named and "&lt;b&gt;" in named and "<b>" not in named
    assert "<th>label</th>" not in draw_attribution(found)
    assert "<a>" not in found._repr_html_() and "&lt;a&gt;" in found._repr_html_()


def test_as_many_points_as_it_takes(tiny, tiny_sae):
    sharp = {"metric": lambda out: (60 * out[:, -1, 40]).sigmoid(), "hook_point": HOOK, "method": "integrated"}
    few = attribute(tiny, tiny_sae, PROMPT, n_steps=3, **sharp)
    enough = attribute(tiny, tiny_sae, PROMPT, **sharp)
    assert few.n_steps == 3 and abs(few.completeness - 1) > 0.01
    assert enough.n_steps >= 32 and abs(enough.completeness - 1) <= 0.005


def test_an_attribution_is_the_same_after_its_file(tiny: Any, tmp_path: Path) -> None:
    sae = sl.SAE(sl.SAEConfig(d_in=32, d_sae=64, activation=sl.TopK(k=4)))
    for check in (False, True):
        made = attribute(tiny, sae, "Hello", "!", hook_point="blocks.1.hook_resid_post", check=check, progress=False)
        made.save(tmp_path / "a.json")
        read = sl.interventions.Attribution.load(tmp_path / "a.json")
        assert read.to_dict() == made.to_dict() and read.tokens == made.tokens
        assert read.positions.dtype == made.positions.dtype and read.effects.dtype == made.effects.dtype


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda plain: plain.pop("effects"), "none for `effects`"),
        (lambda plain: plain.update(codes="many"), "numbers in `codes`"),
        (lambda plain: plain.update(codes=[[1.0]]), "numbers in `codes`"),
        (lambda plain: plain.update(clean="x"), "numbers in `clean`"),
        (lambda plain: plain.update(extra=1), "no key 'extra'"),
    ],
)
def test_a_file_of_something_else_is_refused_by_name(tiny: Any, tmp_path: Path, change: Any, said: str) -> None:
    sae = sl.SAE(sl.SAEConfig(d_in=32, d_sae=64, activation=sl.TopK(k=4)))
    plain = attribute(tiny, sae, "Hello", "!", hook_point="blocks.1.hook_resid_post", progress=False).to_dict()
    change(plain)
    (tmp_path / "a.json").write_text(json.dumps(plain))
    with pytest.raises(ValueError, match=said) as error:
        sl.interventions.Attribution.load(tmp_path / "a.json")
    assert "a.json" in str(error.value)


@pytest.mark.parametrize("prompts", [["One", "Two"], [torch.tensor([0, 70]), torch.tensor([0, 71])]])
def test_several_prompts_are_refused_rather_than_one_of_them_taken(prompts, tiny, signed_sae, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # the check of types, which users do not have
    point = "blocks.1.hook_resid_post"
    with pytest.raises(ValueError, match="`prompt` must be one text, got 2"):
        sl.interventions.attribute(tiny, signed_sae, prompts, "a", hook_point=point, progress=False)
    with pytest.raises(ValueError, match="`counterfactual` must be one text, got 2"):
        sl.interventions.attribute(tiny, signed_sae, "One", "a", hook_point=point, counterfactual=prompts)
    with pytest.raises(ValueError, match="`corrupt` must be one text, got 2"):
        sl.interventions.patch(tiny, "One", prompts, ("A", "T"))

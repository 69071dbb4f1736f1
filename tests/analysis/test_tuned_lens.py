"""Untrained lenses are the logit lens, trained ones are nearer on other documents, and files come back to the bit."""

import json

import pytest
import torch

import saelab as sl
from saelab.analysis import TunedLens, fit_lens
from saelab.functional.metrics import kl_divergence
from saelab.lm.last_layers import LastLayers

POINT = "blocks.1.hook_in"


@pytest.fixture(scope="module")
def documents(tiny) -> sl.Tokens:
    animals, verbs = ("cat", "dog", "owl", "fox"), ("sees", "hears", "likes", "finds")
    texts = [f"The {a} {v} the {b}." for a in animals for v in verbs for b in animals]
    return sl.tokenize(tiny, texts, ctx_len=24, packed=False)


@pytest.fixture(scope="module")
def fitted(tiny, documents) -> TunedLens:
    return fit_lens(tiny, documents, n_steps=60, batch_size=16, progress=False)


def test_an_untrained_lens_is_the_logit_lens(tiny, documents) -> None:
    lens = fit_lens(tiny, documents, n_steps=0, progress=False)
    x = torch.randn(2, 32, generator=torch.Generator().manual_seed(0))
    assert torch.equal(lens.apply(POINT, x), x) and lens.scores is not None
    for row in lens.scores.rows:
        assert row.kl["tuned"] == row.kl["logit"] and row.gain_interval == (0, 0)
        assert row.agreement["tuned"] == row.agreement["logit"]


def test_a_trained_lens_is_nearer_on_documents_that_it_has_not_seen(tiny, documents, fitted) -> None:
    assert fitted.scores is not None and fitted.hook_points[-1] == "blocks.2.hook_in"
    train, rest = documents[: len(documents) * 4 // 5], documents[len(documents) * 4 // 5 :]
    assert fitted.scores.n_documents == len(rest)
    assert fitted.scores.n_train == int(sl.TokenMask().apply(train).keep.sum())
    for row in fitted.scores.rows:
        assert row.gain_interval[0] > 0 and row.kl["tuned"] < row.kl["permuted"]
    last, keep = LastLayers.measure(tiny), sl.TokenMask().apply(rest).keep
    acts = sl.lm.capture(tiny, rest.ids, [POINT, last.last])
    with torch.no_grad():
        own, x = (last(acts[name][keep]) for name in (last.last, POINT))
        mapped = last(fitted.apply(POINT, acts[POINT][keep]))
        final = sl.lm.capture(tiny, train.ids, [last.last])[last.last]
        mean = last(final[sl.TokenMask().apply(train).keep]).softmax(1).mean(0)
    row = next(row for row in fitted.scores.rows if row.hook_point == POINT)
    assert row.kl["logit"] == pytest.approx(float(kl_divergence(own, x).mean()), rel=1e-4)
    assert row.kl["tuned"] == pytest.approx(float(kl_divergence(own, mapped).mean()), rel=1e-4)
    assert row.agreement["logit"] == pytest.approx(float((own.argmax(1) == x.argmax(1)).double().mean()))
    assert row.kl["mean"] == pytest.approx(float(kl_divergence(own, mean.log().expand_as(own)).mean()), rel=1e-3)
    text = str(fitted)
    assert "no better than the mean prediction" in text.split("\n")[2] and "need not use" in text


def test_a_block_that_does_nothing_leaves_nothing_to_fit(documents) -> None:
    model = sl.lm.tiny_model(seed=3)
    with torch.no_grad():
        block = model.original_model.model.layers[2]
        for part in (block.self_attn.o_proj, block.mlp.down_proj):
            getattr(part, "original_component", part).weight.zero_()
    lens = fit_lens(model, documents, n_steps=0, progress=False)
    assert lens.scores is not None
    assert lens.scores.rows[2].kl["logit"] < 1e-6 < lens.scores.rows[1].kl["logit"]
    assert lens.scores.rows[2].agreement["logit"] == 1


def test_nothing_else_changes(tiny, documents) -> None:
    weights = {name: value.clone() for name, value in tiny.named_parameters()}
    grads = [weight.requires_grad for weight in tiny.parameters()]
    state = torch.random.get_rng_state()
    with torch.no_grad():
        first = fit_lens(tiny, documents, n_steps=3, progress=False)
    with torch.inference_mode():
        again = fit_lens(tiny, documents, n_steps=3, progress=False)
    other = fit_lens(tiny, documents, n_steps=3, seed=1, progress=False)
    assert torch.equal(first.W, again.W) and not torch.equal(first.W, other.W)
    assert first.scores == again.scores
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(value, weights[name]) for name, value in tiny.named_parameters())
    assert [weight.requires_grad for weight in tiny.parameters()] == grads
    assert all(weight.grad is None for weight in tiny.parameters())


def test_a_saved_lens_comes_back_and_a_damaged_one_does_not(fitted, tmp_path) -> None:
    fitted.save_pretrained(tmp_path / "lens")
    back = TunedLens.from_pretrained(tmp_path / "lens")
    assert torch.equal(back.W, fitted.W) and torch.equal(back.b, fitted.b) and back.hook_points == fitted.hook_points
    assert (
        back.scores == fitted.scores
        and back.origin == fitted.origin
        and repr(back) == "TunedLens(3 layers, d_model 32)"
    )
    facts = tmp_path / "lens" / "lens.json"
    whole = facts.read_text()
    facts.write_text(whole.replace('"n_train": ', '"n_train": 1'))
    with pytest.raises(ValueError, match=r"lens\.json"):
        TunedLens.from_pretrained(tmp_path / "lens")
    facts.write_text(json.dumps(json.loads(whole) | {"kind": "space map"}))
    with pytest.raises(ValueError, match="kind"):
        TunedLens.from_pretrained(tmp_path / "lens")
    facts.write_text(whole)
    fit = TunedLens(hook_points=fitted.hook_points, W=fitted.W + 1, b=fitted.b)
    fit.save_pretrained(tmp_path / "other")
    (tmp_path / "lens" / "lens.safetensors").write_bytes((tmp_path / "other" / "lens.safetensors").read_bytes())
    with pytest.raises(ValueError, match="Was it replaced"):
        TunedLens.from_pretrained(tmp_path / "lens")
    with pytest.raises(FileNotFoundError):
        TunedLens.from_pretrained(tmp_path / "none")


def test_what_cannot_be_fitted_is_said(tiny, documents, fitted) -> None:
    for given, said in [
        ({"n_steps": -1}, "`n_steps` must be at least 0"),
        ({"lr": 0.0}, "`lr` positive"),
        ({"hook_points": ["blocks.1.mlp.gate.hook_out"]}, "as wide as the residual stream|must be a hook point"),
    ]:
        with pytest.raises(ValueError, match=said):
            fit_lens(tiny, documents, progress=False, **given)
    with pytest.raises(ValueError, match="that training has not seen"):
        fit_lens(tiny, sl.tokenize(tiny, ["one long document " * 8], ctx_len=16), progress=False)
    with pytest.raises(ValueError, match="must be one of the lens"):
        fitted.apply("blocks.9.hook_in", torch.ones(1, 32))

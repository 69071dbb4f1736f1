"""Words read from layers: the last layer's are the model's own, numbers are naive ones, and text is escaped."""

import math

import numpy as np
import pytest
import torch

import saelab as sl
from saelab.analysis import TunedLens, fit_lens, lens
from saelab.functional.metrics import kl_divergence
from saelab.lm.last_layers import LastLayers
from saelab.lm.tokenizers import token_strings

PROMPT = "The <b>owl</b> & the cat"


def test_the_last_layer_is_the_model(tiny) -> None:
    found = lens(tiny, PROMPT, n=4)
    ids = sl.tokenize(tiny, [PROMPT], 64, packed=False).ids[:1, : len(found.tokens)]
    p = sl.lm.logits(tiny, ids)[0].softmax(-1)
    assert found.hook_points[-1] == "blocks.2.hook_out" and found.lens == "logit"
    assert np.allclose(found.probabilities[-1], p.topk(4).values.numpy(), atol=1e-6)
    assert (found.kl[-1] < 1e-6).all() and not found.rank[-1].any()
    names = token_strings(tiny.tokenizer, p.argmax(-1).unique().tolist())
    assert [words[0] for words in found.words[-1]] == [names[i] for i in p.argmax(-1).tolist()]
    assert "".join(found.tokens).endswith(PROMPT)


def test_layers_are_read_by_the_last_norm_and_head(tiny) -> None:
    point = "blocks.1.hook_resid_pre"
    found = lens(tiny, PROMPT, hook_points=[point], n=2)
    last = LastLayers.measure(tiny)
    ids = sl.tokenize(tiny, [PROMPT], 64, packed=False).ids[:1, : len(found.tokens)]
    acts = sl.lm.capture(tiny, ids, [point, last.last])
    with torch.no_grad():
        own, made = last(acts[last.last][0]), last(acts[point][0])
    assert found.hook_points == (point, last.last)
    assert np.allclose(found.kl[0], kl_divergence(own, made).numpy(), atol=1e-5)
    pairs = torch.stack([kl_divergence(own, made.roll(i, 0)) for i in range(1, len(own))])
    assert found.kl_permuted[0] == pytest.approx(float(pairs.mean()), rel=1e-4)
    order = made.argsort(-1, descending=True)
    assert found.rank[0].tolist() == [int((row == t).nonzero()) for row, t in zip(order, own.argmax(-1), strict=True)]
    assert found.p[-1] == pytest.approx(1 / (1 + found.n_permutations))


def test_a_tuned_lens_changes_its_layers_alone(tiny, tiny_tokens) -> None:
    fitted = fit_lens(tiny, tiny_tokens, n_steps=20, progress=False)
    plain, tuned = lens(tiny, PROMPT), lens(tiny, PROMPT, fitted)
    assert tuned.lens == "tuned" and tuned.hook_points == plain.hook_points
    assert np.array_equal(tuned.kl[-1], plain.kl[-1]) and tuned.kl[:-1].mean() < plain.kl[:-1].mean()
    nothing = TunedLens(hook_points=fitted.hook_points, W=0 * fitted.W, b=0 * fitted.b)
    assert np.allclose(lens(tiny, PROMPT, nothing).kl, plain.kl, atol=1e-6)
    other = sl.lm.tiny_model(seed=5)
    with pytest.raises(ValueError, match="allow_mismatch"):
        lens(other, PROMPT, fitted)
    assert lens(other, PROMPT, fitted, allow_mismatch=True).lens == "tuned"
    for given, said in [({"n": 0}, "at least 1 word"), ({"hook_points": ["blocks.9"]}, "must be a hook point")]:
        with pytest.raises(ValueError, match=said):
            lens(tiny, PROMPT, **given)
    with pytest.raises(ValueError, match="must be one of the lens"):
        lens(tiny, PROMPT, fitted, hook_points=["blocks.1.hook_out"])
    with pytest.raises(ValueError, match="blank"):
        lens(tiny, " ")


def test_it_prints_its_null_first_and_escapes_what_it_draws(tiny, tmp_path) -> None:
    found = lens(tiny, PROMPT)
    lines = str(found).split("\n")
    assert lines[1].startswith("no nearer to the model's prediction") and "need not use" in lines[-1]
    drawn = found._repr_html_()
    assert "<b>" not in drawn and "&lt;" in drawn and drawn.count("<td") >= 4 * len(found.tokens)
    found.save(tmp_path / "lens.json")
    assert (tmp_path / "lens.json").read_text().count("hook_in") == 3
    one = lens(tiny, torch.tensor([7]))
    assert math.isnan(one.kl_permuted[0]) and one.p[0] == 1

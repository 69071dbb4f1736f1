"""Runs under edits, in chunks of any size: the same as one prompt at a time by hand, with gradients."""

import pytest
import torch

import saelab as sl
from saelab.interventions import edited_runs
from saelab.interventions.edited_runs import EditedRuns, ReadActivations
from saelab.interventions.prompt_metrics import make_prompt_metric, read_last, read_texts
from saelab.lm.hook_points import hook_points_of

HOOK = "blocks.1.hook_resid_post"
PROMPTS = ["I see Ann", "No", "The old fox met the hen", "One"]


@pytest.fixture(params=[1, 50, 4096], ids=lambda n: f"{n} tokens at once")
def runs(request, tiny, monkeypatch):
    monkeypatch.setattr(edited_runs, "FORWARD_TOKENS", request.param)
    return EditedRuns(tiny, read_texts(tiny, PROMPTS), read_last)


def test_each_run_is_its_text_under_its_own_edit(runs, tiny):
    rows, steps = torch.tensor([2, 0, 0, 3, 1, 2]), torch.randn(6, 32, generator=torch.Generator().manual_seed(0))
    found = runs.run({HOOK: lambda x, i: x + steps[i, None]}, rows)
    for row, step, logits in zip(rows.tolist(), steps, found, strict=True):
        ids = read_texts(tiny, PROMPTS[row]).ids
        with sl.splice(tiny, {HOOK: lambda x, step=step: x + step}):
            torch.testing.assert_close(logits, sl.lm.logits(tiny, ids)[0, -1], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(runs.run()[rows], runs.run({HOOK: lambda x, i: x}, rows), rtol=1e-5, atol=1e-5)
    assert runs.run(rows=torch.zeros(0, dtype=torch.long)).shape == (0,)


def test_layers_below_an_edit_are_computed_once_for_each_text(runs, tiny, monkeypatch):
    rows, scale = (
        torch.tensor([2] * 12 + [0] * 9 + [2, 0, 1]),
        torch.rand(24, generator=torch.Generator().manual_seed(0)),
    )
    edits = {HOOK: lambda x, i: x * scale[i, None, None]}
    monkeypatch.setattr(edited_runs, "LEAST_RUNS", 25)
    whole = runs.run(edits, rows)
    monkeypatch.setattr(edited_runs, "LEAST_RUNS", 24)
    runs.run(edits, rows)
    computed = []
    lowest = hook_points_of(tiny).running.model.layers[0].self_attn
    right = type(lowest).forward

    def count(module, *args, **kwargs):
        out = right(module, *args, **kwargs)
        computed.extend([len(out[0])] if module is lowest else [])
        return out

    with monkeypatch.context() as counting:  # a hook would be the user's, for which all layers are run
        counting.setattr(type(lowest), "forward", count)
        found = runs.run(edits, rows)
    torch.testing.assert_close(found, whole, rtol=1e-5, atol=1e-5)
    few = {1: 24, 2: 8, 170: 3}[runs.batch_size]
    assert sum(computed) == (few if hook_points_of(tiny).is_plain else 24)  # a bridge is run whole
    with sl.splice(tiny, {"blocks.0.hook_resid_post": lambda x: -x}):  # of the user, below
        other = runs.run(edits, rows)
    assert not torch.allclose(other, whole, atol=1e-2)


def test_gradients_flow_to_what_an_edit_uses(runs, tiny):
    runs = EditedRuns(tiny, runs.texts, make_prompt_metric(tiny, "e"))
    step = torch.zeros(3, 32, requires_grad=True)
    values = runs.run({HOOK: lambda x, i: x.detach() + step[i, None]}, torch.tensor([0, 1, 1]), grad=True)
    [slopes] = torch.autograd.grad(values.sum(), step)
    torch.testing.assert_close(slopes[1], slopes[2], rtol=1e-4, atol=1e-6)
    small = 1e-2 * slopes / slopes.norm(dim=1, keepdim=True)
    ends = [
        runs.run({HOOK: lambda x, i, side=side: x + side * small[i, None]}, torch.tensor([0, 1, 1])) for side in (1, -1)
    ]
    torch.testing.assert_close((ends[0] - ends[1]) / 2e-2, slopes.norm(dim=1), rtol=1e-2, atol=1e-4)
    assert all(parameter.grad is None for parameter in tiny.parameters())
    assert not runs.run({HOOK: lambda x, i: x + step[0]}).requires_grad


def test_activations_are_read_in_the_order_of_the_texts(runs, tiny):
    ends = runs.activations(HOOK, lambda x, rows: x[torch.arange(len(rows)), runs.texts.lengths[rows] - 1])
    for prompt, end in zip(PROMPTS, ends, strict=True):
        x = sl.lm.capture(tiny, read_texts(tiny, prompt).ids, [HOOK])[HOOK][0, -1]
        torch.testing.assert_close(end, x, rtol=1e-4, atol=1e-5)


def test_an_sae_must_belong_to_the_runs(tiny, tiny_tokens):
    acts = sl.collect(tiny, tiny_tokens[:4], HOOK, progress=False)
    sae = sl.SAE(sl.SAEConfig(d_in=32, d_sae=48)).fit(acts, sl.TrainConfig(n_tokens=64, batch_size=64), progress=False)
    assert EditedRuns(tiny, read_texts(tiny, "One"), read_last).match(sae) == HOOK
    other = EditedRuns(sl.lm.tiny_model(seed=1), read_texts(tiny, "One"), read_last)
    with pytest.raises(ValueError, match="must be used where it was trained, got another model"):
        other.match(sae)
    assert other.match(sae, allow_mismatch=True) == HOOK


def test_what_was_read_is_a_copy_and_taken_once(tiny):
    ids, reading = torch.tensor([[0, 70, 71]]), ReadActivations()
    with sl.splice(tiny, {HOOK: reading}), sl.splice(tiny, {HOOK: torch.zeros_like}):
        sl.lm.logits(tiny, ids)
    assert torch.equal(reading.take(), sl.lm.capture(tiny, ids, [HOOK])[HOOK])
    with pytest.raises(RuntimeError, match="must have passed, got nothing"):
        reading.take()
    passing = torch.ones(1, 2, 3)
    reading(passing).add_(1)  # as a model does that adds in place
    assert torch.equal(reading.take(), torch.ones(1, 2, 3))

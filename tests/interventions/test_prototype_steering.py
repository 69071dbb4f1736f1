"""Gradient steering: steps on codes against autograd, closed forms, and what it does in a `with` block."""

from dataclasses import replace

import pytest
import torch
from unchecked import unchecked

import saelab as sl
from saelab.interventions.prototype_steering import Prototypes, PrototypeSteering, mean_codes, steer_to_prototype

HOOK = "blocks.1.hook_resid_post"
IDS = torch.tensor([[0, 70, 71, 72, 73]])


def make_sae(activation=None):
    return sl.SAE(sl.SAEConfig(d_in=32, d_sae=24, activation=activation or sl.AbsTopK(k=4)), seed=0)


@pytest.fixture(scope="module")
def sae():
    return make_sae()


@pytest.fixture(scope="module")
def moods(sae):
    x = torch.randn(60, 32, generator=torch.Generator().manual_seed(0))
    x[::3] += 2 * sae.W_dec[5].detach()
    x[1::3] -= 2 * sae.W_dec[5].detach()
    return mean_codes(sae, x, ["glad", "sad", "plain"] * 20).keep(6)


def draw_codes(sae, n=7):
    x = torch.randn(n, 32, generator=torch.Generator().manual_seed(1))
    return sae.encode(x).detach()


def descend(z, prototypes, target, pull, signed):
    """The same by autograd, step by step."""
    codes = prototypes.codes
    wanted = codes[prototypes.find(target)]
    support = (z != 0) | (wanted != 0)
    for _ in range(pull.n_steps):
        z = z.detach().requires_grad_()
        if pull.loss == "distance":
            loss = (z - wanted).square().sum()
        else:
            distances = (z[:, None] - codes).square().sum(2)
            loss = -(-distances).log_softmax(1)[:, prototypes.find(target)].sum()
        z = z - pull.eta * support * torch.autograd.grad(loss, z)[0]
    return z.detach() if signed else z.detach().clamp_min(0)


@pytest.mark.parametrize("loss", ["distance", "contrast"])
@pytest.mark.parametrize("activation", [sl.AbsTopK(k=4), sl.TopK(k=4)])
def test_steps_are_those_of_autograd(moods, loss, activation):
    sae = make_sae(activation)
    prototypes = mean_codes(sae, torch.randn(40, 32, generator=torch.Generator().manual_seed(2)), [0, 1] * 20)
    z = draw_codes(sae)
    pull = PrototypeSteering(sae, hook_point=HOOK, prototypes=prototypes, target="1", eta=0.07, n_steps=9, loss=loss)
    by_hand = descend(z, prototypes, "1", pull, sae.cfg.activation.signed)
    torch.testing.assert_close(pull.descend(z), by_hand, rtol=1e-4, atol=1e-5)
    assert (by_hand - z).abs().max() > 0.01
    wanted = prototypes.codes[1]
    assert (pull.descend(z)[(z == 0) & (wanted == 0)] == 0).all(), "nothing else begins to fire"


def test_two_prototypes_add_their_difference_until_the_token_is_on_the_right_side(sae):
    codes = torch.zeros(2, 24)
    codes[0, 5], codes[1, 5] = 1.5, -1.5
    prototypes = Prototypes(("glad", "sad"), codes, (1, 1))
    z = torch.zeros(3, 24)
    z[:, 5] = torch.tensor([-4.0, 0.0, 4.0])
    pull = PrototypeSteering(sae, hook_point=HOOK, prototypes=prototypes, target="glad", eta=0.1, n_steps=30)
    moved = (pull.descend(z) - z)[:, 5]
    # one number: z <- z + 2 eta (1 - p) 3, p = sigmoid(6 z), of which the last token has all already
    expected = z[:, 5].double()
    for _ in range(30):
        expected = expected + 0.6 * (1 - (6 * expected).sigmoid())
    torch.testing.assert_close(moved, (expected - z[:, 5]).float(), rtol=1e-4, atol=1e-5)
    assert moved[0] > 4 and moved[1] > 0.5 and moved[2] < 1e-6
    assert (pull.descend(z)[:, :5] == 0).all()


def test_distance_goes_all_the_way_to_the_prototype(sae, moods):
    z = draw_codes(sae)
    pull = PrototypeSteering(sae, hook_point=HOOK, prototypes=moods, target="sad", eta=0.5, n_steps=1, loss="distance")
    wanted = moods.codes[moods.find("sad")]
    torch.testing.assert_close(pull.descend(z), wanted.expand(7, -1))


def test_prototypes_are_means_by_label(sae):
    x = torch.randn(9, 32)
    labels = torch.tensor([2, 0, 2, 0, 2, 2, 0, 0, 0])
    found = mean_codes(sae, x, labels)
    assert found.names == ("0", "2") and found.counts == (5, 4)
    torch.testing.assert_close(found.codes[1], sae.encode(x[labels == 2]).detach().mean(0))
    kept = found.keep(3)
    assert (kept.codes != 0).sum(1).tolist() == [3, 3]
    assert kept.codes[0].abs().max() == found.codes[0].abs().max()


def test_the_difference_is_a_direction_of_its_own_length(sae, moods):
    step = (moods.codes[moods.find("glad")] - moods.codes[moods.find("sad")]) @ sae.directions()
    found = moods.difference(sae, "glad", "sad", HOOK)
    torch.testing.assert_close(found.vector * found.peak, step)


@pytest.mark.parametrize("normalizer", ["none", "layer_norm"])
def test_a_block_moves_activations_as_the_formula_says(tiny, sae, moods, normalizer):
    if normalizer != "none":
        sae = sl.SAE(replace(sae.cfg, normalizer=normalizer), seed=2)
    x = sl.lm.capture(tiny, IDS, [HOOK])[HOOK]
    with steer_to_prototype(tiny, sae, moods, "glad", hook_point=HOOK, where=[2, 4], n_steps=5):
        moved = sl.lm.capture(tiny, IDS, ["blocks.1.hook_out"])["blocks.1.hook_out"]
    pull = PrototypeSteering(sae, hook_point=HOOK, prototypes=moods, target="glad", n_steps=5)
    z = sae.encode(x[0]).detach()
    by_hand = sae.decode(pull.descend(z), x=x[0]) + x[0] - sae.decode(z, x=x[0])
    torch.testing.assert_close(moved[0, [2, 4]], by_hand[[2, 4]].detach(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(moved[0, [0, 1, 3]], x[0, [0, 1, 3]], rtol=0, atol=1e-6)
    assert torch.equal(sl.lm.capture(tiny, IDS, [HOOK])[HOOK], x), "nothing stays behind"


def test_no_step_changes_nothing(tiny, sae, moods):
    before = sl.lm.logits(tiny, IDS)
    for settings in ({"n_steps": 0}, {"eta": 0.0}):
        with steer_to_prototype(tiny, sae, moods, "glad", hook_point=HOOK, **settings):
            assert torch.equal(sl.lm.logits(tiny, IDS), before)


def test_the_norm_is_kept_where_asked(tiny, sae, moods):
    x = sl.lm.capture(tiny, IDS, [HOOK])[HOOK]
    with steer_to_prototype(tiny, sae, moods, "glad", hook_point=HOOK, loss="distance", keep_norm=True):
        moved = sl.lm.capture(tiny, IDS, ["blocks.1.hook_out"])["blocks.1.hook_out"]
    torch.testing.assert_close(moved.norm(dim=-1), x.norm(dim=-1))
    assert (moved - x)[0, 1:].norm(dim=-1).min() > 0.1


def test_generation_is_steered_alike_with_and_without_a_cache(tiny, sae, moods):
    texts = {}
    for use_cache in (True, False):
        with steer_to_prototype(tiny, sae, moods, "glad", hook_point=HOOK, eta=0.3, where="generated"):
            texts[use_cache] = sl.generate(tiny, ["One", "A fox"], 6, seed=3, use_cache=use_cache, progress=False)
    plain = sl.generate(tiny, ["One", "A fox"], 6, seed=3, progress=False)
    assert [one.ids for one in texts[True]] == [one.ids for one in texts[False]]
    assert [one.log_probs for one in texts[True]] != [one.log_probs for one in plain]


def test_steered_tokens_are_nearest_to_their_target(tiny, sae, moods):
    x = torch.randn(50, 32, generator=torch.Generator().manual_seed(7))
    pull = PrototypeSteering(sae, hook_point=HOOK, prototypes=moods, target="sad", n_steps=60)
    z = sae.encode(x).detach()
    for codes, share in ((z, 0.6), (pull.descend(z), 1.0)):
        nearest = torch.cdist(codes, moods.codes).argmin(1)
        right = float((nearest == moods.find("sad")).float().mean())
        assert right == 1.0 if share == 1.0 else right < share


@unchecked()
@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"target": "cross"}, "`target` must be one of the labels"),
        ({"loss": "other"}, "`loss` must be one of"),
        ({"eta": 0.6, "loss": "distance"}, r"`eta` must be in 0\.\.0\.5"),
        ({"n_steps": -1}, "`n_steps` not negative"),
        ({"hook_point": None}, "`hook_point` must be given"),
        ({"prototypes": Prototypes(("glad", "b"), torch.zeros(2, 9), (1, 1))}, "must have the SAE's 24 codes, got 9"),
        ({"prototypes": None}, "needs an SAE and its `prototypes`"),
    ],
)
def test_what_does_not_fit_is_refused(sae, moods, settings, complaint):
    asked = {"prototypes": moods, "target": "glad", "hook_point": HOOK} | settings
    with pytest.raises(ValueError, match=complaint):
        PrototypeSteering(sae, **asked)


def test_labels_must_be_two_and_one_a_row(sae):
    for labels in (["a"] * 4, ["a", "b", "a"]):
        with pytest.raises(ValueError, match="`labels` must name each of 4 rows"):
            mean_codes(sae, torch.randn(4, 32), labels)
    with pytest.raises(ValueError, match="`k` must be in"):
        mean_codes(sae, torch.randn(2, 32), ["a", "b"]).keep(25)

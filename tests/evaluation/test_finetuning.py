"""Training with the model in the loop: its gradient, what it does to predictions, and what it leaves alone."""

from copy import deepcopy

import pytest
import torch
from unchecked import unchecked

import saelab as sl
from saelab.evaluation.finetuning import _TrainingInLoop, finetune
from saelab.evaluation.splicing import Stage
from saelab.sae.baselines import _recorded
from saelab.sae.compatibility import match_model
from saelab.sae.objectives import ContrastiveLoss, MatryoshkaLoss


@sl.register_loss_term("kl")
class Taken(sl.AuxK):
    pass


HOOK = "blocks.0.hook_resid_post"
TEXTS = [f"The {a} met the {b} and said hello." for a in ("cat", "dog", "owl", "fox") for b in ("hen", "cow", "bee")]
CTX = 16


@pytest.fixture(scope="module")
def world():
    """A model, its text and activations."""
    model = sl.lm.tiny_model()
    tokens = sl.tokenize(model, TEXTS * 4, ctx_len=CTX)
    return model, tokens, sl.collect(model, tokens, HOOK, progress=False)


KEPT = {}


@unchecked()
def trained(world, activation=None, **axes):
    """A trained SAE of its own for each caller, trained once for all of them."""
    _, _, acts = world
    cfg = sl.SAEConfig(d_in=acts.d_in, d_sae=96, activation=activation or sl.TopK(k=2), **axes)
    if cfg not in KEPT:
        KEPT[cfg] = sl.SAE(cfg, seed=0).fit(acts, sl.TrainConfig(n_tokens=6_400, batch_size=64), progress=False)
    return deepcopy(KEPT[cfg])


def run(n_tokens=3_200, **settings):
    return sl.TrainConfig(n_tokens=n_tokens, batch_size=CTX * 4, **settings)


@unchecked()
def kl(sae, world):
    model, tokens, _ = world
    return sl.evaluate(sae, model, tokens, baselines=False, n_bootstrap=0, progress=False).kl


@pytest.mark.parametrize("activation", [sl.TopK(k=2), sl.AbsTopK(k=2), sl.BatchTopK(k=2)], ids=lambda a: a.name)
def test_the_gradient_is_that_of_the_whole_chain(world, activation):
    """Against the KL divergence written out, differentiated through model, decoder and encoder at once."""
    model, tokens, _ = world
    sae = trained(world, activation=activation)
    stage = Stage.at(model, sae, match_model(sae, model, None, None, False))
    trainee = _TrainingInLoop(sae, run(), stage, tokens, 2.0)
    rows = torch.tensor([[0.0], [3.0], [5.0], [7.0]])
    trainee.prepare(rows)
    losses = trainee.objective(rows)
    losses.terms["kl"].backward()
    found = {name: p.grad.clone() for name, p in sae.named_parameters() if p.grad is not None}
    sae.zero_grad()
    batch = tokens[rows[:, 0].long()]
    clean = stage.run(batch)
    u = sae.center(clean.rows) @ sae.W_enc + sae.b_enc
    z = activation(u, sae.threshold, training=True)
    spliced = clean.splice(sae.decode(z), grad=True)["kl"].mean()
    parameters = dict(sae.named_parameters())
    wanted = dict(zip(found, torch.autograd.grad(spliced, [parameters[name] for name in found]), strict=True))
    torch.testing.assert_close(losses.terms["kl"], 2.0 * spliced.detach(), rtol=1e-4, atol=1e-6)
    assert {"W_enc", "W_dec", "b_enc", "b_dec"} <= set(found)
    for name, grad in found.items():
        torch.testing.assert_close(grad, 2.0 * wanted[name], rtol=1e-3, atol=1e-4 * float(grad.abs().max()))


@unchecked()
def test_predictions_change_less_than_after_as_many_steps_on_reconstruction_alone(world):
    model, tokens, _ = world
    start, with_kl, without = (
        kl(sae, world)
        for sae in (
            trained(world),
            finetune(trained(world), model, tokens, run(), kl_coefficient=3.0, progress=False),
            finetune(trained(world), model, tokens, run(), kl_coefficient=0.0, progress=False),
        )
    )
    assert with_kl < 0.9 * without and with_kl < start


def test_the_model_is_left_as_it_was(world):
    model, tokens, _ = world
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    finetune(trained(world), model, tokens, run(n_tokens=640), progress=False)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) and parameter.grad is None, name


def test_runs_are_logged_recorded_and_resumed_to_the_bit(world, tmp_path):
    model, tokens, _ = world
    settings = run(n_tokens=640, log_every_tokens=64, save_every_tokens=64)
    whole = finetune(trained(world), model, tokens, settings, progress=False)
    assert {"kl", "reconstruction", "aux", "l0"} <= set(whole.history_[-1])
    assert whole.training_["kl_coefficient"] == 1.0 and whole.training_["before"]["n_tokens"] == 6_400

    def stop(entry):
        if entry["step"] == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        finetune(trained(world), model, tokens, settings, out=tmp_path, sinks=[stop], progress=False)
    with pytest.raises(ValueError, match="must not hold another run"):
        finetune(trained(world), model, tokens, settings, out=tmp_path, progress=False)
    cut = finetune(trained(world), model, tokens, settings, out=tmp_path, resume=True, progress=False)
    for name, weight in whole.state_dict().items():
        assert torch.equal(weight, cut.state_dict()[name]), name
    whole.save_pretrained(tmp_path / "sae")
    assert sl.SAE.from_pretrained(tmp_path / "sae").training_["kl_coefficient"] == 1.0


@unchecked()
def test_transcoders_are_finetuned_too(world):
    model, tokens, _ = world
    places = ["blocks.1.ln2.hook_normalized", "blocks.1.hook_mlp_out"]
    pair = sl.collect(model, tokens, places, progress=False)
    cfg = sl.SAEConfig(d_in=32, d_out=32, d_sae=96, activation=sl.TopK(k=2), skip=True)
    sae = sl.SAE(cfg, seed=0).fit((pair[places[0]], pair[places[1]]), run(), progress=False)
    before = kl(sae, world)
    finetune(sae, model, tokens, run(), kl_coefficient=3.0, progress=False)
    assert kl(sae, world) < before


def test_what_cannot_be_finetuned_is_refused(world):
    model, tokens, _ = world
    with pytest.raises(ValueError, match="activation function that fixes L0"):
        finetune(trained(world, activation=sl.ReLU(target_l0=2.0)), model, tokens, run())
    with pytest.raises(ValueError, match="one map for all tokens"):
        finetune(trained(world, normalizer="layer_norm"), model, tokens, run())
    with pytest.raises(ValueError, match="multiple of ctx_len"):
        finetune(trained(world), model, tokens, sl.TrainConfig(n_tokens=300, batch_size=30))
    with pytest.raises(ValueError, match="`kl_coefficient` must be at least 0"):
        finetune(trained(world), model, tokens, run(), kl_coefficient=-1.0)
    for term, why in (
        (ContrastiveLoss(), "compares neighboring tokens"),
        (Taken(), "has the name of the divergence's"),
    ):
        sae = sl.SAE(
            sl.SAEConfig(d_in=32, d_sae=96, activation=sl.TopK(k=2), objective=(sl.ReconstructionLoss(), term))
        )
        with pytest.raises(ValueError, match=why):
            finetune(sae, model, tokens, run())


def test_latents_end_in_the_order_that_the_loss_asks_for(world):
    model, tokens, _ = world
    objective = (MatryoshkaLoss(by_rate=True), sl.AuxK())
    sae = trained(world, prefixes=(16, 96), objective=objective)
    x, before = world[2][:], sae.encode_sparse(world[2][:]).indices.bincount(minlength=96)
    with torch.no_grad():  # latents at the end fire most
        order = before.argsort()
        sae.W_enc.copy_(sae.W_enc[:, order])
        sae.b_enc.copy_(sae.b_enc[order])
        sae.W_dec.copy_(sae.W_dec[order])
    assert not before[order][:16].any() or before[order][:16].sum() < before.sum() / 16
    finetune(sae, model, tokens, run(lr=1e-6), progress=False)
    rates = sae.encode_sparse(x).indices.bincount(minlength=96)
    assert rates[:16].sum() > rates.sum() / 2


def test_baselines_of_a_finetuned_sae_train_as_it_did_at_first(world):
    model, tokens, _ = world
    sae = trained(world)
    at_first = _recorded(sae)
    finetune(sae, model, tokens, run(), progress=False)
    finetune(sae, model, tokens, run(), progress=False)
    assert _recorded(sae) == at_first and at_first.n_tokens == 6_400

"""Sparsemax and Log1pReLU: their values, their gradients in a training step, and SAEs of them."""

from dataclasses import replace

import pytest
import torch
from unchecked import unchecked

import saelab as sl
from saelab.functional import sparsemax
from saelab.sae import Log1pReLU, Refined, Sparsemax
from saelab.sae.training_sae import TrainingSAE


def check_gradients(sae, x, activate, penalize):
    """The gradients of a training step are those of the dense formula."""
    trainee = TrainingSAE(sae, sl.TrainConfig(), trained=True)
    trainee.prepare(x)
    centered = sae.normalizer.normalize(x) - sae.b_dec
    z = activate(centered @ sae.W_enc + sae.b_enc)
    error = (centered - z @ sae.W_dec).square().sum() / (len(x) * trainee.state["variance"])
    weights = [sae.W_enc, sae.b_enc, sae.W_dec, sae.b_dec]
    wanted = torch.autograd.grad(error + penalize(z), weights)
    found = torch.autograd.grad(sum(trainee.objective(x).terms.values()), weights)
    for mine, expected in zip(found, wanted, strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("scale", [0.5, 1.0, 4.0])
def test_codes_are_cut_at_one_threshold_a_token_to_their_sum(scale):
    u = draw(6, 5, 30)
    z, total = sparsemax(u, scale), scale * u.amax(-1)
    torch.testing.assert_close(z.sum(-1), total)
    cut = (u - z).masked_fill(z == 0, torch.nan)  # the same t wherever a latent fires, and no other exceeds it
    t = cut.nanmedian(-1, keepdim=True).values
    assert ((cut - t).abs().nan_to_num() < 1e-9).all() and (u[z == 0] <= t.expand_as(u)[z == 0] + 1e-9).all()
    torch.testing.assert_close(sparsemax(3 * u, scale), 3 * z)
    assert not sparsemax(-u.abs(), scale).any()


def test_more_scale_is_less_sparse():
    l0 = [(sparsemax(draw(50, 40), scale) > 0).sum() for scale in (0.5, 1.0, 2.0, 4.0)]
    assert l0 == sorted(set(l0))


def test_the_gradient_is_that_of_finite_differences():
    assert torch.autograd.gradcheck(lambda u: sparsemax(u, 1.5), draw(4, 12).requires_grad_(), atol=1e-6)


@unchecked()
def test_an_sae_of_it_trains_saves_and_encodes_sparsely(tmp_path):
    cfg = sl.SAEConfig(d_in=8, d_sae=40, activation=Sparsemax(scale=1.5))
    x = draw(1_000, 8, seed=1).float()
    sae = sl.SAE(cfg, seed=0).fit(x, sl.TrainConfig(n_tokens=6_000, batch_size=100), progress=False)
    assert sae.history_[-1]["reconstruction"] < 0.8 * sae.history_[0]["reconstruction"]
    sae.save_pretrained(tmp_path)
    loaded = sl.SAE.from_pretrained(tmp_path)
    assert loaded.cfg == cfg and torch.equal(loaded.encode(x), sae.encode(x))
    assert torch.equal(sae.encode_sparse(x).to_dense(), sae.encode(x))
    check_gradients(sae, x[:50], lambda u: sparsemax(u, 1.5), lambda z: 0.0)
    with pytest.raises(ValueError, match="`scale` must be above 0"):
        Sparsemax(scale=0.0)


@pytest.mark.parametrize("bias", [-2.0, 0.0], ids=["sparse", "dense"])
@unchecked()
def test_log1p_compresses_codes_in_a_step_as_in_the_formula(bias, tmp_path):
    x, cfg = draw(300, 8).float(), sl.SAEConfig(d_in=8, d_sae=200, activation=Log1pReLU(coefficient=0.01))
    sae, plain = (sl.SAE(replace(cfg, activation=a), seed=0) for a in (cfg.activation, sl.ReLU(coefficient=0.01)))
    for one in (sae, plain):
        one.b_enc.data.fill_(bias)
    assert (sae.cfg.activation.search(sae.center(x), sae.W_enc.T, sae.b_enc, None, True) is None) == (bias == 0)
    torch.testing.assert_close(sae.encode(x), plain.encode(x).log1p())
    refined = sl.SAE(replace(sae.cfg, encoder=Refined()), seed=0)
    for one in (sae, refined):
        torch.testing.assert_close(one.encode_sparse(x).to_dense(), one.encode(x))
        torch.testing.assert_close(one.encode_latents(x, [1, 9]), one.encode(x)[:, [1, 9]])
    for changed in (cfg.activation, Sparsemax()):
        with pytest.raises(ValueError, match="which changes them"):
            sl.SAE(replace(cfg, activation=changed), seed=0).to_jumprelu(x)
    check_gradients(sae, x[:50], lambda u: u.relu().log1p(), lambda z: 0.01 * z.sum(1).mean())
    sae.save_pretrained(tmp_path / "own")
    assert torch.equal(sl.SAE.from_pretrained(tmp_path / "own").encode(x), sae.encode(x))
    for format in ("saelens", "sparsify", "dictionary_learning"):
        with pytest.raises(ValueError, match="Log1pReLU"):
            sae.save_pretrained(tmp_path / format, format=format)

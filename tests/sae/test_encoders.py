"""The refined encoder: its formula, dense and sparse, its gradient, what it finds that one pass does not, its files."""

from dataclasses import replace

import pytest
import torch
from unchecked import unchecked

import saelab as sl
from saelab.sae import Refined
from saelab.sae.training_sae import TrainingSAE

D_IN, D_SAE, BATCH = 8, 40, 32


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def config(activation=None, d_sae=D_SAE, **axes):
    return sl.SAEConfig(
        d_in=D_IN, d_sae=d_sae, activation=activation or sl.TopK(k=3), encoder=Refined(step=0.4), **axes
    )


def made(cfg):
    sae = sl.SAE(cfg, seed=1)
    with torch.no_grad():
        sae.W_enc.mul_(0.5)
        sae.b_enc.add_(0.05 * draw(cfg.d_sae, seed=7))
        sae.b_dec.add_(0.3)
    sae.normalizer.fit(1 + 2 * draw(200, D_IN, seed=8))
    return sae


def naive(sae, x, activation, training=False):
    centered = sae.normalizer.normalize(x) - sae.b_dec
    first = activation(centered @ sae.W_enc + sae.b_enc, sae.threshold, training=training)
    read = centered + 0.4 * (centered - first @ sae.W_dec)
    return activation(read @ sae.W_enc + sae.b_enc, sae.threshold, training=training)


kinds = pytest.mark.parametrize("activation", [sl.TopK(k=3), sl.AbsTopK(k=3), sl.ReLU(coefficient=0.1)], ids=str)
widths = pytest.mark.parametrize("d_sae", [D_SAE, 2048])  # the wide one is searched


@kinds
@widths
def test_codes_are_those_of_the_formula(activation, d_sae):
    sae, x = made(config(activation, d_sae)), 1 + draw(4, 5, D_IN, seed=2)
    z = sae.encode(x)
    torch.testing.assert_close(z.flatten(0, 1), naive(sae, x.flatten(0, 1), activation), rtol=1e-4, atol=1e-5)
    assert torch.equal(sae.encode_sparse(x).to_dense(), z)
    torch.testing.assert_close(sae.encode_latents(x, [5, 2]), z[..., [5, 2]], rtol=1e-4, atol=1e-5)


@kinds
@widths
def test_gradients_are_those_of_the_formula(activation, d_sae):
    sae = made(config(activation, d_sae, objective=(sl.ReconstructionLoss(),)))
    trainee = TrainingSAE(sae, sl.TrainConfig(n_tokens=1000, batch_size=BATCH), trained=True)
    x = draw(BATCH, D_IN, seed=3)
    trainee.prepare(x)
    z = naive(sae, x, activation, training=True)
    error = (sae.normalizer.normalize(x) - sae.b_dec - z @ sae.W_dec).square().sum()
    error = error / (BATCH * trainee.state["variance"])
    weights = [sae.W_enc, sae.b_enc, sae.W_dec, sae.b_dec]
    wanted = torch.autograd.grad(error, weights)
    loss = trainee.objective(x).terms["reconstruction"]
    torch.testing.assert_close(loss, error, rtol=1e-4, atol=0)
    loss.backward()
    for weight, gradient in zip(weights, wanted, strict=True):
        torch.testing.assert_close(weight.grad, gradient, rtol=1e-3, atol=1e-4)


def test_it_tells_apart_what_one_pass_takes_twice():
    """With the planted rows themselves as weights, more of the true latents are among the k largest."""
    rows = torch.nn.functional.normalize(draw(60, 20, seed=4))
    support = torch.rand(400, 60, generator=torch.Generator().manual_seed(5)).topk(3).indices
    x = torch.zeros(400, 60).scatter(1, support, 1 + draw(400, 3, seed=6).abs()) @ rows
    shares = []
    for encoder in (Refined(step=0.4), "linear"):
        cfg = sl.SAEConfig(d_in=20, d_sae=60, activation=sl.TopK(k=3), encoder=encoder, normalizer="none")
        sae = sl.SAE(cfg)
        with torch.no_grad():
            sae.W_dec.copy_(rows)
            sae.W_enc.copy_(0.5 * rows.T)  # of full length three coherent codes add up to more than x
        shares.append((sae.encode(x).gather(1, support) > 0).float().mean(1))
    refined, linear = shares
    assert (refined - linear).mean() > 3 * (refined - linear).std() / 400**0.5


@unchecked()
@pytest.mark.parametrize("activation", [sl.BatchTopK(k=3), sl.ReLU(coefficient=0.1)], ids=str)
def test_it_trains_saves_and_folds(activation, tmp_path):
    x = draw(2000, D_IN, seed=3)
    cfg = config(activation, normalizer="whiten")
    run = sl.TrainConfig(n_tokens=3000, batch_size=100)
    whole = sl.SAE(cfg, seed=0).fit(x, run, progress=False)
    assert whole.history_[-1]["reconstruction"] < whole.history_[0]["reconstruction"]
    whole.save_pretrained(tmp_path / "sae")
    loaded = sl.SAE.from_pretrained(tmp_path / "sae")
    assert loaded.cfg == cfg and torch.equal(loaded(x), whole(x))
    torch.testing.assert_close(whole.fold()(x), whole(x), rtol=1e-3, atol=1e-3)
    for format in ("saelens", "sparsify", "dictionary_learning"):
        with pytest.raises(ValueError, match=r"reads its error|linear|encoder"):
            whole.save_pretrained(tmp_path / format, format)


def test_what_cannot_be_refined_is_named():
    with pytest.raises(ValueError, match="`d_out` must be None for a refined encoder"):
        config(d_out=4)
    with pytest.raises(ValueError, match=r"`step` must be in \(0, 1\]"):
        Refined(step=0.0)
    plain = replace(config(), encoder=Refined()).to_dict()
    assert plain["encoder"] == {"name": "refined", "step": 0.3}

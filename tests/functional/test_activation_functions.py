"""Matching pursuit: against a plain loop, its stops, its gradients, and an SAE that encodes by it."""

import itertools
import json

import pytest
import torch
from unchecked import unchecked

import saelab as sl
from saelab.functional.activation_functions import pursue
from saelab.sae.config import MatchingPursuit
from saelab.sae.training_sae import TrainingSAE

D_IN, D_SAE = 6, 15


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def atoms(seed=0):
    rows = draw(D_SAE, D_IN, seed=seed)
    return rows / rows.norm(dim=1, keepdim=True)


def one_by_one(x, W, n_steps, signed, threshold, stop_on_repeat):
    """Codes of one row at a time, by the definition."""
    z = torch.zeros(len(x), len(W))
    for row, code in zip(x, z, strict=True):
        residual = row.clone()
        for _ in range(n_steps):
            products = W @ residual
            best = int((products.abs() if signed else products).argmax())
            value = float(products[best]) if signed else max(0.0, float(products[best]))
            repeated = value == 0 or code[best] != 0
            code[best] += value
            residual = residual - value * W[best]
            if (stop_on_repeat and repeated) or (threshold > 0 and residual.norm() < threshold):
                break
    return z


@pytest.mark.parametrize("stop_on_repeat", [True, False])
@pytest.mark.parametrize("threshold", [0.0, 0.7])
@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("scale", [1.0, 0.6])  # rows need not be of unit norm
def test_it_is_the_plain_loop(scale, signed, threshold, stop_on_repeat, monkeypatch):
    monkeypatch.setattr("saelab.functional.activation_functions.SCAN_NUMBERS", 3 * D_SAE)  # several parts
    x, W = draw(40, D_IN, seed=1), scale * atoms()
    x[3] = 0.0
    x[4] *= 1e-3
    found = pursue(x, W, 9, signed, threshold, stop_on_repeat)
    torch.testing.assert_close(found.to_dense(), one_by_one(x, W, 9, signed, threshold, stop_on_repeat))
    assert (found.values != 0).all() and bool((found.values < 0).any()) == signed
    assert found.l0.max() <= 9 and found.l0[3] == 0 and (threshold == 0 or found.l0[4] == 1)


def test_orthonormal_rows_are_found_in_order_and_give_back_the_row():
    W = torch.linalg.qr(draw(D_IN, D_IN)).Q
    x = draw(20, D_IN, seed=2)
    for k in range(1, D_IN + 1):
        z = pursue(x, W, k, signed=True).to_dense()
        expected = x @ W.T
        kept = expected.abs() >= expected.abs().sort(descending=True).values[:, k - 1 : k]
        torch.testing.assert_close(z, expected * kept)
    torch.testing.assert_close(z @ W, x)


def test_every_step_lowers_the_error():
    x, W = draw(50, D_IN, seed=3), atoms()
    errors = [(x - pursue(x, W, k, stop_on_repeat=False).decode(W)).square().sum(1) for k in range(1, 8)]
    assert all((later <= sooner + 1e-6).all() for sooner, later in itertools.pairwise(errors))


def test_gradients_are_those_of_the_loop():
    x, W = draw(3, D_IN, seed=4).double(), atoms().double()
    assert torch.autograd.gradcheck(
        lambda x, W: pursue(x, W, 3, True).to_dense(), (x.requires_grad_(), W.requires_grad_()), eps=1e-7
    )


each_sign = pytest.mark.parametrize("activation", [sl.TopK(k=4), sl.AbsTopK(k=4)], ids=lambda a: a.name)


def pursuing(activation, **axes):
    cfg = sl.SAEConfig(
        d_in=D_IN, d_sae=D_SAE, activation=activation, encoder=MatchingPursuit(), normalizer="none", **axes
    )
    return sl.SAE(cfg, seed=1)


@each_sign
@unchecked()
def test_it_learns_and_beats_one_linear_step(activation):
    z = draw(2000, D_SAE, seed=5).abs() * (torch.rand(2000, D_SAE, generator=torch.Generator().manual_seed(0)) < 0.1)
    x = z @ atoms(seed=9) + 3.0
    run = sl.TrainConfig(n_tokens=10_000, batch_size=100)
    fvu = pursuing(activation).fit(x, run, progress=False).history_[-1]["held_out_fvu"]
    cfg = sl.SAEConfig(d_in=D_IN, d_sae=D_SAE, activation=activation)
    assert fvu < min(0.1, sl.SAE(cfg).fit(x, run, progress=False).history_[-1]["held_out_fvu"])


@each_sign
def test_codes_dense_and_sparse_saved_folded_and_by_prefix(activation, tmp_path):
    sae, x = pursuing(activation, prefixes=(5, D_SAE)), draw(2, 7, D_IN, seed=6)
    with torch.no_grad():
        sae.b_dec.add_(0.5)
    z = sae.encode(x)
    torch.testing.assert_close(
        z.flatten(0, 1), pursue(x.flatten(0, 1) - 0.5, sae.W_dec, 4, activation.signed).to_dense()
    )
    assert torch.equal(sae.encode_sparse(x).to_dense(), z) and (sae.encode_sparse(x).l0 <= 4).all()
    torch.testing.assert_close(sae(x), z @ sae.W_dec + sae.b_dec)
    assert set(sae.state_dict()) == {"W_dec", "b_dec"}
    assert torch.equal(sae.W_enc, sae.W_dec.T) and not sae.b_enc.any()
    sae.save_pretrained(tmp_path)
    loaded = sl.SAE.from_pretrained(tmp_path)
    assert loaded.cfg == sae.cfg and torch.equal(loaded(x), sae(x)) and torch.equal(sae.fold()(x), sae(x))
    assert json.loads(json.dumps(sae.cfg.to_dict()))["encoder"] == {
        "residual_threshold": 0.0,
        "stop_on_repeat": True,
    }


@each_sign
def test_losses_reach_the_dictionary(activation):
    sae = pursuing(activation, objective=(sl.ReconstructionLoss(), sl.AuxK(k=2, dead_after_tokens=10)))
    trainee = TrainingSAE(sae, sl.TrainConfig(n_tokens=1000, batch_size=100))
    trainee.prepare(draw(100, D_IN))
    trainee.state["tokens_since_fired"][-3:] = 10
    objective = trainee.objective(draw(100, D_IN))
    z = sae.encode(draw(100, D_IN))
    error = (draw(100, D_IN) - z @ sae.W_dec - sae.b_dec).square().sum() / (100 * trainee.state["variance"])
    torch.testing.assert_close(objective.terms["reconstruction"], error)
    wanted = torch.autograd.grad(error, [sae.W_dec, sae.b_dec])
    objective.terms["reconstruction"].backward(retain_graph=True)
    torch.testing.assert_close([sae.W_dec.grad, sae.b_dec.grad], list(wanted), rtol=1e-4, atol=1e-6)
    sae.zero_grad()
    objective.terms["aux"].backward()
    assert sae.W_dec.grad[-3:].any() and not sae.W_dec.grad[:-3].any()


def test_what_a_pursuit_cannot_be_is_named():
    plain = {"d_in": D_IN, "d_sae": D_SAE, "encoder": MatchingPursuit(), "normalizer": "none"}
    with pytest.raises(ValueError, match="`activation` of matching pursuit must be TopK or AbsTopK"):
        sl.SAEConfig(**plain, activation=sl.ReLU(target_l0=3.0))
    with pytest.raises(ValueError, match="`normalizer` must be 'none'"):
        sl.SAEConfig(**plain | {"normalizer": "scale"}, activation=sl.TopK(k=3))
    with pytest.raises(ValueError, match="`d_out` must be None"):
        sl.SAEConfig(**plain, activation=sl.TopK(k=3), d_out=4)
    with pytest.raises(ValueError, match="`residual_threshold` must be at least 0"):
        MatchingPursuit(residual_threshold=-1.0)
    with pytest.raises(ValueError, match="`encoder` must be one of"), unchecked():
        sl.SAEConfig(**plain | {"encoder": "linaer"}, activation=sl.TopK(k=3))


def test_more_steps_than_latents_are_legal(tmp_path):
    """Without an end at the first repeat, steps go on adding to the latents that there are."""
    cfg = sl.SAEConfig(
        d_in=4, d_sae=6, activation=sl.TopK(k=9), encoder=sl.MatchingPursuit(stop_on_repeat=False), normalizer="none"
    )
    sae, x = sl.SAE(cfg, seed=0), torch.randn(20, 4, generator=torch.Generator().manual_seed(0))
    sae.save_pretrained(tmp_path)
    assert torch.equal(sl.SAE.from_pretrained(tmp_path).encode(x), sae.encode(x))
    assert int((sae.encode(x) != 0).sum(1).max()) <= 6
    with pytest.raises(ValueError, match="at least 1 step"):
        sl.SAEConfig(d_in=4, d_sae=6, activation=sl.TopK(k=0), encoder=sl.MatchingPursuit(), normalizer="none")

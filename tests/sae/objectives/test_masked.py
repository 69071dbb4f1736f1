"""Reconstruction of hidden coordinates: its formula, what it finds that the plain loss does not, and its refusals."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from resuming import assert_resumes
from unchecked import unchecked

import saelab as sl
from saelab.sae.objectives import MaskedLoss
from saelab.sae.training_sae import TrainingSAE

D_IN, D_SAE, BATCH = 10, 30, 40


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def config(loss=None, encoder=None, **axes):
    loss, encoder = loss or MaskedLoss(visible_frac=0.7), encoder or sl.OrthogonalMatchingPursuit()
    axes = {"d_in": D_IN, "d_sae": D_SAE, "activation": sl.AbsTopK(k=3), **axes}
    return sl.SAEConfig(objective=(loss, sl.AuxK(k=2, dead_after_tokens=10)), encoder=encoder, **axes)


def naive_codes(x, W, k):
    """Orthogonal matching pursuit of one row at a time, in float64."""
    codes = np.zeros((len(x), len(W)))
    for row, code in zip(x.double().numpy(), codes, strict=True):
        rows, chosen = W.double().numpy(), []
        for _ in range(k):
            u = np.abs(rows @ (row - code @ rows)) / np.linalg.norm(rows, axis=1)
            u[chosen] = -1
            chosen.append(int(u.argmax()))
            code[:] = 0
            code[chosen] = np.linalg.lstsq(rows[chosen].T, row, rcond=None)[0]
    return torch.tensor(codes).float()


@pytest.mark.parametrize("rotated", [True, False])
def test_value_and_gradient_are_those_of_the_formula(rotated):
    loss = MaskedLoss(visible_frac=0.7, rotated=rotated)
    sae = sl.SAE(config(loss), seed=1)
    trainee = TrainingSAE(sae, sl.TrainConfig(n_tokens=1000, batch_size=BATCH, seed=3))
    trainee.prepare(2 + draw(100, D_IN))
    trainee.state["n_steps"].fill_(5)
    x = draw(BATCH, D_IN, seed=3)
    found = trainee.objective(x).terms["masked"]
    visible, hidden = loss.draw_views(D_IN, seed=3, number=5)
    y = sae.normalizer.normalize(x) - sae.b_dec
    z = naive_codes((y @ visible).detach(), (sae.W_dec @ visible).detach(), 3)
    wanted = (y @ hidden - z @ (sae.W_dec @ hidden)).square().sum() * D_IN / (3 * BATCH * trainee.state["variance"])
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=0)
    found.backward()
    gradients = torch.autograd.grad(wanted, [sae.W_dec, sae.b_dec])
    torch.testing.assert_close([sae.W_dec.grad, sae.b_dec.grad], list(gradients), rtol=1e-3, atol=1e-6)


def test_each_step_hides_others_and_all_of_them_are_an_orthonormal_basis():
    loss = MaskedLoss(visible_frac=0.7)
    first, again, next_one = (loss.draw_views(D_IN, seed=0, number=number) for number in (0, 0, 1))
    assert torch.equal(first[0], again[0]) and not torch.equal(first[1], next_one[1])
    both = torch.cat(first, 1)
    torch.testing.assert_close(both.T @ both, torch.eye(D_IN), rtol=0, atol=1e-5)
    spans = [torch.cat(views, 1) for views in (first, next_one)]
    assert (spans[0].T @ spans[1]).abs().gt(0.999).sum() == D_IN  # the same directions in another order
    plain = MaskedLoss(visible_frac=0.7, rotated=False).draw_views(D_IN, seed=0, number=0)[1]
    assert plain.shape == (D_IN, 3) and set(plain.flatten().tolist()) == {0.0, 1.0}


@unchecked()
def test_a_wide_dictionary_keeps_planted_rows_that_the_plain_loss_drifts_from():
    """Noise has the norm of the signal; the dictionary starts at the rows and three times as many samples."""
    d, n, k = 48, 64, 3
    rows = draw(n, d, seed=1)
    rows = rows / rows.norm(dim=1, keepdim=True)
    generator = torch.Generator().manual_seed(2)
    support = torch.rand(600, n, generator=generator).topk(k).indices
    z = torch.zeros(600, n).scatter(1, support, draw(600, k, seed=3))
    x = (z / z.norm(dim=1, keepdim=True)) @ rows + draw(600, d, seed=4) / d**0.5
    start = torch.cat([rows, x[:192] / x[:192].norm(dim=1, keepdim=True)])
    nearest = []
    for loss in (MaskedLoss(), sl.ReconstructionLoss()):
        cfg = config(loss, d_in=d, d_sae=len(start), normalizer="none")
        sae = sl.SAE(replace(cfg, objective=(loss,)), seed=0)
        with torch.no_grad():
            sae.W_dec.copy_(start)
        sae.training_ = {}  # goes on from these weights
        run = sl.TrainConfig(n_tokens=25 * 600, batch_size=100, lr=2e-3, n_held_out=0)
        sae.fit(x, run, progress=False)
        nearest.append((rows @ sae.W_dec.detach().T).abs().amax(1))
    masked, plain = nearest
    assert (masked - plain).mean() > 3 * (masked - plain).std() / n**0.5
    assert (masked > 0.95).sum() > (plain > 0.95).sum()


def test_it_resumes_is_logged_and_saved(tmp_path):
    x = draw(1000, D_IN, seed=3)
    run = sl.TrainConfig(n_tokens=400, batch_size=BATCH, log_every_tokens=BATCH, save_every_tokens=BATCH)
    whole = assert_resumes(lambda seed: sl.SAE(config(), seed=seed), x, run, tmp_path / "run", at=4)
    assert "masked" in whole.history_[-1]
    whole.save_pretrained(tmp_path / "sae")
    assert sl.SAE.from_pretrained(tmp_path / "sae").cfg == whole.cfg


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: config(encoder="linear"), "with a linear one masking finds fewer features"),
        (lambda: config(encoder=sl.MatchingPursuit(), normalizer="none"), "must find codes by least squares"),
        (lambda: config(prefixes=(4, D_SAE)), "`prefixes` must be None"),
        (lambda: MaskedLoss(visible_frac=1.0), r"must be in \(0, 1\), got 1.0"),
        (lambda: config(MaskedLoss(visible_frac=0.01)), "must leave a coordinate to see and one to hide of 10"),
    ],
)
def test_what_cannot_be_masked_is_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()

"""The FLOPs penalty: its formula and gradient, its weights, and dense latents made rarer."""

import numpy as np
import pytest
import torch
from unchecked import unchecked

import saelab as sl
from saelab.sae.objectives import FLOPsPenalty
from saelab.sae.training_sae import TrainingSAE

D_IN, D_SAE, BATCH = 12, 40, 64
WEIGHTS = tuple(0.1 * i for i in range(D_SAE))


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def config(term, activation=None, **axes):
    objective = (sl.ReconstructionLoss(), term)
    axes = {"d_in": D_IN, "d_sae": D_SAE} | axes
    return sl.SAEConfig(activation=activation or sl.AbsTopK(k=4), objective=objective, **axes)


@pytest.mark.parametrize("weights", [None, WEIGHTS], ids=["equal", "weighted"])
@pytest.mark.parametrize("activation", [sl.AbsTopK(k=4), sl.ReLU(coefficient=0.0)], ids=["sparse", "dense"])
def test_value_and_gradient_are_those_of_the_formula(activation, weights):
    trainee = TrainingSAE(sl.SAE(config(FLOPsPenalty(coefficient=0.5, weights=weights), activation)), sl.TrainConfig())
    trainee.prepare(draw(512, D_IN, seed=1))
    sae, x = trainee.sae, draw(BATCH, D_IN, seed=2)
    loss = trainee.objective(x).terms["flops"]
    z = activation((sae.normalizer.normalize(x) - sae.b_dec) @ sae.W_enc + sae.b_enc)
    dense = 0.5 * (z.abs().mean(0).square() * torch.tensor(weights or 1.0)).sum()
    torch.testing.assert_close(loss, dense, rtol=1e-5, atol=0)
    inputs = [sae.W_enc, sae.b_enc, sae.b_dec]
    for mine, wanted in zip(torch.autograd.grad(loss, inputs), torch.autograd.grad(dense, inputs), strict=True):
        assert wanted.any()
        torch.testing.assert_close(mine, wanted, rtol=1e-4, atol=1e-5 * float(wanted.abs().max()))


@unchecked()
def test_latents_that_fire_often_fire_less():
    """One atom is in every other token: with the penalty its codes are rarer; the dictionary still has the same L0."""
    generator = torch.Generator().manual_seed(0)
    atoms = torch.nn.functional.normalize(torch.randn(24, D_IN, generator=generator), dim=1)
    often = torch.cat([torch.full((4,), 0.5), torch.full((20,), 0.05)])
    z = (torch.rand(10_000, 24, generator=generator) < often) * (0.5 + torch.rand(10_000, 24, generator=generator))
    x = z @ atoms + 0.02 * torch.randn(10_000, D_IN, generator=generator)
    largest = []
    for coefficient in (0.0, 0.3):
        sae = sl.SAE(config(FLOPsPenalty(coefficient=coefficient), sl.TopK(k=3)), seed=0)
        sae.fit(x, sl.TrainConfig(n_tokens=60_000, batch_size=256), progress=False)
        density = (sae.encode(x) != 0).float().mean(0).sort().values
        largest.append(float(density[-4:].mean()))
    assert largest[1] < 0.8 * largest[0]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: FLOPsPenalty(weights=(1.0, -1.0)), "`weights` must be at least 0 and finite"),
        (lambda: FLOPsPenalty(weights=(1.0, float("inf"))), "`weights` must be at least 0 and finite"),
        (lambda: config(FLOPsPenalty(weights=(1.0, 2.0))), r"one number for each latent \(40\), got 2"),
    ],
)
def test_bad_weights_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@unchecked()
def test_weights_may_be_an_array():
    term = FLOPsPenalty(weights=np.arange(3))
    assert term == FLOPsPenalty(weights=(0.0, 1.0, 2.0)) and term.to_dict()["weights"] == [0.0, 1.0, 2.0]


def test_files_keep_the_weights(tmp_path):
    sae = sl.SAE(config(FLOPsPenalty(weights=WEIGHTS)))
    sae.save_pretrained(tmp_path)
    assert sl.SAE.from_pretrained(tmp_path).cfg == sae.cfg

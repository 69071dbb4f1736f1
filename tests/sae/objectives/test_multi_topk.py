"""Reconstruction errors at several k, against the dense formula, and one SAE for all of them."""

from dataclasses import replace

import pytest
import torch
from resuming import assert_resumes
from unchecked import unchecked

import saelab as sl
from saelab.sae.fitting import measure
from saelab.sae.objectives import HierarchicalLoss, MultiTopKLoss
from saelab.sae.training_sae import TrainingSAE

D_IN, BATCH, KS = 8, 64, (2, 3, 7)
ACTIVATIONS = [sl.TopK(k=3), sl.AbsTopK(k=3), sl.BatchTopK(k=3), sl.BatchAbsTopK(k=3)]
each_activation = pytest.mark.parametrize("activation", ACTIVATIONS, ids=lambda a: a.name)


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def config(loss, activation=None, d_sae=40, **axes):
    activation = activation or sl.TopK(k=3)
    axes = {"normalizer": "none"} | axes
    return sl.SAEConfig(d_in=D_IN, d_sae=d_sae, activation=activation, objective=(loss,), **axes)


def keep_largest(u, k, activation):
    """Dense codes of the k largest by magnitude, in each row or in the batch."""
    u = u if activation.signed else u.relu()
    flat = u.abs().flatten()[None] if isinstance(activation, sl.BatchTopK) else u.abs()
    n = k * len(u) if isinstance(activation, sl.BatchTopK) else k
    kept = torch.zeros_like(flat).scatter(1, flat.topk(n).indices, 1.0)
    return u * kept.view_as(u)


@each_activation
@pytest.mark.parametrize("d_sae", [40, 2048], ids=["dense", "sparse"])
def test_errors_and_gradients_are_those_of_the_dense_formula(activation, d_sae):
    loss = MultiTopKLoss(ks=KS, weights=(1.0, 0.5, 0.125), coefficient=2.0)
    trainee = TrainingSAE(sl.SAE(config(loss, activation, d_sae), seed=0), sl.TrainConfig())
    trainee.prepare(draw(512, D_IN, seed=1))
    sae, x = trainee.sae, draw(BATCH, D_IN, seed=2)
    with torch.no_grad():
        sae.b_enc += 0.1 * draw(d_sae, seed=3)
    found = trainee.objective(x)
    u = (x - sae.b_dec) @ sae.W_enc + sae.b_enc
    errors = [(x - sae.b_dec - keep_largest(u, k, activation) @ sae.W_dec).square().sum() for k in KS]
    dense = 2 * sum(w * error for w, error in zip(loss.weights, errors, strict=True))
    dense = dense / (BATCH * trainee.state["variance"])
    torch.testing.assert_close(found.total, dense, rtol=1e-5, atol=0)
    found.total.backward()
    weights = [sae.W_enc, sae.b_enc, sae.W_dec, sae.b_dec]
    for weight, expected in zip(weights, torch.autograd.grad(dense, weights), strict=True):
        torch.testing.assert_close(weight.grad, expected, rtol=1e-4, atol=1e-5)
    kept = keep_largest(u, activation.k, activation).abs()  # a running threshold is that of inference
    if isinstance(activation, sl.BatchTopK):
        torch.testing.assert_close(found.smallest, kept[kept > 0].min().detach(), rtol=1e-4, atol=1e-6)
    assert abs(float(found.l0) - 7) < 1e-6 or not activation.signed


def test_the_mean_is_the_hierarchical_loss():
    x = draw(BATCH, D_IN, seed=2)
    losses = []
    for loss in (HierarchicalLoss(ks=KS), MultiTopKLoss(ks=KS, weights=(1 / 3,) * 3)):
        trainee = TrainingSAE(sl.SAE(config(loss), seed=0), sl.TrainConfig())
        trainee.prepare(draw(512, D_IN, seed=1))
        losses.append(trainee.objective(x).total.detach())
    torch.testing.assert_close(losses[0], losses[1])


def planted(n=12_000, seed=0):
    """Eight of 64 random directions a token, the i-th largest code 2^(-i/2)."""
    generator = torch.Generator().manual_seed(100 + seed)
    atoms = torch.nn.functional.normalize(torch.randn(64, 32, generator=generator), dim=1)
    places = torch.rand(n, 64, generator=generator).topk(8, dim=1).indices
    size = 2 ** (-torch.arange(8.0) / 2) * (1 + 0.2 * torch.rand(n, 8, generator=generator))
    return torch.zeros(n, 64).scatter(1, places, size) @ atoms


@unchecked()
def train(loss, x, activation):
    cfg = sl.SAEConfig(d_in=32, d_sae=64, activation=activation, objective=(loss, sl.AuxK()))
    return sl.SAE(cfg, seed=0).fit(x, sl.TrainConfig(n_tokens=40_000, batch_size=256), progress=False)


@pytest.mark.parametrize("activation", [sl.AbsTopK(k=8), sl.BatchTopK(k=8)], ids=lambda a: a.name)
def test_one_sae_reconstructs_with_few_latents_and_with_many(activation):
    x = planted()
    train_on, held_out = x[:10_000], x[10_000:]
    plain = train(sl.ReconstructionLoss(), train_on, activation)
    nested = train(HierarchicalLoss(ks=(2, 4, 8)), train_on, activation)
    few = [measure(sae.with_k(2, train_on), held_out)["fvu"] for sae in (plain, nested)]
    many = [measure(sae, held_out)["fvu"] for sae in (plain, nested)]
    assert few[1] < few[0] - 0.02 and many[1] < many[0] + 0.05


@each_activation
def test_with_k_is_a_view_of_the_same_weights_with_its_own_threshold(activation, tmp_path):
    x = draw(3_000, D_IN, seed=4)
    run = sl.TrainConfig(n_tokens=20 * BATCH, batch_size=BATCH)
    loss = HierarchicalLoss(ks=(2, 3, 7))
    sae = sl.SAE(config(loss, activation), seed=0).fit(x, run, progress=False)
    before = None if sae.threshold is None else sae.threshold.clone()
    other = sae.with_k(6, x)
    assert other.W_dec.data_ptr() == sae.W_dec.data_ptr() and other.cfg.activation == replace(activation, k=6)
    l0 = float(other.encode_sparse(x).l0.float().mean())
    # L0 on the sample ends within .2 % of k; a token has fewer than k positive pre-activations at times
    assert abs(l0 - 6) <= 0.012 or (type(activation) is sl.TopK and l0 <= 6)
    assert before is None or (torch.equal(sae.threshold, before) and other.threshold < before)
    expected = replace(activation, k=6)((x - sae.b_dec) @ sae.W_enc + sae.b_enc, other.threshold)
    torch.testing.assert_close(other.encode(x), expected, rtol=1e-4, atol=1e-5)
    other.save_pretrained(tmp_path)
    assert torch.equal(sl.SAE.from_pretrained(tmp_path).encode(x), other.encode(x))
    assert other.training_["n_tokens_seen"] == 20 * BATCH and "saved" not in other.training_


def test_configurations_and_runs_are_kept(tmp_path):
    cfg = config(MultiTopKLoss(ks=(3, 12), weights=(1, 1 / 8)))
    assert sl.SAEConfig.from_dict(cfg.to_dict()) == cfg
    x, every = draw(1_000, D_IN, seed=4), {"log_every_tokens": BATCH, "save_every_tokens": BATCH}
    run = sl.TrainConfig(n_tokens=8 * BATCH, batch_size=BATCH, **every)
    assert_resumes(lambda seed: sl.SAE(cfg, seed=seed), x, run, tmp_path)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: HierarchicalLoss(ks=(4, 4)), "`ks` must increase"),
        (lambda: HierarchicalLoss(ks=()), "`ks` must increase"),
        (lambda: MultiTopKLoss(ks=(4, 8), weights=(1,)), "a positive number for each of"),
        (lambda: MultiTopKLoss(ks=(4, 8), weights=(1, 0)), "a positive number for each of"),
        (lambda: config(HierarchicalLoss(ks=(1, 2))), r"must end between the activation's k \(3\)"),
        (lambda: config(HierarchicalLoss(ks=(3, 41))), r"d_sae \(40\), got \(3, 41\)"),
        (lambda: config(HierarchicalLoss(ks=KS), sl.ReLU()), "ranks the codes of TopK"),
        (lambda: config(HierarchicalLoss(ks=KS), sl.GroupMax(k=4)), "ranks the codes of TopK"),
        (lambda: config(HierarchicalLoss(ks=KS), encoder=sl.MatchingPursuit()), "a linear encoder"),
        (lambda: config(HierarchicalLoss(ks=KS), prefixes=(10, 40)), "`prefixes` must be None"),
        (
            lambda: config(HierarchicalLoss(ks=KS), sparsity_schedule=sl.Schedule(start=2.0, end=1.0)),
            "`sparsity_schedule` must be None",
        ),
        (lambda: sl.SAE(config(sl.ReconstructionLoss())).with_k(41), "`k` must be in 1..d_sae"),
        (lambda: sl.SAE(config(sl.ReconstructionLoss(), sl.ReLU())).with_k(4), "keeps the k largest"),
        (lambda: sl.SAE(config(sl.ReconstructionLoss(), sl.GroupMax(k=4))).with_k(8), "keeps the k largest"),
        (lambda: sl.SAE(config(sl.ReconstructionLoss(), sl.BatchTopK(k=3))).with_k(4), "`sample` must hold"),
        (
            lambda: sl.SAE(config(sl.ReconstructionLoss(), sl.BatchTopK(k=3))).with_k(4, draw(9, D_IN)),
            "threshold must be trained",
        ),
    ],
)
def test_what_makes_no_sense_is_refused_with_a_sentence(make, message):
    with pytest.raises(ValueError, match=message):
        make()

"""Gated SAEs: the three losses by the paper's formulas, inference as a JumpReLU, files, and planted atoms."""

from dataclasses import replace

import pytest
import torch
from unchecked import unchecked

import saelab as sl
from saelab.sae import Gated
from saelab.sae.activation_functions import MIN_THRESHOLD
from saelab.sae.fitting import cut_to, mean_l0
from saelab.sae.objectives import GateReconstructionLoss, LpPenalty
from saelab.sae.training_sae import TrainingSAE

D_IN, D_SAE, BATCH = 12, 40, 64


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def trainee_of(*terms, few=False, prepare=True, **axes):
    """A gated SAE with gates of its own, open where u exceeds thresholds around .5; `few`: only of two latents."""
    cfg = sl.SAEConfig(
        d_in=D_IN,
        d_sae=D_SAE,
        activation=Gated(coefficient=0.02),
        objective=(sl.ReconstructionLoss(), *terms),
        **axes,
    )
    sae = sl.SAE(cfg, seed=0)
    trainee = TrainingSAE(sae, sl.TrainConfig(n_tokens=64 * BATCH, batch_size=BATCH))
    rows = draw(512, D_IN, seed=1)
    trainee.prepare(rows if cfg.d_out is None else torch.cat([rows, rows.cumsum(1)], 1))
    with torch.no_grad():
        sae.r_mag.copy_(0.3 * draw(D_SAE, seed=2))
        sae.b_enc.copy_(0.3 * draw(D_SAE, seed=3))
        sae.set_gate(0.5 + 0.1 * draw(D_SAE, seed=4))
        if few:
            sae.set_gate(sae.threshold.index_fill(0, torch.arange(2, D_SAE), 50.0))
    return trainee


def paper_losses(trainee, x):
    """Reconstruction, penalty and auxiliary loss, dense, from the gate's weights: W_gate = exp(-r_mag) W_enc."""
    sae = trainee.sae
    x = sae.normalizer.normalize(x)
    read = x - sae.b_dec
    pi = read @ (sae.W_enc * (-sae.r_mag).exp()) + sae.b_gate
    z = (pi > 0) * (read @ sae.W_enc + sae.b_enc).relu()
    scale = BATCH * trainee.state["variance"]
    return {
        "reconstruction": (x - sae.b_dec - z @ sae.W_dec).square().sum() / scale,
        "sparsity": 0.02 * pi.relu().sum() / BATCH,
        "gate_reconstruction": (x - sae.b_dec.detach() - pi.relu() @ sae.W_dec.detach()).square().sum() / scale,
    }, z


@pytest.mark.parametrize("few", [False, True], ids=["dense", "sparse"])
def test_losses_and_gradients_are_those_of_the_paper(few):
    trainee, x = trainee_of(few=few), draw(BATCH, D_IN, seed=5)
    mine, (wanted, z) = trainee.objective(x), paper_losses(trainee, x)
    assert list(mine.terms) == ["reconstruction", "sparsity", "gate_reconstruction"] and (z != 0).any()
    assert mine.l0 == (z != 0).sum() / BATCH
    weights = dict(trainee.sae.named_parameters())
    assert {"W_enc", "b_enc", "W_dec", "b_dec", "r_mag", "b_gate"} == set(weights)
    for name, loss in mine.terms.items():
        torch.testing.assert_close(loss, wanted[name], rtol=1e-4, atol=0)
        grads, expected = (
            torch.autograd.grad(each, list(weights.values()), retain_graph=True, allow_unused=True)
            for each in (loss, wanted[name])
        )
        for weight, grad, other in zip(weights, grads, expected, strict=True):
            zero = torch.zeros_like(weights[weight])
            grad, other = (zero if g is None else g for g in (grad, other))
            torch.testing.assert_close(
                grad, other, rtol=1e-3, atol=1e-5 * max(1e-2, float(other.abs().max())), msg=f"{name} {weight}"
            )


def test_it_infers_as_a_jumprelu_whatever_the_gates_weights():
    trainee, x = trainee_of(), draw(BATCH, D_IN, seed=5)
    sae, z = trainee.sae, paper_losses(trainee, x)[1]
    torch.testing.assert_close(sae.encode(x), z, rtol=1e-4, atol=1e-5)
    jump = sl.SAE(replace(sae.cfg, activation=sl.JumpReLU()), seed=1)
    own = ("r_mag", "b_gate")
    jump.load_state_dict({name: t for name, t in sae.state_dict().items() if name not in own})
    assert torch.equal(sae.encode_sparse(x).to_dense(), jump.encode_sparse(x).to_dense())
    torch.testing.assert_close(sae.encode_latents(x, [3, 9]), sae.encode(x)[:, [3, 9]])
    u = sae.center(x) @ sae.W_enc + sae.b_enc
    assert torch.equal(sae.gate(u) > 1e-6, u > sae.threshold + 1e-6 * sae.r_mag.exp())


@pytest.mark.parametrize("axes", [{"normalizer": "whiten"}, {"d_out": D_IN, "skip": True}], ids=["whiten", "skip"])
def test_a_folded_one_has_the_same_gates(axes):
    sae, x = trainee_of(**axes).sae, draw(BATCH, D_IN, seed=5)
    folded = sae.fold()
    torch.testing.assert_close(folded.encode(x), sae.encode(x), rtol=1e-3, atol=1e-4)
    gates = [each.gate(each.center(x) @ each.W_enc + each.b_enc) for each in (sae, folded)]
    torch.testing.assert_close(gates[1], gates[0], rtol=1e-3, atol=1e-4)


def test_thresholds_stay_positive_and_follow_the_gates():
    trainee = trainee_of()
    sae = trainee.sae
    with torch.no_grad():
        sae.b_gate.add_(10.0)
    trainee.constrain_weights()
    torch.testing.assert_close(sae.threshold, torch.full((D_SAE,), MIN_THRESHOLD))
    torch.testing.assert_close(sae.b_enc - sae.r_mag.exp() * sae.b_gate, sae.threshold, atol=1e-5, rtol=0)
    rows = draw(2000, D_IN, seed=6)
    for target in (2.0, 6.0):
        assert cut_to(sae, rows, target) and mean_l0(sae, rows) == pytest.approx(target, rel=0.02)
        torch.testing.assert_close(sae.b_enc - sae.r_mag.exp() * sae.b_gate, sae.threshold, atol=1e-5, rtol=0)


def test_files_keep_the_gates(tmp_path):
    sae, x = trainee_of().sae, draw(BATCH, D_IN, seed=5)
    sae.save_pretrained(tmp_path / "own")
    loaded = sl.SAE.from_pretrained(tmp_path / "own")
    assert loaded.cfg == sae.cfg
    assert all(torch.equal(weight, loaded.state_dict()[name]) for name, weight in sae.state_dict().items())
    some = sl.SAE.from_pretrained(tmp_path / "own", latents=[5, 2])
    assert torch.equal(some.r_mag, sae.r_mag[[5, 2]])
    torch.testing.assert_close(some.encode(x), sae.encode(x)[:, [5, 2]])
    sae.save_pretrained(tmp_path / "lens", format="saelens")
    foreign = sl.SAE.from_pretrained(tmp_path / "lens")
    assert isinstance(foreign.cfg.activation, sl.JumpReLU)
    torch.testing.assert_close(foreign.encode(x), sae.encode(x), rtol=1e-4, atol=1e-5)


def test_the_auxiliary_loss_is_added_once_and_only_to_gates():
    term = GateReconstructionLoss(coefficient=0.5)
    cfg = trainee_of(term).sae.cfg
    assert [t.name for t in cfg.terms] == ["reconstruction", "sparsity", "gate_reconstruction"]
    assert cfg.terms[2].coefficient == 0.5 and sl.SAEConfig.from_dict(cfg.to_dict()) == cfg
    with pytest.raises(ValueError, match="must go with the activation Gated, got TopK"):
        sl.SAEConfig(d_in=D_IN, d_sae=D_SAE, activation=sl.TopK(k=3), objective=(sl.ReconstructionLoss(), term))


@unchecked()
def test_codes_of_planted_atoms_do_not_shrink():
    """At one L0 its error is far below L1's, with the exponent annealed too; without the auxiliary loss it is not."""
    generator = torch.Generator().manual_seed(0)
    atoms = torch.nn.functional.normalize(torch.randn(40, 16, generator=generator), dim=1)
    z = (torch.rand(8_000, 40, generator=generator) < 0.05) * (0.5 + torch.rand(8_000, 40, generator=generator))
    x = z @ atoms + 0.05 * torch.randn(8_000, 16, generator=generator)
    run = sl.TrainConfig(n_tokens=30_000, batch_size=256, lr=3e-3, n_held_out=2_000)
    fvu = {}
    for name, activation, terms in (
        ("l1", sl.ReLU(target_l0=3.0), ()),
        ("gated", Gated(target_l0=3.0), ()),
        ("annealed", Gated(target_l0=3.0), (LpPenalty(),)),
        ("off", Gated(target_l0=3.0), (GateReconstructionLoss(coefficient=0.0),)),
    ):
        cfg = sl.SAEConfig(d_in=16, d_sae=48, activation=activation, objective=(sl.ReconstructionLoss(), *terms))
        sae = sl.SAE(cfg, seed=0).fit(x, run, progress=False)
        fvu[name] = sae.training_["saved"]["fvu"]
    assert fvu["gated"] < 0.7 * fvu["l1"] and fvu["annealed"] < 0.7 * fvu["l1"]
    assert fvu["off"] > 1.2 * fvu["gated"]

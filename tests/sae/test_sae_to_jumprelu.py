"""`SAE.to_jumprelu`: as many codes as before on held-out tokens, the same ones where latents did not compete."""

import pytest
import torch
from unchecked import unchecked

import saelab as sl
from saelab.sae import AbsJumpReLU, Gated, GroupMax
from saelab.sae.fitting import mean_l0, measure

D_IN, D_SAE, K = 16, 48, 4


def planted(n, seed=0):
    atoms = torch.nn.functional.normalize(torch.randn(40, D_IN, generator=torch.Generator().manual_seed(7)), dim=1)
    generator = torch.Generator().manual_seed(100 + seed)
    z = torch.rand(n, 40, generator=generator) * (torch.rand(n, 40, generator=generator) < 0.1)
    return 4 * z @ atoms + 0.05 * torch.randn(n, D_IN, generator=generator)


def trained(activation, **axes):
    cfg = sl.SAEConfig(d_in=D_IN, d_sae=D_SAE, activation=activation, **axes)
    run = sl.TrainConfig(n_tokens=50_000, batch_size=256)
    return sl.SAE(cfg, seed=0).fit(planted(20_000), run, progress=False)


@pytest.mark.parametrize("activation", [sl.TopK(k=K), sl.AbsTopK(k=K)], ids=lambda a: a.name)
@unchecked()
def test_each_latent_keeps_its_density_and_the_sae_its_error(activation, tmp_path):
    sae, sample, fresh = trained(activation), planted(8_000, 1), planted(8_000, 2)
    weights = {name: t.clone() for name, t in sae.state_dict().items()}
    jump = sae.to_jumprelu(sample)
    assert type(jump.cfg.activation) is (AbsJumpReLU if activation.signed else sl.JumpReLU)
    counts = [(each.encode(sample) != 0).sum(0) for each in (sae, jump)]
    assert (counts[0] - counts[1]).abs().max() <= 1  # rounding at most moves the code next to the threshold
    before, after = measure(sae, fresh), measure(jump, fresh)
    # each count on fresh tokens is binomial, as is the one that its threshold was set on
    assert after["l0"] == pytest.approx(before["l0"], abs=6 * (2 * K / len(fresh)) ** 0.5)
    assert after["fvu"] < 2 * before["fvu"] < 0.5
    assert all(torch.equal(t, sae.state_dict()[name]) for name, t in weights.items())
    jump.save_pretrained(tmp_path)
    assert torch.equal(sl.SAE.from_pretrained(tmp_path).encode(fresh), jump.encode(fresh))
    half = sae.to_jumprelu(sample, target_l0=2.0)
    assert mean_l0(half, sample) == pytest.approx(2.0, rel=0.01) and half.cfg.activation.target_l0 == 2.0


@pytest.mark.parametrize("activation", [sl.BatchTopK(k=K), sl.BatchAbsTopK(k=K), Gated(target_l0=4.0)])
def test_thresholds_that_are_there_are_kept_and_so_are_all_codes(activation):
    sae = sl.SAE(sl.SAEConfig(d_in=D_IN, d_sae=D_SAE, activation=activation), seed=0)
    with torch.no_grad():
        sae.threshold.fill_(0.7)
    x = planted(500)
    assert torch.equal(sae.to_jumprelu(x[:10]).encode(x), sae.encode(x)) and (sae.encode(x) != 0).any()


def test_what_has_no_pre_activations_or_sample_is_refused():
    cfg = sl.SAEConfig(d_in=8, d_sae=16, activation=sl.TopK(k=2), encoder=sl.sae.MatchingPursuit(), normalizer="none")
    with pytest.raises(ValueError, match="chosen by pre-activations alone, got MatchingPursuit"):
        sl.SAE(cfg).to_jumprelu(torch.ones(4, 8))
    with pytest.raises(ValueError, match="chosen by pre-activations alone, got GroupMax"):
        sl.SAE(sl.SAEConfig(d_in=8, d_sae=16, activation=GroupMax(k=2))).to_jumprelu(torch.ones(4, 8))
    many = (sl.sae.objectives.HierarchicalLoss(ks=(1, 2, 4)), sl.AuxK())
    sae = sl.SAE(sl.SAEConfig(d_in=8, d_sae=16, activation=sl.TopK(k=2), objective=many))
    for other in (sae.to_jumprelu(torch.eye(8)), sae.with_k(6)):  # its loss terms are not those of such an activation
        assert other.cfg.objective == (sl.ReconstructionLoss(), sl.AuxK())
    with pytest.raises(ValueError, match="`target_l0` must be above 0"):
        sae.to_jumprelu(torch.eye(8), target_l0=0.0)
    with pytest.raises(ValueError, match="`sample` must hold activations"):
        sae.to_jumprelu(torch.ones(0, 8))

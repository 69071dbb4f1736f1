"""The k chosen where the true L0 is planted, and the decoder projection by plain sorting."""

import pytest
import torch
from unchecked import unchecked

import saelab as sl
from saelab.evaluation.sparsity_choice import choose_k, decoder_projection
from saelab.synthetic.planted import PlantedConfig, PlantedWorld


@unchecked()
def test_the_planted_l0_is_found():
    """Correlated features, as many latents as features: a k that is half or twice the L0 mixes them more."""
    world = PlantedWorld(
        PlantedConfig(n_features=32, d_in=48, l0=4.0, n_roots=0, zipf=0.3, correlation=0.5, n_factors=8), seed=0
    )
    x, _ = world.sample(6000, seed=1)
    cfg = sl.SAEConfig(d_in=48, d_sae=32, activation=sl.BatchTopK(k=4))
    train = sl.TrainConfig(n_tokens=80 * 256, batch_size=256, lr=1e-2, n_held_out=2048)
    found = choose_k(x, (2, 4, 7), cfg, train, progress=False)
    assert found.k == 4 and not found.at_end and "k=4" in str(found)
    assert found[2].fvu > found[4].fvu > found[7].fvu  # which says nothing
    assert found.to_dict()["k"] == 4 and found.n == 11


def test_projection_is_the_sorted_one():
    x = torch.randn(30, 6, generator=torch.Generator().manual_seed(0))
    for activation in (sl.TopK(k=2), sl.AbsTopK(k=2)):
        sae = sl.SAE(sl.SAEConfig(d_in=6, d_sae=10, activation=activation, dictionary="free"), seed=0)
        with torch.no_grad():
            sae.W_dec.mul_(torch.linspace(1, 3, 10)[:, None])
            sae.b_dec.fill_(0.5)
            plain = (x - 0.5) @ (sae.W_dec / sae.W_dec.norm(dim=1, keepdim=True)).T
        plain = plain.abs() if activation.signed else plain
        ranked = sorted(plain.flatten().tolist(), reverse=True)
        assert decoder_projection(sae, x, 3) == pytest.approx(ranked[3 * 30 - 1], abs=1e-5)


def test_what_cannot_be_compared_is_refused():
    x = torch.randn(300, 6, generator=torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match="three or more"):
        choose_k(x, (2, 2, 3))
    with pytest.raises(ValueError, match="has a k"):
        choose_k(x, (1, 2, 3), sl.SAEConfig(d_in=6, d_sae=32, activation=sl.ReLU()))
    with pytest.raises(ValueError, match="above every k"):
        choose_k(x, (1, 2, 3), n=3)
    short = sl.TrainConfig(n_tokens=512, batch_size=128, n_held_out=0)
    with pytest.raises(ValueError, match="`acts` must vary, got 1,000 equal rows"):
        choose_k(torch.full((1000, 6), 0.1), (1, 2, 3), train=short, progress=False)

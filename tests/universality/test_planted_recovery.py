"""Recovery of a planted world: right for the truth itself, chance for what is random, between for what is trained."""

import json

import numpy as np
import pytest
import torch
from unchecked import unchecked

import saelab as sl
from saelab.evaluation.feature_classifiers import encode_csr
from saelab.synthetic import PlantedConfig, PlantedWorld
from saelab.universality import planted_recovery
from saelab.universality.planted_recovery import score_recovery

WORLD = PlantedWorld(
    PlantedConfig(n_features=64, d_in=64, l0=3.0, n_roots=0, overlap=0.2, spread=0.0, zipf=0.2), seed=0
)


def of_truth(order=None, scale=1.0, d_sae=64):
    """An SAE whose latents are the planted directions, in another order, some of them left out or doubled."""
    order = torch.arange(64) if order is None else torch.as_tensor(order)
    cfg = sl.SAEConfig(d_in=64, d_sae=d_sae, activation=sl.JumpReLU(), dictionary="free", normalizer="none")
    sae = sl.SAE(cfg, seed=0)
    with torch.no_grad():
        rows = WORLD.directions[order]
        sae.W_enc.copy_(torch.linalg.pinv(WORLD.directions)[:, order] if len(order) == 64 else rows.T)
        sae.W_dec.copy_(scale * rows)
        sae.threshold.fill_(0.5)
    return sae


def test_the_truth_recovers_itself_in_any_order():
    order = torch.randperm(64, generator=torch.Generator().manual_seed(0))
    found = score_recovery(of_truth(order), WORLD, n_tokens=5_000)["SAE"]
    for name in ("mcc", "found", "uniqueness", "precision", "recall", "f1", "shrinkage"):
        assert abs(getattr(found, name) - 1) < 1e-4, name
    assert found.fvu < 1e-8 and found.l0 == found.true_l0 and abs(found.l0 - 3) < 0.1 and found.dead_frac == 0


def test_what_is_missing_or_doubled_counts():
    """The last 16 features have no latent; two latents share each of the first 16."""
    order = [*range(48), *range(16)]
    found = score_recovery(of_truth(order), WORLD, n_tokens=5_000)["SAE"]
    assert abs(found.uniqueness - 48 / 64) < 1e-9 and abs(found.found - 48 / 64) < 1e-9
    assert 0.75 < found.mcc < 0.75 + 0.25 * 0.2  # what is left is paired with directions at most .2 away
    small = score_recovery(of_truth(scale=0.5), WORLD, n_tokens=2_000)["SAE"]
    assert abs(small.shrinkage - 0.5) < 1e-4 and abs(small.fvu - 0.25) < 0.02


def test_firing_is_counted_as_by_hand():
    sae = of_truth()
    with torch.no_grad():
        sae.b_enc[:8] = 0.6  # these fire always, whose precision is their rate
        sae.threshold[8:16] = 5.0  # these never
    found = score_recovery(sae, WORLD, n_tokens=4_096, seed=7)["SAE"]
    x, codes = WORLD.sample(4_096, (7, 0))
    truth, latents = (codes.to_dense() != 0).numpy(), (sae.encode(x) != 0).numpy()
    true, detected, hits = truth.sum(0), latents.sum(0), (truth & latents).sum(0)
    scored = true >= 10
    precision = np.where(detected > 0, hits / np.maximum(detected, 1), 0)[scored].mean()
    np.testing.assert_allclose(found.precision, precision)
    np.testing.assert_allclose(found.recall, (hits / true)[scored].mean())
    np.testing.assert_allclose(found.f1, (2 * hits / (true + detected))[scored].mean())
    assert found.n_features == scored.sum() and found.dead_frac == 8 / 64


@unchecked()
def test_training_finds_what_random_directions_do_not(tmp_path):
    cfg = sl.SAEConfig(d_in=64, d_sae=64, activation=sl.TopK(k=3))
    held_out, _ = WORLD.sample(2_000, (5, 5))
    budget = sl.TrainConfig(n_tokens=90_000, batch_size=512, lr=5e-3)
    sae = sl.SAE(cfg, seed=0).fit(WORLD.batches(512), budget, held_out=held_out, progress=False)
    table = score_recovery(sae, WORLD, n_tokens=5_000, baselines={"truth": of_truth()})
    assert list(table.rows) == ["SAE", "untrained", "truth"]
    assert table["untrained"].mcc < 0.5 < 0.9 < table["SAE"].mcc <= table["truth"].mcc + 1e-6
    assert table["untrained"].f1 < table["SAE"].f1
    assert "true L0" in str(table) and "untrained" in str(table)
    table.save(tmp_path / "recovery.json")
    assert json.loads((tmp_path / "recovery.json").read_text())["rows"]["SAE"]["mcc"] == table["SAE"].mcc


def test_wide_dictionaries_are_paired_among_their_nearest_alike(monkeypatch):
    exact = score_recovery(of_truth(), WORLD, n_tokens=1_000)
    monkeypatch.setattr(planted_recovery, "ALL_PAIRS", 0)
    fast = score_recovery(of_truth(), WORLD, n_tokens=1_000)
    assert exact["SAE"] == fast["SAE"] and abs(exact["untrained"].mcc - fast["untrained"].mcc) < 0.02


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_in_half_precision_are_scored_as_such(dtype):
    cfg = sl.SAEConfig(d_in=64, d_sae=64, activation=sl.TopK(k=3))
    half, whole = (score_recovery(sl.SAE(cfg, seed=0).to(kind), WORLD, n_tokens=500) for kind in (dtype, torch.float32))
    assert half["SAE"].fvu == pytest.approx(whole["SAE"].fvu, rel=0.02)
    x, _ = WORLD.sample(100, 3)
    codes = encode_csr(sl.SAE(cfg, seed=0).to(dtype), x)
    assert codes.dtype == np.float32 and codes.nnz == 300


def test_other_widths_are_refused():
    with pytest.raises(ValueError, match=r"`sae` must be an autoencoder of the world's d_in \(64\)"):
        score_recovery(sl.SAE(sl.SAEConfig(d_in=8, d_sae=64)), WORLD)

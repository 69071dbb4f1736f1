"""Baselines of training: rows near their initial directions, and an encoder that is not trained."""

import json
from functools import cache

import pytest
import torch
from unchecked import unchecked

import saelab as sl
from saelab.sae.soft_frozen import SoftFrozen, project_to_cones

D_IN, D_SAE = 8, 40


def data(n=3_000, seed=0):
    generator = torch.Generator().manual_seed(seed)
    codes = (torch.rand(n, 24, generator=generator) < 0.1) * torch.rand(n, 24, generator=generator)
    return codes @ torch.randn(24, D_IN, generator=generator)


@unchecked()
def fit(x, n_tokens=20_000, out=None, resume=False, sinks=(), activation=None, **axes):
    cfg = sl.SAEConfig(d_in=D_IN, d_sae=D_SAE, activation=activation or sl.TopK(k=3), **axes)
    run = sl.TrainConfig(n_tokens=n_tokens, batch_size=200, log_every_tokens=2_000, save_every_tokens=2_000)
    return sl.SAE(cfg, seed=0).fit(x, run, out=out, resume=resume, sinks=sinks, progress=False)


@cache
def fitted(**axes):
    """To `data()`, once for all tests."""
    return fit(data(), **axes)


def cosines(sae):
    """With the directions that an SAE of this seed starts from."""
    return (sae.W_dec.detach() * sl.SAE(sae.cfg, seed=0).W_dec.detach()).sum(1)


@pytest.mark.parametrize("cosine", [-0.5, 0.0, 0.8, 0.99])
def test_the_projection_is_the_nearest_unit_row_in_the_cone(cosine):
    generator = torch.Generator().manual_seed(1)
    axes, rows = (torch.randn(200, 5, generator=generator) for _ in range(2))
    axes = axes / axes.norm(dim=1, keepdim=True)
    found = project_to_cones(rows, axes, cosine)
    torch.testing.assert_close(found.norm(dim=1), torch.ones(200))
    inside = (found * axes).sum(1)
    assert (inside >= cosine - 1e-5).all()
    unit = rows / rows.norm(dim=1, keepdim=True)
    already = (unit * axes).sum(1) >= cosine
    torch.testing.assert_close(found[already], unit[already])
    # no random row of the cone is nearer
    others = torch.randn(4_000, 5, generator=generator)
    others = others / others.norm(dim=1, keepdim=True)
    allowed = others @ axes.T >= cosine
    nearest = (others @ unit.T).masked_fill(~allowed, -2).amax(0)
    assert ((found * unit).sum(1) >= nearest - 1e-5).all()


def test_rows_stay_in_their_cones_and_use_them():
    near = cosines(fitted(dictionary=SoftFrozen()))
    assert near.min() >= 0.8 - 1e-5 and (near < 0.801).float().mean() > 0.2
    assert cosines(fitted(dictionary=SoftFrozen(cosine=0.99))).min() >= 0.99 - 1e-5
    assert cosines(fitted()).min() < 0.7


def test_baselines_come_between_untrained_and_trained():
    x = data()
    variance = (x - x.mean(0)).square().sum()

    def fvu(sae):
        return float((x - sae(x)).detach().square().sum() / variance)

    trained, soft, frozen = (
        fvu(fitted(**axes)) for axes in ({}, {"dictionary": SoftFrozen()}, {"dictionary": "frozen"})
    )
    untrained = fvu(sl.sae.make_untrained(fitted(), x))
    assert trained < soft < frozen < untrained
    assert trained < fvu(fitted(train_encoder=False)) < untrained


def test_an_encoder_that_is_not_trained_stays_as_it_starts():
    sae = fitted(train_encoder=False)
    start = sl.SAE(sae.cfg, seed=0).W_enc.detach()
    cosine = torch.cosine_similarity(sae.W_enc.detach(), start, dim=0)
    torch.testing.assert_close(cosine, torch.ones(D_SAE))  # scaled once, by the start's fit to the data
    assert sae.W_enc.detach().norm(dim=0).std() < 1e-6 and not sae.b_enc.any()
    assert cosines(sae).min() < 0.9
    with pytest.warns(UserWarning, match="must have its target L0"):
        steered = fit(data(), n_tokens=4_000, activation=sl.ReLU(target_l0=3.0), train_encoder=False)
    assert len(steered.b_enc.unique()) == 1 and steered.b_enc[0] < 0  # one shift of all


@pytest.mark.parametrize("axes", [{"dictionary": SoftFrozen()}, {"train_encoder": False}])
@pytest.mark.parametrize("activation", [sl.AbsTopK(k=3), sl.BatchTopK(k=3), sl.ReLU(target_l0=3.0)])
def test_they_are_saved_resumed_and_folded(tmp_path, axes, activation):
    x = data()
    plan = {"n_tokens": 8_000, "activation": activation, **axes}
    whole = fit(x, **plan)

    def stop(entry):
        if entry["step"] == 20:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(x, out=tmp_path / "run", sinks=[stop], **plan)
    resumed = fit(x, out=tmp_path / "run", resume=True, **plan)
    for name, weight in whole.state_dict().items():
        assert torch.equal(weight, resumed.state_dict()[name]), name
    whole.save_pretrained(tmp_path / "sae")
    loaded = sl.SAE.from_pretrained(tmp_path / "sae")
    assert loaded.cfg == whole.cfg and torch.equal(loaded.encode(x), whole.encode(x))
    folded = whole.fold()
    assert all(p.requires_grad for p in folded.parameters()) and folded.cfg.train_encoder
    torch.testing.assert_close(folded(x), whole(x), rtol=1e-3, atol=1e-4)
    plain = json.loads((tmp_path / "sae" / "config.json").read_text())["config"]
    assert ("train_encoder" in plain) == ("train_encoder" in axes)


def test_settings_without_sense_are_refused():
    with pytest.raises(ValueError, match="must be trained in one run"):
        fitted(dictionary=SoftFrozen()).fit(data(), sl.TrainConfig(n_tokens=2_000, batch_size=100), progress=False)
    with pytest.raises(ValueError, match="whose k is its number of groups"):
        sl.SAEConfig(
            d_in=4, d_sae=64, activation=sl.sae.GroupMax(k=4), sparsity_schedule=sl.Schedule(start=2.0, end=1.0)
        )
    for cosine in (1.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match=r"`cosine` must be in \(-1, 1\)"):
            SoftFrozen(cosine=cosine)
    with pytest.raises(ValueError, match="`train_encoder` must be true"):
        sl.SAEConfig(
            d_in=4,
            d_sae=64,
            encoder=sl.sae.MatchingPursuit(),
            normalizer="none",
            activation=sl.TopK(k=2),
            train_encoder=False,
        )

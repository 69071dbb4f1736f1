"""The SAE that is saved has the L0 that was asked for, says what it has, and penalties say what they weigh."""

import json
from dataclasses import dataclass, replace

import pytest
import torch
from unchecked import unchecked

import saelab as sl
from saelab.collecting.harvesting import sae_fingerprint
from saelab.collecting.reader import fingerprint
from saelab.sae import activation_functions, training_sae
from saelab.sae.activation_functions import AbsJumpReLU, Gated, Log1pReLU
from saelab.sae.fitting import cut_to, mean_l0
from saelab.stores.files import save_tensors
from saelab.stores.tensors import load_tensors
from saelab.stores.validation import SEAL

D_IN, D_SAE = 16, 64
TARGET = 5


def planted(n, seed=0, d=24):
    """Sparse sums of planted directions, and some noise."""
    generator = torch.Generator().manual_seed(7)
    directions = torch.nn.functional.normalize(torch.randn(d, D_IN, generator=generator), dim=1)
    generator = torch.Generator().manual_seed(100 + seed)
    codes = torch.rand(n, d, generator=generator) * (torch.rand(n, d, generator=generator) < 0.15)
    return 4 * codes @ directions + 0.05 * torch.randn(n, D_IN, generator=generator)


@unchecked()
def fitted(activation, n_tokens=60_000, seed=0, n=30_000, **axes):
    sae = sl.SAE(sl.SAEConfig(d_in=D_IN, d_sae=D_SAE, activation=activation, **axes), seed=seed)
    cfg = sl.TrainConfig(n_tokens=n_tokens, batch_size=256, seed=seed, n_held_out=8192)
    return sae.fit(planted(n, seed), cfg, progress=False)


@pytest.mark.parametrize(
    ("activation", "axes"),
    [
        (sl.BatchTopK(k=TARGET), {}),
        (sl.BatchTopK(k=TARGET), {"prefixes": (8, 24, D_SAE)}),
        (sl.BatchAbsTopK(k=TARGET), {}),
        (sl.JumpReLU(target_l0=float(TARGET)), {}),
        (sl.ReLU(target_l0=float(TARGET)), {}),
        (Log1pReLU(target_l0=float(TARGET)), {}),
        (AbsJumpReLU(target_l0=float(TARGET)), {}),
        (Gated(target_l0=float(TARGET)), {}),
    ],
    ids=["batch", "nested", "signed", "jump", "relu", "log1p", "absjump", "gated"],
)
def test_the_saved_sae_has_the_l0_that_was_asked_for(activation, axes, tmp_path):
    sae = fitted(activation, **axes)
    sae.save_pretrained(tmp_path)
    loaded = sl.SAE.from_pretrained(tmp_path)
    fresh = planted(8192, seed=50)
    l0 = (loaded.encode(fresh) != 0).sum(1).float()
    error = 4 * float(l0.std()) / len(l0) ** 0.5
    assert float(l0.mean()) == pytest.approx(TARGET, abs=0.05 * TARGET + error)
    said = sae.training_["saved"]
    assert said["met"] and said["target_l0"] == TARGET and said["held_out"] and said["n_tokens"] > 1000
    assert said["l0"] == sae.training_["last"]["l0"] and said["fvu"] == sae.training_["last"]["held_out_fvu"]
    assert said["l0"] == pytest.approx(float(l0.mean()), abs=error + 4 * float(l0.std()) / said["n_tokens"] ** 0.5)


def test_what_is_said_is_measured_on_the_saved_sae():
    """On the half of the held-out rows that neither training nor the cut has seen."""
    rows = planted(6000)
    held = planted(4096, seed=9)
    sae = sl.SAE(sl.SAEConfig(d_in=D_IN, d_sae=D_SAE, activation=sl.BatchTopK(k=TARGET)), seed=0)
    sae.fit(rows, sl.TrainConfig(n_tokens=20_000, batch_size=256), held_out=held, progress=False)
    said, kept = sae.training_["saved"], held.view(-1, 2, 128, D_IN)[:, 1].flatten(0, 1)
    z, x_hat = sae.encode(kept).detach(), sae(kept).detach()
    assert said["l0"] == pytest.approx(float((z != 0).sum(1).double().mean()))
    fvu = float((kept - x_hat).square().sum() / (kept - kept.mean(0)).square().sum())
    assert said["fvu"] == pytest.approx(fvu, rel=1e-4)
    assert said["dead_frac"] == pytest.approx(float((z == 0).all(0).double().mean()))
    assert float((sae.encode(held.view(-1, 2, 128, D_IN)[:, 0]) != 0).sum(-1).double().mean()) == pytest.approx(
        TARGET, rel=0.003
    )


def test_a_missed_target_is_said(tmp_path):
    """Ten steps are too few; its codes stay those that were trained."""
    sae = sl.SAE(sl.SAEConfig(d_in=D_IN, d_sae=D_SAE, activation=sl.JumpReLU(target_l0=2.0)), seed=0)
    with pytest.warns(UserWarning, match=r"must have its target L0 \(2\) within 5%, got .* train on more tokens"):
        sae.fit(planted(4000), sl.TrainConfig(n_tokens=2560, batch_size=256), progress=False)
    assert sae.training_["saved"]["met"] is False
    sae.save_pretrained(tmp_path)
    from saelab.cli.descriptions import describe_sae

    assert "MISSED by more than 5 %" in describe_sae(tmp_path)


def test_without_held_out_tokens_it_is_measured_on_what_comes_next():
    cfg = sl.TrainConfig(n_tokens=20_000, batch_size=256, n_held_out=0)
    sae = sl.SAE(sl.SAEConfig(d_in=D_IN, d_sae=D_SAE, activation=sl.BatchTopK(k=TARGET)), seed=0)
    sae.fit(planted(6000), cfg, progress=False)
    said = sae.training_["saved"]
    assert said["n_tokens"] >= 16_384 - 256 and not said["held_out"] and said["l0"] == pytest.approx(TARGET, rel=0.003)


@pytest.mark.parametrize("activation", [sl.TopK(k=3), sl.JumpReLU(coefficient=0.1), sl.ReLU(coefficient=0.1)])
def test_what_has_no_target_is_left_as_it_was_trained(activation):
    said = fitted(activation, n_tokens=10_000).training_["saved"]
    assert said["met"] is None and said["target_l0"] is None and said["l0"] > 0


@pytest.mark.parametrize(
    "activation",
    [
        sl.BatchTopK(k=4),
        sl.BatchAbsTopK(k=4),
        sl.JumpReLU(target_l0=4.0),
        AbsJumpReLU(target_l0=4.0),
        Gated(target_l0=4.0),
        sl.ReLU(target_l0=4.0),
    ],
    ids=lambda a: a.name,
)
@pytest.mark.parametrize("target", [1.0, 4.0, 20.0])
def test_one_number_brings_l0_to_any_target(activation, target):
    sae, rows = sl.SAE(sl.SAEConfig(d_in=D_IN, d_sae=D_SAE, activation=activation), seed=0), planted(3000)
    if activation.threshold == "running":
        sae.threshold.fill_(0.3)
    assert cut_to(sae, rows, target)
    assert mean_l0(sae, rows) == pytest.approx(target, rel=0.01)


def test_what_is_too_far_off_is_left_alone():
    sae, rows = sl.SAE(sl.SAEConfig(d_in=D_IN, d_sae=D_SAE, activation=sl.JumpReLU()), seed=0), planted(1000)
    before = sae.threshold.clone()
    assert not cut_to(sae, rows, 1.0, reach=0.25)
    assert torch.equal(sae.threshold, before)
    with torch.no_grad():
        sae.W_enc.zero_()  # nothing ever fires, at any threshold
    assert not cut_to(sae, rows, 1.0)
    assert torch.equal(sae.threshold, before)


@unchecked()
def test_a_penalty_says_what_it_weighs(monkeypatch):
    monkeypatch.setattr("saelab.sae.activation_functions.ACTIVATIONS", dict(activation_functions.ACTIVATIONS))

    @sl.register_activation("plain_penalty")
    @dataclass(frozen=True)
    class Plain(sl.sae.Activation):
        def __call__(self, u, threshold=None, training=False):
            return u.relu()

        def penalty(self, u, z, threshold):
            return z

    with pytest.raises(ValueError, match=r"must say what it weighs, got .*without `coefficient` and `target_l0`"):
        sl.SAEConfig(d_in=D_IN, d_sae=D_SAE, activation=Plain())

    @sl.register_activation("said_penalty")
    @dataclass(frozen=True)
    class Said(Plain):
        coefficient: float | None = 0.5
        target_l0: float | None = None

    cfg = sl.SAEConfig(d_in=D_IN, d_sae=D_SAE, activation=Said())
    trainee = training_sae.TrainingSAE(sl.SAE(cfg), sl.TrainConfig())
    assert trainee.state["coefficient"] == 0.5 and not trainee.steered
    aimed = sl.SAEConfig(d_in=D_IN, d_sae=D_SAE, activation=replace(Said(), coefficient=None, target_l0=6.0))
    sae = sl.SAE(aimed, seed=0)
    sae.fit(planted(20_000), sl.TrainConfig(n_tokens=100_000, batch_size=256), progress=False)
    assert sae.training_["saved"]["l0"] == pytest.approx(6.0, rel=0.25)


def test_files_that_spell_it_normaliser_still_load(tmp_path):
    """As saelab wrote them before its names were American; of a transcoder, which has two."""
    x = torch.randn(300, D_IN, generator=torch.Generator().manual_seed(0))
    cfg = sl.SAEConfig(d_in=D_IN, d_sae=16, d_out=D_IN, activation=sl.TopK(k=2), normalizer="scale")
    sae = sl.SAE(cfg).fit((x, 2 * x), sl.TrainConfig(n_tokens=256, batch_size=64), progress=False)
    sae.save_pretrained(tmp_path)
    described = (tmp_path / "config.json").read_text().replace('"normalizer"', '"normaliser"')
    (tmp_path / "config.json").write_text(json.dumps({k: v for k, v in json.loads(described).items() if k != SEAL}))
    tensors = load_tensors(tmp_path / "model.safetensors")
    names = {name: name.replace("normalizer.", "normaliser.") for name in tensors}
    assert sum(old != new for new, old in names.items()) == 6
    save_tensors(tmp_path / "model.safetensors", {names[name]: tensor.clone() for name, tensor in tensors.items()})
    old = sl.SAE.from_pretrained(tmp_path)
    assert old.cfg == sae.cfg and torch.equal(old(x), sae(x))
    assert sae_fingerprint(old) == fingerprint({names[name]: x for name, x in tensors.items()})  # as its store has it


def test_a_run_that_spells_it_normaliser_goes_on(tmp_path):
    x = planted(300)
    cfg = sl.SAEConfig(d_in=D_IN, d_sae=16, activation=sl.TopK(k=2), normalizer="scale")
    plan = sl.TrainConfig(n_tokens=256, batch_size=64)
    sae = sl.SAE(cfg).fit(x, plan, out=tmp_path, progress=False)
    progress, weights = tmp_path / "checkpoint" / "progress.json", tmp_path / "checkpoint" / "weights_0.safetensors"
    described = json.loads(progress.read_text().replace('"normalizer"', '"normaliser"'))
    progress.write_text(json.dumps({name: value for name, value in described.items() if name != SEAL}))
    tensors = {name.replace("normalizer.", "normaliser."): x.clone() for name, x in load_tensors(weights).items()}
    save_tensors(weights, tensors)
    assert "normaliser" in described["config"] and any("normaliser." in name for name in tensors)
    again = sl.SAE(cfg, seed=5).fit(x, plan, out=tmp_path, resume=True, progress=False)
    assert all(torch.equal(a, b) for a, b in zip(sae.state_dict().values(), again.state_dict().values(), strict=True))

"""Nearly equal rows of a dictionary and their replacement in training, and normalizers of a control set."""

from dataclasses import replace

import pytest
import torch
from resuming import assert_resumes

import saelab as sl
from saelab.sae import DuplicateReset, fit_normalizer

D_IN, D_SAE = 8, 24


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def config(reset=None, **axes):
    axes = {"normalizer": "scale", "encoder": sl.OrthogonalMatchingPursuit(), **axes}
    return sl.SAEConfig(d_in=D_IN, d_sae=D_SAE, activation=sl.AbsTopK(k=3), duplicates=reset, **axes)


RUN = sl.TrainConfig(n_tokens=600, batch_size=30, log_every_tokens=30, save_every_tokens=30)


@pytest.mark.parametrize("signed", [True, False])
def test_duplicates_are_later_rows_of_a_small_angle(signed, monkeypatch):
    monkeypatch.setattr("saelab.sae.duplicates.CHUNK_NUMBERS", 5 * D_SAE)
    W = draw(D_SAE, D_IN)
    W[7], W[20], W[11] = 3 * W[2], 0.5 * W[2], -W[4]
    unit = W / W.norm(dim=1, keepdim=True)
    cosines = (unit @ unit.T).abs() if signed else unit @ unit.T
    wanted = torch.tensor([bool((cosines[j, :j] > 0.9).any()) for j in range(D_SAE)])
    found = DuplicateReset().find(W, signed)
    assert torch.equal(found, wanted) and found[7] and found[20] and found[11] == signed and not found[2]


def test_they_are_replaced_when_due_and_others_kept():
    W, reset = draw(D_SAE, D_IN), DuplicateReset(every_steps=5)
    W[7] = 3 * W[2]
    now = W.clone()
    reset.replace(now, True, n_steps=4, seed=0)
    assert torch.equal(now, W)
    reset.replace(now, True, n_steps=5, seed=0)
    changed = (now != W).any(1)
    assert changed.tolist() == reset.find(W, True).tolist() and changed[7]
    torch.testing.assert_close(now.norm(dim=1), W.norm(dim=1))


def test_training_keeps_rows_apart(tmp_path):
    """Rows that start equal never differ, as a pursuit uses the first of them; with replacement they do."""
    x = draw(1000, D_IN, seed=1)
    pairs = []
    for reset in (None, DuplicateReset(every_steps=5)):
        sae = sl.SAE(config(reset), seed=0)
        with torch.no_grad():
            sae.W_dec[12:] = sae.W_dec[:12]
        sae.training_ = {}  # goes on from these weights
        sae.fit(x, RUN, progress=False)
        pairs.append(int(DuplicateReset().find(sae.W_dec, True).sum()))
    assert pairs[0] >= 8 > pairs[1]


def test_a_resumed_run_replaces_the_same_rows(tmp_path):
    x, cfg = draw(1000, D_IN, seed=1), config(DuplicateReset(cos=0.5, every_steps=3))
    whole = assert_resumes(lambda seed: sl.SAE(cfg, seed=seed), x, RUN, tmp_path / "run", at=8)
    assert not torch.equal(whole.W_dec, sl.SAE(replace(cfg, duplicates=None), seed=0).fit(x, RUN, progress=False).W_dec)
    whole.save_pretrained(tmp_path / "sae")
    assert sl.SAE.from_pretrained(tmp_path / "sae").cfg == cfg and "duplicates" not in config().to_dict()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: config(DuplicateReset(), encoder="linear"), "`duplicates` must go with a pursuit"),
        (lambda: config(DuplicateReset(), dictionary="frozen"), "a dictionary of free rows"),
        (lambda: DuplicateReset(cos=1.0), r"`cos` must be in \(0, 1\)"),
        (lambda: DuplicateReset(every_steps=0), "`every_steps` must be at least 1"),
    ],
)
def test_bad_replacements_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("kind", ["scale", "whiten"])
@pytest.mark.parametrize("encoder", ["linear", sl.ICFL(latents_per_round=3)])
def test_training_keeps_a_normalizer_of_controls(kind, encoder, tmp_path):
    control, x = 5 + 3 * draw(2000, D_IN, seed=1), draw(1000, D_IN, seed=2)
    sae = sl.SAE(config(normalizer=kind, encoder=encoder), seed=0)
    fit_normalizer(sae, control)
    normal = sae.normalizer.normalize(control)
    torch.testing.assert_close(normal.mean(0), torch.zeros(D_IN), atol=1e-3, rtol=0)
    assert abs(float(normal.square().mean()) - 1) < 1e-3
    sae.save_pretrained(tmp_path)
    sae = sl.SAE.from_pretrained(tmp_path)  # a file keeps it too
    before = {name: tensor.clone() for name, tensor in sae.normalizer.state_dict().items()}
    sae.fit(x, RUN, progress=False)
    assert all(torch.equal(tensor, before[name]) for name, tensor in sae.normalizer.state_dict().items())
    plain = sl.SAE(config(normalizer=kind, encoder=encoder), seed=0).fit(x, RUN, progress=False)
    assert not torch.allclose(plain.normalizer.mean, sae.normalizer.mean, atol=1.0)
    with pytest.raises(ValueError, match="must not be trained yet"):
        fit_normalizer(sae, control)
    assert sae.history_[-1]["held_out_fvu"] < 1


def test_normalizers_of_controls_are_refused_where_there_are_none():
    with pytest.raises(ValueError, match="must be 'scale' or 'whiten' to be fitted, got 'none'"):
        fit_normalizer(sl.SAE(config(normalizer="none")), draw(100, D_IN))
    with pytest.raises(ValueError, match="`d_in` of the SAE must be"):
        fit_normalizer(sl.SAE(config()), draw(100, D_IN + 1))
    pair = sl.SAE(sl.SAEConfig(d_in=D_IN, d_out=4, d_sae=D_SAE, activation=sl.TopK(k=3)))
    fit_normalizer(pair, (draw(100, D_IN), 7 + draw(100, 4)))
    assert pair.normalizer.fitted and float(pair.target_normalizer.mean.mean()) > 6

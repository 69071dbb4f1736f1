"""Baselines of a trained SAE: what they hold fixed, what they share with it, and where they can go."""

import pytest
import torch
from unchecked import unchecked

import saelab as sl
from saelab.sae.baselines import check_baselines, fit_baselines, load_baselines
from saelab.sae.fitting import mean_l0
from saelab.synthetic import PlantedConfig, PlantedWorld

WORLD = PlantedWorld(PlantedConfig(n_features=24, d_in=20, l0=2.0, n_roots=0, zipf=0.2, overlap=0.4), seed=0)
X = WORLD.sample(4_000, 1)[0]
RUN = sl.TrainConfig(n_tokens=40_000, batch_size=250, seed=5, lr=3e-3)


@unchecked()
def trained(**axes):
    cfg = sl.SAEConfig(**{"d_in": 20, "d_sae": 24, "activation": sl.TopK(k=2), **axes})
    return sl.SAE(cfg, seed=1).fit(X, RUN, progress=False)


@pytest.fixture(scope="module")
def sae():
    return trained()


@pytest.fixture(scope="module")
@unchecked()
def found(sae):
    return fit_baselines(sae, X, methods=["kmeans", "frozen_encoder", "frozen_decoder", "soft_frozen", "l3"], seed=7)


def test_each_holds_its_part_where_it_started(sae, found):
    start = sl.SAE(sae.cfg, seed=7)
    assert list(found) == ["kmeans", "frozen_encoder", "frozen_decoder", "soft_frozen", "l3"]
    read = found["frozen_encoder"].W_enc
    turned = torch.nn.functional.cosine_similarity(read, start.W_enc, dim=0)
    assert turned.min() > 1 - 1e-5 and read.norm(dim=0).std() < 1e-5  # scaled to the data, as training starts
    assert not torch.allclose(found["frozen_encoder"].W_dec, start.W_dec, atol=0.05)
    assert torch.equal(found["frozen_decoder"].W_dec, start.W_dec)
    assert not torch.allclose(found["frozen_decoder"].W_enc, start.W_enc, atol=0.05)
    cosines = (found["soft_frozen"].W_dec * start.W_dec).sum(1)
    assert cosines.min() > 0.8 - 1e-4 and cosines.mean() < 0.99


def test_they_are_trained_as_the_sae_was(sae, found):
    for name in ("frozen_encoder", "frozen_decoder", "soft_frozen"):
        ours, its = found[name].training_, sae.training_
        assert all(ours[key] == its[key] for key in ("n_tokens", "batch_size", "seed", "lr", "n_tokens_seen")), name
    shorter = sl.TrainConfig(n_tokens=1_000, batch_size=250)
    assert fit_baselines(sae, X, shorter, methods=["soft_frozen"])["soft_frozen"].training_["n_tokens"] == 1_000


def test_classical_ones_have_its_shape_and_l0():
    relu = trained(activation=sl.ReLU(target_l0=4.0))
    found = fit_baselines(relu, X, methods=["kmeans", "pca"])
    k = round(mean_l0(relu, X))
    assert found["kmeans"].cfg.d_sae == 24 and found["pca"].cfg.d_sae == 20
    assert abs(found["pca"].cfg.activation.k - k) <= 1 and k > 1


def test_training_finds_what_they_do_not(sae, found):
    table = sl.universality.score_recovery(sae, WORLD, n_tokens=4_000, baselines=found)
    assert list(table.rows) == ["SAE", "untrained", *found]
    for name in ("frozen_encoder", "frozen_decoder", "soft_frozen"):
        assert table["SAE"].mcc > table[name].mcc + 0.03, name  # .09 and more in five worlds
    assert table["soft_frozen"].mcc > table["frozen_decoder"].mcc + 0.1


def test_the_usual_ones_are_those_that_it_can_have(sae):
    short = sl.TrainConfig(n_tokens=500, batch_size=250)
    assert list(fit_baselines(sae, X, short)) == ["frozen_encoder", "soft_frozen", "ica", "l3", "kmeans"]
    pursuit = sl.SAE(sl.SAEConfig(d_in=20, d_sae=24, activation=sl.TopK(k=2), encoder=sl.OrthogonalMatchingPursuit()))
    assert list(fit_baselines(pursuit, X, short)) == ["soft_frozen", "ica", "l3", "kmeans"]
    coder = sl.SAE(sl.SAEConfig(d_in=20, d_out=20, d_sae=24, activation=sl.TopK(k=2)))
    assert list(fit_baselines(coder, (X, X.flip(1)), short)) == ["frozen_encoder", "soft_frozen"]
    loss = sl.sae.objectives.MatryoshkaLoss(by_rate=True)  # puts rows in an order that soft-frozen ones cannot take
    ordered = sl.SAE(sl.SAEConfig(d_in=20, d_sae=24, activation=sl.TopK(k=2), prefixes=(8, 24), objective=(loss,)))
    assert list(fit_baselines(ordered, X, short)) == ["frozen_encoder", "ica", "l3", "kmeans"]
    with pytest.raises(ValueError, match="ones that this SAE can have, got 'ica': it is a transcoder"):
        fit_baselines(coder, (X, X), short, methods=["ica"])
    with pytest.raises(
        ValueError, match="ones that this SAE can have, got 'frozen_encoder': its encoder is Orthogonal"
    ):
        fit_baselines(pursuit, X, short, methods=["frozen_encoder"])
    with (
        pytest.raises(ValueError, match=r"`methods` must be of .*'soft_frozen', 'joint', 'ica'.*, got 'svd'"),
        unchecked(),
    ):
        fit_baselines(sae, X, methods=["svd"])
    with pytest.raises(ValueError, match="`acts` must be collected for 'l3', got a stream"):
        fit_baselines(sae, WORLD.batches(250), short, methods=["l3"])


def test_a_folder_of_them_is_read_by_name(sae, found, tmp_path):
    for name, each in found.items():
        each.save_pretrained(tmp_path / name)
    (tmp_path / "notes").mkdir()
    read = load_baselines(tmp_path)
    assert set(read) == set(found)
    assert all(torch.equal(read[name].encode(X[:50]), found[name].encode(X[:50])) for name in found)
    with pytest.raises(FileNotFoundError, match="must hold folders of SAEs, got none"):
        load_baselines(tmp_path / "notes")


def test_names_and_widths_must_fit(sae, found):
    check_baselines(found, sae.cfg, ["pca"])
    with pytest.raises(ValueError, match=r"must differ from \['l3'\], got 'l3'; give it another"):
        check_baselines(found, sae.cfg, ["l3"])
    with pytest.raises(ValueError, match=r"the SAE's widths \(in, out\) \(20, 20\), got .* as 'other'"):
        check_baselines({"other": sl.SAE(sl.SAEConfig(d_in=8, d_sae=64))}, sae.cfg, [])

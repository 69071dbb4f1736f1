"""Dead features: planted ones of every kind and cause, and intervals against their definition."""

import numpy as np
import pytest
import torch
from scipy.stats import binom

import saelab as sl
from saelab.analysis.density import clopper_pearson, dead_feature_changes, find_reach

HOOK = "blocks.1.hook_resid_post"
D_SAE = 64


@pytest.fixture(scope="module")
def acts(tiny, tiny_tokens):
    return sl.collect(tiny, tiny_tokens, HOOK, progress=False)


def planted(activation):
    """Features 0 and 2 to 5 are silent, some for a reason of their own; feature 6 fires nearly always."""
    sae = sl.SAE(sl.SAEConfig(d_in=32, d_sae=D_SAE, activation=activation), seed=0)
    with torch.no_grad():
        sae.normalizer.fit(torch.randn(64, 32, generator=torch.Generator().manual_seed(0)))
        sae.b_enc += 0.01 * torch.randn(D_SAE, generator=torch.Generator().manual_seed(1))
        sae.W_enc[:, 0] *= 1e-3
        sae.W_enc[:, 2:6] *= 1e-9
        sae.b_enc[2:6] = -1e-9
        sae.W_dec[3] = sae.W_dec[10]
        sae.W_dec[4] = -sae.W_dec[11]
        sae.b_enc[6] = 50.0
    return sae


def test_planted_features_get_their_kinds_and_causes(tiny, tiny_tokens, acts, tmp_path):
    sae = planted(sl.AbsTopK(k=4))
    store = sl.harvest(sae, tiny, tiny_tokens, tmp_path, hook_point=HOOK, progress=False)
    found = sl.analysis.dead_features(store, sae, acts[:512], dense_rate=0.5)
    assert {0, 2, 3, 4, 5} <= set(found.of_kind("dead"))
    assert 6 in found.of_kind("dense")
    assert "encoder norm collapsed" in found.causes[0] and "never near selection" in found.causes[0]
    assert "duplicate of a live feature" in found.causes[3] and "antipode of a live feature" in found.causes[4]
    assert "duplicate of a live feature" not in found.causes[5]
    fires = np.count_nonzero(store.matrix().toarray(), axis=0)
    assert np.array_equal(found.fires, fires)
    assert sum(found.share(kind) for kind in ("dead", "near-dead", "live", "dense", "outlier")) == pytest.approx(1)
    assert {"dead", "live"} <= set(found.kinds) and found.kinds.count("dead") == (fires == 0).sum()


def test_a_low_bias_is_named(tiny, tiny_tokens, tmp_path):
    sae = planted(sl.ReLU())
    with torch.no_grad():
        sae.b_enc[20] = -1e3
    store = sl.harvest(sae, tiny, tiny_tokens, tmp_path, hook_point=HOOK, progress=False)
    found = sl.analysis.dead_features(store, sae)
    assert found.causes[20] == ("bias too low",)


def test_kinds_follow_their_rates_and_signs_count(tiny, tiny_tokens, tmp_path):
    """A feature that only ever fires negatively is alive."""
    sae = sl.SAE(sl.SAEConfig(d_in=32, d_sae=D_SAE, activation=sl.AbsTopK(k=2)), seed=0)
    with torch.no_grad():
        sae.b_enc[7] = -60.0
    store = sl.harvest(sae, tiny, tiny_tokens, tmp_path, hook_point=HOOK, progress=False)
    assert store.statistics.fires[7].tolist() == [0, len(store)]
    found = sl.analysis.dead_features(store, near_dead_rate=0.01, dense_rate=0.6)
    assert found.kinds[7] == "dense"
    for kind, rate in zip(found.kinds, found.rates, strict=True):
        wanted = "dead" if rate == 0 else "near-dead" if rate < 0.01 else "dense" if rate > 0.6 else "live"
        assert kind == wanted
    assert found.causes == {} and found.groups == {"0 to 63": {k: found.kinds.count(k) for k in set(found.kinds)}}


def test_intervals_are_those_of_the_definition():
    """At each end of the interval, the count seen or one beyond it has half the error's probability."""
    fires, n = np.array([1, 3, 50, 99]), 100
    low, high = clopper_pearson(fires, n, 0.9)
    assert np.allclose(binom.sf(fires - 1, n, low), 0.05) and np.allclose(binom.cdf(fires, n, high), 0.05)
    low, high = clopper_pearson(np.array([0, n]), n, 0.95)
    assert low[0] == 0 and binom.pmf(0, n, high[0]) == pytest.approx(0.05) and high[1] == 1
    assert clopper_pearson(np.array([0]), 10**6, 0.95)[1][0] == pytest.approx(3e-6, rel=0.01)


def test_groups_and_training_are_held_against_the_store(tiny, tiny_tokens, acts, tmp_path):
    cfg = sl.SAEConfig(
        d_in=32, d_sae=512, activation=sl.TopK(k=4), prefixes=(16, 128, 512), objective=(sl.ReconstructionLoss(),)
    )
    sae = sl.SAE(cfg, seed=0).fit(acts, sl.TrainConfig(n_tokens=16_384, batch_size=256), progress=False)
    store = sl.harvest(sae, tiny, tiny_tokens, tmp_path, progress=False)
    found = sl.analysis.dead_features(store, sae)
    assert list(found.groups) == ["0 to 15", "16 to 127", "128 to 511", "all"]
    assert sum(sum(counts.values()) for name, counts in found.groups.items() if name != "all") == 512
    dead, then = set(found.of_kind("dead")), set(sae.training_["dead"])
    assert found.training == {
        "both": len(dead & then),
        "training only": len(then - dead),
        "store only": len(dead - then),
    }
    assert len(dead & then) > 0
    assert str(found) and "all" in found._repr_html_()
    found.save(tmp_path / "dead.json")
    steps = dead_feature_changes([found, sl.analysis.dead_features(store, near_dead_rate=0.0)])
    assert steps == [{"died": 0, "revived": 0, "stayed dead": len(dead)}]


def test_reach_is_one_where_a_feature_fires(acts):
    sae = sl.SAE(sl.SAEConfig(d_in=32, d_sae=D_SAE, activation=sl.AbsTopK(k=3)), seed=1)
    x = acts[:400]
    fired = sae.encode(x).ne(0).any(0)
    reach = find_reach(sae, x, torch.arange(D_SAE))
    assert torch.equal(reach >= 0.999999, fired)


def test_nonsense_is_refused(tiny, tiny_tokens, tmp_path):
    sae = sl.SAE(sl.SAEConfig(d_in=32, d_sae=D_SAE, activation=sl.TopK(k=2)))
    store = sl.harvest(sae, tiny, tiny_tokens, tmp_path, hook_point=HOOK, progress=False)
    with pytest.raises(ValueError, match="near_dead_rate < dense_rate"):
        sl.analysis.dead_features(store, near_dead_rate=0.5, dense_rate=0.1)
    with pytest.raises(ValueError, match="must be the one that was harvested, 64 features"):
        sl.analysis.dead_features(store, sl.SAE(sl.SAEConfig(d_in=32, d_sae=8, activation=sl.TopK(k=2))))
    with pytest.raises(ValueError, match="`kind`"):
        sl.analysis.dead_features(store).of_kind("zombie")

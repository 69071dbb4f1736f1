"""Planted groups of features are found by co-firing, and planted properties by correlation; permuted ones are not."""

import numpy as np
import pytest
from corpora_made import harvest_codes
from scipy.stats import spearmanr
from sklearn.metrics import adjusted_mutual_info_score
from unchecked import unchecked

from saelab.corpora import cluster_features, correlate_property, pool_documents

N, GROUPS, EACH = 300, 4, 6


@pytest.fixture(scope="module")
def grouped(tmp_path_factory):
    """Documents of two topics each of four, and features that fire with .5 for a document's topics, .05 for others."""
    rng = np.random.default_rng(0)
    topics = np.stack([rng.permutation(GROUPS)[:2] for _ in range(N)])
    own = (topics[:, :, None] == np.arange(GROUPS)).any(1).repeat(EACH, axis=1)
    fires = rng.random((N, GROUPS * EACH)) < np.where(own, 0.5, 0.05)
    signs = np.where(np.arange(GROUPS * EACH) % 2, -1, 1)
    folder = tmp_path_factory.mktemp("grouped")
    return pool_documents(harvest_codes(fires * signs * rng.uniform(1, 2, fires.shape), np.arange(N), folder))


def test_features_of_one_topic_are_one_cluster(grouped) -> None:
    found = cluster_features(grouped, GROUPS, labels={0: "first"})
    truth, said = [], []
    for i, cluster in enumerate(found.clusters):
        truth += [feature // EACH for feature, _ in cluster.members]
        said += [i] * len(cluster.members)
        assert all(sign == (-1 if feature % 2 else 1) for feature, sign in cluster.members)
        assert cluster.inside > 0.05 > cluster.outside
    assert adjusted_mutual_info_score(truth, said) > 0.9 and len(truth) == GROUPS * EACH
    assert found.contrast > 3 * abs(found.contrast_null)
    insides = [cluster.inside for cluster in found.clusters]
    assert insides == sorted(insides, reverse=True) and "0 (first)" in str(found)


def test_clusters_of_nothing_look_like_their_null(tmp_path) -> None:
    rng = np.random.default_rng(1)
    fires = (rng.random((N, 24)) < 0.3).astype(float)
    found = cluster_features(pool_documents(harvest_codes(fires, np.arange(N), tmp_path)), GROUPS)
    # phi of two independent features has standard error 1 / sqrt(N); clusters choose among them
    assert found.contrast_null > 0 and abs(found.contrast - found.contrast_null) < 1.5 / N**0.5


def test_impossible_numbers_of_clusters_are_refused(grouped) -> None:
    for n in (1, GROUPS * EACH + 1):
        with pytest.raises(ValueError, match=r"`n_clusters` must be 2 to the 24 sides"):
            cluster_features(grouped, n)


@pytest.mark.parametrize("kind", ["number", "boolean"])
def test_a_planted_property_is_found_with_its_direction(grouped, kind) -> None:
    rng = np.random.default_rng(2)
    values = 2 * (grouped.side(4) > 0) - 2 * (grouped.side((7, -1)) > 0) + rng.normal(size=N)
    values = values > 0 if kind == "boolean" else values
    found = correlate_property(grouped, values, labels={4: "up"})
    rows = {(row.feature, row.sign): row for row in found.rows}
    assert {(row.feature, row.sign) for row in found.rows[:2]} == {(4, 1), (7, -1)}
    assert rows[4, 1].r.low > 0 > rows[7, -1].r.high and rows[4, 1].name == "up"
    assert rows[4, 1].r.value == pytest.approx(spearmanr(grouped.side(4), values)[0])
    assert "go with the property at FDR 0.05" in str(found)


@unchecked()
@pytest.mark.parametrize("kind", ["number", "boolean", "ranks"])
def test_a_property_of_no_feature_gives_p_values_of_chance(grouped, kind) -> None:
    rng, p = np.random.default_rng(3), []
    for _ in range(25):
        values = {"number": rng.normal(size=N), "boolean": rng.random(N) < 0.3, "ranks": rng.integers(0, 3, N)}[kind]
        p += [row.p for row in correlate_property(grouped, values).rows]
    assert len(p) == 25 * 24
    for level in (0.5, 0.1, 0.02):  # features of one document depend on each other: three times the binomial error
        assert abs((np.array(p) <= level).mean() - level) < 3 * 3 * (level * (1 - level) / len(p)) ** 0.5


def test_properties_that_do_not_fit_are_refused(grouped) -> None:
    for values in (np.arange(N - 1), np.ones(N), np.where(np.arange(N) == 3, np.nan, 1.0)):
        with pytest.raises(ValueError, match="`values` must be 300 finite numbers"):
            correlate_property(grouped, values)

"""Lobes: planted groups of features are found and agree with planted directions, and with nothing else."""

import json
from dataclasses import replace
from itertools import permutations

import numpy as np
import pytest
import torch
from corpora_made import harvest_codes
from dictionaries import sae_of
from scipy.sparse import csr_matrix
from sklearn.cluster import SpectralClustering
from sklearn.metrics import adjusted_mutual_info_score as ami

import saelab as sl
from saelab.geometry.group_agreement import cosine_contrast
from saelab.geometry.spectral_clusters import NormalizedVectors, SpectralClusters
from saelab.lm.token_labels import TokenLabels

N_GROUPS, SIZE, D_IN = 4, 12, 16
D_SAE = N_GROUPS * SIZE
GROUP = np.repeat(np.arange(N_GROUPS), SIZE)
N_DOCS, LENGTH = 80, 40
DOCS = np.repeat(np.arange(N_DOCS), LENGTH)
FEW = {"n_lobes": (2, N_GROUPS), "window": 10, "n_draws": 2}


@pytest.fixture(scope="module")
def rng():
    return np.random.default_rng(0)


@pytest.fixture(scope="module")
def codes(rng):
    """Each window of ten tokens has a topic, whose group of features fires often there, and elsewhere seldom."""
    topic = np.repeat(rng.integers(N_GROUPS, size=len(DOCS) // 10), 10)
    rate = np.where(topic[:, None] == GROUP, 0.15, 0.004)
    return ((rng.random(rate.shape) < rate) * rng.uniform(1, 2, rate.shape)).astype(np.float32), topic


@pytest.fixture(scope="module")
def saes(rng):
    """Directions that are near those of their group, and directions at random."""
    centers = rng.standard_normal((N_GROUPS, D_IN))
    near = centers[GROUP] + 0.3 * rng.standard_normal((D_SAE, D_IN))
    rows = {"near": near, "random": rng.standard_normal((D_SAE, D_IN))}
    return {name: sae_of(torch.from_numpy(one).float()) for name, one in rows.items()}


@pytest.mark.parametrize("affinity", ["cosine + 1", "max(cosine, 0)"])
def test_planted_lobes_are_found_and_are_clusters_of_directions(codes, saes, affinity):
    z, topic = codes
    labels = TokenLabels.of(np.eye(N_GROUPS, dtype=bool)[topic], [f"topic {i}" for i in range(N_GROUPS)])
    found = sl.lobes(
        z, saes["near"], labels=labels, doc_ids=DOCS, affinity=affinity,
        baselines={"random": (z, saes["random"])}, **FEW,
    )  # fmt: skip
    own, random = found.at(N_GROUPS), found.baselines["random"].at(N_GROUPS)
    assert ami(own.lobes, GROUP) == pytest.approx(1) == own.ami == own.ami_halves == own.meaning
    assert own.contrast_z > 10 and own.ami_z > 10 and own.contrast > 0.5
    assert abs(own.meaning_permuted) < 0.2 and max(map(abs, own.contrast_z_random)) < 5
    assert abs(random.contrast_z) < 5 and random.ami < 0.2 and random.ami_halves == pytest.approx(1)
    assert own.accuracy == pytest.approx(1) or np.isnan(own.accuracy)
    assert found.failed == () or all(one.startswith("random reaches meaning") for one in found.failed)
    assert [len(lobe.members) for lobe in found.lobes] == [SIZE] * N_GROUPS
    assert {lobe.concept for lobe in found.lobes} == {f"topic {i}" for i in range(N_GROUPS)}
    assert all(
        lobe.inside > 0.2 > 0 > lobe.outside and lobe.share == 1 and lobe.share_all == 0.25 for lobe in found.lobes
    )
    assert json.loads(json.dumps(found.to_dict()))["scores"][0]["n_lobes"] == 2


def test_nulls_that_are_not_passed_come_first(codes, saes):
    z, _ = codes
    found = sl.lobes(z, saes["near"], doc_ids=DOCS, baselines={"untrained": (z, saes["near"])}, **FEW)
    first, second = str(found).splitlines()[:2]
    assert first.startswith("A null is not passed: untrained reaches contrast") and "reaches ami" in second
    alone = sl.lobes(z, saes["random"], doc_ids=DOCS, **FEW)
    own = replace(alone.scores[-1], contrast_z=1.0)
    assert "lobes at random: the contrast is only z 1.0" in replace(alone, scores=(own,)).failed


def test_what_is_read_does_not_depend_on_how(codes, saes, tmp_path, monkeypatch):
    """Stores, sparse and dense codes, blocks of any size, and the sign of a feature with that of its direction."""
    z, _ = codes
    told = str(sl.lobes(z, saes["near"], doc_ids=DOCS, **FEW))
    monkeypatch.setattr("saelab.geometry.cofiring_lobes.ROWS_AT_ONCE", 7)
    assert str(sl.lobes(csr_matrix(z), saes["near"], doc_ids=DOCS, **FEW)) == told
    assert str(sl.lobes(harvest_codes(z, DOCS, tmp_path, 1000), saes["near"], **FEW)) == told
    flip = np.where(np.arange(D_SAE) % 2, -1.0, 1.0).astype(np.float32)
    flipped = sae_of(saes["near"].W_dec.detach() * torch.from_numpy(flip)[:, None], sl.AbsTopK(k=2))
    assert str(sl.lobes(z * flip, flipped, doc_ids=DOCS, **FEW)) == told


def test_windows_do_not_span_documents(saes):
    """Documents of 15 tokens have windows of 10 and 5; every second one has the other half of the features."""
    docs = np.repeat(np.arange(60), 15)
    side = (np.arange(D_SAE) < D_SAE // 2) == (docs % 2 == 0)[:, None]
    z = side * (np.random.default_rng(1).random(side.shape) < 0.2)
    found = sl.lobes(z.astype(np.float32), saes["near"], (2,), doc_ids=docs, window=10, n_draws=1)
    assert found.n_windows == 120 and found.n_documents == 60 and found.n_features == D_SAE
    assert sorted(map(sorted, ([*lobe.members] for lobe in found.lobes))) == [
        list(range(D_SAE // 2)), list(range(D_SAE // 2, D_SAE)),
    ]  # fmt: skip


def test_features_that_hardly_fire_are_left_out(codes, saes):
    z = codes[0].copy()
    z[:, [0, 5]], z[:, 7] = 0, 1
    found = sl.lobes(z, saes["near"], doc_ids=DOCS, **FEW)
    assert found.n_features == D_SAE - 3 and found.at(N_GROUPS).lobes[[0, 5, 7]].tolist() == [-1] * 3


def test_products_are_those_of_all_pairs(rng):
    windows = (rng.random((50, 20)) < 0.3).astype(float)
    phi = NormalizedVectors.of_windows(csr_matrix(windows))
    assert phi.pairs() == pytest.approx(np.corrcoef(windows.T), abs=1e-6)
    rows = rng.standard_normal((20, 6))
    near = NormalizedVectors.of_rows(rows)
    cosines = (unit := rows / np.linalg.norm(rows, axis=1, keepdims=True)) @ unit.T
    v = rng.standard_normal((20, 3))
    assert near.times(v) == pytest.approx(cosines @ v) and near.squares == pytest.approx((cosines**2).sum())
    assert phi.squares == pytest.approx((np.corrcoef(windows.T) ** 2).sum())


@pytest.mark.parametrize("dense", [True, False])
def test_clusters_are_those_of_all_pairs(codes, dense):
    """Those of scikit-learn on the matrix of affinities; by dimensions where these are few, else by products."""
    windows = (codes[0].reshape(-1, 10, D_SAE) != 0).any(1).astype(float)
    vectors = NormalizedVectors.of_windows(csr_matrix(windows))
    if dense:
        vectors = NormalizedVectors.of_rows(vectors.pairs()[:, :40].astype(float))
    found = SpectralClusters.of(vectors, 8, "cosine + 1", 0)
    expected = SpectralClustering(N_GROUPS, affinity="precomputed", random_state=0).fit_predict(vectors.pairs() + 1)
    assert ami(found.cut(N_GROUPS, 0), expected) == pytest.approx(1)


def test_the_z_of_a_contrast_is_that_of_all_permutations(rng):
    vectors = NormalizedVectors.of_rows(rng.standard_normal((6, 3)))
    cosines, groups = vectors.pairs().astype(float), np.array([0, 0, 0, 1, 1, 2])
    off = ~np.eye(6, dtype=bool)

    def contrast(order) -> float:
        same = groups[list(order)][:, None] == groups[list(order)]
        return float(cosines[same & off].mean() - cosines[~same].mean())

    null = [contrast(order) for order in permutations(range(6))]
    own = contrast(range(6))
    assert cosine_contrast(vectors, groups) == pytest.approx((own, (own - np.mean(null)) / np.std(null)), rel=1e-4)


def test_wrong_input_is_refused(codes, saes):
    z, _ = codes
    for kwargs, match in (
        ({"n_lobes": (1,), "doc_ids": DOCS}, "`n_lobes` must be 2 or more"),
        ({"n_lobes": (40,), "doc_ids": DOCS}, "at most half of the 48 features"),
        ({"doc_ids": DOCS[1:]}, "with a document and labels for each row"),
        ({}, "`doc_ids` must be given"),
    ):
        with pytest.raises(ValueError, match=match):
            sl.lobes(z, saes["near"], **kwargs)
    with pytest.raises(ValueError, match="features of the SAE"):
        sl.lobes(z[:, 1:], saes["near"], doc_ids=DOCS)

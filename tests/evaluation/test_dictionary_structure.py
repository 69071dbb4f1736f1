"""Structure of dictionaries: plain dense formulas beside the sparse ones, and planted directions and concepts."""

import json

import numpy as np
import pytest
import torch
from dictionaries import sae_of
from scipy.sparse import csr_matrix
from scipy.stats import hypergeom

import saelab as sl
from saelab.evaluation.dictionary_structure import (
    connectivity,
    identifiability,
    independent_connectivity,
    measure_structure,
    negative_interference,
    plausibility,
)
from saelab.stores.corpus import split_documents

N_STORIES, STORY, D_IN, D_SAE = 60, 20, 16, 24
STORY_IDS = np.repeat(np.arange(N_STORIES), STORY)
N = len(STORY_IDS)


@pytest.fixture(scope="module")
def rng():
    return np.random.default_rng(0)


@pytest.fixture(scope="module")
def signed_codes(rng):
    """Signed codes with a dead feature, and a pair that fires together with products that add up to 0."""
    z = rng.standard_normal((N, D_SAE)) * (rng.random((N, D_SAE)) < 0.02)
    z[:, [0, 1, 2]] = 0
    z[:4, 1], z[:4, 2] = 1.0, [1.0, 1.0, -1.0, -1.0]
    return z.astype(np.float32)


def test_sparse_products_are_those_of_dense_formulas(rng, signed_codes, monkeypatch):
    monkeypatch.setattr("saelab.evaluation.dictionary_structure.BLOCK", 7)
    z, rows = signed_codes, torch.from_numpy(rng.standard_normal((D_SAE, D_IN)).astype(np.float32))
    fires = (z != 0).astype(int)
    together = fires.T @ fires > 0
    assert together[1, 2] and not (z.T @ z)[1, 2]
    assert connectivity(csr_matrix(z)) == connectivity(torch.from_numpy(z)) == pytest.approx(1 - together.mean())
    a = fires.sum(0)
    apart = hypergeom(N, a[:, None], a).pmf(0)
    np.fill_diagonal(apart, a == 0)
    assert independent_connectivity(a, N) == pytest.approx(apart.mean())
    sae = sae_of(rows, sl.AbsTopK(k=2))
    dense = np.maximum(-(z.T @ z / N) * (rows @ rows.T).numpy(), 0)
    assert negative_interference(sae, csr_matrix(z)) == pytest.approx(np.linalg.norm(dense, 2), rel=1e-5)
    assert negative_interference(sae, csr_matrix(z), 4.0) == pytest.approx(np.linalg.norm(dense, 2) / 4, rel=1e-5)
    assert negative_interference(sae_of(torch.eye(D_SAE)), csr_matrix(np.abs(z))) == 0
    longer = sae_of(2 * rows, sl.AbsTopK(k=2))
    assert negative_interference(longer, csr_matrix(z / 2)) == pytest.approx(np.linalg.norm(dense, 2), rel=1e-5)


def test_independent_features_have_the_connectivity_of_independence(rng):
    """Over 200 draws the mean is within 5 of its standard errors."""
    p, n = rng.random(12) * 0.2, 40
    found = []
    for _ in range(200):
        z = rng.random((n, 12)) < p
        found.append(connectivity(z.astype(np.float32)) - independent_connectivity(z.sum(0), n))
    assert abs(np.mean(found)) < 5 * np.std(found) / np.sqrt(len(found))


def test_plausibility_counts_the_sign_where_codes_have_none(rng):
    rows = torch.from_numpy(rng.standard_normal((D_SAE, D_IN)).astype(np.float32))
    known = torch.cat([2 * rows[:3], -rows[3:6]])
    unit = [one / one.norm(dim=1, keepdim=True) for one in (known, rows)]
    cosines = (unit[0] @ unit[1].T).numpy()
    assert plausibility(sae_of(rows), known) == pytest.approx(cosines.max(1).mean(), abs=1e-6)
    assert plausibility(sae_of(rows, sl.AbsTopK(k=2)), known) == pytest.approx(1.0, abs=1e-6)
    assert plausibility(sae_of(rows), known) < 0.9
    with pytest.raises(ValueError, match="rows of width 16"):
        plausibility(sae_of(rows), torch.ones(2, 3))
    with pytest.raises(ValueError, match="not zero"):
        plausibility(sae_of(rows), torch.zeros(2, D_IN))


def naive(z, y, is_train):
    """Accuracies of the best classifiers of a label, one classifier at a time."""
    best = {"plain": (-1.0, 0.0), "even": (-1.0, 0.0)}
    for j in range(z.shape[1]):
        for side in (1, -1):
            values = side * z[:, j]
            peak = values[is_train].max()
            for fraction in np.arange(10) / 10 if peak > 0 else ():
                fires = values > max(fraction * peak, 0)
                right = fires == y
                for name, score in (
                    ("plain", lambda part, right=right: right[part].mean()),
                    ("even", lambda part, right=right: (right[part & y].mean() + right[part & ~y].mean()) / 2),
                ):
                    if score(is_train) > best[name][0]:
                        best[name] = score(is_train), score(~is_train)
    often = y[is_train].mean() > 0.5
    majority = [np.mean(y[part] == often) for part in (is_train, ~is_train)]
    return best["plain"][1] if best["plain"][0] > majority[0] else majority[1], majority[1], best["even"][1]


def test_identifiability_is_that_of_the_best_classifier(rng):
    y = np.stack([rng.random(N) < rate for rate in (0.5, 0.15, 0.8, 0.9)], 1)  # nothing knows of the last
    z = (rng.standard_normal((N, 8)) * (rng.random((N, 8)) < 0.4)).astype(np.float32)
    z[:, 0] -= 1.5 * y[:, 0]
    z[:, 1] += y[:, 1] + y[:, 2]
    labels = {name: torch.from_numpy(y[:, c]) for c, name in enumerate("abcd")}
    found = identifiability(csr_matrix(z), labels, STORY_IDS)
    rows = [naive(z, y[:, c], split_documents(STORY_IDS)) for c in range(4)]
    assert [found.accuracy, found.accuracy_majority, found.balanced] == pytest.approx(np.mean(rows, 0).tolist())
    # 60 held-out tokens or more on either side of a concept: a standard deviation of 0.035 at most
    assert found.moved is not None and abs(found.moved.balanced - 0.5) < 5 * 0.035 / np.sqrt(4)
    assert found.accuracy > found.moved.accuracy
    truth = identifiability(csr_matrix(y.astype(np.float32)), labels, STORY_IDS)
    assert truth.accuracy == truth.balanced == 1
    with pytest.raises(ValueError, match="a concept with 2000 tokens"):
        identifiability(csr_matrix(z), labels, STORY_IDS, min_count=2000)


def test_a_planted_dictionary_has_the_structure_that_baselines_lack(rng):
    rows = torch.from_numpy(np.linalg.qr(rng.standard_normal((D_IN, D_IN)))[0].astype(np.float32))
    y = rng.random((N, D_IN)) < 0.1
    x = torch.from_numpy(y.astype(np.float32)) @ rows
    labels = {str(c): torch.from_numpy(y[:, c]) for c in range(D_IN)}
    sae = sae_of(rows, sl.TopK(k=8))
    found = measure_structure(sae, x, rows[:5], labels, STORY_IDS)
    assert found.plausibility == pytest.approx(1, abs=1e-5) and found.negative_interference < 1e-6
    assert found.identifiability.balanced > 0.99 > 0.9 > found.baselines["random"].identifiability.balanced
    for one in found.baselines.values():
        assert one.plausibility < 0.95 and one.negative_interference > 0.001 and not one.signed
    assert set(found.baselines) == {"random", "kmeans"} and "kmeans" in str(found)
    assert json.loads(json.dumps(found.to_dict()))["baselines"]["random"]["n_tokens"] == N
    alone = measure_structure(sae, x, rows[:5], baselines={})
    assert alone.identifiability is None and alone.connectivity == found.connectivity
    pair = sl.SAE(sl.SAEConfig(d_in=D_IN, d_out=3, d_sae=8, activation=sl.TopK(k=2)))
    with pytest.raises(ValueError, match="must reconstruct what it reads"):
        measure_structure(pair, x, rows)


def test_random_directions_of_an_archetypal_dictionary_are_not_those_of_the_data(rng):
    """Rows would start at centroids of the activations, all near two opposite directions here."""
    scale = np.concatenate([[5], np.full(D_IN - 1, 0.01)])
    x = torch.from_numpy((rng.standard_normal((300, D_IN)) * scale).astype(np.float32))
    cfg = sl.SAEConfig(
        d_in=D_IN, d_sae=4, activation=sl.TopK(k=2), normalizer="none", dictionary=sl.Archetypal(delta=0.1)
    )
    found = measure_structure(sl.SAE(cfg), x, torch.eye(D_IN)[:1], baselines={})
    assert found.baselines["random"].plausibility < 0.9

"""Conditional-Poisson subsets against all of them written out, and the information of planted features."""

from itertools import combinations

import numpy as np
import pytest
import torch
from unchecked import unchecked

from saelab.probing import probe_features
from saelab.probing.intrinsic_probing import draw_subsets, log_sums, probe_intrinsically


def test_subsets_are_drawn_with_the_product_of_their_weights():
    weights, n = torch.tensor([0.0, 1.0, -1.0, 0.5, 2.0]), 4_000
    sums = log_sums(weights, 3)
    for k in (1, 2, 3):
        subsets = list(combinations(range(5), k))
        products = torch.tensor([float(weights[list(one)].sum().exp()) for one in subsets])
        assert float(sums[5, k].exp()) == pytest.approx(float(products.sum()), rel=1e-5)
        masks = draw_subsets(sums, weights, torch.full((n,), k), torch.Generator().manual_seed(k))
        assert (masks.sum(1) == k).all()
        drawn = torch.tensor([float(masks[:, list(one)].all(1).float().mean()) for one in subsets])
        p = products / products.sum()
        assert ((drawn - p).abs() < 5 * (p * (1 - p) / n).sqrt() + 1e-9).all()  # five standard errors of a share


@pytest.fixture(scope="module")
def planted():
    """Features 1 and 4 have the label's information together, 2 repeats 1, which has more; the others are noise."""
    rng = np.random.default_rng(0)
    n, d = 6_000, 8
    a, b = rng.random((2, n)) < np.array([[0.5], [0.3]])
    y = np.where(rng.random(n) < 0.02, rng.random(n) < 0.5, a | b)
    z = (rng.random((n, d)) < 0.4) * (1 + rng.random((n, d)))
    z[:, 1], z[:, 4] = 2.0 * a, 1.5 * b
    z[:, 2] = z[:, 1] * (rng.random(n) < 0.98)
    return probe_intrinsically(z, y, np.arange(n) // 12, ks=(1, 2, 4), concept="either")


def test_planted_features_carry_the_information_and_a_repeated_one_adds_none(planted):
    first = {feature for feature, _ in planted.features[:2]}
    assert 4 in first and first & {1, 2} and len(planted.features) == 4
    assert planted.fitted[2] > planted.ranked[2] + 0.2  # the two best one by one say the same
    assert planted.fitted[2] > 0.6 > planted.fitted[1] > 0.1 and planted.information[2] > 0.5
    assert abs(planted.fitted[4] - planted.fitted[2]) < 0.05 and planted.everything < planted.fitted[2] + 0.05
    assert all(abs(value) < 0.02 for value in planted.shuffled.values())
    text = str(planted)
    assert "either: true of" in text and "4+" in text and planted.to_dict()["concept"] == "either"


def test_labels_of_rows_of_text_are_those_of_their_tokens():
    z, documents = np.tile(np.eye(4), (50, 1)), np.arange(200) // 20
    y = z[:, 2] > 0
    assert probe_intrinsically(z, {"a": y.reshape(10, 20)}, documents, ks=(1,)) == probe_intrinsically(
        z, {"a": y}, documents, ks=(1,)
    )
    flat, rows = (probe_features(z, {"a": one}, documents, ks=(1,), rankings=("f",)) for one in (y, y.reshape(10, 20)))
    assert rows.features[0].feature == flat.features[0].feature == 2


@unchecked()
def test_what_cannot_be_probed_is_refused():
    z, doc_ids = np.ones((40, 3)), np.arange(40) // 4
    with pytest.raises(ValueError, match=r"`ks` must be in 1..3"):
        probe_intrinsically(z, np.arange(40) % 2 == 0, doc_ids, ks=(4,))
    with pytest.raises(ValueError, match="Both labels must occur"):
        probe_intrinsically(z, np.zeros(40, bool), doc_ids, ks=(1,))

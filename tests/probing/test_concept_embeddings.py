"""Planted concepts as weights on features: one side or several, who is near whom, and permuted labels."""

import numpy as np
import pytest
from scipy.sparse import csr_matrix

from saelab.evaluation.dissection import dissect
from saelab.lm.token_labels import TokenLabels
from saelab.probing import embed_concepts

N, D = 3000, 12
DOCUMENTS = np.arange(N) // 25


@pytest.fixture(scope="module")
def planted():
    """One concept on the negative side of feature 0; one spread over features 1 to 4; one that shares two of these."""
    rng = np.random.default_rng(0)
    codes = np.abs(rng.normal(size=(N, D))) * (rng.random((N, D)) < 0.1)
    codes[:, 0] *= -1
    truth = {"one": codes[:, 0] < 0, "spread": (codes[:, 1:5] > 0).any(1), "shares": (codes[:, 3:7] > 0).any(1)}
    truth["apart"] = (codes[:, 8:10] > 0).any(1)
    return codes, truth


@pytest.fixture(scope="module")
def found(planted):
    return embed_concepts(planted[0], planted[1], DOCUMENTS)


def test_all_sides_tell_what_one_cannot(found) -> None:
    one, spread, *_ = found.rows
    assert (one.feature, one.sign, one.iou_one) == (0, -1, 1.0) and one.iou_all > 0.8
    assert spread.feature in range(1, 5) and spread.iou_one < 0.5 < 0.9 < spread.iou_all
    assert all(row.iou_permuted < 0.6 * row.iou_all for row in found.rows)


def test_weights_are_on_the_planted_sides(found) -> None:
    for name, features in (("one", [0]), ("spread", [1, 2, 3, 4]), ("shares", [3, 4, 5, 6]), ("apart", [8, 9])):
        own = found.vectors[found.names.index(name)]
        first = np.argsort(-own)[: len(features)]
        assert sorted(found.features[first]) == features
        assert (found.signs[first] == (-1 if name == "one" else 1)).all()
    assert np.allclose(np.linalg.norm(found.vectors, axis=1), 1)


def test_concepts_that_share_features_are_near(found) -> None:
    assert found.nearest("spread", n=1)[0][0] == "shares"
    table = found.similarity
    assert table[1, 2] > 0.2 > table[0, 3] and np.allclose(np.diag(table), 1)
    # what they share taken away, the rest is no nearer to it than to others
    assert dict(found.nearest("spread", minus=["shares"], n=4)).keys() == {"one", "apart"}
    with pytest.raises(KeyError):
        found.nearest("nothing")


def test_one_side_is_not_better_here_than_a_detector_may_be(planted, found) -> None:
    """The best side by threshold is that of a dissection with a quantile that fits."""
    codes, truth = planted
    seen = dissect(codes, {"one": truth["one"]}, DOCUMENTS, quantile=0.2)
    assert seen.concepts[0].feature == found.rows[0].feature and seen.concepts[0].iou == found.rows[0].iou_one


def test_it_is_the_same_from_sparse_codes_and_rare_concepts_are_skipped(planted, found) -> None:
    codes, truth = planted
    again = embed_concepts(csr_matrix(codes), TokenLabels.of(truth | {"rare": np.arange(N) < 3}), DOCUMENTS)
    assert again.skipped == ("rare",) and again.rows == found.rows and "spread" in str(again)
    with pytest.raises(ValueError, match="min_count"):
        embed_concepts(codes, {"rare": np.arange(N) < 3}, DOCUMENTS)

"""Documents are found by features, by their labels, and by what they are not to have."""

import numpy as np
import pytest
from corpora_made import harvest_codes

from saelab.corpora import pool_documents, rank_documents
from saelab.labels import Label, LabelStore


@pytest.fixture(scope="module")
def documents(tmp_path_factory):
    """Feature 0 in all documents but one, 1 in 2 and 3, the negative side of 1 in 4, 2 in 3 and 5, in 5 weakly."""
    codes = np.zeros((16, 4))
    codes[:, 0] = 1
    codes[6, 0] = 0
    codes[2, 1], codes[3, 1], codes[4, 1], codes[3, 2], codes[5, 2] = 2, 2, -2, 1, 0.25
    return pool_documents(harvest_codes(codes, np.arange(16), tmp_path_factory.mktemp("found")))


def found(documents, wanted, **options) -> list[int]:
    return [row.row for row in rank_documents(documents, wanted, **options).rows]


def test_rare_features_and_large_codes_count_more(documents) -> None:
    assert found(documents, {2: 1.0}) == [3, 5] and found(documents, {2: 1.0, 1: 1.0}) == [3, 2, 5]
    first = rank_documents(documents, {2: 1.0, 0: 1.0}).rows[0]
    assert first.row == 3 and sorted(first.features) == [0, 2]
    assert first.score == pytest.approx(np.log(16 / 2) + np.log(16 / 15))


def test_each_side_is_asked_for_by_itself(documents) -> None:
    assert found(documents, {(1, 1): 1.0}) == [2, 3] and found(documents, {(1, -1): 1.0}) == [4]


def test_weights_below_0_take_documents_back(documents) -> None:
    assert found(documents, {1: 1.0, 2: -2.0}) == [2, 3] and found(documents, {2: -1.0}, top=16)[-1] == 3


def test_words_stand_for_the_features_whose_labels_match(documents) -> None:
    names = {0: "everything", 1: "the sea and ships", 2: "storms"}
    assert found(documents, "sea", labels=names) == [2, 3] and found(documents, "storm", labels=names) == [3, 5]
    assert "(storms)" in str(rank_documents(documents, "storm", labels=names))
    with pytest.raises(ValueError, match="must match a label, got 'desert'"):
        rank_documents(documents, "desert", labels=names)
    with pytest.raises(ValueError, match="give `labels`"):
        rank_documents(documents, "sea")


def test_a_label_store_names_sides(documents, tmp_path) -> None:
    with LabelStore(tmp_path / "labels.sqlite") as book:
        book.add([Label(feature=1, sign=-1, text="drought", author="me"), Label(feature=2, text="storms", author="me")])
        assert found(documents, "drought", labels=book) == [4] and found(documents, "storms", labels=book) == [3, 5]


def test_impossible_requests_are_refused(documents) -> None:
    for wanted, top in (({}, 3), ({0: float("nan")}, 3), ({9: 1.0}, 3), ({0: 1.0}, 0)):
        with pytest.raises(ValueError, match="must"):
            rank_documents(documents, wanted, top=top)

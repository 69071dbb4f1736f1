"""Labels of tokens: what users have is read into one shape, and what does not fit is named."""

from typing import Any

import numpy as np
import pytest
import torch
from scipy.sparse import csc_matrix

from saelab.lm.token_labels import Concept, TokenLabels

MARKS = np.random.default_rng(0).random((3, 4, 2)) < 0.4  # (n_seq, ctx_len, n_concepts)
NAMES = ("cat", "dog")
DOCS = np.arange(12).reshape(3, 4) // 5


@pytest.mark.parametrize(
    "given",
    [
        {name: MARKS[..., i] for i, name in enumerate(NAMES)},
        {name: torch.from_numpy(MARKS[..., i]) for i, name in enumerate(NAMES)},
        {name: MARKS[..., i].astype(float).tolist() for i, name in enumerate(NAMES)},
        TokenLabels.of({name: MARKS[..., i] for i, name in enumerate(NAMES)}),
    ],
)
def test_marks_by_name_are_read_alike(given: Any) -> None:
    labels = TokenLabels.of(given, doc_ids=DOCS)
    assert labels.names == tuple(labels) == NAMES and labels.shape == (3, 4) and labels.n_tokens == 12
    assert all(np.array_equal(labels[name].numpy(), MARKS[..., i]) for i, name in enumerate(NAMES))
    assert np.array_equal(labels.matrix.toarray(), MARKS.reshape(12, 2))
    assert np.array_equal(labels.require_documents(), DOCS.ravel())


@pytest.mark.parametrize("kind", [np.asarray, torch.from_numpy, csc_matrix, lambda x: csc_matrix(x.astype(np.int32))])
def test_a_matrix_needs_its_names(kind: Any) -> None:
    table = (Concept("cat", "word", parent="animal"), Concept("dog"))
    labels = TokenLabels.of(kind(MARKS.reshape(12, 2)), table, DOCS)
    assert labels.concepts == table and labels.shape == (12,) and labels.matrix.dtype == bool
    assert np.array_equal(labels["dog"].numpy(), MARKS.reshape(12, 2)[:, 1])
    assert TokenLabels.of(kind(MARKS.reshape(12, 2)), NAMES).names == NAMES


def test_tokens_are_selected_and_spread_again() -> None:
    labels = TokenLabels.of({name: MARKS[..., i] for i, name in enumerate(NAMES)}, doc_ids=DOCS)
    mask = torch.from_numpy(np.random.default_rng(1).random((3, 4)) < 0.5)
    some = labels.select(mask)
    assert torch.equal(some["cat"], labels["cat"][mask]) and np.array_equal(some.doc_ids, DOCS[mask.numpy()])
    assert torch.equal(labels.select([3, 1])["cat"], labels["cat"].flatten()[[3, 1]])
    back = some.spread(mask)
    assert torch.equal(back["dog"], labels["dog"] & mask)
    assert back.doc_ids is not None and (back.doc_ids.reshape(3, 4) == np.where(mask, DOCS, -1)).all()
    with pytest.raises(ValueError, match=r"shape of the labels, \(3, 4\), got \(4, 3\)"):
        labels.select(mask.T)
    with pytest.raises(ValueError, match="at the 12 tokens"):
        labels.spread(mask)
    with pytest.raises(ValueError, match="a mask or integers, got float64"):
        labels.select([0.5])
    assert len(labels.select([])["cat"]) == 0 and labels.select([]).shape == (0,)


def test_what_does_not_fit_is_named() -> None:
    for given, names, doc_ids, match in (
        ({}, None, None, "at least one name"),
        ({"a": [True], "b": [True, False]}, None, None, r"of one shape.*\(1,\), \(2,\)"),
        ({"a": [0, 2]}, None, None, "True or False, or 1 and 0, got 2 in 'a'"),
        ({"a": [0.0, np.nan]}, None, None, "got nan in 'a'"),
        ({"a": True}, None, None, r"got shape \(\) for 'a'"),
        ({"a": [True]}, ["a"], None, "`names` go with arrays"),
        ([True, False], "a", [0], "one for each of the 2 tokens, got 1"),
        (np.eye(3), ["a", "b"], None, r"\(3, 2\) by their tokens and names, got \(3, 3\)"),
        (np.ones(3), ["a"], None, "must be \\(n_tokens, n_concepts\\)"),
        (np.eye(2), ["a", "a"], None, "must differ"),
    ):
        with pytest.raises(ValueError, match=match):
            TokenLabels.of(given, names, doc_ids)
    labels = TokenLabels.of({"cat": [True], "dog": [False]})
    assert TokenLabels.of([True]).find(None) == "concept" and labels.find("dog") == "dog" and "cow" not in labels
    with pytest.raises(ValueError, match=r"got 'cats'. Did you mean one of: \['cat'\]"):
        labels.find("cats")
    with pytest.raises(ValueError, match="got None"):
        labels.find(None)
    with pytest.raises(ValueError, match="`doc_ids` must be given"):
        labels.require_documents()
    with pytest.raises(KeyError):
        labels["cats"]

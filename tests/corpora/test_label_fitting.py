"""Heads on planted documents: evidence in one token of many, both signs, baselines and nulls."""

import numpy as np
import pytest
import torch
from corpora_made import harvest_codes
from label_heads_made import DOCUMENTS, N_DOCUMENTS, N_TOKENS, SIDES, D, make_documents
from scipy.sparse import csr_matrix

import saelab as sl
from saelab.corpora import label_documents
from saelab.lm.token_labels import TokenLabels


@pytest.fixture(scope="module")
def planted():
    return make_documents()


@pytest.fixture(scope="module")
def head(planted):
    codes, labels, _ = planted
    return sl.label_head(codes, labels, DOCUMENTS, n_epochs=8)


def test_planted_sides_are_found_and_nothing_else_matters(head) -> None:
    own, by_name = head.scores[0], {score.name: score for score in head.scores}
    assert own.name == "head" and own.macro_f1 > 0.97 and own.auroc > 0.97 and own.n_features < D
    for name, side in SIDES.items():
        first = head.top_features(name, 1)[0]
        assert (first.feature, first.sign) == side and first.weight > 0
    assert by_name["1 best feature"].macro_f1 > 0.9
    # labels of other documents: as good as chance, AUROC of 60 documents and three labels within five standard errors
    null = by_name["labels exchanged"]
    assert abs(null.auroc - 0.5) < 5 * 0.29 / np.sqrt(3 * 11) and null.macro_f1 < 0.7


def test_attention_is_what_finds_one_token_of_many(planted) -> None:
    """Of as many codes of equal sums, spread over all tokens, the mean says nothing and the attention all."""
    rng = np.random.default_rng(1)
    y = rng.random(N_DOCUMENTS) < 0.5
    codes = np.zeros((len(DOCUMENTS), 2))
    codes[:, 0] = 0.25 + 1e-6
    codes[:, 1] = rng.random(len(DOCUMENTS)) < 0.5
    for i in np.flatnonzero(y):
        rows = np.arange(i * N_TOKENS, (i + 1) * N_TOKENS)
        codes[rows, 0] = 1e-6
        codes[rng.choice(rows), 0] = 0.25 * N_TOKENS
    head = sl.label_head(codes, {"one": y}, DOCUMENTS, n_epochs=8)
    found = {score.name: score for score in head.scores}
    assert found["head"].auroc > 0.99 and found["no attention"].auroc < 0.9


def test_a_penalty_leaves_fewer_sides(planted) -> None:
    codes, labels, _ = planted
    counts = [
        sl.label_head(codes, labels, DOCUMENTS, l1=l1, n_epochs=4, baselines=False).scores[0].n_features
        for l1 in (0.0, 0.01, 10.0)
    ]
    assert counts[0] > counts[1] > counts[2] == 0


def test_heads_that_read_activations(planted) -> None:
    """As in the paper: the matrix attends, and the activations tell; one code attends, another place is read."""
    codes, labels, _ = planted
    x = torch.zeros(len(DOCUMENTS), 2)
    x[:, 0] = torch.from_numpy(codes[:, 3]).float()
    head = sl.label_head(
        codes, {"a": labels["a"]}, DOCUMENTS, acts=x, untrained=codes[:, ::-1], reads="activations", n_epochs=8
    )
    names = [score.name for score in head.scores]
    assert names[0] == "head" and {"dense head", "untrained SAE"} <= {*names} and head.W.shape == (2, 1)
    assert head.scores[0].auroc > 0.95
    # the rotated columns hold the same: a dictionary of another order is as good
    other = next(score for score in head.scores if score.name == "untrained SAE")
    assert other.auroc > 0.95
    held = head.predict(codes, DOCUMENTS, acts=x)
    assert held.shape == (N_DOCUMENTS, 1)
    for acts, said in ((None, "must be"), (x[:, :1], "width 2")):
        with pytest.raises(ValueError, match=said):
            head.predict(codes, DOCUMENTS, acts=acts)


def test_a_store_a_matrix_and_documents_in_pieces_are_one(planted, tmp_path) -> None:
    codes, labels, _ = planted
    store = harvest_codes(codes, DOCUMENTS, tmp_path, shard_tokens=500)
    of_store = sl.label_head(store, labels, n_epochs=3, baselines=False)
    of_matrix = sl.label_head(csr_matrix(codes.astype(np.float32)), labels, DOCUMENTS, n_epochs=3, baselines=False)
    # a store's codes are of 16 bits
    assert np.allclose(of_store.predict(store), of_matrix.predict(codes, DOCUMENTS), atol=0.01)
    assert of_store.scores[0].macro_f1 == pytest.approx(of_matrix.scores[0].macro_f1, abs=0.03)
    order = np.argsort(np.random.default_rng(2).random(len(DOCUMENTS)), kind="stable")
    pieces = sl.label_head(codes[order].astype(np.float32), labels, DOCUMENTS[order], n_epochs=3, baselines=False)
    assert np.allclose(pieces.predict(codes[order], DOCUMENTS[order]), of_matrix.predict(codes, DOCUMENTS), atol=1e-3)


def test_batches_that_are_read_again_change_nothing(planted, monkeypatch) -> None:
    codes, labels, _ = planted
    kept = sl.label_head(codes, labels, DOCUMENTS, n_epochs=2, baselines=False)
    monkeypatch.setattr("saelab.corpora.label_fitting.KEPT_ENTRIES", 0)
    monkeypatch.setattr("saelab.corpora.coded_documents.AT_ONCE", 100)
    read = sl.label_head(codes, labels, DOCUMENTS, n_epochs=2, baselines=False)
    assert torch.allclose(kept.A, read.A, atol=1e-6) and kept.scores == read.scores


def test_seeds_decide_everything_and_global_state_stays(planted) -> None:
    codes, labels, _ = planted
    before = torch.random.get_rng_state()
    a, b, c = (sl.label_head(codes, labels, DOCUMENTS, n_epochs=2, baselines=False, seed=s) for s in (0, 0, 1))
    assert torch.equal(a.A, b.A) and not (a.A.shape == c.A.shape and torch.equal(a.A, c.A))
    assert torch.equal(before, torch.random.get_rng_state())


def test_labels_of_tokens_become_those_of_documents() -> None:
    labels = TokenLabels.of({"x": [False, True, False, False], "y": [True, True, False, False]})
    found = label_documents(labels, np.array([9, 4, 9, -1]))
    assert found.shape == (2,) and found["x"].tolist() == [True, False] and found["y"].tolist() == [True, True]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"l1": -1.0}, "l1"),
        ({"n_epochs": 0}, "n_epochs"),
        ({"min_count": 1}, "min_count"),
        ({"min_count": 200}, "must have one that 200"),
        ({"reads": "activations"}, "`acts` must be given"),
        ({"acts": torch.zeros(3, 2)}, "for each of the"),
        ({"train_frac": 0.0}, "document on each side"),
        ({"doc_ids": None}, "doc_ids"),
        ({"labels": {"a": [True, False]}}, "a row for each of the 240 documents"),
    ],
)
def test_bad_input_is_refused(planted, settings, said) -> None:
    codes, labels, _ = planted
    with pytest.raises(ValueError, match=said):
        sl.label_head(codes, **({"labels": labels, "doc_ids": DOCUMENTS} | settings))


def test_rare_labels_are_left_out_by_name(planted) -> None:
    codes, labels, _ = planted
    rare = labels | {"rare": np.arange(N_DOCUMENTS) < 3, "nearly all": np.arange(N_DOCUMENTS) > 3}
    head = sl.label_head(codes, rare, DOCUMENTS, n_epochs=1, baselines=False)
    assert head.skipped == ("rare", "nearly all") and head.labels == tuple(SIDES)

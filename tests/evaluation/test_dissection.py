"""Planted detectors, IoU beside a naive count, nulls, and the warning where a rule cannot tell a dictionary."""

import json

import numpy as np
import pytest
import torch
from corpora_made import harvest_codes
from scipy.sparse import csr_matrix

import saelab as sl
from saelab.evaluation.dissection import PERMUTED, ROTATED, SCALED, SHIFTED, TURNED, dissect, draw_rotation
from saelab.lm.token_labels import TokenLabels
from saelab.stores.corpus import split_documents

N, PER_DOCUMENT, N_CONCEPTS, D = 6000, 30, 6, 24
DOCUMENTS = np.arange(N) // PER_DOCUMENT
NAMES = [f"c{i}" for i in range(N_CONCEPTS)]


@pytest.fixture(scope="module")
def planted():
    """Codes and labels: side c of feature c (negative for odd ones) is large on the tokens of concept c."""
    rng = np.random.default_rng(0)
    truth = rng.random((N, N_CONCEPTS)) < np.linspace(0.02, 0.04, N_CONCEPTS)
    codes = rng.normal(size=(N, D)) * (rng.random((N, D)) < 0.08)
    for c in range(N_CONCEPTS):
        codes[:, c] = np.where(truth[:, c], (-1) ** c * rng.uniform(6, 8, N), codes[:, c])
    return codes, TokenLabels.of(csr_matrix(truth), NAMES, DOCUMENTS)


@pytest.fixture(scope="module")
def found(planted):
    return dissect(*planted, quantile=0.05)


def naive_side(codes: np.ndarray, labels: TokenLabels, feature: int, sign: int, quantile: float):
    """Concept, IoU and threshold of one side, token by token."""
    train = split_documents(DOCUMENTS)
    z, truth = np.maximum(sign * codes[:, feature], 0), labels.matrix.toarray()
    ranked = np.sort(z[train])[::-1]
    threshold = ranked[int(quantile * train.sum())]
    on = z > threshold

    def iou(rows, c):
        both = (on & truth[:, c])[rows].sum()
        return both / max(1, (on | truth[:, c])[rows].sum())

    best = max(range(N_CONCEPTS), key=lambda c: (iou(train, c), -c))
    return NAMES[best], iou(~train, best), threshold, int(on[~train].sum())


def test_every_side_is_that_of_a_naive_count(planted, found) -> None:
    codes, labels = planted
    assert len(found.sides) > D
    for side in found.sides:
        concept, iou, threshold, n_on = naive_side(codes, labels, side.feature, side.sign, 0.05)
        assert (side.concept, side.n_on) == (concept, n_on)
        assert side.iou == pytest.approx(iou) and side.threshold == pytest.approx(threshold)


def test_planted_sides_are_found_with_their_signs(found) -> None:
    assert [(c.name, c.feature, c.sign) for c in found.concepts] == [
        (f"c{i}", i, 1 if i % 2 == 0 else -1) for i in range(N_CONCEPTS)
    ]
    first = found.sides[:N_CONCEPTS]
    assert {side.feature for side in first} == set(range(N_CONCEPTS)) and first[0].iou >= first[-1].iou > 0.3
    row = found.row("codes")
    assert row is found.rows[0] and row.n_unique_clear == N_CONCEPTS
    assert all(c.n_detectors >= 1 for c in found.concepts) and len(found.detectors(0.2)) == row.n_clear


def test_shares_of_what_is_possible(planted, found) -> None:
    """A side that is on for 5 % of tokens cannot reach a concept of 1 %; one that is as rare can."""
    _, labels = planted
    assert all(side.iou <= side.possible + 1e-12 and 0 <= side.share <= 1 + 1e-12 for side in found.sides)
    exact = dissect(labels.matrix.toarray().astype(float), labels, quantile=0.1)
    assert [c.iou for c in exact.concepts] == [1.0] * N_CONCEPTS
    assert all(side.share == 1.0 for side in exact.sides[:N_CONCEPTS])


def test_nulls_leave_next_to_nothing(found) -> None:
    for name in (SHIFTED, PERMUTED):
        row = found.row(name)
        assert row.n_clear == 0 and row.concept_iou < 0.15 * found.rows[0].concept_iou
        assert row.n_sides == found.rows[0].n_sides


def test_a_store_sparse_and_dense_codes_are_one(planted, found, tmp_path) -> None:
    codes, labels = planted
    store = harvest_codes(codes, DOCUMENTS, tmp_path, shard_tokens=1000)
    plain = TokenLabels.of(labels.matrix, NAMES)
    of_store, of_sparse = dissect(store, plain, quantile=0.05), dissect(csr_matrix(codes), labels, quantile=0.05)
    assert of_sparse == found
    for a, b in zip(of_store.sides, found.sides, strict=True):
        assert (a.feature, a.sign, a.concept, a.n_on, a.iou) == (b.feature, b.sign, b.concept, b.n_on, b.iou)
    assert of_store.rows == found.rows


def test_blocks_change_nothing(planted, found, monkeypatch) -> None:
    codes, labels = planted
    monkeypatch.setattr("saelab.evaluation.side_masks.BLOCK_ENTRIES", 1500)
    assert dissect(csr_matrix(codes), labels, quantile=0.05) == found
    assert dissect(codes, labels, quantile=0.05) == found


def test_the_order_of_documents_changes_nothing_but_their_split(planted) -> None:
    codes, labels = planted
    order = np.random.default_rng(3).permutation(N)  # documents in pieces
    moved = dissect(codes[order], labels.select(order), quantile=0.05)
    assert [(c.name, c.feature, c.iou) for c in moved.concepts] == [
        (c.name, c.feature, c.iou) for c in dissect(codes, labels, quantile=0.05).concepts
    ]


def test_rotations_of_neurons_and_of_the_dictionary(planted) -> None:
    codes, labels = planted
    x = torch.from_numpy(codes).float()
    sae = sl.SAE(sl.SAEConfig(d_in=D, d_sae=D, activation=sl.AbsTopK(k=D), normalizer="none"), seed=0)
    with torch.no_grad():
        sae.W_enc.copy_(torch.eye(D))
        sae.W_dec.copy_(torch.eye(D))
        sae.b_enc.zero_()
        sae.b_dec.zero_()
    found = dissect(codes, labels, quantile=0.02, acts=x, sae=sae, n_rotations=2)
    assert [(row.name, row.draw) for row in found.rows[3:]] == [
        ("activations", 0),
        *((name, draw) for draw in (0, 1) for name in (ROTATED, SCALED, TURNED)),
    ]
    own = found.row("activations")
    assert own.concept_iou == pytest.approx(found.rows[0].concept_iou, abs=0.05)
    # a concept in one coordinate of 24 is spread over all by a rotation of scaled coordinates
    assert all(found.row(SCALED, draw).concept_iou < 0.9 * own.concept_iou for draw in (0, 1))
    # the identity as SAE: rotated dictionary and rotated coordinates are the same, about another center
    assert found.row(TURNED).concept_iou == pytest.approx(found.row(ROTATED).concept_iou, abs=0.1)
    assert found.row(ROTATED, 0) != found.row(ROTATED, 1)


def test_rotations_are_orthogonal_and_differ() -> None:
    a, b = draw_rotation(9, 0), draw_rotation(9, 1)
    assert torch.allclose(a @ a.T, torch.eye(9), atol=1e-5) and not torch.allclose(a, b)
    assert torch.equal(a, draw_rotation(9, 0))


def test_the_warning_says_where_the_rule_cannot_tell(planted) -> None:
    codes, labels = planted
    rng = np.random.default_rng(1)
    noise = rng.normal(size=codes.shape) * (rng.random(codes.shape) < 0.08)
    assert "no random dictionary" in dissect(codes, labels, quantile=0.05).warning
    same = dissect(codes, labels, quantile=0.05, baselines={"other": codes[:, ::-1]})
    assert "does not tell the codes from 'other'" in same.warning and same.warning in str(same)
    few = dissect(codes[:, :N_CONCEPTS], labels, quantile=0.05, baselines={"noise": noise})
    assert few.row("noise").n_unique_clear == 0 and few.warning == "" and "Warning" not in str(few)
    chance = dissect(noise, labels, quantile=0.05, detector=0.01, baselines={"noise": noise})
    assert "with labels of other documents" in chance.warning


def test_rare_concepts_are_skipped_by_name(planted) -> None:
    codes, labels = planted
    rare = TokenLabels.of({name: labels[name] for name in NAMES} | {"rare": torch.arange(N) < 3}, doc_ids=DOCUMENTS)
    found = dissect(codes, rare, quantile=0.05)
    assert found.skipped == ("rare",) and [c.name for c in found.concepts] == NAMES


def test_it_prints_saves_and_draws(found, tmp_path) -> None:
    found.save(tmp_path / "found.json")
    plain = json.loads((tmp_path / "found.json").read_text())
    assert plain["rows"][0]["n_unique"] == found.rows[0].n_unique and len(plain["sides"]) == len(found.sides)
    assert "<script" not in found._repr_html_() and "c3" in found._repr_html_()


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"quantile": 0.0}, "shares"),
        ({"quantile": 1e-5}, "at least one of the"),
        ({"detector": 1.5}, "shares"),
        ({"min_count": 0}, "min_count"),
        ({"n_rotations": -1}, "n_rotations"),
        ({"min_count": 5000}, "must have a concept"),
        ({"acts": torch.zeros(3, 2)}, "a row for each of the 6000 tokens"),
        ({"baselines": {"short": np.zeros((3, 2))}}, "`short` must have a row"),
        ({"train_frac": 0.0}, "document on each side"),
    ],
)
def test_bad_input_is_refused(planted, settings, said) -> None:
    with pytest.raises(ValueError, match=said):
        dissect(*planted, **settings)


def test_labels_need_documents_and_codes_rows(planted) -> None:
    codes, labels = planted
    with pytest.raises(ValueError, match="doc_ids"):
        dissect(codes, TokenLabels.of(labels.matrix, NAMES))
    with pytest.raises(ValueError, match="row for each"):
        dissect(codes[:10], labels)
    sae = sl.SAE(sl.SAEConfig(d_in=4, d_sae=4, activation=sl.TopK(k=1)), seed=0)
    with pytest.raises(ValueError, match="goes with `acts`"):
        dissect(codes, labels, sae=sae)

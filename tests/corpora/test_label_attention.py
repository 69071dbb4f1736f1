"""What a head says of documents: contributions that sum to logits, explanations with planted tokens, files."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from corpora_made import harvest_codes
from label_heads_made import DOCUMENTS, N_TOKENS, SIDES, D, make_documents

import saelab as sl
from saelab.corpora import LabelHead
from saelab.corpora.coded_documents import CodedDocuments, attend


@pytest.fixture(scope="module")
def planted():
    return make_documents()


@pytest.fixture(scope="module")
def head(planted):
    codes, labels, _ = planted
    return sl.label_head(codes, labels, DOCUMENTS, n_epochs=8, baselines=False)


def naive_logits(head: LabelHead, codes: np.ndarray) -> np.ndarray:
    """Document by document, token by token."""
    A, found = head.matrix.toarray(), []
    for i in np.unique(DOCUMENTS):
        z = codes[i == DOCUMENTS]
        sides = np.stack([np.maximum(z, 0), np.maximum(-z, 0)], -1).reshape(len(z), -1)
        said = sides @ A
        weights = np.exp(said * head.temperature.numpy())
        found.append((said * weights / weights.sum(0)).sum(0) + head.bias.numpy())
    return np.array(found)


def test_predictions_are_those_of_the_formula(head, planted) -> None:
    codes, labels, _ = planted
    logits = naive_logits(head, codes)
    p = head.predict(codes, DOCUMENTS)
    assert np.allclose(p, 1 / (1 + np.exp(-logits)), atol=1e-4)
    guess = head.decide(p)
    truth = np.stack([labels[name] for name in head.labels], 1)
    assert (guess == truth).mean() > 0.97


def test_contributions_of_tokens_and_of_features_sum_to_the_logit(head, planted) -> None:
    codes, _, _ = planted
    logits = naive_logits(head, codes)
    for document in (0, 5, 100):
        told = head.explain(codes, document, DOCUMENTS, labels=head.labels, n_top=1000)
        assert told.n_tokens == N_TOKENS and len(told.labels) == len(SIDES)
        for one in told.labels:
            assert one.logit == pytest.approx(logits[document, head.labels.index(one.label)], abs=1e-3)
            for parts in (one.tokens, one.features):
                assert one.bias + sum(part.contribution for part in parts) == pytest.approx(one.logit, abs=1e-3)
                assert sum(part.share for part in parts) == pytest.approx(1)
            assert sum(part.attention for part in one.tokens) <= 1 + 1e-6


def test_an_explanation_names_the_planted_token_and_side(head, planted) -> None:
    codes, labels, at = planted
    for name, document in list(at)[::17]:
        told = head.explain(codes, document, DOCUMENTS, labels=[name], names={3: "third", 11: "eleventh"})
        [one] = told.labels
        assert one.predicted and one.tokens[0].index == at[name, document] and one.tokens[0].share > 0.5
        assert (one.features[0].index, one.features[0].sign) == SIDES[name] and one.features[0].share > 0.5
        assert name in str(told) and one.features[0].name in str(told)
        if name == "c":
            assert one.features[0].name == "11 - \u2212 eleventh"
    predicted = head.explain(codes, document, DOCUMENTS).labels
    assert {one.label for one in predicted if one.predicted} == {n for n in SIDES if labels[n][document]} or not any(
        one.predicted for one in predicted
    )


def test_tokens_of_a_store_have_their_text(head, planted, tmp_path) -> None:
    codes, _, at = planted
    store = harvest_codes(codes, DOCUMENTS, tmp_path)
    name, document = next(iter(at))
    told = head.explain(store, document, labels=[name])
    assert told.labels[0].tokens[0].index == at[name, document] and isinstance(told.labels[0].tokens[0].name, str)
    assert np.allclose(head.predict(store), head.predict(codes, DOCUMENTS), atol=1e-4)


def test_the_sparse_matrix_is_by_side(head) -> None:
    matrix = head.matrix
    assert matrix.shape == (2 * D, len(SIDES))
    for name, (feature, sign) in SIDES.items():
        assert matrix[2 * feature + (sign < 0), head.labels.index(name)] > 0
    assert (matrix.toarray() != 0).sum(0).mean() == pytest.approx(head.scores[0].n_features)


def test_a_head_is_the_same_after_loading(head, planted, tmp_path) -> None:
    head.save_pretrained(tmp_path / "head")
    same = LabelHead.from_pretrained(tmp_path / "head")
    for name in ("A", "W", "bias", "temperature", "thresholds"):
        assert torch.equal(getattr(same, name), getattr(head, name))
    assert np.array_equal(same.features, head.features) and str(same) == str(head)
    assert np.array_equal(same.predict(planted[0], DOCUMENTS), head.predict(planted[0], DOCUMENTS))
    assert {path.name for path in (tmp_path / "head").iterdir()} == {"label_head.json", "label_head.safetensors"}


@pytest.mark.parametrize("fault", ["edited", "replaced", "cut", "another", "out of range"])
def test_damaged_files_are_refused(head, tmp_path, fault) -> None:
    head.save_pretrained(tmp_path)
    facts, weights = tmp_path / "label_head.json", tmp_path / "label_head.safetensors"
    if fault == "edited":
        facts.write_text(facts.read_text().replace('"seed": 0', '"seed": 1'))
    if fault == "another":
        facts.write_text(json.dumps({"kind": "space map"}))
    if fault == "cut":
        weights.write_bytes(weights.read_bytes()[:-8])
    if fault == "replaced":
        other = tmp_path / "other"
        replace(head, bias=head.bias + 1).save_pretrained(other)
        weights.write_bytes((other / weights.name).read_bytes())
    if fault == "out of range":
        replace(head, features=head.features + 100).save_pretrained(tmp_path)
    with pytest.raises(ValueError):
        LabelHead.from_pretrained(tmp_path)


def test_what_there_is_not_is_an_error(head, planted) -> None:
    codes, _, _ = planted
    with pytest.raises(ValueError, match="one of the head's"):
        head.top_features("z")
    with pytest.raises(ValueError, match="one of 240 documents"):
        head.explain(codes, 999, DOCUMENTS)
    with pytest.raises(ValueError, match="20 features, got 3"):
        head.predict(codes[:, :3], DOCUMENTS)


def test_attention_sums_to_one_and_takes_large_scores() -> None:
    own = torch.tensor([0, 1, 0, 1, 1])
    weights = attend(torch.tensor([[1e4], [-1e4], [0.0], [-1e4], [-1e4]]), own, 2)
    assert torch.allclose(torch.zeros(2, 1).index_add(0, own, weights), torch.ones(2, 1)) and weights[0] == 1


def test_the_largest_code_of_each_side_in_each_document(planted) -> None:
    codes, _, _ = planted
    text = CodedDocuments(codes, DOCUMENTS)
    largest = text.largest(np.arange(2 * D), 2 * D).toarray()
    by_document = codes.reshape(len(text), N_TOKENS, D)
    assert np.allclose(largest[:, ::2], by_document.max(1).clip(0), atol=1e-6)
    assert np.allclose(largest[:, 1::2], (-by_document).max(1).clip(0), atol=1e-6)
    assert np.allclose(text.largest(np.arange(2 * D), 2 * D, np.array([2, 5])).toarray(), largest[[2, 5]])


def test_it_is_drawn_and_text_is_escaped(head, planted) -> None:
    bad = replace(head, labels=("<b>a</b>", *head.labels[1:]))
    told = bad.explain(planted[0], 0, DOCUMENTS, labels=bad.labels)
    for html in (bad._repr_html_(), told._repr_html_()):
        assert "<b>a</b>" not in html

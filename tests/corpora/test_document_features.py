"""Pooled codes beside a slow loop over documents: by shard, by side, for tokens and for rows that are documents."""

import numpy as np
import pytest
from corpora_made import harvest_codes
from documents_planted import plant_store
from unchecked import unchecked

from saelab.corpora import diff_corpora, pool_documents


def slowly(codes: np.ndarray, doc_ids: np.ndarray, by: str) -> np.ndarray:
    """Documents by sides, one number at a time."""
    documents = np.unique(doc_ids)
    found = np.zeros((len(documents), 2 * codes.shape[1]))
    for i, document in enumerate(documents):
        for j in range(codes.shape[1]):
            for side, sign in enumerate((1, -1)):
                sizes = np.maximum(sign * codes[doc_ids == document, j], 0)
                reduced = {"max": sizes.max(), "share": (sizes > 0).mean(), "mean": sizes.mean()}
                found[i, 2 * j + side] = reduced[by]
    return found


@pytest.fixture(scope="module")
def codes() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    doc_ids = np.sort(rng.integers(0, 23, 300)) * 2  # numbers of documents need not be consecutive
    return rng.normal(size=(300, 7)) * (rng.random((300, 7)) < 0.2), doc_ids


@pytest.mark.parametrize("by", ["max", "share", "mean"])
@pytest.mark.parametrize("shard", [1000, 37, 5])  # with 5, documents lie in several shards
def test_pooled_codes_are_those_of_a_loop(codes, by, shard, tmp_path) -> None:
    store = harvest_codes(*codes, tmp_path, shard)
    assert len(list(store.shards())) == -(-300 // shard)
    pooled = pool_documents(store, by)
    assert np.allclose(pooled.matrix.toarray(), slowly(*codes, by), atol=1e-3)
    assert pooled.doc_ids.tolist() == np.unique(codes[1]).tolist() and pooled.n_tokens.sum() == 300
    assert np.array_equal(pooled.n_fires, (slowly(*codes, by) > 0).sum(0))
    some = pooled.rows(np.array([4, 2]))
    assert len(some) == 2 and np.array_equal(some.matrix.toarray(), pooled.matrix.toarray()[[4, 2]])
    assert np.array_equal(some.side((3, -1)), some.matrix.toarray()[:, 7]) and some.column_of(3) == 6


def test_rows_that_are_documents_keep_their_codes(codes, tmp_path) -> None:
    store = harvest_codes(codes[0], np.arange(300), tmp_path)
    for by in ("max", "mean"):
        pooled = pool_documents(store, by).matrix.toarray()
        assert np.allclose(pooled[:, ::2] - pooled[:, 1::2], store.matrix().toarray())


def test_embedded_documents_are_pooled_and_compared(tmp_path) -> None:
    store, texts, counts = plant_store(tmp_path / "store", 600)
    pooled = pool_documents(store)
    assert len(pooled) == 600 and np.array_equal(pooled.matrix.toarray()[:, ::2] > 0, counts > 0)
    assert pooled.n_tokens.tolist() == [1] * 600
    for row in (0, 7, 599):  # words in their order, whatever case and spaces a store keeps
        shown = pooled.text(row, 5).split()
        assert shown and texts[row].casefold().startswith(shown[0].casefold().rstrip("."))
    has = counts[:, 1] > 0
    first = diff_corpora(pooled.rows(~has), pooled.rows(has), n_null=0).rows[0]
    assert (first.feature, first.rate_a, first.rate_b) == (1, 0.0, 1.0)


def test_what_does_not_exist_is_an_error(codes, tmp_path) -> None:
    pooled = pool_documents(harvest_codes(*codes, tmp_path))
    with unchecked(), pytest.raises(ValueError, match=r"`by` must be one of .* got 'sum'"):
        pool_documents(pooled.store, "sum")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="at least one of"):
        pooled.rows(np.zeros(len(pooled), bool))
    with pytest.raises(ValueError, match="at least one of"):
        pooled.rows(np.array([len(pooled)]))
    for side in (7, (3, 0), -1):
        with pytest.raises(ValueError, match=r"feature in 0\.\.6"):
            pooled.side(side)


def test_a_document_is_shown_from_its_beginning(signed_store) -> None:
    pooled = pool_documents(signed_store)
    whole = signed_store.text
    for row in (0, 3):
        places = np.flatnonzero(whole.doc_ids == pooled.doc_ids[row])
        text = "".join(whole.words(int(places[0]), int(places[-1]) + 1))
        assert pooled.text(row, 5) and text.startswith(pooled.text(row, 5))

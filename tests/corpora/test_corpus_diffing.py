"""Corpora of tales that differ in a register, planted sides, and nothing where documents are exchanged."""

import json

import numpy as np
import pytest
from corpora_made import harvest_codes
from scipy.stats import binom
from unchecked import unchecked

from saelab.corpora import CorpusDiff, diff_corpora, pool_documents
from saelab.synthetic.tales import generate_stories


@pytest.fixture(scope="module")
def stories(tmp_path_factory):
    """Stories, and their documents in a store with a feature for each concept but names of things."""
    stories = generate_stories(300, first=400_000)
    columns = [i for i, c in enumerate(stories.labels.concepts) if c.kind not in ("word", "grammar")]
    names = {j: stories.labels.concepts[i].name for j, i in enumerate(columns)}
    rng = np.random.default_rng(0)
    kept = rng.random((len(stories.token_ids), len(columns))) < 0.7  # an imperfect dictionary
    codes = stories.labels.matrix[:, columns].toarray() * kept * rng.uniform(0.5, 2, kept.shape)
    store = harvest_codes(codes, stories.story_ids, tmp_path_factory.mktemp("stories"))
    return stories, pool_documents(store), names


def has(stories, concept: str) -> np.ndarray:
    return np.bincount(stories.story_ids, stories.labels[concept].numpy(), minlength=len(stories)) > 0


@pytest.mark.parametrize("register", ["recipe", "weather-report"])
def test_the_register_that_differs_is_first(stories, register) -> None:
    tales, documents, names = stories
    with_it = has(tales, register)
    found = diff_corpora(documents.rows(~with_it), documents.rows(with_it), labels=names)
    first = found.rows[0]
    assert first.name == register and first.more_in == "b" and (first.rate_a, first.rate_b) == (0.0, 1.0)
    assert first in found.discoveries and first.delta.value == 1 and first.delta.low > 0.8 and first.log_odds.low > 2
    assert max(found.null_discoveries) < len(found.discoveries)
    back = diff_corpora(documents.rows(with_it), documents.rows(~with_it), labels=names)
    assert back.rows[0].name == register and back.rows[0].more_in == "a" and back.rows[0].delta.value == -1
    # what the register takes the place of is rarer where it is
    assert all(row.delta.value < 0 for row in found.discoveries if row.name in ("giver", "receiver"))


def test_a_register_of_some_documents_is_found_too(stories) -> None:
    """A share of 5 % of documents against one of 45 %."""
    tales, documents, names = stories
    with_it, rng = has(tales, "recipe"), np.random.default_rng(1)
    in_b = rng.random(len(tales)) < np.where(with_it, 0.9, 0.4)
    found = diff_corpora(documents.rows(~in_b), documents.rows(in_b), labels=names)
    assert found.rows[0].name == "recipe" and found.rows[0].q < 0.05


@unchecked()
def test_nothing_is_found_in_corpora_of_one_kind(stories) -> None:
    _, documents, _ = stories
    n_seeds, false = 20, 0
    for seed in range(n_seeds):
        in_b = np.random.default_rng(seed).random(len(documents)) < 0.5
        false += bool(diff_corpora(documents.rows(~in_b), documents.rows(in_b), n_null=0).discoveries)
    # without a difference any discovery is false, which FDR .05 allows in one of twenty corpora
    assert false <= binom.ppf(0.999, n_seeds, 0.05)


def test_documents_count_and_tokens_do_not(tmp_path) -> None:
    """A feature that fires on all tokens of a few long documents of b differs by tokens, not by documents."""
    rng = np.random.default_rng(2)
    sizes = np.where(np.arange(60) % 10 == 9, 200, 5)
    doc_ids = np.repeat(np.arange(60), sizes)
    fires = np.isin(doc_ids, (39, 49, 59))  # three documents of 600 tokens, all b's
    codes = np.stack([fires, rng.random(len(doc_ids)) < 0.1], axis=1).astype(float)
    documents = pool_documents(harvest_codes(codes, doc_ids, tmp_path), "share")
    found = diff_corpora(documents.rows(np.arange(30)), documents.rows(np.arange(30, 60)), min_documents=1)
    assert not found.discoveries and {row.feature: row for row in found.rows}[0].p > 0.1


@pytest.mark.parametrize("by", ["max", "share", "mean"])
def test_each_side_of_a_signed_feature_is_told(tmp_path, by) -> None:
    rng = np.random.default_rng(3)
    doc_ids = np.repeat(np.arange(80), 10)
    fires = rng.random((800, 4)) < 0.2
    signs = np.where(rng.random((800, 4)) < 0.5, 1, -1)
    signs[:, 0] = np.where(doc_ids < 40, 1, -1)  # a fires on one side, b on the other, as often and as strongly
    documents = pool_documents(harvest_codes(fires * signs * rng.uniform(1, 2, fires.shape), doc_ids, tmp_path), by)
    found = diff_corpora(documents.rows(np.arange(40)), documents.rows(np.arange(40, 80)), labels={0: "hot"})
    assert [(row.feature, row.sign) for row in found.discoveries] in ([(0, 1), (0, -1)], [(0, -1), (0, 1)])
    rows = {row.sign: row for row in found.discoveries}
    assert rows[1].more_in == "a" and rows[-1].more_in == "b" and rows[1].name == "hot"
    assert rows[1].opposite_rates == (rows[-1].rate_a, rows[-1].rate_b) == (0.0, pytest.approx(0.9, abs=0.2))


def test_larger_codes_count_where_as_many_documents_have_them(tmp_path) -> None:
    rng = np.random.default_rng(4)
    sizes = rng.uniform(1, 2, (80, 3))
    sizes[40:, 1] += 0.7
    documents = pool_documents(harvest_codes(sizes, np.arange(80), tmp_path))
    found = diff_corpora(documents.rows(np.arange(40)), documents.rows(np.arange(40, 80)))
    first = found.discoveries[0]
    assert first.feature == 1 and first.difference.value == 0 and first.delta.low > 0


def test_a_diff_prints_and_is_saved(stories, tmp_path) -> None:
    tales, documents, names = stories
    with_it = has(tales, "recipe")
    found = diff_corpora(documents.rows(~with_it), documents.rows(with_it), labels=names, n_null=3)
    lines = str(found).splitlines()
    assert "documents exchanged at random (3 draws)" in lines[0] and lines[2].endswith("recipe")
    found.save(tmp_path / "diff.json")
    saved = json.loads((tmp_path / "diff.json").read_text())
    assert len(saved["rows"]) == len(found.rows) and saved["rows"][0]["delta"]["low"] == found.rows[0].delta.low
    assert isinstance(found, CorpusDiff)


def test_corpora_that_cannot_be_compared_are_refused(stories, tmp_path) -> None:
    _, documents, _ = stories
    other = pool_documents(harvest_codes(np.eye(3), np.arange(3), tmp_path))
    with pytest.raises(ValueError, match="coded by the same SAE"):
        diff_corpora(documents, other)
    with pytest.raises(ValueError, match="pooled alike"):
        diff_corpora(documents, pool_documents(documents.store, "share"))
    with pytest.raises(ValueError, match="at least 2 documents"):
        diff_corpora(documents, documents.rows(np.array([0])))
    with pytest.raises(ValueError, match="`fdr` must be between"):
        diff_corpora(documents, documents, fdr=1.5)
    with unchecked(), pytest.raises(TypeError, match="`labels` must be"):
        diff_corpora(documents, documents, labels="labels.sqlite")  # type: ignore[arg-type]

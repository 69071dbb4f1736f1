"""Rules over the words of documents: planted words come back, rare ones too, and nothing comes of shuffled codes."""

import re

import numpy as np
import pytest
from documents_planted import OTHERS, PLANTED, make_documents, plant_store, word_sae

import saelab as sl
from saelab.labels.rules import label_by_rules, make_predicates
from saelab.labels.rules.side_words import add_side_words


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    return plant_store(tmp_path_factory.mktemp("planted"))


def held(texts, word):
    return np.array([re.search(rf"\b{word}\b", text, re.IGNORECASE) is not None for text in texts])


def test_words_of_documents_are_predicates_whatever_their_case(planted):
    store, texts, _ = planted
    made = make_predicates(store)
    for word in (*PLANTED, *OTHERS[:5]):
        assert np.array_equal(made.column(f"the word {word!r}"), held(texts, word)), word
    assert np.array_equal(
        made.column("documents with words in capitals"), [bool(re.search("[A-Z]{2}", t)) for t in texts]
    )
    assert np.array_equal(made.column("documents of fewer than 8 words"), [len(t.split()) < 8 for t in texts])
    pair = next(name for name in made.names if name.startswith("the words "))
    first, second = pair.removeprefix("the words ").strip("'").split()
    assert np.array_equal(made.column(pair), [f"{first} {second}" in text for text in texts])
    assert made.matrix.shape[0] == len(store) and "the word" in " ".join(made.names)
    with pytest.raises(ValueError, match="`sizes` must name families among"):
        make_predicates(store, sizes={"token": 3})


def test_each_feature_is_labeled_by_its_word(planted):
    store, _, _ = planted
    found = label_by_rules(store)
    for j, word in enumerate(PLANTED):
        (row,) = found.of(j)
        assert row.text == f"the word {word!r}" and row.f1 == 1 and row.auroc == 1, row


def test_nothing_is_good_of_codes_without_meaning(planted, tmp_path):
    _, texts, counts = planted
    order = np.random.default_rng(1).permutation(len(texts))
    acts = sl.embed(counts[order], texts, progress=False)
    found = label_by_rules(sl.harvest(word_sae(), None, acts, tmp_path, progress=False))
    assert not found.good and len(found.rows) == len(PLANTED)


def test_a_rare_word_becomes_a_predicate_where_it_tells_a_feature(planted):
    store, texts, _ = planted
    few = make_predicates(store, sizes={"document word": 3})
    assert f"the word {PLANTED[0]!r}" not in few.names
    more = add_side_words(store, few, store.split())
    added = more.names[len(few) :]
    assert f"the word {PLANTED[0]!r}" in added and not {f"the word {word!r}" for word in OTHERS} & set(added)
    assert np.array_equal(more.column(f"the word {PLANTED[0]!r}"), held(texts, PLANTED[0]))
    silent = ~held(texts, PLANTED[0])  # of training documents none holds it
    assert f"the word {PLANTED[0]!r}" not in add_side_words(store, few, silent).names
    own = few.without("document word")
    assert add_side_words(store, own, store.split()) is own


def test_metadata_and_own_predicates_are_of_documents(planted):
    store, texts, _ = planted
    own = [sl.labels.rules.Predicate("long words", lambda view: view.mark_words(lambda word: len(word) > 6))]
    made = make_predicates(store, metadata={i: f"kind {i % 3}" for i in range(len(texts))}, own=own)
    assert np.array_equal(made.column("documents of 'kind 1'"), np.arange(len(texts)) % 3 == 1)
    assert np.array_equal(made.column("long words"), [bool(re.search(r"\w{7}", text)) for text in texts])


def test_documents_have_their_numbers_in_other_seeds(tmp_path):
    store, texts, counts = plant_store(tmp_path, 300, seed=3)
    assert texts == make_documents(300, 3)[0] and np.array_equal(store.matrix().toarray(), counts)

"""Words that mark off the documents on which a feature fires, near misses among them, and their ranking at once."""

import numpy as np
import pytest
from documents_planted import PLANTED, plant_store

import saelab as sl
from saelab.analysis.top_tokens import count_top_tokens, find_centers, name_token, rank_tokens, top_words
from saelab.labels.autointerp.example_windows import ExampleConfig, build_case


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    return plant_store(tmp_path_factory.mktemp("planted"))


def test_the_planted_word_comes_first_in_all_its_documents(planted):
    store, _, counts = planted
    for j, word in enumerate(PLANTED):
        (first, share), *others = top_words(store, store.feature(j), 4)
        assert (first.strip().lower(), share) == (word, 1.0) and all(share < 0.9 for _, share in others)
        ids = [i for i, _ in rank_tokens(store, store.feature(j).indices, 4)]
        assert count_top_tokens(store, j, j + 1, 4)[0].tolist() == ids
        assert counts[store.feature(j).indices, j].all()
    table = sl.analysis.list_features(store, sort="feature", descending=False)
    assert [row["words"][0].strip().lower() for row in table.rows] == list(PLANTED) and "1,200 documents" in str(table)


def test_weights_are_the_parts_of_the_divergence(planted):
    store, texts, _ = planted
    rows = np.arange(0, len(texts), 7)
    found = [{name.lower() for name in texts[row].rstrip(".").split()} for row in range(len(texts))]
    weights = {}
    for word in set().union(*found):
        p, q = np.mean([word in found[row] for row in rows]), np.mean([word in one for one in found])
        if p > 0:
            weights[word] = p * np.log(p / q)
    best = sorted(weights.values(), reverse=True)[:6]
    ranked = [weights[name_token(store, i).strip().lower()] for i, _ in rank_tokens(store, rows, 6)]
    np.testing.assert_allclose(ranked, best, rtol=1e-12)


def test_near_misses_hold_a_word_of_the_top_documents(planted):
    store, texts, counts = planted
    found = sl.analysis.max_activating_examples(store, 1, n_top=5, n_near=6)
    tops = [example.token for example in found.group("top").examples]
    names = {name_token(store, i).strip().lower() for i in find_centers(store, np.unique(tops))}
    near = found.group("near miss", 0).examples
    assert len(near) == 6 and PLANTED[1] in names
    for example in near:
        assert counts[example.token, 1] == 0 and names & set(texts[example.token].lower().rstrip(".").split())
    rows = counts[:, 2] > 0
    part = sl.analysis.max_activating_examples(store, 1, rows=rows, n_near=6)
    assert all(rows[example.token] for group in part.groups for example in group.examples)


def test_cases_of_a_language_model_are_documents(planted):
    store, texts, counts = planted
    case = build_case(store, 2, 0, store.split(), ExampleConfig(width=200))
    assert case is not None and not case.problem
    for example in case.shown + case.fires:
        assert counts[example.token, 2] and example.words == (texts[example.token],)
    for example in case.silent + case.hard + case.easy:
        assert not counts[example.token, 2] and example.value == 0
    assert len(case.hard) and len(case.easy) and len(case.fires) == len(case.hard) + len(case.easy)

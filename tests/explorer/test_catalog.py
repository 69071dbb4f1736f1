"""The list of features beside naive sorting and filtering, its search, and labels that others change meanwhile."""

import contextlib
import json
import math
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import saelab as sl
from saelab.analysis.dashboard import list_features
from saelab.analysis.top_tokens import count_top_tokens, top_words
from saelab.explorer import catalog
from saelab.explorer.catalog import COLUMNS, N_SHOWN, N_TOKENS, FeatureCatalog
from saelab.explorer.session import Explorer
from saelab.labels.label import Label
from saelab.labels.label_store import LabelStore
from tests.explorer.conftest import D_SAE, DEAD


def rows_of(explorer: Explorer, **query: Any) -> list[dict[str, Any]]:
    """All rows of a query, read in pages of 7."""
    rows: list[dict[str, Any]] = []
    while True:
        page = explorer.catalog.page(**query, offset=len(rows), limit=7)
        assert json.dumps(page, allow_nan=False) and page["offset"] == len(rows)
        rows += page["rows"]
        if len(rows) >= page["total"]:
            return rows


def numbers(rows: list[dict[str, Any]]) -> list[int]:
    return [row["feature"] for row in rows]


@pytest.fixture
def labelled(explorer: Explorer) -> Explorer:
    """Labels by people and machines, with scores, and one feature with a label for each side."""
    made = [
        Label(
            feature=j, text=f"word {j % 5}", author=("rules", "model")[j % 2], scores={"f1": j / 99, "f1_chance": 1.0}
        )
        for j in range(0, 30, 3)
    ]
    made += [Label(feature=31, sign=sign, text=text, author="rules") for sign, text in ((1, "Hot"), (-1, "cold"))]
    explorer.labels.add(made)
    explorer.set_label(1, "Zebra crossings")
    explorer.annotations.set_note(5, "seen")
    explorer.annotations.set_list("mine", [9, 4, 31])
    return explorer


def test_rows_are_those_of_the_table_of_features(explorer: Explorer) -> None:
    table = {row["feature"]: row for row in list_features(explorer.store, top=None).rows}
    rows = rows_of(explorer)
    assert sorted(numbers(rows)) == list(range(D_SAE)) and explorer.store.signed
    for row in rows:
        own = table[row["feature"]]
        assert [row[name] for name in ("density", "n_positive", "n_negative", "peak")] == [
            own[name] for name in ("density", "n_positive", "n_negative", "peak")
        ]
        assert row["balance"] == (None if math.isnan(own["balance"]) else own["balance"])
        assert row["tokens"] == own["words"] and (row["kind"] == "dead") == (row["feature"] in DEAD)


KEYS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "label": lambda row: row["label"].casefold() or None,
    "kind": lambda row: sl.analysis.density.KINDS.index(row["kind"]),
}


@pytest.mark.parametrize("order", ["asc", "desc"])
@pytest.mark.parametrize("column", COLUMNS)
def test_every_column_sorts_with_the_unknown_last(labelled: Explorer, column: str, order: str) -> None:
    rows = rows_of(labelled, sort=column, order=order)
    keys = [KEYS.get(column, lambda row: None if row[column] == "" else row[column])(row) for row in rows]
    known = [(key, row["feature"]) for key, row in zip(keys, rows, strict=True) if key is not None]
    assert keys[len(known) :] == [None] * (len(rows) - len(known))
    assert [key for key, _ in known] == sorted((key for key, _ in known), reverse=order == "desc")
    for (key, feature), (then, following) in pairwise(known):
        assert key != then or feature < following, "equal ones go by number"
    last = numbers(rows)[len(known) :]
    assert last == sorted(last)


FILTERS: list[tuple[dict[str, Any], Callable[[dict[str, Any]], bool]]] = [
    ({"sign": "both"}, lambda row: row["n_positive"] > 0 and row["n_negative"] > 0),
    ({"sign": "+"}, lambda row: row["n_positive"] > 0 and row["n_negative"] == 0),
    ({"sign": "-"}, lambda row: row["n_negative"] > 0 and row["n_positive"] == 0),
    ({"kind": "dead"}, lambda row: row["kind"] == "dead"),
    ({"labeled": "yes"}, lambda row: row["label"] != ""),
    ({"labeled": "no"}, lambda row: row["label"] == ""),
    ({"labeled": "person"}, lambda row: row["by_person"]),
    ({"author": "model"}, lambda row: row["feature"] % 6 == 3 and row["feature"] < 30),
    ({"list": "mine"}, lambda row: row["feature"] in (4, 9, 31)),
    ({"list": "no such list"}, lambda row: False),
    ({"density_min": "0.05", "density_max": "0.2"}, lambda row: 0.05 <= row["density"] <= 0.2),
    ({"peak_min": "2.5"}, lambda row: row["peak"] >= 2.5),
    ({"score_min": 0.1}, lambda row: row["score"] is not None and row["score"] >= 0.1),
    ({"match_min": 0.1}, lambda row: row["match"] is not None),
]


@pytest.mark.parametrize(("query", "kept"), FILTERS, ids=[" ".join(query) for query, _ in FILTERS])
def test_filters_keep_what_they_say(labelled: Explorer, query: dict[str, Any], kept: Any) -> None:
    everything = rows_of(labelled, sort="feature", order="asc")
    assert rows_of(labelled, sort="feature", order="asc", **query) == [row for row in everything if kept(row)]


def test_labels_notes_and_scores_are_in_the_rows(labelled: Explorer) -> None:
    rows = {row["feature"]: row for row in rows_of(labelled)}
    assert rows[31]["label"] == "+ Hot; \u2212 cold" and rows[1]["by_person"] and not rows[0]["by_person"]
    assert rows[9]["score"] == 9 / 99 and rows[1]["score"] is None
    assert [j for j, row in rows.items() if row["noted"]] == [5]
    assert labelled.names([1, 2]) == {1: "Zebra crossings", 2: ""}
    counts = labelled.catalog.kinds()
    assert sum(counts.values()) == D_SAE and counts["dead"] == len(DEAD)


def test_concepts_sort_and_filter(shown_store: sl.FeatureStore, shown_sae: sl.SAE) -> None:
    """Codes that are the truth of two concepts but for some tokens; a feature that is the best for both shows one."""
    rng = np.random.default_rng(0)
    truth = rng.random((400, 4)) < 0.3
    codes = np.zeros((400, D_SAE), np.float32)
    codes[:, 7], codes[:, 9] = truth[:, 0], -(truth[:, 1] & (rng.random(400) < 0.5)).astype(np.float32)
    table = [sl.lm.Concept(name, "word") for name in ("<b>owl</b>", "night", "rare", "rarer")]
    labels = sl.lm.TokenLabels.of(truth, table, doc_ids=np.arange(400) // 20)
    scores = sl.evaluation.score_concepts(codes, labels)
    with contextlib.closing(Explorer.open(shown_store, sae=shown_sae, concepts=scores)) as explorer:
        rows = rows_of(explorer, sort="concept")
        best = scores.best("night")
        assert (
            numbers(rows)[0] == 7 and rows[0]["concept"] == "<b>owl</b> 1.00" and (best.feature, best.side) == (9, -1)
        )
        shown = {row["feature"]: row["concept"] for row in rows if row["concept"]}
        assert shown[9] == f"\u2212 night {best.f1:.2f}" and set(shown) <= {row.feature for row in scores.scored}
        assert numbers(rows_of(explorer, concept_min="0.99")) == [7]
        assert explorer.about()["has"]["concepts"]


def test_search_finds_numbers_labels_tokens_and_parts_of_words(labelled: Explorer) -> None:
    labelled.set_label(2, "7 wonders")
    assert numbers(rows_of(labelled, q="7"))[:2] == [7, 2]
    assert numbers(rows_of(labelled, q=str(D_SAE))) == [] or D_SAE not in numbers(rows_of(labelled, q=str(D_SAE)))
    assert numbers(rows_of(labelled, q="crossing zebra")) == [1] and numbers(rows_of(labelled, q="ebr")) == [1]
    assert numbers(rows_of(labelled, q='zebra "* OR')) == [] and len(rows_of(labelled, q="   ")) == D_SAE
    token = next(row["tokens"][0] for row in rows_of(labelled) if row["tokens"] and row["tokens"][0].strip().isalpha())
    found = set(numbers(rows_of(labelled, q=token)))
    tops = {
        j: [word for word, _ in top_words(labelled.store, labelled.store.feature(j), N_TOKENS)] for j in range(D_SAE)
    }
    assert found >= {j for j, words in tops.items() if token in words}
    both = numbers(rows_of(labelled, q="word", sort="feature", order="desc", author="model"))
    assert both == sorted(both, reverse=True) and both


def test_what_others_change_shows_at_the_next_page(labelled: Explorer) -> None:
    with LabelStore.open(labelled.store) as other:  # a connection of its own, as of another process
        other.set(7, "aardvark", author="bob")
        assert numbers(rows_of(labelled, q="aardvark")) == [7]
        other.choose(7, None)
        other.delete(7)
        assert rows_of(labelled, q="aardvark") == [] and labelled.names([7]) == {7: ""}
        other.add([Label(feature=j, text="everywhere", author="m") for j in range(D_SAE)])
        assert len(rows_of(labelled, q="everywhere")) == D_SAE - 1, "a person's stays"
    labelled.set_label(7, "quokka")
    assert numbers(rows_of(labelled, q="quokka")) == [7]
    labelled.annotations.undo()
    assert rows_of(labelled, q="quokka") == []


def test_rows_asked_for_early_are_the_same(explorer: Explorer, monkeypatch: pytest.MonkeyPatch) -> None:
    late = rows_of(explorer)
    early = FeatureCatalog(explorer.store, explorer.labels, explorer.annotations, explorer.sae)
    assert early.progress == 0 and early.page(limit=D_SAE)["rows"] == late
    monkeypatch.setattr(catalog, "GLANCE", 8)  # of frequent features, some shards are enough
    shown = {row["feature"]: row for row in early.page(limit=D_SAE)["rows"]}
    for row in late:
        assert len(shown[row["feature"]]["tokens"]) <= N_SHOWN and bool(shown[row["feature"]]["tokens"]) == bool(
            row["tokens"]
        )


@pytest.mark.parametrize("entries", [1, 500, 10**9])
def test_blocks_of_any_size_count_the_same_tokens(
    explorer: Explorer, monkeypatch: pytest.MonkeyPatch, entries: int
) -> None:
    monkeypatch.setattr(catalog, "BLOCK_ENTRIES", entries)
    again = FeatureCatalog(explorer.store, explorer.labels, explorer.annotations)
    again.start()
    again.wait()
    assert again.progress == 1 and len(explorer.store.manifest.shards) > 2
    for feature in range(D_SAE):
        words = top_words(explorer.store, explorer.store.feature(feature), N_TOKENS)
        strings = [explorer.store.text.strings[i] for i in again.top_tokens(feature)]
        assert strings == [word for word, _ in words]
    assert np.array_equal(
        count_top_tokens(explorer.store, 3, 9, 4), [(again.top_tokens(j) + [-1] * 4)[:4] for j in range(3, 9)]
    )


def test_a_sample_of_firings_is_all_or_that_of_evenly_spaced_shards(explorer: Explorer) -> None:
    store = explorer.store
    for feature in (int(store.statistics.fires.sum(1).argmax()), DEAD[0]):
        rows = store.feature(feature).indices
        assert np.array_equal(store.sample_firings(feature, 10**6), rows)
        some = store.sample_firings(feature, 1 + len(rows) // 2)
        assert set(some) <= set(rows) and len(some) <= len(rows) and bool(len(some)) == bool(len(rows))


def test_counting_waits_for_the_first_page_but_not_for_ever(
    explorer: Explorer, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = [FeatureCatalog(explorer.store, explorer.labels, explorer.annotations) for _ in range(2)]
    monkeypatch.setattr(catalog, "HEAD_START", 60)
    made[0].start()
    made[0]._thread.join(0.2)
    assert made[0].progress == 0 and made[0].page()["total"] == D_SAE
    monkeypatch.setattr(catalog, "HEAD_START", 0)
    made[1].start()
    for one in made:
        one._thread.join(30)
        assert one.progress == 1


def test_counting_stops_when_the_explorer_closes(harvested: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(catalog, "BLOCK_FEATURES", 1)
    store = sl.FeatureStore.load(harvested)
    made = Explorer.open(store)
    count = made.catalog._count
    monkeypatch.setattr(made.catalog, "_count", lambda *part: (count(*part), made.catalog._closed.set()))
    made.close()
    assert not made.catalog._thread.is_alive() and made.catalog.progress < 1


@pytest.mark.parametrize(
    ("query", "complaint"),
    [
        ({"sort": "colour"}, "`sort` must be one of"),
        ({"order": "up"}, "`order` must be one of"),
        ({"kind": "<b>"}, "`kind` must be one of"),
        ({"density_min": "few"}, "`density_min` must be a number"),
        ({"density_min": "nan"}, "`density_min` must be a number"),
        ({"offset": "-1"}, "`offset` must be at least 0"),
        ({"limit": "501"}, "`limit` in 1..500"),
        ({"colour": "1"}, "A list is asked for by"),
    ],
)
def test_a_wrong_query_is_one_sentence(explorer: Explorer, query: dict[str, str], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        explorer.catalog.page(**query)

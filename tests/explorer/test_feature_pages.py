"""Pages of single features beside analyses of the whole store; hostile texts; windows and more examples."""

import json
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest

import saelab as sl
from saelab.analysis.dashboard import describe_feature
from saelab.analysis.feature_similarity import cofiring_features, nearest_features, similar_features, spread_evenly
from saelab.explorer import feature_pages
from saelab.explorer.feature_pages import describe, expand_window, list_examples
from saelab.explorer.session import Explorer
from saelab.labels.label import Label
from saelab.visualization.card_data import describe_card, describe_effects, describe_window
from tests.explorer.conftest import D_SAE, DEAD
from tests.pages import read_window

HOSTILE = '</script><script>alert(1)</script><img src=x onerror="alert(2)">\''


def text_of(window: list[Any]) -> str:
    return "".join(read_window(window)[0])


def test_every_page_is_json_and_its_card_is_the_card(explorer: Explorer) -> None:
    for feature in range(D_SAE):
        page = json.loads(json.dumps(describe(explorer, feature), allow_nan=False))
        card = page["card"]
        assert card.pop("near")["by"] == "cosine"
        assert card == json.loads(json.dumps(describe_card(describe_feature(explorer.store, feature))))
        assert (card["sides"] == []) == (feature in DEAD) and "effects" not in card and page["partner"] is None
    with pytest.raises(ValueError, match=r"`feature` must be in 0..47, got 48"):
        describe(explorer, D_SAE)


@pytest.mark.parametrize("by", ["correlation", "phi", "cosine"])
def test_similar_features_of_one_are_those_found_for_all(explorer: Explorer, by: Any) -> None:
    source = explorer.sae if by == "cosine" else explorer.store
    everything = nearest_features(source, by, m=5)
    for feature in range(D_SAE):
        found = similar_features(source, feature, by, m=5, n_rows=10**9)
        own = everything.of(feature)
        assert [j for j, _ in found.rows] == [j for j, _ in own], feature
        assert np.allclose([v for _, v in found.rows], [v for _, v in own], rtol=1e-5, atol=1e-6)
        assert found.n_read == found.n_firings == (None if by == "cosine" else len(explorer.store.feature(feature)))


def test_what_fires_together_is_counted_as_in_the_whole_matrix(explorer: Explorer) -> None:
    fires = explorer.store.matrix().toarray() != 0
    for feature in range(D_SAE):
        found = cofiring_features(explorer.store, feature, n_rows=10**9)
        for row in found.rows:
            share = fires[fires[:, feature], row.feature].mean()
            assert row.share == pytest.approx(share) and row.lift == pytest.approx(share / fires[:, row.feature].mean())
            assert row.phi == pytest.approx(np.corrcoef(fires[:, feature], fires[:, row.feature])[0, 1], abs=1e-5)
        sizes = [abs(row.phi) for row in found.rows]
        assert sizes == sorted(sizes, reverse=True) and feature not in [row.feature for row in found.rows]
    assert cofiring_features(explorer.store, DEAD[0]).rows == ()


def test_a_dense_feature_is_read_at_evenly_spaced_firings(explorer: Explorer) -> None:
    dense = int(explorer.store.statistics.fires.sum(1).argmax())
    n = len(explorer.store.feature(dense))
    found = cofiring_features(explorer.store, dense, n_rows=n // 2)
    assert (found.n_read, found.n_firings) == (n // 2, n) and f"{n // 2} of its {n} firings" in str(found)
    exact = {row.feature: row for row in cofiring_features(explorer.store, dense, m=D_SAE, n_rows=n).rows}
    for row in found.rows:  # a share of n / 2 firings: five standard errors of a sample without replacement
        share = exact[row.feature].share
        assert abs(row.share - share) <= 5 * (share * (1 - share) / (n // 2)) ** 0.5 + 1e-9
    for size, chosen in ((10, 3), (7, 7), (5, 9), (0, 4), (1000, 999)):
        places = spread_evenly(size, chosen)
        assert len(places) == min(size, chosen) == len(set(places.tolist())) and set(places) <= set(range(size))
        gaps = np.diff([-0.5, *places, size - 0.5]) if len(places) else [1]
        assert max(gaps) <= size / max(1, len(places)) + 1, "from the first to the last"


def test_hostile_texts_are_shown_as_text(explorer: Explorer) -> None:
    explorer.set_label(3, HOSTILE)
    explorer.labels.add([Label(feature=3, text=HOSTILE, author=HOSTILE, scores={"f1": float("nan"), "r": 0.5}, sign=1)])
    explorer.annotations.set_note(3, HOSTILE)
    explorer.annotations.set_list(HOSTILE[:100], [3])
    strings = dict(explorer.store.text.strings)
    page = describe(explorer, 3)
    json.dumps(page, allow_nan=False)
    assert HOSTILE in page["card"]["label"]  # as it is: the page draws text as text (test_app_in_browser.py)
    assert page["note"] == HOSTILE and page["lists"] == [HOSTILE[:100]]
    assert page["labels"][0]["scores"] == {} and page["labels"][1]["scores"] == {"f1": None, "r": 0.5}
    hostile = dict.fromkeys(strings, HOSTILE)
    explorer.store.__dict__["text"] = replace(explorer.store.text, strings=hostile)
    explorer.cache.clear()
    windows = [window for group in describe(explorer, 4)["card"]["groups"] for window in group["windows"]]
    windows.append(expand_window(explorer, 4, 100, 20, 20)["window"])
    windows += list_examples(explorer, 4, "top", 1, 0, 5)["windows"]
    assert all(set(text_of(window)) <= set(HOSTILE) and HOSTILE in text_of(window) for window in windows)


def test_edits_show_at_once_on_pages_that_are_held(explorer: Explorer) -> None:
    assert describe(explorer, 3)["labels"] == []
    explorer.set_label(3, "first")
    explorer.labels.add([Label(feature=3, text="by rules", author="rules", provenance={"store": "s"})])
    page = describe(explorer, 3)
    assert page["label"] == "first" and page["card"]["label"] == "first"
    chosen = [(label["text"], label["chosen"], label["by_person"]) for label in page["labels"]]
    assert chosen == [("first", True, True), ("by rules", False, False)]
    explorer.choose_label(3, "rules")
    assert describe(explorer, 3)["label"] == "by rules"
    explorer.annotations.undo()
    assert describe(explorer, 3)["label"] == "first"
    other, _, none = describe(explorer, 3)["card"]["near"]["rows"][0]
    explorer.set_label(other, "nearby")
    assert none == "" and describe(explorer, 3)["card"]["near"]["rows"][0][2] == "nearby"


def test_a_window_grows_to_the_whole_sequence(explorer: Explorer) -> None:
    feature = int(explorer.store.statistics.fires.sum(1).argmax())
    row = int(explorer.store.feature(feature).indices[5])
    texts = [text_of(expand_window(explorer, feature, row, n, n)["window"]) for n in (0, 4, 30, 2000)]
    assert all(a in b for a, b in pairwise(texts)) and len(texts[0]) < len(texts[1]) < len(texts[3])
    for wrong in ({"row": -1}, {"row": len(explorer.store)}, {"row": 0, "before": 2001}, {"row": 0, "after": -1}):
        with pytest.raises(ValueError, match="must be in"):
            expand_window(explorer, feature, **{"before": 1, "after": 1, **wrong})


def test_more_examples_go_on_after_those_of_the_card(explorer: Explorer) -> None:
    feature = int(explorer.store.statistics.fires.min(1).argmax())  # of both signs
    card = describe_feature(explorer.store, feature)
    assert {group.side for group in card.examples.groups} == {-1, 0, 1}
    for group in card.examples.groups:
        asked = explorer, feature, group.name, group.side
        n = len(group.examples)
        first = list_examples(*asked, 0, n)
        assert first["windows"] == [describe_window(one) for one in group.examples]
        later = list_examples(*asked, n, 5)
        assert len(later["windows"]) == min(5, later["total"] - n)
        assert not [window for window in later["windows"] if window in first["windows"]]
    for group, side in (("best", 1), ("quantile 6 of 5", 1), ("top", 7), ("near miss", 1)):
        with pytest.raises(ValueError, match="group"):
            list_examples(explorer, feature, group, side, 0, 5)


def test_effects_come_with_the_model_and_never_hold_a_page_up(
    shown_store: Any, shown_sae: Any, tiny: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    explorer = Explorer.open(shown_store, tiny, shown_sae)
    try:
        expected = sl.analysis.logit_lens(shown_sae, tiny, [5], allow_mismatch=True)[5]
        page = describe(explorer, 5)
        assert page["card"]["effects"] == describe_effects(expected)
        monkeypatch.setattr(feature_pages, "WAIT", 0.01)
        explorer.lock = Busy()
        expected = sl.analysis.logit_lens(shown_sae, tiny, [6], allow_mismatch=True)[6]
        assert describe(explorer, 6)["card"]["effects"] == describe_effects(expected)
        explorer.unembedding = None  # it cannot be measured now
        assert "effects" in describe(explorer, 6)["card"] and "effects" not in describe(explorer, 7)["card"]
    finally:
        explorer.close()


class Busy:
    """A lock that somebody else holds."""

    def acquire(self, timeout: float = -1) -> bool:
        return False

"""Pages of a whole store: dead latents, evaluation, comparison, attribution; as JSON, escaped, or why there is none."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import saelab as sl
from saelab.explorer import pages
from saelab.explorer.pages import PAGES, make_page
from saelab.explorer.session import Explorer
from saelab.interventions.attribution import attribute
from tests.explorer.conftest import DEAD, HOOK

HOSTILE = "<img src=x onerror=alert(1)>"


def read_page(explorer: Explorer, name: str) -> dict[str, Any]:
    page = json.loads(json.dumps(make_page(explorer, name), allow_nan=False))
    assert set(page) == {"title", "html", "figures"} and all("data" in figure for figure in page["figures"])
    assert "<img" not in page["html"] and "<script" not in page["html"]
    return page


def test_dead_latents_are_counted_and_linked(explorer: Explorer) -> None:
    page = read_page(explorer, "dead")
    assert len(page["figures"]) == 2 and "Near-dead" in page["html"]
    for feature in DEAD:
        assert f'<a href="#/feature/{feature}">{feature}</a> dead: encoder norm collapsed' in page["html"]


def test_causes_of_many_dead_latents_are_counted_among_the_first(explorer: Explorer, monkeypatch: Any) -> None:
    monkeypatch.setattr(pages, "N_EXPLAINED", 1)
    page = read_page(explorer, "dead")
    first, *others = sorted(DEAD)
    assert f">{first}</a> dead: encoder norm collapsed" in page["html"] and "of the first 1 latents" in page["html"]
    assert all(f">{feature}</a> dead<" in page["html"] for feature in others) and len(others) > 0


def test_a_page_with_nothing_to_show_says_so(explorer: Explorer) -> None:
    for name in ("evaluation", "compare", "attribution"):
        with pytest.raises(ValueError, match="Start again with"):
            make_page(explorer, name)
    with pytest.raises(ValueError, match="A page must be one of"):
        make_page(explorer, HOSTILE)
    assert set(explorer.about()["views"]) & set(PAGES) == {"dead"}


def test_evaluation_and_attribution_are_drawn(shown_store: Any, shown_sae: Any, tiny: Any, tmp_path: Path) -> None:
    found = attribute(tiny, shown_sae, "The fox", "!", hook_point=HOOK)
    found = replace(found, tokens=tuple(HOSTILE for _ in found.tokens))
    numbers = {"fvu": 0.25, "text": HOSTILE, "n_tokens": 7, "ce_sae": float("nan")}
    explorer = Explorer.open(shown_store, sae=shown_sae, attribution=found, evaluation=numbers)
    try:
        page = read_page(explorer, "evaluation")
        assert "0.25" in page["html"] and "&lt;img" in page["html"] and page["figures"] == []
        page = read_page(explorer, "attribution")
        assert "&lt;img" in page["html"] and "<img" not in json.dumps(page["figures"])
        listed = [feature for _, feature, _, _ in found.top()]
        assert re.findall(r'<td><a href="#/feature/(\d+)">(\d+)</a></td>', page["html"]) == [
            (str(j), str(j)) for j in listed
        ]
        assert "<a" not in found._repr_html_()  # a notebook has no such pages
        assert {"evaluation", "attribution"} <= set(explorer.about()["views"])
    finally:
        explorer.close()


def test_the_comparison_is_there_when_it_is_made(shown_store: Any, shown_sae: Any, harvested: Path) -> None:
    other = sl.FeatureStore.load(harvested)
    found = sl.compare(shown_store, other, null=sl.universality.NullConfig(n_shifts=2, n_null=8), progress=False)
    explorer = Explorer.open(shown_store, sae=shown_sae, compare=other, comparison=found)
    try:
        wait_for(explorer, "comparison_state", "ready")
        page = read_page(explorer, "compare")
        assert len(page["figures"]) == 1 and explorer.comparison is found
        rows = explorer.catalog.page(sort="match", limit=200)["rows"]
        assert rows[0]["match"] == pytest.approx(1, abs=1e-5) and rows[0]["partner"] == str(rows[0]["feature"])
        explorer.matched = None
        for state, said in (("comparing", "being compared"), ("failed: why", "failed: why")):
            explorer.comparison_state = state
            with pytest.raises(ValueError, match=said):
                make_page(explorer, "compare")
    finally:
        explorer.close()


def wait_for(explorer: Explorer, name: str, value: str) -> None:
    import time

    for _ in range(6000):
        if getattr(explorer, name) == value:
            return
        assert not getattr(explorer, name).startswith("failed"), getattr(explorer, name)
        time.sleep(0.01)
    raise AssertionError(f"{name} is {getattr(explorer, name)}")

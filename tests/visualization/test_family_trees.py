"""Families are drawn as nested lists, with all text escaped."""

import re
from dataclasses import replace

import numpy as np

from saelab.corpora.feature_families import Family, FeatureFamilies
from saelab.visualization import family_trees

FAMILY = Family(
    parent=(3, 1), name="<b>animals", n_documents=40, children=((5, 1), (6, -1), (7, 1), (8, 1)),
    names=("birds", "", "<script>", "owls"), above=(-1, -1, -1, 0), inside=0.5, outside=0.01, excess=9.0, q=0.02,
)  # fmt: skip
FOUND = FeatureFamilies(
    n_documents=100, sides=np.zeros((9, 2), np.int64), min_overlap=0.1, null_counts=(1,), families=(FAMILY,)
)


def test_trees_are_nested_and_escaped() -> None:
    drawn = FOUND._repr_html_()
    assert "<script" not in drawn and "<b>" not in drawn and "3 &lt;b&gt;animals" in drawn and "&lt;script&gt;" in drawn
    assert "<li>5 birds<ul><li>8 owls</li></ul></li><li>6 \u2212</li>" in drawn
    assert len(re.findall("<li>", drawn)) == 4 and drawn.count("<ul>") == drawn.count("</ul>") == 2
    assert "1 families of 9 sides" in drawn and "4 below, 40 documents" in drawn


def test_long_lists_are_cut_and_say_so(monkeypatch) -> None:
    monkeypatch.setattr(family_trees, "MOST_FAMILIES", 2)
    monkeypatch.setattr(family_trees, "MOST_CHILDREN", 3)
    drawn = family_trees.draw_families(replace(FOUND, families=(FAMILY,) * 5))
    assert drawn.count("<details>") == 2 and "3 smaller families are not shown" in drawn and drawn.count("1 more") == 2

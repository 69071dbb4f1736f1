"""What recurs, shown: figures hold the numbers, cards stand beside their partners, and nobody's text becomes markup."""

import math
import re
from dataclasses import replace

import numpy as np
import pytest
import torch

import saelab as sl
from saelab.universality.partners import Matches
from saelab.universality.table import tell_p

HOOK = "blocks.1.hook_resid_post"
D_SAE, DEAD = 40, 5
ORDER = np.random.default_rng(3).permutation(D_SAE)
"""feature j of a is feature ORDER[j] of b"""
FLIPPED = np.arange(D_SAE) % 3 == 0
HOSTILE = '</script><script>alert(1)</script><img src=x onerror="alert(2)">'


@pytest.fixture(scope="module")
def saes() -> tuple[sl.SAE, sl.SAE]:
    """Two SAEs with the same features in another order, every third turned round, one of them dead."""
    a, b = (sl.SAE(sl.SAEConfig(d_in=32, d_sae=D_SAE, activation=sl.AbsTopK(k=4)), seed=0) for _ in "ab")
    sign, order = torch.from_numpy(np.where(FLIPPED, -1.0, 1.0)).float(), torch.from_numpy(ORDER)
    with torch.no_grad():
        a.W_enc[:, DEAD] = 0
        b.W_enc[:, order], b.b_enc[order], b.W_dec[order] = a.W_enc * sign, a.b_enc * sign, a.W_dec * sign[:, None]
    return a, b


@pytest.fixture(scope="module")
def stores(saes, tiny, tmp_path_factory) -> tuple[sl.FeatureStore, sl.FeatureStore]:
    texts = [f"{a} {v} the {b}. Then {b} ran!" for a in ("Fox", "Owl", "Cat") for v in ("saw", "hid") for b in "xyzw"]
    tokens = sl.tokenize(tiny, texts, ctx_len=20)
    folders = [tmp_path_factory.mktemp("runs") / name for name in ("first", "second")]
    made = [sl.harvest(s, tiny, tokens, f, hook_point=HOOK, progress=False) for s, f in zip(saes, folders, strict=True)]
    with sl.LabelBook.open(made[1]) as book:
        book.set(int(ORDER[0]), HOSTILE, author="me")
    return made[0], made[1]


@pytest.fixture(scope="module")
def found(stores) -> sl.Comparison:
    return sl.compare(*stores, min_count=3, n_shifts=32, progress=False)


def strings(thing) -> list[str]:
    """Every string in a figure's JSON."""
    if isinstance(thing, dict):
        return [s for key, value in thing.items() if key != "template" for s in strings(value)]
    if isinstance(thing, list | tuple | np.ndarray):
        return [s for value in thing for s in strings(value)]
    return [thing] if isinstance(thing, str) else []


def edited(found: sl.Comparison, side: str, **changes) -> sl.Comparison:
    return replace(found, **{side: replace(getattr(found, side), **changes)})


def known(side: Matches) -> np.ndarray:
    return np.abs(side.similarity[side.live & ~np.isnan(side.similarity)])


def test_every_live_feature_is_counted_once_where_its_similarity_is(found) -> None:
    similarity = found.a.similarity.copy()
    lost = np.flatnonzero(found.a.live)[:2]
    similarity[lost], similarity[found.a.partners == ORDER[7]] = np.nan, 0.33
    universal = found.a.universal & ~np.isnan(similarity) & (np.abs(similarity) > 0.5)
    given = edited(found, "a", similarity=similarity, universal=universal)
    figure = sl.plot_matches(given)
    for row, side in ((1, given.a), (2, given.b)):
        bars = [trace for trace in figure.data if trace.yaxis == ("y" if row == 1 else "y2")]
        assert {bar.name for bar in bars} == {"universal, same sign", "universal, flipped", "not universal"}
        assert sum(bar.y[0] for bar in bars) == np.isnan(side.similarity[side.live]).sum() == (2 if row == 1 else 0)
        heights = np.sum([bar.y[1:] for bar in bars], axis=0)
        assert heights.tolist() == np.histogram(np.minimum(known(side), 1), 40, (0, 1))[0].tolist()
        flipped = next(bar for bar in bars if bar.name == "universal, flipped")
        assert sum(flipped.y) == (side.universal & (side.similarity < 0)).sum() > 0
        lines = [shape.x0 for shape in figure.layout.shapes if shape.yref.startswith("y2") == (row == 2)]
        assert lines == list(side.chance)
    shares = f"of a: {given.a.share():.1%}, of b: {given.b.share():.1%}"
    assert shares in figure.layout.title.text and f"over {found.n_tokens:,} tokens" in figure.layout.title.text


def test_what_was_not_measured_is_not_drawn(saes) -> None:
    plain = sl.compare(*saes, n_shifts=0, progress=False)
    figure = sl.plot_matches(replace(plain, signed=False))
    assert not figure.layout.shapes and "no tokens" in figure.layout.title.text
    assert {trace.name for trace in figure.data} == {"universal", "not universal"}
    [cell] = sl.plot_layers({("x", "y"): plain}, "median").layout.annotations
    assert cell.text == f"{np.median(known(plain.a)):.3f}"


@pytest.mark.parametrize("value", ["count", "variance", "one_to_one", "median"])
def test_a_cell_is_about_the_features_of_its_row(found, value) -> None:
    """One pair fills both cells of a square: of each side its own number, beside its own chance."""
    given = edited(found, "b", universal=found.b.universal & (np.arange(D_SAE) % 2 == 0), chance=(0.31, 0.4))
    given = edited(given, "b", similarity=given.b.similarity * 0.8)
    figure = sl.plot_layers({("L0", "L1"): given, ("L1", "L2"): found}, value)
    [heat] = figure.data
    texts = {(int(cell.y), int(cell.x)): cell.text for cell in figure.layout.annotations}
    assert set(texts) == {(0, 1), (1, 0), (1, 2), (2, 1)}
    assert all((heat.z[i][j] is not None) == ((i, j) in texts) for i in range(3) for j in range(3))
    for (row, column), side in (((0, 1), given.a), ((1, 0), given.b)):
        if value in ("count", "variance"):
            number = side.share(value)
            chance = number * given.fdr
        else:
            number = np.median(known(side)) if value == "median" else np.abs(given.values).mean()
            chance = side.chance[0]
        assert texts[row, column].startswith(f"{number:.3f}<br>") and f">{chance:.3f}<" in texts[row, column]
        assert heat.z[row][column] == pytest.approx((number - chance) / (1 - chance))
        assert f"{number:.3f}" in heat.hovertext[row][column] and f"chance: {chance:.3f}" in heat.hovertext[row][column]
    assert (heat.zmin, heat.zmax) == (0, 1)
    assert figure.layout.xaxis.ticktext == figure.layout.yaxis.ticktext == ("L0", "L1", "L2")


def test_two_models_make_a_rectangle_and_chance_is_the_bottom(found) -> None:
    below = edited(found, "a", chance=(0.9999999, 1.0), similarity=found.a.similarity * 0.5)
    figure = sl.plot_layers({("a 0", "b 0"): found, ("a 0", "b 1"): below}, "median")
    assert figure.layout.yaxis.ticktext == ("a 0",) and figure.layout.xaxis.ticktext == ("b 0", "b 1")
    assert figure.data[0].z[0][1] == 0 < figure.data[0].z[0][0]
    with pytest.raises(ValueError, match="`comparisons` not empty"):
        sl.plot_layers({})


def test_names_in_figures_are_text(found) -> None:
    figure = sl.plot_layers({("<script>$x$</script>", "b %{x}"): found})
    said = "".join(strings(figure.to_plotly_json()))
    assert "<script" not in said and "&lt;script&gt;" in said and "$x" not in said
    assert not any("%{x}" in (trace.hovertemplate or "") for trace in figure.data)


def test_the_table_lists_the_planted_pairs_with_words_and_labels(found, stores) -> None:
    table = sl.list_universal(found, *stores, top=None)
    assert len(table.rows) == table.n_pairs == len(found.universal_pairs) > 20
    assert all(ORDER[row["a"]] == row["b"] for row in table.rows)
    assert all((row["similarity"] < 0) == FLIPPED[row["a"]] for row in table.rows)
    sizes = [abs(row["similarity"]) for row in table.rows]
    assert sizes == sorted(sizes, reverse=True) and all(row["side_a"] == 0 for row in table.rows)
    for row in table.rows:
        fires = stores[0].statistics.fires[row["a"]].sum()
        assert row["n_both"] == fires and row["p"] == max(found.a.p[row["a"]], found.b.p[row["b"]])
        turned = {"+": "-", "-": "+"} if FLIPPED[row["a"]] else {"+": "+", "-": "-"}
        assert {turned[sign]: words for sign, words in row["words_a"].items()} == row["words_b"]
    row = table.rows[0]
    at = stores[0].feature(row["a"])
    sums = np.bincount(stores[0].token_ids[at.indices], np.maximum(at.values, 0))
    if "+" in row["words_a"]:
        assert stores[0].text.strings[int(sums.argmax())] == row["words_a"]["+"][0]
    labelled = next(row for row in table.rows if row["a"] == 0)
    assert labelled["label_b"] == HOSTILE and labelled["label_a"] == ""
    shown = table._repr_html_()
    assert "<img" not in shown and "&lt;img" in shown and HOSTILE in str(table)
    assert len(sl.list_universal(found, *stores, top=3).rows) == 3


def test_sides_are_listed_as_sides(stores) -> None:
    sides = sl.compare(*stores, sides=True, min_count=3, n_shifts=32, progress=False)
    table = sl.list_universal(sides, *stores, top=None)
    assert table.rows
    for row in table.rows:
        assert ORDER[row["a"]] == row["b"] and row["similarity"] > 0
        assert row["side_b"] == (-row["side_a"] if FLIPPED[row["a"]] else row["side_a"])
        assert set(row["words_a"]) == {"+" if row["side_a"] > 0 else "-"}
    assert re.search(r"\d[+-] ", str(table))


def test_other_stores_are_refused(found, stores, saes, tiny, tmp_path) -> None:
    with pytest.raises(ValueError, match="`store_a`"):
        sl.list_universal(found, stores[1], stores[0])
    short = sl.compare(
        *(sl.SAE(sl.SAEConfig(d_in=8, d_sae=12, activation=sl.TopK(k=2)), seed=i) for i in (0, 1)), progress=False
    )
    with pytest.raises(ValueError, match="of the 12 features"):
        sl.list_universal(short, *stores)
    with pytest.raises(ValueError, match="`top`"):
        sl.list_universal(found, *stores, top=0)


def test_the_lowest_p_is_told_as_a_bound(found) -> None:
    p = np.ones(D_SAE)
    p[:4] = 1 / 513, 1 / 521, 2 / 513, 4 / 521
    side = replace(found.a, p=p)
    assert [tell_p(side, i) for i in range(5)] == ["< 1/513", "< 1/521", "0.0039", "0.0077", "1"]
    assert tell_p(replace(side, p=np.ones(D_SAE)), 0) == "1"  # chance was not measured


def test_a_comparison_draws_its_table(found) -> None:
    given = replace(found, sources=(HOSTILE, "b"))
    drawn = given._repr_html_()
    assert "<img" not in drawn and "&lt;img" in drawn and "<table" in drawn and "<script" not in drawn
    for line in str(given).split("\n"):
        for word in line.split():
            assert word in drawn.replace("&lt;", "<") or word in {"by", "freq.", "var.", "(95", "%)"}, word
    assert len(drawn) < 4000 and not math.isnan(found.a.share())

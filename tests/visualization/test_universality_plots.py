"""What recurs, shown: figures hold the numbers, cards stand beside their partners, and nobody's text becomes markup."""

import json
import math
import re
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch

import saelab as sl
from saelab.cli.app import dispatch
from saelab.universality.comparison_sources import NullConfig
from saelab.universality.matching import Matches
from saelab.universality.universal_features import format_p
from saelab.visualization import reports
from tests.pages import read_cards, read_window, with_script

D_SAE, DEAD = 24, 5
ORDER = np.random.default_rng(3).permutation(D_SAE)
"""feature j of a is feature ORDER[j] of b"""
FLIPPED = np.arange(D_SAE) % 3 == 0
MINUS = "\u2212"
FEW = {"n_top": 3, "n_quantiles": 0, "n_near": 0, "n_random": 0, "progress": False}
"""windows, for the time that they take"""
HOSTILE = '</script><script>alert(1)</script><img src=x onerror="alert(2)">'
CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)


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
def stores(saes, tmp_path_factory) -> tuple[sl.FeatureStore, sl.FeatureStore]:
    """Fifty documents of twelve tokens, of twenty kinds: each has an activation of its own, with some noise."""
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(20, (600,), generator=draw)
    x = 3 * torch.randn(20, 32, generator=draw)[ids] + torch.randn(600, 32, generator=draw)
    columns = {"token_ids": ids, "doc_ids": torch.arange(50).repeat_interleave(12), "positions": torch.arange(600) % 12}
    where = sl.stores.Provenance(
        model="/nowhere/model", weight_processing="none", hook_point="", text="", tokens_sha256="", mask={},
        dtype="float32", ctx_len=12, n_tokens=600, seed=None, versions={},
    )  # fmt: skip
    acts = sl.Activations.from_tensor(x, where, **{name: column.int() for name, column in columns.items()})
    folder, made = tmp_path_factory.mktemp("runs"), []
    for sae, name in zip(saes, ("first", "second"), strict=True):
        sl.harvest(sae, None, acts, folder / name, allow_mismatch=True, progress=False)
        (folder / name / "strings.json").write_text(json.dumps({str(i): f" {chr(97 + i)}{i}" for i in range(20)}))
        made.append(sl.FeatureStore.load(folder / name))
    with sl.labels.LabelStore.open(made[1]) as book:
        book.set(int(ORDER[0]), HOSTILE, author="me")
    return made[0], made[1]


@pytest.fixture(scope="module")
def found(stores) -> sl.universality.Comparison:
    return sl.compare(*stores, min_count=3, null=NullConfig(n_shifts=12), progress=False)


@pytest.fixture(scope="module")
def sides(stores) -> sl.universality.Comparison:
    return sl.compare(*stores, sides=True, min_count=3, null=NullConfig(n_shifts=12), progress=False)


def strings(thing) -> list[str]:
    """Every string in a figure's JSON."""
    if isinstance(thing, dict):
        return [s for key, value in thing.items() if key != "template" for s in strings(value)]
    if isinstance(thing, list | tuple | np.ndarray):
        return [s for value in thing for s in strings(value)]
    return [thing] if isinstance(thing, str) else []


def edited(found: sl.universality.Comparison, side: str, **changes) -> sl.universality.Comparison:
    return replace(found, **{side: replace(getattr(found, side), **changes)})


def known(side: Matches) -> np.ndarray:
    return np.abs(side.similarity[side.live & ~np.isnan(side.similarity)])


def test_every_live_feature_is_counted_once_where_its_similarity_is(found) -> None:
    similarity = found.a.similarity.copy()
    lost = np.flatnonzero(found.a.live)[:2]
    similarity[lost], similarity[found.a.partners == ORDER[7]] = np.nan, 0.33
    universal = found.a.universal & ~np.isnan(similarity) & (np.abs(similarity) > 0.5)
    given = edited(found, "a", similarity=similarity, universal=universal)
    figure = sl.visualization.plot_matches(given)
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
    plain = sl.compare(*saes, null=NullConfig(n_shifts=0), progress=False)
    figure = sl.visualization.plot_matches(replace(plain, signed=False))
    assert not figure.layout.shapes and "no tokens" in figure.layout.title.text
    assert {trace.name for trace in figure.data} == {"universal", "not universal"}
    [cell] = sl.visualization.plot_layers({("x", "y"): plain}, "median").layout.annotations
    assert cell.text == f"{np.median(known(plain.a)):.3f}"


@pytest.mark.parametrize("value", ["count", "variance", "one_to_one", "median"])
def test_a_cell_is_about_the_features_of_its_row(found, value) -> None:
    """One pair fills both cells of a square: of each side its own number, beside its own chance."""
    given = edited(found, "b", universal=found.b.universal & (np.arange(D_SAE) % 2 == 0), chance=(0.31, 0.4))
    given = edited(given, "b", similarity=given.b.similarity * 0.8)
    figure = sl.visualization.plot_layers({("L0", "L1"): given, ("L1", "L2"): found}, value)
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
    figure = sl.visualization.plot_layers({("a 0", "b 0"): found, ("a 0", "b 1"): below}, "median")
    assert figure.layout.yaxis.ticktext == ("a 0",) and figure.layout.xaxis.ticktext == ("b 0", "b 1")
    assert figure.data[0].z[0][1] == 0 < figure.data[0].z[0][0]
    with pytest.raises(ValueError, match="`comparisons` not empty"):
        sl.visualization.plot_layers({})


def test_names_in_figures_are_text(found) -> None:
    figure = sl.visualization.plot_layers({("<script>$x$</script>", "b %{x}"): found})
    said = "".join(strings(figure.to_plotly_json()))
    assert "<script" not in said and "&lt;script&gt;" in said and "$x" not in said
    assert not any("%{x}" in (trace.hovertemplate or "") for trace in figure.data)


def test_the_table_lists_the_planted_pairs_with_words_and_labels(found, stores) -> None:
    table = sl.universality.list_universal(found, *stores, top=None)
    assert len(table.rows) == table.n_pairs == len(found.universal_pairs) > 12
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
    labeled = next(row for row in table.rows if row["a"] == 0)
    assert labeled["label_b"] == HOSTILE and labeled["label_a"] == ""
    shown = table._repr_html_()
    assert "<img" not in shown and "&lt;img" in shown and HOSTILE in str(table)
    assert len(sl.universality.list_universal(found, *stores, top=3).rows) == 3


def test_sides_are_listed_as_sides(stores, sides) -> None:
    table = sl.universality.list_universal(sides, *stores, top=None)
    assert table.rows
    for row in table.rows:
        assert ORDER[row["a"]] == row["b"] and row["similarity"] > 0
        assert row["side_b"] == (-row["side_a"] if FLIPPED[row["a"]] else row["side_a"])
        assert set(row["words_a"]) == {"+" if row["side_a"] > 0 else "-"}
    assert re.search(r"\d[+-] ", str(table))
    feature = next(row["a"] for row in table.rows if row["a"])
    with sl.labels.LabelStore.open(stores[0]) as book:
        for sign, text in ((1, "warm"), (-1, "cool"), (0, "either")):
            book.set(feature, text, author="me", sign=sign)
        again = sl.universality.list_universal(sides, *stores, top=None)
        book.delete(feature)
    said = {row["side_a"]: row["label_a"] for row in again.rows if row["a"] == feature}
    marked = {1: "warm", -1: f"{MINUS} cool"}
    assert said and said == {sign: marked[sign] for sign in said}


def test_other_stores_are_refused(found, stores) -> None:
    with pytest.raises(ValueError, match="`store_a`"):
        sl.universality.list_universal(found, stores[1], stores[0])
    short = sl.compare(
        *(sl.SAE(sl.SAEConfig(d_in=8, d_sae=12, activation=sl.TopK(k=2)), seed=i) for i in (0, 1)), progress=False
    )
    with pytest.raises(ValueError, match="of the 12 features"):
        sl.universality.list_universal(short, *stores)
    with pytest.raises(ValueError, match="`top`"):
        sl.universality.list_universal(found, *stores, top=0)


def test_the_lowest_p_is_told_as_a_bound(found) -> None:
    p = np.ones(D_SAE)
    p[:4] = 1 / 513, 1 / 521, 2 / 513, 4 / 521
    side = replace(found.a, p=p)
    assert [format_p(side, i) for i in range(5)] == ["< 1/513", "< 1/521", "0.0039", "0.0077", "1"]
    assert format_p(replace(side, p=np.ones(D_SAE)), 0) == "1"  # chance was not measured


def test_a_comparison_draws_its_table(found) -> None:
    given = replace(found, sources=(HOSTILE, "b"))
    drawn = given._repr_html_()
    assert "<img" not in drawn and "&lt;img" in drawn and "<table" in drawn and "<script" not in drawn
    for line in str(given).split("\n"):
        for word in line.split():
            assert word in drawn.replace("&lt;", "<") or word in {"by", "freq.", "var.", "(95", "%)"}, word
    assert len(drawn) < 4000 and not math.isnan(found.a.share())


class Plain(HTMLParser):
    """The tags of a page, and its text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.said: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_data(self, data: str) -> None:
        self.said.append(data)

    @property
    def text(self) -> str:
        return "".join(self.said)


def read(page: str) -> tuple[dict, dict[int, dict]]:
    """The data and the cards of a report on one page."""
    data = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)
    assert data is not None
    return json.loads(data[1]), read_cards(page)


def said(card: dict) -> str:
    """What a card says of its feature's partners."""
    return "; ".join(
        f"{one['title']}: {one['name']} {one['label']}; {one['about']}" if "name" in one else one["title"]
        for one in card["partners"]
    )


@pytest.fixture(scope="module")
def page(stores, found, tmp_path_factory) -> str:
    out = tmp_path_factory.mktemp("report") / "all.html"
    return Path(sl.report(stores[0], out, compare=stores[1], comparison=found, **FEW).page).read_text()


def test_every_card_stands_beside_its_partner(found, page) -> None:
    data, cards = read(page)
    assert data["compared"] == "correlation" and "Compared with second" in page
    side = found.a
    for row in data["features"]:
        feature, text = row["feature"], said(cards[row["feature"]])
        if side.partners[feature] < 0:
            assert (
                row["match"] is None
                and "No partner in second" in text
                and "columns" not in cards[feature]["partners"][0]
            )
            assert ("it never fires" in text) == (not side.fires[feature])
            continue
        assert row["match"] == pytest.approx(float(side.similarity[feature]))
        assert row["partner"].split()[0] == str(side.partners[feature]) and row["universal"] == side.universal[feature]
        assert f"Partner in second: {side.partners[feature]} " in text
        assert f"correlation {side.similarity[feature]:+.3f}" in text and f"p {format_p(side, feature)}," in text
        assert f"{side.n_both[feature]:,} tokens" in text and ("flipped" in text) == (side.similarity[feature] < 0)
        assert ("not universal" in text) != side.universal[feature]
    assert "it never fires" in said(cards[DEAD])


def test_a_flipped_partner_shows_the_opposite_sign(found, page) -> None:
    cards = read(page)[1]
    checked = 0
    for feature in found.universal_pairs[:, 0].tolist():
        parts = cards[feature]["partners"][0]["columns"]
        assert [part["place"] for part in parts] == ["Here", "There"] * (len(parts) // 2)
        for pair in zip(parts[::2], parts[1::2], strict=True):
            signs = [part["sign"] for part in pair]
            assert (signs[0] != signs[1]) == bool(FLIPPED[feature])
            values = [[codes[at] for _, codes, at in map(read_window, part["windows"])] for part in pair]
            assert values[0] and np.abs(values[0]).max() == pytest.approx(np.abs(values[1]).max(), rel=0.01)
            for sign, some in zip(signs, values, strict=True):
                assert len(some) <= 3 and all(value * sign > 0 for value in some)
            checked += 1
    assert checked > 12


def test_hostile_names_of_the_other_store_stay_text(stores, found, tmp_path) -> None:
    made = sl.report(
        stores[0], tmp_path / "one.html", features=[0], compare=stores[1], comparison=found, progress=False
    )
    page = Path(made.page).read_text()
    data, cards = read(page)
    assert HOSTILE in said(cards[0])
    assert HOSTILE in data["features"][0]["partner"] and Plain(page).tags.count("script") == 3


def test_sides_have_partners_of_their_own(stores, sides, tmp_path) -> None:
    feature = int(sides.universal_pairs[0, 0]) // 2
    made = sl.report(
        stores[0], tmp_path / "o.html", features=[feature], compare=stores[1], comparison=sides, progress=False
    )
    data, cards = read(Path(made.page).read_text())
    text = said(cards[feature])
    values = sides.a.similarity[2 * feature : 2 * feature + 2]
    assert data["features"][0]["match"] == pytest.approx(float(np.nanmax(values)))
    assert "of + in second" in text and f"of {MINUS} in second" in text
    negative = bool(FLIPPED[feature]) != bool(sides.universal_pairs[0, 0] % 2)
    assert f"in second: {ORDER[feature]}{MINUS if negative else '+'} " in text


def test_a_report_that_compares_with_nothing_is_refused_or_says_nothing(stores, found, tmp_path) -> None:
    with pytest.raises(ValueError, match="`comparison` needs the other store"):
        sl.report(stores[0], tmp_path / "r", comparison=found, progress=False)
    with pytest.raises(ValueError, match="`store_a`"):
        sl.report(stores[1], tmp_path / "r", compare=stores[0], comparison=found, progress=False)
    assert not (tmp_path / "r").exists()
    plain = Path(sl.report(stores[0], tmp_path / "r.html", features=[0], progress=False).page).read_text()
    assert read(plain)[0]["compared"] is None and "Compared with" not in plain and "partners" not in read(plain)[1][0]


def test_the_command_compares(stores, tmp_path) -> None:
    words = ["report", str(stores[0].folder), "--compare", str(stores[1].folder), "--out", str(tmp_path / "r")]
    assert dispatch([*words, "--features", "0,5", "--no-progress"]) == 0
    cards = read((tmp_path / "r" / "index.html").read_text())[1]
    assert "artner in second" in said(cards[0]) and "it never fires" in said(cards[DEAD])


DRIVER = """
const seen = {}, wait = ms => new Promise(done => setTimeout(done, ms)), find = what => document.querySelector(what);
window.alert = () => { seen.alert = true; };
const read = () => [...document.querySelectorAll("[data-feature]")];
const listed = async () => { await wait(500); return read().map(row => Number(row.dataset.feature)); };
(async () => {
  find('[data-column="match"] button').click(); seen.bySimilarity = await listed();
  seen.cells = read().map(row => row.lastChild.textContent);
  find("#order").click(); seen.turned = await listed();
  find("#search").value = "onerror"; find("#search").dispatchEvent(new Event("input")); seen.found = await listed();
  location.hash = "feature=0"; await wait(300);
  seen.columns = getComputedStyle(find(".fcard .both")).gridTemplateColumns.split(" ").length;
  seen.partner = find(".fcard .match h3").textContent;
  seen.images = document.querySelectorAll("img").length;
  seen.wide = document.documentElement.scrollWidth > window.innerWidth;
  document.body.append(Object.assign(document.createElement("pre"), { textContent: JSON.stringify(seen) }));
})();
"""


@pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium to open the page in")
def test_a_browser_sorts_by_similarity_and_shows_partners_side_by_side(stores, found, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(reports, "ON_ONE_PAGE", 0)
    made = sl.report(stores[0], tmp_path / "out", compare=stores[1], comparison=found, **FEW)
    driven = Path(made.page).with_name("driven.html")
    driven.write_text(with_script(Path(made.page).read_text(), DRIVER))
    command = [str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    command += ["--host-resolver-rules=MAP * ~NOTFOUND", "--enable-logging=stderr", "--virtual-time-budget=8000"]
    command += ["--window-size=1200,2000", "--dump-dom", driven.as_uri()]
    run = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert "CONSOLE" not in run.stderr, [line for line in run.stderr.splitlines() if "CONSOLE" in line]
    seen = json.loads(next(text for text in Plain(run.stdout).said if text.startswith('{"bySimilarity"')))
    sizes = np.abs(found.a.similarity[seen["bySimilarity"]])
    known = sizes[~np.isnan(sizes)]
    assert len(sizes) == D_SAE and (np.diff(known) <= 1e-6).all() and np.isnan(sizes[len(known) :]).all()
    assert (
        np.isnan(found.a.similarity[seen["turned"][-1]]) and seen["turned"][0] == seen["bySimilarity"][len(known) - 1]
    )
    assert seen["cells"][-1] == "none" and {cell[0] for cell in seen["cells"][: len(known)]} == {"+", MINUS}
    assert seen["found"] == [0] and HOSTILE in seen["partner"] and seen["columns"] == 2
    assert seen["images"] == 0 and not seen["wide"] and "alert" not in seen

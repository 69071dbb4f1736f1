"""The report's page as a reader uses it, in Chromium: search by stems, filters, addresses, the way back, phones."""

import base64
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from browsers import DESK, PHONE, open_page, run_chromium, wait_until

import saelab as sl
from saelab.labels.label import Label
from saelab.labels.text_search import TextIndex, has_stems
from saelab.visualization.html import read_asset
from tests.pages import read_cards, read_window

HOSTILE = '</script><script>alert(1)</script><img src=x onerror="alert(2)">'
WORDS = "the a girl girls", "sleeping sleeps sleepy runner relational", "conditional happily crying ponies caresses"
D_SAE = 220
FEW = {"n_top": 3, "n_quantiles": 1, "n_each": 1, "n_near": 1, "n_random": 1}
LABELS = {7: "a girl", 8: "girlish voices", 9: "two girls", 40: HOSTILE, 41: "sleepy owls", 42: "a pony"}


@pytest.fixture(scope="module")
def page_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report of 220 features: 0 to 19 fire with positive codes, 20 to 39 with negative ones, the last ten never, all
    others with both.
    """
    n, draw = 3000, torch.Generator().manual_seed(3)
    sae = sl.SAE(sl.SAEConfig(d_in=D_SAE, d_sae=D_SAE, activation=sl.AbsTopK(k=6), normalizer="none"))
    with torch.no_grad():
        sae.W_enc.copy_(torch.eye(D_SAE))
        sae.W_dec.copy_(torch.eye(D_SAE))
        sae.b_enc.zero_()
        sae.b_dec.zero_()
    x, chosen = torch.zeros(n, D_SAE), torch.rand(n, D_SAE - 10, generator=draw).topk(6).indices
    x.scatter_(1, chosen, torch.randn(n, 6, generator=draw))
    x[:, :20].abs_()
    x[:, 20:40].abs_().neg_()
    words = " ".join(WORDS).split()
    ids = torch.randint(0, len(words), (n,), generator=draw).int()
    columns = {"token_ids": ids, "doc_ids": torch.arange(n // 20).repeat_interleave(20).int()}
    columns["positions"] = torch.arange(20).repeat(n // 20).int()
    where = sl.stores.Provenance(
        model="model", weight_processing="none", hook_point="", text="words", tokens_sha256="", mask={},
        dtype="float32", ctx_len=20, n_tokens=n, seed=None, versions={},
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("report")
    acts = sl.Activations.from_tensor(x, where, **columns)
    sl.harvest(sae, None, acts, folder / "store", allow_mismatch=True, progress=False)
    strings = {str(i): f" {word}" for i, word in enumerate(words)} | {"4": HOSTILE}
    (folder / "store" / "strings.json").write_text(json.dumps(strings))
    store = sl.FeatureStore.load(folder / "store")
    with sl.labels.LabelStore.open(store) as book:
        made = [
            Label(feature=j, text=text, author="rules", scores={"f1": j / 100, "f1_chance": 0.5})
            for j, text in LABELS.items()
        ]
        book.add([*made, Label(feature=5, text="by hand", author="me", by_person=True)])
    found = sl.report(store, folder / "out", title="Words", progress=False, **FEW)
    return Path(found.page)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with run_chromium() as made:
        yield made


@pytest.fixture
def page(browser: Any, page_path: Path) -> Iterator[Any]:
    with open_page(browser, lambda url: url.startswith(page_path.parent.as_uri())) as made:
        made.goto(page_path.as_uri())
        made.locator("[data-feature]").first.wait_for()
        yield made


def listed(page: Any) -> list[int]:
    rows = page.locator(".rows .row:not(.waiting)").all()
    pairs = [[int(row.get_attribute(name)) for name in ("data-index", "data-feature")] for row in rows]
    return [feature for _, feature in sorted(pairs)]


def search(page: Any, text: str) -> list[int]:
    page.locator("#search").fill(text)
    wait_until(page, "text => decodeURIComponent(location.hash).includes(`q=${text.replaceAll(' ', '+')}`)", text)
    page.wait_for_timeout(60)
    return listed(page)


def test_stems_find_what_the_label_book_finds(page: Any) -> None:
    assert search(page, "girls")[:3] == sorted([7, 8, 9], key=lambda j: -density(page, j))
    assert search(page, "two girls")[:1] == [9] and search(page, "GIRLS by hand") == [5]
    assert search(page, "sleeping")[0] == 41  # a label comes before windows that have the word
    assert search(page, "ponies")[0] == 42
    assert search(page, "40")[0] == 40 and search(page, "onerror")[0] == 40  # a number; a part of a word
    assert search(page, 'a\u0301 "* OR (') is not None and page.locator("img").count() == 0


def density(page: Any, feature: int) -> float:
    data = json.loads(page.evaluate("document.getElementById('data').textContent"))
    return next(row["density"] for row in data["features"] if row["feature"] == feature)


@pytest.mark.skipif(not has_stems(), reason="this build of SQLite has no FTS5")
def test_words_have_the_stems_that_sqlite_gives_them(browser: Any, shared_words: list[str]) -> None:
    index = TextIndex()
    index.update({i: (word,) for i, word in enumerate(shared_words)})
    index._db.execute("CREATE VIRTUAL TABLE terms USING fts5vocab(found, 'instance')")
    expected = dict(index._db.execute("SELECT doc, term FROM terms"))
    code = read_asset("vendor/stemmer.js").replace("export function", "function")
    page = browser.new_page()
    found = page.evaluate(f"words => {{ {code}\nreturn words.map(stemmer); }}", shared_words)
    wrong = [
        (word, stem, expected[i])
        for i, (word, stem) in enumerate(zip(shared_words, found, strict=True))
        if stem != expected[i]
    ]
    page.close()
    assert not wrong and len(set(found)) < len(set(shared_words))


@pytest.fixture
def shared_words() -> list[str]:
    """Words of the English of this repository's own pages, with all endings."""
    folder = Path(__file__).resolve().parents[2]
    paths = [*folder.glob("*.md"), *(folder / "docs").rglob("*.md")]
    texts = [path.read_text("utf-8") for path in paths] or ["girls sleeping"]
    return sorted({word for text in texts for word in re.findall(r"\b[a-z]+\b", text.lower()) if len(word) <= 30})


def test_filters_leave_what_the_rows_say(page: Any) -> None:
    data = json.loads(page.evaluate("document.getElementById('data').textContent"))["features"]
    page.locator(".filters summary").click()
    fields = page.locator(".fields label")
    by_choice = [
        ("both", lambda row: row["n_positive"] and row["n_negative"]),
        ("+", lambda row: row["n_positive"] and not row["n_negative"]),
        ("-", lambda row: row["n_negative"] and not row["n_positive"]),
        ("dead", lambda row: row["kind"] == "dead"),
        ("yes", lambda row: row["label"]),
        ("me", lambda row: "me" in row.get("authors", [])),
    ]
    for i, (value, keep) in zip((0, 0, 0, 1, 2, 3), by_choice, strict=True):
        assert 0 < sum(bool(keep(row)) for row in data) < len(data)
        fields.nth(i).locator("select").select_option(value)
        count_is(page, sum(bool(keep(row)) for row in data))
        page.get_by_role("button", name="Clear filters").click()
        count_is(page, len(data))
    for title, name, factor in (
        ("Density from (%)", "density", 100), ("Peak from", "peak", 1), ("Label score from", "score", 1),
    ):  # fmt: skip
        known = sorted(row[name] for row in data if row.get(name))
        page.get_by_label(title, exact=True).fill(f"{known[len(known) // 2] * factor:.12g}")
        page.keyboard.press("Tab")
        count_is(page, sum(row.get(name, -1) >= known[len(known) // 2] for row in data))
        page.get_by_role("button", name="Clear filters").click()
        count_is(page, len(data))
    fields.nth(2).locator("select").select_option("person")
    count_is(page, 1)
    page.reload()  # the address has it all
    count_is(page, 1)
    assert listed(page) == [5]


def count_is(page: Any, n: int) -> None:
    wait_until(page, "n => document.querySelector('[role=status]').textContent.startsWith(`${n} of `)", n)


def test_an_address_has_query_order_and_place_and_back_leads_there(page: Any, page_path: Path) -> None:
    page.goto(f"{page_path.as_uri()}#/features?sort=feature&order=asc")
    page.locator('[data-feature="0"]').wait_for()
    page.locator(".rows").evaluate("rows => rows.scrollTo(0, 120 * 36)")
    page.wait_for_url(re.compile("at=120"))
    page.locator('[data-feature="125"] a').click()
    page.locator(".fcard").wait_for()
    wait_until(page, "document.title === 'Feature 125 \u00b7 Words'")
    page.go_back()
    page.locator('[data-feature="125"]').wait_for()
    assert "at=120" in page.url and page.locator(".rows").evaluate("rows => rows.scrollTop") == 120 * 36
    wait_until(page, "document.title === 'Features \u00b7 Words'")
    page.goto(f"{page_path.as_uri()}#/features?q=girls&sort=score&order=desc")
    page.reload()
    page.locator('[data-feature="9"]').wait_for()
    assert listed(page)[:6] == [42, 41, 40, 9, 8, 7] and page.locator("#search").input_value() == "girls"
    wait_until(page, "document.title === 'Features: girls \u00b7 Words'")
    page.locator('[data-feature="9"] a').click()
    page.locator(".fcard").wait_for()
    wait_until(page, "document.title === 'Feature 9: two girls \u00b7 Words'")
    page.get_by_role("link", name="All features").click()
    page.locator('[data-feature="8"]').wait_for()
    assert "q=girls" in page.url and "sort=score" in page.url


def test_a_card_shows_texts_signs_and_names_and_nothing_runs(page: Any, page_path: Path) -> None:
    data = json.loads(page.evaluate("document.getElementById('data').textContent"))["features"]
    both = next(row["feature"] for row in data if row["n_positive"] and row["n_negative"])
    page.goto(f"{page_path.as_uri()}#/feature/{both}")
    page.locator(".fcard h2 span", has_text=str(both)).first.wait_for()
    assert page.locator(".fcard b.p").count() and page.locator(".fcard b.m").count()
    for element in page.locator(".fcard details[open] b").all():
        sign = "+" if "p" in element.get_attribute("class").split() else "\u2212"
        assert element.get_attribute("title").startswith(sign)
    assert page.locator(".fcard svg path.up").count() == page.locator(".fcard svg path.down").count() == 1
    page.goto(f"{page_path.as_uri()}#/feature/40")
    page.locator(".fcard h2", has_text="onerror").wait_for()
    assert page.locator("img").count() == 0 and page.locator(".fcard script").count() == 0
    near = page.locator(".numbers .rank").last
    for entry in near.locator("dt").all():
        j = int(entry.locator("a").inner_text())
        assert entry.inner_text() != str(j), "a number without a name or text"
        if j in LABELS:
            assert LABELS[j] in entry.inner_text()
    near.locator("dt a").first.click()
    wait_until(page, "!location.hash.includes('/40') && document.querySelector('.fcard')")


def test_on_a_phone_texts_come_first_and_nothing_is_wider(page: Any, page_path: Path) -> None:
    page.set_viewport_size(PHONE)
    page.goto(f"{page_path.as_uri()}#/feature/9")
    page.locator(".fcard .win").first.wait_for()
    top = page.locator(".fcard .win").first.bounding_box()["y"]
    assert top < PHONE["height"] / 2 and page.locator(".fcard svg").bounding_box()["y"] > top
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    texts, numbers = (page.locator(f".fcard .{name}").bounding_box() for name in ("texts", "numbers"))
    assert numbers["y"] >= texts["y"] + texts["height"] - 1 and texts["width"] > 0.9 * (PHONE["width"] - 32)
    page.set_viewport_size(DESK)
    boxes = [page.locator(f".fcard .{name}").bounding_box() for name in ("numbers", "texts")]
    assert boxes[0]["x"] + boxes[0]["width"] <= boxes[1]["x"] and abs(boxes[0]["y"] - boxes[1]["y"]) < 2


def test_a_feature_takes_few_bytes(page_path: Path, tmp_path: Path) -> None:
    store = sl.FeatureStore.load(page_path.parents[1] / "store")
    made = sl.report(store, tmp_path / "all.html", features=range(40, 70), progress=False)
    text = Path(made.page).read_text()
    texts = ["".join(read_window(window)[0]) for window in read_cards(text)[50]["groups"][0]["windows"]]
    n_bytes = sum(len(part) for part in re.findall(r'id="(?:data|cards)">(.*?)</script>', text, re.S))
    assert sum(map(len, texts)) > 100 * len(texts) and n_bytes / 30 < 9 * 1024


def test_a_damaged_file_of_cards_is_told(browser: Any, page_path: Path, tmp_path: Path) -> None:
    copy = tmp_path / "index.html"
    copy.write_text(page_path.read_text())
    (tmp_path / "cards-0000.js").write_text(f'addCards("{base64.b64encode(b"no gzip").decode()}");')
    made = browser.new_page()
    made.goto(f"{copy.as_uri()}#/feature/0")
    made.locator('[role="alert"]').wait_for()
    made.goto(f"{copy.as_uri()}#/feature/219")
    made.locator('[role="alert"]', has_text="cards-0002.js is missing").wait_for()
    made.close()


def test_an_address_without_a_feature_says_so(page: Any, page_path: Path) -> None:
    page.goto(f"{page_path.as_uri()}#/feature/girls")
    wait_until(
        page, "document.querySelector('[role=alert]')?.textContent === 'There is no feature girls in this report.'"
    )
    page.goto(f"{page_path.as_uri()}#/feature/9?at=last&sort=peak")
    page.locator(".fcard").wait_for()
    assert "NaN" not in page.locator("#report").inner_text()

"""Cards and reports: both signs where they belong, text that stays text, and a page that works in a browser, alone."""

import json
import re
import subprocess
from html.parser import HTMLParser
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest
import torch
from browsers import CHROMIUM

import saelab as sl
from saelab.analysis.density import dead_features
from saelab.cli.app import dispatch
from saelab.visualization import reports
from saelab.visualization.card_data import describe_card
from saelab.visualization.html import bundle
from saelab.visualization.reports import read_prompts
from tests.pages import read_cards, read_window, with_script

HOSTILE = '</script><script>alert(1)</script><img src=x onerror="alert(2)">'
STRINGS = {0: " the", 1: " hot", 2: " cold", 3: HOSTILE, 4: "\n"}


class Parsed(HTMLParser):
    """Tags with their attributes and what text stands in each."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[str, str]] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        if self.tags:
            self.texts.append((self.tags[-1][0], data))


@pytest.fixture(scope="module")
def sae(tmp_path_factory) -> sl.SAE:
    """Feature 0 is hot (+) or cold (-), feature 1 fires on what is hostile, feature 2 on everything else, 3 never."""
    made = sl.SAE(sl.SAEConfig(d_in=4, d_sae=4, activation=sl.AbsTopK(k=1), normalizer="none"))
    with torch.no_grad():
        made.W_enc.copy_(torch.eye(4))
        made.W_dec.copy_(torch.eye(4))
        made.b_enc.zero_()
        made.b_dec.zero_()
    made.save_pretrained(tmp_path_factory.mktemp("sae"))
    return made


@pytest.fixture(scope="module")
def store(sae: sl.SAE, tmp_path_factory) -> sl.FeatureStore:
    """Documents of eight tokens: the hot the cold the <hostile> newline the."""
    ids = torch.tensor([0, 1, 0, 2, 0, 3, 4, 0]).repeat(30).int()
    x = torch.zeros(len(ids), 4)
    strength = torch.linspace(1, 2, len(ids))
    x[:, 0] = strength * ((ids == 1).float() - (ids == 2).float())
    x[:, 1] = (ids == 3).float()
    x[:, 2] = ((ids == 0) | (ids == 4)).float()
    columns = {"token_ids": ids, "doc_ids": torch.arange(30).repeat_interleave(8).int()}
    columns["positions"] = torch.arange(8).repeat(30).int()
    folder = tmp_path_factory.mktemp("store")
    where = sl.stores.Provenance(
        model="/nowhere/model", weight_processing="none", hook_point="", text=HOSTILE, tokens_sha256="", mask={},
        dtype="float32", ctx_len=8, n_tokens=len(ids), seed=None, versions={},
    )  # fmt: skip
    acts = sl.Activations.from_tensor(x, where, **columns)
    sl.harvest(sae, None, acts, folder, allow_mismatch=True, progress=False)
    (folder / "strings.json").write_text(json.dumps({str(i): text for i, text in STRINGS.items()}))
    return sl.FeatureStore.load(folder)


def colored(card: str) -> list[tuple[str, float]]:
    """Class and value of every coloured token."""
    tags = Parsed(card).tags
    return [(str(attrs.get("class")), float(str(attrs["title"]))) for tag, attrs in tags if tag == "b"]


def test_both_sides_of_a_bipolar_feature_are_shown_where_they_belong(store) -> None:
    card = store.feature(0)._repr_html_()
    said = colored(card)
    assert {kind.split()[0] for kind, _ in said} == {"p", "m"}
    assert all((value > 0) == kind.startswith("p") for kind, value in said)
    words = {kind: set(re.findall(rf'<b class="{kind}[^>]*>([^<]*)</b>', card)) for kind in "pm"}
    assert words == {"p": {" hot"}, "m": {" cold"}}
    assert "30 positive" in card and "30 negative" in card
    assert card == sl.analysis.describe_feature(store, 0)._repr_html_()
    paths = {attrs["class"] for tag, attrs in Parsed(card).tags if tag == "path"}
    assert paths == {"up", "down"} and "up" in str(Parsed(store.feature(1)._repr_html_()).tags)


@pytest.mark.parametrize("strong", [1, -1])
def test_the_strong_side_comes_first(store, strong, monkeypatch) -> None:
    """Whatever its sign: in the card, its windows, and the line of the list; the other side is there too."""
    from saelab.stores.feature_store import Feature
    from saelab.visualization.reports import _row

    whole = store.feature(0)
    values = np.where(whole.values * strong > 0, whole.values, whole.values / 4).astype(np.float32)
    monkeypatch.setattr(
        sl.FeatureStore, "feature", lambda self, j: Feature(whole.indices, values, self, 0), raising=True
    )
    card = sl.analysis.describe_feature(store, 0)
    assert [side.sign for side in card.sides] == [strong, -strong]
    assert card.examples.groups[0].side == strong and {g.side for g in card.examples.groups} >= {1, -1}
    row = _row(card, dead_features(store))
    words = {1: "hot", -1: "cold"}
    assert row["snippet"][1].strip() == words[strong] and words[-strong] in row["search"]
    lines = str(card).splitlines()
    assert lines[2].startswith("+" if strong > 0 else "-")


def test_a_card_counts_what_the_store_holds(store) -> None:
    card = sl.analysis.describe_feature(store, 0, label="temperature", neighbors=sl.analysis.nearest_features(store))
    codes = store.matrix().toarray()[:, 0]
    by_sign = {side.sign: side for side in card.sides}
    assert [by_sign[sign].n_firings for sign in (1, -1)] == [(codes > 0).sum(), (codes < 0).sum()]
    assert card.density == (codes != 0).mean()
    assert [by_sign[sign].peak for sign in (1, -1)] == [codes.max(), -codes.min()]
    expected = [
        ((codes >= a) & (codes < b) & (codes != 0)).sum() for a, b in zip(card.edges, card.edges[1:], strict=False)
    ]
    expected[-1] += (codes == card.edges[-1]).sum()
    assert list(card.counts) == expected and sum(card.counts) == card.n_firings
    assert 0.0 in card.edges and by_sign[1].words == ((" hot", 1.0),)
    assert "temperature" in str(card) and card.to_dict()["feature"] == 0
    dead = sl.analysis.describe_feature(store, 3)
    assert dead.n_firings == 0 and "Never fired on 240 tokens" in dead._repr_html_()


def test_similar_features_have_their_names(store) -> None:
    near = sl.analysis.nearest_features(store)
    labels = {0: "temperature", 1: HOSTILE, 2: "the rest"}
    card = sl.analysis.describe_feature(store, 0, labels=labels, neighbors=near)
    assert card.label == "temperature" and [j for j, _ in card.neighbors]
    assert card.neighbor_labels == tuple(labels.get(j, "") for j, _ in card.neighbors)
    assert "the rest" in str(card).splitlines()[4] and "2 the rest" in card._repr_html_()
    assert HOSTILE not in card._repr_html_() and HOSTILE in str(card)
    shown = describe_card(card)["near"]
    assert shown["by"] == card.likeness and {j: label for j, _, label in shown["rows"]} == {1: HOSTILE, 2: "the rest"}
    (same,) = sl.analysis.dashboard.describe_features(store, [0], labels=labels, neighbors=near)
    assert same == card and sl.analysis.describe_feature(store, 0, label="mine", labels=labels).label == "mine"


def test_a_card_as_json_holds_its_windows_to_the_letter(store) -> None:
    """Texts, codes and centers, whatever fires where; numbers as they are shown."""
    for feature in range(4):
        card = sl.analysis.describe_feature(store, feature, n_near=3, n_random=5)
        shown = json.loads(json.dumps(describe_card(card), allow_nan=False))
        assert [(g["name"], g["side"]) for g in shown["groups"]] == [(g.name, g.side) for g in card.examples.groups]
        for group, drawn in zip(card.examples.groups, shown["groups"], strict=True):
            for example, window in zip(group.examples, drawn["windows"], strict=True):
                texts, codes, center = read_window(window)
                assert window[0] == example.token and "".join(texts) == example.text
                assert texts[center] == example.words[example.center]
                assert codes[center] == pytest.approx(example.value, rel=5e-3)
                assert "".join(texts[:center]) == "".join(example.words[: example.center])
                fired = [(w, v) for w, v in zip(example.words, example.values, strict=True) if v]
                assert [text for text, code in zip(texts, codes, strict=True) if code] == [word for word, _ in fired]
                assert [code for code in codes if code] == pytest.approx([value for _, value in fired], rel=5e-3)
        if card.counts:
            bars = shown["histogram"]
            assert bars["counts"] == list(card.counts) and card.edges[bars["below"]] == 0.0
            below = sum(bars["counts"][: bars["below"]])
            assert below == sum(side["n"] for side in shown["sides"] if side["sign"] < 0)
        else:
            assert feature == 3 and "histogram" not in shown and shown["sides"] == []


def rows_of(page: str) -> list[dict]:
    data = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)
    assert data is not None
    return json.loads(data[1])["features"]


def test_one_page_loads_nothing_and_hostile_text_stays_text(store, sae, tmp_path) -> None:
    made = sl.report(store, tmp_path / "all.html", labels={1: HOSTILE}, sae=sae, title=HOSTILE, progress=False)
    page = Path(made.page).read_text()
    parsed = Parsed(page)
    assert not {tag for tag, _ in parsed.tags} & {"img", "iframe", "link", "object", "embed"}
    assert not any(name in attrs for _, attrs in parsed.tags for name in ("src", "onerror", "onload", "action"))
    assert [tag for tag, _ in parsed.tags].count("script") == 3
    policy = next(attrs["content"] for tag, attrs in parsed.tags if tag == "meta" and "http-equiv" in attrs)
    assert policy is not None and policy.startswith("default-src 'none'")
    assert "url(" not in page and "prefers-color-scheme: dark" in page
    rows = rows_of(page)
    assert [row["feature"] for row in rows] == [0, 1, 2, 3] and rows[1]["label"] == HOSTILE
    assert [row["density"] for row in rows] == [60 / 240, 30 / 240, 150 / 240, 0]
    assert [row["balance"] for row in rows] == [0.5, 0.0, 0.0, None]
    assert [row["kind"] for row in rows] == ["dense", "dense", "dense", "dead"]
    assert made.n_features == 4 and made.n_bytes == Path(made.page).stat().st_size and "4 features" in str(made)


def test_a_folder_holds_every_card_once_in_files_of_a_size(store, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(reports, "ON_ONE_PAGE", 2)
    monkeypatch.setattr(reports, "PER_FILE", 2)
    made = sl.report(store, tmp_path / "out", features=[3, 0, 1], progress=False)
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == [
        "cards-0000.js", "cards-0001.js", "index.html", "report.json",
    ]  # fmt: skip
    texts = [file.read_text() for file in sorted((tmp_path / "out").glob("*.js"))]
    assert [list(read_cards(text)) for text in texts] == [[3, 0], [1]]
    assert all(re.fullmatch(r'addCards\("[A-Za-z0-9+/=]*"\);', text) for text in texts)
    assert [row["feature"] for row in rows_of(Path(made.page).read_text())] == [3, 0, 1]
    sl.report(store, tmp_path / "out", features=[2], progress=False)  # a report takes the place of a report
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == ["index.html", "report.json"]


def test_what_cannot_be_reported_is_refused_and_nothing_is_lost(store, sae, tmp_path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match="`out`"):
        sl.report(store, tmp_path, progress=False)
    assert (tmp_path / "thesis.txt").read_text() == "years of work"
    for arguments, said in (
        ({"features": [4]}, "`features`"),
        ({"features": []}, "`features`"),
        ({"prompts": ["hi"]}, "`prompts`"),
        ({"sae": sl.SAE(sae.cfg, seed=7)}, "`sae`"),
    ):
        with pytest.raises(ValueError, match=said):
            sl.report(store, tmp_path / "new", progress=False, **arguments)
    assert not (tmp_path / "new").exists()


def test_prompts_show_the_codes_of_a_direct_encoding(tiny) -> None:
    sae = sl.SAE(sl.SAEConfig(d_in=32, d_sae=48, activation=sl.AbsTopK(k=3)), seed=0)
    hook_point = "blocks.1.hook_resid_post"
    mask = {"special": True, "positions": [0, 4], "max_norm_ratio": None}
    name = sl.lm.describe_model(tiny).name
    where = sl.stores.Provenance(
        model=name, weight_processing="none", hook_point=hook_point, text="", tokens_sha256="", mask=mask,
        dtype="float32", ctx_len=8, n_tokens=1, seed=None, versions={},
    )  # fmt: skip
    (shown,) = read_prompts(sae, tiny, ["a fox"], where)
    ids = sl.tokenize(tiny, ["a fox"], ctx_len=6).ids
    z = sae.encode(sl.lm.capture(tiny, ids, [hook_point])[hook_point][0]).detach()
    assert shown["words"] == ["<s>", "a", " ", "f", "o", "x"]
    assert [bool(codes) for codes in shown["codes"]] == [
        False,
        True,
        True,
        True,
        False,
        False,
    ]  # BOS; beyond position 4
    for place, codes in enumerate(shown["codes"]):
        assert all(value == pytest.approx(float(z[place, j])) for j, value in codes)
        sizes = [abs(value) for _, value in codes]
        assert sizes == sorted(sizes, reverse=True) and (not codes or len(codes) == 3)
    with pytest.raises(ValueError, match="context"):
        read_prompts(sae, tiny, ["a" * 5000], where)


def test_the_command_writes_a_report_and_says_what_it_could_not_open(store, sae, tmp_path, capsys) -> None:
    evaluation = tmp_path / "evaluation.json"
    evaluation.write_text(json.dumps({"fvu": 0.25, "n_tokens": 10, "text": HOSTILE}))
    words = ["report", str(store.folder), "--out", str(tmp_path / "r"), "--features", "0,2", "--no-progress"]
    assert dispatch([*words, "--evaluation", str(evaluation)]) == 0
    said = capsys.readouterr()
    assert "2 features" in said.out and "model 'model' could not be opened" in said.err and "--model" in said.err
    page = (tmp_path / "r" / "index.html").read_text()
    assert "0.25" in page and read_cards(page)[0]["near"]["by"] == "cosine"  # the SAE was found where the store has it
    assert dispatch([*words[:-3], "--features", "one", "--no-progress"]) == 2


def test_the_bundle_holds_every_module_whole() -> None:
    """Each import finds what it names among the exports of a module that ran before; nothing is left of modules."""
    script = bundle("report.js")
    assert (
        not re.search(r"^\s*(import|export)\b|export\{", script, re.M)
        and "</script" not in script
        and "<!--" not in script
    )
    given: dict[str, set[str]] = {}
    for name, body in re.findall(r'^modules\["(.*?)"\] = \(\(\) => \{\n(.*?)^\}\)\(\);$', script, re.M | re.S):
        for taken, needed in re.findall(r'^const \{([^}]*)\} = modules\["(.*?)"\];$', body, re.M):
            assert {one.split(":")[0].strip() for one in taken.split(",")} <= given[needed], (name, needed)
        text = files("saelab.visualization").joinpath("assets", name).read_text()
        given[name] = {
            one.split(":")[0].strip() for one in re.findall(r"^return \{(.*)\};$", body, re.M)[-1].split(",")
        }
        assert (
            given[name] - {""} == set(re.findall(r"^export \w+ (?:\w+ )?(\w+)\b(?=[ (])", text, re.M))
            or "vendor" in name
        )
    assert given["vendor/htm-preact-standalone.js"] > {"html", "render", "useState"} and list(given)[-1] == "report.js"
    with pytest.raises(FileNotFoundError, match="got 'nowhere"):
        bundle("nowhere.js")


DRIVER = """
const seen = {}, wait = ms => new Promise(done => setTimeout(done, ms)), find = what => document.querySelector(what);
window.alert = () => { seen.alert = true; };
const press = key => document.dispatchEvent(new KeyboardEvent("keydown", { key, bubbles: true }));
const listed = async () => {
  await wait(400);
  return [...document.querySelectorAll("[data-feature]")].map(row => Number(row.dataset.feature));
};
const typed = async text => {
  find("#search").value = text;
  find("#search").dispatchEvent(new Event("input"));
  return await listed();
};
(async () => {
  seen.byDensity = await listed();
  find("#order").click(); seen.turned = await listed();
  find('[data-column="feature"] button').click(); seen.byFeature = await listed();
  seen.hot = await typed("HOT"); seen.label = await typed("onerror"); seen.nothing = await typed("no such word");
  seen.count = find('[role="status"]').textContent; await typed("");
  press("j"); await wait(100); press("j"); await wait(100); seen.focus = document.activeElement.textContent;
  find('[data-feature="1"] a').click(); await wait(300);
  seen.card = find(".fcard").textContent.includes("30 positive"); seen.hash = location.hash;
  press("ArrowRight"); await wait(300); seen.next = location.hash;
  seen.shown = find(".fcard h2").textContent;
  press("Escape"); await wait(300); seen.list = Boolean(find(".list")) && !find(".fcard");
  location.hash = "feature=1"; await wait(300); seen.old = find(".fcard h2").textContent.startsWith("1 ");
  location.hash = "feature=99"; await wait(300); seen.unknown = find('[role="alert"]').textContent;
  location.hash = "summary"; await wait(300); seen.summary = document.body.textContent.includes("Features by density");
  seen.images = document.querySelectorAll("img").length;
  document.body.append(Object.assign(document.createElement("pre"), { textContent: JSON.stringify(seen) }));
})();
"""


@pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium to open the page in")
def test_the_report_works_in_a_browser_from_the_disk_without_network(store, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(reports, "ON_ONE_PAGE", 0)
    monkeypatch.setattr(reports, "PER_FILE", 1)
    made = sl.report(store, tmp_path / "out", labels={1: HOSTILE}, title=HOSTILE, progress=False)
    page = Path(made.page)
    driven = page.with_name("driven.html")
    driven.write_text(with_script(page.read_text(), DRIVER))
    command = [str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    command += ["--host-resolver-rules=MAP * ~NOTFOUND", "--enable-logging=stderr", "--virtual-time-budget=12000"]
    run = subprocess.run([*command, "--dump-dom", driven.as_uri()], capture_output=True, text=True, timeout=100)
    assert "CONSOLE" not in run.stderr, [line for line in run.stderr.splitlines() if "CONSOLE" in line]
    verdict = next(text for tag, text in Parsed(run.stdout).texts if text.startswith('{"byDensity"'))
    seen = json.loads(verdict)
    assert seen == {
        "byDensity": [2, 0, 1, 3],
        "turned": [3, 1, 0, 2],
        "byFeature": [0, 1, 2, 3],
        "hot": [0, 1, 2],
        "label": [0, 1, 2],
        "nothing": [],
        "card": True,
        "count": "0 of 4 features",
        "focus": "1",
        "hash": "#/feature/1?sort=feature&order=asc&at=1",
        "next": "#/feature/2?sort=feature&order=asc&at=2",
        "shown": "2 no label",
        "list": True,
        "old": True,
        "unknown": "There is no feature 99 in this report.",
        "summary": True,
        "images": 0,
    }


@pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium to open the page in")
def test_a_link_to_a_feature_of_a_single_page_opens_its_card(store, tmp_path) -> None:
    made = sl.report(store, tmp_path / "page.html", progress=False)
    command = [str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    link = Path(made.page).as_uri() + "#feature=1"
    command += ["--virtual-time-budget=3000"]
    run = subprocess.run([*command, "--dump-dom", link], capture_output=True, text=True, timeout=100)
    texts = [text for tag, text in Parsed(run.stdout).texts if tag != "script"]
    assert not any("is missing" in text for text in texts) and any("30 positive" in text for text in texts)

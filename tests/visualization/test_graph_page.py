"""The page of a graph: all of it in one file, text that stays text; and as a person uses it, in real Chromium."""

import getpass
import json
import re
import socket
from collections.abc import Iterator
from copy import copy
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

import numpy as np
import pytest
import torch
from browsers import DESK, PHONE, open_page, run_chromium, wait_until
from graphs_made import make_graph

import saelab as sl
from saelab.circuits import AttributionGraph, GraphView, influence_shares, make_node_ids, read_view
from saelab.circuits.graph import KINDS
from saelab.visualization import write_graph_page
from saelab.visualization.graph_page import N_DRAWN, N_LINES, draw_graph
from tests.pages import check_policy

HOSTILE = '</script><img src=x onerror="alert(1)">'
TOKENS = ("<s>", HOSTILE, " \"a'", "\n", " b")
FEATURE, LOGIT = KINDS.index("feature"), KINDS.index("logit")


def read_data(page: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(
        re.findall(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)[0]
    )
    return found


@pytest.fixture(scope="module")
def graph() -> AttributionGraph:
    return make_graph(40, 400, TOKENS, seed=3)


@pytest.fixture(scope="module")
def labels(graph: AttributionGraph) -> dict[str, dict[int, str]]:
    return {hook: {i: f"name {i} of {n} {HOSTILE}" for i in range(1000)} for n, hook in enumerate(graph.dictionaries)}


def test_the_page_holds_the_graph_with_its_strongest_edges_first(graph: AttributionGraph, tmp_path: Path) -> None:
    data = read_data(write_graph_page(graph, tmp_path / "a.html").read_text())
    nodes, edges = data["nodes"], data["edges"]
    assert nodes["id"] == make_node_ids(graph) and data["tokens"] == list(graph.tokens)
    assert nodes["kind"] == [KINDS[i] for i in graph.kinds]
    assert np.allclose(nodes["activation"], graph.activations, rtol=1e-3)
    assert np.allclose(nodes["value"], graph.values, rtol=1e-3)
    held = {
        pair: w
        for *pair, w in zip(edges["source"], edges["target"], edges["weight"], strict=True)
        for pair in [tuple(pair)]
    }
    given = zip(graph.edge_sources.tolist(), graph.edge_targets.tolist(), graph.edge_weights.tolist(), strict=True)
    assert len(held) == len(graph.edge_weights) and all(np.isclose(held[a, b], w, rtol=1e-3) for a, b, w in given)
    shares = influence_shares(graph)[1]
    by_pair = {
        (a, b): s
        for a, b, s in zip(graph.edge_sources.tolist(), graph.edge_targets.tolist(), shares.tolist(), strict=True)
    }
    order = [by_pair[pair] for pair in zip(edges["source"], edges["target"], strict=True)]
    assert order == sorted(order) and data["counts"][100] == len(order)
    for percent in (0, 10, 50, 80, 99):
        assert data["counts"][percent] == sum(share <= percent / 100 + 1e-9 for share in order)


def test_text_stays_text_and_nothing_private_is_written(graph: AttributionGraph, labels: Any, tmp_path: Path) -> None:
    local = replace(graph, model=f"/home/{getpass.getuser()}/secret place/my-model")
    view = GraphView(supernodes=((HOSTILE, (20, 21)),), labels={20: HOSTILE})
    page = write_graph_page(local, tmp_path / "a.html", labels=labels, view=view, title=HOSTILE).read_text()
    check_policy(page)
    assert "<img" not in page and page.count("</script>") == 2 and read_data(page)["tokens"] == list(TOKENS)
    for private in (str(tmp_path), str(Path.home()), socket.gethostname(), "secret place", "/home/"):
        assert private not in page
    assert "://" not in page.split('id="data"')[0], "nothing to fetch"
    assert write_graph_page(local, tmp_path / "a.html", labels=labels, view=view, title=HOSTILE).read_text() == page


def test_a_feature_is_shown_with_the_text_of_its_store_and_its_label(tmp_path: Path) -> None:
    """Latent 0 fires on token 1 alone, with a positive code, and on token 2 with a negative one."""
    sae = sl.SAE(sl.SAEConfig(d_in=4, d_sae=32, activation=sl.AbsTopK(k=1), normalizer="none"))
    with torch.no_grad():
        sae.W_enc.copy_(torch.eye(4, 32))
        sae.W_dec.copy_(torch.eye(32, 4))
        sae.b_enc.zero_()
        sae.b_dec.zero_()
    ids = torch.tensor([0, 1, 0, 2, 0, 3]).repeat(5).int()
    x = torch.zeros(len(ids), 4)
    x[:, 0] = (ids == 1).float() - (ids == 2).float()
    x[:, 2] = (ids % 3 == 0).float()
    columns = {"token_ids": ids, "doc_ids": torch.arange(5).repeat_interleave(6).int()}
    columns["positions"] = torch.arange(6).repeat(5).int()
    where = sl.stores.Provenance(
        model="m", weight_processing="none", hook_point="", text="t", tokens_sha256="", mask={}, dtype="float32",
        ctx_len=6, n_tokens=len(ids), seed=None, versions={},
    )  # fmt: skip
    acts = sl.Activations.from_tensor(x, where, **columns)
    sl.harvest(sae, None, acts, tmp_path / "store", allow_mismatch=True, progress=False)
    strings = {"0": " the", "1": " hot", "2": " cold", "3": HOSTILE}
    (tmp_path / "store/strings.json").write_text(json.dumps(strings))
    store = sl.FeatureStore.load(tmp_path / "store")
    with sl.labels.LabelStore.open(store) as book:
        book.set(0, "heat", author="me")
    graph = make_graph(24, 60)
    own = np.flatnonzero((graph.kinds == FEATURE) & (graph.sources == 1))
    latents = graph.features.copy()
    latents[own] = [0, 3, *range(10, 8 + len(own))]  # of which 0 and 3 alone may fire
    codes = graph.activations.copy()
    codes[own[0]] = -1.5
    codes[own[1]] = 2.5
    graph = replace(graph, features=latents, activations=codes)
    hook = graph.dictionaries[1]
    data = read_data(write_graph_page(graph, tmp_path / "a.html", stores={hook: store}).read_text())
    assert data["nodes"]["text"][own[0]] == "\u2212 heat" and data["windows"]["1:3:1"] == []
    windows = data["windows"]["1:0:-1"]
    assert len(windows) == 1 and windows[0][1] == " cold", "equal windows are shown once"
    assert windows[0][0].endswith(" hot the") and windows[0][2] == " the" + HOSTILE
    elsewhere = copy(store)
    elsewhere.manifest = replace(store.manifest, provenance=where.to_dict() | {"hook_point": "blocks.1.hook_mlp_in"})
    with pytest.raises(ValueError, match=r"must be of the graph's dictionary, but it is of 'blocks.1.hook_mlp_in'"):
        write_graph_page(graph, tmp_path / "b.html", stores={hook: elsewhere})
    with pytest.raises(ValueError, match=r"`stores` must have hook points .* got 'x'"):
        write_graph_page(graph, tmp_path / "b.html", stores={"x": store})
    beyond = replace(graph, features=graph.features + 32 * (np.arange(len(graph.kinds)) == own[0]))
    with pytest.raises(ValueError, match=r"must be of the graph's dictionary, .* has 32 features, got feature 32"):
        write_graph_page(beyond, tmp_path / "b.html", stores={hook: store})
    assert not (tmp_path / "b.html").exists()


def test_what_cannot_be_shown_is_refused(graph: AttributionGraph, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"`path` must end in .html, got .*a.json"):
        write_graph_page(graph, tmp_path / "a.json")
    with pytest.raises(ValueError, match=r"A view's nodes must be in 0..\d+, got 5000"):
        write_graph_page(graph, tmp_path / "a.html", view=GraphView(pinned=(5000,)))


def test_jupyter_draws_the_most_influential_nodes_with_all_text_escaped(graph: AttributionGraph) -> None:
    large = make_graph(200, 2000, TOKENS, seed=1)
    for one in (graph, large):
        drawn = one._repr_html_()
        assert drawn == draw_graph(one) and "<img" not in drawn and "<s>" not in drawn
        assert drawn.count("<title>") == min(N_DRAWN, len(one.kinds)) and drawn.count("<line ") <= N_LINES
        assert drawn.count("<title>logit ") == 3
    shares = influence_shares(large)[0]
    kept = np.sort(shares[large.kinds != LOGIT])[: N_DRAWN - 3]
    said = re.findall(r"<title>feature (\d+) of ", draw_graph(large))
    strongest = [i for i in np.flatnonzero(large.kinds == FEATURE) if shares[i] <= kept[-1]]
    assert sorted(map(int, said)) == sorted(large.features[strongest].tolist())


def test_an_empty_graph_is_drawn() -> None:
    whole = make_graph()
    names = ("kinds", "layers", "positions", "sources", "features", "activations", "values", "slopes")
    names += ("target_weights", "edge_sources", "edge_targets", "edge_weights")
    nothing = replace(whole, **{name: getattr(whole, name)[:0] for name in names})
    assert "0 features" in draw_graph(nothing)


# ---- in a browser
@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with run_chromium() as made:
        yield made


@pytest.fixture
def page(browser: Any) -> Iterator[Any]:
    with open_page(browser, lambda url: url.startswith(("file:", "blob:"))) as made:
        yield made


@pytest.fixture(scope="module")
def address(graph: AttributionGraph, labels: Any, tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("graph")
    view = GraphView(node_threshold=1.0, edge_threshold=1.0)
    return write_graph_page(graph, folder / "graph.html", labels=labels, view=view, title=HOSTILE).as_uri()


def spot(page: Any, node: int) -> dict[str, float]:
    box = page.locator(f'[data-node="{node}"]').bounding_box()
    return {"x": box["x"] + box["width"] / 2, "y": box["y"] + box["height"] / 2}


def click(page: Any, node: int, *modifiers: str) -> None:
    for key in modifiers:
        page.keyboard.down(key)
    page.mouse.click(**spot(page, node))
    for key in modifiers:
        page.keyboard.up(key)


def state(page: Any) -> dict[str, str]:
    return {name: values[0] for name, values in parse_qs(page.evaluate("location.hash.slice(1)")).items()}


def ends(page: Any, title: str) -> list[int]:
    rows = page.locator(f'h3:has-text("{title}") + ol [data-end]')
    return [int(row.get_attribute("data-end")) for row in rows.all()]


def busiest(graph: AttributionGraph) -> int:
    """A feature with inputs and outputs."""
    n = len(graph.kinds)
    into, out = (np.bincount(side, minlength=n) for side in (graph.edge_targets, graph.edge_sources))
    return int(np.argmax(np.minimum(into, out) * (graph.kinds == FEATURE)))


def test_a_pointer_lights_up_the_links_of_a_node(graph: AttributionGraph, address: str, page: Any) -> None:
    page.goto(address)
    node = busiest(graph)
    page.mouse.move(**spot(page, node))
    linked = {
        *graph.edge_sources[graph.edge_targets == node].tolist(),
        *graph.edge_targets[graph.edge_sources == node].tolist(),
    }
    lit = "[...document.querySelectorAll('[data-node]')].filter(p => p.style.fill).map(p => Number(p.dataset.node))"
    assert set(page.evaluate(lit)) == linked
    assert HOSTILE in page.locator(".tip").inner_text() and page.locator("img").count() == 0
    inked = """(() => { const seen = document.createElement("canvas"), canvas = document.querySelectorAll("canvas")[1];
        const { width, height } = Object.assign(seen, { width: canvas.width, height: canvas.height });
        const context = seen.getContext("2d", { willReadFrequently: true });
        context.drawImage(canvas, 0, 0);
        return context.getImageData(0, 0, width, height).data.some(x => x); })()"""
    assert page.evaluate(inked)
    page.mouse.move(2, 2)
    assert page.evaluate(lit) == [] and not page.evaluate(inked) and page.locator(".tip").is_hidden()


def test_a_click_lists_inputs_and_outputs_by_weight(graph: AttributionGraph, address: str, page: Any) -> None:
    page.goto(address)
    node = busiest(graph)
    click(page, node)
    page.locator('h3:has-text("Inputs")').wait_for()
    for title, own, other in (
        ("Inputs", graph.edge_targets, graph.edge_sources),
        ("Outputs", graph.edge_sources, graph.edge_targets),
    ):
        mine = np.flatnonzero(own == node)
        order = mine[np.argsort(-np.abs(graph.edge_weights[mine]), kind="stable")]
        assert ends(page, title) == other[order].tolist()
        value = page.locator(f'h3:has-text("{title}") + ol .value').first.inner_text()
        assert np.isclose(float(value.replace("\u2212", "-")), graph.edge_weights[order[0]], rtol=1e-2)
    assert state(page) == {"clickedId": make_node_ids(graph)[node]}
    first = ends(page, "Inputs")[0]
    page.locator(f'h3:has-text("Inputs") + ol [data-end="{first}"]').click()
    assert state(page)["clickedId"] == make_node_ids(graph)[first]
    page.go_back()
    wait_until(page, f"document.querySelector('.clicked').dataset.node === '{node}'")


def test_pins_groups_and_names_are_in_the_address_and_in_a_file(
    graph: AttributionGraph, address: str, page: Any, tmp_path: Path
) -> None:
    ids, node = make_node_ids(graph), busiest(graph)
    inputs = graph.edge_sources[graph.edge_targets == node].tolist()
    a, b = inputs[0], inputs[1]
    page.goto(address)
    click(page, node, "Control")
    click(page, a, "Shift")
    click(page, b, "Shift")
    page.get_by_text("2 selected").wait_for()
    page.get_by_label("Name of the group").fill('a "group" <b>')
    page.get_by_role("button", name="Group").click()
    page.locator(".box.group").wait_for()
    assert page.locator(".box").count() == 2 and page.locator(".arrow").count() >= 1
    both = np.isin(graph.edge_sources, (a, b)) & (graph.edge_targets == node)
    total = float(graph.edge_weights[both].sum())
    said = [text.replace("\u2212", "-") for text in page.locator(".board text").all_text_contents()]
    assert any(np.isclose(float(text), total, rtol=1e-2) for text in said)
    click(page, node)
    page.get_by_label("Name", exact=True).fill(HOSTILE + "!")
    page.get_by_label("Name", exact=True).press("Tab")
    assert page.locator(".panel h2").inner_text().strip() == HOSTILE + "!"
    page.get_by_label("Nodes by influence").fill("0.5")
    page.get_by_label("Links").select_option("input")
    seen = state(page)
    assert seen["pinnedIds"].split(",") == [ids[node], ids[a], ids[b]] and seen["pruningThreshold"] == "0.5"
    assert json.loads(seen["supernodes"]) == [['a "group" <b>', ids[a], ids[b]]]
    assert [ids[node], HOSTILE + "!"] in json.loads(seen["clerps"])
    with page.expect_download() as waiting:
        page.get_by_role("button", name="Save view").click()
    saved = tmp_path / "view.json"
    waiting.value.save_as(saved)
    view = read_view(saved, ids)
    assert view.pinned == (node, a, b) and view.supernodes == (('a "group" <b>', (a, b)),) and view.clicked == node
    assert (view.node_threshold, view.edge_threshold, view.link_type) == (0.5, 1.0, "input")
    assert view.labels[node] == HOSTILE + "!"
    shared = page.url
    page.goto("about:blank")
    page.goto(shared)
    page.locator(".box.group").wait_for()
    assert page.locator(".panel h2").inner_text().strip() == HOSTILE + "!" and state(page) == seen
    page.goto(address + "#")
    page.reload()
    page.locator("[data-node]").first.wait_for()
    assert page.locator(".box").count() == 0
    page.locator("input[type=file]").set_input_files(saved)
    page.locator(".box.group").wait_for()
    assert state(page) == seen and page.locator("img").count() == 0
    page.locator("input[type=file]").set_input_files({"name": "x.json", "mimeType": "", "buffer": b"[]"})
    page.locator(".failure", has_text="x.json must hold a saved view").wait_for()


def test_a_box_is_dragged_and_stays(graph: AttributionGraph, address: str, page: Any) -> None:
    ids, node = make_node_ids(graph), busiest(graph)
    page.goto(f"{address}#pinnedIds={ids[node]},{ids[0]}")
    box = page.locator('[data-box="0"]')
    box.scroll_into_view_if_needed()
    before = box.bounding_box()
    way = 60 if before["x"] < DESK["width"] / 3 else -60
    page.mouse.move(before["x"] + 4, before["y"] + before["height"] - 4)
    page.mouse.down()
    page.mouse.move(before["x"] + 4 + way, before["y"] + before["height"] + 16, steps=4)
    page.mouse.up()
    after = box.bounding_box()
    assert abs(after["x"] - before["x"] - way) < 2 and abs(after["y"] - before["y"] - 20) < 2
    assert len(state(page)["sg_pos"].split()) == 4
    page.reload()
    page.locator('[data-box="0"]').wait_for()
    again = page.locator('[data-box="0"]').bounding_box()
    assert abs(again["x"] - after["x"]) < 2 and abs(again["y"] - after["y"]) < 2
    page.get_by_role("button", name=re.compile("^Unpin ")).first.click()
    assert page.locator(".box").count() == 1 and state(page)["pinnedIds"] == ids[0]


def test_the_graph_is_read_with_keys_alone(graph: AttributionGraph, address: str, page: Any) -> None:
    page.goto(address)
    page.keyboard.press("/")
    page.keyboard.type("embedding")
    assert page.get_by_text(f"{len(TOKENS)} of {len(graph.kinds)} nodes").count() == 1
    assert page.locator(".found").count() == len(TOKENS) and state(page)["q"] == "embedding"
    page.get_by_label("Search").fill("")
    page.locator("svg.nodes").focus()
    page.keyboard.press("ArrowUp")
    logits = np.flatnonzero(graph.kinds == LOGIT).tolist()
    page.locator("[aria-live]", has_text="logit").wait_for()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Enter")
    assert state(page)["clickedId"] == make_node_ids(graph)[logits[1]]
    for _ in range(12):
        page.keyboard.press("ArrowDown")
    page.locator("[aria-live]", has_text="embedding").wait_for()
    page.keyboard.press("p")
    assert state(page)["pinnedIds"].startswith("E_")
    page.keyboard.press("s")
    page.get_by_text("1 selected").wait_for()
    page.keyboard.press("Escape")
    assert "clickedId" not in state(page)


def test_thresholds_hide_what_has_little_influence(graph: AttributionGraph, address: str, page: Any) -> None:
    page.goto(address)
    nodes, edges = influence_shares(graph)
    always = np.isin(graph.kinds, (LOGIT, KINDS.index("embedding")))
    for percent in (30, 60):
        page.get_by_label("Nodes by influence").fill(f"{percent / 100}")
        page.get_by_label("Edges by influence").fill(f"{percent / 100}")
        kept = always | (nodes <= percent / 100)
        drawn = (edges <= percent / 100) & kept[graph.edge_sources] & kept[graph.edge_targets]
        said = f"{kept.sum()} of {len(kept)} nodes, {drawn.sum()} of {len(drawn)} edges drawn"
        page.locator(".status", has_text=said).wait_for()
        assert page.locator("[data-node]").count() == kept.sum()


def test_no_address_breaks_the_page(graph: AttributionGraph, address: str, page: Any) -> None:
    for end in (
        "supernodes=%5B",
        "supernodes=[1]",
        "clickedId=x&pinnedIds=,,y",
        "pruningThreshold=a&edgeThreshold=9",
        "clerps={}",
    ):
        page.goto("about:blank")
        page.goto(f"{address}#{end}")
        page.locator("[data-node]").first.wait_for()
        assert page.locator("[data-node]").count() == len(graph.kinds) and page.locator(".box").count() == 0


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_shows_it_without_scrolling_sideways(browser: Any, scheme: Any, tmp_path: Path) -> None:
    """A graph wider than a phone scrolls in its frame, to the clicked node, and its rows keep their names."""
    graph = make_graph(300, 3000, tuple(f" word{i}" for i in range(16)))
    ids, node = make_node_ids(graph), busiest(graph)
    made = browser.new_page(viewport=PHONE, color_scheme=scheme, has_touch=True)
    address = write_graph_page(graph, tmp_path / "wide.html").as_uri()
    made.goto(f"{address}#clickedId={ids[node]}&pinnedIds={ids[node]},{ids[0]}")
    made.locator(".box").first.wait_for()
    assert made.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]
    assert made.evaluate("document.querySelector('.links').scrollWidth") > PHONE["width"]
    assert 0 < spot(made, node)["x"] < PHONE["width"]
    assert made.locator(".band span").first.bounding_box()["x"] >= 0
    color = [int(x) for x in re.findall(r"\d+", made.evaluate("getComputedStyle(document.body).backgroundColor"))[:3]]
    assert (sum(color) > 600) == (scheme == "light")
    made.close()

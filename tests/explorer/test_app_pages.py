"""The explorer's pages and edits through its addresses: labels, notes, lists, undo, export, read-only, escaping."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from asking import TOKEN, Client

import saelab as sl
from saelab.explorer.app import make_app
from saelab.explorer.session import Explorer
from saelab.labels.label import Label

HOOK = "blocks.1.hook_resid_post"
HOSTILE = "</script><img src=x onerror=alert(1)>"
SETUP = {"prompt": "The owl", "features": [{"feature": 3, "strength": 2.0}], "n_tokens": 12, "seed": 1}


@pytest.fixture(scope="module")
def sae() -> sl.SAE:
    return sl.SAE(sl.SAEConfig(d_in=32, d_sae=48, activation=sl.AbsTopK(k=3), normalizer="none"), seed=0)


@pytest.fixture
def opened(tiny: Any, sae: sl.SAE, tmp_path: Path) -> Iterator[Explorer]:
    """An explorer without model, of a store whose text is hostile."""
    tokens = sl.tokenize(tiny, [f"{HOSTILE} said the owl"] * 12, ctx_len=48)
    store = sl.harvest(sae, tiny, tokens, tmp_path / "store", hook_point=HOOK, progress=False)
    made = Explorer.open(store, None, sae, title=HOSTILE)
    made.catalog.wait()
    yield made
    made.close()


@pytest.fixture
def client(opened: Explorer) -> Client:
    return Client(make_app(opened, TOKEN))


def busiest(opened: Explorer) -> int:
    return int(opened.store.statistics.fires.sum(1).argmax())


def side_of(opened: Explorer) -> int:
    """The sign with which that feature fires most."""
    return 1 - 2 * int(opened.store.statistics.fires[busiest(opened)].argmax())


def test_the_list_is_paged_sorted_and_searched(client: Client, opened: Explorer) -> None:
    found = client("GET", "api/features?sort=density&order=desc&limit=5").json()
    densities = [row["density"] for row in found["rows"]]
    assert len(densities) == 5 and densities == sorted(densities, reverse=True) and found["total"] == 48
    assert client("GET", "api/features?limit=501").status_code == 400
    assert client("GET", "api/features?sort=beauty").status_code == 400
    client("PUT", f"api/features/{busiest(opened)}/label", json={"text": "owls at night"})
    rows = client("GET", f"api/features?q={quote('owls')}").json()["rows"]
    assert busiest(opened) in [row["feature"] for row in rows]


def test_hostile_text_is_escaped_wherever_html_is_answered(client: Client, opened: Explorer) -> None:
    j = busiest(opened)
    client("PUT", f"api/features/{j}/label", json={"text": HOSTILE})
    client("PUT", f"api/features/{j}/note", json={"text": HOSTILE})
    page = client("GET", f"api/features/{j}").json()
    assert HOSTILE in json.dumps([label["text"] for label in page["labels"]]) and page["note"] == HOSTILE
    assert page["card"]["label"] == HOSTILE  # text, which the page draws as text
    assert client("GET", f"api/features/{j}/examples?group=top&side={side_of(opened)}").json()["windows"]
    html = client("GET", "api/pages/dead").json()["html"]
    assert "<img" not in html and "<script" not in html and "</script" not in html


def test_edits_are_kept_and_taken_back_in_order(client: Client, opened: Explorer) -> None:
    j = busiest(opened)
    assert client("GET", "api/history").json() == {"undo": None}
    edits = [
        ("PUT", f"api/features/{j}/label", {"text": "mine"}),
        ("PUT", f"api/features/{j}/note", {"text": "a note"}),
        ("PUT", "api/list?name=good", {"features": [1, 2]}),
        ("POST", f"api/list/{j}?name=good", None),
        ("DELETE", "api/list/1?name=good", None),
        ("PUT", f"api/setup?name={quote('my setup')}", {"setup": SETUP}),
    ]
    for method, path, body in edits:
        answer = client(method, path, **({"json": body} if body is not None else {}))
        assert answer.status_code == 200, answer.text
    lists = client("GET", "api/lists").json()
    assert lists == {"lists": [{"name": "good", "features": [2, j]}], "names": {"2": "", str(j): "mine"}}
    [setup] = client("GET", "api/setups").json()["setups"]
    assert setup["name"] == "my setup" and setup["setup"]["features"][0]["feature"] == 3
    page = client("GET", f"api/features/{j}").json()
    assert page["note"] == "a note" and page["lists"] == ["good"]
    assert [label["text"] for label in page["labels"] if label["by_person"]] == ["mine"]
    for _ in edits:
        assert client("GET", "api/history").json()["undo"]
        assert client("POST", "api/undo").json()["undone"]
    assert client("GET", "api/history").json() == {"undo": None}
    assert client("GET", "api/lists").json()["lists"] == [] and client("GET", "api/setups").json() == {"setups": []}
    page = client("GET", f"api/features/{j}").json()
    assert page["labels"] == [] and page["note"] == ""


def test_a_label_is_chosen_and_deleted(client: Client, opened: Explorer) -> None:
    j = busiest(opened)
    client("PUT", f"api/features/{j}/label", json={"text": "mine"})
    side = side_of(opened)
    assert client.events(f"api/features/{j}/relabel", {"method": "rules", "sign": side})[-1]["done"]
    assert opened.labels[j].text == "mine"
    assert client("PUT", f"api/features/{j}/choice", json={"author": "rules", "sign": side}).status_code == 200
    assert client("PUT", f"api/features/{j}/choice", json={"author": "nobody", "sign": side}).status_code == 400
    gone = client("DELETE", f"api/features/{j}/label", json={"author": "rules", "sign": side})
    assert gone.status_code == 200 and {label.author for label in opened.labels.labels(j)} == {opened.author}


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("GET", "features/48", None),
        ("GET", "features/48/examples", None),
        ("PUT", "features/48/label", {"text": "x"}),
        ("PUT", "features/1/label", {"text": 3}),
        ("PUT", "features/1/label", {}),
        ("PUT", "features/1/label", {"text": "x", "sign": True}),
        ("PUT", "features/1/label", {"text": "x", "sign": 7}),
        ("PUT", "list?name=a", {"features": [48]}),
        ("PUT", "list?name=a", {"features": ["1"]}),
        ("PUT", "list?name=a", {"features": "12"}),
        ("PUT", "setup?name=a", {"setup": {"prompt": "x", "features": []}}),
        ("PUT", "setup?name=a", {"setup": 1}),
        ("GET", "pages/secrets", None),
        ("GET", "export?format=exe", None),
        ("GET", "features/1/window?row=x", None),
    ],
)
def test_what_is_wrong_is_one_sentence(client: Client, method: str, path: str, body: Any) -> None:
    answer = client(method, f"api/{path}", **({"json": body} if body is not None else {}))
    assert answer.status_code in (400, 404), answer.text
    said = answer.json()["error"]
    assert said and "\n" not in said and "Traceback" not in said


def test_work_is_exported_as_files(client: Client, opened: Explorer) -> None:
    client("PUT", "api/features/3/label", json={"text": HOSTILE})
    client("PUT", "api/list?name=good", json={"features": [1]})
    for form, media in (("json", "application/json"), ("csv", "text/csv"), ("neuronpedia", "")):
        answer = client("GET", f"api/export?format={form}")
        assert answer.status_code == 200 and answer.headers["content-disposition"].startswith("attachment")
        assert answer.headers["content-type"].startswith(media) and "alert(1)" in answer.text
        assert answer.headers["x-content-type-options"] == "nosniff"
    assert "good" in client("GET", "api/export?format=json").text


def test_what_has_no_good_name_is_no_explanation(client: Client, opened: Explorer) -> None:
    assert client("GET", "api/exports").json() == {"n_unnamed": 0}
    opened.labels.add([Label(feature=j, text="No good rule", author="rules", kind="none") for j in (3, 4)])
    opened.labels.set(5, "owls", author="me")
    assert client("GET", "api/exports").json() == {"n_unnamed": 2}
    [record] = client("GET", "api/export?format=neuronpedia").text.splitlines()
    assert json.loads(record)["description"] == "owls"
    assert client("GET", "api/export?format=csv").text.count("No good rule") == 2


@pytest.mark.parametrize("name", ["a/b", "..", "a/3", "50% of <b>", "?#&=+", "\u00e9 \u4e2d", "a\\b"])
def test_a_name_may_hold_any_character(client: Client, name: str) -> None:
    asked = f"name={quote(name, safe='')}"
    for method, path, body in (
        ("PUT", f"list?{asked}", {"features": [1]}),
        ("POST", f"list/3?{asked}", None),
        ("DELETE", f"list/1?{asked}", None),
        ("PUT", f"setup?{asked}", {"setup": SETUP}),
    ):
        assert client(method, f"api/{path}", **({"json": body} if body is not None else {})).status_code == 200
    assert client("GET", "api/lists").json()["lists"] == [{"name": name, "features": [3]}]
    [row] = client("GET", f"api/features?list={quote(name, safe='')}").json()["rows"]
    assert row["feature"] == 3
    assert [each["name"] for each in client("GET", "api/setups").json()["setups"]] == [name]
    for kind in ("list", "setup"):
        assert client("DELETE", f"api/{kind}?{asked}").status_code == 200
        assert client("PUT", f"api/{kind}", json={"features": [1], "setup": SETUP}).status_code == 400
    assert client("GET", "api/lists").json()["lists"] == [] and client("GET", "api/setups").json() == {"setups": []}


def test_read_only_shows_everything_and_changes_nothing(tiny: Any, opened: Explorer) -> None:
    opened.labels.set(3, "mine", author="me")
    shown = Explorer.open(opened.store, tiny, opened.sae, read_only=True)
    client = Client(make_app(shown, TOKEN))
    before = (opened.store.folder / "labels.sqlite").read_bytes()
    about = client("GET", "api/about").json()
    assert not about["can"]["edit"] and not about["can"]["label_rules"]
    for method, path, body in (
        ("PUT", "features/3/label", {"text": "x"}),
        ("POST", "features/3/relabel", {"method": "rules"}),
        ("DELETE", "list?name=a", None),
        ("POST", "undo", None),
    ):
        answer = client(method, f"api/{path}", **({"json": body} if body is not None else {}))
        assert answer.status_code == 403 and "--read-only" in answer.json()["error"]
    assert client("GET", "api/features/3").json()["labels"][0]["text"] == "mine"
    assert client("POST", "api/prompt", json={"text": "The owl"}).status_code == 200
    assert client.events("api/steer", SETUP)[-1]["done"]
    shown.close()
    assert (opened.store.folder / "labels.sqlite").read_bytes() == before

"""The explorer's addresses: what each answers, hostile text that stays text, and readers who leave and so stop work."""

import asyncio
import json
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import pytest
from asking import TOKEN, Client

import saelab as sl
from saelab.explorer import app as app_module, live_steering
from saelab.explorer.app import describe_error, find_status, list_assets, make_app
from saelab.explorer.security import ExplorerLimits, TooBusy
from saelab.explorer.session import Explorer
from saelab.visualization.html import bundle

HOOK = "blocks.1.hook_resid_post"
HOSTILE = "</script><img src=x onerror=alert(1)>"
SETUP = {"prompt": "The owl", "features": [{"feature": 3, "strength": 2.0}], "n_tokens": 12, "seed": 1}


@pytest.fixture(scope="module")
def explorer(tiny: Any, tiny_tokens: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    sae = sl.SAE(sl.SAEConfig(d_in=32, d_sae=48, activation=sl.AbsTopK(k=3), normalizer="none"), seed=0)
    out: Path = tmp_path_factory.mktemp("app") / "store"
    store = sl.harvest(sae, tiny, tiny_tokens[:16], out, hook_point=HOOK, progress=False)
    opened = Explorer.open(store, tiny, sae, title=HOSTILE)
    opened.labels.set(3, HOSTILE, author="me")
    yield opened
    opened.close()


@pytest.fixture
def client(explorer: Any) -> Client:
    return Client(make_app(explorer, TOKEN))


def test_the_page_and_its_files_come_from_the_package_alone(client: Client) -> None:
    page = client("GET", "")
    assert page.status_code == 200 and page.headers["content-type"].startswith("text/html")
    assert HOSTILE not in page.text and "&lt;/script&gt;&lt;img" in page.text
    assert "<script>" not in page.text and "://" not in page.text
    names = list_assets()
    assert "plotly.min.js" in names and not [name for name in names if name.endswith((".py", ".j2", ".html"))]
    for name, path in names.items():
        answer = client("GET", f"static/{name}")
        data = bundle("explorer.js", app_module.ASSETS).encode() if name == "explorer.js" else path.read_bytes()
        assert answer.status_code == 200 and answer.content == data
        assert answer.headers["content-type"].split(";")[0] == app_module.MEDIA[path.suffix]
    again = client("GET", f"static/{name}", headers={"if-none-match": answer.headers["etag"]})
    assert again.status_code == 304 and not again.content


@pytest.mark.parametrize(
    "name",
    [
        "../app.py",
        "..%2fapp.py",
        "%2e%2e/session.py",
        "index.html.j2",
        "/etc/passwd",
        "vendor/../../app.py",
        "",
        "x.js",
    ],
)
def test_no_other_file_has_an_address(client: Client, name: str) -> None:
    answer = client("GET", f"static/{name}")
    assert answer.status_code in (403, 404) and "error" in answer.json()


def test_an_unknown_address_is_a_sentence(client: Client) -> None:
    for method, path in (("GET", "api/nothing"), ("POST", "api/about"), ("GET", "api/features/x")):
        answer = client(method, path)
        assert answer.status_code in (404, 405) and answer.json()["error"].startswith("There is nothing")


def test_about_and_model(client: Client, explorer: Any) -> None:
    said = client("GET", "api/about").json()
    assert said["title"] == HOSTILE and said["store"]["d_sae"] == 48 and said["model_state"] == "ready"
    assert client("GET", "api/model").json() == {"state": "ready"}


def test_a_prompt_is_answered_in_json_whatever_is_in_it(client: Client) -> None:
    answer = client("POST", "api/prompt", json={"text": HOSTILE})
    assert answer.headers["content-type"] == "application/json" and answer.status_code == 200
    assert "".join(answer.json()["words"][1:]) == HOSTILE
    labels = {row["feature"]: row["label"] for row in answer.json()["features"]}
    assert labels.get(3, HOSTILE) == HOSTILE


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b"", "`text`"),
        (b"{", "must hold JSON"),
        (b"[]", "JSON object"),
        (b'{"text": NaN}', "must hold JSON"),
        (b'{"text": "a", "text": "b"}', "comes twice"),
        (b"\xff\xfe", "must hold JSON"),
        (b"[" * 5000, "must hold JSON"),
    ],
)
def test_a_wrong_body_is_one_sentence(client: Client, body: bytes, said: str) -> None:
    answer = client("POST", "api/prompt", content=body)
    assert answer.status_code == 400 and said in answer.json()["error"] and "edited" not in answer.json()["error"]


def test_steering_streams_tokens_and_ends_with_the_costs(client: Client) -> None:
    events = client.events("api/steer", SETUP)
    assert events[-1]["done"] and {event["run"] for event in events[:-1]} == {"unsteered", "steered", "random"}
    assert client("POST", "api/steer", json=SETUP | {"n_tokens": 100_000}).status_code == 400


def test_an_error_in_the_middle_is_an_event(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> Any:
        raise ValueError("The text could not be scored.")

    monkeypatch.setattr(live_steering, "score_texts", fail)
    events = client.events("api/steer", SETUP)
    assert events[-1] == {"error": "The text could not be scored."} and len(events) > 3
    monkeypatch.undo()
    assert client.events("api/steer", SETUP)[-1]["done"]  # nothing is held


def test_a_reader_who_leaves_stops_the_generation_within_a_turn(
    client: Client, monkeypatch: pytest.MonkeyPatch, tiny: Any
) -> None:
    monkeypatch.setattr(live_steering, "TURN_TOKENS", 2)
    drawn: list[int] = []
    draw = sl.lm.TokenStream.__next__
    monkeypatch.setattr(sl.lm.TokenStream, "__next__", lambda self: drawn.append(1) or draw(self))
    n_sent = client.leave("api/steer", SETUP | {"n_tokens": 100}, after=4)
    assert n_sent <= 6 and 4 <= len(drawn) <= 12
    assert client.events("api/steer", SETUP)[-1]["done"]  # the turn is free again
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in tiny.original_model.modules())
    client.leave("api/steer", SETUP | {"n_tokens": 100}, after=3)
    assert hooks == sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in tiny.original_model.modules())


def test_a_labelling_streams_its_progress(client: Client, explorer: Any) -> None:
    events = client.events("api/features/5/relabel", {"method": "rules"})
    assert events[0]["progress"] > 0 and events[-1]["done"]
    answer = client("POST", "api/features/5/relabel", json={"method": "llm"})
    assert answer.status_code == 400 and "--label-model" in answer.json()["error"]


def test_a_second_generation_waits_and_is_refused_when_that_takes_too_long(explorer: Any) -> None:
    client = Client(make_app(explorer, TOKEN, limits=ExplorerLimits(wait=0.05)))

    async def run() -> tuple[Any, Any]:
        first = asyncio.ensure_future(client.ask("POST", "api/steer", json=SETUP | {"n_tokens": 120}))
        await asyncio.sleep(0.02)
        second = await client.ask("POST", "api/steer", json=SETUP)
        return await first, second

    first, second = asyncio.run(run())
    assert first.status_code == 200 and '"done": true' in first.text
    assert second.status_code == 503 and second.json()["error"].startswith("Only one generation runs at a time")


def test_twenty_readers_are_answered_while_one_generates(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live_steering, "TURN_SECONDS", 60.0)  # equal turns, however slow

    async def run() -> tuple[Any, list[Any]]:
        writing = asyncio.ensure_future(client.ask("POST", "api/steer", json=SETUP | {"n_tokens": 60}))
        paths = [("GET", "api/about", None), ("GET", "api/model", None), ("POST", "api/prompt", {"text": "The fox"})]
        asked = [client.ask(method, path, json=body) for method, path, body in (paths * 7)[:20]]
        return await writing, list(await asyncio.gather(*asked))

    writing, answers = asyncio.run(run())
    alone = client.events("api/steer", SETUP | {"n_tokens": 60})
    assert [json.loads(line[6:]) for line in writing.text.split("\n\n") if line] == alone
    assert [answer.status_code for answer in answers] == [200] * 20
    prompts = [answer.json() for answer in answers[2::3]]
    assert all(prompt == prompts[0] for prompt in prompts)


def test_work_is_never_done_on_the_event_loop(client: Client, explorer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A slow answer holds up no other."""

    def slowly() -> dict[str, Any]:
        time.sleep(0.5)
        return {}

    monkeypatch.setattr(explorer, "about", slowly)

    async def run() -> list[str]:
        done: list[str] = []

        async def ask(path: str) -> None:
            await client.ask("GET", path)
            done.append(path)

        await asyncio.gather(ask("api/about"), ask("api/model"))
        return done

    assert asyncio.run(run()) == ["api/model", "api/about"]


def test_without_a_model_prompts_are_refused_and_pages_are_there(explorer: Any, tmp_path: Path) -> None:
    alone = Explorer.open(explorer.store, None, explorer.sae)
    client = Client(make_app(alone, TOKEN))
    assert client("GET", "api/about").json()["model_state"] == "none"
    for path, body in (("prompt", {"text": "The fox"}), ("steer", SETUP)):
        answer = client("POST", f"api/{path}", json=body)
        assert answer.status_code == 400 and "language model" in answer.json()["error"]
    alone.close()


def test_errors_have_a_status_and_one_sentence() -> None:
    cases: dict[int, list[Exception]] = {
        400: [ValueError("a\nb"), TypeError("a b")],
        404: [KeyError("a b"), FileNotFoundError("a b")],
        403: [PermissionError("a b")],
        503: [TimeoutError("a b"), TooBusy("a b")],
    }
    for status, errors in cases.items():
        assert [(find_status(error), describe_error(error)) for error in errors] == [(status, "a b")] * len(errors)
    secret = RuntimeError("a key of the machine")
    assert (
        find_status(secret) == 500 and "key" not in describe_error(secret) and "RuntimeError" in describe_error(secret)
    )


def test_an_error_that_was_not_foreseen_is_a_sentence(client: Client, explorer: Any, monkeypatch: Any) -> None:
    def fail() -> Any:
        raise RuntimeError("a key of the machine")

    monkeypatch.setattr(explorer, "about", fail)
    answer = client("GET", "api/about")
    assert answer.status_code == 500 and "a key" not in answer.text and "RuntimeError" in answer.json()["error"]


@pytest.mark.parametrize("path", ["api/about/", "api/lists/..%2f"])
def test_no_answer_leads_to_an_address_without_the_token(client: Client, path: str) -> None:
    assert client("GET", path).status_code == 404


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("DELETE", "api/features/3/label", b'{"author": "\\ud800"}'),
        ("POST", "api/prompt", b'{"text": "The", "rank": "attribution", "target": "\\ud800"}'),
    ],
)
def test_half_of_a_surrogate_pair_is_named(client: Client, method: str, path: str, body: bytes) -> None:
    answer = client(method, path, content=body)
    assert answer.status_code == 400
    assert answer.json()["error"].startswith(
        "A request must hold Unicode text, got half of a surrogate pair ('\\ud800')"
    )


def test_pages_of_features_are_made_one_after_another_and_hold_nothing_else_up(
    explorer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, go, at_work, most = threading.Event(), threading.Event(), [], []

    def describe(_: Any, feature: int) -> dict[str, Any]:
        at_work.append(feature)
        most.append(len(at_work))
        begun.set()
        go.wait(20)
        at_work.remove(feature)
        return {"feature": feature}

    monkeypatch.setattr(app_module.feature_pages, "describe", describe)
    app = make_app(explorer, TOKEN)

    async def read() -> list[int]:
        async with httpx.AsyncClient(
            transport=httpx.ASGITransport(app), base_url=f"http://127.0.0.1/{TOKEN}/"
        ) as asked:
            pages = [asyncio.ensure_future(asked.get(f"api/features/{j}")) for j in range(6)]
            await asyncio.to_thread(begun.wait, 20)
            others = [await asked.get(path) for path in ("api/about", "api/lists", "api/pages/dead", "static/page.css")]
            assert {answer.status_code for answer in others} == {200} and not any(page.done() for page in pages)
            go.set()
            return [(await page).json()["feature"] for page in pages]

    assert asyncio.run(read()) == list(range(6)) and most == [1] * 6

"""Features are sent to a server that checks requests as Neuronpedia's routes do."""

import contextlib
import json
import socketserver
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

import saelab as sl
from saelab.interop import neuronpedia_upload
from saelab.interop.neuronpedia import Publication
from saelab.interop.neuronpedia_upload import Server, upload
from saelab.labels.label import Label
from saelab.labels.label_store import LabelStore

KEY = "sk-secret-of-ada"


class Site:
    """What the server knows, what it takes, and the failures that it is told to have."""

    def __init__(self) -> None:
        self.models: dict[str, dict[str, Any]] = {}
        self.sets: set[tuple[str, str]] = set()
        self.features: dict[int, dict[str, Any]] = {}
        self.twice: list[int] = []
        self.failures: list[tuple[int, bool]] = []
        """code, and whether the request was taken all the same"""
        self.log: list[str] = []
        self.routes: dict[str, tuple[int, bool]] = {}
        """a failure of a route's next request: its code, and whether the request was taken all the same"""

    def has_set(self, body: dict[str, Any]) -> bool:
        return (body.get("modelId"), body.get("name")) in self.sets

    def get(self, path: list[str]) -> tuple[int, Any]:
        if failure := self.routes.pop(path[0], None):
            return failure[0], {"error": "Something went wrong on our end."}
        if path[0] == "source-set":
            return 200, {"name": path[2]} if (path[1], path[2]) in self.sets else None
        if path[0] == "feature":
            return (200, {"index": path[3]}) if int(path[3]) in self.features else (404, {"error": "Feature not found"})
        return 404, {}

    def post(self, path: str, body: dict[str, Any]) -> tuple[int, Any]:
        code, taken = self.routes.pop(path, (200, True))
        if not taken:
            return code, {"error": "Something went wrong on our end."}
        answer = self.take(path, body)
        return answer if code == 200 else (code, {"error": "Something went wrong on our end."})

    def take(self, path: str, body: dict[str, Any]) -> tuple[int, Any]:
        if path == "model/get":
            return 200, self.models.get(body["id"])
        if path in ("model/new", "source-set/new") and (body.get("id") in self.models or self.has_set(body)):
            return 400, {"error": "exists already"}
        if path == "model/new":
            self.models[body["id"]] = body
            return (200, body) if 1 <= body["layers"] < 128 else (400, {"error": "Layers"})
        if path == "source-set/new":
            if body["modelId"] not in self.models:
                return 400, {"error": "Model not found"}
            self.sets.add((body["modelId"], body["name"]))
            return 200, body
        failure, taken = self.failures.pop(0) if self.failures else (200, True)
        if why := self.refuse(body):
            return 400, {"error": why}
        if taken:
            self.twice += [one["index"] for one in body["features"] if one["index"] in self.features]
            self.features |= {one["index"]: one for one in body["features"]}
        return failure, {"message": "done"} if failure == 200 else {"error": "Something went wrong on our end."}

    def refuse(self, body: dict[str, Any]) -> str:
        """Why the real route would not take a request; empty where it would."""
        if (body["modelId"], body["source"].partition("-")[2]) not in self.sets:
            return "Source set not found."
        if not 1 <= len(body["features"]) <= 128 or len({one["index"] for one in body["features"]}) != len(
            body["features"]
        ):
            return "features"
        if "\0" in str(body["features"]) or "\\x00" in str(body["features"]):
            return "text that PostgreSQL does not store"
        for one in body["features"]:
            if not (type(one["index"]) is int and 0 <= one["density"] <= 1 and one["activations"]):
                return "index, density or activations"
            if any(not 1 <= len(said["text"]) <= 512 or "modelName" in said for said in one["explanations"]):
                return "explanations"  # the route hands a model's name to a field that its table lacks
            for side in ("topLogits", "bottomLogits"):
                if len(one[side]) > 20 or not all(pair["token"] for pair in one[side]):
                    return side
            for window in one["activations"]:
                if not all(window["tokens"]) or not 1 <= len(window["tokens"]) == len(window["values"]) <= 1024:
                    return "tokens"
                if not 0 <= window.get("quantileFraction", 0) <= 1:
                    return "quantileFraction"
        return ""


@pytest.fixture
def site() -> Iterator[tuple[Site, str]]:
    state = Site()

    class Handler(BaseHTTPRequestHandler):
        def answer(self, code: int, data: Any) -> None:
            if self.headers["x-api-key"] != KEY:
                code, data = 401, {"error": "This endpoint requires authorization."}
            raw = json.dumps(data).encode()
            self.send_response(code)
            self.send_header("Content-Length", str(len(raw)))
            self.end_headers()
            self.wfile.write(raw)

        def do_GET(self) -> None:
            state.log.append(f"GET {self.path}")
            self.answer(*state.get(self.path.removeprefix("/api/").split("/")))

        def do_POST(self) -> None:
            state.log.append(f"POST {self.path}")
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            known = self.headers["x-api-key"] == KEY
            self.answer(*(state.post(self.path.removeprefix("/api/"), body) if known else (401, {})))

        def log_message(self, *_: Any) -> None:
            """Print nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    yield state, f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture(scope="module")
def sae() -> sl.SAE:
    return sl.SAE(sl.SAEConfig(d_in=32, d_sae=40, activation=sl.AbsTopK(k=3)), seed=1)


@pytest.fixture(scope="module")
def store(sae: sl.SAE, tiny: Any, tiny_tokens: Any, tmp_path_factory: pytest.TempPathFactory) -> sl.FeatureStore:
    folder = tmp_path_factory.mktemp("sent") / "store"
    made = sl.harvest(sae, tiny, tiny_tokens[:24], folder, hook_point="blocks.1.hook_resid_post", progress=False)
    with LabelStore.open(made) as book:
        book.add([Label(feature=5, sign=-1, text="cold " * 200, author="rules")])
        book.add([Label(feature=6, text="No good rule", author="rules", kind="none")])
    return made


@pytest.fixture
def send(store: sl.FeatureStore, site: tuple[Site, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(neuronpedia_upload, "MOST_FEATURES", 10)
    monkeypatch.setattr(neuronpedia_upload, "FIRST_WAIT", 0.001)
    monkeypatch.delenv("NEURONPEDIA_API_KEY", raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    about = Publication(model_id="Tiny-LM")

    def call(**changes: Any) -> Any:
        settings = {"key": KEY, "url": site[1], "about": about, "journal": tmp_path / "journal.json", "progress": False}
        return upload(store, **(settings | changes))

    return call


def test_all_features_are_sent_once(
    send: Any, site: tuple[Site, str], store: sl.FeatureStore, sae: sl.SAE, tiny: Any, tmp_path: Path
) -> None:
    state, _ = site
    result = send(sae=sae, model=tiny, create=True)
    fired = set((store.statistics.fires.sum(1) > 0).nonzero()[0].tolist())
    assert set(state.features) == fired and not state.twice
    assert (result.n_features, result.n_requests, result.n_explanations) == (len(fired), -(-len(fired) // 10), 1)
    assert state.models == {"tiny-lm": {"id": "tiny-lm", "layers": tiny.cfg.n_layers}}
    assert state.features[5]["explanations"][0]["text"].startswith("\u2212 cold cold")
    assert state.features[6]["explanations"] == []
    values = [value for window in state.features[5]["activations"] for value in window["values"]]
    assert min(values) == pytest.approx(min(store.feature(5).values.min(), 0))
    again = send()
    assert (again.n_features, again.n_earlier, again.n_requests) == (0, len(fired), 0) and not state.twice
    assert KEY not in repr(Server(key=KEY)) + str(result) + (tmp_path / "journal.json").read_text()


def test_a_dry_run_sends_nothing(send: Any, site: tuple[Site, str], tmp_path: Path) -> None:
    result = send(dry_run=True, key=None)
    assert result.n_requests and not site[0].log and not (tmp_path / "journal.json").exists()
    assert str(result).startswith("would send")


@pytest.mark.parametrize("failures", [[(502, False)], [(502, True)], [(429, False), (503, False)], [(500, True)] * 2])
def test_failures_that_pass_are_waited_for(
    failures: list[tuple[int, bool]], send: Any, site: tuple[Site, str], store: sl.FeatureStore
) -> None:
    """A request that was taken although its answer was lost is not sent again: its examples would be there twice."""
    state, _ = site
    state.sets.add(("tiny-lm", "saelab"))
    state.failures = list(failures)
    result = send()
    assert len(state.features) == result.n_features == int((store.statistics.fires.sum(1) > 0).sum())
    assert not state.twice and not state.failures


@pytest.mark.parametrize("taken", [False, True])
@pytest.mark.parametrize("route", ["source-set", "source-set/new", "model/new", "feature/upload-batch"])
def test_every_route_is_asked_again(
    route: str, taken: bool, send: Any, site: tuple[Site, str], sae: sl.SAE, tiny: Any
) -> None:
    """One mechanism for all: what was made although its answer was lost is not made again."""
    state, _ = site
    state.routes = {route: (503, taken)}
    result = send(sae=sae, model=tiny, create=True, features=[3, 5])
    assert result.n_features == len(state.features) == 2 and not state.twice and not state.routes
    assert list(state.models) == ["tiny-lm"] and state.sets == {("tiny-lm", "saelab")}


def test_a_server_that_drips_has_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bytes that come one by one end no wait for the next, and yet the request ends."""
    monkeypatch.setattr(neuronpedia_upload, "LONGEST_REQUEST", 0.3)
    stop = threading.Event()

    class Drip(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            with contextlib.suppress(OSError):
                for i in range(10_000):
                    head = b"HTTP/1.0 200 OK\r\n"
                    self.wfile.write(head[i : i + 1] or b"x")
                    if stop.wait(0.02):
                        return

    waits: list[float] = []
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Drip) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        client = Server(f"http://127.0.0.1:{server.server_address[1]}", KEY, wait=waits.append)
        begin = time.monotonic()
        with pytest.raises(RuntimeError, match="it took more than 0 s"):
            client.send("x", b"{}")
        took = time.monotonic() - begin
        stop.set()
        server.shutdown()
    assert len(waits) == 5 and took < 20


def test_a_run_that_broke_off_continues(send: Any, site: tuple[Site, str], tmp_path: Path) -> None:
    state, _ = site
    state.sets.add(("tiny-lm", "saelab"))
    state.failures = [(200, True)] + [(503, False)] * neuronpedia_upload.N_TRIES
    with pytest.raises(RuntimeError, match="did not take feature/upload-batch in 6 tries: 503"):
        send()
    assert len(json.loads((tmp_path / "journal.json").read_text())["done"]) == len(state.features) == 10
    result = send()
    assert result.n_earlier == 10 and not state.twice
    with pytest.raises(ValueError, match=r"must be the journal of .*other"):
        send(source_set="other")


def test_what_cannot_be_sent_is_told(send: Any, site: tuple[Site, str], monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="`key` must be a Neuronpedia key, got none"):
        send(key=None)
    with pytest.raises(ValueError, match="`source_set` must exist for tiny-lm"):
        send()
    with pytest.raises(ValueError, match="`model` must be given, as Neuronpedia does not know tiny-lm"):
        send(create=True)
    with pytest.raises(RuntimeError, match="refused source-set/tiny-lm/saelab: 401 This endpoint") as told:
        send(key="wrong-key")
    assert "wrong-key" not in str(told.value)
    with pytest.raises(ValueError, match="`url` must begin with https"):
        send(url="http://example.org")
    monkeypatch.setenv("NEURONPEDIA_API_KEY", KEY)
    site[0].sets.add(("tiny-lm", "saelab"))
    assert send(key=None, features=[3]).n_features == 1


def test_requests_stay_below_the_size_that_hosts_take(
    send: Any, site: tuple[Site, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(neuronpedia_upload, "MOST_BYTES", 20_000)
    state, _ = site
    state.sets.add(("tiny-lm", "saelab"))
    result = send(features=[3, 5, 6, 7])
    assert result.n_requests > 1 and len(state.features) == 4


def test_the_command_sends_what_it_is_told(store: sl.FeatureStore, capsys: pytest.CaptureFixture[str]) -> None:
    from saelab.cli.app import dispatch

    assert dispatch(["upload", str(store.folder), "--features", "3,5", "--dry-run", "--no-progress"]) == 0
    assert "would send 2 features" in capsys.readouterr().out
    assert not list(store.folder.glob("upload-*.json"))


def test_the_command_exports_what_it_is_told(
    store: sl.FeatureStore, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from saelab.cli.app import dispatch

    words = ["export", str(store.folder), "--features", "3,5", "--no-progress"]
    about = ["--model-id", "tiny-x", "--visibility", "UNLISTED", "--url", "https://a.org", "--url", "https://b.org"]
    assert dispatch([*words, "--out", str(tmp_path / "np"), *about]) == 0
    folder = tmp_path / "np" / "tiny-x" / "1-saelab"
    assert f"{folder}: neuronpedia" in capsys.readouterr().out
    head = json.loads((folder / "release.jsonl").read_text())
    assert head["visibility"] == "UNLISTED" and head["urls"] == ["https://a.org", "https://b.org"]
    assert dispatch([*words, "--out", str(tmp_path / "sd"), "--format", "saedashboard"]) == 0
    assert (tmp_path / "sd" / "batch-0.json").is_file()
    assert dispatch(["export", str(store.folder), "--out", str(tmp_path / "d"), "--format", "delphi"]) == 0
    assert list((tmp_path / "d").rglob("*.safetensors"))
    capsys.readouterr()
    assert dispatch([*words, "--out", str(tmp_path / "x"), "--format", "other"]) == 2
    assert "`--format` must be one of delphi" in capsys.readouterr().err


ODD = {
    "breaks off": b"HTTP/1.0 200 OK\r\nContent-Length: 1000\r\n\r\n{}",
    "no HTTP": b"hello\r\n\r\n",
    "too deep": b"HTTP/1.0 200 OK\r\n\r\n" + b"[" * 200_000,
    "too long": b"HTTP/1.0 200 OK\r\n\r\n" + b" " * 2_000_000,
    "too many headers": b"HTTP/1.0 200 OK\r\n" + b"x: y\r\n" * 200 + b"\r\n{}",
    "no number to wait": b"HTTP/1.0 429 Wait\r\nRetry-After: \xb2\r\n\r\n{}",
    "the key": b"HTTP/1.0 500 Oh\r\n\r\n" + json.dumps({"error": f"{KEY} is wrong"}).encode(),
}


@pytest.mark.parametrize("answer", ODD.values(), ids=ODD)
def test_an_odd_answer_is_tried_again_and_never_shows_the_key(answer: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(neuronpedia_upload, "LONGEST_ANSWER", 1_000_000)

    class Odd(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            while (line := self.rfile.readline()) not in (b"\r\n", b""):
                if line.lower().startswith(b"content-length"):
                    size = int(line.partition(b":")[2])
            self.rfile.read(size)
            with contextlib.suppress(OSError):  # the other side stops reading
                self.wfile.write(answer)

    waits: list[float] = []
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Odd) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        client = Server(f"http://127.0.0.1:{server.server_address[1]}", KEY, wait=waits.append)
        with pytest.raises(RuntimeError, match="did not take x in 6 tries") as caught:
            client.send("x", b"{}", lambda: False)
        server.shutdown()
    assert waits == [1, 2, 4, 8, 16] and KEY not in str(caught.value)


def test_a_key_is_sent_to_no_other_host(site: tuple[Site, str]) -> None:
    state, url = site

    class Elsewhere(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.send_response(302)
            self.send_header("Location", f"{url}/api/feature/m/0-s/1")
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            """Print nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Elsewhere) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        with pytest.raises(RuntimeError, match="refused x: 302"):
            Server(f"http://127.0.0.1:{server.server_address[1]}", KEY).ask("x", b"{}")
        server.shutdown()
    assert not state.log


@pytest.mark.parametrize("key", ["sk-\nsecret", "sk-\u2019secret", "sk\x00secret"])
def test_a_damaged_key_is_refused_and_not_shown(key: str, send: Any) -> None:
    with pytest.raises(ValueError, match="`key` must be plain letters") as caught:
        send(key=key)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("url", ["https://", "https://ada:word@host", "https://host/?q=1"])
def test_an_address_is_that_of_a_server(url: str) -> None:
    with pytest.raises(ValueError, match="`url` must be the address of a server"):
        Server(url)


def test_what_is_left_of_a_long_window_has_the_token_that_fires(
    send: Any, site: tuple[Site, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(neuronpedia_upload, "MOST_TOKENS", 3)
    site[0].sets.add(("tiny-lm", "saelab"))
    send()
    windows = [window for one in site[0].features.values() for window in one["activations"]]
    assert not [window for window in windows if len(window["tokens"]) > 3 or not any(window["values"])]


def test_text_that_a_database_does_not_store_is_replaced(
    send: Any, site: tuple[Site, str], store: sl.FeatureStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    state, _ = site
    state.sets.add(("tiny-lm", "saelab"))
    said = [Label(feature=3, text="<b>a\0b</b>\n\u202e\U0001f469", author="ada")]
    monkeypatch.setattr(neuronpedia_upload, "explained_labels", lambda *_: said)
    send(features=[3])
    assert state.features[3]["explanations"][0]["text"] == "<b>a\ufffdb</b>\n\u202e\U0001f469"

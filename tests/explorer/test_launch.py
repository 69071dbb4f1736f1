"""The explorer's server: it begins and ends as asked, says where it is, and leaves ports and signals alone."""

import signal
import socket
import sys
import threading
import types
from pathlib import Path
from typing import Any

import pytest

import saelab as sl
from saelab.explorer import launch
from saelab.explorer.launch import ExplorerServer, bind, describe_address, in_notebook
from saelab.explorer.session import Explorer

httpx = pytest.importorskip("httpx")
HOOK = "blocks.1.hook_resid_post"


@pytest.fixture(scope="module")
def sae() -> sl.SAE:
    return sl.SAE(sl.SAEConfig(d_in=32, d_sae=48, activation=sl.AbsTopK(k=3), normalizer="none"), seed=0)


@pytest.fixture(scope="module")
def store(tiny: Any, tiny_tokens: Any, sae: sl.SAE, tmp_path_factory: pytest.TempPathFactory) -> sl.FeatureStore:
    out: Path = tmp_path_factory.mktemp("launch") / "store"
    return sl.harvest(sae, tiny, tiny_tokens[:8], out, hook_point=HOOK, progress=False)


def test_it_serves_until_it_is_closed(tiny: Any, sae: Any, store: Any, capsys: pytest.CaptureFixture[str]) -> None:
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    server = sl.explore(store, tiny, sae, port=0)
    assert {number: signal.getsignal(number) for number in handlers} == handlers
    assert capsys.readouterr().out == f"The explorer is at {server.url}\n"
    assert server.url.startswith("http://127.0.0.1:") and server.is_running
    said = httpx.get(f"{server.url}api/about").json()
    assert said["model_state"] == "ready" and said["store"]["d_sae"] == 48
    wrong = httpx.get(server.url.replace(server.url.split("/")[3], "guess"), headers={"accept": "text/html"})
    assert wrong.status_code == 403 and wrong.text.startswith("This address needs the explorer's token")
    assert "uvicorn" not in str(wrong.headers)
    server.close()
    assert not server.is_running and not [t for t in threading.enumerate() if t.name == "saelab explorer"]
    with pytest.raises(httpx.ConnectError):
        httpx.get(server.url)


def test_two_explorers_have_two_tokens_and_a_frame_shows_one(tiny: Any, sae: Any, store: Any) -> None:
    with sl.explore(store, tiny, sae, port=0, title='"><script>') as one, sl.explore(store, tiny, sae, port=0) as two:
        assert one.url.split("/")[3] != two.url.split("/")[3] and len(one.url.split("/")[3]) == 32
        frame = one._repr_html_()
        assert frame.startswith("<iframe ") and one.url in frame and "<script>" not in frame
        assert repr(one) == f"ExplorerServer({one.url!r})"


def test_in_jupyter_nothing_is_printed(
    tiny: Any, sae: Any, store: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert not in_notebook()
    shell = types.SimpleNamespace(kernel=object())
    monkeypatch.setitem(sys.modules, "IPython", types.SimpleNamespace(get_ipython=lambda: shell))
    assert in_notebook()
    sl.explore(store, tiny, sae, port=0).close()
    assert capsys.readouterr().out == ""


def test_a_browser_opens_only_when_asked_for(tiny: Any, sae: Any, store: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []
    monkeypatch.setattr("webbrowser.open", opened.append)
    sl.explore(store, tiny, sae, port=0).close()
    assert opened == []
    with sl.explore(store, tiny, sae, port=0, browser=True) as server:
        assert opened == [server.url]


def test_a_port_in_use_is_a_sentence_unless_it_was_not_chosen(
    tiny: Any, sae: Any, store: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(ValueError, match=f"`port` must be free, got {port}, which another program uses"):
            sl.explore(store, tiny, sae, port=port)
        monkeypatch.setattr(launch, "PORT", port)
        with sl.explore(store, tiny, sae) as server:
            assert f":{port}/" not in server.url
    with pytest.raises(ValueError, match=r"must be in 0\.\.65535, got 70000"):
        bind("127.0.0.1", 70000)
    with pytest.raises(ValueError, match=r"an address of this machine, got 192\.0\.2\.1:0 "):
        bind("192.0.2.1", 0)
    with pytest.raises(ValueError, match=r"an address of this machine, got 192\.0\.2\.1 \("):
        bind("192.0.2.1", None)


def test_other_machines_are_warned_of(tiny: Any, sae: Any, store: Any) -> None:
    explorer = Explorer.open(store, tiny, sae)
    with ExplorerServer(explorer, "0.0.0.0", 0) as server:
        assert server.is_public and "WARNING" in describe_address(server)
        port = server.url.split(":")[2].split("/")[0]
        assert f"http://{socket.gethostname()}:{port}/" in server.url
        local = server.url.replace(socket.gethostname(), "127.0.0.1")
        assert httpx.get(f"{local}api/model").status_code == 200
    explorer = Explorer.open(store, tiny, sae)
    with ExplorerServer(explorer, port=0) as server:
        assert not server.is_public and "WARNING" not in describe_address(server)


def test_a_reader_who_hangs_up_stops_the_generation(tiny: Any, sae: Any, store: Any, monkeypatch: Any) -> None:
    drawn: list[int] = []
    draw = sl.lm.TokenStream.__next__
    monkeypatch.setattr(sl.lm.TokenStream, "__next__", lambda self: drawn.append(1) or draw(self))
    setup = {"prompt": "a", "features": [{"feature": 1}], "n_tokens": 200}
    with sl.explore(store, tiny, sae, port=0) as server:
        with httpx.stream("POST", f"{server.url}api/steer", json=setup) as answer:
            next(answer.iter_lines())
        again = httpx.post(f"{server.url}api/steer", json=setup | {"n_tokens": 2}, timeout=60)
        assert again.status_code == 200  # the turn is free as soon as it has stopped
    assert len(drawn) < 300  # of 600


def test_what_is_missing_is_a_sentence(tiny: Any, sae: Any, store: Any, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        sl.explore(tmp_path / "nothing", tiny)
    with pytest.raises(FileNotFoundError):
        sl.explore(store, tiny, sae, attribution=tmp_path / "nothing.json", port=0)
    with pytest.raises(ValueError, match="must be the one that was harvested"):
        sl.explore(store, tiny, sl.SAE(sae.cfg, seed=9), port=0)
    with pytest.raises(ValueError, match="got another model"):
        sl.explore(store, sl.lm.tiny_model(seed=3), sae, port=0)


def test_ctrl_c_waits_for_what_is_generated(tiny: Any, sae: Any, store: Any, capfd: pytest.CaptureFixture[str]) -> None:
    setup = {"prompt": "a", "features": [{"feature": 1}], "n_tokens": 200}
    server = sl.explore(store, tiny, sae, port=0)
    lines: list[str] = []

    def read() -> None:
        with httpx.stream("POST", f"{server.url}api/steer", json=setup, timeout=60) as answer:
            for line in answer.iter_lines():
                lines.append(line)
                if len(lines) == 1:
                    signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)

    reader = threading.Thread(target=read)
    reader.start()
    with pytest.raises(KeyboardInterrupt):
        server.wait()
    assert not [thread for thread in threading.enumerate() if thread.name == "saelab explorer"]
    reader.join()
    assert lines and not any('"done"' in line for line in lines)
    assert capfd.readouterr().err == ""


def test_answers_are_sent_at_once() -> None:
    with bind("127.0.0.1", 0) as listening:
        assert listening.proto == socket.IPPROTO_TCP  # what asyncio looks at before it turns Nagle's algorithm off

"""`saelab explore`: it says where it is, ends cleanly on Ctrl-C, and has one sentence for what is wrong."""

import re
import signal
import socket
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from processes import Child

import saelab as sl
from saelab.cli.app import dispatch
from saelab.cli.exploring import name_command
from saelab.explorer.launch import bind

HOOK = "blocks.1.hook_resid_post"


@pytest.fixture(scope="module")
def store(tiny: Any, tiny_tokens: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("exploring")
    sae = sl.SAE(sl.SAEConfig(d_in=32, d_sae=48, activation=sl.AbsTopK(k=3), normalizer="none"), seed=0)
    sae.save_pretrained(folder / "sae")
    sae = sl.SAE.from_pretrained(folder / "sae")
    sl.harvest(sae, tiny, tiny_tokens[:8], folder / "store", hook_point=HOOK, progress=False)
    return folder / "store"


def run_explorer(said: Path, words: list[str]) -> int:
    """The command in a process of its own, whose output goes to a file."""
    import sys

    with said.open("w", buffering=1) as file:
        sys.stdout = file
        return dispatch(words)


def test_it_prints_its_address_and_ends_on_ctrl_c(store: Path, tmp_path: Path) -> None:
    said = tmp_path / "said.txt"
    words = ["explore", str(store), "--model", "tiny", "--port", "0"]
    child = Child(tmp_path / "errors.txt", run_explorer, said, words)
    child.wait_until(lambda: said.exists() and "Ctrl-C" in said.read_text())
    child.wait_until(lambda: "model" in (tmp_path / "errors.txt").read_text())
    [url] = re.findall(r"http://127\.0\.0\.1:\d+/\S+/", said.read_text())
    with urllib.request.urlopen(f"{url}api/model") as answer:
        assert answer.read() == b'{"state": "ready"}'
    child.send(signal.SIGINT)
    code, errors = child.wait()
    assert code == 0 and "Traceback" not in errors
    assert errors.splitlines() == ["The language model is ready.", "The explorer has ended."]
    bind("127.0.0.1", int(url.split(":")[2].split("/")[0])).close()


def test_what_is_wrong_is_one_line(store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = str(other.getsockname()[1])
        few = tmp_path / "few.json"
        truth = np.random.default_rng(0).random((200, 2)) < 0.3
        labels = sl.lm.TokenLabels.of(truth, ["a", "b"], doc_ids=np.arange(200) // 10)
        sl.evaluation.score_concepts(np.eye(200, 7, dtype=np.float32), labels).save(few)
        cases = {
            (str(tmp_path / "nothing"),): "nothing",
            (str(store), "--port", port): f"got {port}, which another program uses",
            (str(store), "--port", "70000"): "0..65535",
            (str(store), "--attribution", str(tmp_path / "none.json")): "none.json",
            (str(store), "--concepts", str(tmp_path / "none.json")): "none.json",
            (str(store), "--concepts", str(few)): "must score the 48 features of the store, got scores of 7",
            (str(store), "--evaluation", str(tmp_path / "none.json")): "none.json",
            (str(store), "--compare", str(tmp_path / "none")): "none",
            (str(store), "--llm", "local"): "`--llm` needs `--label-model`",
            (str(store), "--host", "192.0.2.1"): "an address of this machine",
        }
        for words, reason in cases.items():
            assert dispatch(["explore", *words]) == 2
            said = capsys.readouterr()
            assert reason in said.err and len(said.err.splitlines()) == 1 and "Traceback" not in said.err


def test_the_command_is_written_as_it_is_typed() -> None:
    assert name_command(Path("my demo/store"), "tales") == "saelab explore 'my demo/store' --model tales"
    scores = name_command(Path("store"), "tales", Path("my demo/concepts.json"))
    assert scores == "saelab explore store --model tales --concepts 'my demo/concepts.json'"

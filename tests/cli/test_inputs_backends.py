"""`--backend` of the commands that load a language model besides what they work on."""

import time
from pathlib import Path
from typing import Any

import pytest

import saelab as sl
from saelab.cli import inputs
from saelab.cli.app import dispatch
from saelab.explorer import launch, session
from saelab.lm import models, text_encoders
from saelab.lm.models import describe_model

HOOK = "blocks.1.hook_resid_post"
BACKENDS = ("huggingface", "transformer_lens")


@pytest.fixture(scope="module")
def folders(tiny: Any, tiny_tokens: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store, its SAE, and texts."""
    folder: Path = tmp_path_factory.mktemp("backends")
    sae = sl.SAE(sl.SAEConfig(d_in=32, d_sae=48, activation=sl.AbsTopK(k=3), normalizer="none"), seed=0)
    sae.save_pretrained(folder / "sae")
    sae = sl.SAE.from_pretrained(folder / "sae")
    sl.harvest(sae, tiny, tiny_tokens[:8], folder / "store", hook_point=HOOK, progress=False)
    (folder / "texts.txt").write_text("a cat\nan owl\n")
    return folder


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What ran each model that the command loaded."""
    found: list[str] = []

    def load(*args: Any, **kwargs: Any) -> Any:
        model = models.load_model(*args, **kwargs)
        found.append(describe_model(model).backend)
        return model

    monkeypatch.setattr(inputs, "load_model", load)
    monkeypatch.setattr(text_encoders, "load_model", load)
    return found


def run(*words: object) -> int:
    return dispatch(list(map(str, words)))


@pytest.mark.parametrize("backend", BACKENDS)
def test_report(folders: Path, taken: list[str], tmp_path: Path, backend: str) -> None:
    options = ("--model", "tiny", "--backend", backend, "--no-progress")
    assert run("report", folders / "store", "--out", tmp_path / "page.html", "--features", "3", *options) == 0
    assert taken == [backend]


@pytest.mark.parametrize("backend", BACKENDS)
def test_label(folders: Path, taken: list[str], backend: str) -> None:
    options = ("--lens-model", "tiny", "--backend", backend, "--no-progress")
    assert run("label", folders / "store", "--features", "3", *options) == 0
    assert set(taken) == {backend}


@pytest.mark.parametrize("backend", BACKENDS)
def test_embed(folders: Path, taken: list[str], tmp_path: Path, backend: str) -> None:
    options = ("--hook-point", HOOK, "--pooling", "mean", "--backend", backend, "--device", "cpu", "--no-progress")
    assert run("embed", "tiny", folders / "texts.txt", "--out", tmp_path / "acts", *options) == 0
    assert taken == [backend]
    assert sl.Activations.load(tmp_path / "acts", HOOK).provenance.backend == backend


@pytest.mark.parametrize("backend", BACKENDS)
def test_explore(folders: Path, taken: list[str], backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    explorers: list[session.Explorer] = []

    def wait(server: launch.ExplorerServer) -> None:
        while server.explorer.model_state == "loading":
            time.sleep(0.02)
        explorers.append(server.explorer)
        raise KeyboardInterrupt

    monkeypatch.setattr(launch.ExplorerServer, "wait", wait)
    options = ("--model", "tiny", "--backend", backend, "--device", "cpu", "--port", "0")
    assert run("explore", folders / "store", *options) == 0
    assert taken == [backend] and explorers[0].model_state == "ready"

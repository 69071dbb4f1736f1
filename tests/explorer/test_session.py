"""What one explorer holds: parts that do not belong together are refused, a model loads meanwhile, work is exported."""

import contextlib
import csv
import gc
import io
import itertools
import json
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

import saelab as sl
from saelab.explorer import live_steering, session
from saelab.explorer.feature_pages import describe
from saelab.explorer.live_steering import SteeringSetup, steer_live
from saelab.explorer.session import Explorer, Recent
from saelab.interventions.attribution import attribute
from saelab.interventions.steering_hooks import steer_all
from saelab.labels.label_store import LabelStore
from saelab.lm.models import tiny_model
from tests.explorer.conftest import D_SAE, HOOK


def wait_for_model(explorer: Explorer) -> str:
    for thread in threading.enumerate():
        if thread.name == "saelab_load":
            thread.join()
    return explorer.model_state


def test_parts_of_others_are_refused_in_one_sentence(
    shown_store: Any, shown_sae: Any, tiny: Any, tmp_path: Path
) -> None:
    other = sl.SAE(shown_sae.cfg, seed=1)
    with pytest.raises(ValueError, match="`sae` must be the one that was harvested"):
        Explorer.open(shown_store, sae=other)
    with pytest.raises(ValueError, match="must be used where it was trained, got another model"):
        Explorer.open(shown_store, tiny_model(seed=1), shown_sae)
    with pytest.raises(FileNotFoundError):
        Explorer.open(tmp_path / "nowhere")
    wide = sl.SAE(sl.SAEConfig(d_in=32, d_sae=2 * D_SAE, activation=sl.AbsTopK(k=D_SAE)), seed=0)
    found = attribute(tiny, wide, "The fox", "!", hook_point=HOOK, progress=False)
    with pytest.raises(ValueError, match=f"`attribution` must be of the {D_SAE} features of the store"):
        Explorer.open(shown_store, sae=shown_sae, attribution=found)
    text = sl.tokenize(tiny, ["Something quite different."] * 40, ctx_len=32)
    far = sl.harvest(shown_sae, tiny, text, tmp_path / "far", hook_point=HOOK, progress=False)
    with pytest.raises(ValueError, match="`compare` must be a store of the same text"):
        Explorer.open(shown_store, sae=shown_sae, compare=far)


def test_pages_work_while_the_model_loads(shown_store: Any, shown_sae: Any, tiny: Any) -> None:
    go = threading.Event()

    def load() -> Any:
        go.wait(60)
        return tiny

    explorer = Explorer.open(shown_store, load, shown_sae)
    try:
        assert explorer.model_state == "loading" and not explorer.about()["can"]["prompt"]
        assert "effects" not in describe(explorer, 3)["card"] and explorer.catalog.page()["total"] == D_SAE
        with pytest.raises(ValueError, match="still loading"):
            explorer.require_model()
        go.set()
        assert wait_for_model(explorer) == "ready" and explorer.require_model() == (shown_sae, tiny)
        assert explorer.about()["can"]["steer"] and "effects" in describe(explorer, 3)["card"]
    finally:
        go.set()
        explorer.close()


def test_closing_waits_for_a_model_that_loads_and_takes_none_later(
    shown_store: Any, shown_sae: Any, tiny: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    go = threading.Event()

    def load() -> Any:
        go.wait(60)
        return tiny

    slow = Explorer.open(shown_store, load, shown_sae)
    monkeypatch.setattr(session, "END", 0.1)
    slow.close()
    go.set()
    wait_for_model(slow)
    assert slow.model is None
    monkeypatch.setattr(session, "END", 60)
    go.clear()
    quick = Explorer.open(shown_store, load, shown_sae)
    threading.Timer(0.1, go.set).start()
    quick.close()
    assert not [thread for thread in threading.enumerate() if thread.name == "saelab_load"]


def test_a_model_in_use_elsewhere_feels_nothing_of_the_explorer(
    shown_store: Any, shown_sae: Any, tiny: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(live_steering, "TURN_SECONDS", 60)  # equal turns on a busy machine, too
    ids = torch.arange(65, 81)[None]
    expected = sl.lm.logits(tiny, ids)
    setup = SteeringSetup.from_dict({"prompt": "The owl", "features": [{"feature": 3, "strength": 9.0}], "n_tokens": 4})
    with contextlib.closing(Explorer.open(shown_store, tiny, shown_sae)) as explorer:
        sae, model = explorer.require_model()
        block = setup.interventions(sae, shown_store)
        alone = [*itertools.chain(*steer_live(model, block, setup))]  # how many come at a time is the clock's affair
        edited, tried = threading.Event(), threading.Event()

        def steer() -> None:
            with steer_all(model, block):
                edited.set()
                tried.wait(60)

        thread = threading.Thread(target=steer)
        thread.start()
        edited.wait(60)
        try:
            assert not torch.equal(sl.lm.logits(model, ids), expected)
            assert torch.equal(sl.lm.logits(tiny, ids), expected)
            found = sl.lm.capture(tiny, ids, [HOOK])[HOOK]
        finally:
            tried.set()
            thread.join()
        assert torch.equal(found, sl.lm.capture(tiny, ids, [HOOK])[HOOK])
        with sl.splice(tiny, {HOOK: torch.zeros_like}):  # and a cell's edits are not felt on the page
            assert [*itertools.chain(*steer_live(model, block, setup))] == alone


def test_a_model_that_nobody_else_holds_steers(shown_store: Any, shown_sae: Any) -> None:
    setup = SteeringSetup.from_dict({"prompt": "The owl", "features": [{"feature": 3, "strength": 9.0}], "n_tokens": 4})
    with contextlib.closing(Explorer.open(shown_store, tiny_model(), shown_sae)) as explorer:
        gc.collect()
        sae, model = explorer.require_model()
        assert [*steer_live(model, setup.interventions(sae, shown_store), setup)][-1][-1]["done"]


def test_a_model_that_fails_or_does_not_fit_says_why(shown_store: Any, shown_sae: Any) -> None:
    def fail() -> Any:
        raise OSError("no such\n  model")

    for load, why in ((fail, "failed: no such model"), (lambda: tiny_model(seed=1), "got another model")):
        explorer = Explorer.open(shown_store, load, shown_sae)
        try:
            state = wait_for_model(explorer)
            assert state.startswith("failed: ") and why in state and "\n" not in state
            with pytest.raises(ValueError, match="failed: "):
                explorer.require_model()
            assert explorer.catalog.page()["total"] == D_SAE
        finally:
            explorer.close()


def test_without_its_sae_a_store_is_shown_by_its_codes(harvested: Path, tiny: Any, tmp_path: Path) -> None:
    folder = tmp_path / "moved"
    shutil.copytree(harvested, folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    store = sl.FeatureStore.load(folder)
    store.manifest.sae["name_or_path"] = "/nowhere/sae"
    explorer = Explorer.open(store, tiny)
    try:
        assert manifest["d_sae"] == D_SAE and explorer.sae is None and explorer.model_state == "ready"
        assert describe(explorer, 3)["card"]["near"]["by"] == "correlation" and not explorer.about()["can"]["prompt"]
        with pytest.raises(ValueError, match="needs the SAE"):
            explorer.require_model()
    finally:
        explorer.close()


def test_the_sae_beside_a_store_is_found(shown_store: Any, shown_sae: Any) -> None:
    shown_store.manifest.sae["name_or_path"] = shown_sae.name_or_path
    explorer = Explorer.open(shown_store)
    try:
        assert torch.equal(explorer.sae.W_dec, shown_sae.W_dec)
        assert json.dumps(explorer.about(), allow_nan=False) and explorer.about()["store"]["signed"]
    finally:
        explorer.close()


def test_read_only_keeps_everything_as_it_is(shown_store: Any, shown_sae: Any) -> None:
    explorer = Explorer.open(shown_store, sae=shown_sae, read_only=True)
    try:
        assert not any(explorer.about()["can"].values())
        for change in (
            lambda: explorer.set_label(1, "x"),
            lambda: explorer.choose_label(1, "x"),
            lambda: explorer.delete_label(1, "x"),
            explorer.annotations.undo,
        ):
            with pytest.raises(ValueError, match="only be read"):
                change()
        assert describe(explorer, 1)["labels"] == [] and not explorer.labels.path.exists()
    finally:
        explorer.close()


def test_exports_are_read_back(explorer: Explorer, tmp_path: Path) -> None:
    explorer.set_label(3, "=cmd()")
    explorer.annotations.set_note(3, "seen")
    explorer.annotations.set_list("mine", [3])
    explorer.annotations.set_setup("strong", {"prompt": "x"})
    for form in ("json", "csv", "neuronpedia"):
        name, media, data = explorer.export(form)
        (tmp_path / name).write_bytes(data)
        with LabelStore(tmp_path / f"{form}.sqlite") as labels:
            assert labels.load(tmp_path / name) == 1 and labels[3].text == "=cmd()" and "/" in media
        if form == "json":
            plain = json.loads(data)
            assert plain["notes"] == [{"feature": 3, "text": "seen"}] and plain["setups"][0]["name"] == "strong"
            assert plain["lists"] == [{"name": "mine", "features": [3]}]
        if form == "csv":
            assert not next(csv.DictReader(io.StringIO(data.decode())))["text"].startswith("=")
    with pytest.raises(ValueError, match="`format` must be one of"):
        explorer.export("pickle")


def test_recent_results_are_held_and_old_ones_let_go() -> None:
    recent, made = Recent[int](2), []
    for key in (1, 2, 1, 3, 1, 2):
        assert recent.get(key, lambda key=key: made.append(key) or key * 10) == key * 10
    assert made == [1, 2, 3, 2]
    recent.clear()
    assert recent.find(1) is None

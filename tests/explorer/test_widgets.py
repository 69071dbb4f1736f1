"""Widgets in a kernel alone: questions are answered as the server answers them, and a stream can be stopped."""

import json
import re
import sys
import time
from collections.abc import Callable
from typing import Any

import pytest

import saelab as sl
from saelab.explorer import feature_widget, prompt_widget, steering_widget, widgets
from saelab.explorer.live_steering import SteeringSetup
from saelab.explorer.session import Explorer

HOOK = "blocks.1.hook_resid_post"


@pytest.fixture
def explorer(tiny: Any, tiny_tokens: Any, tmp_path: Any) -> Any:
    sae = sl.SAE(sl.SAEConfig(d_in=32, d_sae=48, activation=sl.AbsTopK(k=3), normalizer="none"), seed=0)
    store = sl.harvest(sae, tiny, tiny_tokens, tmp_path / "store", hook_point=HOOK, progress=False)
    opened = Explorer.open(store, tiny, sae, read_only=True)
    yield opened
    opened.close()


def ask(widget: Any, call: str, until: Callable[[list[Any]], bool], **given: Any) -> list[Any]:
    """The messages that answer one."""
    heard: list[Any] = []
    widget.send = lambda content, buffers=None: heard.append(json.loads(json.dumps(content, allow_nan=False)))
    widget._handle_custom_msg({"id": "1", "call": call, "args": given}, [])
    for _ in range(600):
        if until(heard):
            return heard
        time.sleep(0.05)
    raise AssertionError(heard)


def ended(heard: list[Any]) -> bool:
    return bool(heard) and "event" not in heard[-1]


def test_questions_are_answered_as_the_server_answers_them(explorer: Any) -> None:
    pytest.importorskip("anywidget")
    from saelab.explorer.feature_pages import describe

    j = int(explorer.store.statistics.fires.sum(1).argmax())
    widget = feature_widget(explorer, j)
    assert widget.query == {"feature": j} and widget._esm.startswith("export default (() => {")
    [answer] = ask(widget, "feature", ended, feature=j)
    assert answer["value"]["card"] == describe(explorer, j)["card"]
    [answer] = ask(widget, "features", ended, q="", offset=0, limit=2)
    assert len(answer["value"]["rows"]) == 2
    [answer] = ask(widget, "feature", ended, feature=480)
    assert "480" in answer["error"]
    [answer] = ask(prompt_widget(explorer, explorer.model, "The owl"), "prompt", ended, query={"text": "The owl"})
    assert len(answer["value"]["words"]) == len(answer["value"]["tokens"])
    with pytest.raises(IndexError, match=r"0\.\.47"):
        feature_widget(explorer, 48)


def test_a_stream_ends_with_its_costs_or_when_it_is_stopped(explorer: Any) -> None:
    pytest.importorskip("anywidget")
    setup = {"prompt": "The owl", "features": [{"feature": 3, "strength": 2.0}], "n_tokens": 4}
    widget = steering_widget(explorer, explorer.model)
    *events, last = ask(widget, "steer", ended, setup=setup)
    assert last == {"id": "1", "value": None} and events[-1]["event"]["done"]
    assert {one["event"]["run"] for one in events[:-1]} == {"unsteered", "steered", "random"}
    stopped = ask(widget, "steer", bool, setup=setup | {"n_tokens": 400})
    widget._handle_custom_msg({"id": "1", "call": "stop"}, [])
    for _ in range(600):
        if ended(stopped):
            break
        time.sleep(0.05)
    assert ended(stopped) and not any("done" in one.get("event", {}) for one in stopped)


def test_the_last_answers_are_in_the_state(explorer: Any) -> None:
    pytest.importorskip("anywidget")
    from saelab.explorer.feature_pages import describe

    setup = SteeringSetup.from_dict({"prompt": "The owl", "features": [{"feature": 3, "strength": 2.0}], "n_tokens": 4})
    card, prompt = feature_widget(explorer, 3), prompt_widget(explorer, explorer.model, "The owl")
    assert repr(card) == "ExplorerWidget('feature', {'feature': 3})"
    assert card.held == {"feature": {"args": {"feature": 3}, "value": describe(explorer, 3)}}
    assert len(prompt.held["prompt"]["value"]["words"]) == 8  # BOS and seven bytes
    assert prompt_widget(explorer, explorer.model).held == {}
    assert steering_widget(explorer, explorer.model, setup).held == {}
    panel = steering_widget(explorer, explorer.model, setup, write=True)
    written = panel.held["steer"]
    asked = json.loads(json.dumps(setup.to_dict()))
    assert json.loads(json.dumps(written["args"])) == {"setup": asked} == {"setup": json.loads(panel.query["setup"])}
    *events, _ = ask(panel, "steer", ended, setup=asked)
    assert [one["event"] for one in events] == written["value"]
    stopped = ask(panel, "steer", bool, setup=asked | {"n_tokens": 400})
    panel._handle_custom_msg({"id": "1", "call": "stop"}, [])
    for _ in range(600):
        if ended(stopped):
            break
        time.sleep(0.05)
    assert panel.held["steer"]["args"]["setup"]["n_tokens"] == 4  # not what was cut off
    ask(card, "feature", ended, feature=4)
    assert card.held["feature"]["args"] == {"feature": 4}
    with pytest.raises(ValueError, match="`write` needs a `setup`"):
        steering_widget(explorer, explorer.model, write=True)


def test_the_style_is_the_widgets_own() -> None:
    style = widgets._style()
    assert ":root" not in style and ":host {" in style.replace(":host { ", ":host {")
    assert not re.search(r"(?m)^body[ ,{]", style.replace("body > ", "")) and ".fcard" in style


def test_without_anywidget_there_is_one_sentence(explorer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    widgets._widget_class.cache_clear()
    monkeypatch.setitem(sys.modules, "anywidget", None)
    with pytest.raises(ImportError, match="pip install anywidget"):
        feature_widget(explorer, 3)
    widgets._widget_class.cache_clear()

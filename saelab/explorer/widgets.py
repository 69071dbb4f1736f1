"""Widgets for Jupyter and VS Code: a feature's card, the prompt view and the steering panel, without a server.

They are the explorer's own components; their questions come to the kernel as messages, and the functions that the
server calls answer them.
"""

import json
import re
import threading
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any, TypeAlias

from saelab.explorer import feature_pages
from saelab.explorer.app import describe_error
from saelab.explorer.live_steering import SteeringSetup, steer_live
from saelab.explorer.prompt_features import PromptQuery, describe_prompt
from saelab.explorer.session import Explorer
from saelab.functional.indices import read_feature
from saelab.lm.model_checks import Model
from saelab.sae.sae import SAE
from saelab.stores.feature_store import FeatureStore
from saelab.visualization.html import bundle, read_asset

PACKAGES = ("saelab.explorer", "saelab.visualization")
ExplorerSource: TypeAlias = "Explorer | FeatureStore | str | Path"
"""a feature store, its folder, or an explorer that is open"""


def feature_widget(store: ExplorerSource, feature: int, sae: SAE | str | Path | None = None) -> Any:
    """The card of a feature as a widget: windows expand, and its links show other features.

    Args:
        store: feature store, its folder, or an explorer that is open.
        feature: number of the feature, 0 to d_sae - 1.
        sae: the SAE that was harvested; None takes the one that the store names, if it is there.

    Raises:
        IndexError: the feature does not exist.
        ImportError: anywidget is not installed.
    """
    explorer = _open(store, None, sae)
    if not 0 <= read_feature(feature) < explorer.store.d_sae:
        raise IndexError(f"`feature` must be in 0..{explorer.store.d_sae - 1}, got {feature}.")
    return _make("feature", {"feature": int(feature)}, explorer)


def prompt_widget(store: ExplorerSource, model: Model, text: str = "", sae: SAE | str | Path | None = None) -> Any:
    """The prompt view as a widget: features of every token of a text that is typed, tokens of every feature.

    Args:
        store: feature store, its folder, or an explorer that is open.
        model: language model of the store; an explorer has its own.
        text: prompt to begin with.
        sae: the SAE that was harvested; None takes the one that the store names.

    Raises:
        ValueError: SAE or model are missing, or not those of the store.
        ImportError: anywidget is not installed.
    """
    explorer = _open(store, model, sae)
    explorer.require_model()
    return _make("prompt", {"text": text} if text else {}, explorer)


def steering_widget(
    store: ExplorerSource,
    model: Model,
    setup: SteeringSetup | None = None,
    sae: SAE | str | Path | None = None,
) -> Any:
    """The steering panel as a widget: features are moved, and three texts are written side by side.

    Args:
        store: feature store, its folder, or an explorer that is open.
        model: language model of the store; an explorer has its own.
        setup: features and sampling to begin with; None begins empty.
        sae: the SAE that was harvested; None takes the one that the store names.

    Raises:
        ValueError: SAE or model are missing, or not those of the store.
        ImportError: anywidget is not installed.
    """
    explorer = _open(store, model, sae)
    explorer.require_model()
    return _make("steering", {} if setup is None else {"setup": json.dumps(setup.to_dict())}, explorer)


def _open(store: ExplorerSource, model: Model | None, sae: SAE | str | Path | None) -> Explorer:
    return store if isinstance(store, Explorer) else Explorer.open(store, model, sae, read_only=True)


def _make(view: str, query: Mapping[str, Any], explorer: Explorer) -> Any:
    widget = _widget_class()(view=view, query=dict(query), style=_style())
    calls = _Calls(explorer, widget)
    widget.on_msg(lambda _, content, buffers: calls.take(content))
    return widget


@cache
def _widget_class() -> Any:
    try:
        from anywidget import AnyWidget
    except ImportError:
        raise ImportError("Widgets need anywidget, which is not installed. `pip install 'saelab[widgets]'`.") from None
    from traitlets import Dict, Unicode

    class ExplorerWidget(AnyWidget):
        """A view of the explorer; `query` has what the reader chose."""

        _esm = f"export default {bundle('widget.js', PACKAGES)}"
        view = Unicode().tag(sync=True)
        query = Dict().tag(sync=True)
        style = Unicode().tag(sync=True)

    return ExplorerWidget


@cache
def _style() -> str:
    """The explorer's style for a shadow root, where a notebook's and the widget's do not mix."""
    own = files("saelab.explorer").joinpath("assets", "explorer.css").read_text(encoding="utf-8")
    text = "\n".join([*(read_asset(f"{name}.css") for name in ("page", "card", "components")), own])
    text = re.sub(r":root((?::not\([^)]*\)|\[[^]]*\])+)", r":host(\1)", text).replace(":root", ":host")
    return re.sub(r"(?m)^body \{", ".widget {", text)


class _Calls:
    """Answers to the messages of a widget, each made in a thread, so that a long one can be stopped.

    Args:
        explorer: what is shown.
        widget: answers are sent through it.
    """

    def __init__(self, explorer: Explorer, widget: Any) -> None:
        self.explorer, self.widget = explorer, widget
        self.running: dict[str, threading.Event] = {}

    def take(self, content: Mapping[str, Any]) -> None:
        """Begin to answer a message, or stop the answer to one."""
        number = str(content["id"])
        if content["call"] == "stop":
            if number in self.running:
                self.running[number].set()
            return
        self.running[number] = threading.Event()
        arguments = (number, str(content["call"]), dict(content.get("args", {})))
        threading.Thread(target=self._answer, args=arguments, name="saelab widget", daemon=True).start()

    def _answer(self, number: str, name: str, given: dict[str, Any]) -> None:
        stopped = self.running[number]
        try:
            if name == "steer":
                for events in self._steer(given["setup"], stopped):
                    for event in events:
                        self.widget.send({"id": number, "event": event})
                self.widget.send({"id": number, "value": None})
            else:
                self.widget.send({"id": number, "value": ANSWERS[name](self.explorer, given)})
        except Exception as error:  # a widget has no other way to show it
            self.widget.send({"id": number, "error": describe_error(error)})
        finally:
            del self.running[number]

    def _steer(self, plain: Mapping[str, Any], stopped: threading.Event) -> Iterator[list[dict[str, Any]]]:
        sae, model = self.explorer.require_model()
        setup = SteeringSetup.from_dict(plain)
        moved = setup.interventions(sae, self.explorer.store)
        events = steer_live(model, moved, setup, self.explorer.lock)
        try:
            for several in events:
                if stopped.is_set():
                    return
                yield several
        finally:
            events.close()  # type: ignore[attr-defined]


def _read_prompt(explorer: Explorer, given: Mapping[str, Any]) -> dict[str, Any]:
    sae, model = explorer.require_model()
    with explorer.lock:
        return describe_prompt(sae, model, explorer.store, PromptQuery.from_dict(given["query"]), explorer.names)


ANSWERS: dict[str, Callable[[Any, dict[str, Any]], Any]] = {
    "features": lambda explorer, given: explorer.catalog.page(**given),
    "feature": lambda explorer, given: feature_pages.describe(explorer, **given),
    "expand": lambda explorer, given: feature_pages.expand_window(explorer, **given),
    "examples": lambda explorer, given: feature_pages.list_examples(explorer, **given),
    "prompt": _read_prompt,
}

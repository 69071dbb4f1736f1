"""Widgets for Jupyter and VS Code: a feature's card, the prompt view and the steering panel, without a server.

They are the explorer's own components; their questions come to the kernel as messages, and the functions that the
server calls answer them. The last answers are in the widget's state: a saved notebook shows them without a kernel.
"""

import json
import re
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from functools import cache
from importlib.resources import files
from itertools import chain
from pathlib import Path
from typing import Any, TypeAlias

from saelab.explorer import feature_pages
from saelab.explorer.app import describe_error
from saelab.explorer.live_steering import SteeringSetup, steer_live
from saelab.explorer.prompt_features import PromptQuery, describe_prompt
from saelab.explorer.session import Explorer
from saelab.functional.indices import read_feature
from saelab.lm.huggingface import AnyModel, as_model
from saelab.lm.model_checks import Model
from saelab.sae.sae import SAE
from saelab.stores.feature_store import FeatureStore
from saelab.visualization.html import bundle, read_asset

PACKAGES = ("saelab.explorer", "saelab.visualization")
HELD = ("feature", "prompt", "steer")
"""questions whose last answer is in the widget's state"""
K = 24
"""features of a token that the prompt view asks for, as in prompt_page.js"""
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
    asked = {"feature": int(feature)}
    return _make("feature", asked, explorer, {"feature": asked})


def prompt_widget(store: ExplorerSource, model: AnyModel, text: str = "", sae: SAE | str | Path | None = None) -> Any:
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
    model = as_model(model)
    explorer = _open(store, model, sae)
    explorer.require_model()
    first = {"prompt": {"query": {"text": text, "rank": "activation", "k": K}}}
    return _make("prompt", {"text": text} if text else {}, explorer, first if text else {})


def steering_widget(
    store: ExplorerSource,
    model: AnyModel,
    setup: SteeringSetup | None = None,
    sae: SAE | str | Path | None = None,
    *,
    write: bool = False,
) -> Any:
    """The steering panel as a widget: features are moved, and three texts are written side by side.

    Args:
        store: feature store, its folder, or an explorer that is open.
        model: language model of the store; an explorer has its own.
        setup: features and sampling to begin with; None begins empty.
        sae: the SAE that was harvested; None takes the one that the store names.
        write: write the texts of the set-up now, as its button does, while the cell waits.

    Raises:
        ValueError: SAE or model are missing, or not those of the store; or there is no set-up to write.
        ImportError: anywidget is not installed.
    """
    model = as_model(model)
    if write and setup is None:
        raise ValueError("`write` needs a `setup`, got none. Give features to move and a prompt.")
    explorer = _open(store, model, sae)
    explorer.require_model()
    plain = None if setup is None else setup.to_dict()
    query = {} if plain is None else {"setup": json.dumps(plain)}
    return _make("steering", query, explorer, {"steer": {"setup": plain}} if write else {})


def _open(store: ExplorerSource, model: Model | None, sae: SAE | str | Path | None) -> Explorer:
    return store if isinstance(store, Explorer) else Explorer.open(store, model, sae, read_only=True)


def _make(view: str, query: Mapping[str, Any], explorer: Explorer, first: Mapping[str, dict[str, Any]]) -> Any:
    """A widget; `first` are questions that are answered before it is shown."""
    widget = _widget_class()(view=view, query=dict(query), style=_style())
    calls = _Calls(explorer, widget)
    for name, given in first.items():
        calls.hold(name, given)
    widget.on_msg(lambda _, content, buffers: calls.take(content))
    return widget


@cache
def _widget_class() -> Any:
    try:
        from anywidget import AnyWidget
    except ImportError:
        raise ImportError("Widgets need anywidget, which is not installed. `pip install anywidget`.") from None
    from traitlets import Dict, Unicode

    class ExplorerWidget(AnyWidget):
        """A view of the explorer; `query` has what the reader chose."""

        _esm = f"export default {bundle('widget.js', PACKAGES)}"
        view = Unicode().tag(sync=True)
        query = Dict().tag(sync=True)
        held = Dict().tag(sync=True)
        style = Unicode().tag(sync=True)

        def __repr__(self) -> str:
            return f"ExplorerWidget({self.view!r}, {self.query})"

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

    def hold(self, name: str, given: dict[str, Any]) -> None:
        """Answer a question now, for the widget's state."""
        self._keep(name, given, self._find(name, given, threading.Event(), lambda event: None))

    def _answer(self, number: str, name: str, given: dict[str, Any]) -> None:
        try:
            value = self._find(
                name, given, self.running[number], lambda event: self.widget.send({"id": number, "event": event})
            )
            self.widget.send({"id": number, "value": None if name == "steer" else value})
            if not self.running[number].is_set():
                self._keep(name, given, value)
        except Exception as error:  # a widget has no other way to show it
            self.widget.send({"id": number, "error": describe_error(error)})
        finally:
            del self.running[number]

    def _find(self, name: str, given: dict[str, Any], stopped: threading.Event, tell: Callable[[Any], None]) -> Any:
        """The answer to a question; of steering all events, each of which is told as it comes."""
        if name != "steer":
            return ANSWERS[name](self.explorer, given)
        found = []
        for event in chain.from_iterable(self._steer(given["setup"], stopped)):
            tell(event)
            found.append(event)
        return found

    def _keep(self, name: str, given: dict[str, Any], value: Any) -> None:
        if name in HELD:
            self.widget.held = {**self.widget.held, name: {"args": given, "value": value}}

    def _steer(self, plain: Mapping[str, Any], stopped: threading.Event) -> Iterator[list[dict[str, Any]]]:
        sae, model = self.explorer.require_model()
        setup = SteeringSetup.from_dict(plain)
        moved = setup.interventions(sae, self.explorer.store)
        with closing(steer_live(model, moved, setup, self.explorer.lock)) as events:  # type: ignore[type-var]
            for several in events:
                if stopped.is_set():
                    return
                yield several


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

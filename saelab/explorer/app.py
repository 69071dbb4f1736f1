"""`make_app`: the addresses of the explorer's server, each of which calls one function of the other files here.

Work is done in threads, never on the event loop. Paths are those behind the token, which `Guard` takes off.
"""

import asyncio
import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractAsyncContextManager, nullcontext, suppress
from dataclasses import dataclass, field
from functools import cache, partial
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeAlias

from saelab.explorer import feature_pages
from saelab.explorer.security import LIMITS, ASGIApp, ExplorerLimits, Guard, Receive, Scope, Send, TooBusy, Turn
from saelab.explorer.session import Explorer
from saelab.stores.files import to_json
from saelab.stores.validation import parse_json, require_object
from saelab.visualization.html import bundle

Event: TypeAlias = dict[str, Any]
PAGE = "index.html.j2"
ASSETS = ("saelab.explorer", "saelab.visualization")
"""packages whose folder `assets` is served"""
MEDIA = {
    ".js": "text/javascript",
    ".css": "text/css",
    ".svg": "image/svg+xml",
    ".png": "image/png",
    ".woff2": "font/woff2",
}
"""files that are served, with their types"""
PLOTLY = "plotly.min.js"
SCRIPT = "explorer.js"


@dataclass(frozen=True)
class Call:
    """A request: the parts of its path, its query and the object in its body."""

    path: Mapping[str, Any]
    query: Mapping[str, str]
    body: Mapping[str, Any]

    @property
    def feature(self) -> int:
        """The feature in the path."""
        return int(self.path["feature"])

    @property
    def name(self) -> str:
        """The name in the query, which may hold any character; empty where there is none."""
        return self.query.get("name", "")

    def take(self, name: str, kind: type, default: Any = ...) -> Any:
        """A value of the body; ValueError for another type, or where it is missing and there is no default."""
        value = self.body.get(name, default)
        if value is ... or not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            if value is default and value is not ...:
                return value
            raise ValueError(f"The request must have `{name}`, {NAMES[kind]}, got {str(self.body.get(name))[:40]!r}.")
        return value

    def number(self, name: str, default: int) -> int:
        """A whole number of the query."""
        text = self.query.get(name, str(default))
        try:
            return int(text)
        except ValueError:
            raise ValueError(f"`{name}` must be a whole number, got {text[:40]!r}.") from None


def _make_page(explorer: Explorer, name: str) -> dict[str, Any]:
    from saelab.explorer.pages import make_page  # with all that draws figures, which the first page does not wait for

    return make_page(explorer, name)


def _check_setup(plain: dict[str, Any]) -> dict[str, Any]:
    from saelab.explorer.live_steering import SteeringSetup

    return SteeringSetup.from_dict(plain).to_dict()


NAMES = {str: "a text", int: "a whole number", list: "a list", dict: "an object"}
Work: TypeAlias = Callable[[Explorer, Call], Any]
FEATURES = "/api/features"
"""what the addresses of lists and pages of features begin with, which are made one after another"""

READING: dict[str, Work] = {
    "/api/about": lambda explorer, call: explorer.about(),
    "/api/model": lambda explorer, call: {"state": explorer.model_state},
    "/api/features": lambda explorer, call: explorer.catalog.page(**call.query),
    "/api/features/{feature:int}": lambda explorer, call: feature_pages.describe(explorer, call.feature),
    "/api/features/{feature:int}/window": lambda explorer, call: feature_pages.expand_window(
        explorer, call.feature, call.number("row", -1), call.number("before", 40), call.number("after", 20)
    ),
    "/api/features/{feature:int}/examples": lambda explorer, call: feature_pages.list_examples(
        explorer,
        call.feature,
        call.query.get("group", "top"),
        call.number("side", 1),
        call.number("offset", 0),
        call.number("limit", 20),
    ),
    "/api/pages/{name}": lambda explorer, call: _make_page(explorer, call.path["name"]),
    "/api/lists": lambda explorer, call: explorer.describe_lists(),
    "/api/exports": lambda explorer, call: {"n_unnamed": explorer.count_unnamed()},
    "/api/setups": lambda explorer, call: {"setups": explorer.annotations.setups()},
    "/api/history": lambda explorer, call: {"undo": explorer.annotations.last_change()},
}
CHANGING: dict[tuple[str, str], Work] = {
    ("PUT", "/api/features/{feature:int}/label"): lambda explorer, call: explorer.set_label(
        call.feature, call.take("text", str), call.take("sign", int, 0)
    ),
    ("DELETE", "/api/features/{feature:int}/label"): lambda explorer, call: explorer.delete_label(
        call.feature, call.take("author", str), call.take("sign", int, 0)
    ),
    ("PUT", "/api/features/{feature:int}/choice"): lambda explorer, call: explorer.choose_label(
        call.feature, call.take("author", str, None), call.take("sign", int, 0)
    ),
    ("PUT", "/api/features/{feature:int}/note"): lambda explorer, call: explorer.annotations.set_note(
        call.feature, call.take("text", str)
    ),
    ("PUT", "/api/list"): lambda explorer, call: explorer.annotations.set_list(call.name, call.take("features", list)),
    ("DELETE", "/api/list"): lambda explorer, call: explorer.annotations.delete_list(call.name),
    ("POST", "/api/list/{feature:int}"): lambda explorer, call: explorer.annotations.add_to_list(
        call.name, call.feature
    ),
    ("DELETE", "/api/list/{feature:int}"): lambda explorer, call: explorer.annotations.remove_from_list(
        call.name, call.feature
    ),
    ("PUT", "/api/setup"): lambda explorer, call: explorer.annotations.set_setup(
        call.name, _check_setup(call.take("setup", dict))
    ),
    ("DELETE", "/api/setup"): lambda explorer, call: explorer.annotations.delete_setup(call.name),
    ("POST", "/api/undo"): lambda explorer, call: {"undone": explorer.annotations.undo()},
}


def make_app(
    explorer: Explorer,
    token: str,
    *,
    host: str = "127.0.0.1",
    public: bool = False,
    limits: ExplorerLimits = LIMITS,
) -> ASGIApp:
    """The ASGI application that serves an explorer under `/TOKEN/`.

    Args:
        explorer: what is served.
        token: first segment of every path.
        host: name of this machine that requests come to.
        public: whether other machines may reach it.
        limits: largest requests.
    """
    from starlette.applications import Starlette
    from starlette.exceptions import HTTPException
    from starlette.routing import Route

    model = _ModelRoutes(explorer, limits)
    routes = [Route("/", partial(_show_page, explorer)), Route("/static/{name:path}", _send_file)]
    # Many threads at work in Python would leave a text that is being written no time, and get no more done.
    one = asyncio.Semaphore(1)
    at_once = nullcontext()
    for path, work in READING.items():
        routes.append(Route(path, _answer(explorer, work, one if path.startswith(FEATURES) else at_once)))
    for (method, path), work in CHANGING.items():
        routes.append(Route(path, _answer(explorer, work, at_once), methods=[method]))
    routes += [
        Route("/api/export", partial(_export, explorer)),
        Route("/api/prompt", model.prompt, methods=["POST"]),
        Route("/api/steer", model.steer, methods=["POST"]),
        Route("/api/features/{feature:int}/relabel", model.relabel, methods=["POST"]),
    ]
    faults: dict[Any, Any] = dict.fromkeys((*STATUS, HTTPException, Exception), _explain)
    app: Any = Starlette(routes=routes, exception_handlers=faults)
    app.router.redirect_slashes = False  # it would lead to an address without the token
    return Guard(app, token, host=host, public=public, read_only=explorer.read_only, limits=limits)


STATUS: dict[type[Exception], int] = {
    ValueError: 400, TypeError: 400, KeyError: 404, FileNotFoundError: 404, PermissionError: 403, TimeoutError: 503,
    TooBusy: 503,
}  # fmt: skip


OF_FILES = re.compile(r" Was it edited[^?]*\?")
"""advice that a request does not need"""


async def _explain(_request: Any, error: Exception) -> Any:
    """One sentence for an error, with its status."""
    return _reply({"error": describe_error(error)}, find_status(error))


def find_status(error: Exception) -> int:
    """The HTTP status of an error."""
    own = getattr(error, "status_code", None)
    return own or next((status for kind, status in STATUS.items() if isinstance(error, kind)), 500)


def describe_error(error: Exception) -> str:
    """An error as one sentence for people; of one that was not foreseen the name alone."""
    status = find_status(error)
    if status == 500:
        return f"The explorer failed ({type(error).__name__}). The terminal that it was started in shows where."
    if getattr(error, "status_code", None) in (404, 405):
        return "There is nothing at this address. Go back to the list of features."
    text = error.args[0] if isinstance(error, KeyError) and error.args else error
    return " ".join(OF_FILES.sub("", str(text)).split())


def _reply(value: Any, status: int = 200) -> Any:
    from starlette.responses import Response

    return Response(write_json(value), status, media_type="application/json")


def write_json(value: Any) -> str:
    """A value as JSON in one line, NaN and infinities as null; quickly where there are none.

    >>> write_json({"a": [1.0, float("nan")]})
    '{"a": [1.0, null]}'
    """
    try:
        return json.dumps(value, allow_nan=False)
    except (TypeError, ValueError):  # also what only `to_json` knows how to write
        return to_json(value, indent=None)


def _answer(explorer: Explorer, work: Work, turn: AbstractAsyncContextManager[Any]) -> Callable[[Any], Any]:
    """An endpoint that does its work, and writes its answer as JSON, in a thread, once it has its turn."""
    from starlette.concurrency import run_in_threadpool

    async def endpoint(request: Any) -> Any:
        call = await _read_call(request)

        def answer() -> Any:
            value = work(explorer, call)
            return _reply(value if isinstance(value, dict) else {})  # of a change nothing needs to be told

        async with turn:
            return await run_in_threadpool(answer)

    return endpoint


async def _read_call(request: Any) -> Call:
    body = await request.body()
    plain = require_object(_parse(body), "The request") if body else {}
    return Call(dict(request.path_params), dict(request.query_params), plain)


def _parse(body: bytes) -> Any:
    """The value of a body; ValueError for one that is no JSON, or whose texts cannot be encoded."""
    try:
        found = parse_json(body)
    except ValueError as error:
        raise ValueError(f"A request must hold JSON, got something else ({error}).") from None
    try:
        json.dumps(found, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        half = error.object[error.start]
        raise ValueError(
            f"A request must hold Unicode text, got half of a surrogate pair ({half!a}). Remove it."
        ) from None
    return found


@dataclass(eq=False)
class _ModelRoutes:
    """Endpoints that run the language model, one piece of work at a time."""

    explorer: Explorer
    limits: ExplorerLimits
    reading: Turn = field(init=False)
    writing: Turn = field(init=False)
    labeling: Turn = field(init=False)

    def __post_init__(self) -> None:
        self.reading = Turn("prompt", self.limits.wait)
        self.writing = Turn("generation", self.limits.wait)
        self.labeling = Turn("labelling", self.limits.wait)

    async def prompt(self, request: Any) -> Any:
        """The features of a prompt."""
        from starlette.concurrency import run_in_threadpool

        from saelab.explorer.prompt_features import PromptQuery, describe_prompt

        query = PromptQuery.from_dict((await _read_call(request)).body, self.limits)

        def answer() -> Any:
            sae, model = self.explorer.require_model()
            with self.explorer.lock:
                return _reply(describe_prompt(sae, model, self.explorer.store, query, self.explorer.names))

        async with self.reading.taken():
            return await run_in_threadpool(answer)

    async def steer(self, request: Any) -> Any:
        """A stream of texts without steering, steered and moved at random."""
        from saelab.explorer.live_steering import SteeringSetup, steer_live

        setup = SteeringSetup.from_dict((await _read_call(request)).body, self.limits)

        def start() -> Iterator[list[Event]]:
            sae, model = self.explorer.require_model()
            moved = setup.interventions(sae, self.explorer.store)
            return steer_live(model, moved, setup, self.explorer.lock)

        return EventStream(self.writing, start, self.explorer.closed)

    async def relabel(self, request: Any) -> Any:
        """A stream of the progress of labelling one feature."""
        from saelab.explorer.relabeling import LabelingRequest, relabel

        call = await _read_call(request)
        wanted = LabelingRequest.from_dict(call.feature, call.body)
        return EventStream(self.labeling, lambda: relabel(self.explorer, wanted), self.explorer.closed)


class EventStream:
    """A response of server-sent events, made in a thread; it stops, and closes the iterator, when its reader leaves.

    Args:
        turn: taken while the events are made.
        start: makes the iterator over lists of events; its errors before the first event become an answer of their own.
        closed: ends the stream, once it is set, after the events that are being made.
    """

    def __init__(self, turn: Turn, start: Callable[[], Iterator[list[Event]]], closed: threading.Event) -> None:
        self.turn, self.start, self.closed = turn, start, closed

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events as they come."""
        from starlette.concurrency import run_in_threadpool

        async with self.turn.taken():
            left = asyncio.ensure_future(_wait_until_left(receive))
            events: Iterator[list[Event]] | None = None
            try:
                events = await run_in_threadpool(self.start)
                several = await run_in_threadpool(next, events, None)
                headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"x-accel-buffering", b"no")]
                await send({"type": "http.response.start", "status": 200, "headers": headers})
                while several is not None and not left.done() and not self.closed.is_set():
                    await _send_events(send, several)
                    several = await run_in_threadpool(_next, events)
                await send({"type": "http.response.body", "body": b""})
            finally:
                left.cancel()
                if events is not None:
                    await asyncio.shield(run_in_threadpool(_close, events))


def _next(events: Iterator[list[Event]]) -> list[Event] | None:
    """The next events; an error after the first is an event, too, and None is their end."""
    try:
        return next(events, None)
    except Exception as error:
        return [{"error": describe_error(error)}]


def _close(events: Any) -> None:
    """Close a generator; one that still runs, as the server ends, closes with its turn."""
    with suppress(ValueError):
        events.close()


async def _wait_until_left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _send_events(send: Send, events: list[Event]) -> None:
    body = "".join(f"data: {write_json(event)}\n\n" for event in events)
    await send({"type": "http.response.body", "body": body.encode(), "more_body": True})


async def _export(explorer: Explorer, request: Any) -> Any:
    """All labels, notes, lists and set-ups as a file."""
    from starlette.concurrency import run_in_threadpool
    from starlette.responses import Response

    form = request.query_params.get("format", "json")
    name, media, data = await run_in_threadpool(explorer.export, form)
    return Response(data, media_type=media, headers={"content-disposition": f'attachment; filename="{name}"'})


async def _show_page(explorer: Explorer, _request: Any) -> Any:
    from starlette.concurrency import run_in_threadpool
    from starlette.responses import HTMLResponse

    return HTMLResponse(await run_in_threadpool(lambda: _templates().get_template(PAGE).render(title=explorer.title)))


@cache
def _templates() -> Any:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    return Environment(loader=PackageLoader("saelab.explorer", "assets"), autoescape=True, undefined=StrictUndefined)


async def _send_file(request: Any) -> Any:
    """A file of the packages; there is no address for any other."""
    from starlette.concurrency import run_in_threadpool

    return await run_in_threadpool(_read_file, request.path_params["name"], request.headers.get("if-none-match"))


def _read_file(name: str, known: str | None) -> Any:
    """The answer with a file, or that it is the one that the browser has."""
    from starlette.exceptions import HTTPException
    from starlette.responses import Response

    path = list_assets().get(name)
    if path is None:
        raise HTTPException(404)
    about = path.stat()
    tag = bundle_script()[1] if name == SCRIPT else f'"{about.st_mtime_ns:x}-{about.st_size:x}"'
    if known == tag:
        return Response(status_code=304, headers={"etag": tag})
    data = bundle_script()[0] if name == SCRIPT else path.read_bytes()
    return Response(data, media_type=MEDIA[path.suffix], headers={"etag": tag})


@cache
def bundle_script() -> tuple[bytes, str]:
    """The modules of the page as one script, so that a browser need not ask for one after the other; and its tag."""
    data = bundle(SCRIPT, ASSETS).encode()
    return data, f'"{hashlib.sha256(data).hexdigest()[:16]}"'


@cache
def list_assets() -> dict[str, Path]:
    """Files that are served by their names: those of the page's own folders, and plotly.js as it is installed."""
    found = {}
    for package in ASSETS:
        folder = Path(str(files(package).joinpath("assets")))
        for path in sorted(folder.rglob("*")):
            if path.suffix in MEDIA and path.is_file():
                found[path.relative_to(folder).as_posix()] = path
    plotly = find_spec("plotly")
    if plotly is not None and plotly.origin is not None:
        found[PLOTLY] = Path(plotly.origin).parent / "package_data" / PLOTLY
    return found

"""`upload`: send the features of a store to Neuronpedia through its public interface, with the key of a user.

Its one bulk route takes at most 128 features a request, with density, promoted tokens, examples and explanations, but
no vectors and no scores. It adds examples again when a feature is sent again. So a journal names what was taken, and
after a request whose fate is unknown the server is asked for its last feature before the request is repeated.
"""

import hashlib
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.parse import quote, urlsplit
from urllib.request import HTTPHandler, HTTPRedirectHandler, HTTPSHandler, Request, build_opener

from saelab.functional.indices import FeatureIds, read_features
from saelab.interop.dashboards import Dashboards
from saelab.interop.neuronpedia import DEFAULTS, NeuronpediaSource, Publication, explained_labels
from saelab.labels.label import MARKS
from saelab.lm.huggingface import AnyModel, as_model
from saelab.lm.model_checks import Model
from saelab.sae.sae import SAE
from saelab.stores.feature_store import FeatureStore
from saelab.stores.files import write_atomic
from saelab.stores.jobs import hidden

URL = "https://www.neuronpedia.org"
KEY = "NEURONPEDIA_API_KEY"
"""environment variable that holds the key"""
MOST_FEATURES, MOST_TOKENS, LONGEST_TEXT = 128, 1024, 512
MOST_BYTES = 4_000_000
"""of a request; hosts of its kind refuse more than 4.5 MB"""
N_TRIES, FIRST_WAIT, LONGEST_WAIT, TIMEOUT = 6, 1.0, 120.0, 120.0
LONGEST_REQUEST = 600.0
"""seconds from the first byte of a request to the last of its answer, however they come"""
TEMPORARY = (408, 425, 429, 500, 502, 503, 504)
LONGEST_ANSWER = 16_000_000
"""bytes of an answer; the one that tells of a feature has its examples and its vector"""


@dataclass(frozen=True)
class UploadResult:
    """What was sent, or with `dry_run` what would be."""

    place: str
    """address of the SAE's page"""
    n_features: int
    n_earlier: int
    """features that an earlier run had sent"""
    n_examples: int
    n_explanations: int
    n_requests: int
    n_bytes: int
    dry_run: bool

    def __str__(self) -> str:
        head = "would send" if self.dry_run else "sent"
        return (
            f"{head} {self.n_features:,} features ({self.n_earlier:,} sent earlier), {self.n_examples:,} examples, "
            f"{self.n_explanations:,} explanations in {self.n_requests:,} requests, {self.n_bytes / 1e6:.1f} MB, to "
            f"{self.place}; the interface takes no vectors and no scores"
        )


class _Stay(HTTPRedirectHandler):
    def redirect_request(self, *_: Any) -> None:
        """None: a key is sent to no other host."""


class _Timed:
    """A time limit on a whole request: its connections are shut when it is over, whatever bytes still come."""

    def __init__(self, seconds: float) -> None:
        self.over = False
        self._sockets: list[socket.socket] = []
        self._timer = threading.Timer(seconds, self._end)
        self._timer.daemon = True

    def __enter__(self) -> "_Timed":
        self._timer.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._timer.cancel()

    def _end(self) -> None:
        self.over = True
        for opened in self._sockets:
            with suppress(OSError):
                socket.socket.shutdown(opened, socket.SHUT_RDWR)

    def handlers(self) -> list[Any]:
        """Handlers of urllib whose connections are known here."""
        add = self._sockets.append

        def watch(kind: Any) -> Any:
            class Watched(kind):
                def connect(self) -> None:
                    super().connect()
                    add(self.sock)

            return Watched

        class Http(HTTPHandler):
            def do_open(self, http_class: Any, req: Any, **given: Any) -> Any:
                return super().do_open(watch(http_class), req, **given)

        class Https(HTTPSHandler):
            def do_open(self, http_class: Any, req: Any, **given: Any) -> Any:
                return super().do_open(watch(http_class), req, **given)

        return [Http(), Https()]


@dataclass(frozen=True)
class Server:
    """A Neuronpedia server and the key of a user; the key is in no text and no file."""

    url: str = URL
    key: str = field(default="", repr=False)
    wait: Callable[[float], None] = time.sleep

    def __post_init__(self) -> None:
        parts = urlsplit(self.url)
        local = parts.hostname in ("localhost", "127.0.0.1", "::1")
        if parts.scheme != "https" and not (parts.scheme == "http" and local):
            raise ValueError(f"`url` must begin with https://, or be of this machine, got {parts.scheme}://.")
        if not parts.hostname or parts.query or parts.fragment or "@" in parts.netloc:
            raise ValueError(
                "`url` must be the address of a server, such as https://www.neuronpedia.org, got other parts."
            )

    def ask(self, path: str, body: bytes | None = None) -> Any:
        """The JSON that a route returns; RuntimeError with its own words, OSError where its fate is unknown."""
        headers = {"x-api-key": self.key, "Content-Type": "application/json", "Accept": "application/json"}
        request = Request(f"{self.url.rstrip('/')}/api/{path}", body, headers)
        limit = _Timed(LONGEST_REQUEST)
        try:
            with limit, build_opener(_Stay, *limit.handlers()).open(request, timeout=TIMEOUT) as answer:
                raw = answer.read(LONGEST_ANSWER + 1)
                if len(raw) > LONGEST_ANSWER or answer.length:  # reading no more than so much, it does not see the end
                    raise ValueError(f"an answer of more than {LONGEST_ANSWER / 1e6:.0f} MB, or one that breaks off")
            if limit.over:  # an answer without a length ends where it is cut off
                raise ValueError("cut off")
            return json.loads(raw or b"null")
        except HTTPError as error:
            text = self._read_refusal(error)
            if error.code in TEMPORARY:
                raise Unsure(error.code, text, error.headers.get("Retry-After")) from None
            raise RuntimeError(f"Neuronpedia refused {path}: {error.code} {_reason(text)}") from None
        except (OSError, HTTPException, ValueError, RecursionError) as error:
            why = f"it took more than {LONGEST_REQUEST:.0f} s" if limit.over else str(getattr(error, "reason", error))
            raise Unsure(0, self._hide_key(why)) from None

    def _read_refusal(self, error: HTTPError) -> str:
        """The beginning of what a server says of an error."""
        try:
            with error:
                return self._hide_key(error.read(2000).decode(errors="replace"))
        except (OSError, HTTPException):
            return ""

    def _hide_key(self, text: str) -> str:
        return text.replace(self.key, "(key)") if self.key else text

    def send(self, path: str, body: bytes | None = None, arrived: Callable[[], bool] = lambda: False) -> Any:
        """What a route returns, asked again after failures that pass. Something is posted once for sure: after a
        failure that leaves open whether it arrived, `arrived` is asked first, and if it did None is returned.
        """
        for number in range(N_TRIES):
            try:
                return self.ask(path, body)
            except Unsure as error:
                if error.code not in (429,) and self._try(arrived):
                    return None
                if number == N_TRIES - 1:
                    raise RuntimeError(f"Neuronpedia did not take {path} in {N_TRIES} tries: {error}") from None
                self.wait(error.pause(number))
        raise AssertionError

    def _try(self, arrived: Callable[[], bool]) -> bool:
        try:
            return arrived()
        except OSError:
            return False


class Unsure(OSError):
    """Raised for a failure that may be over soon; whether the request arrived is not known."""

    def __init__(self, code: int, text: str, wait: str | None = None) -> None:
        super().__init__(f"{code or 'no answer'} {_reason(text)}".strip())
        self.code, self._wait = code, wait

    def pause(self, number: int) -> float:
        """Seconds to wait before the next try: what the server asks for, else twice as long each time."""
        asked = float(self._wait) if self._wait and self._wait.isdecimal() else FIRST_WAIT * 2**number
        return min(asked, LONGEST_WAIT)


def _reason(text: str) -> str:
    try:
        said = json.loads(text)
        return str(said.get("error") or said.get("message") or text)[:300]
    except (ValueError, AttributeError, RecursionError):
        return text[:300]


@dataclass
class Journal:
    """The features that a server has taken, as a file of one JSON object that is replaced after each request."""

    path: Path
    target: str
    done: set[int] = field(default_factory=set)

    @classmethod
    def open(cls, path: Path, target: str) -> "Journal":
        """The journal of a target; ValueError where the file is of another target or damaged."""
        if not path.is_file():
            return cls(path, target)
        try:
            data = json.loads(path.read_bytes())
            found, done = str(data["target"]), {int(j) for j in data["done"]}
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} must be the journal of an upload, got something else ({error}).") from None
        if found != target:
            raise ValueError(f"{path} must be the journal of {target}, got that of {found}. Name another file.")
        return cls(path, target, done)

    def add(self, features: list[int]) -> None:
        """Record features as taken."""
        self.done |= {*features}
        write_atomic(self.path, json.dumps({"target": self.target, "done": sorted(self.done)}).encode())


def upload(
    store: FeatureStore,
    *,
    key: str | None = None,
    sae: SAE | None = None,
    model: AnyModel | None = None,
    features: FeatureIds | None = None,
    source_set: str = "saelab",
    about: Publication = DEFAULTS,
    url: str = URL,
    create: bool = False,
    dry_run: bool = False,
    journal: str | Path | None = None,
    progress: bool = True,
) -> UploadResult:
    """Send features with their examples and chosen labels to Neuronpedia; returns what was sent.

    A run that was cut off continues where it stopped. Codes keep their sign, and a label of one sign says so in its
    text. Labels of kind "none" are not sent; vectors and scores are not either, as the interface takes none: use
    `export_store` for these.

    Args:
        store: feature store to send.
        key: key of a Neuronpedia user, from the settings there; None reads NEURONPEDIA_API_KEY. It is never written.
        sae: the SAE of the store.
        model: the language model, for promoted tokens and the number of layers.
        features: numbers of the features; None takes all that fire.
        source_set: Neuronpedia's name of the set of SAEs, which must be the user's own.
        about: `model_id`, `explanation_type` and the first of `urls` are used.
        url: address of the server.
        create: whether to create set and model (needs `model`) where they are missing; they are unlisted.
        dry_run: whether to make and check all requests without sending any.
        journal: file of the features that were taken; None takes one in the store's folder.
        progress: whether to show a progress bar.

    Raises:
        ValueError: there is no key, a feature never fires, or a name is none that Neuronpedia takes.
        RuntimeError: the server refuses a request, with its reason.
    """
    model = model if model is None else as_model(model)
    source = NeuronpediaSource.of(store, source_set, about.model_id)
    source = replace(source, model=source.model.lower())
    server = Server(url, _find_key(key, dry_run))
    target = f"{url.rstrip('/')}/{source.model}/{source.id}"
    fires = store.statistics.fires.sum(1) > 0
    wanted = [*map(int, read_features(fires.nonzero()[0] if features is None else features, store.d_sae))]
    if silent := [j for j in wanted if not fires[j]]:
        raise ValueError(f"`features` must fire in the store, as a feature is sent with examples; {silent[:5]} do not.")
    name = f"upload-{hashlib.sha256(target.encode()).hexdigest()[:12]}.json"
    book = Journal.open(Path(journal) if journal is not None else store.folder / name, target)
    left = [j for j in wanted if j not in book.done]
    counts = {"n_examples": 0, "n_explanations": 0, "n_requests": 0, "n_bytes": 0}
    if left and not dry_run:
        _require_set(server, source, about, model, create)
    for batch, body in _show(
        _make_batches(Dashboards.open(store, sae, model), source, about, left), len(left), progress
    ):
        if not dry_run:
            server.send("feature/upload-batch", body, partial(_is_there, server, source, batch[-1]["index"]))
            book.add([one["index"] for one in batch])
        counts["n_examples"] += sum(len(one["activations"]) for one in batch)
        counts["n_explanations"] += sum(len(one["explanations"]) for one in batch)
        counts["n_requests"] += 1
        counts["n_bytes"] += len(body)
    return UploadResult(target, len(left), len(wanted) - len(left), **counts, dry_run=dry_run)


def _find_key(key: str | None, dry_run: bool) -> str:
    found = key if key is not None else os.environ.get(KEY, "")
    if not found.strip() and not dry_run:
        raise ValueError(f"`key` must be a Neuronpedia key, got none. Set {KEY}, or use `dry_run`.")
    found = found.strip()
    if not (found.isascii() and found.isprintable()):  # the message does not show it
        raise ValueError(f"`key` must be plain letters and signs in one line, got others. Copy it into {KEY} again.")
    return found


def _require_set(
    server: Server, source: NeuronpediaSource, about: Publication, model: "Model | None", create: bool
) -> None:
    """Find the set of the user, or create it, and the model where it is missing."""
    place = f"source-set/{quote(source.model)}/{quote(source.set)}"
    if server.send(place) is not None:
        return
    if not create:
        raise ValueError(
            f"`source_set` must exist for {source.model}, got '{source.set}'. Create it with `create=True`."
        )
    url = {"url": about.urls[0]} if about.urls else {}
    wish = json.dumps({"name": source.set, "modelId": source.model, **url}).encode()

    def is_made() -> bool:
        return server.ask(place) is not None

    try:
        server.send("source-set/new", wish, is_made)
    except RuntimeError as error:
        if "Model not found" not in str(error):
            raise
        if model is None:
            raise ValueError(f"`model` must be given, as Neuronpedia does not know {source.model}.") from None
        named = json.dumps({"id": source.model}).encode()
        wanted = json.dumps({"id": source.model, "layers": int(model.cfg.n_layers), **url}).encode()
        server.send("model/new", wanted, lambda: server.ask("model/get", named) is not None)
        server.send("source-set/new", wish, is_made)


def _is_there(server: Server, source: NeuronpediaSource, feature: int) -> bool:
    try:
        found = server.ask(f"feature/{quote(source.model)}/{quote(source.id)}/{feature}")
    except RuntimeError:  # it says that there is none
        return False
    return isinstance(found, dict) and str(found.get("index")) == str(feature)


def _make_batches(
    boards: Dashboards, source: NeuronpediaSource, about: Publication, features: list[int]
) -> Iterator[tuple[list[dict[str, Any]], bytes]]:
    """The requests: the features of each, and its body, of at most 128 features and 4 MB."""
    texts: dict[int, list[str]] = {}
    for label in explained_labels(boards.store, {*features}):
        texts.setdefault(label.feature, []).append(MARKS[label.sign] + label.text)
    head = {"modelId": source.model, "source": source.id}
    batch: list[dict[str, Any]] = []
    size = 0
    for board in boards.make(features):
        one = _describe(board, texts.get(board["feature_index"], []), about.explanation_type)
        n_bytes = len(json.dumps(one))
        if batch and (len(batch) == MOST_FEATURES or size + n_bytes > MOST_BYTES):
            yield batch, json.dumps({**head, "features": batch}).encode()
            batch, size = [], 0
        batch, size = [*batch, one], size + n_bytes
    if batch:
        yield batch, json.dumps({**head, "features": batch}).encode()


def _describe(board: dict[str, Any], texts: list[str], method: str | None) -> dict[str, Any]:
    """A feature as the route takes it: no empty token, no text of more than 512 characters."""
    named = {"methodName": method} if method else {}
    return {
        "index": board["feature_index"],
        "density": board["frac_nonzero"],
        "topLogits": _pair(board["pos_str"], board["pos_values"]),
        "bottomLogits": _pair(board["neg_str"], board["neg_values"]),
        "explanations": [{"text": _storable(text)[:LONGEST_TEXT], **named} for text in texts],
        "activations": [_shorten(window) for window in board["activations"]],
    }


def _pair(texts: list[str], values: list[float]) -> list[dict[str, Any]]:
    return [{"token": _storable(text), "value": value} for text, value in zip(texts, values, strict=True)]


def _storable(text: str) -> str:
    """Text that a PostgreSQL database takes and that is not empty."""
    return text.replace("\0", "\ufffd") or "\ufffd"


def _shorten(window: dict[str, Any]) -> dict[str, Any]:
    """A window of at most 1024 tokens around its center; the top examples belong to no interval."""
    start = max(0, min(window["qualifying_token_index"] - MOST_TOKENS // 2, len(window["tokens"]) - MOST_TOKENS))
    kept = slice(start, start + MOST_TOKENS)
    names = {"quantileMin": "bin_min", "quantileMax": "bin_max", "quantileFraction": "bin_contains"}
    bounds = {} if window["bin_contains"] < 0 else {name: window[own] for name, own in names.items()}
    return {"tokens": [_storable(text) for text in window["tokens"][kept]], "values": window["values"][kept], **bounds}


def _show(
    batches: Iterator[tuple[list[dict[str, Any]], bytes]], n: int, progress: bool
) -> Iterator[tuple[list[dict[str, Any]], bytes]]:
    from tqdm.auto import tqdm

    with tqdm(total=n, unit=" features", disable=hidden(progress)) as bar:
        for batch, body in batches:
            yield batch, body
            bar.update(len(batch))

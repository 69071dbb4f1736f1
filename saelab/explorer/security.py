"""What protects the explorer's server: a middleware that checks every request, and limits on the work it may cause.

A request must come to a loopback name (or the host that was given), begin with the token, and not be sent by another
site's page. Answers forbid scripts, frames and forms of others.
"""

import asyncio
import ipaddress
import json
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, MutableMapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias
from urllib.parse import urlsplit

Scope: TypeAlias = MutableMapping[str, Any]
Receive: TypeAlias = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send: TypeAlias = Callable[[MutableMapping[str, Any]], Awaitable[None]]
ASGIApp: TypeAlias = Callable[[Scope, Receive, Send], Awaitable[None]]

LOOPBACK = frozenset({"127.0.0.1", "localhost", "::1"})
FRAMES = "'self' http://localhost:* http://127.0.0.1:* https://localhost:* https://127.0.0.1:*"
"""pages that may embed the explorer: Jupyter's, on this machine"""
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data:; "
    "connect-src 'self'; font-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors " + FRAMES
)
HEADERS = (
    (b"content-security-policy", POLICY.encode()),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-resource-policy", b"same-origin"),
)
READING = ("GET", "HEAD")
ASKING = ("/api/prompt", "/api/steer")
"""paths whose POST requests change nothing"""


@dataclass(frozen=True, kw_only=True)
class ExplorerLimits:
    """Largest requests that the explorer answers, and how long a request waits for the model."""

    body: int = 64 * 1024
    """bytes of a request's body"""
    prompt: int = 20_000
    """characters of a prompt"""
    n_tokens: int = 512
    """tokens that are generated at once"""
    n_features: int = 64
    """features that are steered together"""
    n_rows: int = 500
    """rows of the feature list, or examples, in one answer"""
    wait: float = 30.0
    """seconds that a request waits while another one uses the model"""


LIMITS = ExplorerLimits()


class TooBusy(Exception):
    """Raised where a request waited too long for another one to end."""


class Turn:
    """One piece of work at a time; others wait, and are refused with `TooBusy` when they waited too long."""

    def __init__(self, what: str, wait: float) -> None:
        self.what, self.wait = what, wait
        self._free = asyncio.Semaphore(1)

    @asynccontextmanager
    async def taken(self) -> AsyncIterator[None]:
        """Context manager that waits until the work before has ended."""
        try:
            await asyncio.wait_for(self._free.acquire(), self.wait)
        except asyncio.TimeoutError:
            raise TooBusy(
                f"Only one {self.what} runs at a time, and another one has not ended within {self.wait:g} s. Try again "
                "when it has, or stop it."
            ) from None
        try:
            yield
        finally:
            self._free.release()


class _Refusal(Exception):
    """A request that is not answered, with HTTP status and sentence."""

    def __init__(self, status: int, said: str) -> None:
        super().__init__(said)
        self.status, self.said = status, said


class Guard:
    """ASGI middleware: every request is checked, and every answer gets the headers that protect its page.

    Args:
        app: application that gets the checked requests, their paths without the token.
        token: first segment of the path of every request.
        host: name of this machine under which requests are answered, besides those of loopback.
        public: whether other machines may reach the server; then requests to an address in numbers are answered, too.
        read_only: refuse every request that would change something.
        limits: largest body.
    """

    def __init__(
        self,
        app: ASGIApp,
        token: str,
        *,
        host: str = "127.0.0.1",
        public: bool = False,
        read_only: bool = False,
        limits: ExplorerLimits = LIMITS,
    ) -> None:
        self.app, self.token = app, token.encode()
        self.hosts, self.public = LOOPBACK | {host.lower()}, public
        self.read_only, self.limits = read_only, limits

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, or refuse it with one sentence."""
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1008})
            return
        try:
            path = self._check(scope)
            given = receive if scope["method"] in READING else await self._read_body(scope, receive)
        except _Refusal as refusal:
            await _answer(scope, protect(send, scope.get("path", "")), refusal)
            return
        inner = {**scope, "path": path, "raw_path": path.encode(), "root_path": ""}
        await self.app(inner, given, protect(send, path))

    def _check(self, scope: Scope) -> str:
        """The path behind the token; `_Refusal` for a request that may not be answered."""
        host = _only(scope, b"host")
        if not self._is_own(host):
            raise _Refusal(
                403, "The explorer answers under 127.0.0.1, localhost or the host that it was started with, no other."
            )
        origin = _only(scope, b"origin")
        if origin is not None and urlsplit(origin).netloc.lower() != (host or "").lower():
            raise _Refusal(403, "The explorer answers to its own pages alone, and this request came from another site.")
        if _only(scope, b"sec-fetch-site") == "cross-site" and _only(scope, b"sec-fetch-mode") != "navigate":
            raise _Refusal(403, "The explorer answers to its own pages alone, and this request came from another site.")
        token, slash, rest = scope["path"].removeprefix("/").partition("/")
        if not slash or not secrets.compare_digest(token.encode("utf-8", "replace"), self.token):
            raise _Refusal(
                403,
                "This address needs the explorer's token: open the whole address that was printed when it was started, "
                "with the slash at its end.",
            )
        path = "/" + rest
        if self.read_only and scope["method"] not in READING and path not in ASKING:
            raise _Refusal(403, "This explorer was started with --read-only: nothing can be changed in it.")
        return path

    def _is_own(self, host: str | None) -> bool:
        name = _name_of(host or "")
        # Anybody can make a name point to this machine, but not a number.
        return name in self.hosts or (self.public and _is_address(name))

    async def _read_body(self, scope: Scope, receive: Receive) -> Receive:
        """What gives the whole body at once; `_Refusal` where it is too long."""
        too_long = _Refusal(413, f"A request may hold at most {self.limits.body:,} bytes. Shorten its text.")
        length = _only(scope, b"content-length")
        if length is not None and (not length.isdigit() or int(length) > self.limits.body):
            raise too_long
        body, more = b"", True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                break
            body += message.get("body", b"")
            more = message.get("more_body", False)
            if len(body) > self.limits.body:
                raise too_long
        waiting = [{"type": "http.request", "body": body, "more_body": False}]

        async def give() -> MutableMapping[str, Any]:
            return waiting.pop() if waiting else await receive()

        return give


def _only(scope: Scope, name: bytes) -> str | None:
    """The header's value, or None; `_Refusal` for one that is sent twice."""
    values = [value.decode("latin-1") for key, value in scope["headers"] if key.lower() == name]
    if len(values) > 1:
        raise _Refusal(400, f"A request must have one header {name.decode()}, got {len(values)}.")
    return values[0] if values else None


def _name_of(host: str) -> str:
    """The name in a Host header, without port and brackets; empty for none."""
    try:
        parts = urlsplit(f"//{host}")
        _ = parts.port  # ValueError for one that is no number
        return "" if parts.path or parts.query or "@" in host else (parts.hostname or "")
    except ValueError:
        return ""


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def protect(send: Send, path: str) -> Send:
    """`send` with the headers that protect a page; answers are kept by no cache, static files only if they are asked
    for again.
    """
    cache = b"no-cache" if path.startswith("/static/") else b"no-store"

    async def guarded(message: MutableMapping[str, Any]) -> None:
        if message["type"] == "http.response.start":
            ours = dict(HEADERS) | {b"cache-control": cache}
            kept = [(key, value) for key, value in message.get("headers", ()) if key.lower() not in ours]
            message = {**message, "headers": [*kept, *ours.items()]}
        await send(message)

    return guarded


async def _answer(scope: Scope, send: Send, refusal: _Refusal) -> None:
    """Send a refusal: as plain text to a browser that opens a page, as JSON to a script."""
    asks_for_page = any(key == b"accept" and b"text/html" in value for key, value in scope["headers"])
    text = refusal.said if asks_for_page else json.dumps({"error": refusal.said})
    kind = b"text/plain; charset=utf-8" if asks_for_page else b"application/json"
    body = text.encode()
    headers = [(b"content-type", kind), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": refusal.status, "headers": headers})
    await send({"type": "http.response.body", "body": b"" if scope["method"] == "HEAD" else body})


def make_token() -> str:
    """A new random token of 192 bits, for an address.

    >>> len(make_token())
    32
    """
    return secrets.token_urlsafe(24)


def is_loopback(host: str, known: Collection[str] = LOOPBACK) -> bool:
    """Whether an address to bind to can be reached from this machine alone.

    >>> is_loopback("127.0.0.1"), is_loopback("0.0.0.0")
    (True, False)
    """
    return host in known or (_is_address(host) and ipaddress.ip_address(host).is_loopback)

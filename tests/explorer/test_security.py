"""The guard before the explorer's server: each rule broken once, and what every answer carries."""

import asyncio
from typing import Any

import pytest

from saelab.explorer.security import ExplorerLimits, Guard, TooBusy, Turn, is_loopback

httpx = pytest.importorskip("httpx")
TOKEN = "secret-token"
LIMITS = ExplorerLimits(body=1000)


async def echo(scope: Any, receive: Any, send: Any) -> None:
    """An application that answers with the path and the length of the body."""
    message = await receive()
    text = f"{scope['path']} {len(message.get('body', b''))}".encode()
    headers = [(b"content-type", b"text/plain"), (b"Cache-Control", b"public"), (b"content-security-policy", b"none")]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": text})


def ask(
    path: str = f"/{TOKEN}/",
    method: str = "GET",
    guard: Any = None,
    base: str = "http://127.0.0.1:8765",
    **options: Any,
) -> Any:
    async def send() -> Any:
        transport = httpx.ASGITransport(app=guard or Guard(echo, TOKEN, limits=LIMITS))
        async with httpx.AsyncClient(transport=transport, base_url=base) as client:
            return await client.request(method, path, **options)

    return asyncio.run(send())


def test_a_request_with_the_token_is_answered_and_the_token_taken_off() -> None:
    answer = ask(f"/{TOKEN}/api/about?x=1")
    assert answer.status_code == 200 and answer.text == "/api/about 0"
    assert ask(f"/{TOKEN}/api/prompt", "POST", content=b"x" * 1000).text == "/api/prompt 1000"


@pytest.mark.parametrize(
    "path", ["/", "/api/about", f"/{TOKEN}x/", f"/{TOKEN[:-1]}/", f"/{TOKEN}", f"//{TOKEN}/", "/é/"]
)
def test_without_the_token_nothing_is_answered(path: str) -> None:
    answer = ask(path)
    assert answer.status_code == 403 and "token" in answer.json()["error"] and answer.json()["error"].count(". ") == 0
    page = ask(path, headers={"accept": "text/html,*/*"})
    assert page.status_code == 403 and page.headers["content-type"].startswith("text/plain")
    assert page.text == answer.json()["error"]


@pytest.mark.parametrize(
    "host",
    [
        "evil.example",
        "evil.example:8765",
        "127.0.0.1.evil.example",
        "localhost.",
        "192.168.1.7:8765",
        "",
        "a@localhost",
        "localhost:x",
    ],
)
def test_another_host_is_refused(host: str) -> None:
    """A name that points to this machine (DNS rebinding) is not one of ours."""
    answer = ask(headers={"host": host})
    assert answer.status_code == 403 and "127.0.0.1" in answer.json()["error"]


@pytest.mark.parametrize("host", ["127.0.0.1:8765", "localhost:9000", "LOCALHOST", "[::1]:8765"])
def test_names_of_this_machine_are_answered(host: str) -> None:
    assert ask(headers={"host": host}).status_code == 200


def test_a_host_that_was_given_is_answered_and_in_public_any_number() -> None:
    given = Guard(echo, TOKEN, host="Lab.example", public=True)
    for host, status in {"lab.example:80": 200, "192.168.1.7:8765": 200, "evil.example": 403}.items():
        assert ask(guard=given, headers={"host": host}).status_code == status


@pytest.mark.parametrize(
    "headers",
    [
        {"origin": "http://evil.example"},
        {"origin": "http://127.0.0.1:9999"},
        {"origin": "null"},
        {"sec-fetch-site": "cross-site", "sec-fetch-mode": "no-cors"},
    ],
)
def test_another_site_is_refused(headers: dict[str, str]) -> None:
    answer = ask(f"/{TOKEN}/api/steer", "POST", headers=headers, content=b"{}")
    assert answer.status_code == 403 and "another site" in answer.json()["error"]
    assert "access-control-allow-origin" not in answer.headers


def test_our_own_page_and_a_link_from_elsewhere_are_answered() -> None:
    assert ask(headers={"origin": "http://127.0.0.1:8765", "sec-fetch-site": "same-origin"}).status_code == 200
    assert ask(headers={"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate"}).status_code == 200


def test_a_preflight_is_not_answered_for_others() -> None:
    asked = {"origin": "http://evil.example", "access-control-request-method": "POST"}
    answer = ask(method="OPTIONS", headers=asked)
    assert answer.status_code == 403 and not [name for name in answer.headers if name.startswith("access-control")]


@pytest.mark.parametrize("name", ["host", "origin"])
def test_a_header_that_is_sent_twice_is_refused(name: str) -> None:
    twice = [("host", "127.0.0.1:8765"), ("origin", "http://127.0.0.1:8765"), (name, "evil.example")]
    assert ask(headers=twice).status_code == 400


def test_a_long_body_is_refused_whether_its_length_is_told_or_not() -> None:
    async def drip() -> Any:
        for _ in range(30):
            yield b"x" * 50

    for content in (b"x" * 1001, drip()):
        answer = ask(f"/{TOKEN}/api/prompt", "POST", content=content)
        assert answer.status_code == 413 and "1,000 bytes" in answer.json()["error"]


@pytest.mark.parametrize("path", [f"/{TOKEN}/", f"/{TOKEN}/static/a.js", "/wrong/", f"/{TOKEN}/api/about"])
def test_every_answer_carries_the_policy_once(path: str) -> None:
    answer = ask(path)
    found = dict(part.strip().split(" ", 1) for part in answer.headers["content-security-policy"].split(";"))
    assert answer.headers.get_list("content-security-policy") == [answer.headers["content-security-policy"]]
    assert found["default-src"] == found["base-uri"] == found["form-action"] == "'none'"
    assert found["script-src"] == found["connect-src"] == "'self'"
    assert all("*" not in host.split(":")[1] for host in found["frame-ancestors"].split()[1:])
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["referrer-policy"] == "no-referrer"
    assert answer.headers["cross-origin-resource-policy"] == "same-origin"
    assert answer.headers["cache-control"] == ("no-cache" if "static" in path else "no-store")


def test_read_only_refuses_changes_and_answers_questions() -> None:
    guard = Guard(echo, TOKEN, read_only=True)
    for method, path in [
        ("PUT", "features/1/label"),
        ("DELETE", "list?name=a"),
        ("POST", "undo"),
        ("POST", "features/1/relabel"),
    ]:
        answer = ask(f"/{TOKEN}/api/{path}", method, guard=guard, content=b"{}")
        assert answer.status_code == 403 and "--read-only" in answer.json()["error"]
    for method, path in [("GET", "features"), ("POST", "prompt"), ("POST", "steer")]:
        assert ask(f"/{TOKEN}/api/{path}", method, guard=guard, content=b"{}").status_code == 200


def test_a_web_socket_is_closed() -> None:
    sent: list[Any] = []

    async def run() -> None:
        async def send(message: Any) -> None:
            sent.append(message)

        await Guard(echo, TOKEN)({"type": "websocket", "path": f"/{TOKEN}/", "headers": []}, None, send)  # type: ignore[arg-type]

    asyncio.run(run())
    assert [message["type"] for message in sent] == ["websocket.close"]


def test_one_piece_of_work_runs_at_a_time_and_others_do_not_wait_for_ever() -> None:
    async def run() -> list[str]:
        turn, seen = Turn("generation", 0.05), []

        async def work(name: str, event: asyncio.Event) -> None:
            async with turn.taken():
                seen.append(name)
                await event.wait()

        event = asyncio.Event()
        first = asyncio.ensure_future(work("first", event))
        await asyncio.sleep(0)
        with pytest.raises(TooBusy, match="Only one generation runs at a time"):
            await work("second", event)
        event.set()
        await first
        await work("third", event)
        return seen

    assert asyncio.run(run()) == ["first", "third"]


def test_loopback_is_told_from_other_addresses() -> None:
    assert all(map(is_loopback, ("127.0.0.1", "127.5.0.1", "localhost", "::1")))
    assert not any(map(is_loopback, ("0.0.0.0", "::", "10.0.0.2", "lab.example", "")))

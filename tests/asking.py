"""`Client`: asks the explorer's application without a network, as a browser or a reader who leaves would."""

import asyncio
import json
from typing import Any

import httpx

TOKEN = "secret"


class Client:
    """Asks an application, each request in an event loop of its own."""

    def __init__(self, app: Any) -> None:
        self.app = app

    def __call__(self, method: str, path: str, **options: Any) -> Any:
        return asyncio.run(self.ask(method, path, **options))

    async def ask(self, method: str, path: str, **options: Any) -> Any:
        transport = httpx.ASGITransport(app=self.app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1:8765") as client:
            return await client.request(method, f"/{TOKEN}/{path}", **options)

    def events(self, path: str, body: Any) -> list[dict[str, Any]]:
        answer = self("POST", path, json=body)
        assert answer.status_code == 200 and answer.headers["content-type"].startswith("text/event-stream")
        return [json.loads(line.removeprefix("data: ")) for line in answer.text.split("\n\n") if line]

    def leave(self, path: str, body: Any, after: int) -> int:
        """Number of messages that were sent to a reader who leaves after some of them."""

        async def run() -> int:
            sent: list[Any] = []
            left = asyncio.Event()
            asked = [{"type": "http.request", "body": json.dumps(body).encode(), "more_body": False}]

            async def receive() -> Any:
                if asked:
                    return asked.pop()
                await left.wait()
                return {"type": "http.disconnect"}

            async def send(message: Any) -> None:
                sent.append(message)
                if len(sent) >= after:
                    left.set()
                await asyncio.sleep(0)

            headers = [(b"host", b"127.0.0.1:8765"), (b"content-type", b"application/json")]
            scope = {"type": "http", "method": "POST", "path": f"/{TOKEN}/{path}", "headers": headers}
            scope |= {"query_string": b"", "http_version": "1.1", "scheme": "http", "server": ("127.0.0.1", 8765)}
            await asyncio.wait_for(self.app(scope, receive, send), 60)
            return len(sent)

        return asyncio.run(run())

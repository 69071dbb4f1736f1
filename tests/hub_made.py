"""A server that answers Hugging Face's own client as the Hub does, with its repositories in memory."""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest


@dataclass
class Hub:
    """Commits of the branches of repositories, objects by their hash, and what was asked."""

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    """files of each commit, by its hash"""
    branches: dict[tuple[str, str], str] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)
    objects: dict[str, bytes] = field(default_factory=dict)
    log: list[str] = field(default_factory=list)
    served: dict[str, int] = field(default_factory=dict)
    """bytes of each file that were sent"""
    sent: list[str] = field(default_factory=list)
    """objects that were uploaded"""
    tokens: set[str | None] = field(default_factory=set)
    private: dict[str, bool] = field(default_factory=dict)
    break_after: int | None = None
    """objects that are taken before the server fails"""
    spoil: bool = False
    """whether the next part that is served is damaged"""

    def files(self, repo: str, revision: str = "main") -> dict[str, bytes]:
        """The files of a branch."""
        return self.commits[self.branches[repo, revision]]

    def commit(self, repo: str, revision: str, files: dict[str, bytes], message: str) -> str:
        """A new commit of a branch."""
        name = hashlib.sha1(f"{repo}{revision}{len(self.messages)}".encode()).hexdigest()
        self.commits[name], self.branches[repo, revision] = files, name
        self.messages.append(message)
        return name


def is_large(path: str) -> bool:
    return path.endswith((".safetensors", ".gz"))


class Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    @property
    def host(self) -> str:
        return f"http://{self.headers['Host']}"

    def reply(self, data: Any, code: int = 200, **headers: str) -> None:
        raw = data if isinstance(data, bytes) else json.dumps(data).encode()
        self.send_response(code)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        if "Content_Length" not in headers:
            self.send_header("Content-Length", str(len(raw)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(raw)

    def refuse(self, code: int, error: str) -> None:
        self.reply({"error": error}, code, X_Error_Code=error, X_Error_Message=error)

    def handle_one(self) -> None:
        hub, path = self.hub, unquote(urlsplit(self.path).path)
        hub.log.append(f"{self.command} {path}")
        hub.tokens.add((self.headers.get("Authorization") or "").removeprefix("Bearer ") or None)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Transfer-Encoding") == "chunked":
            body = b""
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        routes = {
            r"/api/repos/create": self.create,
            r"/api/(?:models|datasets)/(\w+/\w+)/branch/(.+)": self.branch,
            r"/api/(?:models|datasets)/(\w+/\w+)/preupload/(.+)": self.preupload,
            r"/api/(?:models|datasets)/(\w+/\w+)/commit/(.+)": self.take,
            r"/api/(?:models|datasets)/(\w+/\w+)/tree/([^/]+)/?(.*)": self.tree,
            r"/api/(?:models|datasets)/(\w+/\w+)/paths-info/(.+)": self.info,
            r"/api/(?:models|datasets)/(\w+/\w+)(?:/revision/(.+))?": self.about,
            r"(?:/datasets)?/(\w+/\w+)\.git/info/lfs/objects/batch": self.batch,
            r"/api/validate-yaml": lambda body: self.reply({"errors": [], "warnings": []}),
            r"/objects/(\w+)": self.store,
            r"(?:/datasets)?/(\w+/\w+)/resolve/([^/]+)/(.+)": self.resolve,
        }
        for pattern, route in routes.items():
            if found := re.fullmatch(pattern, path):
                route(body, *found.groups())
                return
        self.refuse(404, f"no route {path}")

    do_GET = do_POST = do_PUT = do_HEAD = handle_one

    def files(self, repo: str, revision: str | None) -> dict[str, bytes] | None:
        """Files of a revision; None, after an answer that says why, where there is none."""
        revision = revision or "main"
        if not any(name == repo for name, _ in self.hub.branches):
            self.refuse(404, "RepoNotFound")
        elif (found := self.hub.commits.get(self.hub.branches.get((repo, revision), revision))) is not None:
            return found
        else:
            self.refuse(404, "RevisionNotFound")
        return None

    def create(self, body: bytes) -> None:
        given = json.loads(body)
        repo = f"{given['organization']}/{given['name']}" if given.get("organization") else given["name"]
        if (repo, "main") in self.hub.branches:
            self.reply({"error": "You already created this", "url": f"{self.host}/datasets/{repo}"}, 409)
            return
        kind = "datasets/" if given.get("type") == "dataset" else ""
        self.hub.private[repo] = given.get("private") or given.get("visibility") == "private"
        self.hub.commit(repo, "main", {}, "initial commit")
        self.reply({"url": f"{self.host}/{kind}{repo}", "name": repo, "id": repo})

    def branch(self, body: bytes, repo: str, branch: str) -> None:
        if (repo, branch) in self.hub.branches:
            self.reply({"error": "Reference already exists"}, 409)
            return
        self.hub.branches[repo, branch] = self.hub.branches[repo, "main"]
        self.reply({}, 201)

    def preupload(self, body: bytes, repo: str, revision: str) -> None:
        listed = [file["path"] for file in json.loads(body)["files"]]
        modes = [{"path": path, "uploadMode": "lfs" if is_large(path) else "regular"} for path in listed]
        self.reply({"files": [mode | {"shouldIgnore": False, "oid": None} for mode in modes]})

    def batch(self, body: bytes, repo: str) -> None:
        asked = json.loads(body)["objects"]
        made = []
        for one in asked:
            actions = (
                {} if one["oid"] in self.hub.objects else {"upload": {"href": f"{self.host}/objects/{one['oid']}"}}
            )
            made.append({"oid": one["oid"], "size": one["size"], **({"actions": actions} if actions else {})})
        self.reply({"transfer": "basic", "objects": made})

    def store(self, body: bytes, oid: str) -> None:
        if self.hub.break_after == len(self.hub.sent):
            self.refuse(400, "the connection is lost")
            return
        assert hashlib.sha256(body).hexdigest() == oid
        self.hub.objects[oid] = body
        self.hub.sent.append(oid)
        self.reply({})

    def take(self, body: bytes, repo: str, revision: str) -> None:
        head, *lines = (json.loads(line) for line in body.splitlines())
        files = dict(self.hub.files(repo, revision))
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.hub.objects[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        made: dict[str, Any] = {}
        if "create_pr=1" in self.path:
            revision = "refs/pr/1"
            made = {"pullRequestUrl": f"{self.host}/datasets/{repo}/discussions/1"}
        name = self.hub.commit(repo, revision, files, head["value"]["summary"])
        self.reply({"commitUrl": f"{self.host}/datasets/{repo}/commit/{name}", "commitOid": name, **made})

    def describe(self, path: str, data: bytes) -> dict[str, Any]:
        blob = hashlib.sha1(data).hexdigest()
        lfs = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 1}
        large = {"lfs": lfs} if is_large(path) else {}
        return {"type": "file", "path": path, "size": len(data), "oid": blob, **large}

    def tree(self, body: bytes, repo: str, revision: str, path: str) -> None:
        if (files := self.files(repo, revision)) is None:
            return
        above = f"{path}/" if path else ""
        inside = {name: data for name, data in files.items() if name.startswith(above)}
        if path and not inside:
            self.refuse(404, "EntryNotFound")
            return
        here = {name: data for name, data in inside.items() if "/" not in name.removeprefix(above)}
        folders = {above + name.removeprefix(above).split("/")[0] for name in inside if name not in here}
        entries = [{"type": "directory", "path": name, "oid": "0" * 40, "size": 0} for name in sorted(folders)]
        self.reply([*entries, *(self.describe(name, data) for name, data in here.items())])

    def info(self, body: bytes, repo: str, revision: str) -> None:
        if (files := self.files(repo, revision)) is None:
            return
        text = body.decode()
        asked = json.loads(text)["paths"] if text.startswith("{") else [unquote(part[6:]) for part in text.split("&")]
        self.reply([self.describe(path, files[path]) for path in asked if path in files])

    def about(self, body: bytes, repo: str, revision: str | None) -> None:
        if self.files(repo, revision) is not None:
            name = self.hub.branches.get((repo, revision or "main"), revision)
            self.reply({"id": repo, "sha": name, "siblings": [], "private": False, "tags": [], "downloads": 0})

    def resolve(self, body: bytes, repo: str, revision: str, path: str) -> None:
        files = self.files(repo, revision)
        if files is None:
            return
        if path not in files:
            self.refuse(404, "EntryNotFound")
            return
        data = files[path]
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range") or "")
        part = data[int(asked[1]) : int(asked[2]) + 1] if asked else data
        if self.command == "GET":
            self.hub.served[path] = self.hub.served.get(path, 0) + len(part)
            if self.hub.spoil and asked:
                part, self.hub.spoil = bytes(len(part)), False
        tag = hashlib.sha1(data).hexdigest()
        self.reply(part, 206 if asked else 200, X_Repo_Commit=revision, ETag=f'"{tag}"')

    def log_message(self, *_: Any) -> None:
        """Print nothing."""


@contextmanager
def serve_hub(monkeypatch: pytest.MonkeyPatch, cache: Any) -> Iterator[Hub]:
    """A running server, which Hugging Face's client takes for the Hub, and an empty cache."""
    from huggingface_hub import close_session

    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Own", (Handler,), {"hub": hub}))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("HF_TOKEN", "hf_stored")
    for name, value in {
        "ENDPOINT": address,
        "HUGGINGFACE_CO_URL_TEMPLATE": address + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_OFFLINE": False,
        "HF_HUB_DISABLE_XET": True,
        "HF_ASSETS_CACHE": str(cache / "assets"),
        "HF_HUB_CACHE": str(cache / "hub"),
    }.items():
        monkeypatch.setattr(f"huggingface_hub.constants.{name}", value)
    monkeypatch.setattr("huggingface_hub.utils._cache_assets.HF_ASSETS_CACHE", str(cache / "assets"))
    try:
        yield hub
    finally:
        close_session()  # its connections, and with them the server's threads, end
        server.shutdown()
        server.server_close()
        thread.join()

"""A planted feature store, models that read prompts as a person would, and a server with every fault."""

import itertools
import json
import re
import threading
import time
from collections import Counter
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import torch

import saelab as sl
from saelab.labels.autointerp.clients import Answer
from saelab.labels.autointerp.response_cache import make_key

FILLERS = [f"w{i}" for i in range(40)]
WORDS = ["hot", "cold", "river", "very", *FILLERS]
VERY, HOT = WORDS.index("very"), WORDS.index("hot")


def plant(folder) -> sl.FeatureStore:
    """Feature 0 fires on hot, and negatively on cold; 1 on river; 2 on hot after very; 3 never."""
    rng = np.random.default_rng(0)
    ids = torch.from_numpy(rng.choice(len(WORDS), 8000, p=[0.03, 0.03, 0.04, 0.1] + [0.8 / 40] * 40)).int()
    ids[1:][(ids[:-1] == VERY) & torch.from_numpy(rng.random(7999) < 0.3)] = HOT
    x = torch.zeros(len(ids), 4)
    x[:, 0] = (ids == 0).float() - (ids == 1).float()
    x[:, 1] = (ids == 2).float()
    x[1:, 2] = ((ids[1:] == HOT) & (ids[:-1] == VERY) & (torch.arange(1, 8000) % 50 != 0)).float()
    columns = {
        "token_ids": ids,
        "doc_ids": (torch.arange(8000) // 50).int(),
        "positions": (torch.arange(8000) % 50).int(),
    }
    where = sl.stores.Provenance(
        model="m", weight_processing="none", hook_point="", text="", tokens_sha256="", mask={}, dtype="float32",
        ctx_len=50, n_tokens=8000, seed=None, versions={},
    )  # fmt: skip
    sae = sl.SAE(sl.SAEConfig(d_in=4, d_sae=4, activation=sl.AbsTopK(k=3), normalizer="none"))
    with torch.no_grad():
        for weight, value in ((sae.W_enc, torch.eye(4)), (sae.W_dec, torch.eye(4))):
            weight.copy_(value)
        sae.b_enc.zero_()
        sae.b_dec.zero_()
    sl.harvest(sae, None, sl.Activations.from_tensor(x, where, **columns), folder, allow_mismatch=True, progress=False)
    (folder / "strings.json").write_text(json.dumps({str(i): f" {word}" for i, word in enumerate(WORDS)}))
    loaded = sl.FeatureStore.load(folder)
    # The store's own reader of strings is one checked call for each token: the checks would take most of the time.
    loaded.text = replace(loaded.text, strings=dict(loaded.text.strings))
    return loaded


TRUTHS = {
    "hot": lambda words: [word == "hot" for word in words],
    "cold": lambda words: [word == "cold" for word in words],
    "river": lambda words: [word == "river" for word in words],
    "hot after very": lambda words: [w == "hot" and p == "very" for p, w in zip(["", *words], words, strict=False)],
}
NAMES = {(0, 1): "hot", (0, -1): "cold", (1, 1): "river", (2, 1): "hot after very"}


def rows_of(prompt: str) -> list[dict]:
    return [json.loads(line) for line in prompt.splitlines() if line.startswith("{") and '"label"' not in line]


def split_marks(text: str) -> tuple[list[str], list[bool]]:
    pieces = re.findall(r"<\* (\S+?)\*>| (\S+?)(?=<\*| |$)", text)
    return [a or b for a, b in pieces], [bool(a) for a, _ in pieces]


class Oracle:
    """Answers every kind of prompt from what stands in it, by the words that a label names."""

    name = "oracle"

    def __init__(self) -> None:
        self.settings = {"model": self.name}
        self.asked: list[str] = []

    def complete(self, messages) -> Answer:
        self.asked.append(make_key(self.settings, messages))
        return Answer(text=self.say(messages[0]["content"]), tokens_in=100, tokens_out=10)

    def say(self, prompt: str) -> str:
        rows = rows_of(prompt)
        if "the intruder" in prompt:
            return self.find_intruder(rows)
        if "A label proposed" not in prompt:
            return self.name_it(rows)
        label = json.loads(re.search(r"naming what it fires on: (.*)", prompt)[1])
        tell = TRUTHS[label]
        if "pairs of texts" in prompt:
            return json.dumps([1 if any(tell(row["first"].split())) else 2 for row in rows])
        if "[number, token]" in prompt:
            return json.dumps(
                {
                    str(n): 10
                    for row in rows
                    for (n, _), hit in zip(row["text"], tell([w.strip() for _, w in row["text"]]), strict=True)
                    if hit
                }
            )
        if "<*" in prompt.split("A label proposed")[1].split('"text"')[0]:
            return json.dumps(
                [int(tell(words) == marks) for words, marks in (split_marks(row["text"]) for row in rows)]
            )
        return json.dumps([int(any(tell(row["text"].split()))) for row in rows])

    def find_intruder(self, rows: list[dict]) -> str:
        """The window whose marks are not on the words that those of all others are on."""
        for tell in TRUTHS.values():
            # A window's first word may follow "very" outside of it.
            right = [tell(words)[1:] == marks[1:] for words, marks in (split_marks(row["text"]) for row in rows)]
            if sum(right) == len(rows) - 1:
                return json.dumps([right.index(False) + 1])
        return "[1]"

    def name_it(self, rows: list[dict]) -> str:
        for name, tell in TRUTHS.items():
            seen = [split_marks(row["text"]) for row in rows]
            # A window's first word may follow "very" outside of it.
            if all(tell(words)[1:] == marks[1:] for words, marks in seen):
                return json.dumps({"label": name})
        return '{"label": null}'


class Always(Oracle):
    """The same answer whatever it is asked."""

    def __init__(self, yes: bool) -> None:
        super().__init__()
        self.yes, self.settings = yes, {"model": f"always {yes}"}

    def say(self, prompt: str) -> str:
        n = len(rows_of(prompt))
        if "the intruder" in prompt:
            return "[5]" if self.yes else "[1]"
        if "[number, token]" in prompt:
            return json.dumps({str(n): 10 for row in rows_of(prompt) for n, _ in row["text"]} if self.yes else {})
        return json.dumps([int(self.yes)] * n if "pairs of texts" not in prompt else [1 if self.yes else 2] * n)


KEY = "sk-secret-0123456789"
PLAN = ("ok", "429", "500", "garbage", "cut", "slow", "empty", "half")


SPENT = {"prompt_tokens": 50, "completion_tokens": 512, "completion_tokens_details": {"reasoning_tokens": 512}}
PAID = {
    "reasoned": {"choices": [{"message": {"content": None}, "finish_reason": "length"}], "usage": SPENT},
    "stopped": {"choices": [{"message": {"content": '{"label": "ri'}, "finish_reason": "length"}]},
    "blank": {"choices": [{"message": {"content": " "}, "finish_reason": "stop"}]},
    "filtered": {"choices": [{"message": {"content": "no"}, "finish_reason": "content_filter"}]},
    "declined": {"choices": [{"message": {"content": None, "refusal": f"I will not, {KEY}"}, "finish_reason": "stop"}]},
    "choiceless": {"choices": []},
}
"""Answers with usage and without an answer, by fault."""


def follow(form: dict, said) -> str:
    """What was to be said, in the form of a JSON schema that is strict as OpenAI wants it."""
    schema = form["schema"]
    assert form["strict"] is True and schema["type"] == "object" and schema["additionalProperties"] is False
    ((name, kind),) = schema["properties"].items()
    assert schema["required"] == [name]
    if name == "strengths":
        return json.dumps({name: [{"token": int(token), "strength": value} for token, value in said.items()]})
    if name == "answers":
        assert kind["minItems"] == kind["maxItems"] == len(said) and set(said) <= set(kind["items"]["enum"])
        return json.dumps({name: said})
    assert said.keys() == {name}
    return json.dumps(said)


class Server(ThreadingHTTPServer):
    """Speaks OpenAI's protocol with the oracle's answers; each new prompt meets the next fault of a plan first."""

    daemon_threads = True

    def __init__(self, plan=("ok",)) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.plan, self.oracle, self.lock = plan, Oracle(), threading.Lock()
        self.faults: dict[str, str] = {}
        self.log: list[tuple[str, str, float]] = []  # prompt, what was done, when
        self.n_busy = self.most_busy = 0
        self.delay, self.numbers, self.on_number = 0.0, itertools.count(1), {}
        self.bodies: list[dict] = []  # of all requests, refused ones too
        self.refused: dict[str, dict] = {}  # by name of a setting, the error for requests that have it
        self.usage: dict | None = {"prompt_tokens": 50, "completion_tokens": 5}
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"

    def next_fault(self, prompt: str) -> str:
        """The fault at a prompt's first coming, then none."""
        with self.lock:
            is_new = prompt not in self.faults
            fault = self.faults.setdefault(prompt, self.plan[len(self.faults) % len(self.plan)])
            what = fault if is_new or fault.startswith("always") else "ok"
            self.log.append((prompt, what, time.monotonic()))
            return what.removeprefix("always ")

    def handle_error(self, request, client_address) -> None:
        """A client that went away is no news."""

    def answered(self) -> Counter:
        return Counter(prompt for prompt, what, _ in self.log if what == "ok")


class Handler(BaseHTTPRequestHandler):
    """One request."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *args) -> None:
        """Nothing on stderr."""

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.headers["Authorization"] != f"Bearer {KEY}":
            return self.say(401, {"error": {"message": f"bad key {self.headers['Authorization']}"}})
        if body["model"] != "right":
            return self.say(404, {"error": {"message": f"no model {body['model']} for key {KEY}"}})
        with self.server.lock:
            self.server.bodies.append(body)
            refusal = next((error for name, error in self.server.refused.items() if name in body), None)
        if refusal is not None:
            return self.say(refusal.get("status", 400), refusal if "detail" in refusal else {"error": refusal})
        with self.server.lock:
            self.server.n_busy += 1
            self.server.most_busy = max(self.server.most_busy, self.server.n_busy)
        try:
            self.act(self.server.next_fault(json.dumps(body["messages"])), body)
        finally:
            with self.server.lock:
                self.server.n_busy -= 1
        return None

    def act(self, fault: str, body: dict) -> None:
        time.sleep(1.5 if fault == "slow" else self.server.delay)
        text = self.server.oracle.say(body["messages"][0]["content"])
        if "response_format" in body:
            text = follow(body["response_format"]["json_schema"], json.loads(text))
        good = {"choices": [{"message": {"content": text}, "finish_reason": "stop"}], "usage": self.server.usage}
        if fault == "429":
            self.say(429, {"error": {"message": "slow down"}}, {"Retry-After": "0.15"})
        elif fault in ("500", "400"):
            self.say(int(fault), {"error": {"message": f"oops {KEY}"}})
        elif fault == "garbage":
            self.send(200, b"<html>not json", {"Content-Type": "text/html"})
        elif fault == "empty":
            self.say(200, {"choices": []})
        elif fault == "cut":
            self.close_connection = True
            self.connection.close()
        elif fault == "half":
            self.send(
                200, json.dumps(good).encode()[:20], {"Content-Length": "5000", "Content-Type": "application/json"}
            )
            self.close_connection = True
        elif fault in PAID:
            self.say(200, good | PAID[fault])
        elif fault == "nonsense":
            self.say(200, good | {"choices": [{"message": {"content": "I would rather not say. <b>"}}]})
        else:
            self.say(200, good)
            self.server.on_number.get(next(self.server.numbers), int)()

    def say(self, status: int, obj, headers=()) -> None:
        self.send(status, json.dumps(obj).encode(), {"Content-Type": "application/json", **dict(headers)})

    def send(self, status: int, data: bytes, headers: dict) -> None:
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(data))} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)

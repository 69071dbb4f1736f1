"""Labels by a language model on a real OpenAI-compatible server: tokens counted here and by the server, time, scores.

    llama-server -m model.gguf --port 8080 -c 16384 -np 2 --metrics --alias local
    python benchmarks/labelers.py runs/store --llm http://127.0.0.1:8080/v1 --model local --features 1,2,3

Any server of the protocol will do: llama.cpp's, llama_cpp.server, vLLM's, `transformers serve`. Requests pass through a
proxy of this process, which adds up what each answer's `usage` says before saelab reads it; llama.cpp's own counters
(`/metrics`) stand beside it, where they are. The sums must be equal, and the second run must ask nothing.
"""

import argparse
import json
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np

import saelab as sl
from saelab.labels.autointerp.embeddings import Embedding
from saelab.labels.autointerp.endpoints import OpenAIClient
from saelab.labels.autointerp.explainers import LabelingResult, estimate_labels, explain_features
from saelab.labels.autointerp.requests import RequestConfig
from saelab.labels.autointerp.scorers import Scorer
from saelab.labels.label import BOTH

METRICS = {"prompt_tokens_total": "tokens_in", "tokens_predicted_total": "tokens_out"}


class Proxy(ThreadingHTTPServer):
    """Passes requests on, and adds up what answers say that they took."""

    daemon_threads = True

    def __init__(self, target: str, timeout: float) -> None:
        super().__init__(("127.0.0.1", 0), PassOn)
        self.target, self.patience, self.lock, self.counts = target.rstrip("/"), timeout, threading.Lock(), Counter()
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def count(self, status: int, data: bytes) -> None:
        with self.lock:
            self.counts[f"status {status}"] += 1
            if status != 200:
                return
            answer = json.loads(data)
            usage = answer.get("usage") or {}
            self.counts["tokens_in"] += usage.get("prompt_tokens") or 0
            self.counts["tokens_out"] += usage.get("completion_tokens") or 0
            self.counts["from cache"] += (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
            for choice in answer.get("choices") or ():
                self.counts[f"finish {choice.get('finish_reason')}"] += 1


class PassOn(BaseHTTPRequestHandler):
    """One request."""

    server: Proxy

    def log_message(self, *args: object) -> None:
        """Nothing on stderr."""

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        kept = {name: self.headers[name] for name in ("Content-Type", "Authorization") if name in self.headers}
        asked = urllib.request.Request(self.server.target + self.path, body, kept)
        try:
            with urllib.request.urlopen(asked, timeout=self.server.patience) as answer:
                status, data = answer.status, answer.read()
        except urllib.error.HTTPError as error:
            status, data = error.code, error.read()
        self.server.count(status, data)
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


def read_metrics(url: str) -> dict[str, float]:
    """llama.cpp's own counters; empty where the server has none."""
    try:
        with urllib.request.urlopen(url.rstrip("/").removesuffix("/v1") + "/metrics", timeout=10) as answer:
            lines = [line.rpartition(" ") for line in answer.read().decode().splitlines() if not line.startswith("#")]
    except OSError:
        return {}
    counts = {name.rpartition(":")[2]: float(value) for name, _, value in lines}
    return {ours: counts[theirs] for theirs, ours in METRICS.items() if theirs in counts}


def read_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("store", type=Path, help="a folder that `harvest` wrote")
    parser.add_argument("--llm", required=True, help="URL of the server, such as http://127.0.0.1:8080/v1")
    parser.add_argument("--model", required=True, help="the model's name there")
    parser.add_argument("--features", type=lambda text: [int(part) for part in text.split(",")], default=[0, 1, 2])
    parser.add_argument("--scorers", default="detection,fuzzing,contrast,intruder,simulation")
    parser.add_argument("--encoder", help="a sentence-transformers model for the embedding score")
    parser.add_argument("--text", action="store_true", help="free text instead of JSON by schema")
    parser.add_argument("--max-tokens", type=int, default=512)
    parser.add_argument("--parallel", type=int, default=2)
    parser.add_argument("--timeout", type=float, default=600.0)
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def show(found: LabelingResult, counted: Counter, metrics: dict[str, float], seconds: float) -> dict[str, object]:
    """What was counted here, in the answers' usage, and by the server itself."""
    usage = found.usage
    print(f"{'':<12}{'saelab':>12}{'usage':>12}{'metrics':>12}")
    for name in ("tokens_in", "tokens_out"):
        known = metrics.get(name)
        # llama.cpp's counter leaves out prompt tokens that it had in its cache
        known = known + counted["from cache"] if known is not None and name == "tokens_in" else known
        print(
            f"{name:<12}{getattr(usage, name):>12,}{counted[name]:>12,}{'-' if known is None else f'{known:,.0f}':>12}"
        )
    print(f"{seconds:.1f} s, {seconds / max(1, usage.n_requests):.2f} s a request; {dict(counted)}")
    scores = {key for label in found.labels for key in label.scores if f"{key}_chance" in label.scores}
    means = {key: [label.scores[key] for label in found.labels if key in label.scores] for key in sorted(scores)}
    for key, values in means.items():
        chance = next(label.scores[f"{key}_chance"] for label in found.labels if key in label.scores)
        print(f"{key:<12}{np.mean(values):>8.3f} (chance {chance:g}, {len(values)} sides)")
    return {
        "saelab": {"tokens_in": usage.tokens_in, "tokens_out": usage.tokens_out, "n_requests": usage.n_requests},
        "usage": dict(counted), "metrics": metrics, "seconds": seconds,
        "scores": {key: float(np.mean(values)) for key, values in means.items()},
    }  # fmt: skip


def main() -> int:
    args = read_args()
    store, before = sl.FeatureStore.load(args.store), read_metrics(args.llm)
    proxy = Proxy(args.llm.rstrip("/").removesuffix("/v1"), args.timeout)
    client = OpenAIClient(
        args.model, f"{proxy.url}/v1", timeout=args.timeout, settings={"max_tokens": args.max_tokens},
        structured=not args.text,
    )  # fmt: skip
    scorers: list[str | Scorer] = [name for name in args.scorers.split(",") if name]
    if args.encoder:
        scorers.append(Embedding(sl.labels.SentenceEncoder(args.encoder)))
    asking = RequestConfig(n_parallel=args.parallel, n_tries=2)
    signs = (1, -1) if store.signed else (BOTH,)
    with tempfile.TemporaryDirectory() as folder:
        options = {"signs": signs, "scorers": scorers, "asking": asking, "answers": Path(folder) / "answers.jsonl"}
        print(estimate_labels(store, client, args.features, **options))
        start = time.monotonic()
        found = explain_features(store, client, args.features, **options)
        seconds = time.monotonic() - start
        again = explain_features(store, client, args.features, **options, progress=False)
    after = read_metrics(args.llm)
    print(found)
    measured = show(found, proxy.counts, {name: after[name] - before[name] for name in before}, seconds)
    client.close()
    proxy.shutdown()
    if args.json:
        args.json.write_text(json.dumps(measured, indent=1))
    same = (found.usage.tokens_in, found.usage.tokens_out) == (proxy.counts["tokens_in"], proxy.counts["tokens_out"])
    print(f"tokens are {'the same' if same else 'NOT the same'}; the second run asked {again.usage.n_requests} prompts")
    return 0 if same and again.usage.n_requests == 0 else 1


if __name__ == "__main__":
    sys.exit(main())

"""Is the explorer fast? Its first page, searches, prompts and steered tokens against their limits, on this machine.

    python scripts/measure_explorer.py                          a synthetic store is written first, in some minutes
    python scripts/measure_explorer.py --store FOLDER --sae FOLDER
    python scripts/measure_explorer.py --d-sae 100000 --only pages

Pages are those of a store of 24,576 features (`--d-sae`) and 1,000,000 tokens; prompts and texts are those of a random
model of the shape of GPT-2 small, of which the store seems to be. Each server is a process of its own; requests come
from this one over loopback, and the first page is that of a real browser (`--chromium`; left out where there is none).

    first page      from the call of `explore` to rows in the browser's list, the browser having been started before
    scrolling       from a leap of the list to some place to its row there, in that browser: median, and 95 of 100
    feature page    one feature's page, features at random: median, and 95 of 100; without the model and with it
    search          one search for a word, words at random: median, and 95 of 100
    rows            100 rows of the list from some place on, sorted by some column: median, and 95 of 100
    dead latents    the page of them, once, and the memory of a process that has the SAE for the explorer alone
    prompt          64 tokens: time of a request over that of one forward pass and one encoding, medians taken in turns
    steered tokens  those of all texts that are streamed, a second, over `sl.generate`'s under the same edit
    readers         20 that ask for lists and features, one after another, while texts are streamed: their answers, and
                    the rate of tokens then over that of a stream alone, medians taken in turns
    memory          private memory that the explorer adds to a process that has saelab, model and SAE

Nothing else should run meanwhile: what is measured is what a person waits for.
"""

import argparse
import asyncio
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import torch

import saelab as sl
from saelab.collecting.harvesting import SHARD_TOKENS, _Codes, _CodesBuffer, sae_fingerprint
from saelab.collecting.writers import ShardWriter
from saelab.explorer.live_steering import SteeringSetup
from saelab.functional.codes import SparseCodes
from saelab.interventions.steering_hooks import steer_all
from saelab.lm.models import describe_model
from saelab.stores.corpus import StoredText
from saelab.stores.feature_statistics import measure, save_statistics
from saelab.stores.manifest import FeatureManifest
from saelab.stores.results import format_table

N_TOKENS, L0, CTX_LEN, N_WORDS = 1_000_000, 32, 128, 30_000
HOOK = "blocks.2.hook_resid_post"
SYLLABLES = ("ka", "lo", "mi", "ter", "sun", "ra", "ven", "pol", "and", "ing", "str", "ous", "be", "qui", "zan", "fel")
PROMPT = (
    "Once upon a time there was a girl named Ida. She had a dog and a friend named Tom. One day they went to the sea."
)
TEXT = {"prompt": "Once upon a time", "features": [{"feature": 5, "strength": 1.0}], "n_tokens": 60, "seed": 1}


# ---- what is measured on
def write_store(folder: Path, d_sae: int, seed: int = 0) -> None:
    """A feature store of random codes on random words, and its SAE, in `folder`/store and `folder`/sae; as if it were
    of the random model.
    """
    rng = np.random.default_rng(seed)
    sae = sl.SAE(sl.SAEConfig(d_in=768, d_sae=d_sae, activation=sl.AbsTopK(k=L0)), seed)
    sae.save_pretrained(folder / "sae")
    share = 1 / np.arange(1, N_WORDS + 1)
    ids = rng.choice(N_WORDS, N_TOKENS, p=share / share.sum()).astype(np.int32)
    at = np.arange(N_TOKENS, dtype=np.int32)
    lengths = (np.arange(N_WORDS)[:, None] >= np.array([0, 16, 256, 4096])).sum(1)
    strings = {i: " " + "".join(SYLLABLES[i >> 4 * n & 15] for n in range(lengths[i])) for i in range(N_WORDS)}
    text = StoredText(token_ids=ids, doc_ids=at // 400, positions=at % 400 % CTX_LEN, strings=strings)
    model = describe_model(make_model())
    origin = sl.stores.Provenance(
        model=model.name, weight_processing=model.weight_processing, hook_point=HOOK, text="random", tokens_sha256="",
        mask={}, dtype="float32", ctx_len=CTX_LEN, n_tokens=N_TOKENS, seed=seed, versions={},
    )  # fmt: skip
    manifest = FeatureManifest(
        d_sae=d_sae, dtype="float16", sae=sae.describe() | {"name_or_path": "../sae"},
        request={"sae": sae_fingerprint(sae)}, provenance=origin.to_dict(),
    )  # fmt: skip
    store = folder / "store"
    store.mkdir(parents=True)
    buffers = _CodesBuffer(d_sae, "float16"), _CodesBuffer(d_sae, "float16")
    with ShardWriter(store, manifest, SHARD_TOKENS, buffers) as writer:
        for places in np.array_split(np.arange(N_TOKENS), N_TOKENS // SHARD_TOKENS + 1):
            writer.add(_Codes(draw_codes(rng, ids[places], d_sae), torch.from_numpy(places)), len(places), 1, {})
        writer.flush()
        made = sl.FeatureStore(store, writer.manifest, writer.manifest.check_shards(store))
        orders = ((shard["feature_offsets"], shard["feature_values"]) for _, shard in made.shards())
        writer.finish(origin, files=save_statistics(store, measure(d_sae, orders)) | text.save(store))


def draw_codes(rng: np.random.Generator, ids: np.ndarray, d_sae: int) -> SparseCodes:
    """Codes of tokens, most of them features of their word; a few features are dense, many are rare."""
    widths = np.maximum(2, np.geomspace(2, d_sae * 0.106, L0).astype(int))
    widths[-1] += d_sae * 98 // 100 - widths.sum()
    of_word = (ids[:, None] * 7919 + np.arange(L0)) % widths
    drawn = (rng.random((len(ids), L0)) ** 3 * widths).astype(np.int64)
    latents = np.where(rng.random(drawn.shape) < 0.6, of_word, drawn) + np.concatenate([[0], np.cumsum(widths)[:-1]])
    rows, values = torch.arange(len(ids)).repeat_interleave(L0), torch.from_numpy(rng.standard_normal(drawn.size))
    return SparseCodes.from_rows(torch.from_numpy(latents.ravel()), values.float(), rows, (len(ids), d_sae))


def make_model() -> Any:
    """A random model of the shape of GPT-2 small, of bytes; the same in every process."""
    return sl.lm.tiny_model(architecture="gpt2", d_model=768, n_layers=12, ctx_len=256)


# ---- the server's process
def serve(store: Path, sae: Path | None, model: bool) -> None:
    """Serve a store, and do what is asked on stdin, a word a line, each with a line of JSON on stdout.

    Without `sae` the explorer takes the one that the store names.
    """
    coder = sl.SAE.from_pretrained(sae) if sae is not None else None
    lm = make_model() if model else None
    opened = sl.FeatureStore.load(store) if model else store
    block: list[Any] = []
    if lm is not None and coder is not None and isinstance(opened, sl.FeatureStore):
        block = SteeringSetup.from_dict(TEXT).interventions(coder, opened)
        run_pass(lm, coder)  # what model and SAE keep of their first run is theirs
        generate(lm, block)
    begin, before = time.time(), read_memory()
    server = sl.explore(opened, lm, coder, port=0)
    say({"url": server.url, "begin": begin})
    for line in sys.stdin:
        if line.strip() == "memory":
            say({"MiB": read_memory() - before})
        elif line.strip() == "pass" and coder is not None:
            say({"seconds": run_pass(lm, coder)})
        elif line.strip() == "generate":
            say({"rate": generate(lm, block)})
    server.close()


@torch.no_grad()
def run_pass(model: Any, sae: sl.SAE) -> float:
    """Seconds of one forward pass of the prompt and one encoding."""
    ids, start = read_ids(model), time.perf_counter()
    sae.encode_sparse(sl.lm.capture(model, ids, [HOOK], stop=False)[HOOK][0])
    return time.perf_counter() - start


def generate(model: Any, block: list[Any]) -> float:
    """Tokens a second of `sl.generate` under an edit."""
    with steer_all(model, block):
        start = time.perf_counter()
        made = sl.generate(model, TEXT["prompt"], TEXT["n_tokens"], seed=1, progress=False)
        return made.n_tokens / (time.perf_counter() - start)


def read_ids(model: Any) -> torch.Tensor:
    """The 64 tokens of the prompt, BOS included."""
    ids = sl.tokenize(model, [PROMPT[:63]], 64, packed=False).ids.long()
    assert ids.shape == (1, 64)
    return ids


def read_memory() -> float:
    """Private memory of this process in MiB; files that are mapped do not count, as they can be dropped any time."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith(("RssAnon", "RssShmem"))) / 1024


def say(value: Any) -> None:
    print(json.dumps(value), flush=True)


class Server:
    """A server in a process of its own."""

    def __init__(self, store: Path, sae: Path | None, model: bool) -> None:
        words = [sys.executable, __file__, "--serve", "--store", str(store)]
        words += ["--sae", str(sae)] if sae is not None else []
        self.process = subprocess.Popen(
            words + ["--model"] * model, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.read()  # the address, for people
        said = json.loads(self.read())
        self.url, self.begin = said["url"], said["begin"]

    def read(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline()

    def ask(self, word: str) -> Any:
        assert self.process.stdin is not None
        self.process.stdin.write(word + "\n")
        self.process.stdin.flush()
        return next(iter(json.loads(self.read()).values()))

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            print("A server did not end within 20 s.", file=sys.stderr)


@contextmanager
def serving(store: Path, sae: Path | None, model: bool = False) -> Iterator[Server]:
    server = Server(store, sae, model)
    try:
        yield server
    finally:
        server.close()


# ---- the figures
def open_first_page(store: Path, sae: Path, chromium: str, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Seconds from `explore` to rows in the list, for each of `n` servers, and of leaps in the list."""
    from playwright.sync_api import sync_playwright

    found, leaps, rng = [], [], np.random.default_rng(2)
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        for _ in range(n):
            page = browser.new_page()
            with serving(store, sae) as server:
                page.goto(server.url)
                page.wait_for_selector("[data-feature]")
                found.append(time.time() - server.begin)
                wait_for_index(server.url)
                page.reload()  # the list begins anew once all tokens are counted
                page.wait_for_selector("[data-feature]")
                leaps += [page.evaluate(LEAP, share) for share in rng.random(20).tolist()]
            page.close()
        browser.close()
    return np.array(found), np.array(leaps)


LEAP = """share => new Promise(done => {
  const rows = document.querySelector(".rows"), height = rows.firstElementChild.offsetHeight;
  const i = Math.floor(share * (document.querySelector("[role=table]").ariaRowCount - 50)), start = performance.now();
  const look = () => document.querySelector(`[data-index="${i}"][data-feature]`)
    ? done((performance.now() - start) / 1000) : requestAnimationFrame(look);
  rows.scrollTop = height * i / (document.querySelector("[role=table]").ariaRowCount - 1);
  look();
})"""
"""JavaScript of a leap to some share of the list: seconds until its row is there"""


def time_requests(url: str, paths: list[str]) -> np.ndarray:
    """Seconds of each request, one after another."""
    found = []
    with httpx.Client(base_url=url, timeout=60) as client:
        for path in paths:
            start = time.perf_counter()
            client.get(path).raise_for_status()
            found.append(time.perf_counter() - start)
    return np.array(found)


def list_pages(rng: np.random.Generator, n: int, url: str) -> tuple[list[str], list[str], list[str]]:
    """Addresses of features, of searches and of rows of the list, drawn at random."""
    d_sae = httpx.get(url + "api/about").json()["store"]["d_sae"]
    features = [f"api/features/{j}" for j in rng.integers(d_sae, size=n)]
    words = ["".join(rng.choice(SYLLABLES, rng.integers(1, 4))) for _ in range(n)]
    places = zip(rng.choice(["density", "peak", "balance"], n), rng.integers(d_sae, size=n), strict=True)
    rows = [f"api/features?sort={column}&order=desc&offset={at}&limit=100" for column, at in places]
    return features, [f"api/features?q={word}&sort=density&order=desc&limit=100" for word in words], rows


def wait_for_index(url: str) -> float:
    """Seconds until all features' tokens can be searched."""
    start = time.perf_counter()
    with httpx.Client(base_url=url, timeout=60) as client:
        while client.get("api/about").json()["index_state"] != "ready":
            time.sleep(0.1)
    return time.perf_counter() - start


def time_prompt(server: Server, n: int) -> tuple[float, float]:
    """Medians of the seconds of a prompt's request, and of one forward pass and one encoding, taken in turns."""
    body = {"text": PROMPT[:63]}
    asked, passes = [], []
    with httpx.Client(base_url=server.url, timeout=60) as client:
        for _ in range(n):
            passes.append(server.ask("pass"))
            start = time.perf_counter()
            client.post("api/prompt", json=body).raise_for_status()
            asked.append(time.perf_counter() - start)
    return float(np.median(asked[2:])), float(np.median(passes[2:]))


async def read_texts(client: httpx.AsyncClient) -> float:
    """Tokens a second of all texts of one stream, from its first event to its last token."""
    n, first, last = 0, 0.0, 0.0
    async with client.stream("POST", "api/steer", json=TEXT) as answer:
        async for line in answer.aiter_lines():
            if line.startswith("data:") and "token" in (event := json.loads(line[5:])):
                last = time.perf_counter()
                first, n = first or last, n + (first > 0)
                assert event["run"]
    return n / (last - first)


async def read_busily(url: str, n_readers: int, rng: np.random.Generator) -> tuple[float, np.ndarray]:
    """Tokens a second while readers ask for pages one after another, and the seconds of their answers."""
    limits = httpx.Limits(max_connections=None)
    asked = [
        [path for pair in zip(*list_pages(rng, 500, url)[:2], strict=True) for path in pair] for _ in range(n_readers)
    ]
    async with httpx.AsyncClient(base_url=url, timeout=120, limits=limits) as client:
        writing, times = asyncio.ensure_future(read_texts(client)), list[float]()

        async def read(paths: list[str]) -> None:
            for path in paths:
                if writing.done():
                    return
                start = time.perf_counter()
                (await client.get(path)).raise_for_status()
                times.append(time.perf_counter() - start)
                await asyncio.sleep(0.5)  # a person reads what came

        await asyncio.gather(writing, *map(read, asked))
        return await writing, np.array(times)


def time_texts(server: Server, n: int) -> tuple[float, float, float, np.ndarray]:
    """Medians of tokens a second of a stream alone, of `sl.generate` under the same edit, and of a stream while 20
    read, taken in turns; and the seconds of the readers' answers.
    """

    async def stream() -> float:
        async with httpx.AsyncClient(base_url=server.url, timeout=120) as client:
            return await read_texts(client)

    streamed, generated, beside, times, rng = [], [], [], [], np.random.default_rng(1)
    for _ in range(n):
        generated.append(server.ask("generate"))
        streamed.append(asyncio.run(stream()))
        rate, answers = asyncio.run(read_busily(server.url, 20, rng))
        beside.append(rate)
        times.append(answers)
    return float(np.median(streamed)), float(np.median(generated)), float(np.median(beside)), np.concatenate(times)


def tell(times: np.ndarray) -> str:
    """Median and 95 of 100, in milliseconds."""
    return f"{1000 * np.median(times):.0f} ms, 95 of 100 within {1000 * np.quantile(times, 0.95):.0f}"


Rows = Iterator[list[str]]


def measure_pages(store: Path, sae: Path, chromium: str, n: int) -> Rows:
    """Figures of a large store, without a model."""
    if Path(chromium).is_file():
        times, leaps = open_first_page(store, sae, chromium, 3)
        yield ["first page", f"{np.median(times):.2f} s (of 3: {times.min():.2f} to {times.max():.2f})", "1 s"]
        yield ["scrolling", tell(leaps), "-"]
    with serving(store, sae) as server:
        until = wait_for_index(server.url)
        features, searches, rows = list_pages(np.random.default_rng(0), n, server.url)
        time_requests(server.url, features[:3] + searches[:3])
        yield ["feature page", tell(time_requests(server.url, features)), "50 ms"]
        yield ["search", tell(time_requests(server.url, searches)), "50 ms"]
        yield ["rows", tell(time_requests(server.url, rows)), "-"]
        yield ["tokens searchable", f"{until:.0f} s after the start", "-"]
        yield ["memory, pages", f"{server.ask('memory'):.0f} MiB", "300 MiB"]
    with serving(store, None) as server:
        wait_for_index(server.url)
        [seconds] = time_requests(server.url, ["api/pages/dead"])
        yield ["dead latents", f"{seconds:.2f} s, {server.ask('memory'):.0f} MiB with the SAE", "300 MiB"]


def measure_model(store: Path, sae: Path, n: int) -> Rows:
    """Figures of what runs the model."""
    with serving(store, sae, model=True) as server:
        wait_for_index(server.url)
        features = list_pages(np.random.default_rng(0), n, server.url)[0]
        time_requests(server.url, features[:3])
        yield ["feature page, model", tell(time_requests(server.url, features)), "50 ms"]
        asked, one = time_prompt(server, n)
        said = f"{asked / one:.2f} passes ({1000 * asked:.0f} ms, one {1000 * one:.0f} ms)"
        yield ["prompt of 64 tokens", said, "1.3 passes"]
        streamed, generated, beside, times = time_texts(server, max(3, n // 20))
        said = f"{streamed / generated:.2f} of generate ({streamed:.0f} and {generated:.0f} a second)"
        yield ["steered tokens", said, "0.85"]
        said = f"{tell(times)}, {len(times)} answers, {beside:.0f} tokens a second, {beside / streamed:.2f} of alone"
        yield ["20 readers meanwhile", said, "0.5"]
        yield ["memory, model's work", f"{server.ask('memory'):.0f} MiB", "300 MiB"]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--store", type=Path, help="store of the pages; one is written without it")
    parser.add_argument("--sae", type=Path, help="its SAE")
    parser.add_argument("--d-sae", type=int, default=24_576, help="features of a store that is written")
    parser.add_argument("--chromium", default="/usr/bin/chromium")
    parser.add_argument("--n", type=int, default=100, help="requests of each kind")
    parser.add_argument("--only", choices=["pages", "model"], help="one half of the table")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--model", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", torch.get_num_threads())))
    if args.serve:
        serve(args.store, args.sae, args.model)
        return
    with tempfile.TemporaryDirectory() as name:
        store, sae = find_store(args, Path(name))
        parts: dict[str, Callable[[], Rows]] = {
            "pages": lambda: measure_pages(store, sae, args.chromium, args.n),
            "model": lambda: measure_model(store, sae, args.n),
        }
        rows = []
        for part, run in parts.items():
            for row in run() if args.only in (None, part) else ():
                print(*row, sep="; ", file=sys.stderr)
                rows.append(row)
        print("\n".join(format_table([["", "measured", "limit"], *rows], left=(0, 1, 2))))
        size = repr(sl.FeatureStore.load(store))
    print(f"{size}; {os.cpu_count()} cores, {torch.get_num_threads()} threads of torch.")


def find_store(args: argparse.Namespace, folder: Path) -> tuple[Path, Path]:
    if args.store is not None:
        return args.store, args.sae
    write_store(folder, args.d_sae)
    return folder / "store", folder / "sae"


if __name__ == "__main__":
    main()

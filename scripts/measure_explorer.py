"""Is the explorer fast? Its first page, searches, prompts and steered tokens against their limits, on this machine.

    python scripts/measure_explorer.py                          a synthetic store is written first, in some minutes
    python scripts/measure_explorer.py --store FOLDER --sae FOLDER

Pages are those of a store of 24,576 features and 1,000,000 tokens (`--store`); prompts and texts are those of a random
model of the shape of GPT-2 small with an SAE of 24,576 latents. Each server is a process of its own; requests come from
this one over loopback, and the first page is that of a real browser (`--chromium`; left out where there is none).

    first page      from the call of `explore` to rows in the browser's list, the browser having been started before
    feature page    one feature's page, features at random: median, and 95 of 100
    search          one search for a word, words at random: median, and 95 of 100
    prompt          64 tokens: time of a request over that of one forward pass and one encoding, medians taken in turns
    steered tokens  those of all texts that are streamed, a second, over `sl.generate`'s under the same edit
    readers         20 that ask for lists and features, one after another, while texts are streamed: their answers, and
                    the rate of tokens then
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
from saelab.stores.corpus import StoredText
from saelab.stores.feature_statistics import measure, save_statistics
from saelab.stores.manifest import FeatureManifest
from saelab.stores.results import format_table

D_SAE, N_TOKENS, L0, CTX_LEN, N_WORDS = 24_576, 1_000_000, 32, 128, 30_000
HOOK = "blocks.2.hook_resid_post"
SYLLABLES = ("ka", "lo", "mi", "ter", "sun", "ra", "ven", "pol", "and", "ing", "str", "ous", "be", "qui", "zan", "fel")
PROMPT = (
    "Once upon a time there was a girl named Ida. She had a dog and a friend named Tom. One day they went to the sea."
)
TEXT = {"prompt": "Once upon a time", "features": [{"feature": 5, "strength": 1.0}], "n_tokens": 60, "seed": 1}


# ---- what is measured on
def write_store(folder: Path, seed: int = 0) -> None:
    """A feature store of random codes on random words, and its SAE, in `folder`/store and `folder`/sae."""
    rng = np.random.default_rng(seed)
    sae = sl.SAE(sl.SAEConfig(d_in=768, d_sae=D_SAE, activation=sl.AbsTopK(k=L0)), seed)
    sae.save_pretrained(folder / "sae")
    share = 1 / np.arange(1, N_WORDS + 1)
    ids = rng.choice(N_WORDS, N_TOKENS, p=share / share.sum()).astype(np.int32)
    at = np.arange(N_TOKENS, dtype=np.int32)
    lengths = (np.arange(N_WORDS)[:, None] >= np.array([0, 16, 256, 4096])).sum(1)
    strings = {i: " " + "".join(SYLLABLES[i >> 4 * n & 15] for n in range(lengths[i])) for i in range(N_WORDS)}
    text = StoredText(token_ids=ids, doc_ids=at // 400, positions=at % 400 % CTX_LEN, strings=strings)
    origin = sl.stores.Provenance(
        model="random", weight_processing="none", hook_point=HOOK, text="random", tokens_sha256="", mask={},
        dtype="float32", ctx_len=CTX_LEN, n_tokens=N_TOKENS, seed=seed, versions={},
    )  # fmt: skip
    manifest = FeatureManifest(
        d_sae=D_SAE, dtype="float16", sae=sae.describe() | {"name_or_path": "../sae"},
        request={"sae": sae_fingerprint(sae)}, provenance=origin.to_dict(),
    )  # fmt: skip
    store = folder / "store"
    store.mkdir(parents=True)
    buffers = _CodesBuffer(D_SAE, "float16"), _CodesBuffer(D_SAE, "float16")
    with ShardWriter(store, manifest, SHARD_TOKENS, buffers) as writer:
        for places in np.array_split(np.arange(N_TOKENS), N_TOKENS // SHARD_TOKENS + 1):
            writer.add(_Codes(draw_codes(rng, ids[places]), torch.from_numpy(places)), len(places), 1, {})
        writer.flush()
        made = sl.FeatureStore(store, writer.manifest, writer.manifest.check_shards(store))
        orders = ((shard["feature_offsets"], shard["feature_values"]) for _, shard in made.shards())
        writer.finish(origin, files=save_statistics(store, measure(D_SAE, orders)) | text.save(store))


def draw_codes(rng: np.random.Generator, ids: np.ndarray) -> SparseCodes:
    """Codes of tokens, most of them features of their word; a few features are dense, many are rare."""
    widths = np.maximum(2, np.geomspace(2, 2600, L0).astype(int))
    widths[-1] += D_SAE - 500 - widths.sum()
    of_word = (ids[:, None] * 7919 + np.arange(L0)) % widths
    drawn = (rng.random((len(ids), L0)) ** 3 * widths).astype(np.int64)
    latents = np.where(rng.random(drawn.shape) < 0.6, of_word, drawn) + np.concatenate([[0], np.cumsum(widths)[:-1]])
    rows, values = torch.arange(len(ids)).repeat_interleave(L0), torch.from_numpy(rng.standard_normal(drawn.size))
    return SparseCodes.from_rows(torch.from_numpy(latents.ravel()), values.float(), rows, (len(ids), D_SAE))


def make_model() -> Any:
    """A random model of the shape of GPT-2 small, of bytes; the same in every process."""
    return sl.lm.tiny_model(architecture="gpt2", d_model=768, n_layers=12, ctx_len=256)


def harvest_text(folder: Path) -> None:
    """A store of that model with an SAE of as many latents, little trained, in `folder`/store and `folder`/sae."""
    model = make_model()
    tokens = sl.tokenize(model, [PROMPT * 4] * 8, ctx_len=256)
    acts = sl.collect(model, tokens, HOOK, progress=False)
    sae = sl.SAE(sl.SAEConfig(d_in=model.cfg.d_model, d_sae=D_SAE, activation=sl.AbsTopK(k=L0)))
    sae.fit(acts, sl.TrainConfig(n_tokens=512, batch_size=128), progress=False).save_pretrained(folder / "sae")
    sl.harvest(sl.SAE.from_pretrained(folder / "sae"), model, tokens, folder / "store", progress=False)


# ---- the server's process
def serve(store: Path, sae: Path, model: bool) -> None:
    """Serve a store, and do what is asked on stdin, a word a line, each with a line of JSON on stdout."""
    coder = sl.SAE.from_pretrained(sae)
    lm = make_model() if model else None
    opened = sl.FeatureStore.load(store) if model else store
    block: list[Any] = []
    if lm is not None and isinstance(opened, sl.FeatureStore):
        block = SteeringSetup.from_dict(TEXT).interventions(coder, opened)
        run_pass(lm, coder)  # what model and SAE keep of their first run is theirs
        generate(lm, block)
    begin, before = time.time(), read_memory()
    server = sl.explore(opened, lm, coder, port=0)
    say({"url": server.url, "begin": begin})
    for line in sys.stdin:
        if line.strip() == "memory":
            say({"MiB": read_memory() - before})
        elif line.strip() == "pass":
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

    def __init__(self, store: Path, sae: Path, model: bool) -> None:
        words = [sys.executable, __file__, "--serve", "--store", str(store), "--sae", str(sae)]
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
def serving(store: Path, sae: Path, model: bool = False) -> Iterator[Server]:
    server = Server(store, sae, model)
    try:
        yield server
    finally:
        server.close()


# ---- the figures
def open_first_page(store: Path, sae: Path, chromium: str, n: int) -> list[float]:
    """Seconds from `explore` to rows in the list, for each of `n` servers."""
    from playwright.sync_api import sync_playwright

    found = []
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        for _ in range(n):
            page = browser.new_page()
            with serving(store, sae) as server:
                page.goto(server.url)
                page.wait_for_selector("[data-feature]")
                found.append(time.time() - server.begin)
            page.close()
        browser.close()
    return found


def time_requests(url: str, paths: list[str]) -> np.ndarray:
    """Seconds of each request, one after another."""
    found = []
    with httpx.Client(base_url=url, timeout=60) as client:
        for path in paths:
            start = time.perf_counter()
            client.get(path).raise_for_status()
            found.append(time.perf_counter() - start)
    return np.array(found)


def list_pages(rng: np.random.Generator, n: int) -> tuple[list[str], list[str]]:
    """Addresses of features and of searches, drawn at random."""
    features = [f"api/features/{j}" for j in rng.integers(D_SAE, size=n)]
    words = ["".join(rng.choice(SYLLABLES, rng.integers(1, 4))) for _ in range(n)]
    return features, [f"api/features?q={word}&sort=density&order=desc&limit=100" for word in words]


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

        readers = [
            read([path for pair in zip(*list_pages(rng, 500), strict=True) for path in pair]) for _ in range(n_readers)
        ]
        await asyncio.gather(writing, *readers)
        return await writing, np.array(times)


def time_texts(server: Server, n: int) -> tuple[float, float]:
    """Medians of tokens a second of a stream, and of `sl.generate` under the same edit, taken in turns."""

    async def stream() -> float:
        async with httpx.AsyncClient(base_url=server.url, timeout=120) as client:
            return await read_texts(client)

    streamed, generated = [], []
    for _ in range(n):
        generated.append(server.ask("generate"))
        streamed.append(asyncio.run(stream()))
    return float(np.median(streamed)), float(np.median(generated))


def tell(times: np.ndarray) -> str:
    """Median and 95 of 100, in milliseconds."""
    return f"{1000 * np.median(times):.0f} ms, 95 of 100 within {1000 * np.quantile(times, 0.95):.0f}"


Rows = Iterator[list[str]]


def measure_pages(store: Path, sae: Path, chromium: str, n: int) -> Rows:
    """Figures of a large store, without a model."""
    if Path(chromium).is_file():
        times = np.array(open_first_page(store, sae, chromium, 3))
        yield ["first page", f"{np.median(times):.2f} s (of 3: {times.min():.2f} to {times.max():.2f})", "1 s"]
    with serving(store, sae) as server:
        until = wait_for_index(server.url)
        features, searches = list_pages(np.random.default_rng(0), n)
        time_requests(server.url, features[:3] + searches[:3])
        yield ["feature page", tell(time_requests(server.url, features)), "50 ms"]
        yield ["search", tell(time_requests(server.url, searches)), "50 ms"]
        yield ["tokens searchable", f"{until:.0f} s after the start", "-"]
        yield ["memory, pages", f"{server.ask('memory'):.0f} MiB", "300 MiB"]


def measure_model(folder: Path, n: int) -> Rows:
    """Figures of what runs the model."""
    with serving(folder / "store", folder / "sae", model=True) as server:
        wait_for_index(server.url)
        asked, one = time_prompt(server, n)
        said = f"{asked / one:.2f} passes ({1000 * asked:.0f} ms, one {1000 * one:.0f} ms)"
        yield ["prompt of 64 tokens", said, "1.3 passes"]
        streamed, generated = time_texts(server, max(3, n // 10))
        said = f"{streamed / generated:.2f} of generate ({streamed:.0f} and {generated:.0f} a second)"
        yield ["steered tokens", said, "0.85"]
        rate, times = asyncio.run(read_busily(server.url, 20, np.random.default_rng(1)))
        yield ["20 readers meanwhile", f"{tell(times)}, {len(times)} answers, {rate:.0f} tokens a second", "answered"]
        yield ["memory, model's work", f"{server.ask('memory'):.0f} MiB", "300 MiB"]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--store", type=Path, help="store of the pages; one is written without it")
    parser.add_argument("--sae", type=Path, help="its SAE")
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
        parts: dict[str, Callable[[Path], Rows]] = {
            "pages": lambda folder: measure_pages(*find_store(args, folder), args.chromium, args.n),
            "model": lambda folder: harvest_text(folder) or measure_model(folder, args.n),  # type: ignore[func-returns-value]
        }
        rows = []
        for part, run in parts.items():
            for row in run(Path(name) / part) if args.only in (None, part) else ():
                print(*row, sep="; ", file=sys.stderr)
                rows.append(row)
    print("\n".join(format_table([["", "measured", "limit"], *rows], left=(0, 1, 2))))
    print(
        f"{D_SAE:,} features, {N_TOKENS:,} tokens; {os.cpu_count()} cores, {torch.get_num_threads()} threads of torch."
    )


def find_store(args: argparse.Namespace, folder: Path) -> tuple[Path, Path]:
    if args.store is not None:
        return args.store, args.sae
    write_store(folder)
    return folder / "store", folder / "sae"


if __name__ == "__main__":
    main()

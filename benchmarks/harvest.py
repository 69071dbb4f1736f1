"""Harvesting a feature store against the work it contains, and pages of features against SAEDashboard.

    .venv-bench/bin/python benchmarks/harvest.py --n-tokens 1000000 --json runs/harvest.json

First: `harvest` against forward and encoding alone, sorting by feature, opening a store of 10 million tokens. Then the
way from tokens to pages of the same features in both libraries (`pages.py`): a fresh process for each turn, turn about,
warmed up on a little of the work. saelab harvests all features and writes a report; SAEDashboard makes its data and its
page with its own defaults.

SAEDashboard wants an older transformer-lens and an older safetensors than saelab, so it goes without its dependencies
into the environment that `make bench` makes, where it runs. Without it the second half shows saelab alone.

    .venv-bench/bin/pip install --no-deps sae-dashboard==0.8.0 eindex-callum dataclasses-json 'marshmallow<4' \\
        typing-inspect mypy-extensions matplotlib contourpy cycler fonttools kiwisolver pyparsing
"""

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

import saelab as sl
from pages import MAKERS, Job
from saelab.lm.hooks import forward_size
from saelab.lm.model_checks import Model
from saelab.stores.packing import pack_codes

DATA = Path(__file__).resolve().parents[1] / ".." / "shared" / "data"
STORIES = DATA / "stories260k"
CTX_LEN = 128
N_OPENED = 10_000_000
MARK = "measured: "


def seconds(work: Callable[[], object]) -> tuple[float, float]:
    """Wall time, and the CPU time of all threads."""
    start, start_cpu = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - start, time.process_time() - start_cpu


def load(args: argparse.Namespace) -> tuple[Model, sl.Tokens, str]:
    """Model, tokens (stories where they are at hand, else random ids), and a hook point in the middle."""
    model = sl.load_model(args.model, progress=False)
    text = DATA / "tinystories" / "tinystories.txt"
    hook_point = f"blocks.{model.cfg.n_layers // 2}.hook_resid_post"
    n_seq = args.n_tokens // CTX_LEN
    if text.is_file():
        return model, sl.tokenize(model, text, ctx_len=CTX_LEN, n_tokens=n_seq * CTX_LEN), hook_point
    ids = torch.randint(5, model.cfg.d_vocab, (n_seq, CTX_LEN), generator=torch.Generator().manual_seed(0)).int()
    doc_ids = torch.arange(n_seq).int()[:, None].expand_as(ids).contiguous()
    return model, sl.Tokens(ids=ids, doc_ids=doc_ids), hook_point


def forward_and_encode(model: Model, sae: sl.SAE, tokens: sl.Tokens, hook_point: str) -> None:
    """What harvesting cannot do without."""
    for rows in torch.arange(len(tokens)).split(forward_size(tokens, None)):
        x = sl.lm.capture(model, tokens[rows].ids, [hook_point])[hook_point]
        sae.encode_sparse(x.flatten(0, 1))


def compare_parts(args: argparse.Namespace) -> dict[str, float]:
    """Harvest against its parts, by turns; only time is measured, so the SAE is random."""
    model, tokens, hook_point = load(args)
    sae = sl.SAE(sl.SAEConfig(d_in=model.cfg.d_model, d_sae=args.d_sae, activation=sl.AbsTopK(k=args.k)))
    bare, whole = [], []
    with tempfile.TemporaryDirectory() as out:
        for turn in range(args.turns + 1):  # the first warms up
            settings = {"out": Path(out, str(turn)), "hook_point": hook_point, "progress": False}
            bare.append(seconds(partial(forward_and_encode, model, sae, tokens, hook_point)))
            whole.append(seconds(partial(sl.harvest, sae, model, tokens, **settings)))
        store = sl.FeatureStore.load(Path(out, "0"))
        size = sum(file.stat().st_size for file in store.folder.iterdir())
        opened = open_large(store, Path(out, "large"))
    return {
        "n_tokens": tokens.n_tokens,
        "tokens_per_s": tokens.n_tokens / median(wall for wall, _ in whole[1:]),
        "ratio": median(w[0] / b[0] for w, b in zip(whole[1:], bare[1:], strict=True)),
        "cpu_ratio": median(w[1] / b[1] for w, b in zip(whole[1:], bare[1:], strict=True)),
        "bytes_per_token": size / len(store),
        "open_seconds": opened,
        "entries_per_s": sort_by_feature(args.turns),
    }


def open_large(store: sl.FeatureStore, folder: Path) -> float:
    """Seconds to open a store of 10 million tokens, made of links to one shard; the best of five."""
    shard = store.manifest.shards[0]
    shards = [replace(shard, file=f"shard-{i:05d}.safetensors") for i in range(-(-N_OPENED // shard.n_tokens))]
    folder.mkdir()
    for link in shards:
        os.link(store.folder / shard.file, folder / link.file)
    n_entries = store.manifest.n_entries * len(shards)
    replace(store.manifest, shards=tuple(shards), n_entries=n_entries).save(folder)
    assert len(sl.FeatureStore.load(folder)) >= N_OPENED
    return min(seconds(lambda: sl.FeatureStore.load(folder))[0] for _ in range(5))


def sort_by_feature(turns: int, d_sae: int = 24576, n: int = 65536, k: int = 32) -> float:
    """Entries a second from by-token to by-feature, one shard."""
    rng = np.random.default_rng(0)
    latents = np.sort(rng.integers(0, d_sae // k, (n, k)) + np.arange(k) * (d_sae // k), axis=1).ravel()
    values = rng.standard_normal(n * k).astype(np.float16)
    offsets = np.arange(n + 1, dtype=np.int32) * k
    packed = latents.astype(np.uint16)
    times = [seconds(lambda: pack_codes(offsets, packed, values, d_sae))[0] for _ in range(turns + 1)]
    return n * k / median(times[1:])


def compare_pages(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Both libraries by turns, each turn in a process of its own."""
    model, tokens, hook_point = load(args)
    activation = {"topk": sl.TopK(k=args.k), "jumprelu": sl.JumpReLU(target_l0=float(args.k))}[args.activation]
    sae = sl.SAE(sl.SAEConfig(d_in=model.cfg.d_model, d_sae=args.d_sae, activation=activation))
    job = Job.make(model, tokens, hook_point, sae, args.features)
    job.save(folder)
    runs: dict[str, list[dict[str, float]]] = {"saelab": []}
    if importlib.util.find_spec("sae_dashboard"):
        runs["SAEDashboard"] = []
    else:
        print("SAEDashboard is not installed here; `--help` says how to.")
    for turn in range(args.page_turns):
        for name, results in runs.items():
            results.append(serve_apart(name, folder))
            took = f"{results[-1]['total']:.1f} s, {results[-1]['cpu']:.1f} s of CPU"
            print(f"{name}, turn {turn + 1} of {args.page_turns}: {took}", file=sys.stderr, flush=True)
    made = {name: {key: median(run[key] for run in results) for key in results[0]} for name, results in runs.items()}
    return {"n_tokens": tokens.n_tokens, "features": len(job.features), "kind": args.activation, "runs": runs, **made}


def serve_apart(name: str, folder: Path) -> dict[str, float]:
    """One turn of a library in a fresh process."""
    command = [sys.executable, __file__, *sys.argv[1:], "--one", name, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True)
    found = [line for line in done.stdout.splitlines() if line.startswith(MARK)]
    if done.returncode or not found:
        sys.exit(f"{name} failed with exit code {done.returncode}:\n{done.stderr[-3000:]}")
    answer: dict[str, float] = json.loads(found[-1].removeprefix(MARK))
    return answer


def serve(name: str, folder: Path, args: argparse.Namespace) -> dict[str, float]:
    """Warm up, then do the whole job: seconds, and the most memory held meanwhile (Linux)."""
    job = Job.load(folder, sl.load_model(args.model, progress=False))
    status = Path("/proc/self/status")
    with tempfile.TemporaryDirectory() as out:
        for part, work in (("warmup", job.short()), ("whole", job)):
            Path(out, part).mkdir()
            if status.is_file():
                Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
            start = time.process_time()
            answer = MAKERS[name](work, Path(out, part))
    answer |= {"total": answer["data"] + answer["pages"], "cpu": time.process_time() - start}
    if status.is_file():
        peak = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        answer["peak_gib"] = int(peak.split()[1]) / 2**20
    return answer


def table(result: dict[str, Any]) -> str:
    """What was measured, and its goal."""
    lines = [f"threads {result['threads']}, torch {result['torch']}, d_sae {result['d_sae']}"]
    if parts := result.get("parts"):
        lines += [
            f"harvest: {parts['tokens_per_s']:,.0f} tokens/s, {parts['n_tokens']:,} tokens",
            f"  {parts['ratio']:.2f} times forward and encode (goal 1.25), {parts['cpu_ratio']:.2f} of CPU time",
            f"  {parts['bytes_per_token']:.0f} bytes a token",
            f"by feature: {parts['entries_per_s'] / 1e6:.0f} million entries/s (goal 40)",
            f"opening a store of 10 million tokens: {1000 * parts['open_seconds']:.1f} ms (goal 100)",
        ]
    if pages := result.get("pages"):
        lines.append(f"pages of {pages['features']:,} features, {pages['n_tokens']:,} tokens, {pages['kind']}; seconds")
        keys = ("data", "pages", "total", "cpu", "peak_gib")
        lines.append(f"  {'':<14}" + "".join(f"{key:>10}" for key in keys) + f"{'x total':>10}{'x cpu':>8}{'l0':>9}")
        for name in pages["runs"]:
            row, own = pages[name], pages["saelab"]
            cells = "".join(f"{row.get(key, float('nan')):>10.1f}" for key in keys)
            ratios = f"{row['total'] / own['total']:>10.1f}{row['cpu'] / own['cpu']:>8.1f}"
            lines.append(f"  {name:<14}{cells}{ratios}{row['l0']:>9.3f}")
    return "\n".join(lines)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(STORIES) if STORIES.is_dir() else "tales")
    parser.add_argument("--n-tokens", type=int, default=200_000)
    parser.add_argument("--d-sae", type=int, default=4096)
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--turns", type=int, default=5, help="of harvest and its parts, after one that is not timed")
    parser.add_argument("--features", type=int, default=1000, help="pages made")
    parser.add_argument("--page-turns", type=int, default=3, help="0 leaves the pages out")
    parser.add_argument("--activation", choices=["topk", "jumprelu"], default="topk", help="of the SAE of the pages")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path)
    parser.add_argument("--one", nargs=2, metavar=("LIBRARY", "FOLDER"), help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    args = parse()
    torch.set_num_threads(args.threads)
    if args.one:
        print(MARK + json.dumps(serve(args.one[0], Path(args.one[1]), args)))
        return
    result: dict[str, Any] = {"threads": args.threads, "torch": torch.__version__, "d_sae": args.d_sae}
    if args.turns:
        result["parts"] = compare_parts(args)
        print(table(result), file=sys.stderr, flush=True)
    if args.page_turns:
        with tempfile.TemporaryDirectory() as folder:
            result["pages"] = compare_pages(args, Path(folder))
    print(table(result))
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()

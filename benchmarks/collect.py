"""Speed of collecting against a bare Hugging Face forward, and of the ring buffer against SAELens's mixing buffer.

    .venv-bench/bin/python benchmarks/collect.py --json runs/collect.json

Both sides of a ratio do the same work with the same threads, turn about. Processes differ by as much as a tenth (how
the memory of each happens to be laid out), and turns by more, so collecting is measured in several processes and the
median of their medians counts; the CPU time of all threads drifts least. The bare forward is Hugging Face's own model
stopped after the same layer, whose result is thrown away; collecting also masks, checks, converts and writes it to
disk. Each buffer runs in processes of its own, so that its peak memory is its own too (Linux). `make bench` makes the
environment with SAELens; without it only the first half runs.
"""

import argparse
import importlib.util
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor, nn

from saelab.collecting.collection import collect
from saelab.lm.models import Backend, describe_model, load_model, tiny_model
from saelab.lm.tokens import Tokens, tokenize
from saelab.stores.shuffling import RingBuffer

DATA = Path(__file__).resolve().parents[1] / ".." / "shared" / "data"
COLLECT_GOAL, SPEED_GOAL, MEMORY_GOAL = 0.9, 5.0, 1.0


class Stop(Exception):
    """Ends the bare forward."""


def build(args: argparse.Namespace) -> tuple[Any, nn.Module, Tokens, str]:
    """saelab's model, Hugging Face's own with the same weights, the tokens, and a name."""
    folder = DATA / "stories260k"
    if args.model == "stories260k" and folder.is_dir():
        from transformers import AutoModelForCausalLM

        model = load_model(folder, device=args.device, backend=args.backend)
        bare = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True).to(args.device).eval()
        text = DATA / "tinystories" / "tinystories.txt"
        return model, bare, tokenize(model, text, ctx_len=128, n_tokens=args.n_tokens or 393_216), "stories260k"
    bare = gpt2_like(args.layer + 2).to(args.device)
    tokenizer = tiny_model(architecture="gpt2").tokenizer
    model = load_model(bare, tokenizer=tokenizer, backend=args.backend)
    text = ["Once upon a time there was a cat who could count. " * 40] * 2000
    return model, bare, tokenize(model, text, ctx_len=128, n_tokens=args.n_tokens or 16_384), "gpt2-like"


def gpt2_like(n_layers: int) -> nn.Module:
    """A random model of GPT-2 small's width and vocabulary."""
    from transformers import GPT2Config, GPT2LMHeadModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return GPT2LMHeadModel(GPT2Config(n_layer=n_layers)).eval()


def run_bare(bare: Any, tokens: Tokens, layer: int, n_seq: int) -> None:
    """Hugging Face's forward up to the end of a layer, batch by batch."""

    def stop(*_: Any) -> None:
        raise Stop

    base = getattr(bare, bare.base_model_prefix)
    handle = (base.h if hasattr(base, "h") else base.layers)[layer].register_forward_hook(stop)
    device = next(bare.parameters()).device
    try:
        for start in range(0, len(tokens), n_seq):
            ids = tokens.ids[start : start + n_seq].long().to(device)
            try:
                bare(ids, use_cache=False)
            except Stop:
                continue
    finally:
        handle.remove()


def seconds(work: Callable[[], Any], device: str) -> tuple[float, float]:
    """Wall time of one call, and the CPU time of all its threads."""
    start, start_cpu = time.perf_counter(), time.process_time()
    work()
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return time.perf_counter() - start, time.process_time() - start_cpu


@torch.no_grad()
def collect_by_turns(args: argparse.Namespace) -> dict[str, Any]:
    """Tokens a second of `collect` to a folder and of the bare forward, in this process."""
    model, bare, tokens, name = build(args)
    hook_point, n_seq = f"blocks.{args.layer}.hook_resid_post", max(1, 4096 // 128)

    def ours(folder: str) -> None:
        collect(model, tokens, hook_point, folder, batch_size=n_seq, progress=False)

    def theirs() -> None:
        run_bare(bare, tokens, args.layer, n_seq)

    turns = []
    for _ in range(args.repeats + 1):
        with tempfile.TemporaryDirectory() as folder:
            turns.append((seconds(partial(ours, folder), args.device), seconds(theirs, args.device)))
    del turns[0]  # a warm-up
    collected, bare_forward = ([turn[side] for turn in turns] for side in (0, 1))
    return {
        "model": name,
        "backend": describe_model(model).backend,
        "n_tokens": tokens.n_tokens,
        "collect_tokens_per_s": tokens.n_tokens / statistics.median(wall for wall, _ in collected),
        "forward_tokens_per_s": tokens.n_tokens / statistics.median(wall for wall, _ in bare_forward),
        "ratio": statistics.median(theirs[0] / ours[0] for ours, theirs in turns),
        "ratio_of_cpu": sum(cpu for _, cpu in bare_forward) / sum(cpu for _, cpu in collected),
    }


def compare_collecting(args: argparse.Namespace) -> dict[str, Any]:
    """`collect_by_turns` in several processes: the median of each number, and the ratio of every process."""
    results = [run_worker("collect") for _ in range(args.processes)]
    numbers = [key for key, value in results[0].items() if isinstance(value, float)]
    medians = {key: statistics.median(result[key] for result in results) for key in numbers}
    return results[0] | medians | {"ratios": sorted(result["ratio"] for result in results)}


def run_worker(kind: str) -> dict[str, Any]:
    """What a fresh process measures."""
    command = [sys.executable, __file__, "--worker", kind, *sys.argv[1:]]
    found: dict[str, Any] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return found


def ring_batches(capacity: int, batch_size: int, chunk: Tensor) -> Iterator[Tensor]:
    """Batches from saelab's ring buffer, fed with the same chunk for ever."""
    ring = RingBuffer(capacity, chunk.shape[1])
    while True:
        if ring.half_empty:
            while ring.n_free >= len(chunk):
                ring.add(chunk)
        yield ring.sample(batch_size)


def mixing_batches(capacity: int, batch_size: int, chunk: Tensor) -> Iterator[Tensor]:
    """Batches from SAELens's mixing buffer, fed alike."""
    from sae_lens.training.mixing_buffer import mixing_buffer

    def chunks() -> Iterator[Tensor]:
        while True:
            yield chunk

    return mixing_buffer(capacity, batch_size, chunks())


def serve(kind: str, args: argparse.Namespace) -> dict[str, float]:
    """Run one buffer in this process: tokens a second once it is full, and by how much memory grew at the peak."""
    chunk = torch.randn(args.batch_size, args.d_in, generator=torch.Generator().manual_seed(0))
    make = ring_batches if kind == "ring" else mixing_batches
    next(make(2 * args.batch_size, args.batch_size, chunk))  # what is imported on first use is no part of the buffer
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    before = resident("VmRSS")
    batches = make(args.buffer_rows, args.batch_size, chunk)
    next(batches)
    n_batches = 2 * args.buffer_rows // args.batch_size
    start = time.perf_counter()
    for _ in range(n_batches):
        next(batches)
    elapsed = time.perf_counter() - start
    return {"tokens_per_s": n_batches * args.batch_size / elapsed, "peak_gib": resident("VmHWM") - before}


def resident(key: str) -> float:
    """A line of this process's memory status, in GiB."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) / 2**20


def compare_buffers(args: argparse.Namespace) -> dict[str, Any]:
    """Both buffers, turn about, each time in a fresh process."""
    runs: dict[str, list[dict[str, float]]] = {"ring": [], "mixing": []}
    for _ in range(args.buffer_repeats):
        for kind, results in runs.items():
            results.append(run_worker(kind))
    ours, theirs = (
        {key: statistics.median(run[key] for run in results) for key in results[0]} for results in runs.values()
    )
    return {
        "buffer_rows": args.buffer_rows,
        "batch_size": args.batch_size,
        "d_in": args.d_in,
        "ring": ours,
        "mixing_buffer": theirs,
        "speed_ratio": ours["tokens_per_s"] / theirs["tokens_per_s"],
        "memory_ratio": ours["peak_gib"] / theirs["peak_gib"],
    }


def table(result: dict[str, Any]) -> str:
    """What was measured, and its goal."""
    rows = []
    if made := result.get("collect"):
        numbers = f"{made['collect_tokens_per_s']:,.0f} / {made['forward_tokens_per_s']:,.0f} tokens/s"
        rows.append((f"collect / bare forward, {made['model']}", numbers, made["ratio"], f">= {COLLECT_GOAL}"))
        spread = ", ".join(f"{ratio:.2f}" for ratio in made["ratios"])
        rows.append((f"  {len(made['ratios'])} processes: {spread}", "", made["ratio"], ""))
        rows.append(("  CPU time of all threads", "", made["ratio_of_cpu"], ""))
    if made := result.get("buffers"):
        ours, theirs = made["ring"], made["mixing_buffer"]
        speeds = f"{ours['tokens_per_s']:,.0f} / {theirs['tokens_per_s']:,.0f} tokens/s"
        rows.append(("ring / mixing buffer, speed", speeds, made["speed_ratio"], f">= {SPEED_GOAL}"))
        memory = f"{ours['peak_gib']:.2f} / {theirs['peak_gib']:.2f} GiB"
        rows.append(("ring / mixing buffer, peak memory", memory, made["memory_ratio"], f"<= {MEMORY_GOAL}"))
    lines = [f"{'':<36} {'measured':>32} {'ratio':>7} {'goal':>8}"]
    return "\n".join(
        lines + [f"{what:<36} {numbers:>32} {ratio:>7.2f} {goal:>8}" for what, numbers, ratio, goal in rows]
    )


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="stories260k", choices=["stories260k", "gpt2-like"])
    parser.add_argument("--layer", type=int, default=2)
    parser.add_argument("--n-tokens", type=int, help="default: 131072, or 16384 for gpt2-like")
    parser.add_argument("--repeats", type=int, default=4)
    parser.add_argument("--processes", type=int, default=7)
    parser.add_argument("--buffer-repeats", type=int, default=3)
    parser.add_argument("--buffer-rows", type=int, default=131_072)
    parser.add_argument("--batch-size", type=int, default=4096)
    parser.add_argument("--d-in", type=int, default=768)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--backend", default="auto", choices=get_args(Backend))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--worker", choices=["collect", "ring", "mixing"], help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    """Measure, print the table, write JSON."""
    args = parse()
    torch.set_num_threads(args.threads)
    if args.worker:
        print(json.dumps(collect_by_turns(args) if args.worker == "collect" else serve(args.worker, args)))
        return
    result: dict[str, Any] = {"threads": args.threads, "torch": torch.__version__, "collect": compare_collecting(args)}
    if importlib.util.find_spec("sae_lens"):
        result["buffers"] = compare_buffers(args)
    else:
        print(
            "SAELens is not installed here, so the ring buffer is not compared. `make bench` makes .venv-bench with it."
        )
    print(table(result))
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()

"""Seconds and memory of one full training step on a GPU, with Triton's kernels and with PyTorch's operations alone.

    python benchmarks/gpu.py --activations topk,matryoshka --json runs/gpu.json
    python benchmarks/gpu.py --device cpu --tiny

Every (activation, way) runs in a process of its own, on the same data, weights and sizes: "plain" with SAELAB_TRITON=0,
"triton" without. The products of a step are timed likewise, those of one way in one process. Next to the times stand
the losses of the first step, which must agree up to rounding; where they do not, the exit code is 1. Times are medians
of several steps after warm-up.

On a CPU "triton" is Triton's interpreter, which shows that everything runs and agrees; its times mean nothing.
"""

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

from peers import N_STEPS, Sizes

WAYS = ("plain", "triton")
ACTIVATIONS = ("topk", "abstopk", "batchtopk", "matryoshka")
TINY = Sizes(n=16, d_in=16, d_sae=8192, k=4)  # as wide as a dictionary must be to be searched without its whole product
AGREEMENT = 1e-3  # relative difference of losses; those of float32 sums in another order differ by less
MARK = "measured: "


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", help="default: cuda")
    parser.add_argument("--tiny", action="store_true", help="sizes that take seconds anywhere, in place of the others")
    parser.add_argument("--n", type=int, default=4096, help="tokens in a step (default 4096)")
    parser.add_argument("--d-in", type=int, default=768, help="width of the activations (default 768)")
    parser.add_argument("--d-sae", type=int, default=24576, help="latents of the SAE (default 24576)")
    parser.add_argument("--k", type=int, default=32, help="latents kept for a token (default 32)")
    parser.add_argument("--activations", default=",".join(ACTIVATIONS), help="default: %(default)s")
    parser.add_argument("--repeats", type=int, default=20, help="timed calls, after 5 that are not (default 20)")
    parser.add_argument("--seed", type=int, default=0, help="of data and weights (default 0)")
    parser.add_argument("--json", type=Path, help="write the rows here too")
    parser.add_argument("--one", nargs=2, metavar=("WHAT", "WAY"), help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if args.tiny:
        args.n, args.d_in, args.d_sae, args.k = TINY.n, TINY.d_in, TINY.d_sae, TINY.k
        args.repeats = 1
    return args


def sizes_of(args: argparse.Namespace) -> Sizes:
    return Sizes(args.n, args.d_in, args.d_sae, args.k)


def training_step(activation: str, args: argparse.Namespace) -> Callable[[], float]:
    """One step of saelab's training loop on random data; each call returns the loss of its step."""
    import torch

    from saelab.sae.activation_functions import make_activation
    from saelab.sae.config import SAEConfig
    from saelab.sae.sae import SAE
    from saelab.sae.training_sae import TrainingSAE
    from saelab.stores.activations import Activations
    from saelab.training.config import TrainConfig
    from saelab.training.loop import TrainingRun

    sizes, nested = sizes_of(args), activation == "matryoshka"
    chosen = make_activation("topk" if nested else activation, k=sizes.k)
    prefixes = sizes.prefixes if nested else None
    cfg = SAEConfig(d_in=sizes.d_in, d_sae=sizes.d_sae, activation=chosen, prefixes=prefixes)
    trainee = TrainingSAE(SAE(cfg, seed=args.seed).to(args.device), TrainConfig(n_tokens=N_STEPS * sizes.n))
    x = torch.randn(sizes.n, sizes.d_in, generator=torch.Generator().manual_seed(args.seed))
    batch, settings = x.to(args.device), TrainConfig(n_tokens=N_STEPS * sizes.n, batch_size=sizes.n, seed=args.seed)
    trainee.prepare(batch)
    run = TrainingRun([trainee], Activations.from_tensor(x).batches(sizes.n), settings, None, None)

    def step() -> float:
        before = sum(float(total) for key, total in run._sums.items() if key != "l0")
        run.check_finite(batch)
        run.train_on(batch)
        return sum(float(total) for key, total in run._sums.items() if key != "l0") - before

    return step


def products(args: argparse.Namespace) -> dict[str, Callable[[], float]]:
    """The products of a step on random codes, by name; each call returns the sum of the result's magnitudes."""
    import torch

    from saelab.functional.metrics import nested_error
    from saelab.functional.sparse_products import Entries, gather_sum, sampled_dot, weight_gradient
    from saelab.functional.topk import search_topk

    sizes, data = sizes_of(args), torch.Generator().manual_seed(args.seed)
    x, W = (torch.randn(n, sizes.d_in, generator=data).to(args.device) for n in (sizes.n, sizes.d_sae))
    values = torch.randn(sizes.n * sizes.k, generator=data).to(args.device)
    indices = torch.randint(sizes.d_sae, (sizes.n * sizes.k,), generator=data).to(args.device)
    rows = torch.arange(sizes.n, device=args.device).repeat_interleave(sizes.k)
    offsets = torch.arange(sizes.n + 1, device=args.device) * sizes.k
    entries = Entries(indices, rows, offsets).with_columns(sizes.d_sae)
    parts = torch.randn(len(sizes.prefixes), sizes.n, sizes.d_in, generator=data).to(args.device)

    def sized(call: Callable[[], Any]) -> Callable[[], float]:
        return lambda: float(call().double().abs().sum())

    calls = {
        "gather_sum": lambda: gather_sum(indices, values, offsets, W),
        "sampled_dot": lambda: sampled_dot(rows, indices, x, W, entries.order),
        "weight_gradient": lambda: weight_gradient(entries, values, x, sizes.d_sae),
        "nested_error": lambda: nested_error(x, parts)[0],
        "search_topk": lambda: search_topk(x, W, W[:, 0].contiguous(), sizes.k, signed=True).values,
    }
    return {name: sized(call) for name, call in calls.items()}


def interpret() -> None:
    """Let the library take Triton's kernels for tensors of the CPU."""
    from saelab.functional import codes, screening, triton_choice

    for module in (codes, screening, triton_choice):
        module.use_triton = lambda *tensors: True  # type: ignore[attr-defined]


def measure(what: str, way: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Seconds, peak memory and first result of one subject, or of all products, in this process."""
    import torch

    from saelab.functional import triton_choice

    on_gpu = torch.device(args.device).type == "cuda"
    if way == "triton" and not on_gpu:
        interpret()
    used = triton_choice.use_triton(torch.ones(1, device=args.device))
    if used != (way == "triton"):
        raise RuntimeError(f"Way '{way}' must {'' if way == 'triton' else 'not '}use Triton here, and does otherwise.")
    runs = products(args) if what == "products" else {what: training_step(what, args)}
    rows, warmup = [], 4 if on_gpu else 0  # and the first call
    for name, run in runs.items():
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
        result, seconds = run(), []
        for _ in range(warmup + args.repeats):
            start = time.perf_counter()
            run()  # reads its result, so that the device has finished
            seconds.append(time.perf_counter() - start)
        peak = torch.cuda.max_memory_allocated() / 2**30 if on_gpu else None
        row = {"what": name, "way": way, "seconds": median(seconds[warmup:])}
        rows.append({**row, "peak_gib": peak, "result": result})
    return rows


def ask(what: str, way: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    """`measure` in a process of its own; an error where it fails."""
    environment = {**os.environ, "SAELAB_TRITON": "0" if way == "plain" else "1"}
    if way == "triton" and args.device == "cpu":
        environment["TRITON_INTERPRET"] = "1"
    command = [sys.executable, __file__, *sys.argv[1:], "--one", what, way]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith(MARK)]
    if done.returncode or not lines:
        error = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        return [{"what": what, "way": way, "error": error[:200]}]
    rows: list[dict[str, Any]] = json.loads(lines[-1].removeprefix(MARK))
    return rows


def compare(rows: list[dict[str, Any]]) -> list[str]:
    """What failed, or gave another result than PyTorch's operations."""
    found = [f"{row['what']} ({row['way']}): {row['error']}" for row in rows if "error" in row]
    plain = {row["what"]: row["result"] for row in rows if row["way"] == "plain" and "error" not in row}
    for row in rows:
        if row["way"] == "triton" and "error" not in row and row["what"] in plain:
            expected = plain[row["what"]]
            if not abs(row["result"] - expected) <= AGREEMENT * abs(expected):
                found.append(f"{row['what']}: {row['result']:.6g} by Triton, {expected:.6g} by PyTorch")
    return found


def table(rows: list[dict[str, Any]]) -> str:
    head = f"{'what':<16} {'way':<8} {'ms':>10} {'peak GiB':>9} {'first result':>14}"
    lines = [head, "-" * len(head)]
    for row in rows:
        if "error" in row:
            lines.append(f"{row['what']:<16} {row['way']:<8} failed: {row['error']}")
            continue
        peak = "-" if row["peak_gib"] is None else f"{row['peak_gib']:.2f}"
        ms = 1000 * row["seconds"]
        lines.append(f"{row['what']:<16} {row['way']:<8} {ms:10.3f} {peak:>9} {row['result']:14.7g}")
    return "\n".join(lines)


def main() -> None:
    args = parse()
    if args.one:
        what, way = args.one
        print(MARK + json.dumps(measure(what, way, args)), flush=True)
        return
    activations = [name.strip() for name in args.activations.split(",")]
    if unknown := [name for name in activations if name not in ACTIVATIONS]:
        sys.exit(f"--activations must be among {', '.join(ACTIVATIONS)}; got {', '.join(unknown)}.")
    ways = WAYS if importlib.util.find_spec("triton") else ("plain",)
    if ways == ("plain",):
        print("triton is not installed here: PyTorch's operations alone are timed.")
    rows = []
    for what in (*activations, "products"):
        print(f"{what} ...", file=sys.stderr, flush=True)
        rows += [row for way in ways for row in ask(what, way, args)]
    rows.sort(key=lambda row: str(row["what"]))
    print(f"device={args.device} " + " ".join(f"{name}={value}" for name, value in asdict(sizes_of(args)).items()))
    print(table(rows))
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        settings = {**asdict(sizes_of(args)), "device": args.device, "repeats": args.repeats, "seed": args.seed}
        args.json.write_text(json.dumps({"settings": settings, "rows": rows}, indent=2) + "\n")
    if found := compare(rows):
        sys.exit("\n".join(found))


if __name__ == "__main__":
    main()

"""Peak memory beyond weights of training steps, and their time: Adam's moments in 32 and in 16 bits, and another build.

    python benchmarks/training_memory.py --before ../saelab-before
    python benchmarks/training_memory.py --d-sae 131072 --activations topk,batchtopk --turns 3

Every build and setting runs in a process of its own, which makes an SAE and a batch, and takes steps as a training run
does. Memory is the process's peak (VmHWM of Linux) less what it holds before the first step: the program, the weights
and the batches. Builds and settings take turns; times are medians over the steps after the first two of all turns.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
MARK = "measured: "


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--activations", default="topk", help="separated by commas (default %(default)s)")
    parser.add_argument("--n", type=int, default=4096, help="tokens in a step (default 4096)")
    parser.add_argument("--d-in", type=int, default=768, help="width of the activations (default 768)")
    parser.add_argument("--d-sae", default="24576,131072", help="units of the SAE (default %(default)s)")
    parser.add_argument("--k", type=int, default=32, help="units kept for a token (default 32)")
    parser.add_argument("--bits", default="32,16", help="of a moment of Adam in this build (default %(default)s)")
    parser.add_argument("--steps", type=int, default=6, help="steps of a turn (default 6)")
    parser.add_argument("--turns", type=int, default=2, help="turns (default 2)")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="torch threads (default: all processors)")
    parser.add_argument("--before", type=Path, help="checkout of another build")
    parser.add_argument("--json", type=Path, help="write the rows here too")
    parser.add_argument("--one", nargs=3, metavar=("ACTIVATION", "D_SAE", "BITS"), help=argparse.SUPPRESS)
    return parser.parse_args()


def resident(name: str) -> float:
    """VmRSS or VmHWM of this process in GiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:")) / 2**20


def measure(activation: str, d_sae: int, bits: int, args: argparse.Namespace) -> dict[str, Any]:
    """Peak beyond what is there before the first step, in GiB, and seconds of the steps."""
    import torch

    from peers import Sizes, saelab

    torch.set_num_threads(args.threads)
    data = torch.Generator().manual_seed(0)
    batches = [torch.randn(args.n, args.d_in, generator=data) for _ in range(3)]
    subject = saelab(
        activation, Sizes(args.n, args.d_in, d_sae, args.k), **({} if bits == 32 else {"optim_bits": bits})
    )
    before, seconds = resident("VmRSS"), []
    for i in range(args.steps):
        start = time.perf_counter()
        subject.step(batches[i % len(batches)])
        seconds.append(time.perf_counter() - start)
    return {"gib": resident("VmHWM") - before, "seconds": seconds[2:]}


def run(checkout: Path, *setting: object) -> dict[str, Any]:
    """The measurement in a process of its own, on another checkout's package."""
    environment = {**os.environ, "PYTHONPATH": str(checkout)}
    command = [sys.executable, __file__, *sys.argv[1:], "--one", *map(str, setting)]
    output = subprocess.run(command, env=environment, text=True, check=True, stdout=subprocess.PIPE).stdout
    found: dict[str, Any] = json.loads(output.split(MARK)[1])
    return found


def main() -> None:
    args = parse()
    if args.one:
        activation, d_sae, bits = args.one
        print(MARK + json.dumps(measure(activation, int(d_sae), int(bits), args)))
        return
    subjects = [(f"this build, {bits} bits", ROOT, int(bits)) for bits in args.bits.split(",")]
    subjects += [("before", args.before.resolve(), 32)] if args.before else []
    rows = []
    print(f"N={args.n} d_in={args.d_in} k={args.k} threads={args.threads}")
    print(f"{'activation':<12}{'d_sae':>8}  {'build':<22}{'weights GiB':>12}{'beyond GiB':>12}{'s/step':>9}")
    for activation in args.activations.split(","):
        for d_sae in map(int, args.d_sae.split(",")):
            turns = [[run(at, activation, d_sae, bits) for _, at, bits in subjects] for _ in range(args.turns)]
            for (name, _, bits), found in zip(subjects, zip(*turns, strict=True), strict=True):
                row = {
                    "activation": activation,
                    "d_sae": d_sae,
                    "build": name,
                    "bits": bits,
                    "weights_gib": 2 * 4 * d_sae * args.d_in / 2**30,
                    "beyond_gib": max(turn["gib"] for turn in found),
                    "seconds": median(second for turn in found for second in turn["seconds"]),
                }
                rows.append(row)
                print(
                    f"{activation:<12}{d_sae:>8}  {name:<22}{row['weights_gib']:>12.2f}{row['beyond_gib']:>12.2f}"
                    f"{row['seconds']:>9.3f}",
                    flush=True,
                )
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()

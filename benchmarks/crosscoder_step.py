"""Seconds of a crosscoder's training step, of two sources and more, against an SAE of the summed width.

    python benchmarks/crosscoder_step.py
    python benchmarks/crosscoder_step.py --d-in 256 --d-sae 4096 --sources 2,4

A step reads its batch from the activations (of a crosscoder side by side, of the SAE in one tensor) and is one of the
training loop. The rows take turns of a few steps each. A ratio is the median over turns of that to the SAE's turn.
"""

import argparse
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch

import saelab as sl
from saelab.sae.activation_functions import make_activation
from saelab.sae.objectives import AuxK, ReconstructionLoss
from saelab.sae.training_sae import TrainingSAE
from saelab.training.config import TrainConfig
from saelab.training.loop import TrainingRun


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=4096, help="tokens in a step (default 4096)")
    parser.add_argument("--d-in", type=int, default=1536, help="width of all sources together (default 1536)")
    parser.add_argument("--d-sae", type=int, default=24576, help="latents (default 24576)")
    parser.add_argument("--k", type=int, default=32, help="latents kept for a token (default 32)")
    parser.add_argument("--activations", default="batchtopk,topk", help="of %(default)s")
    parser.add_argument("--sources", default="2", help="numbers of sources (default %(default)s)")
    parser.add_argument("--steps", type=int, default=2, help="steps of a turn (default 2)")
    parser.add_argument("--turns", type=int, default=5, help="timed turns, after one that is not (default 5)")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="torch threads (default: all processors)")
    parser.add_argument("--json", type=Path, help="write the rows here too")
    return parser.parse_args()


def make_step(
    args: argparse.Namespace, x: torch.Tensor, activation: str, n: int, encode_from: str
) -> Callable[[], None]:
    """One step of the training loop, its batch read from n sources; 1 is an SAE."""
    widths = [args.d_in // n] * n
    if n == 1:
        acts = sl.Activations.from_tensor(x)
    else:
        parts = (part.contiguous() for part in x.split(widths, dim=1))
        acts = sl.Activations.join({str(i): sl.Activations.from_tensor(part) for i, part in enumerate(parts)})
    cfg = sl.SAEConfig(
        d_in=args.d_in,
        d_sae=args.d_sae,
        activation=make_activation(activation, k=args.k),
        objective=(ReconstructionLoss(), AuxK()),
        sources=acts.sources,
        encode_from=encode_from,  # type: ignore[arg-type]
    )
    run_cfg = TrainConfig(n_tokens=1000 * args.n, batch_size=args.n)
    trainee = TrainingSAE(sl.SAE(cfg, seed=0), run_cfg)
    trainee.prepare(x[: args.n])
    batches = acts.batches(args.n, seed=0, buffer_tokens=len(x))
    run = TrainingRun([trainee], batches, run_cfg, None, None)

    def step() -> None:
        batch = next(batches)
        run.check_finite(batch)
        run.train_on(batch)

    return step


def measure(args: argparse.Namespace, activation: str) -> list[dict[str, Any]]:
    """A row for the SAE and one for each crosscoder."""
    x = torch.randn(4 * args.n, args.d_in, generator=torch.Generator().manual_seed(0))
    kinds = {"SAE of the summed width": (1, "all")}
    for n in map(int, args.sources.split(",")):
        kinds |= {f"crosscoder, {n} sources": (n, "all"), f"crosscoder, any of {n} sources": (n, "any")}
    steps = {name: make_step(args, x, activation, *kind) for name, kind in kinds.items()}
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(args.turns + 1):
        for name, step in steps.items():
            start = time.perf_counter()
            for _ in range(args.steps):
                step()
            if turn:
                seconds[name].append((time.perf_counter() - start) / args.steps)
    plain = next(iter(seconds.values()))
    return [
        {
            "activation": activation,
            "kind": name,
            "seconds": median(own),
            "ratio": median(mine / sae for mine, sae in zip(own, plain, strict=True)),
        }
        for name, own in seconds.items()
    ]


def main() -> None:
    args = parse()
    torch.set_num_threads(args.threads)
    rows = [row for activation in args.activations.split(",") for row in measure(args, activation)]
    print(f"{args.n} tokens, d_in {args.d_in}, d_sae {args.d_sae}, k {args.k}, {args.threads} threads")
    for row in rows:
        print(f"{row['activation']:10}  {row['kind']:30}  {row['seconds']:.3f} s  {row['ratio']:.3f}")
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()

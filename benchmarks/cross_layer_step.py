"""Seconds of a cross-layer transcoder's training step, against those of a transcoder for each layer, added up.

    python benchmarks/cross_layer_step.py
    python benchmarks/cross_layer_step.py --layers 12 --d-in 256 --d-sae 4096 --turns 3

Both have the same latents a layer and codes a token, in the sparse step, and read their batches from activations of all
layers. A cross-layer transcoder of L layers has L (L + 1) / 2 decoders where L transcoders have L: `weights` is the
ratio of all weights. The rows take turns of a few steps each; a ratio is the median over turns.
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
from saelab.sae import CLT, CLTConfig, TrainingCLT, TrainingSAE
from saelab.sae.activation_functions import make_activation
from saelab.stores.activations import ActivationPairs
from saelab.training.config import TrainConfig
from saelab.training.loop import TrainingRun


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=4096, help="tokens in a step (default 4096)")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--d-in", type=int, default=512, help="width of a layer (default 512)")
    parser.add_argument("--d-sae", type=int, default=8192, help="latents of a layer (default 8192)")
    parser.add_argument("--k", type=int, default=32, help="latents of a layer kept for a token (default 32)")
    parser.add_argument("--activations", default="topk,batchtopk", help="of %(default)s")
    parser.add_argument("--steps", type=int, default=2, help="steps of a turn (default 2)")
    parser.add_argument("--turns", type=int, default=5, help="timed turns, after one that is not (default 5)")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="torch threads (default: all processors)")
    parser.add_argument("--json", type=Path, help="write the rows here too")
    return parser.parse_args()


def make_step(trainee: Any, pairs: ActivationPairs, cfg: TrainConfig) -> Callable[[], None]:
    """One step of the training loop on batches of these pairs."""
    trainee.prepare(pairs[: cfg.batch_size])
    batches = pairs.batches(cfg.batch_size, seed=0, buffer_tokens=len(pairs))
    run = TrainingRun([trainee], batches, cfg, None, None)

    def step() -> None:
        batch = next(batches)
        run.check_finite(batch)
        run.train_on(batch)

    return step


def measure(args: argparse.Namespace, name: str) -> dict[str, Any]:
    """Seconds of both, their ratio, and that of their weights."""
    generator = torch.Generator().manual_seed(0)
    sides = [torch.randn(2 * args.n, args.layers * args.d_in, generator=generator) for _ in range(2)]
    activation, cfg = make_activation(name, k=args.k), TrainConfig(n_tokens=1000 * args.n, batch_size=args.n)
    clt = CLT(CLTConfig(n_layers=args.layers, d_in=args.d_in, d_sae=args.d_sae, activation=activation), seed=0)
    joint = make_step(TrainingCLT(clt, cfg), join_pairs(sides), cfg)
    alone = []
    for i in range(args.layers):
        columns = slice(i * args.d_in, (i + 1) * args.d_in)
        of_layer = sl.SAEConfig(d_in=args.d_in, d_out=args.d_in, d_sae=args.d_sae, activation=activation)
        trainee = TrainingSAE(sl.SAE(of_layer, seed=i), cfg)
        alone.append(make_step(trainee, join_pairs([side[:, columns].contiguous() for side in sides]), cfg))
    seconds: dict[str, list[float]] = {"joint": [], "alone": []}
    for turn in range(args.turns + 1):
        for kind, steps in (("joint", [joint]), ("alone", alone)):
            start = time.perf_counter()
            for _ in range(args.steps):
                for step in steps:
                    step()
            if turn:
                seconds[kind].append((time.perf_counter() - start) / args.steps)
    pairs = zip(seconds["joint"], seconds["alone"], strict=True)
    return {
        "activation": name,
        **{kind: median(own) for kind, own in seconds.items()},
        "ratio": median(one / other for one, other in pairs),
        "weights": (args.layers + 3) / 4,  # (L + L (L + 1) / 2) / (2 L)
    }


def join_pairs(sides: list[torch.Tensor]) -> ActivationPairs:
    """Pairs of inputs and targets."""
    return ActivationPairs(*(sl.Activations.from_tensor(side) for side in sides))


def main() -> None:
    args = parse()
    torch.set_num_threads(args.threads)
    rows = [measure(args, name) for name in args.activations.split(",")]
    print(f"{args.n} tokens, layers {args.layers}, d_in {args.d_in}, d_sae {args.d_sae}, k {args.k}")
    for row in rows:
        print(
            f"{row['activation']:10}  cross-layer {row['joint']:.3f} s, each layer {row['alone']:.3f} s: "
            f"{row['ratio']:.2f} times, weights {row['weights']:.2f} times"
        )
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()

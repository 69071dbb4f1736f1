"""Refined encoders (one step of LISTA) on a planted world with correlations and trees, against one linear pass.

MCC, F1 and FVU of `score_recovery` for TopK and Matryoshka dictionaries, with k annealed from four times its value over
the first half of the run or not. All dictionaries of a seed see the same batches.
"""

import argparse
import time

import saelab as sl
from objectives.shared import format_table
from saelab.synthetic import PlantedConfig, PlantedWorld
from saelab.universality import score_recovery

BATCH = 2048


def describe(command: argparse.ArgumentParser) -> None:
    command.add_argument("--n-features", type=int, default=1024)
    command.add_argument("--d-in", type=int, default=128)
    command.add_argument("--k", type=int, default=16)
    command.add_argument("--n-roots", type=int, default=8)
    command.add_argument("--steps", type=float, nargs="+", default=[0.3], help="steps of the refinement")


def measure(args: argparse.Namespace) -> None:
    rows: dict[str, list[dict[str, float]]] = {}
    m = args.n_features
    for seed in args.seeds:
        world = PlantedWorld(
            PlantedConfig(n_features=m, d_in=args.d_in, l0=float(args.k), n_roots=args.n_roots), seed=seed
        )
        for nested in (None, (m // 16, m // 4, m)):
            for annealed in (None, sl.Schedule(start=4.0, end=1.0, until=0.5)):
                for step in (None, *args.steps):
                    name = "Matryoshka" if nested else "TopK"
                    name += (", annealed" if annealed else "") + (f", refined {step:g}" if step else "")
                    began = time.perf_counter()
                    cfg = sl.SAEConfig(
                        d_in=args.d_in,
                        d_sae=m,
                        activation=sl.TopK(k=args.k),
                        prefixes=nested,
                        sparsity_schedule=annealed,
                        encoder=sl.sae.Refined(step=step) if step else "linear",
                    )
                    run = sl.TrainConfig(n_tokens=args.n_tokens, batch_size=BATCH, seed=seed)
                    sae = sl.SAE(cfg, seed).fit(world.batches(BATCH, seed=seed), run, progress=False)
                    found = score_recovery(sae, world, n_tokens=20_000)["SAE"]
                    figures = {name: getattr(found, name) for name in ("mcc", "f1", "fvu")}
                    rows.setdefault(name, []).append(figures | {"seconds": time.perf_counter() - began})
                    print(name, seed, rows[name][-1], flush=True)
    print(f"{args.n_tokens:,} tokens, {m} features in {args.d_in} dimensions, {args.k} a token")
    print(format_table(rows))

"""A planted world of any size, streamed: what SAEs find of its features, beside rows that are not trained freely.

MCC (over the rows of the dictionary, where there are fewer than features), F1, FVU and dead latents of `score_recovery`
on other tokens. The default is the size of SynthSAEBench (arXiv:2602.14687): 16,384 features in 768 dimensions, read by
4,096 latents.
"""

import argparse
import time

import saelab as sl
from objectives.shared import format_table
from saelab.sae import SoftFrozen
from saelab.synthetic import PlantedConfig, PlantedWorld
from saelab.universality import score_recovery


def describe(command: argparse.ArgumentParser) -> None:
    command.add_argument("--n-features", type=int, default=16_384)
    command.add_argument("--d-in", type=int, default=768)
    command.add_argument("--d-sae", type=int, default=4096)
    command.add_argument("--l0", type=float, default=32.0)
    command.add_argument("--k", type=int, default=32)
    command.add_argument("--batch-size", type=int, default=512)
    command.add_argument("--n-measured", type=int, default=20_000, help="tokens to measure on")


def measure(args: argparse.Namespace) -> None:
    rows: dict[str, list[dict[str, float]]] = {}
    plain = {"d_in": args.d_in, "d_sae": args.d_sae}
    nested = (args.d_sae // 16, args.d_sae // 4, args.d_sae)
    configs = {
        "TopK": sl.SAEConfig(**plain, activation=sl.TopK(k=args.k)),
        "BatchTopK": sl.SAEConfig(**plain, activation=sl.BatchTopK(k=args.k)),
        "Matryoshka": sl.SAEConfig(**plain, activation=sl.BatchTopK(k=args.k), prefixes=nested),
        "soft-frozen": sl.SAEConfig(**plain, activation=sl.TopK(k=args.k), dictionary=SoftFrozen()),
    }
    for seed in args.seeds:
        world = PlantedWorld(PlantedConfig(n_features=args.n_features, d_in=args.d_in, l0=args.l0), seed=seed)
        for name, cfg in configs.items():
            began = time.perf_counter()
            run = sl.TrainConfig(n_tokens=args.n_tokens, batch_size=args.batch_size, seed=seed)
            sae = sl.SAE(cfg, seed).fit(world.batches(args.batch_size, seed=seed), run, progress=False)
            found = score_recovery(sae, world, n_tokens=args.n_measured)
            for which, row in {name: found["SAE"], "untrained": found["untrained"]}.items():
                if which == "untrained" and name != "TopK":
                    continue
                figures = {key: getattr(row, key) for key in ("mcc", "f1", "uniqueness", "fvu", "l0", "dead_frac")}
                rows.setdefault(which, []).append(figures)
            print(name, seed, rows[name][-1], f"{time.perf_counter() - began:.0f} s", flush=True)
    print(f"{args.n_features:,} features in {args.d_in} dimensions, l0 {args.l0}; {args.d_sae:,} latents, k {args.k}")
    print(f"{args.n_tokens:,} tokens, {args.n_measured:,} others measured")
    print(format_table(rows))

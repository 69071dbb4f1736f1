"""Stability across seeds: the default, strict order, and cores of recurring features that begin new runs.

`matched` is the mean cosine of one-to-one pairs of decoder directions (`seed_stability`), each seed with batches of its
own; `null` that of random dictionaries with the same second moments. Strict order is `RandomPrefixes(smallest=1)`: any
prefix may be drawn, so that each latent has a place of its own (arXiv:2512.02194); `first` is `matched` of the first
sixteenth of the latents, and `same place` the cosine of latents of equal index there.

A core is what three runs of other seeds share. Two are found from seeds that have nothing in common, and each begins a
new run; `matched` is then between a run of the one and a run of the other, as within one core it would be 1 by design.
`control` begins with as many latents of one run, drawn at random.
"""

import argparse
from collections.abc import Sequence
from itertools import combinations

import numpy as np
import torch

import saelab as sl
from objectives.shared import N_HELD_OUT, format_table, tales_activations, train
from saelab.sae import start_from_core
from saelab.sae.fitting import measure as measure_fvu
from saelab.universality import find_core, seed_stability

COLUMNS = ("matched", "null", "FVU", "first", "same place")


def describe(command: argparse.ArgumentParser) -> None:
    command.add_argument("--k", type=int, default=16)
    command.add_argument("--d-sae", type=int, default=512)
    command.add_argument("--threshold", type=float, default=0.5)
    command.add_argument("--keep", type=float, default=1.0)


def compare(a: sl.SAE, b: sl.SAE, held_out: torch.Tensor) -> dict[str, float]:
    """Agreement of two dictionaries, and their mean FVU."""
    found, n = seed_stability([a, b]), a.cfg.d_sae // 16
    rows = [torch.nn.functional.normalize(sae.directions()[:n], dim=1) for sae in (a, b)]
    values = (
        found.trained.matched.mean(),
        found.matched_random.matched.mean(),
        np.mean([measure_fvu(sae, held_out)["fvu"] for sae in (a, b)]),
        found.trained.features[:, :n].mean(),
        (rows[0] * rows[1]).sum(1).mean(),
    )
    return dict(zip(COLUMNS, map(float, values), strict=True))


def measure(args: argparse.Namespace) -> None:
    acts = tales_activations()
    held_out, sample = acts[len(acts) - N_HELD_OUT :], acts[:8192]
    orders = {
        "random from 16, n 5": sl.RandomPrefixes(n=5, smallest=16),
        "strict order, n 5": sl.RandomPrefixes(n=5, smallest=1),
        "strict order, n 16": sl.RandomPrefixes(n=16, smallest=1),
    }

    def runs(prefixes: sl.RandomPrefixes | None, seeds: Sequence[int]) -> list[sl.SAE]:
        cfg = sl.SAEConfig(d_in=acts.d_in, d_sae=args.d_sae, activation=sl.TopK(k=args.k), prefixes=prefixes)
        return [train({"": cfg}, acts, seed, args.n_tokens)[""] for seed in seeds]

    def begin(sae: sl.SAE, core: Sequence[int], keep: float | None, seed: int) -> sl.SAE:
        run = sl.TrainConfig(n_tokens=args.n_tokens, batch_size=2048, seed=seed, n_held_out=N_HELD_OUT)
        return start_from_core(sae, core, sample, keep=keep, seed=seed).fit(acts, run, progress=False)

    first, second = args.seeds, [seed + 100 for seed in args.seeds]
    groups = runs(None, first), runs(None, second)
    rows = {"default": [compare(a, b, held_out) for a, b in combinations(groups[0], 2)]}
    cores = [find_core(saes, threshold=args.threshold) for saes in groups]
    drawn = [np.random.default_rng(i).permutation(args.d_sae)[: len(core)].tolist() for i, core in enumerate(cores)]
    print(f"TopK(k={args.k}), {args.n_tokens:,} tokens of tales a run, {N_HELD_OUT:,} held out, d_sae {args.d_sae}")
    print(
        f"cores of {[len(core) for core in cores]} latents, found by all of {len(first)} runs at {args.threshold}",
        flush=True,
    )
    kinds = {"core, kept": (cores, args.keep), "core, initial only": (cores, None), "control, kept": (drawn, args.keep)}
    for name, (chosen, keep) in kinds.items():
        for seed in first:
            a, b = (begin(groups[g][0], chosen[g], keep, 200 + 2 * seed + g) for g in (0, 1))
            rows.setdefault(name, []).append(compare(a, b, held_out))
    print(format_table(rows), flush=True)
    rows = {}
    for name, prefixes in orders.items():
        rows[name] = [compare(a, b, held_out) for a, b in combinations(runs(prefixes, first), 2)]
    print(format_table(rows))

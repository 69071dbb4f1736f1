"""Reconstruction at several k: one SAE for all of them, against an SAE trained at each.

FVU on held-out tokens of tales at each k, by `SAE.with_k`. `apart` is the SAE trained at that k, `plain` the one
trained at the largest, read at the others; the bar is FVU within .02 of `apart` (arXiv:2505.24473).
"""

import argparse

import saelab as sl
from objectives.shared import N_HELD_OUT, format_table, tales_activations, train
from saelab.sae.activation_functions import make_activation
from saelab.sae.fitting import measure as measure_fvu
from saelab.sae.objectives import HierarchicalLoss, MultiTopKLoss


def describe(command: argparse.ArgumentParser) -> None:
    command.add_argument("--ks", type=int, nargs="+", default=[8, 16, 32])
    command.add_argument("--d-sae", type=int, default=1024)
    command.add_argument("--activation", default="topk", choices=["topk", "abstopk", "batchtopk"])


def measure(args: argparse.Namespace) -> None:
    acts, (low, *_, high) = tales_activations(), args.ks
    held_out, sample = acts[len(acts) - N_HELD_OUT :], acts[: N_HELD_OUT // 2]

    def config(k: int, loss: sl.ReconstructionLoss) -> sl.SAEConfig:
        activation = make_activation(args.activation, k=k)
        return sl.SAEConfig(d_in=acts.d_in, d_sae=args.d_sae, activation=activation, objective=(loss, sl.AuxK()))

    configs = {f"k {k}": config(k, sl.ReconstructionLoss()) for k in args.ks}
    configs |= {
        "MultiTopK": config(low, MultiTopKLoss(ks=(low, high), weights=(1, 1 / 8))),
        "Hierarchical": config(high, HierarchicalLoss(ks=tuple(args.ks))),
    }
    rows: dict[str, list[dict[str, float]]] = {}
    for seed in args.seeds:
        saes = train(configs, acts, seed, args.n_tokens)

        def read(sae: sl.SAE, k: int) -> float:
            return measure_fvu(sae.with_k(k, sample), held_out)["fvu"]

        table = {"apart": {k: read(saes[f"k {k}"], k) for k in args.ks}}
        for name in (f"k {low}", f"k {high}", "MultiTopK", "Hierarchical"):
            table[name] = {k: read(saes[name], k) for k in args.ks}
        for name, figures in table.items():
            rows.setdefault(name, []).append({f"FVU at {k}": value for k, value in figures.items()})
    print(f"{args.activation}, {args.n_tokens:,} tokens of tales, {N_HELD_OUT:,} held out, d_sae {args.d_sae}")
    print(format_table(rows))

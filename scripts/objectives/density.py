"""Do penalties on a latent's mean (FLOPs, arXiv:2004.05665) leave fewer dense latents than L1 does, at equal FVU?

SAEs of tales at several coefficients: FVU and L0 on held-out tokens, the share of latents that fire on more than a
tenth of them, the share of all firings that those have, and dead latents. `log1p` has codes log(1 + max(u, 0)), as
SPLADE does. Every row of a penalty is read beside the row of L1 with the nearest FVU.
"""

import argparse

import saelab as sl
from objectives.shared import N_HELD_OUT, format_table, tales_activations, train
from saelab.analysis.density import DENSE_RATE
from saelab.sae import Activation, Log1pReLU
from saelab.sae.objectives import FLOPsPenalty


def describe(command: argparse.ArgumentParser) -> None:
    command.add_argument("--d-sae", type=int, default=512)
    command.add_argument("--k", type=int, default=16)
    command.add_argument("--batch-size", type=int, default=512)
    command.add_argument("--l1", type=float, nargs="+", default=[0.003, 0.01, 0.03, 0.1])
    command.add_argument("--flops", type=float, nargs="+", default=[0.003, 0.03, 0.3, 3.0])
    command.add_argument("--on-topk", type=float, nargs="+", default=[0.01, 0.1, 1.0])


def measure(args: argparse.Namespace) -> None:
    acts = tales_activations()
    held_out = acts[len(acts) - N_HELD_OUT :]
    plain = {"d_in": acts.d_in, "d_sae": args.d_sae}

    def config(activation: Activation, flops: float | None = None) -> sl.SAEConfig:
        penalty = () if flops is None else (FLOPsPenalty(coefficient=flops),)
        objective = (sl.ReconstructionLoss(), sl.AuxK(), *penalty)
        return sl.SAEConfig(**plain, activation=activation, objective=objective)

    configs = {f"L1 {c:g}": config(sl.ReLU(coefficient=c)) for c in args.l1}
    for c in args.flops:
        configs[f"FLOPs {c:g}"] = config(sl.ReLU(coefficient=0.0), c)
        configs[f"log1p, FLOPs {c:g}"] = config(Log1pReLU(coefficient=0.0), c)
    configs["TopK"] = config(sl.TopK(k=args.k))
    configs |= {f"TopK, FLOPs {c:g}": config(sl.TopK(k=args.k), c) for c in args.on_topk}
    rows: dict[str, list[dict[str, float]]] = {}
    for seed in args.seeds:
        for name, sae in train(configs, acts, seed, args.n_tokens, args.batch_size).items():
            codes, error = sae.encode(held_out).detach(), held_out - sae(held_out).detach()
            rates = (codes != 0).float().mean(0)
            dense = rates > DENSE_RATE
            figures = {
                "FVU": float(error.square().sum() / (held_out - held_out.mean(0)).square().sum()),
                "L0": float(rates.sum()),
                "dense": float(dense.float().mean()),
                "of firings": float(rates[dense].sum() / rates.sum()),
                "dead": float((rates == 0).float().mean()),
            }
            rows.setdefault(name, []).append(figures)
    print(f"{args.n_tokens:,} tokens of tales, {N_HELD_OUT:,} held out, d_sae {args.d_sae}")
    print(format_table(rows))

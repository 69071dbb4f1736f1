"""TopK as a JumpReLU: L0 and FVU on held-out tokens before and after `SAE.to_jumprelu`.

`one threshold` is the same with a common threshold of all latents that keeps the mean L0, the baseline; of BatchTopK,
which has one already, `per latent` equals it.
"""

import argparse

import torch

import saelab as sl
from objectives.shared import N_HELD_OUT, format_table, tales_activations, train
from saelab.sae.activation_functions import make_activation
from saelab.sae.fitting import cut_to, mean_l0, measure as measure_fvu


def describe(command: argparse.ArgumentParser) -> None:
    command.add_argument("--k", type=int, default=16)
    command.add_argument("--d-sae", type=int, default=1024)


def share_threshold(sae: sl.SAE, sample: torch.Tensor) -> sl.SAE:
    """The same SAE with one threshold for all latents, at the L0 that it has on the sample."""
    jump, l0 = sae.to_jumprelu(sample), mean_l0(sae, sample)
    with torch.no_grad():
        jump.threshold.fill_(float(jump.threshold.median()))
    assert cut_to(jump, sample, l0)
    return jump


def measure(args: argparse.Namespace) -> None:
    acts = tales_activations()
    held_out, sample = acts[len(acts) - N_HELD_OUT :], acts[:N_HELD_OUT]
    names = ("topk", "abstopk", "batchtopk")
    configs = {
        name: sl.SAEConfig(d_in=acts.d_in, d_sae=args.d_sae, activation=make_activation(name, k=args.k))
        for name in names
    }
    rows: dict[str, list[dict[str, float]]] = {}
    for seed in args.seeds:
        for name, sae in train(configs, acts, seed, args.n_tokens).items():
            ways = {name: sae, f"{name}, per latent": sae.to_jumprelu(sample)}
            ways[f"{name}, one threshold"] = share_threshold(sae, sample)
            for way, each in ways.items():
                found = measure_fvu(each, held_out)
                rows.setdefault(way, []).append({"L0": found["l0"], "FVU": found["fvu"]})
    print(f"{args.n_tokens:,} tokens of tales, {N_HELD_OUT:,} held out, d_sae {args.d_sae}, k {args.k}")
    print(format_table(rows))

"""Classical dictionaries against AbsTopK of the same width, as codes become dense: a complete orthogonal dictionary.

Bernoulli-Gaussian codes of each density; the table has the mean |cos| of planted rows with their one-to-one partners.
AbsTopK trains d_sae = d_in latents with k the mean number of codes of a token; the others see the same activations.
"""

import argparse

import torch

import saelab as sl
from objectives.shared import format_table
from saelab.universality.seed_comparison import match_rows

METHODS = ("l3", "l4", "ica", "orthogonal", "pca", "random")


def describe(command: argparse.ArgumentParser) -> None:
    command.add_argument("--d-in", type=int, default=64)
    command.add_argument("--densities", type=float, nargs="+", default=[0.1, 0.3, 0.5])
    command.add_argument("--n-rows", type=int, default=20_000, help="distinct activations")
    command.add_argument("--ksvd", action="store_true", help="K-SVD, too, which takes minutes")


def measure(args: argparse.Namespace) -> None:
    rows: dict[str, list[dict[str, float]]] = {}
    for seed in args.seeds:
        scores: dict[str, dict[str, float]] = {}
        for density in args.densities:
            truth, x = plant(args.d_in, args.n_rows, density, seed)
            k = max(1, round(density * args.d_in))
            saes = {
                name: sl.sae.fit_dictionary(x, name, k=k, n_tokens=args.n_rows, seed=seed)
                for name in (*METHODS, *(["ksvd"] if args.ksvd else []))
            }
            cfg = sl.SAEConfig(d_in=args.d_in, d_sae=args.d_in, activation=sl.AbsTopK(k=k))
            run = sl.TrainConfig(n_tokens=args.n_tokens, batch_size=1024, seed=seed, n_held_out=0)
            saes["AbsTopK"] = sl.SAE(cfg, seed=seed).fit(x, run, progress=False)
            for name, sae in saes.items():
                cosines, _, _ = match_rows(sae.directions().numpy(), truth.numpy(), signed=True)
                scores.setdefault(name, {})[f"|cos| at {density:g}"] = float(cosines.mean())
        for name, figures in scores.items():
            rows.setdefault(name, []).append(figures)
    print(f"d_in {args.d_in}, {args.n_rows:,} activations; AbsTopK trained on {args.n_tokens:,} tokens")
    print(format_table(rows, digits=4))


def plant(d: int, n: int, density: float, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Orthonormal rows, and activations that are sparse sums of them."""
    generator = torch.Generator().manual_seed(1_000 + seed)
    truth = torch.linalg.qr(torch.randn(d, d, generator=generator))[0]
    codes = (torch.rand(n, d, generator=generator) < density) * torch.randn(n, d, generator=generator)
    return truth, codes @ truth

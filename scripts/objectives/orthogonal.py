"""A penalty on similar decoder rows: coherence and absorption of parents, on a planted hierarchy and on tales.

`coherence` is the mean over rows of the largest |cosine| with another. `parent recall` is the share of tokens with a
child concept on which the parent's feature fires: on the planted world the latent nearest to the parent's direction, on
tales the best classifier of the parent on training stories, with its F1 beside it. All BatchTopK.
"""

import argparse

import torch

import saelab as sl
from objectives.shared import N_HELD_OUT, format_table, labeled_activations, score, tales_activations, train
from saelab.sae.fitting import measure as measure_fvu
from saelab.sae.objectives import OrthogonalLoss
from saelab.synthetic import PlantedConfig, PlantedWorld
from saelab.universality.planted_recovery import score_recovery
from saelab.universality.seed_comparison import measure_directions


def describe(command: argparse.ArgumentParser) -> None:
    command.add_argument("world", choices=["planted", "tales"])
    command.add_argument("--coefficients", type=float, nargs="+", default=[0.05, 0.25, 1.0])
    command.add_argument("--k", type=int, default=12)
    command.add_argument("--d-sae", type=int, default=512)
    command.add_argument("--n-stories", type=int, default=300, help="of tales, to score on")


def configs(d_in: int, args: argparse.Namespace) -> dict[str, sl.SAEConfig]:
    """The plain one, Matryoshka as the known remedy, and the penalty at some weights and in chunks."""

    def config(*terms: sl.sae.objectives.LossTerm, prefixes: tuple[int, ...] | None = None) -> sl.SAEConfig:
        objective = (sl.ReconstructionLoss(), sl.AuxK(), *terms)
        activation = sl.BatchTopK(k=args.k)
        return sl.SAEConfig(d_in=d_in, d_sae=args.d_sae, activation=activation, prefixes=prefixes, objective=objective)

    found = {"BatchTopK": config(), "Matryoshka": config(prefixes=(args.d_sae // 16, args.d_sae // 4, args.d_sae))}
    for c in args.coefficients:
        found[f"orthogonal {c:g}"] = config(OrthogonalLoss(coefficient=c))
    found[f"orthogonal {c:g}, chunk 64"] = config(OrthogonalLoss(coefficient=c, chunk=64))
    return found


def planted_recall(sae: sl.SAE, world: PlantedWorld, x: torch.Tensor, z: torch.Tensor) -> float:
    """Mean over parents of the share of tokens with one of its children on which its latent fires."""
    parents = torch.from_numpy(world.parents)
    latents = (world.directions @ torch.nn.functional.normalize(sae.directions(), dim=1).T).abs().argmax(1)
    fires, found = sae.encode_sparse(x).to_dense() != 0, []
    for parent in parents[parents >= 0].unique():
        has_child = (z[:, parents == parent] != 0).any(1)
        if has_child.sum() >= 10:
            found.append(fires[has_child, latents[parent]].float().mean())
    return float(torch.stack(found).mean())


def measure(args: argparse.Namespace) -> None:
    rows: dict[str, list[dict[str, float]]] = {}
    if args.world == "tales":
        acts = tales_activations()
        x, labels = labeled_activations(args.n_stories, ("root", "class", "word"))
    for seed in args.seeds:
        if args.world == "planted":
            cfg = PlantedConfig(n_features=args.d_sae, d_in=96, l0=args.k, n_roots=16, branching=4, depth=2)
            world = PlantedWorld(cfg, seed=seed)
            acts = sl.Activations.from_tensor(world.sample(300_000, (seed, 1))[0])
            x, codes = world.sample(20_000, (seed, 2))
        held_out = acts[len(acts) - N_HELD_OUT :]
        for name, sae in train(configs(acts.d_in, args), acts, seed, args.n_tokens).items():
            found = measure_fvu(sae, held_out)
            figures = {
                "FVU": found["fvu"],
                "L0": found["l0"],
                "coherence": measure_directions(sae.directions()).crowding,
            }
            if args.world == "planted":
                recovery = score_recovery(sae, world, n_tokens=20_000)["SAE"]
                recall = planted_recall(sae, world, x, codes.to_dense())
                figures |= {"parent recall": recall, "F1": recovery.f1, "MCC": recovery.mcc}
            else:
                scores = score(sae, x, labels)
                figures |= {"parent recall": scores.parent_recall, "parent F1": scores.parent_f1}
            rows.setdefault(name, []).append(figures)
    print(f"{args.world}, BatchTopK(k={args.k}), {args.n_tokens:,} tokens, {N_HELD_OUT:,} held out, d_sae {args.d_sae}")
    print(format_table(rows))

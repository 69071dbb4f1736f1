"""Sparsity penalties on planted atoms: p-annealing and gates against L1, JumpReLU and TopK.

128 atoms in 64 dimensions, 4 active in a token with codes in [.5, 1.5], noise .1 in every dimension. `F1` is that of
which atoms are active, read from the latent nearest to each atom, with all other codes counted as wrong. Figures are of
fresh tokens. `c` is a fixed coefficient; the others are steered to the target L0. `falling` is a target L0 that starts
at twice its end.
"""

import argparse
import warnings

import torch

import saelab as sl
from objectives.shared import format_table
from saelab.sae import Gated
from saelab.sae.fitting import measure as measure_fvu
from saelab.sae.objectives import LossTerm, LpPenalty

D_IN, N_ATOMS, N_ACTIVE, N_TRAIN, N_FRESH = 64, 128, 4, 100_000, 20_000


def describe(command: argparse.ArgumentParser) -> None:
    command.add_argument("--target", type=float, default=5.0, help="L0 to steer to")


def plant(n: int, seed: int, atoms: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Activations, and the codes that they were made of."""
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.rand(n, N_ATOMS, generator=generator).topk(N_ACTIVE).indices
    z = torch.zeros(n, N_ATOMS).scatter_(1, chosen, 0.5 + torch.rand(n, N_ACTIVE, generator=generator))
    return z @ atoms + 0.1 * torch.randn(n, D_IN, generator=generator), z


def score(sae: sl.SAE, x: torch.Tensor, z: torch.Tensor, atoms: torch.Tensor) -> float:
    """F1 of the active atoms."""
    fires = sae.encode(x).detach() != 0
    nearest = (torch.nn.functional.normalize(sae.directions(), dim=1) @ atoms.T).argmax(0)
    found = int((fires[:, nearest] & (z != 0)).sum())
    return 2 * found / (int(fires.sum()) + int((z != 0).sum()))


def measure(args: argparse.Namespace) -> None:
    target, run_steps = args.target, args.n_tokens // 512
    falling = sl.Schedule(start=2.0, end=1.0, since=0.3, until=0.9)
    ways: dict[str, tuple[sl.sae.Activation, tuple[LossTerm, ...], sl.Schedule | None]] = {
        f"L1, c {c}": (sl.ReLU(coefficient=c), (), None) for c in (0.02, 0.035, 0.05)
    }
    ways |= {f"p-annealing, c {c}": (sl.ReLU(coefficient=c), (LpPenalty(),), None) for c in (0.01, 0.02)}
    ways |= {
        "L1": (sl.ReLU(target_l0=target), (), None),
        "L1, falling": (sl.ReLU(target_l0=target), (), falling),
        "p-annealing, falling": (sl.ReLU(target_l0=target), (LpPenalty(),), falling),
        "Gated": (Gated(target_l0=target), (), None),
        "Gated, p-annealing": (Gated(target_l0=target), (LpPenalty(),), falling),
        "JumpReLU": (sl.JumpReLU(target_l0=target), (), None),
        "TopK": (sl.TopK(k=round(target)), (), None),
    }
    rows: dict[str, list[dict[str, float]]] = {}
    for seed in args.seeds:
        drawn = torch.randn(N_ATOMS, D_IN, generator=torch.Generator().manual_seed(1000 + seed))
        atoms = torch.nn.functional.normalize(drawn, dim=1)
        x, (fresh, z) = plant(N_TRAIN, seed, atoms)[0], plant(N_FRESH, 2000 + seed, atoms)
        for name, (activation, terms, schedule) in ways.items():
            cfg = sl.SAEConfig(
                d_in=D_IN,
                d_sae=N_ATOMS,
                activation=activation,
                objective=(sl.ReconstructionLoss(), *terms, sl.AuxK()),
                sparsity_schedule=schedule,
            )
            run = sl.TrainConfig(n_tokens=run_steps * 512, batch_size=512, seed=seed)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # a target that is missed shows in the table
                sae = sl.SAE(cfg, seed=seed).fit(x, run, progress=False)
            found = measure_fvu(sae, fresh)
            f1 = score(sae, fresh, z, atoms)
            rows.setdefault(name, []).append({"L0": found["l0"], "FVU": found["fvu"], "F1": f1})
    print(f"{run_steps} steps of 512 tokens, {N_FRESH:,} fresh tokens")
    print(format_table(rows))

"""Masked reconstruction: planted atoms kept by dictionaries that are wider than the truth (arXiv:2302.12715).

The paper's recipe: 200 random atoms in 100 dimensions, 5 a sample, noise of the signal's norm, 1,000 samples, codes by
orthogonal matching pursuit. A dictionary starts at the atoms and random samples, or at samples alone; the table has how
many atoms have a row with |cos| above .9, and the mean of 1 - |cos| over atoms.
"""

import argparse
import time

import torch

import saelab as sl
from objectives.shared import format_table
from saelab.sae.objectives import MaskedLoss

D, N_ATOMS, K, N_SAMPLES, BATCH = 100, 200, 5, 1000, 200


def describe(command: argparse.ArgumentParser) -> None:
    command.add_argument("--epochs", type=int, default=60)
    command.add_argument("--widths", type=int, nargs="+", default=[200, 400, 800])
    command.add_argument("--starts", nargs="+", default=["atoms", "samples"], choices=["atoms", "samples"])


def measure(args: argparse.Namespace) -> None:
    losses = {"standard": sl.ReconstructionLoss(), "masked": MaskedLoss()}
    rows: dict[str, list[dict[str, float]]] = {}
    for seed in args.seeds:
        atoms, x = _plant(seed)
        for start in args.starts:
            for width in args.widths:
                for name, loss in losses.items():
                    began = time.perf_counter()
                    found = _find(atoms, x, width, start, loss, args.epochs, seed)
                    figures = found | {"seconds": time.perf_counter() - began}
                    rows.setdefault(f"{start} {width} {name}", []).append(figures)
    print(f"{args.epochs} epochs of {N_SAMPLES:,} samples, {N_ATOMS} atoms in {D} dimensions, {K} a sample")
    print(format_table(rows))


def _plant(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(1000 + seed)
    atoms = torch.nn.functional.normalize(torch.randn(N_ATOMS, D, generator=g))
    support = torch.rand(N_SAMPLES, N_ATOMS, generator=g).topk(K).indices
    codes = torch.nn.functional.normalize(torch.randn(N_SAMPLES, K, generator=g))
    signal = torch.zeros(N_SAMPLES, N_ATOMS).scatter(1, support, codes) @ atoms
    return atoms, signal + torch.randn(N_SAMPLES, D, generator=g) / D**0.5


def _find(
    atoms: torch.Tensor, x: torch.Tensor, width: int, start: str, loss: sl.ReconstructionLoss, epochs: int, seed: int
) -> dict[str, float]:
    cfg = sl.SAEConfig(
        d_in=D,
        d_sae=width,
        activation=sl.AbsTopK(k=K),
        encoder=sl.OrthogonalMatchingPursuit(),
        normalizer="none",
        objective=(loss,),
    )
    sae = sl.SAE(cfg, seed)
    samples = torch.nn.functional.normalize(x[torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))])
    with torch.no_grad():
        sae.W_dec.copy_(torch.cat([atoms, samples] if start == "atoms" else [samples])[:width])
    sae.training_ = {}  # goes on from these weights
    run = sl.TrainConfig(
        n_tokens=epochs * N_SAMPLES, batch_size=BATCH, lr=1e-3, warmup_frac=0, decay_frac=0, n_held_out=0, seed=seed
    )
    nearest = (atoms @ sae.fit(x, run, progress=False).W_dec.detach().T).abs().amax(1)
    return {"|cos| > .9": float((nearest > 0.9).float().mean()), "1 - |cos|": float(1 - nearest.mean())}

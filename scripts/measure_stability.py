"""How much of a dictionary comes back from another seed: TopK against archetypal dictionaries at equal k.

    python scripts/measure_stability.py tales
    python scripts/measure_stability.py PATH/TO/stories260k --text PATH/TO/tinystories.txt

Several seeds of each kind (arXiv:2502.12892), twice over: each seed with batches of its own, and all with the same
batches, where dictionaries that start from the data start from the same tokens, or points. `start` is the stability
that they have before the first step: what training adds to it, or takes away, is the rest.
"""

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

import saelab as sl
from saelab.lm.model_checks import Model
from saelab.sae.fitting import make_run
from saelab.synthetic.tales import generate_stories
from saelab.universality.seed_comparison import measure_usage

FIRST_STORY = 50_000_000  # beyond those that the models of tales were trained on
N_HELD_OUT = 30_000
COLUMNS = (
    "fvu", "dead", "start", "matched", "alike", "nearest", "alike", "found", "space", "ood", "stable", "effect.",
    "coher.", "crowd.",
)  # fmt: skip


def read_tokens(model: Model, text: Path | None, n_tokens: int) -> sl.Tokens:
    """Packed text, or stories."""
    if text is not None:
        return sl.tokenize(model, text, ctx_len=128, n_tokens=n_tokens)
    return generate_stories(n_tokens // 155, first=FIRST_STORY).tokens()


def families(d_in: int, args: argparse.Namespace) -> dict[str, sl.SAEConfig]:
    """What is compared, by name."""
    activation = sl.AbsTopK(k=args.k) if args.signed else sl.TopK(k=args.k)
    plain = sl.SAEConfig(d_in=d_in, d_sae=args.d_sae, activation=activation)
    found = {"unit": plain, "unit, from tokens": replace(plain, init="data")}
    for delta in args.deltas:
        found[f"archetypal {delta:g}"] = replace(plain, dictionary=sl.Archetypal(n_points=args.n_points, delta=delta))
    return found


def begin(cfg: sl.SAEConfig, x: torch.Tensor, runs: Sequence[sl.TrainConfig]) -> list[sl.SAE]:
    """The SAEs as training starts from them."""
    saes = [sl.SAE(cfg, seed=seed) for seed in range(len(runs))]
    for sae, run in zip(saes, runs, strict=True):
        make_run([sae], x, run, None, None, False).prepare()
    return saes


def measure(cfg: sl.SAEConfig, x: torch.Tensor, held_out: torch.Tensor, runs: Sequence[sl.TrainConfig]) -> str:
    """A row of the table: one SAE a run, each from its own seed."""
    saes = [sl.SAE(cfg, seed=seed).fit(x, run, progress=False) for seed, run in enumerate(runs)]
    found = sl.universality.seed_stability(saes, held_out)
    start = sl.universality.seed_stability(begin(cfg, x, runs)).trained.matched.mean()
    used = [np.mean([getattr(one, name) for one in found.usage]) for name in ("fvu", "dead_frac")]
    return row([*used, start, *agreement(found), *shape(found.figures)])


def agreement(found: sl.universality.SeedStability) -> list[float]:
    trained, alike = found.trained, found.matched_random
    numbers = (trained.matched, alike.matched, trained.nearest, alike.nearest, trained.found, trained.overlap)
    return [float(one.mean()) for one in numbers]


def shape(figures: Sequence) -> list[float]:
    names = ("ood", "stable_rank", "effective_rank", "coherence", "crowding")
    return [float(np.mean([getattr(one, name) for one in figures])) for name in names]


def measure_chance(cfg: sl.SAEConfig, x: torch.Tensor, held_out: torch.Tensor, run: sl.TrainConfig) -> str:
    """The same of random directions, the encoder tied to them."""
    saes = begin(cfg, x, [run, run])
    used = measure_usage(saes[0], sl.Activations.from_tensor(held_out))
    found = sl.universality.seed_stability(saes, held_out)
    random, nan = found.random, float("nan")
    chance = [random.matched.mean(), nan, random.nearest.mean(), nan, random.found.mean(), random.overlap.mean()]
    return row([used.fvu, used.dead_frac, random.matched.mean(), *chance, *shape([found.random_figures])])


def row(values: Sequence[float]) -> str:
    return "".join(
        "       -" if np.isnan(value) else f"{value:8.1f}" if value > 9 else f"{value:8.3f}" for value in values
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a model of tales, a Hub id or a folder")
    parser.add_argument("--text", type=Path, help="default: stories generated for the models of tales")
    parser.add_argument("--hook-point", default="blocks.2.hook_resid_post")
    parser.add_argument("--n-collected", type=int, default=300_000, help="tokens of text")
    parser.add_argument("--n-tokens", type=int, default=400_000, help="tokens each is trained on")
    parser.add_argument("--d-sae", type=int, default=512)
    parser.add_argument("--k", type=int, default=16)
    parser.add_argument("--signed", action="store_true", help="AbsTopK in the place of TopK")
    parser.add_argument("--deltas", type=float, nargs="+", default=[0.1])
    parser.add_argument("--n-points", type=int, help="default: as many as latents")
    parser.add_argument("--n-seeds", type=int, default=4)
    args = parser.parse_args()
    model = sl.load_model(args.model)
    acts = sl.collect(model, read_tokens(model, args.text, args.n_collected), args.hook_point, progress=False)
    x, held_out = acts[: len(acts) - N_HELD_OUT], acts[len(acts) - N_HELD_OUT :]
    print(
        f"{args.model}, {args.hook_point}: {len(x):,} tokens, trained on {args.n_tokens:,}, measured on "
        f"{N_HELD_OUT:,}; d_in {acts.d_in}, d_sae {args.d_sae}, k {args.k}, {args.n_seeds} seeds"
    )
    run = sl.TrainConfig(n_tokens=args.n_tokens)
    kinds = families(acts.d_in, args)
    print(f"{'':<20}" + "".join(f"{name:>8}" for name in COLUMNS))
    print(f"{'random directions':<20}" + measure_chance(kinds["unit"], x, held_out, run), flush=True)
    for title, shared in (("batches of their own", False), ("the same batches", True)):
        print(title)
        for name, cfg in kinds.items():
            runs = [replace(run, seed=0 if shared else seed) for seed in range(args.n_seeds)]
            print(f"  {name:<18}" + measure(cfg, x, held_out, runs), flush=True)


if __name__ == "__main__":
    main()

"""Parts of the LISTA-Matryoshka recipe one by one, all together, and with codes pruned at inference.

On a planted world with correlations and trees: MCC, F1 and FVU of `score_recovery`. On tales: mean F1 of the best
latent of each concept, and FVU on held-out tokens. `refined` is one step of LISTA, `annealed` a k that falls from four
times its value over the first half; `detached`, `by rate` and `tilt` are those of `MatryoshkaLoss`. `TopK, recipe` has
the first two without prefixes. `tau` is `SAE.prune` of the row's dictionary, `k of` the same dictionary by `with_k` at
the L0 that pruning leaves.
"""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import replace

import saelab as sl
from objectives.shared import N_HELD_OUT, format_table, labeled_activations, mean_f1, score, tales_activations, train
from saelab.sae import Refined
from saelab.sae.fitting import measure as measure_fvu
from saelab.sae.objectives import MatryoshkaLoss
from saelab.synthetic import PlantedConfig, PlantedWorld
from saelab.universality import score_recovery

N_SCORED, N_STORIES = 20_000, 120
PRUNED = ("TopK", "all", "TopK, recipe")
KINDS = ("topic", "pole", "register", "class")


def describe(command: argparse.ArgumentParser) -> None:
    command.add_argument("--n-features", type=int, default=1024)
    command.add_argument("--d-in", type=int, default=128)
    command.add_argument("--k", type=int, default=16)
    command.add_argument("--n-roots", type=int, default=8)
    command.add_argument("--batch-size", type=int, default=2048)
    command.add_argument("--taus", type=float, nargs="+", default=[0.03, 0.1])
    command.add_argument("--on", nargs="+", choices=["planted", "tales"], default=["planted", "tales"])


def measure(args: argparse.Namespace) -> None:
    for name in args.on:
        (_measure_planted if name == "planted" else _measure_tales)(args)


def _configs(d_in: int, m: int, k: int) -> dict[str, sl.SAEConfig]:
    nested = (m // 16, m // 4, m)
    plain = sl.SAEConfig(d_in=d_in, d_sae=m, activation=sl.TopK(k=k))
    with_prefixes = replace(plain, prefixes=nested)

    def loss(**choices: bool | float) -> sl.SAEConfig:
        return replace(with_prefixes, objective=(MatryoshkaLoss(**choices), sl.AuxK()))  # type: ignore[arg-type]

    falling = sl.Schedule(start=4.0, end=1.0, until=0.5)
    every = loss(detached=True, by_rate=True, tilt=2e-3)
    return {
        "TopK": plain,
        "Matryoshka": with_prefixes,
        "+ refined": replace(with_prefixes, encoder=Refined()),
        "+ annealed": replace(with_prefixes, sparsity_schedule=falling),
        "+ detached": loss(detached=True),
        "+ by rate": loss(by_rate=True),
        "+ tilt 0.002": loss(tilt=2e-3),
        "+ tilt 0.5": loss(tilt=0.5),
        "all": replace(every, encoder=Refined(), sparsity_schedule=falling),
        "TopK, recipe": replace(plain, encoder=Refined(), sparsity_schedule=falling),
    }


def _score_versions(
    name: str, sae: sl.SAE, taus: Sequence[float], score_one: Callable[[sl.SAE], dict[str, float]]
) -> dict[str, dict[str, float]]:
    """Figures of an SAE; where the recipe may end with it also pruned, and of as many codes without."""
    rows = {name: score_one(sae)}
    for tau in taus if name in PRUNED else ():
        rows[f"{name}, tau {tau:g}"] = found = score_one(sae.prune(tau))
        rows[f"{name}, k of {tau:g}"] = score_one(sae.with_k(max(1, round(found["l0"]))))
    return rows


def _measure_planted(args: argparse.Namespace) -> None:
    rows: dict[str, list[dict[str, float]]] = {}
    for seed in args.seeds:
        axes = {"n_features": args.n_features, "d_in": args.d_in, "n_roots": args.n_roots}
        world = PlantedWorld(PlantedConfig(**axes, l0=float(args.k)), seed=seed)
        for name, cfg in _configs(args.d_in, args.n_features, args.k).items():
            run = sl.TrainConfig(n_tokens=args.n_tokens, batch_size=args.batch_size, seed=seed)
            sae = sl.SAE(cfg, seed).fit(world.batches(args.batch_size, seed=seed), run, progress=False)

            def recovery(each: sl.SAE, world: PlantedWorld = world) -> dict[str, float]:
                found = score_recovery(each, world, n_tokens=N_SCORED)["SAE"]
                return {key: getattr(found, key) for key in ("mcc", "f1", "precision", "recall", "fvu", "l0")}

            for row, figures in _score_versions(name, sae, args.taus, recovery).items():
                rows.setdefault(row, []).append(figures)
                print(row, seed, figures, flush=True)
    print(f"{args.n_tokens:,} tokens, {args.n_features} features in {args.d_in} dimensions, {args.k} a token")
    print(format_table(rows))


def _measure_tales(args: argparse.Namespace) -> None:
    acts = tales_activations()
    held_out, (x, labels) = acts[len(acts) - N_HELD_OUT :], labeled_activations(N_STORIES, KINDS)
    rows: dict[str, list[dict[str, float]]] = {}

    def concepts(sae: sl.SAE) -> dict[str, float]:
        found = measure_fvu(sae, held_out)
        figures = {"F1": mean_f1(score(sae, x, labels), *KINDS), "fvu": found["fvu"], "l0": found["l0"]}
        return figures | {"dead": found["dead_frac"]}

    for seed in args.seeds:
        for name, cfg in _configs(acts.d_in, args.n_features, args.k).items():
            sae = train({name: cfg}, acts, seed, args.n_tokens, args.batch_size)[name]
            for row, figures in _score_versions(name, sae, args.taus, concepts).items():
                rows.setdefault(row, []).append(figures)
                print(row, seed, figures, flush=True)
    print(f"tales: {args.n_tokens:,} tokens, d_sae {args.n_features}, k {args.k}, {len(x):,} tokens with concepts")
    print(format_table(rows))

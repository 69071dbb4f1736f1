"""Methods and baselines on worlds whose truth is known, at one L0: measured, saved, and shown as one page.

    python scripts/compare_methods.py measure planted --seeds 0 1 2
    python scripts/compare_methods.py measure tales
    python scripts/compare_methods.py measure stories260k --folder ../shared/data
    python scripts/compare_methods.py cost
    python scripts/compare_methods.py page

`measure` keeps every dictionary's figures in docs/results/methods/WORLD.json as soon as it has them, and goes on where
it stopped; dictionaries are kept in runs/methods, to be compared across seeds. `cost` times training steps in turns
with TopK's. `page` writes docs/results/methods.md from these files alone.
"""

import argparse
import json
import time
import warnings
from pathlib import Path
from typing import Any

import torch

import saelab as sl
from methods.page import write_page
from methods.rows import BATCH, METHODS, Setting
from methods.worlds import N_HELD_OUT, Othello, Planted, Stories, Tales, World, stability
from saelab.stores.files import write_json

RESULTS = Path(__file__).parent.parent / "docs" / "results" / "methods"
KEPT = Path("runs/methods")


def read(name: str) -> dict[str, Any]:
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def measure(args: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    worlds = {"planted": Planted, "tales": Tales, "stories260k": lambda: Stories(args.folder), "othello": Othello}
    world: World = worlds[args.world]()
    names = args.methods or list(METHODS)
    setting = {"d_sae": world.d_sae, "k": world.k, "n_tokens": args.n_tokens, "n_held_out": N_HELD_OUT}
    about = setting | {"batch_size": BATCH}
    saved = read(args.world) or {"setting": about, "figures": {}, "stability": {}}
    if saved["setting"] != about:
        raise SystemExit(f"{args.world}.json holds figures of {saved['setting']}, not {about}; move it away.")
    for seed in args.seeds:
        acts = None
        for name in names:
            if str(seed) in saved["figures"].get(name, {}) or not METHODS[name].fits(args.world != "planted"):
                continue
            acts = world.activations(seed) if acts is None else acts
            began = time.perf_counter()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # a target L0 that is missed shows in the table
                sae = METHODS[name].make(Setting(acts=acts, seed=seed, **setting))
            sae.save_pretrained(folder(args.world, name, seed))
            trained = time.perf_counter() - began
            figures = world.score(sae, seed)
            saved["figures"].setdefault(name, {})[str(seed)] = {key: round(x, 5) for key, x in figures.items()}
            RESULTS.mkdir(parents=True, exist_ok=True)
            write_json(RESULTS / f"{args.world}.json", saved)
            seconds = f"{trained:.0f} s to fit, {time.perf_counter() - began - trained:.0f} to score"
            print(name, seed, {key: round(x, 3) for key, x in figures.items()}, seconds, flush=True)
    together(world, args.world, saved, args.seeds)


def together(world: World, name: str, saved: dict[str, Any], seeds: list[int]) -> None:
    """Figures that take several dictionaries: those of all methods at one seed, and those of one at all seeds."""
    kept = {m: {seed: folder(name, m, seed) for seed in seeds if folder(name, m, seed).is_dir()} for m in METHODS}
    for seed in seeds:
        found = world.score_all({m: sl.SAE.from_pretrained(kept[m][seed]) for m in METHODS if seed in kept[m]})
        for m, figures in found.items():
            rows = saved["figures"].setdefault(m, {}).setdefault(str(seed), {})
            rows.update({key: round(x, 5) for key, x in figures.items()})
    for m, folders in kept.items():
        if name != "planted" and len(folders) > 1:
            found = stability([sl.SAE.from_pretrained(one) for one in folders.values()])
            saved["stability"][m] = {key: round(x, 5) for key, x in found.items()}
    write_json(RESULTS / f"{name}.json", saved)


def folder(world: str, method: str, seed: int) -> Path:
    return KEPT / world / f"{method.replace(' ', '_')}-{seed}"


def cost(args: argparse.Namespace) -> None:
    """Time of a training step in steps of TopK, in turns: between two entries of the history, without start and end."""
    torch.set_num_threads(1)
    world, d_sae, k = Tales(), 4096, 16
    acts = world.activations(0)

    def step(name: str) -> float:
        seen: list[tuple[int, float]] = []
        sae, n = sl.SAE(METHODS[name].config(acts.d_in, d_sae, k), seed=0), args.n_steps * BATCH
        run = sl.TrainConfig(n_tokens=2 * n, batch_size=BATCH, n_held_out=0, log_every_tokens=n)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            sae.fit(acts, run, sinks=[lambda e: seen.append((e["step"], time.perf_counter()))], progress=False)
        (first, start), (last, end) = seen[-2:]
        return (end - start) / (last - first)

    found: dict[str, list[float]] = {}
    for name in args.methods or METHODS:
        if METHODS[name].fields is None:
            continue
        ratios = sorted(step(name) / step("TopK") for _ in range(args.n_turns))
        found[name] = [round(ratios[i], 3) for i in (len(ratios) // 2, 0, -1)]
        print(name, found[name], flush=True)
        setting = {"d_in": acts.d_in, "d_sae": d_sae, "k": k, "batch_size": BATCH}
        figures = {**read("cost").get("figures", {}), **found}
        write_json(RESULTS / "cost.json", {"setting": setting, "figures": figures})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    one = commands.add_parser("measure", help="dictionaries of every method in one world")
    one.add_argument("world", choices=["planted", "tales", "stories260k", "othello"])
    one.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    one.add_argument("--methods", nargs="+", choices=list(METHODS), metavar="NAME", help="all without")
    one.add_argument("--n-tokens", type=int, default=400_000, help="to train each dictionary on")
    one.add_argument("--folder", type=Path, default=Path("../shared/data"), help="where stories260k is")
    one.set_defaults(run=measure)
    two = commands.add_parser("cost", help="time of a training step")
    two.add_argument("--methods", nargs="+", choices=list(METHODS), metavar="NAME", help="all without")
    two.add_argument("--n-steps", type=int, default=20)
    two.add_argument("--n-turns", type=int, default=3)
    two.set_defaults(run=cost)
    three = commands.add_parser("page", help="docs/results/methods.md from what is saved")
    three.set_defaults(run=lambda args: write_page(RESULTS))
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    main()

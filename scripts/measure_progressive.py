"""What do the first features of a dictionary keep? Matryoshka prefixes against a pruned dictionary (arXiv:2505.00190).

    python scripts/measure_progressive.py

TopK dictionaries on activations of the model `tales`, one with nested prefixes and one without. By number of features
kept, in the order of prefixes, of energy (the power law) or at random: FVU, the model's loss, and representational
similarity. Then how well rules describe the features between one size and the next. Means over seeds, with the range.
"""

import argparse
import tempfile
from collections import defaultdict
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch

import saelab as sl
from saelab.labels.rules import label_by_rules, score_groups
from saelab.synthetic.tales import generate_stories

HOOK = "blocks.2.hook_resid_post"
FIRST_STORY = 70_000_000  # beyond those that the model was trained on


def order_features(sae: sl.SAE, store: sl.FeatureStore, seed: int) -> dict[str, list[int]]:
    """Features in the orders in which they are kept."""
    energy = store.statistics.squares.sum(1) * sae.W_dec.detach().square().sum(1).numpy()
    orders = {
        "energy": np.argsort(-energy, kind="stable").tolist(),
        "random": torch.randperm(len(energy), generator=torch.Generator().manual_seed(seed)).tolist(),
    }
    return orders if sae.cfg.prefixes is None else {"prefix": list(range(len(energy)))} | orders


def describe(values: Sequence[Sequence[float]]) -> str:
    cells = np.array(values, float)
    triples = zip(cells.mean(0), cells.min(0), cells.max(0), strict=True)
    return "".join(f"{f'{mean:.3f} ({low:.3f}..{high:.3f})':>25}" for mean, low, high in triples)


def show(title: str, columns: Sequence[str], rows: Mapping[str, Sequence[Sequence[float]]]) -> None:
    """A line for each name: means over seeds, the smallest and the largest."""
    print(f"{title:<34}" + "".join(f"{name:>25}" for name in columns))
    for name, values in rows.items():
        print(f"{name:<34}{describe(values)}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n-collected", type=int, default=200_000, help="tokens of text")
    parser.add_argument("--n-tokens", type=int, default=400_000, help="tokens each is trained on")
    parser.add_argument("--n-measured", type=int, default=30_000, help="tokens of other text to measure on")
    parser.add_argument("--sizes", type=int, nargs="+", default=[32, 128, 512])
    parser.add_argument("--k", type=int, default=16)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    args = parser.parse_args()
    torch.set_num_threads(1)
    model = sl.load_model("tales", progress=False)
    acts = sl.collect(
        model, generate_stories(args.n_collected // 155, first=FIRST_STORY).tokens(), HOOK, progress=False
    )
    assert isinstance(acts, sl.Activations)
    text = generate_stories(args.n_measured // 155, first=FIRST_STORY + 10_000_000).tokens()
    sizes = tuple(args.sizes)
    kept, labeled = defaultdict(list), defaultdict(list)
    for seed in args.seeds:
        for name, prefixes in (("Matryoshka", sizes), ("TopK", None)):
            cfg = sl.SAEConfig(d_in=acts.d_in, d_sae=sizes[-1], activation=sl.TopK(k=args.k), prefixes=prefixes)
            run = sl.TrainConfig(n_tokens=args.n_tokens, batch_size=2048, seed=seed)
            sae = sl.SAE(cfg, seed).fit(acts, run, progress=False)
            curve = sl.analysis.prune_dictionary(sae, model, text, sizes, seed=seed)
            for row in curve.rows:
                if row.order != "frequency":
                    scores = (row.fvu, row.ce, row.loss_recovered, row.rsa)
                    kept[f"{name}, {row.order}, {row.size}"].append(scores)
            with tempfile.TemporaryDirectory() as folder:
                store = sl.harvest(sae, model, text, Path(folder) / "store", progress=False)
                found = label_by_rules(store)
                for order, ranked in order_features(sae, store, seed).items():
                    rings = {f"{low}..{high}": ranked[low:high] for low, high in pairwise((0, *sizes))}
                    for one in score_groups(found, rings):
                        live = one.n_sides / one.n_features
                        labeled[f"{name}, {order}, {one.name}"].append(
                            (one.f1, one.skill, one.good, one.n_firings, live)
                        )
    n = f"{curve.n_tokens:,} tokens measured, {curve.n_compared:,} compared"
    print(f"tales, {HOOK}: trained on {args.n_tokens:,}; {n};")
    print(f"loss {curve.ce_clean:.3f}, with zeros {curve.ce_zero:.3f}; k {args.k}, seeds {args.seeds}")
    show("kept", ("FVU", "loss", "recovered", "RSA"), kept)
    show("between sizes", ("F1 of rules", "above chance", "good", "firings", "sides that fire"), labeled)


if __name__ == "__main__":
    main()

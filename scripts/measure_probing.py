"""Which features predict a concept, over the layers of a model: rankings and searches, by the number of features.

    python scripts/measure_probing.py --seeds 0 1 2

For each layer of `tales` an AbsTopK SAE is trained for each seed. Held-out balanced accuracy of the probes of each
ranking (`probe_features`), a mean over concepts, with the same for permuted labels, for random features, and for the
model's own neurons; then the share of the labels' entropy that features chosen by `probe_intrinsically` tell.
"""

import argparse
import time
from collections import defaultdict

import numpy as np
import torch

import saelab as sl
from saelab.evaluation.feature_classifiers import encode_csr
from saelab.lm.token_labels import TokenLabels
from saelab.probing.intrinsic_probing import probe_intrinsically
from saelab.synthetic.tales import generate_stories

FIRST_STORY = 80_000_000
RANKINGS = ("means", "f", "information", "l1", "pruning", "svm", "exact", "swap")
INSIDE = 0.03, 0.5  # rates of concepts that are probed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--layers", type=int, nargs="+", default=[0, 1, 2, 3])
    parser.add_argument("--ks", type=int, nargs="+", default=[1, 2, 5])
    parser.add_argument("--n-tokens", type=int, default=200_000, help="to train each dictionary on")
    parser.add_argument("--n-stories", type=int, default=400, help="to train on and to probe")
    parser.add_argument("--n-concepts", type=int, default=6)
    parser.add_argument("--d-sae", type=int, default=256)
    parser.add_argument("--k", type=int, default=16)
    args = parser.parse_args()
    torch.set_num_threads(1)
    start, model = time.time(), sl.load_model("tales", progress=False)
    for layer in args.layers:
        point = f"blocks.{layer}.hook_resid_post"
        x, labels = read(model, point, args.n_stories)
        names = choose(labels, args.n_concepts)
        for source in ("SAE", "neurons"):
            found: dict[tuple[str, int], list[float]] = defaultdict(list)
            for seed in args.seeds:
                codes = x.numpy()
                if source == "SAE":
                    cfg = sl.SAEConfig(d_in=x.shape[1], d_sae=args.d_sae, activation=sl.AbsTopK(k=args.k))
                    run = sl.TrainConfig(n_tokens=args.n_tokens, batch_size=2048, seed=seed)
                    codes = encode_csr(sl.SAE(cfg, seed=seed).fit(x, run, progress=False), x)
                else:
                    codes = codes - codes.mean(0)
                probe(codes, labels, names, args.ks, seed, found)
            about = f"{source}, block {layer}, {args.n_stories} stories, {labels.n_tokens:,} tokens, concepts {names}"
            print(f"\n{about}, after {time.time() - start:.0f} s\n{show(found, args.ks)}", flush=True)


def read(model: sl.lm.Model, point: str, n_stories: int) -> tuple[torch.Tensor, TokenLabels]:
    """Activations of the words of stories, and the concepts of each."""
    stories = generate_stories(n_stories, first=FIRST_STORY)
    tokens = stories.tokens()
    kept = tokens.attention_mask & (tokens.ids >= 4)
    labels = stories.labels_at(*kept.nonzero(as_tuple=True))
    acts = sl.lm.capture(model, tokens.ids, [point])[point][kept].float()
    return acts, TokenLabels.of(labels.matrix, labels.concepts, kept.nonzero()[:, 0])


def choose(labels: TokenLabels, n: int) -> list[str]:
    """Concepts of these rates, evenly over them."""
    rates = np.asarray(labels.matrix.mean(0)).ravel()
    inside = [i for i in np.argsort(rates, kind="stable") if INSIDE[0] <= rates[i] <= INSIDE[1]]
    places = np.unique(np.linspace(0, len(inside) - 1, n).round().astype(int))
    return [labels.names[inside[i]] for i in places]


def probe(codes: object, labels: TokenLabels, names: list[str], ks: list[int], seed: int, found: dict) -> None:
    """Add the figures of one seed, means over concepts."""
    figures = defaultdict(list)
    for name in names:
        one = {"concept": name, "ks": ks, "seed": seed}
        probes = sl.probing.probe_features(codes, labels, rankings=RANKINGS, n_tokens=30_000, **one)
        for each in probes.probes:
            figures[each.ranking, each.k].append(each.held_out.balanced)
            figures[f"{each.ranking}, shuffled", each.k].append(each.shuffled.balanced)
        for k in ks:
            figures["random features", k].append(probes.random[k].balanced)
        figures["all features", 0].append(probes.baselines["all features"].balanced)
        told = probe_intrinsically(codes, labels, n_tokens=30_000, **one)
        for title in ("information", "fitted", "ranked", "random", "shuffled"):
            for k in ks:
                figures[f"NMI, {title}", k].append(getattr(told, title)[k])
        figures["NMI, everything", 0].append(told.everything)
    for key, values in figures.items():
        found[key].append(float(np.nanmean(values)))


def show(found: dict, ks: list[int]) -> str:
    """Means over seeds, the smallest and the largest in brackets."""
    lines = [f"{'':<24}" + "".join(f"{f'k={k}':>24}" for k in ks)]
    for name in dict.fromkeys(name for name, _ in found):
        cells = [found.get((name, k), [float("nan")]) for k in ([0] if (name, 0) in found else ks)]
        shown = (f"{np.mean(c):.3f} ({min(c):.3f}..{max(c):.3f})" for c in cells)
        lines.append(f"{name:<24}" + "".join(f"{one:>24}" for one in shown))
    return "\n".join(lines)


if __name__ == "__main__":
    main()

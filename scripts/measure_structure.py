"""Do dictionaries hold known directions and concepts? Plausibility, identifiability, connectivity and interference.

    python scripts/measure_structure.py

Dictionaries of equal size and k on activations of the model `tales`: TopK and AbsTopK with rows of norm 1, archetypal
ones (arXiv:2502.12892), semi-NMF, convex NMF, k-means and random directions. Known directions are those of the concepts
with enough tokens, twice: weights of linear probes, which are what reads a concept out, and differences of means, which
are what it adds to the activations. Prints means over seeds, and the smallest and the largest.
"""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch

import saelab as sl
from saelab.evaluation.dictionary_structure import DictionaryStructure, measure_structure, plausibility
from saelab.functional.metrics import exact
from saelab.functional.statistics import fit_probe
from saelab.lm.token_labels import TokenLabels
from saelab.sae.initialization import make_untrained
from saelab.synthetic.tales import generate_stories

HOOK = "blocks.2.hook_resid_post"
FIRST_STORY = 70_000_000  # beyond those that the model was trained on
MIN_COUNT = 100
COLUMNS = {
    "probes": lambda one: one["probes"],
    "means": lambda one: one["means"],
    "accuracy": lambda one: one["found"].identifiability.accuracy,
    "majority": lambda one: one["found"].identifiability.accuracy_majority,
    "balanced": lambda one: one["found"].identifiability.balanced,
    "  moved": lambda one: one["found"].identifiability.moved.balanced,
    "connect.": lambda one: one["found"].connectivity,
    "indep.": lambda one: one["found"].connectivity_independent,
    "interf.": lambda one: one["found"].negative_interference,
}


def labeled_activations(n_stories: int, hook_point: str) -> tuple[torch.Tensor, TokenLabels]:
    """Activations of the words of stories that nothing was trained on, and their concepts."""
    stories = generate_stories(n_stories, first=FIRST_STORY + 10_000_000)
    tokens = stories.tokens()
    kept = tokens.attention_mask & (tokens.ids >= 4)  # words, not the ends
    acts = sl.lm.capture(sl.load_model("tales", progress=False), tokens.ids, [hook_point])[hook_point][kept]
    labels = stories.labels_at(*kept.nonzero(as_tuple=True))
    return acts, TokenLabels.of(labels.matrix, labels.concepts, kept.nonzero()[:, 0])


def known_directions(x: torch.Tensor, labels: TokenLabels) -> dict[str, torch.Tensor]:
    """For each concept with enough tokens its probe's weights, and how much it moves the mean."""
    y = torch.from_numpy(labels.matrix.toarray().astype(np.float32))
    y = y[:, (y.sum(0) >= MIN_COUNT) & (len(y) - y.sum(0) >= MIN_COUNT)]
    centered = exact(x) - exact(x).mean(0)
    variances, axes = torch.linalg.eigh(centered.T @ centered / len(x))
    white = axes / variances.clamp(min=1e-6 * float(variances[-1])).sqrt()
    probe = fit_probe((centered @ white).float(), y)
    counts = y.sum(0)[:, None]
    here = (y.T @ centered.float()) / counts
    return {"probes": probe.weight @ white.float().T, "means": here * len(y) / (len(y) - counts)}


def make(acts: sl.Activations, args: argparse.Namespace, seed: int) -> dict[str, sl.SAE]:
    """Dictionaries by name, of one seed."""
    plain = sl.SAEConfig(d_in=acts.d_in, d_sae=args.d_sae, activation=sl.TopK(k=args.k))
    configs = {"TopK": plain, "AbsTopK": replace(plain, activation=sl.AbsTopK(k=args.k))}
    for delta in args.deltas:
        configs[f"archetypal {delta:g}"] = replace(plain, dictionary=sl.Archetypal(delta=delta))
    run = sl.TrainConfig(n_tokens=args.n_tokens, batch_size=2048, seed=seed)
    found = {name: sl.SAE(cfg, seed).fit(acts, run, progress=False) for name, cfg in configs.items()}
    for method in ("snmf", "cnmf", "kmeans"):
        found[method] = sl.sae.fit_dictionary(acts, method, d_sae=args.d_sae, k=args.k, seed=seed)
    for name in ("TopK", "AbsTopK"):
        found[f"random, {name}"] = make_untrained(found[name], acts[:10_000], seed=100 + seed)
    return found


def format_rows(rows: Mapping[str, Sequence[dict[str, float | DictionaryStructure]]]) -> str:
    """Means over seeds, the smallest and the largest below."""
    lines = [f"{'':<18}" + "".join(f"{name:>10}" for name in COLUMNS)]
    for name, seeds in rows.items():
        values = np.array([[read(one) for read in COLUMNS.values()] for one in seeds])
        for title, part in ((name, values.mean(0)), ("  from", values.min(0)), ("  to", values.max(0))):
            lines.append(f"{title:<18}" + "".join(f"{value:>10.4f}" for value in part))
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hook-point", default=HOOK)
    parser.add_argument("--n-collected", type=int, default=300_000, help="tokens of text")
    parser.add_argument("--n-tokens", type=int, default=600_000, help="tokens each SAE is trained on")
    parser.add_argument("--n-stories", type=int, default=300, help="stories to measure on")
    parser.add_argument("--d-sae", type=int, default=512)
    parser.add_argument("--k", type=int, default=16)
    parser.add_argument("--deltas", type=float, nargs="+", default=[0.1, 1.0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    args = parser.parse_args()
    torch.set_num_threads(1)
    tokens = generate_stories(args.n_collected // 155, first=FIRST_STORY).tokens()
    acts = sl.collect(sl.load_model("tales", progress=False), tokens, args.hook_point, progress=False)
    assert isinstance(acts, sl.Activations)
    x, labels = labeled_activations(args.n_stories, args.hook_point)
    known = known_directions(x, labels)
    print(
        f"tales, {args.hook_point}: {len(acts):,} tokens, trained on {args.n_tokens:,}, measured on {len(x):,} others; "
        f"{len(known['probes'])} concepts, d_in {acts.d_in}, d_sae {args.d_sae}, k {args.k}, seeds {args.seeds}"
    )
    rows: dict[str, list] = {}
    for seed in args.seeds:
        for name, sae in make(acts, args, seed).items():
            found = measure_structure(sae, x, known["probes"], labels, baselines={}, seed=seed)
            near = {kind: plausibility(sae, directions) for kind, directions in known.items()}
            rows.setdefault(name, []).append({"found": found, **near})
        print(f"seeds so far: {args.seeds[: args.seeds.index(seed) + 1]}\n{format_rows(rows)}", flush=True)


if __name__ == "__main__":
    main()

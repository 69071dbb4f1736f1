"""Contrast between neighboring tokens: topics and moods of tales, against plain Matryoshka with the same prefixes.

F1 of the best feature for topics, moods (glad, sad) and registers, which last for many tokens, and for classes of
words, which do not; all TopK. `temporal` is `ContrastiveLoss(prefix=0.2)` with prefixes (d_sae / 5, d_sae), as in
arXiv:2511.05541; `self` has the same loss on pairs of a token and itself, which only repels.
"""

import argparse

import saelab as sl
from objectives.shared import N_HELD_OUT, format_table, labeled_activations, mean_f1, score, tales_activations, train
from saelab.sae.fitting import measure as measure_fvu
from saelab.sae.objectives import ContrastiveLoss
from saelab.synthetic.lexicon import MOODS

KINDS = ("topic", "pole", "register", "class")


def describe(command: argparse.ArgumentParser) -> None:
    command.add_argument("--k", type=int, default=16)
    command.add_argument("--d-sae", type=int, default=640)
    command.add_argument("--coefficients", type=float, nargs="+", default=[0.1, 0.3, 1.0])
    command.add_argument("--n-stories", type=int, default=300, help="to score on")


def measure(args: argparse.Namespace) -> None:
    acts, prefixes = tales_activations(), (args.d_sae // 5, args.d_sae)
    held_out = acts[len(acts) - N_HELD_OUT :]
    x, labels = labeled_activations(args.n_stories, KINDS)

    def config(*terms: sl.sae.objectives.LossTerm, nested: bool = True) -> sl.SAEConfig:
        return sl.SAEConfig(
            d_in=acts.d_in,
            d_sae=args.d_sae,
            activation=sl.TopK(k=args.k),
            prefixes=prefixes if nested else None,
            objective=(sl.ReconstructionLoss(), sl.AuxK(), *terms),
        )

    configs = {"TopK": config(nested=False), "Matryoshka": config()}
    for c in args.coefficients:
        configs[f"temporal {c:g}"] = config(ContrastiveLoss(coefficient=c, prefix=0.2))
    configs[f"self {c:g}"] = config(ContrastiveLoss(coefficient=c, prefix=0.2, pairs="self"))
    rows: dict[str, list[dict[str, float]]] = {}
    for seed in args.seeds:
        for name, sae in train(configs, acts, seed, args.n_tokens).items():
            scores = score(sae, x, labels)
            kinds = {"topics": ["topic"], "moods": list(MOODS), "registers": ["register"], "classes": ["class"]}
            figures = {f"F1 {title}": mean_f1(scores, *kind) for title, kind in kinds.items()}
            rows.setdefault(name, []).append({**figures, "FVU": measure_fvu(sae, held_out)["fvu"]})
    print(f"TopK(k={args.k}), {args.n_tokens:,} tokens of tales, d_sae {args.d_sae}, prefixes {prefixes}")
    print(f"F1 on half of {args.n_stories} stories ({len(x):,} tokens), FVU on {N_HELD_OUT:,} tokens")
    print(format_table(rows))

"""What training adds: an SAE beside SAEs with a part held at its random start, and classical dictionaries.

On tales: F1 and AUROC of the best feature, means over concepts, with the F1 that permuted labels give, and FVU; the
codes of `concept_baselines` beside them. On a planted world: what `score_recovery` says; MCC is a mean over the rows of
a dictionary with fewer rows than features, `found` a share of all features. All with the same L0.
"""

import argparse

import saelab as sl
from objectives.shared import N_HELD_OUT, format_table, labeled_activations, tales_activations
from saelab.evaluation.feature_classifiers import concept_baselines, encode_csr
from saelab.evaluation.results import ConceptScores
from saelab.sae.fitting import measure as measure_fvu
from saelab.synthetic import PlantedConfig, PlantedWorld

KINDS = ("root", "class", "topic", "pole", "state", "one-sided")


def describe(command: argparse.ArgumentParser) -> None:
    command.add_argument("world", choices=["planted", "tales"])
    command.add_argument("--k", type=int, default=16)
    command.add_argument("--d-sae", type=int, default=512)
    command.add_argument("--methods", nargs="+", default=["frozen_encoder", "soft_frozen", "ica", "l3", "kmeans"])
    command.add_argument("--n-stories", type=int, default=200, help="of tales, to score on")


def measure(args: argparse.Namespace) -> None:
    rows: dict[str, list[dict[str, float]]] = {}
    if args.world == "tales":
        acts = tales_activations()
        x, labels = labeled_activations(args.n_stories, KINDS)
    for seed in args.seeds:
        if args.world == "planted":
            world = PlantedWorld(PlantedConfig(n_features=args.d_sae, d_in=96, l0=args.k, n_roots=0), seed=seed)
            acts = sl.Activations.from_tensor(world.sample(200_000, (seed, 1))[0])
        cfg = sl.SAEConfig(d_in=acts.d_in, d_sae=args.d_sae, activation=sl.TopK(k=args.k))
        run = sl.TrainConfig(n_tokens=args.n_tokens, batch_size=2048, seed=seed, n_held_out=N_HELD_OUT)
        sae = sl.SAE(cfg, seed=seed).fit(acts, run, progress=False)
        others = sl.sae.fit_baselines(sae, acts, methods=args.methods, seed=100 + seed, progress=False)
        held_out = acts[len(acts) - N_HELD_OUT :]
        if args.world == "planted":
            for name, found in sl.universality.score_recovery(
                sae, world, n_tokens=20_000, baselines=others
            ).rows.items():
                figures = {"MCC": found.mcc, "found": found.found, "F1": found.f1, "FVU": found.fvu, "L0": found.l0}
                rows.setdefault(name, []).append(figures)
            continue
        codes = concept_baselines(x, cfg, labels, baselines=others)
        scores = sl.evaluation.score_concepts(encode_csr(sae, x), labels, baselines=codes)
        for name, one in {"SAE": scores, **scores.baselines}.items():
            each = {"SAE": sae, **others}.get(name)
            fvu = measure_fvu(each, held_out)["fvu"] if each else float("nan")
            rows.setdefault(name, []).append({**describe_scores(one), "FVU": fvu})
    print(f"{args.world}, TopK(k={args.k}), {args.n_tokens:,} tokens, {N_HELD_OUT:,} held out, d_sae {args.d_sae}")
    print(format_table(rows))


def describe_scores(scores: ConceptScores) -> dict[str, float]:
    """Mean F1 and AUROC over scored concepts, and the mean F1 with permuted labels."""

    def mean(found: ConceptScores, name: str) -> float:
        return sum(getattr(row, name) for row in found.scored) / max(1, len(found.scored))

    assert scores.moved is not None
    return {"F1": mean(scores, "f1"), "F1, permuted": mean(scores.moved, "f1"), "AUROC": mean(scores, "auroc")}

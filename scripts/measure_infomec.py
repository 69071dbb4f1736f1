"""Modularity, explicitness and compactness of codes of tales, about concepts that vary freely and about all.

    python scripts/measure_infomec.py --seeds 0 1 2

An AbsTopK and a TopK SAE beside PCA, neurons, ICA, an untrained SAE and permuted concepts.
"""

import argparse

import numpy as np
import torch

import saelab as sl
from objectives.shared import format_table, labeled_activations
from saelab.evaluation.feature_classifiers import encode_csr
from saelab.lm.token_labels import TokenLabels

SETS = {
    "poles and states": ("pole", "state", "one-sided"),
    "all": ("root", "class", "topic", "pole", "state", "one-sided"),
}
RARE = 0.005


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--n-tokens", type=int, default=400_000, help="to train each dictionary on")
    parser.add_argument("--n-stories", type=int, default=300)
    parser.add_argument("--d-sae", type=int, default=512)
    parser.add_argument("--k", type=int, default=16)
    args = parser.parse_args()
    torch.set_num_threads(1)
    for title, kinds in SETS.items():
        x, labels = labeled_activations(args.n_stories, kinds)
        rates = np.asarray(labels.matrix.mean(0)).ravel()
        kept = np.flatnonzero((rates > RARE) & (rates < 0.5))
        labels = TokenLabels.of(labels.matrix[:, kept], [labels.concepts[i] for i in kept], labels.doc_ids)
        rows: dict[str, list[dict[str, float]]] = {}
        for seed in args.seeds:
            found = measure(x, labels, seed, args)
            for name, row in {"AbsTopK": found, **found.baselines}.items():
                figures = {key: getattr(row, key) for key in ("modularity", "explicitness", "compactness")}
                counts = {"informative": row.n_informative, "of": row.n_features, "told": row.n_told}
                rows.setdefault(name, []).append(figures | counts)
        print(f"\n{title}: {len(labels)} concepts, {len(x):,} tokens of {args.n_stories} stories, seeds {args.seeds}")
        print(format_table(rows), flush=True)


def measure(x: torch.Tensor, labels: TokenLabels, seed: int, args: argparse.Namespace) -> sl.evaluation.InfoMEC:
    """Figures of one seed."""
    run = sl.TrainConfig(n_tokens=args.n_tokens, batch_size=2048, seed=seed)
    configs = [
        sl.SAEConfig(d_in=x.shape[1], d_sae=args.d_sae, activation=activation)
        for activation in (sl.AbsTopK(k=args.k), sl.TopK(k=args.k))
    ]
    signed, plain = sl.fit([sl.SAE(cfg, seed=seed) for cfg in configs], x, run, progress=False)
    ica = sl.sae.fit_dictionary(x, "ica", k=x.shape[1], seed=seed)
    beside = sl.evaluation.concept_baselines(x, configs[0], labels, seed=seed, baselines={"TopK": plain, "ICA": ica})
    names = ("TopK", "pca", "neurons", "ICA", "untrained")
    return sl.evaluation.infomec(
        encode_csr(signed, x), labels, baselines={name: beside[name] for name in names}, seed=seed
    )


if __name__ == "__main__":
    main()

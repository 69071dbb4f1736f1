"""Labels in training: a dictionary learned with a classifier of its codes, against a probe on a plain one.

F1 of logistic regressions on codes, fitted where the dictionary was trained and scored elsewhere, and of the best
single feature, means over concepts; FVU and L0 elsewhere. `joint x` has x times the cross-entropy of the labels in its
loss, `permuted` the largest of these with labels permuted within documents, `activations` no dictionary. In the planted
worlds one label lies along a direction of little variance, or of much, apart from all that reconstruction is about.
"""

import argparse

import numpy as np
import torch

import saelab as sl
from objectives.shared import format_table, labeled_activations
from saelab.evaluation.feature_classifiers import encode_csr
from saelab.functional.statistics import choose_threshold, fit_probe, permute_labels, score_guess
from saelab.lm.token_labels import TokenLabels
from saelab.sae.fitting import measure as measure_fvu
from saelab.sae.joint_dictionary import fit_joint_dictionary

KINDS = ("root", "class", "topic", "pole", "state", "one-sided")
FEWEST = 100  # tokens of a concept, on either part
FITTED = 30_000  # tokens that probes are fitted to
STEPS = {"planted-small": 0.3, "planted-large": 2.0}


def describe(command: argparse.ArgumentParser) -> None:
    command.add_argument("world", choices=["tales", *STEPS])
    command.add_argument("--coefficients", type=float, nargs="+", default=[0.1, 0.3, 1.0, 3.0])
    command.add_argument("--d-sae", type=int, default=None)
    command.add_argument("--k", type=int, default=None)
    command.add_argument("--n-stories", type=int, default=1_200, help="of tales; a quarter of them to score on")


def measure(args: argparse.Namespace) -> None:
    rows: dict[str, list[dict[str, float]]] = {}
    tales = labeled_activations(args.n_stories, KINDS) if args.world == "tales" else None
    for seed in args.seeds:
        x, labels = tales or plant(STEPS[args.world], seed)
        is_train = torch.from_numpy(labels.require_documents() < 0.75 * (int(labels.require_documents().max()) + 1))
        labels = enough(labels, is_train.numpy())
        train, marks = x[is_train], labels.select(is_train)
        cfg = sl.SAEConfig(
            d_in=x.shape[1],
            d_sae=args.d_sae or (512 if tales else 16),
            activation=sl.TopK(k=args.k or (16 if tales else 2)),
        )
        size = 2048 if tales else 500
        run = sl.TrainConfig(n_tokens=args.n_tokens, batch_size=size, seed=seed, n_held_out=0)
        saes = {"TopK": sl.SAE(cfg, seed=seed).fit(train, run, progress=False)}
        for c in args.coefficients:
            joint = fit_joint_dictionary(sl.SAE(cfg, seed=seed), train, marks, run, coefficient=c, progress=False)
            saes[f"joint {c:g}"] = joint.sae
        moved = permute(marks, seed)
        joint = fit_joint_dictionary(sl.SAE(cfg, seed=seed), train, moved, run, coefficient=c, progress=False)
        saes[f"permuted {c:g}"] = joint.sae
        truth = torch.from_numpy(labels.matrix.toarray())
        for name, sae in saes.items():
            z = encode_csr(sae, x)
            best = sl.evaluation.score_concepts(z[(~is_train).numpy()], labels.select(~is_train), seed=seed)
            figures = {
                "F1, probe": probe_f1(torch.from_numpy(z.toarray()), truth, is_train, seed),
                "F1, best feature": float(np.mean([row.f1 for row in best.scored])),
                **{title: measure_fvu(sae, x[~is_train])[title.lower()] for title in ("FVU", "L0")},
            }
            rows.setdefault(name, []).append(figures)
        figures = {"F1, probe": probe_f1(x, truth, is_train, seed)}
        rows.setdefault("activations", []).append(dict.fromkeys(rows["TopK"][0], float("nan")) | figures)
    rate = float(truth[~is_train].float().mean())
    print(
        f"{args.world}, {cfg.activation}, d_sae {cfg.d_sae}, {args.n_tokens:,} tokens of {int(is_train.sum()):,}; ",
        end="",
    )
    print(f"{int((~is_train).sum()):,} held out, {len(labels)} concepts, mean rate {rate:.3f}")
    print(format_table(rows))


def plant(step: float, seed: int) -> tuple[torch.Tensor, TokenLabels]:
    """Sparse codes on 12 of 16 orthogonal directions with noise, and a label of half the rows along another."""
    generator = torch.Generator().manual_seed(1_000 + seed)
    n, d, m = 40_000, 16, 12
    Q = torch.linalg.qr(torch.randn(d, d, generator=generator))[0]
    z = (torch.rand(n, m, generator=generator) < 2 / m) * (1 + 2 * torch.rand(n, m, generator=generator))
    y = torch.rand(n, generator=generator) < 0.5
    x = z @ Q[:m] + 0.1 * torch.randn(n, d, generator=generator) + step * (2 * y.float() - 1)[:, None] * Q[m]
    return x, TokenLabels.of({"planted": y}, doc_ids=np.arange(n) // 10)


def enough(labels: TokenLabels, is_train: np.ndarray) -> TokenLabels:
    """The concepts with enough tokens on both parts."""
    counts = np.minimum(*(np.asarray(labels.matrix[rows].sum(0)).ravel() for rows in (is_train, ~is_train)))
    kept = np.flatnonzero(counts >= FEWEST)
    return TokenLabels.of(labels.matrix[:, kept], [labels.concepts[i] for i in kept], labels.doc_ids)


def permute(labels: TokenLabels, seed: int) -> TokenLabels:
    """Each concept permuted by itself."""
    rng = np.random.default_rng(seed)
    columns = [permute_labels(labels[name].numpy(), labels.require_documents(), rng)[0] for name in labels.names]
    return TokenLabels.of(np.stack(columns, 1), labels.concepts, labels.doc_ids)


def probe_f1(z: torch.Tensor, truth: torch.Tensor, is_train: torch.Tensor, seed: int) -> float:
    """Mean over concepts of the held-out F1 of a logistic regression, its threshold chosen where it was fitted."""
    drawn = is_train.nonzero()[:, 0]
    drawn = drawn[torch.randperm(len(drawn), generator=torch.Generator().manual_seed(seed))[:FITTED]]
    z = z.float() / z[drawn].float().std(0).clamp(min=1e-6)
    scores = fit_probe(z[drawn], truth[drawn].float())(z).numpy()
    found = []
    for c in range(truth.shape[1]):
        y = truth[:, c].numpy()
        threshold, _ = choose_threshold(scores[drawn, c], y[drawn])
        found.append(score_guess(scores[~is_train, c], y[~is_train], threshold).f1)
    return float(np.mean(found))

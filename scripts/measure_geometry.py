"""Geometry of concepts (arXiv:2410.19750) on the model `tales`: lobes, a galaxy and crystals, each beside its nulls.

    python scripts/measure_geometry.py --out geometry.json

Lobes are clusters of features that fire in the same windows of 32 tokens (spectral, on phi + 1 and on max(phi, 0)).
`AMI` compares them with clusters of decoder rows, z against permuted clusters; `accuracy` is balanced, of a logistic
regression from decoder rows to lobes; `meaning` is the AMI of lobes with the topic or state that each feature agrees
with best (Cohen's kappa, in other stories). An untrained SAE shows what follows from similar rows alone.

Galaxy: slope of log eigenvalues of the rows' covariance on log ranks 10 to min(150, .8 d), R2 of that power law and of
an exponential, and clustering entropy in nats, that of a Gaussian less that by nearest neighbors in 100 principal
dimensions; its bias is that of Gaussian rows of equal covariance.

Crystals: mean cosine of differences of word pairs within a relation less that across relations: raw, without directions
of distractors (topics, states, frequency, position), and in the space of a linear discriminant analysis (LDA), of the
pairs that it was fitted on and of held-out ones. `SAE` takes the decoder row of the feature that is best for a word,
and `differ` is the share of pairs whose words have two.
"""

import argparse
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

import saelab as sl
from objectives.shared import FIRST_STORY, HOOK, format_table, labeled_activations
from saelab.evaluation.feature_classifiers import encode_csr
from saelab.functional.metrics import exact
from saelab.functional.statistics import kappa
from saelab.sae.initialization import make_untrained
from saelab.stores.files import write_json
from saelab.synthetic import lexicon as lex
from saelab.synthetic.grammar import PLURALS
from saelab.synthetic.tales import generate_stories
from saelab.synthetic.vocabulary import VOCABULARY

D_SAE, K = 1024, 16
WINDOW = 32
N_LABELED = 1200  # stories; lobes are of the first two thirds, meanings of the rest
N_PERMUTED, N_CRYSTAL_DRAWS, N_FOLDS = 100, 10, 5
ENTROPY_DIMS, SHORTEST, SAME = 100, 1e-2, 1e-9
RELATIONS: dict[str, Mapping[str, str]] = {
    "young-of": lex.YOUNG,
    "home-of": lex.HOMES,
    "partner-of": lex.PARTNERS,
    "plural-of": PLURALS,
    "people-of": {name: town.people for name, town in lex.TOWNS.items()},
    "language-of": {name: town.language for name, town in lex.TOWNS.items()},
}
Rows = dict[str, list[dict[str, float]]]


def train(acts: sl.Activations, n_tokens: int, seed: int, folder: Path) -> sl.SAE:
    """An SAE of this hook point; read where it was trained before."""
    if not folder.is_dir():
        cfg = sl.SAEConfig(d_in=acts.d_in, d_sae=D_SAE, activation=sl.TopK(k=K))
        run = sl.TrainConfig(n_tokens=n_tokens, batch_size=512, seed=seed)
        sl.SAE(cfg, seed=seed).fit(acts, run, progress=False).save_pretrained(folder)
    return sl.SAE.from_pretrained(folder)


# ---- lobes
def measure_lobes(sae: sl.SAE, x: torch.Tensor, labels: Any, ks: Sequence[int], seed: int) -> dict[str, dict]:
    """Figures by kind of affinity and number of clusters."""
    from sklearn.metrics import adjusted_mutual_info_score as ami

    fires = encode_csr(sae, x) != 0
    early = labels.doc_ids < N_LABELED * 2 // 3
    present = windows_of(fires[early], labels.doc_ids[early])
    live = (present.sum(0) >= 10) & (present.sum(0) <= len(present) - 10)
    phi = np.corrcoef(present[:, live].T)
    meanings = best_concepts(fires[~early][:, live], labels.matrix[~early])
    rows = exact(sae.W_dec).numpy()[live]
    rng = np.random.default_rng(seed)
    random = rng.standard_normal(rows.shape)
    found: dict[str, dict] = {}
    for k in ks:
        near, near_random = (cluster(angular(r), k, seed) for r in (rows, random))
        for name, affinity in (("phi + 1", phi + 1), ("max(phi, 0)", phi.clip(min=0))):
            lobes = cluster(affinity, k, seed)
            found[f"{name}, k {k}"] = {
                "largest": float(np.bincount(lobes).max() / len(lobes)),
                "AMI": float(ami(lobes, near)),
                "z": permutation_z(lobes, near, rng),
                "AMI, random rows": float(ami(lobes, near_random)),
                "accuracy": predict_lobes(rows, lobes, seed),
                "acc., random rows": predict_lobes(random, lobes, seed),
                "meaning": float(ami(lobes, meanings)),
                "meaning, permuted": float(ami(lobes, rng.permutation(meanings))),
                "meaning of row clusters": float(ami(near, meanings)),
            }
    return found


def windows_of(fires: Any, doc_ids: np.ndarray) -> np.ndarray:
    """(n_windows, d_sae) of 0 and 1: in which windows each feature fires; no window spans two stories."""
    from scipy.sparse import csr_matrix

    place = np.arange(len(doc_ids)) - np.searchsorted(doc_ids, doc_ids)
    windows = np.unique(doc_ids * 1000 + place // WINDOW, return_inverse=True)[1]
    member = csr_matrix((np.ones(len(windows)), (windows, np.arange(len(windows)))))
    return ((member @ fires) > 0).toarray().astype(np.float64)


def best_concepts(fires: Any, truth: Any) -> np.ndarray:
    """For each feature the concept whose tokens it agrees with best."""
    fires, truth = fires.astype(np.float64), truth.astype(np.float64)
    n_fires, n_true = np.asarray(fires.sum(0)).ravel(), np.asarray(truth.sum(0)).ravel()
    return np.argmax(np.nan_to_num(kappa((fires.T @ truth).toarray(), n_fires[:, None], n_true, fires.shape[0])), 1)


def angular(rows: np.ndarray) -> np.ndarray:
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    return 1 - np.arccos((unit @ unit.T).clip(-1, 1)) / np.pi


def cluster(affinity: np.ndarray, k: int, seed: int) -> np.ndarray:
    from sklearn.cluster import SpectralClustering

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # max(phi, 0) need not be connected
        return SpectralClustering(k, affinity="precomputed", random_state=seed).fit_predict(affinity)


def permutation_z(a: np.ndarray, b: np.ndarray, rng: np.random.Generator) -> float:
    """z of the AMI; of equal sizes of clusters AMI is linear in the mutual information, which is quicker."""
    from sklearn.metrics import mutual_info_score

    null = [mutual_info_score(a, rng.permutation(b)) for _ in range(N_PERMUTED)]
    return float((mutual_info_score(a, b) - np.mean(null)) / np.std(null))


def predict_lobes(rows: np.ndarray, lobes: np.ndarray, seed: int) -> float:
    """Balanced accuracy on a fifth of the features; lobes of less than ten are left out."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import balanced_accuracy_score
    from sklearn.model_selection import train_test_split
    from sklearn.preprocessing import scale

    kept = np.bincount(lobes)[lobes] >= 10
    x, y = scale(rows[kept]), lobes[kept]
    x, x_test, y, y_test = train_test_split(x, y, test_size=0.2, stratify=y, random_state=seed)
    fitted = LogisticRegression(C=0.01, max_iter=1000, class_weight="balanced").fit(x, y)
    return float(balanced_accuracy_score(y_test, fitted.predict(x_test)))


# ---- galaxy
def measure_galaxy(rows: np.ndarray) -> dict[str, float]:
    variances, axes = np.linalg.eigh(np.cov(rows.T))
    variances = variances[::-1].clip(min=1e-12)
    ranks = np.arange(10, min(150, int(0.8 * rows.shape[1])) + 1)
    power, exponential = np.log10(ranks), ranks.astype(float)
    y = np.log10(variances[ranks - 1])
    top = rows @ axes[:, ::-1][:, :ENTROPY_DIMS]
    gaussian = (np.log(variances[:ENTROPY_DIMS]) + 1 + np.log(2 * np.pi)).sum() / 2
    return {
        "slope": float(np.polyfit(power, y, 1)[0]),
        "R2, power": float(np.corrcoef(power, y)[0, 1] ** 2),
        "R2, exponential": float(np.corrcoef(exponential, y)[0, 1] ** 2),
        "clustering entropy": float(gaussian) - neighbor_entropy(top),
    }


def neighbor_entropy(rows: np.ndarray) -> float:
    """Kozachenko and Leonenko's estimate of the entropy from distances to the nearest neighbor, in nats."""
    from scipy.special import digamma, gammaln
    from sklearn.neighbors import NearestNeighbors

    n, d = rows.shape
    distances = NearestNeighbors(n_neighbors=2).fit(rows).kneighbors(rows)[0][:, 1].clip(min=SHORTEST)
    ball = d / 2 * np.log(np.pi) - gammaln(d / 2 + 1)
    return float(digamma(n) - digamma(1) + ball + d * np.log(distances).mean())


def galaxies(sae: sl.SAE, untrained: sl.SAE, acts: sl.Activations, seed: int) -> dict[str, dict[str, float]]:
    """Figures of decoder rows, and of as many rows that say what they would be without structure."""
    rng = np.random.default_rng(seed)
    rows = exact(sae.W_dec).numpy()
    x = exact(acts[torch.from_numpy(rng.choice(len(acts), len(rows), replace=False))]).numpy()
    clouds = {
        "SAE": rows,
        "Gaussian, same covariance": rng.multivariate_normal(rows.mean(0), np.cov(rows.T), len(rows)),
        "isotropic Gaussian": rng.standard_normal(rows.shape) / np.sqrt(rows.shape[1]),
        "untrained SAE": exact(untrained.W_dec).numpy(),
        "activations": x,
    }
    return {name: measure_galaxy(cloud) for name, cloud in clouds.items()}


# ---- crystals
def word_features(sae: sl.SAE, acts: sl.Activations, ids: np.ndarray) -> np.ndarray:
    """(n_words, d_in) the decoder row of the feature that agrees best with each word."""
    from scipy.sparse import csr_matrix

    words = csr_matrix((np.ones(len(ids), bool), (np.arange(len(ids)), ids)), shape=(len(ids), len(VOCABULARY)))
    best = best_concepts(words, encode_csr(sae, acts[:]) != 0)
    return exact(sae.W_dec).numpy()[best]


def mean_by_word(values: np.ndarray, ids: np.ndarray) -> np.ndarray:
    counts = np.bincount(ids, minlength=len(VOCABULARY)).clip(min=1)
    found = torch.zeros(len(VOCABULARY), values.shape[1], dtype=torch.float64)
    return found.index_add_(0, torch.from_numpy(ids).long(), torch.from_numpy(values)).numpy() / counts[:, None]


def measure_crystals(
    vectors: np.ndarray, covariates: np.ndarray, weights: np.ndarray, seed: int
) -> dict[str, dict[str, float]]:
    """Figures of the pairs, of second words permuted within their relation, and of permuted relations."""
    place = {word: i for i, word in enumerate(VOCABULARY)}
    pairs = [(place[a], place[b], r) for r, found in enumerate(RELATIONS.values()) for a, b in found.items()]
    first, second, relation = np.array(pairs).T
    weights = weights.copy()
    weights[np.concatenate([first, second])] = 0  # the distractors must not hold the relations
    spread = (covariates - np.average(covariates, 0, weights)) * weights[:, None]
    basis = np.linalg.qr((vectors - np.average(vectors, 0, weights)).T @ spread)[0]
    cleaned = vectors - vectors @ basis @ basis.T
    rng = np.random.default_rng(seed)

    def measure(b: np.ndarray, groups: np.ndarray) -> dict[str, float]:
        d, clean = vectors[b] - vectors[first], cleaned[b] - cleaned[first]
        found = {"differ": float((np.linalg.norm(d, axis=1) > SAME).mean())}
        found |= {"raw": contrast(d, d, groups, groups), "distractors out": contrast(clean, clean, groups, groups)}
        return found | discriminate(d, groups, seed)

    def permuted() -> np.ndarray:
        return second[np.lexsort((rng.random(len(second)), relation))]

    draws = {
        "permuted pairs": [measure(permuted(), relation) for _ in range(N_CRYSTAL_DRAWS)],
        "permuted relations": [measure(second, rng.permutation(relation)) for _ in range(N_CRYSTAL_DRAWS)],
    }
    nulls = {name: {key: float(np.mean([one[key] for one in many])) for key in many[0]} for name, many in draws.items()}
    return {"pairs": measure(second, relation), **nulls}


def contrast(a: np.ndarray, b: np.ndarray, of_a: np.ndarray, of_b: np.ndarray) -> float:
    """Mean cosine of rows of equal groups less that of different ones; a row is not compared with itself."""
    norms = [np.linalg.norm(rows, axis=1) for rows in (a, b)]
    cosines = (a @ b.T) / np.outer(*norms).clip(min=1e-12)
    known = np.outer(*(n > SAME for n in norms))  # words that share a feature have no difference
    if a is b:
        np.fill_diagonal(known, False)
    same = of_a[:, None] == of_b
    return float(cosines[known & same].mean() - cosines[known & ~same].mean())


def discriminate(d: np.ndarray, groups: np.ndarray, seed: int) -> dict[str, float]:
    """The contrast in the space of a linear discriminant analysis of these differences, and of others."""
    from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
    from sklearn.model_selection import StratifiedKFold

    def project(train: np.ndarray) -> np.ndarray:
        fitted = LinearDiscriminantAnalysis(solver="eigen", shrinkage="auto").fit(d[train], groups[train])
        return d @ fitted.scalings_[:, : len(RELATIONS) - 1]

    inside = project(np.arange(len(d)))
    held = []
    for train, test in StratifiedKFold(N_FOLDS, shuffle=True, random_state=seed).split(d, groups):
        rows = project(train)
        held.append(contrast(rows[test], rows[train], groups[test], groups[train]))
    return {"LDA, fitted": contrast(inside, inside, groups, groups), "LDA, held out": float(np.mean(held))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--layer-seed", type=int, default=0, help="the seed for which other layers are measured, too")
    parser.add_argument("--n-collected", type=int, default=300_000, help="tokens of text")
    parser.add_argument("--n-tokens", type=int, default=400_000, help="to train each SAE on")
    parser.add_argument("--ks", type=int, nargs="+", default=[2, 4, 8, 16], help="numbers of lobes")
    parser.add_argument("--kept", type=Path, default=Path("runs/geometry"), help="folder of SAEs")
    parser.add_argument("--out", type=Path, help="everything as JSON")
    args = parser.parse_args()
    torch.set_num_threads(1)
    model = sl.load_model("tales", progress=False)
    hooks = [HOOK]
    if args.layer_seed in args.seeds:
        hooks = [f"blocks.{layer}.hook_resid_post" for layer in range(model.cfg.n_layers)]
    stories = generate_stories(args.n_collected // 155, first=FIRST_STORY)
    collected: Any = sl.collect(model, stories.tokens(), ["hook_embed", *hooks], progress=False)
    x, labels = labeled_activations(N_LABELED, ("topic", "state"))
    acts = collected[HOOK]
    ids = np.asarray(acts.token_ids)
    truth = stories.labels_at(acts.doc_ids, acts.positions)
    topics = [i for i, concept in enumerate(truth.concepts) if concept.kind in ("topic", "state")]
    counts = np.bincount(ids, minlength=len(VOCABULARY)).astype(np.float64)
    shares = [truth.matrix[:, topics].toarray().astype(np.float64), acts.positions.numpy()[:, None].astype(np.float64)]
    covariates = np.hstack([mean_by_word(np.hstack(shares), ids), np.log1p(counts)[:, None]])
    spaces = {
        name: mean_by_word(exact(collected[at][:]).numpy(), ids)
        for name, at in (("embedding", "hook_embed"), ("layer 2", HOOK))
    }
    tables: dict[str, Rows] = {"lobes": {}, "galaxy": {}, "crystals": {}}
    for name, vectors in spaces.items():
        for row, figures in measure_crystals(vectors, covariates, counts, 0).items():
            tables["crystals"][f"{name}, {row}"] = [figures]
    for seed in args.seeds:
        for hook in hooks if seed == args.layer_seed else [HOOK]:
            layer = hook.split(".")[1]
            sae = train(collected[hook], args.n_tokens, seed, args.kept / f"layer-{layer}-{seed}")
            untrained = make_untrained(sae, collected[hook][:10_000], seed=100 + seed)
            for name, figures in galaxies(sae, untrained, collected[hook], seed).items():
                tables["galaxy"].setdefault(f"{layer} {name}", []).append(figures)
            if hook != HOOK:
                continue
            for kind, one in (("SAE", sae), ("untrained", untrained)):
                for name, figures in measure_lobes(one, x, labels, args.ks, seed).items():
                    tables["lobes"].setdefault(f"{kind}, {name}", []).append(figures)
                found = measure_crystals(word_features(one, acts, ids), covariates, counts, seed)
                for name, figures in found.items():
                    tables["crystals"].setdefault(f"{kind}, {name}", []).append(figures)
        print(f"\nseeds so far: {args.seeds[: args.seeds.index(seed) + 1]}")
        for title, rows in tables.items():
            print(f"\n{title}\n{format_table(rows)}", flush=True)
        if args.out:
            write_json(args.out, tables)


if __name__ == "__main__":
    main()

"""Features of sentence embeddings (arXiv:2408.00657): do they form families, and does editing one steer a search?

    python scripts/measure_embeddings.py --model FOLDER --text FILE --out embeddings.json

Embeddings of sentences of stories by a Hugging Face encoder in FOLDER, made once. Sentences of the last tenth of the
stories are held out; equal ones count once. `kept` is the share of a held-out sentence's 10 nearest by cosine that the
reconstruction keeps.

Families: features that fire together (co-occurrence over that of the rarer one, exponential above .1) in a maximum
spanning tree, each edge from the denser feature to the rarer; subtrees of more than two edges at the root are families,
roots are taken out and the tree built again, three times. `inside / outside` is the co-occurrence of the root with its
family over that with other features, in the training sentences and in held-out ones; codes with each column permuted
are the null.

Search: of held-out sentences without a word, the share of the 10 nearest among all others that hold the word, as they
are and after the feature that the word predicts best (F1 at least .5 in training sentences) was set to some times its
largest code. Rivals are a random feature at its own largest code, and adding the mean embedding of training sentences
with the word, or that less the mean of all, at unit length times some weight. `near query` is the cosine with the
query as it was.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.nn.functional import normalize

import saelab as sl
from objectives.embeddings import N_NEAREST, embed, measure_fvu, nearest, read_pca, read_sentences, share_kept
from objectives.shared import format_table
from saelab.evaluation.feature_classifiers import encode_csr
from saelab.functional.statistics import f1
from saelab.sae.initialization import make_untrained
from saelab.stores.files import write_json

D_SAE, K = 1536, 16
SHARE, ROUNDS, MIN_CHILDREN, OVERLAP, MAX_DENSITY = 0.1, 3, 3, 0.6, 0.2
MIN_SENTENCES = 10  # that a feature fires on to be in a family, and that a word is in
GOOD = 0.5  # F1 of a word that predicts a feature
N_QUERIES, N_EDITED = 30, 30
STRENGTHS, WEIGHTS = (1.0, 2.0, 4.0), (0.25, 0.5, 1.0)


class Sentences(NamedTuple):
    """Embeddings and the words of each sentence, and which are held out."""

    x: torch.Tensor
    words: Any
    names: np.ndarray
    held_out: np.ndarray


def read(args: argparse.Namespace) -> Sentences:
    """Distinct sentences and their embeddings; those of the last tenth of stories are held out."""
    from sklearn.feature_extraction.text import CountVectorizer

    texts, stories = read_sentences(args.text, args.n_sentences)
    if not args.embeddings.exists():
        args.embeddings.parent.mkdir(parents=True, exist_ok=True)
        made: dict[str, Any] = embed(texts, stories, args.model)
        np.savez(args.embeddings, **made)
    found = np.load(args.embeddings)
    first = np.sort(np.unique(found["sentence_ids"], return_index=True)[1])
    counter = CountVectorizer(binary=True, min_df=MIN_SENTENCES, max_df=0.2, token_pattern=r"[a-z]+")
    words = counter.fit_transform([texts[i] for i in first])
    docs = found["doc_ids"][first]
    x = torch.from_numpy(found["embeddings"])[first]
    return Sentences(x, words, counter.get_feature_names_out(), docs >= docs[len(docs) * 9 // 10])


def train(x: torch.Tensor, n_tokens: int, seed: int, folder: Path) -> sl.SAE:
    """An SAE of embeddings; read where it was trained before."""
    if not folder.is_dir():
        cfg = sl.SAEConfig(d_in=x.shape[1], d_sae=D_SAE, activation=sl.TopK(k=K))
        run = sl.TrainConfig(n_tokens=n_tokens, batch_size=256, n_held_out=0, seed=seed)
        sl.SAE(cfg, seed=seed).fit(sl.Activations.from_tensor(x), run, progress=False).save_pretrained(folder)
    return sl.SAE.from_pretrained(folder)


@torch.no_grad()
def reconstruction(x: torch.Tensor, rebuild: Callable[[torch.Tensor], torch.Tensor]) -> dict[str, float]:
    x_hat = rebuild(x)
    return {"FVU": measure_fvu(x, x_hat), "kept": share_kept(nearest(x), nearest(x_hat))}


# ---- families
class Family(NamedTuple):
    root: int
    members: frozenset[int]


def similarity(fires: Any) -> np.ndarray:
    """Co-occurrence of features over the count of the rarer one."""
    fires = fires.astype(np.int64)  # a product of booleans is boolean
    counts = (fires.T @ fires).toarray().astype(np.float64)
    n = counts.diagonal()
    shares = counts / (np.minimum(n[:, None], n) + 1)
    np.fill_diagonal(shares, 0)
    return shares


def find_families(fires: Any) -> list[Family]:
    """Families of features of a matrix of firings (sentences, features), near duplicates once."""
    shares = similarity(fires)
    density = np.asarray(fires.sum(0)).ravel()
    left = np.flatnonzero((density >= MIN_SENTENCES) & (density < MAX_DENSITY * fires.shape[0]))
    families: list[Family] = []
    for _ in range(ROUNDS):
        found = collect_families(children_of(shares, density, left))
        families += found
        left = np.setdiff1d(left, [family.root for family in found])
    kept: list[Family] = []
    for family in sorted(families, key=lambda one: -len(one.members)):
        if all(len(family.members & o.members) <= OVERLAP * len(family.members | o.members) for o in kept):
            kept.append(family)
    return [family for family in kept if len(family.members) > MIN_CHILDREN]


def children_of(shares: np.ndarray, density: np.ndarray, left: np.ndarray) -> dict[int, list[int]]:
    """The maximum spanning forest of similar features, as the children of each feature; a child is rarer."""
    from scipy.sparse import csr_matrix
    from scipy.sparse.csgraph import minimum_spanning_tree

    part = shares[np.ix_(left, left)]
    weights = np.where(part >= SHARE, np.exp(part), 0)
    tree = minimum_spanning_tree(csr_matrix(-weights)).tocoo()
    children: dict[int, list[int]] = {int(i): [] for i in left}
    for a, b in zip(left[tree.row].tolist(), left[tree.col].tolist(), strict=True):
        parent, child = (a, b) if (density[a], -a) > (density[b], -b) else (b, a)
        children[parent].append(child)
    return children


def collect_families(children: dict[int, list[int]]) -> list[Family]:
    """What lies below each feature with more than two children and no parent, roots taken out one after another."""
    families: list[Family] = []
    children = dict(children)
    while True:
        having = {child for found in children.values() for child in found}
        roots = [i for i, found in children.items() if i not in having and found]
        if not roots:
            return families
        for root in roots:
            below = set(children[root])
            for i in (queue := list(below)):
                new = [j for j in children.get(i, ()) if j not in below]
                below.update(new)
                queue += new
            if len(children[root]) > 2:
                families.append(Family(root, frozenset(below)))
            del children[root]


def measure_families(fires: Any, held_out: Any) -> dict[str, float]:
    """Families of training sentences, and their co-occurrence there and in held-out ones."""
    families = find_families(fires)
    live = np.asarray(fires.sum(0)).ravel() >= MIN_SENTENCES

    def ratio(shares: np.ndarray) -> float:
        inside = [shares[root, list(members)].mean() for root, members in families]
        outside = [
            shares[root, np.setdiff1d(np.flatnonzero(live), [root, *members])].mean() for root, members in families
        ]
        return float(np.mean(inside) / np.mean(outside)) if families else float("nan")

    sizes = [len(family.members) for family in families] or [0]
    return {
        "families": len(families),
        "median size": float(np.median(sizes)),
        "largest": max(sizes),
        "features in one": len(frozenset().union(*(family.members for family in families))),
        "inside / outside": ratio(similarity(fires)),
        "held out": ratio(similarity(held_out)),
    }


def permute_columns(fires: Any, seed: int) -> Any:
    """Firings with as many of each feature, in random sentences."""
    from scipy.sparse import csc_matrix

    rng, columns = np.random.default_rng(seed), fires.tocsc()
    rows = [rng.choice(columns.shape[0], n, replace=False) for n in np.diff(columns.indptr)]
    return csc_matrix((columns.data, np.concatenate(rows), columns.indptr), shape=columns.shape).tocsr()


# ---- search
def good_words(fires: Any, words: Any) -> list[tuple[float, int, int]]:
    """(F1, feature, word) of the best word of each feature where it is good, one feature a word, best first."""
    a, b = fires.astype(np.float64), words.astype(np.float64)
    scores = np.nan_to_num(f1((a.T @ b).toarray(), np.asarray(a.sum(0)).T, np.asarray(b.sum(0))))
    best = scores.argmax(1)
    found = sorted(((float(scores[i, w]), i, int(w)) for i, w in enumerate(best) if scores[i, w] >= GOOD), reverse=True)
    chosen: dict[int, tuple[float, int, int]] = {}
    for one in found:
        chosen.setdefault(one[2], one)
    return list(chosen.values())


@torch.no_grad()
def edit(sae: sl.SAE, x: torch.Tensor, feature: int, value: float) -> torch.Tensor:
    """Embeddings with a feature set, the k largest codes kept and the reconstruction error added back; unit length."""
    z = sae.encode(x)
    error = x - sae.decode(z)
    z[:, feature] = value
    top = z.topk(K, dim=1)
    return normalize(sae.decode(torch.zeros_like(z).scatter_(1, top.indices, top.values)) + error)


def measure_search(sae: sl.SAE, data: Sentences, seed: int) -> dict[str, dict[str, float]]:
    """Share of the nearest sentences that hold the word and cosine to the query, by way of steering."""
    rng = np.random.default_rng(seed)
    train_x = data.x[~data.held_out]
    codes = encode_csr(sae, train_x)
    good, peaks = good_words(codes != 0, data.words[~data.held_out]), codes.max(axis=0).toarray().ravel()
    figures: dict[str, list[tuple[float, float]]] = {}
    for i in rng.permutation(len(good))[:N_EDITED]:
        _, feature, word = good[i]
        has = torch.from_numpy(data.words[:, [word]].toarray().ravel() > 0)
        rows = rng.choice(np.flatnonzero(data.held_out & ~has.numpy()), N_QUERIES, replace=False)
        other = int(rng.choice(np.flatnonzero(peaks > 0)))
        mean = train_x[has[torch.from_numpy(~data.held_out)]].mean(0)
        for name, steered in steer(sae, data.x[rows], feature, other, peaks, mean, train_x.mean(0)).items():
            scores = steered @ data.x.T
            scores[torch.arange(len(rows)), torch.from_numpy(rows)] = -2  # a query does not find itself
            hits = has[scores.topk(N_NEAREST).indices].float().mean()
            figures.setdefault(name, []).append((float(hits), float((steered * data.x[rows]).sum(1).mean())))
    counts = {"good words": float(len(good)), "F1 >= .8": float(sum(score >= 0.8 for score, *_ in good))}
    return {
        name: {"word": (m := np.mean(found, 0))[0], "near query": m[1], **counts} for name, found in figures.items()
    }


def steer(
    sae: sl.SAE,
    query: torch.Tensor,
    feature: int,
    other: int,
    peaks: np.ndarray,
    mean: torch.Tensor,
    rest: torch.Tensor,
) -> dict[str, torch.Tensor]:
    """Queries as they are, and edited in each way."""
    edited = {f"feature x {c:g}": edit(sae, query, feature, c * float(peaks[feature])) for c in STRENGTHS}
    edited |= {f"random feature x {c:g}": edit(sae, query, other, c * float(peaks[other])) for c in STRENGTHS}
    for name, added in (("word mean", mean), ("mean difference", mean - rest)):
        edited |= {f"{name} x {c:g}": normalize(query + c * normalize(added, dim=0)) for c in WEIGHTS}
    return {"before": query, **edited}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="folder of a Hugging Face encoder")
    parser.add_argument("--text", type=Path, required=True, help="stories that end with <|endoftext|>")
    parser.add_argument(
        "--embeddings", type=Path, default=Path("runs/embeddings/embeddings.npz"), help="made if missing"
    )
    parser.add_argument("--n-sentences", type=int, default=20_000)
    parser.add_argument("--n-tokens", type=int, default=400_000, help="sentences to train each SAE on, over and over")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--kept", type=Path, default=Path("runs/embeddings"), help="folder of SAEs")
    parser.add_argument("--out", type=Path, help="everything as JSON")
    args = parser.parse_args()
    torch.set_num_threads(1)
    data = read(args)
    train_x, held_out = data.x[~data.held_out], data.x[data.held_out]
    print(f"{len(train_x):,} sentences x {args.n_tokens / len(train_x):.0f} passes, {len(held_out):,} held out")
    print(f"kept by chance {N_NEAREST / len(held_out):.3f}", flush=True)
    tables: dict[str, dict[str, list[dict[str, float]]]] = {"reconstruction": {}, "families": {}, "search": {}}
    pca = read_pca(train_x)
    tables["reconstruction"]["PCA"] = [reconstruction(held_out, lambda x: pca(x, K)[0])]
    for seed in args.seeds:
        sae = train(train_x, args.n_tokens, seed, args.kept / f"sae-{seed}")
        untrained = make_untrained(sae, train_x[:10_000], seed=100 + seed)
        for name, one in (("SAE", sae), ("untrained", untrained)):
            tables["reconstruction"].setdefault(name, []).append(reconstruction(held_out, one))
            fires = [encode_csr(one, x) != 0 for x in (train_x, held_out)]
            permuted = [permute_columns(codes, seed) for codes in fires]
            for kind, found in ((name, fires), (f"{name}, permuted", permuted)):
                tables["families"].setdefault(kind, []).append(measure_families(*found))
        for name, figures in measure_search(sae, data, seed).items():
            tables["search"].setdefault(name, []).append(figures)
        print(f"\nseeds so far: {args.seeds[: args.seeds.index(seed) + 1]}")
        for title, rows in tables.items():
            print(f"\n{title}\n{format_table(rows)}", flush=True)
        if args.out:
            write_json(args.out, tables)


if __name__ == "__main__":
    main()

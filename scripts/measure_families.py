"""Features of sentence embeddings (arXiv:2408.00657): families, labels, matches across sizes, and edits of a search.

    python scripts/measure_families.py minilm --model FOLDER --text FILE --out families.json
    python scripts/measure_families.py tales

`minilm`: distinct sentences of stories, embedded by a Hugging Face encoder in FOLDER; those of the last tenth of the
stories are held out. Dictionaries: `SAE` (TopK), `untrained` (random rows), `PCA` (all components, the largest 16 codes
by magnitude; `PCA, first 16` reconstructs from these) and `shuffled`, an SAE of the same sentences whose dimensions are
permuted each by itself.

- reconstruction: FVU of held-out sentences, share `kept` of the ten nearest of a sentence by cosine among them.
- labels: sides with a good rule (`label_by_rules`, on all sentences; F1 and r on the half that rules were not chosen
  on), and clean ones, F1 and r at least .8. `exchanged`: the same codes, each of another sentence.
- families: of training sentences (`find_families`), and of permuted columns; overlap of a parent with its family over
  that with others in held-out sentences. `excess 4`: edges at least four standard deviations above chance.
- sizes: features of a third of the dictionary that recur in the whole one by their codes (`compare`).
- search: `score_edit` for words that a side predicts with F1 at least .5 in training sentences, set to some times its
  largest code, queries held out and without the word. All rivals turn the query as far as the edit does. `exchanged`:
  the edit of one word's feature, looking for another word.

`tales`: sentences of tales by the mean of layer 2. A side is named by the concept of the hierarchy (root, class, word)
that it predicts best (F1 at least .5). `below`: of the pairs of a parent and a child of a family that both have names,
the share in which the child's concept lies below the parent's in the world, or is the same; `subtrees`: families with a
named parent and two or more named children of which at least .8 are below. `exchanged`: names dealt out again among
named sides. `concepts`: families of the concepts themselves.
"""

import argparse
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

import saelab as sl
from objectives.embeddings import N_NEAREST, embed, measure_fvu, nearest, read_pca, read_sentences, share_kept
from objectives.shared import FIRST_STORY, HOOK, format_table
from saelab.corpora import DocumentFeatures, EmbeddingSearch, FeatureFamilies, find_families, pool_documents, score_edit
from saelab.functional.statistics import f1
from saelab.labels.rules import label_by_rules
from saelab.sae.initialization import make_untrained
from saelab.stores.files import write_json
from saelab.synthetic.tales import CONCEPTS, generate_stories
from saelab.synthetic.vocabulary import VOCABULARY, write_out

D_SAE, SMALL, K = 1536, 512, 16
MIN_SENTENCES = 10  # that a word is in
GOOD = 0.5  # F1 of a word that predicts a side, or of a side that predicts a concept
EXCESS = 4.0
N_WORDS, STRENGTHS = 20, (1.0, 2.0, 4.0)
Table = dict[str, list[dict[str, float]]]


class Sentences(NamedTuple):
    """Embeddings and texts of sentences, the words of each, and which are held out."""

    acts: sl.Activations
    words: Any
    held_out: np.ndarray

    @property
    def x(self) -> torch.Tensor:
        """All embeddings."""
        return self.acts[:]


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
    if args.repeats:
        first = np.random.default_rng(0).permutation(len(found["sentence_ids"]))
    texts = [texts[i] for i in first]
    counter = CountVectorizer(binary=True, min_df=MIN_SENTENCES, max_df=0.2, token_pattern=r"[a-z]+")
    docs = found["doc_ids"][first]
    acts = sl.embed(torch.from_numpy(found["embeddings"])[first], texts, progress=False)
    last = np.arange(len(docs)) >= len(docs) * 9 // 10
    held_out = last if args.repeats else docs >= docs[len(docs) * 9 // 10]
    return Sentences(acts, counter.fit_transform(texts), held_out)


# ---- dictionaries
def train(x: torch.Tensor, d_sae: int, k: int, n_tokens: int, seed: int, signed: bool = False) -> sl.SAE:
    cfg = sl.SAEConfig(d_in=x.shape[1], d_sae=d_sae, activation=sl.AbsTopK(k=k) if signed else sl.TopK(k=k))
    run = sl.TrainConfig(n_tokens=n_tokens, batch_size=256, n_held_out=0, seed=seed)
    return sl.SAE(cfg, seed=seed).fit(sl.Activations.from_tensor(x), run, progress=False)


def permute_dimensions(x: torch.Tensor, seed: int) -> torch.Tensor:
    """Each dimension with its own values, in another order of the rows."""
    rng = np.random.default_rng(seed)
    return torch.from_numpy(rng.permuted(x.numpy(), axis=0))


def make_pca(x: torch.Tensor) -> sl.SAE:
    """All principal components as a dictionary, of which a row has the largest codes by magnitude."""
    mean, d = x.mean(0), x.shape[1]
    axes = torch.linalg.svd(x - mean, full_matrices=False).Vh
    sae = sl.SAE(sl.SAEConfig(d_in=d, d_sae=d, activation=sl.AbsTopK(k=K), normalizer="none"), seed=0)
    with torch.no_grad():
        sae.W_enc.copy_(axes.T)
        sae.W_dec.copy_(axes)
        sae.b_enc.zero_()
        sae.b_dec.copy_(mean)
    return sae


def make_dictionaries(x: torch.Tensor, n_tokens: int, seed: int) -> dict[str, sl.SAE]:
    sae = train(x, D_SAE, K, n_tokens, seed)
    return {
        "SAE": sae,
        "untrained": make_untrained(sae, x[:10_000], seed=100 + seed),
        "PCA": make_pca(x),
        "shuffled": train(permute_dimensions(x, seed), D_SAE, K, n_tokens, seed),
    }


def harvest(sae: sl.SAE, acts: sl.Activations, folder: Path) -> sl.FeatureStore:
    return sl.harvest(sae, None, acts, folder, allow_mismatch=True, progress=False)


@torch.no_grad()
def reconstruction(x: torch.Tensor, rebuild: Callable[[torch.Tensor], torch.Tensor]) -> dict[str, float]:
    x_hat = rebuild(x)
    return {"FVU": measure_fvu(x, x_hat), "kept": share_kept(nearest(x), nearest(x_hat))}


# ---- labels
def label(store: sl.FeatureStore, seed: int) -> tuple[dict[str, float], tuple[tuple[int, int], ...]]:
    """Figures of labels by rules, and the sides with clean ones."""
    found = label_by_rules(store, seed=seed)
    clean, good = found.clean_sides(), found.good
    figures = {
        "sides": len(found.rows),
        "good": len(good) / max(1, len(found.rows)),
        "median F1": float(np.median([row.f1 for row in good])) if good else float("nan"),
        "median r": float(np.median([row.r for row in good])) if good else float("nan"),
        "F1, r >= .5": len(found.clean_sides(0.5, 0.5)),
        "clean": len(clean),
    }
    return figures, clean


# ---- families
def measure_families(
    train: DocumentFeatures, held_out: DocumentFeatures, seed: int, **options: Any
) -> dict[str, float]:
    found = find_families(train, seed=seed, **options)
    scores = found.score(held_out)
    return {
        "families": len(found.families),
        "permuted": float(np.mean(found.null_counts)),
        "q <= .05": sum(one.q <= 0.05 for one in found.families),
        "largest": max((len(one.children) for one in found.families), default=0),
        "sides in one": len(found.members),
        "in / out": found.ratio,
        "held out": scores.ratio,
    }


# ---- search
def good_words(codes: DocumentFeatures, words: Any) -> list[tuple[int, int, int]]:
    """(feature, sign, word) of sides whose best word is good, one side a word, the best first."""
    fires = codes.matrix.astype(bool).astype(np.float64)
    b = words.astype(np.float64)
    hits = (fires.T @ b).toarray()
    scores = np.nan_to_num(f1(hits, np.asarray(fires.sum(0)).T, np.asarray(b.sum(0))))
    best = scores.argmax(1)
    order = sorted(range(len(best)), key=lambda i: -scores[i, best[i]])
    chosen: dict[int, tuple[int, int, int]] = {}
    for i in order:
        if scores[i, best[i]] >= GOOD:
            chosen.setdefault(int(best[i]), (i // 2, 1 - 2 * (i % 2), int(best[i])))
    return list(chosen.values())


def measure_search(
    name: str, sae: sl.SAE, data: Sentences, good: list[tuple[int, int, int]], seed: int
) -> Iterator[tuple[str, dict[str, float]]]:
    """Figures of edits, means over words, by strength."""
    search = EmbeddingSearch(sae, data.x, allow_mismatch=True)
    rng = np.random.default_rng(seed)
    chosen = [good[i] for i in rng.permutation(len(good))[:N_WORDS]]
    strengths = STRENGTHS if name == "SAE" else STRENGTHS[1:2]
    ways = [(f"{name} x {c:g}", c, 0) for c in strengths] + [(f"{name} x 2, exchanged", 2.0, 1)] * (name == "SAE")
    for way, strength, step in ways:
        rows = []
        for i, (feature, sign, _) in enumerate(chosen):
            word = chosen[(i + step) % len(chosen)][2]
            has = data.words[:, [word]].toarray().ravel() > 0
            value = sign * strength * float(search.peaks[feature, (1 - sign) // 2])
            one = score_edit(search, {feature: value}, has, known=~data.held_out, seed=seed)
            names = ("before", "edited", "word_mean", "mean_difference", "random", "near_query")
            rows.append([getattr(one, key) for key in names])
        if rows:
            yield way, dict(zip(names, np.mean(rows, 0).tolist(), strict=True)) | {"words": len(good)}


def measure_sizes(whole: sl.FeatureStore, data: Sentences, small: sl.SAE, folder: Path) -> dict[str, float]:
    """How many features of a smaller dictionary recur in the whole one, and how many are split there."""
    found = sl.compare(harvest(small, data.acts, folder), whole, progress=False)
    kinds = [one.kind for one in found.relations[0]]
    return {
        "median r": found.a.median,
        "by chance": found.a.chance[0],
        "universal": found.a.share(),
        "same": kinds.count("same") / SMALL,
        "split": kinds.count("split") / SMALL,
        "of the whole": found.b.share(),
    }


def measure_minilm(args: argparse.Namespace) -> None:
    data = read(args)
    train_x, held_out = data.x[~torch.from_numpy(data.held_out)], data.x[torch.from_numpy(data.held_out)]
    print(f"{len(train_x):,} sentences x {args.n_tokens / len(train_x):.0f} passes, {len(held_out):,} held out")
    print(f"kept by chance {N_NEAREST / len(held_out):.3f}", flush=True)
    tables: dict[str, Table] = {name: {} for name in ("reconstruction", "labels", "families", "sizes", "search")}
    pca = read_pca(train_x)
    tables["reconstruction"][f"PCA, first {K}"] = [reconstruction(held_out, lambda x: pca(x, K)[0])]

    def add(table: str, name: str, figures: dict[str, float]) -> None:
        tables[table].setdefault(name, []).append(figures)

    for seed in args.seeds:
        with tempfile.TemporaryDirectory() as folder:
            for name, sae in make_dictionaries(train_x, args.n_tokens, seed).items():
                add("reconstruction", name, reconstruction(held_out, sae))
                store = harvest(sae, data.acts, Path(folder, name))
                codes = pool_documents(store)
                parts = codes.rows(~data.held_out), codes.rows(data.held_out)
                labels, clean = label(store, seed)
                add("labels", name, labels)
                add("families", name, measure_families(*parts, seed))
                add("families", f"{name}, excess 4", measure_families(*parts, seed, min_excess=EXCESS))
                good = good_words(parts[0], data.words[~data.held_out])
                if name == "SAE":
                    texts = [data.acts.texts[i] for i in np.random.default_rng(seed).permutation(len(data.acts))]
                    moved = replace_texts(data.acts, texts)
                    add("labels", "exchanged", label(harvest(sae, moved, Path(folder, "exchanged")), seed)[0])
                    if len(clean) > 1:
                        add("families", "SAE, clean", measure_families(*parts, seed, sides=clean))
                    add(
                        "sizes",
                        "SAE",
                        measure_sizes(
                            store,
                            data,
                            small := train(train_x, SMALL, K, args.n_tokens, seed + 50),
                            Path(folder, "small"),
                        ),
                    )
                    whole = store
                if name == "untrained":
                    add("sizes", "in an untrained one", measure_sizes(store, data, small, Path(folder, "small-2")))
                    other = make_untrained(small, train_x[:10_000], seed=seed)
                    add("sizes", "untrained in the SAE", measure_sizes(whole, data, other, Path(folder, "small-3")))
                for way, figures in measure_search(name, sae, data, good, seed):
                    add("search", way, figures)
                print(f"seed {seed}: {name} done", flush=True)
        show(tables, args.out)


def replace_texts(acts: sl.Activations, texts: list[str]) -> sl.Activations:
    return sl.embed(acts[:], texts, progress=False)


def show(tables: dict[str, Table], out: Path | None) -> None:
    for title, rows in tables.items():
        if rows:
            print(f"\n{title}\n{format_table(rows)}", flush=True)
    if out:
        write_json(out, tables)


# ---- tales
class World(NamedTuple):
    """Sentences of tales, the concepts of the hierarchy in each, and the ancestors of each concept."""

    texts: list[str]
    concepts: Any
    names: list[str]
    above: dict[str, frozenset[str]]


def read_world(n_stories: int, n_sentences: int, seed: int) -> World:
    """Distinct sentences, with the concepts that any of their words has."""
    from scipy.sparse import csr_matrix

    stories = generate_stories(n_stories, first=FIRST_STORY + 20_000_000 + seed * n_stories)
    words = np.array(VOCABULARY)[stories.token_ids]
    ends = np.isin(words, [".", "?"]) | (stories.token_ids < 4)
    sentence = np.concatenate([[0], np.cumsum(ends)[:-1]])
    parents = {one.name: one.parent for one in CONCEPTS if one.kind in ("root", "class", "word")}
    kept = [i for i, one in enumerate(stories.labels.concepts) if one.name in parents]
    names = [stories.labels.concepts[i].name for i in kept]
    spans = np.split(words[stories.token_ids >= 4], np.flatnonzero(np.diff(sentence[stories.token_ids >= 4])) + 1)
    texts = [write_out(list(part)) for part in spans]
    numbers = np.unique(sentence[stories.token_ids >= 4])
    rows = csr_matrix((np.ones(len(sentence)), (sentence, np.arange(len(sentence)))))[numbers]
    concepts = (rows @ stories.labels.matrix[:, kept].astype(float)).tocsr()
    first = np.sort(np.unique(texts, return_index=True)[1])[:n_sentences]

    def ancestors(name: str) -> frozenset[str]:
        above = parents.get(name)
        return frozenset() if above is None else frozenset({above}) | ancestors(above)

    return World([texts[i] for i in first], concepts[first], names, {name: ancestors(name) for name in parents})


def name_concepts(codes: DocumentFeatures, world: World) -> dict[tuple[int, int], str]:
    """The concept that each side predicts best, where it is good."""
    fires, truth = (one.astype(bool).astype(np.float64) for one in (codes.matrix, world.concepts))
    scores = np.nan_to_num(f1((fires.T @ truth).toarray(), np.asarray(fires.sum(0)).T, np.asarray(truth.sum(0))))
    best = scores.argmax(1)
    good = np.flatnonzero(scores[np.arange(len(best)), best] >= GOOD)
    return {(int(i) // 2, 1 - 2 * (int(i) % 2)): world.names[best[i]] for i in good}


def score_subtrees(found: FeatureFamilies, names: dict[tuple[int, int], str], world: World) -> dict[str, float]:
    """How far families are subtrees of the world's hierarchy."""
    inside, subtrees, judged = [], 0, 0
    for one in found.families:
        if one.parent not in names:
            continue
        parent = names[one.parent]
        own = [parent in (names[child], *world.above[names[child]]) for child in one.children if child in names]
        inside += own
        judged += len(own) >= 2
        subtrees += len(own) >= 2 and np.mean(own) >= 0.8
    return {
        "families": len(found.families),
        "permuted": float(np.mean(found.null_counts)),
        "named": len(names),
        "pairs": len(inside),
        "below": float(np.mean(inside)) if inside else float("nan"),
        "judged": judged,
        "subtrees": subtrees / judged if judged else float("nan"),
    }


def measure_tales(args: argparse.Namespace) -> None:
    model = sl.load_model("tales", progress=False)
    table: Table = {}
    for seed in args.seeds:
        world = read_world(args.n_stories, args.n_sentences, seed)
        acts = sl.embed(model, world.texts, pooling="mean", hook_point=HOOK, progress=False)
        print(f"{len(world.texts):,} sentences, {world.concepts.shape[1]} concepts", flush=True)
        sae = train(acts[:], 512, 8, args.n_tokens, seed, signed=True)
        given = {
            "SAE": (sae, acts),
            "untrained": (make_untrained(sae, acts[:], seed=seed), acts),
            "PCA": (make_pca(acts[:]), acts),
            "concepts": truth_of(world),
        }
        for name, (one, rows) in given.items():
            with tempfile.TemporaryDirectory() as folder:
                codes = pool_documents(harvest(one, rows, Path(folder, "store")))
                for kind, options in (("", {}), (", excess 4", {"min_excess": EXCESS})):
                    found = find_families(codes, seed=seed, **options)
                    names = name_concepts(codes, world)
                    table.setdefault(name + kind, []).append(score_subtrees(found, names, world))
                    dealt = np.random.default_rng(seed).permutation(list(names.values())).tolist()
                    mixed = dict(zip(names, dealt, strict=True))
                    table.setdefault(name + kind + ", exchanged", []).append(score_subtrees(found, mixed, world))
        show({"tales": table}, args.out)


def truth_of(world: World) -> tuple[sl.SAE, sl.Activations]:
    """A dictionary whose features are the concepts."""
    x = torch.from_numpy((world.concepts.toarray() > 0).astype(np.float32))
    d = x.shape[1]
    sae = sl.SAE(sl.SAEConfig(d_in=d, d_sae=d, activation=sl.TopK(k=int(x.sum(1).max())), normalizer="none"), seed=0)
    with torch.no_grad():
        sae.W_enc.copy_(torch.eye(d))
        sae.W_dec.copy_(torch.eye(d))
        sae.b_enc.zero_()
        sae.b_dec.zero_()
    return sae, sl.embed(x, world.texts, progress=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    stages = parser.add_subparsers(dest="stage", required=True)
    minilm, tales = stages.add_parser("minilm"), stages.add_parser("tales")
    minilm.add_argument("--model", type=Path, required=True, help="folder of a Hugging Face encoder")
    minilm.add_argument("--text", type=Path, required=True, help="stories that end with <|endoftext|>")
    minilm.add_argument(
        "--embeddings", type=Path, default=Path("runs/embeddings/embeddings.npz"), help="made if missing"
    )
    minilm.add_argument("--n-sentences", type=int, default=20_000)
    minilm.add_argument("--n-tokens", type=int, default=400_000, help="sentences to train each SAE on, over and over")
    minilm.add_argument("--repeats", action="store_true", help="sentences as they come, split at random")
    tales.add_argument("--n-stories", type=int, default=1200)
    tales.add_argument("--n-sentences", type=int, default=8_000)
    tales.add_argument("--n-tokens", type=int, default=200_000)
    for stage in (minilm, tales):
        stage.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
        stage.add_argument("--out", type=Path, help="everything as JSON")
    args = parser.parse_args()
    torch.set_num_threads(1)
    measure_minilm(args) if args.stage == "minilm" else measure_tales(args)


if __name__ == "__main__":
    main()

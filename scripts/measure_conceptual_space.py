"""How much of activations is in named concepts (arXiv:2209.00445)? Nouns of `tales` by its hierarchy of concepts.

    python scripts/measure_conceptual_space.py --out concepts.json

Activations of layer 2 at nouns of stories are described by cosines with concepts (root > class > word), whose vectors
are the mean activations of their words in other stories; concepts are chosen from the top down to a budget. `kept` is
the share of an activation's ten nearest by cosine that are kept, `agree` the share of held-out activations for which a
logistic regression on the concepts predicts the same as one on the activations: the class of the noun, and the topic.
`medoids` is the share of activations whose class is that of their representative point, as many as concepts.

Rivals of as many numbers: principal components, a random projection, the sides of an SAE that fire most, and a shuffled
bank, whose vectors are means of as many tokens drawn at random. Every seed is another SAE, other stories and tokens.
"""

import argparse
from pathlib import Path

import numpy as np
import torch

import saelab as sl
from measure_corpora import read_sae
from measure_topics import largest_of_each
from objectives.shared import FIRST_STORY, HOOK, format_table
from saelab.corpora import ConceptBank, conceptualize, neighbors_kept, representative_points
from saelab.evaluation.feature_classifiers import encode_csr
from saelab.lm.token_labels import TokenLabels
from saelab.stores.files import write_json
from saelab.synthetic import lexicon as lex
from saelab.synthetic.tales import generate_stories

N_STORIES, N_ROWS, LEAST = 250, 1500, 5
KINDS = ("root", "class", "word")


def main() -> None:
    command = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    command.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    command.add_argument("--n-tokens", type=int, default=300_000)
    command.add_argument("--budgets", type=int, nargs="+", default=[13, 32, 64, 128])
    command.add_argument("--out", type=Path, default=Path("concepts.json"))
    args = command.parse_args()
    tables: dict[int, dict[str, list[dict[str, float]]]] = {n: {} for n in args.budgets}
    for seed in args.seeds:
        x_bank, labels_bank = read_nouns(FIRST_STORY + 50_000_000 + seed * N_STORIES)
        x, labels = read_nouns(FIRST_STORY + 60_000_000 + seed * N_STORIES)
        rng = np.random.default_rng(seed)
        chosen = rng.choice(len(x), min(N_ROWS, len(x)), replace=False)
        rows, classes, topics = x[chosen], which(labels, "class")[chosen], which(labels, "topic")[chosen]
        bank, shuffled = make_bank(x_bank, labels_bank, None), make_bank(x_bank, labels_bank, rng)
        codes = largest_of_each(
            encode_csr(read_sae("TopK", args.n_tokens, seed), torch.from_numpy(rows)), np.arange(len(rows))
        )
        axes = np.linalg.svd(x_bank - x_bank.mean(0), full_matrices=False)[2]
        for n, table in tables.items():
            space = conceptualize(rows, bank, n)
            width = len(space.names)
            fires = np.argsort(-np.asarray((codes > 0).sum(0)).ravel())[:width]
            for name, y in {
                "concepts": space.coordinates,
                "shuffled bank": conceptualize(rows, shuffled, n).coordinates,
                "PCA": (rows - rows.mean(0)) @ axes[:width].T,
                "random projection": (rows - rows.mean(0)) @ rng.normal(size=(rows.shape[1], width)),
                "sides of an SAE": codes[:, fires].toarray(),
            }.items():
                points = representative_points(y, width, seed=seed)
                table.setdefault(name, []).append(
                    {"numbers": float(y.shape[1]), "kept": neighbors_kept(rows - rows.mean(0), y),
                     "agree, class": agree(rows, y, classes, seed), "agree, topic": agree(rows, y, topics, seed),
                     "medoids": float((classes[points.rows][points.cluster] == classes).mean())}
                )  # fmt: skip
            if seed == args.seeds[0]:
                print(f"{n}: {', '.join(space.splits)} were split", flush=True)
        print(
            f"seed {seed}: {len(rows):,} nouns, {len(bank)} concepts, kept by chance {10 / (len(rows) - 1):.3f}",
            flush=True,
        )
    for n, table in tables.items():
        print(f"\nat most {n} concepts\n{format_table(table)}")
    write_json(args.out, {str(n): rows for n, rows in tables.items()})


def read_nouns(first: int) -> tuple[np.ndarray, TokenLabels]:
    """Activations at the nouns of stories in paragraphs with a topic, and their concepts."""
    stories = generate_stories(N_STORIES, first=first)
    tokens = stories.tokens()
    kept = tokens.attention_mask & (tokens.ids >= 4)
    labels = stories.labels_at(*kept.nonzero(as_tuple=True))
    model = sl.load_model("tales", progress=False)
    parts = [
        sl.lm.capture(model, ids, [HOOK])[HOOK][m] for ids, m in zip(tokens.ids.split(50), kept.split(50), strict=True)
    ]
    nouns = (which(labels, "class") >= 0) & (which(labels, "topic") >= 0)
    chosen = np.flatnonzero(nouns)
    found = TokenLabels.of(labels.matrix[chosen], labels.concepts, labels.doc_ids[chosen])
    return torch.cat(parts).double().numpy()[chosen], found


def which(labels: TokenLabels, kind: str) -> np.ndarray:
    """The concept of a kind that each token has, of classes only those of the hierarchy; -1 for none."""
    names = (
        [f"topic {name}" for name in lex.TOPICS] if kind == "topic" else [n for c in lex.CLASSES.values() for n in c]
    )
    held = np.stack([np.asarray(labels[name]) for name in names], axis=1)
    return np.where(held.any(1), held.argmax(1), -1)


def make_bank(x: np.ndarray, labels: TokenLabels, rng: np.random.Generator | None) -> ConceptBank:
    """Concepts of the hierarchy that occur, with mean activations; with a generator those of tokens drawn at random."""
    names: list[str] = []
    vectors: list[np.ndarray] = []
    parents: list[int] = []
    for concept in labels.concepts:
        if concept.kind not in KINDS or (concept.parent is not None and concept.parent not in names):
            continue
        own = np.flatnonzero(np.asarray(labels[concept.name]))
        if len(own) >= LEAST:
            names.append(concept.name)
            vectors.append(x[own if rng is None else rng.choice(len(x), len(own), replace=False)].mean(0))
            parents.append(-1 if concept.parent is None else names.index(concept.parent))
    return ConceptBank(names=names, vectors=np.stack(vectors), parents=parents)


def agree(x: np.ndarray, y: np.ndarray, truth: np.ndarray, seed: int) -> float:
    """Share of held-out rows for which regressions on both predict the same."""
    from sklearn.linear_model import LogisticRegression

    early = np.random.default_rng(seed).random(len(x)) < 0.6
    said = []
    for rows in (x, y):
        given = (rows - rows.mean(0)) / rows.std()
        fitted = LogisticRegression(max_iter=200).fit(given[early], truth[early])
        said.append(fitted.predict(given[~early]))
    return float((said[0] == said[1]).mean())


if __name__ == "__main__":
    main()

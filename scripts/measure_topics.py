"""Topics of paragraphs by SAE features, ICA, k-means, NMF and LDA, against the ten topics of `tales`.

    python scripts/measure_topics.py --out topics.json

A document is a paragraph of a story, whose sentences are of one of ten topics (kitchen, sea, ...). It is described by
its mean activation in layer 2 of `tales`, by the codes of an SAE of that layer (the largest magnitude over its tokens),
by the same of an untrained SAE, and by its words (those that are neither punctuation nor function words). Topics are
found in half of the paragraphs; `coherence` is the NPMI of each topic's ten words in the other half.

`AMI` is adjusted for chance, `NMI` and `purity` are not. `features` takes ten features as topics, `nmf` factorizes
codes as if features were words (TVQ-VAE, arXiv:2312.11532), `ica` takes independent components of embeddings (semantic
signal separation, arXiv:2406.09556), `lda` sees words alone. `told` is what topics could be: the side that tells each
topic best in one half of the paragraphs (AUROC), as topics of the other half. Every seed is another SAE, other stories
and other draws.
"""

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import rankdata

import saelab as sl
from measure_corpora import D_SAE, read_sae
from objectives.shared import FIRST_STORY, HOOK, format_table
from saelab.corpora import find_topics, score_topics
from saelab.corpora.topics import name_topics
from saelab.evaluation.feature_classifiers import encode_csr
from saelab.stores.files import write_json
from saelab.synthetic import lexicon as lex
from saelab.synthetic.tales import FUNCTION, generate_stories
from saelab.synthetic.vocabulary import VOCABULARY

N_STORIES = 600
LEAST = 12  # tokens of a paragraph


def main() -> None:
    command = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    command.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    command.add_argument("--n-tokens", type=int, default=300_000)
    command.add_argument("--n-topics", type=int, nargs="+", default=[10])
    command.add_argument("--out", type=Path, default=Path("topics.json"))
    args = command.parse_args()
    tables: dict[int, dict[str, list[dict[str, float]]]] = {n: {} for n in args.n_topics}
    for seed in args.seeds:
        x, codes, counts, vocabulary, truth = read_paragraphs(seed, args.n_tokens)
        early = np.random.default_rng(seed).random(len(truth)) < 0.5
        for n, rows in tables.items():
            for name, given, method in [
                *((f"{kind} features", codes[kind], "features") for kind in codes),
                *((f"{kind}, NMF", codes[kind], "nmf") for kind in codes),
                ("TopK, k-means", codes["TopK"], "kmeans"),
                ("embeddings, ICA", x, "ica"),
                ("embeddings, k-means", x, "kmeans"),
                ("words, NMF", counts, "nmf"),
                ("words, k-means", counts, "kmeans"),
                ("words, LDA", counts, "lda"),
                ("random", counts, "random"),
            ]:
                found = find_topics(given[early], counts[early], vocabulary, method=method, n_topics=n, seed=seed)
                scores = score_topics(found, counts[~early], vocabulary, truth[early])
                rows.setdefault(name, []).append(
                    {"AMI": scores.ami, "NMI": scores.nmi, "purity": scores.purity, "coherence": scores.coherence,
                     "diversity": scores.diversity}
                )  # fmt: skip
                if seed == args.seeds[0] and n == len(lex.TOPICS) and name in ("TopK, NMF", "words, LDA"):
                    print(f"{name}\n{found}\n", flush=True)
        for kind, given in codes.items():
            found = choose_told(given, truth, early, counts, vocabulary)
            scores = score_topics(found, counts[early], vocabulary, truth[~early])
            tables[args.n_topics[0]].setdefault(f"{kind}, told", []).append(
                {"AMI": scores.ami, "NMI": scores.nmi, "purity": scores.purity, "coherence": scores.coherence,
                 "diversity": scores.diversity}
            )  # fmt: skip
        own = score_topics(by_truth(truth[early], counts[early], vocabulary), counts[~early], vocabulary)
        for rows in tables.values():
            rows.setdefault("tales' own topics", []).append(
                {"AMI": 1.0, "NMI": 1.0, "purity": 1.0, "coherence": own.coherence, "diversity": own.diversity}
            )
        print(f"seed {seed}: {len(truth):,} paragraphs, {len(vocabulary)} words", flush=True)
    for n, rows in tables.items():
        print(f"\n{n} topics\n{format_table(rows)}")
    write_json(args.out, {str(n): rows for n, rows in tables.items()})


def choose_told(
    codes: Any, truth: np.ndarray, early: np.ndarray, counts: Any, vocabulary: list[str]
) -> sl.corpora.Topics:
    """Topics of the later half by the side of each that tells it best (AUROC) in the first half."""
    dense = codes.toarray()
    live = np.flatnonzero((dense[early] > 0).sum(0) >= 5)
    ranks = rankdata(dense[early][:, live], axis=0)
    weights = []
    for topic in range(len(lex.TOPICS)):
        own = truth[early] == topic
        side = live[ranks[own].sum(0).argmax()]
        weights.append(dense[~early, side] / dense[:, side].max())
    found = np.stack(weights, axis=1)
    words = name_topics(found, counts[~early], vocabulary, 10)
    return sl.corpora.Topics(method="features", weights=found, words=words)


def by_truth(truth: np.ndarray, counts: Any, vocabulary: list[str]) -> sl.corpora.Topics:
    """The known topics, with their words."""
    weights = np.eye(int(truth.max()) + 1)[truth]
    return sl.corpora.Topics(method="random", weights=weights, words=name_topics(weights, counts, vocabulary, 10))


def read_paragraphs(seed: int, n_tokens: int) -> tuple[np.ndarray, dict[str, Any], Any, list[str], np.ndarray]:
    """Mean activations, codes by SAE, counts of words, the words, and the topic of each paragraph."""
    from scipy.sparse import csr_matrix

    stories = generate_stories(N_STORIES, first=FIRST_STORY + 40_000_000 + seed * N_STORIES)
    tokens = stories.tokens()
    kept = tokens.attention_mask & (tokens.ids >= 4)
    labels = stories.labels_at(*kept.nonzero(as_tuple=True))
    topics = np.stack([np.asarray(labels[f"topic {name}"]) for name in lex.TOPICS], axis=1)
    topic = np.where(topics.any(1), topics.argmax(1), -1)
    story = kept.nonzero()[:, 0].numpy()
    new = np.append(True, (topic[1:] != topic[:-1]) | (story[1:] != story[:-1]))
    runs, sizes = np.cumsum(new) - 1, np.bincount(np.cumsum(new) - 1)
    inside = (topic >= 0) & (sizes[runs] >= LEAST)
    places, paragraphs = np.unique(runs[inside], return_inverse=True)
    truth = topic[np.searchsorted(runs, places)]
    model = sl.load_model("tales", progress=False)
    parts = [
        sl.lm.capture(model, ids, [HOOK])[HOOK][m]
        for ids, m in zip(tokens.ids.split(100), kept.split(100), strict=True)
    ]
    x = torch.cat(parts).float()[torch.from_numpy(inside)]
    member = csr_matrix((np.ones(len(paragraphs)), (paragraphs, np.arange(len(paragraphs)))))
    means = np.asarray(member @ x.numpy()) / np.asarray(member.sum(1))
    codes = {}
    for kind in ("TopK", "AbsTopK", "untrained"):
        codes[kind] = largest_of_each(encode_csr(read_sae(kind, n_tokens, seed), x), paragraphs)
    ids = tokens.ids[kept].numpy()[inside]
    told = [j for j, word in enumerate(VOCABULARY) if word.isalpha() and word.lower() not in FUNCTION]
    counts = csr_matrix((np.ones(len(ids)), (paragraphs, ids)), shape=(len(places), len(VOCABULARY)))[:, told]
    frequent = np.flatnonzero(np.asarray((counts > 0).sum(0)).ravel() >= 5)
    return means, codes, counts[:, frequent].tocsr(), [VOCABULARY[told[j]] for j in frequent], truth


def largest_of_each(codes: Any, documents: np.ndarray) -> Any:
    """The largest magnitude of each side over the rows of each document."""
    from scipy.sparse import csr_matrix

    entries = codes.tocoo()
    columns = 2 * entries.col.astype(np.int64) + (entries.data < 0)
    keys = documents[entries.row] * (2 * D_SAE) + columns
    order = np.lexsort((-np.abs(entries.data), keys))
    first = order[np.append(True, np.diff(keys[order]) > 0)]
    found = np.abs(entries.data[first]), (documents[entries.row][first], columns[first])
    return csr_matrix(found, shape=(int(documents.max()) + 1, 2 * D_SAE))


if __name__ == "__main__":
    main()

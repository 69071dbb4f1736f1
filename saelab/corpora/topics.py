"""`find_topics`: topics of documents from codes, embeddings or counts of words; `score_topics`: how good they are."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
from jaxtyping import Float, Int, Shaped

from saelab.stores.results import Result, format_table

if TYPE_CHECKING:
    from scipy.sparse import csr_matrix

TopicMethod = Literal["features", "nmf", "ica", "kmeans", "lda", "random"]
N_WORDS = 10
ALIKE = 0.5
"""correlation over documents from which on a column stands for the same topic as one that was chosen"""
MOST_COLUMNS = 2048  # that `features` chooses among
MAX_ITER = 500
MIN_RATE = 1e-12


@dataclass(frozen=True, kw_only=True, eq=False)
class Topics(Result):
    """Topics of documents, each with its most telling words."""

    method: TopicMethod
    weights: Float[np.ndarray, "n_documents n_topics"]
    """how much of each topic a document has, at least 0; 0 of all for a document without any"""
    words: tuple[tuple[str, ...], ...]
    """most telling words of each topic, see `find_topics`"""

    @property
    def topic(self) -> Int[np.ndarray, "n_documents"]:
        """The topic that a document has most of; -1 where it has none."""
        return np.where(self.weights.max(1) > 0, self.weights.argmax(1), -1)

    def __str__(self) -> str:
        sizes = np.bincount(self.topic + 1, minlength=1 + self.weights.shape[1])[1:].tolist()
        head = f"{self.weights.shape[1]} topics of {len(self.weights):,} documents by {self.method}"
        table = [["topic", "documents", "words"]]
        table += [[str(i), f"{n:,}", ", ".join(w)] for i, (n, w) in enumerate(zip(sizes, self.words, strict=True))]
        return "\n".join([head, *format_table(table, left=(2,))])


@dataclass(frozen=True, kw_only=True)
class TopicScores(Result):
    """How good topics are by their words in other documents, and by known topics of their own."""

    coherence: float
    """mean NPMI of the pairs of a topic's words in held-out documents, -1 to 1; 0 for words that are independent"""
    diversity: float
    """share of the words of all topics that are different, 0 to 1"""
    ami: float
    """adjusted mutual information with known topics, 1 for the same, 0 for chance; NaN without"""
    nmi: float
    """normalized mutual information, which rises with the number of topics by chance alone; NaN without"""
    purity: float
    """share of documents whose known topic is the most frequent one of their topic; NaN without"""

    def __str__(self) -> str:
        names = ("coherence", "diversity", "ami", "nmi", "purity")
        return "\n".join(format_table([names, [f"{getattr(self, name):.3f}" for name in names]], left=()))


def find_topics(
    rows: Any,
    counts: "csr_matrix",
    vocabulary: Sequence[str],
    *,
    method: TopicMethod = "nmf",
    n_topics: int = 10,
    n_words: int = N_WORDS,
    seed: int = 0,
) -> Topics:
    """Topics of documents, found in whatever describes the documents, with words that say what each is about.

    - "features": columns with the most of idf x magnitude / peak, each a topic, none that goes with an earlier one.
    - "nmf": non-negative matrix factorization of idf-weighted columns; of codes, features are the words of a document,
      as in TVQ-VAE (arXiv:2312.11532).
    - "ica": independent components, turned so that each is skewed upwards, as in semantic signal separation
      (arXiv:2406.09556); a topic is weighted by how many standard deviations a document is above the mean.
    - "kmeans": clusters of the rows, of norm 1 each; a document has one topic.
    - "lda": latent Dirichlet allocation of the counts of words. It does not look at the rows.
    - "random": topics drawn at random, the baseline.

    The words of a topic are those with the largest p(word | topic) log(p(word | topic) / p(word)), where documents
    count by their weights. This is the same for every method, so that coherence compares how documents were divided.

    Args:
        rows: one row a document: pooled codes (`DocumentFeatures.matrix`), embeddings, or counts; an array or a scipy
            matrix. "features" and "nmf" need numbers of at least 0.
        counts: how often each document has each word, (n_documents, n_words).
        vocabulary: the words.
        method: how topics are found.
        n_topics: number of topics.
        n_words: words of a topic.
        seed: of what is drawn at random.

    Raises:
        ValueError: rows, counts and vocabulary that do not fit together, negative rows where they may not be, an
            unknown method, or more topics than documents or columns.
    """
    from scipy.sparse import csr_matrix, issparse

    rows = csr_matrix(rows) if issparse(rows) else np.asarray(rows)
    counts = csr_matrix(counts)
    _check(rows, counts, vocabulary, method, n_topics)
    weights = np.maximum(_METHODS[method](rows, counts, n_topics, seed), 0).astype(np.float64)
    return Topics(method=method, weights=weights, words=name_topics(weights, counts, vocabulary, n_words))


def _check(rows: Any, counts: "csr_matrix", vocabulary: Sequence[str], method: str, n_topics: int) -> None:
    if method not in get_args(TopicMethod):
        raise ValueError(f"`method` must be one of {list(get_args(TopicMethod))}, got {method!r}.")
    if rows.ndim != 2 or rows.shape[0] != counts.shape[0] or counts.shape[1] != len(vocabulary):
        raise ValueError(
            f"`rows` must have a row for each of the {counts.shape[0]} documents of `counts`, and `vocabulary` a word "
            f"for each of its {counts.shape[1]} columns, got shape {rows.shape} and {len(vocabulary)} words."
        )
    most = rows.shape[0] if method in ("kmeans", "random", "lda") else min(rows.shape)
    if not 2 <= n_topics <= most:
        raise ValueError(f"`n_topics` must be 2 to {most} for these rows by {method!r}, got {n_topics}.")
    data = getattr(rows, "data", rows) if not isinstance(rows, np.ndarray) else rows
    if method in ("features", "nmf") and data.min(initial=0) < 0:
        raise ValueError(
            f"`rows` must not be negative for {method!r}, got {data.min():.3g}; give pooled codes, or take 'ica'."
        )


def _weigh(rows: Any) -> "csr_matrix":
    """Columns over their largest number, times log(n / documents that have it)."""
    from scipy.sparse import csr_matrix, diags

    given = csr_matrix(rows, dtype=np.float64)
    given.eliminate_zeros()
    counts = np.bincount(given.indices, minlength=given.shape[1])
    peaks = np.maximum(given.max(axis=0).toarray().ravel(), MIN_RATE)
    return csr_matrix(given @ diags(np.log(given.shape[0] / np.maximum(counts, 1)) / peaks))


def _by_features(rows: Any, counts: Any, n_topics: int, seed: int) -> np.ndarray:
    weighted = _weigh(rows)
    mass = np.asarray(weighted.sum(0)).ravel()
    order = np.argsort(-mass, kind="stable")[:MOST_COLUMNS]
    dense = weighted[:, order].toarray()
    off = dense - dense.mean(0)
    off /= np.maximum(np.linalg.norm(off, axis=0), MIN_RATE)
    chosen: list[int] = []
    for i in range(len(order)):
        if len(chosen) < n_topics and (not chosen or (off[:, chosen].T @ off[:, i]).max() < ALIKE):
            chosen.append(i)
    left = [i for i in range(len(order)) if i not in set(chosen)]
    return np.asarray(dense[:, chosen + left[: n_topics - len(chosen)]])


def _by_nmf(rows: Any, counts: Any, n_topics: int, seed: int) -> np.ndarray:
    from sklearn.decomposition import NMF

    weighted = _weigh(rows)
    made = NMF(n_topics, init="nndsvda", max_iter=MAX_ITER, tol=1e-3, random_state=seed)
    found = _quietly(made.fit_transform, weighted)
    return found * np.linalg.norm(made.components_, axis=1)


def _by_ica(rows: Any, counts: Any, n_topics: int, seed: int) -> np.ndarray:
    from sklearn.decomposition import FastICA

    dense = rows if isinstance(rows, np.ndarray) else _weigh(rows).toarray()
    made = FastICA(n_topics, whiten="unit-variance", max_iter=MAX_ITER, tol=1e-3, random_state=seed)
    found = _quietly(made.fit_transform, dense.astype(np.float64))
    found = (found - found.mean(0)) / np.maximum(found.std(0), MIN_RATE)
    return np.asarray(found * np.where((found**3).mean(0) < 0, -1, 1))


def _by_kmeans(rows: Any, counts: Any, n_topics: int, seed: int) -> np.ndarray:
    from sklearn.cluster import KMeans
    from sklearn.preprocessing import normalize

    given = rows - rows.mean(0) if isinstance(rows, np.ndarray) else _weigh(rows)
    of = KMeans(n_topics, n_init=10, random_state=seed).fit_predict(normalize(given))
    return np.eye(n_topics)[of]


def _by_lda(rows: Any, counts: Any, n_topics: int, seed: int) -> np.ndarray:
    from sklearn.decomposition import LatentDirichletAllocation

    made = LatentDirichletAllocation(n_topics, max_iter=50, random_state=seed)
    return np.asarray(made.fit_transform(counts))


def _at_random(rows: Any, counts: Any, n_topics: int, seed: int) -> np.ndarray:
    return np.eye(n_topics)[np.random.default_rng(seed).integers(0, n_topics, counts.shape[0])]


_METHODS = {
    "features": _by_features,
    "nmf": _by_nmf,
    "ica": _by_ica,
    "kmeans": _by_kmeans,
    "lda": _by_lda,
    "random": _at_random,
}


def _quietly(fit: Any, x: Any) -> np.ndarray:
    """What a fit returns; that it stopped at the last iteration is no error of the caller's."""
    import warnings

    from sklearn.exceptions import ConvergenceWarning

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        return np.asarray(fit(x))


def name_topics(
    weights: Float[np.ndarray, "n_documents n_topics"], counts: "csr_matrix", vocabulary: Sequence[str], n_words: int
) -> tuple[tuple[str, ...], ...]:
    """The words that tell most of each topic: largest p(word | topic) log(p(word | topic) / p(word)).

    Args:
        weights: how much of each topic a document has.
        counts: how often each document has each word.
        vocabulary: the words.
        n_words: words of a topic.
    """
    lengths = np.maximum(np.asarray(counts.sum(1)).ravel(), 1)
    shares = np.asarray((counts.T @ (weights / lengths[:, None])).T)  # of topics: a long document counts no more
    given = shares / np.maximum(shares.sum(1, keepdims=True), MIN_RATE)
    overall = np.asarray(counts.multiply(1 / lengths[:, None]).sum(0)).ravel()
    overall = overall / max(overall.sum(), MIN_RATE)
    told = given * (np.log(np.maximum(given, MIN_RATE)) - np.log(np.maximum(overall, MIN_RATE)))
    best = np.argsort(-told, axis=1, kind="stable")[:, :n_words]
    return tuple(tuple(vocabulary[j] for j in row) for row in best.tolist())


def score_topics(
    topics: Topics,
    held_out: "csr_matrix",
    vocabulary: Sequence[str],
    truth: Shaped[np.ndarray, "n_documents"] | None = None,
) -> TopicScores:
    """Coherence of a topic's words in other documents, diversity, and agreement with known topics.

    Coherence is the mean normalized pointwise mutual information of two words of a topic occurring in one document
    (Bouma, 2009), log(p(a, b) / p(a) p(b)) / -log p(a, b); -1 for words that never meet.

    Args:
        topics: the topics.
        held_out: counts of words of documents that topics were not found in, (n_others, n_words).
        vocabulary: the words of its columns.
        truth: known topic of each document that has a topic in `topics`; None where none is known.

    Raises:
        ValueError: counts, words and truth that do not fit together.
    """
    from sklearn.metrics import adjusted_mutual_info_score, normalized_mutual_info_score
    from sklearn.metrics.cluster import contingency_matrix

    place = {word: j for j, word in enumerate(vocabulary)}
    if held_out.shape[1] != len(vocabulary) or not set().union(*topics.words) <= set(place):
        raise ValueError(
            f"`held_out` must have a column for each of {len(vocabulary)} words, those of the topics among them, got "
            f"{held_out.shape[1]} columns."
        )
    if truth is not None and len(truth) != len(topics.weights):
        raise ValueError(f"`truth` must have a topic for each of {len(topics.weights)} documents, got {len(truth)}.")
    has = (held_out > 0).astype(np.float64).tocsc()
    coherence = [_npmi(has[:, [place[word] for word in words]]) for words in topics.words]
    every = [word for words in topics.words for word in words]
    ami = nmi = purity = float("nan")
    if truth is not None:
        of = topics.topic
        ami, nmi = adjusted_mutual_info_score(truth, of), normalized_mutual_info_score(truth, of)
        purity = contingency_matrix(truth, of).max(0).sum() / len(of)
    return TopicScores(
        coherence=float(np.mean(coherence)),
        diversity=len(set(every)) / max(len(every), 1),
        ami=float(ami),
        nmi=float(nmi),
        purity=float(purity),
    )


def _npmi(has: Any) -> float:
    """Mean NPMI of all pairs of columns; words that never occur are left out."""
    n = has.shape[0]
    both = (has.T @ has).toarray() / n
    single = both.diagonal()
    known = np.flatnonzero(single > 0)
    i, j = np.triu_indices(len(known), 1)
    if len(i) == 0:
        return -1.0
    together, apart = both[known[i], known[j]], single[known[i]] * single[known[j]]
    with np.errstate(divide="ignore", invalid="ignore"):
        found = np.log(together / apart) / -np.log(together)
    found = np.where(together == 0, -1.0, np.where(together == 1, 1.0, found))
    return float(found.mean())

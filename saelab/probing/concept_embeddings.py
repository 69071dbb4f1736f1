"""`embed_concepts`: each concept as the weights of all sides of features on it, beside its one best side (Net2Vec)."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from jaxtyping import Float, Int, Shaped

from saelab.evaluation.feature_classifiers import CodeMatrix
from saelab.lm.token_labels import LabelsLike, TokenLabels
from saelab.probing.feature_ranking import PENALTY
from saelab.probing.sparse_probing import ProbeBench, choose_rows, find_documents, permute_split, read_codes
from saelab.stores.corpus import split_documents
from saelab.stores.feature_store import FeatureStore
from saelab.stores.results import Result, format_table

SHOWN = 12


@dataclass(frozen=True, kw_only=True)
class ConceptEmbedding:
    """How well one side and all sides tell the tokens of a concept; IoU is of held-out documents, 0 to 1."""

    name: str
    feature: int
    """that with the largest ANOVA F in training documents"""
    sign: int
    iou_one: float
    """of a threshold on that side"""
    iou_all: float
    """of a logistic regression on all sides"""
    iou_permuted: float
    """of such a regression on permuted labels; NaN where they cannot be permuted"""
    n_tokens: int
    """held-out tokens with the concept"""


@dataclass(frozen=True, kw_only=True, eq=False)
class ConceptEmbeddings(Result):
    """Result of `embed_concepts`: a row of weights for each concept, and what they tell."""

    rows: tuple[ConceptEmbedding, ...]
    features: Int[np.ndarray, "n_sides"] = field(repr=False)
    """feature of each column of `vectors`"""
    signs: Int[np.ndarray, "n_sides"] = field(repr=False)
    vectors: Float[np.ndarray, "n_concepts n_sides"] = field(repr=False)
    """weights of a logistic regression on sides over their standard deviation, brought to norm 1"""
    skipped: tuple[str, ...] = field(repr=False)
    """concepts with too few tokens"""
    n_train: int
    """tokens of training documents"""
    n_tokens: int
    """tokens of held-out documents"""

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the concepts."""
        return tuple(row.name for row in self.rows)

    @cached_property
    def similarity(self) -> Float[np.ndarray, "n_concepts n_concepts"]:
        """Cosine of the weights of every two concepts."""
        return np.asarray(self.vectors @ self.vectors.T)

    def nearest(self, *names: str, minus: Sequence[str] = (), n: int = 5) -> list[tuple[str, float]]:
        """The concepts nearest by cosine to a sum of others, which are left out.

        Args:
            names: concepts that are added.
            minus: concepts that are taken away.
            n: number of concepts.

        Raises:
            KeyError: for a concept that there is not.
        """
        places = {name: i for i, name in enumerate(self.names)}
        given = [places[name] for name in (*names, *minus)]
        signs = np.array([1.0] * len(names) + [-1.0] * len(minus))
        vector = signs @ self.vectors[given]
        cosines = self.vectors @ vector / max(float(np.linalg.norm(vector)), 1e-30)
        order = [i for i in np.argsort(-cosines, kind="stable").tolist() if i not in given][:n]
        return [(self.names[i], float(cosines[i])) for i in order]

    def __str__(self) -> str:
        one, every, null = (
            np.nanmean([getattr(row, name) for row in self.rows]) for name in ("iou_one", "iou_all", "iou_permuted")
        )
        head = (
            f"{len(self.rows)} concepts by {len(self.features):,} sides, {self.n_tokens:,} held-out tokens; mean IoU "
            f"of one side {one:.3f}, of all {every:.3f}, with permuted labels {null:.3f}"
        )
        table = [["concept", "one", "all", "permuted", "tokens", "feature"]]
        for row in sorted(self.rows, key=lambda row: -row.iou_all)[:SHOWN]:
            cells = (f"{x:.3f}" for x in (row.iou_one, row.iou_all, row.iou_permuted))
            table.append([row.name, *cells, f"{row.n_tokens:,}", f"{row.feature}{'' if row.sign > 0 else ' -'}"])
        return "\n".join([head, *format_table(table)])


def embed_concepts(
    codes: FeatureStore | CodeMatrix,
    labels: LabelsLike,
    doc_ids: Shaped[Any, "_"] | None = None,
    *,
    train_frac: float = 0.5,
    n_tokens: int = 200_000,
    min_count: int = 20,
    seed: int = 0,
) -> ConceptEmbeddings:
    """Weights of all sides of features on each concept, and how much they tell beyond the one best (arXiv:1801.03454).

    For each concept a logistic regression with balanced classes on all sides, and one on its best side. Regressions,
    the choice and the thresholds use training documents, IoU those held out. Concepts whose weights are similar are
    read from the same features.

    Args:
        codes: a store, or codes as `score_concepts` takes them.
        labels: which concepts are true of each token.
        doc_ids: document of each token, needed where neither `codes` is a store nor the labels have them.
        train_frac: share of documents for training.
        n_tokens: most tokens used; of more, documents are drawn by `seed`.
        min_count: concepts with fewer tokens on either side of the split are skipped.
        seed: of the split, the samples and the permutation.

    Raises:
        ValueError: sizes that disagree, or no concept that is frequent enough.

    >>> z = np.tile(np.eye(4), (25, 1))
    >>> found = embed_concepts(z, {"a": z[:, 2] > 0, "b": z[:, 2] + z[:, 3] > 0}, np.arange(100) // 4, min_count=5)
    >>> found.rows[0].feature, found.rows[0].iou_one, found.nearest("a", n=1)[0][0]
    (2, 1.0, 'b')
    """
    given = TokenLabels.of(labels, doc_ids=find_documents(codes, doc_ids))
    documents = given.require_documents()
    keep = choose_rows(documents, n_tokens, seed)
    matrix, truth, documents = read_codes(codes, keep), given.matrix[keep].tocsc(), documents[keep]
    is_train = split_documents(documents, train_frac, seed)
    bench, rng = ProbeBench.make(matrix, is_train, seed), np.random.default_rng(seed)
    rows, vectors, skipped = list[ConceptEmbedding](), list[np.ndarray](), list[str]()
    for c, name in enumerate(given.names):
        y = truth[:, [c]].toarray()[:, 0]
        sides = [y[part] for part in (is_train, ~is_train)]
        if min(min(side.sum(), (~side).sum()) for side in sides) < min_count:
            skipped.append(name)
            continue
        trial, every = bench.trial(y), np.arange(len(bench.sides))
        best = int(trial.train.choose("f", (1,))[1][0])
        found, one = trial.fit(every, c=PENALTY), trial.fit(np.array([best]))
        moved, _ = permute_split(y, documents, is_train, rng)
        null = np.nan if moved is None else bench.trial(moved).fit(every, c=PENALTY).score.f1
        vector = np.zeros(len(every))
        vector[found.columns] = found.weights
        vectors.append(vector / max(float(np.linalg.norm(vector)), 1e-30))
        rows.append(
            ConceptEmbedding(
                name=name,
                feature=int(bench.sides.features[best]),
                sign=int(bench.sides.signs[best]),
                iou_one=_iou(one.score.f1),
                iou_all=_iou(found.score.f1),
                iou_permuted=_iou(null),
                n_tokens=int(sides[1].sum()),
            )
        )
    if not rows:
        raise ValueError(
            f"`labels` must have a concept that is true, and false, of {min_count} tokens on each side of the split "
            "(`min_count`), got none; give more text."
        )
    return ConceptEmbeddings(
        rows=tuple(rows),
        features=bench.sides.features,
        signs=bench.sides.signs,
        vectors=np.stack(vectors),
        skipped=tuple(skipped),
        n_train=int(is_train.sum()),
        n_tokens=int((~is_train).sum()),
    )


def _iou(f1: float) -> float:
    """Intersection over union of a classifier, from its F1."""
    return float(f1 / (2 - f1))

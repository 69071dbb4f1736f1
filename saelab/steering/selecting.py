"""`probe_features`: the few features that tell a labelled concept, found on some documents and scored on others."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, get_args

import numpy as np
from jaxtyping import Bool, Float, Int, Shaped

from saelab.evaluation.levels import read_values
from saelab.steering.guesses import UNKNOWN, Told, choose_threshold, score_guess
from saelab.steering.labelled import draw_rows
from saelab.steering.rankings import Columns, Labelled, Ranking, Sides
from saelab.stores.corpus import split_documents
from saelab.stores.features import FeatureStore
from saelab.stores.results import Result

if TYPE_CHECKING:
    from scipy.sparse import csc_matrix, csr_matrix

SAMPLE_TOKENS = 10_000  # of each label, that regressions are fitted to
BLOCK_TOKENS = 2**16
SLACK = 0.01
MOVES = 20


@dataclass(frozen=True, kw_only=True)
class ProbedFeature:
    """One side of a feature in a probe."""

    feature: int
    sign: int
    """1 or -1: of the codes that tell of the concept"""
    weight: float
    """of |z| on that side, over its standard deviation; negative where it tells that the concept is absent"""


@dataclass(frozen=True, kw_only=True)
class SparseProbe:
    """A logistic regression on k sides of features."""

    ranking: str
    k: int
    features: tuple[ProbedFeature, ...]
    """by the size of their weights, largest first"""
    threshold: float
    """on the regression's score, with the best F1 in training documents"""
    f1_train: float
    held_out: Told
    shuffled: Told
    """the same from the ranking on, with labels moved round the text: what chance gives; NaN where moving them leaves
    a side with one label alone"""


@dataclass(frozen=True, kw_only=True)
class SparseProbes(Result):
    """What `probe_features` found."""

    concept: str
    probes: tuple[SparseProbe, ...]
    random: dict[int, Told]
    """by k: as many sides drawn at random, with the true labels"""
    rate: float
    """share of held-out tokens of which the concept is true"""
    n_train: int
    n_tokens: int
    """held-out tokens"""
    n_documents: int
    """held-out documents"""

    @property
    def f1_always(self) -> float:
        """F1 of saying yes always, `2 p / (1 + p)`."""
        return 2 * self.rate / (1 + self.rate)

    def best(self, k: int | None = None) -> SparseProbe:
        """The best probe by F1 in training documents: of size k, or the smallest within 0.01 of the best of all."""
        some = [probe for probe in self.probes if k in (None, probe.k)]
        if not some:
            sizes = sorted({probe.k for probe in self.probes})
            raise ValueError(f"`k` must be one that was probed, {sizes}, got {k}.")
        top = max(probe.f1_train for probe in some)
        return min((p for p in some if p.f1_train >= top - (0 if k else SLACK)), key=lambda p: (p.k, -p.f1_train))

    @property
    def features(self) -> tuple[ProbedFeature, ...]:
        """Those of the best probe."""
        return self.best().features

    def __str__(self) -> str:
        lines = [
            f"{self.concept}: true of {self.rate:.2%} of {self.n_tokens:,} held-out tokens of {self.n_documents:,} "
            f"documents; chosen and fitted on {self.n_train:,} others; F1 of always yes {self.f1_always:.3f}",
            f"{'ranking':<12}{'k':>4}{'F1':>8}{'MCC':>8}{'AUROC':>8}{'F1 of shuffled':>16}{'of random':>11}  features",
        ]
        for probe in self.probes:
            held, chance = probe.held_out, (probe.shuffled.f1, self.random[probe.k].f1)
            named = " ".join(_name(feature) for feature in probe.features[:6])
            more = " ..." if probe.k > 6 else ""
            lines.append(
                f"{probe.ranking:<12}{probe.k:>4}{held.f1:>8.3f}{held.mcc:>8.3f}{held.auroc:>8.3f}"
                f"{chance[0]:>16.3f}{chance[1]:>11.3f}  {named}{more}"
            )
        return "\n".join(lines)


def _name(one: ProbedFeature) -> str:
    return f"{'-' if one.weight < 0 else ''}{one.feature}{'+' if one.sign > 0 else '-'}"


def probe_features(
    codes: FeatureStore | Any,
    labels: Bool[np.ndarray, "n_tokens"],
    doc_ids: Shaped[Any, "n_tokens"] | None = None,
    *,
    concept: str = "concept",
    ks: Sequence[int] = (1, 2, 4, 8, 16),
    rankings: Sequence[Ranking] = ("means", "f", "information", "l1", "pruning"),
    train_frac: float = 0.7,
    n_tokens: int = 200_000,
    seed: int = 0,
) -> SparseProbes:
    """The features that tell a concept: logistic regressions on the k best sides of features, scored elsewhere.

    Each sign of a feature's codes is a side of its own, so that signed features count on both. Rankings:

        means        difference of means, over the side's largest code
        f            ANOVA F, `(n - 2) r^2 / (1 - r^2)`
        information  mutual information with the code in 5 bins: 0, and quarters of the others
        l1           weights of an L1 logistic regression on the 512 best by F (C = 0.1)
        pruning      what is left when a regression on those 512 loses its weaker half again and again

    Ranking, fitting (both labels weighed alike, up to 10,000 tokens of each) and the choice of the threshold see the
    documents of the training side alone, `train_frac` of them; F1, MCC and AUROC are of the others. Beside each stands
    what labels moved round the text give, and sides drawn at random. `codes` is a store, or what `score_concepts`
    takes, with `doc_ids`; of more than `n_tokens` tokens, documents are drawn by `seed`. ValueError where a side has no
    token of a label. Source: arXiv:2305.01610.

    >>> z = np.tile(np.eye(4), (25, 1))
    >>> found = probe_features(z, z[:, 2] > 0, np.arange(100) // 4, ks=(1,), rankings=("f",))
    >>> found.features[0].feature, found.best().held_out.f1
    (2, 1.0)
    """
    _check(ks, rankings)
    matrix, y, documents = _read(codes, labels, doc_ids, n_tokens, seed)
    is_train = split_documents(documents, train_frac, seed)
    for name, rows in (("training", is_train), ("held-out", ~is_train)):
        if not 0 < y[rows].sum() < rows.sum():
            said = f"{int(y[rows].sum())} true of {int(rows.sum())}"
            raise ValueError(f"Both labels must occur in {name} documents, got {said}; give more text.")
    sides = Sides.split(matrix, is_train)
    if max(ks) > len(sides):
        raise ValueError(f"`ks` must be at most the number of sides that fire ({len(sides)}), got {max(ks)}.")
    rng = np.random.default_rng(seed)
    by_row = sides.matrix.tocsr()
    columns, held = Columns(by_row[is_train].tocsc()), by_row[~is_train].tocsc()
    true, elsewhere = _Trial.make(columns, held, y, is_train, seed), _move(y, is_train, rng)
    moved = None if elsewhere is None else _Trial.make(columns, held, elsewhere, is_train, seed)
    return SparseProbes(
        concept=concept,
        probes=tuple(probe for ranking in rankings for probe in _probe(sides, true, moved, ranking, ks)),
        random={k: true.fit(rng.choice(len(sides), k, replace=False)).told for k in ks},
        rate=float(y[~is_train].mean()),
        n_train=int(is_train.sum()),
        n_tokens=int((~is_train).sum()),
        n_documents=len(np.unique(documents[~is_train])),
    )


def _check(ks: Sequence[int], rankings: Sequence[str]) -> None:
    if not ks or min(ks) < 1:
        raise ValueError(f"`ks` must be numbers of sides from 1 on, got {tuple(ks)}.")
    if not rankings or (bad := [name for name in rankings if name not in get_args(Ranking)]):
        raise ValueError(f"`rankings` must be of {get_args(Ranking)}, got {bad if rankings else 'none'}.")


def _read(
    codes: Any, labels: np.ndarray, doc_ids: Any, n_tokens: int, seed: int
) -> "tuple[csr_matrix, np.ndarray, np.ndarray]":
    """Codes, labels and documents, of some documents where there are too many tokens."""
    from scipy.sparse import csr_matrix, vstack

    if doc_ids is None and not isinstance(codes, FeatureStore):
        raise ValueError("`doc_ids` must be given with codes that are no store, got None.")
    documents = codes.doc_ids if isinstance(codes, FeatureStore) else np.asarray(doc_ids)
    values: Any = codes if isinstance(codes, FeatureStore) else csr_matrix(read_values(codes))
    n = len(documents)
    if not len(labels) == n == (len(codes) if isinstance(codes, FeatureStore) else values.shape[0]):
        raise ValueError(f"`labels` and `doc_ids` must have one for each token, got {len(labels)} and {n}.")
    keep = np.ones(n, bool) if n <= n_tokens else split_documents(documents, n_tokens / n, seed)
    if isinstance(codes, FeatureStore):
        blocks = range(0, n, BLOCK_TOKENS)
        parts = [codes.matrix(a, a + BLOCK_TOKENS)[keep[a : a + BLOCK_TOKENS]] for a in blocks]
        return vstack(parts, format="csr"), np.asarray(labels)[keep].astype(bool), documents[keep]
    return values[keep], np.asarray(labels)[keep].astype(bool), documents[keep]


def _move(y: np.ndarray, is_train: np.ndarray, rng: np.random.Generator) -> np.ndarray | None:
    """Labels moved round the text, their runs kept; None where that leaves a side without one of them."""
    for _ in range(MOVES):
        moved = np.roll(y, int(rng.integers(len(y) // 4, max(len(y) // 4 + 1, 3 * len(y) // 4))))
        if all(0 < moved[rows].sum() < rows.sum() for rows in (is_train, ~is_train)):
            return moved
    return None


@dataclass(frozen=True, eq=False)
class _Fitted:
    """A regression on some columns."""

    columns: Int[np.ndarray, "k"]
    weights: Float[np.ndarray, "k"]
    threshold: float
    f1_train: float
    told: Told


@dataclass(frozen=True, eq=False)
class _Trial:
    """One labelling of the tokens."""

    train: Labelled
    held: "csc_matrix"
    y_held: Bool[np.ndarray, "n"]

    @classmethod
    def make(cls, columns: Columns, held: "csc_matrix", y: np.ndarray, is_train: np.ndarray, seed: int) -> "_Trial":
        y_train = y[is_train]
        drawn = draw_rows(y_train, SAMPLE_TOKENS, seed) | draw_rows(~y_train, SAMPLE_TOKENS, seed)
        return cls(Labelled(columns, y_train, np.flatnonzero(drawn)), held, y[~is_train])

    def fit(self, columns: Int[np.ndarray, "k"]) -> _Fitted:
        """Fit, choose the threshold, score elsewhere."""
        weights = self.train.fit(columns)
        by_size = np.argsort(-np.abs(weights), kind="stable")
        columns, weights = columns[by_size], weights[by_size]
        scaled = weights / self.train.columns.deviations[columns]
        threshold, f1_train = choose_threshold(self.train.columns.matrix[:, columns] @ scaled, self.train.y)
        told = score_guess(self.held[:, columns] @ scaled, self.y_held, threshold)
        return _Fitted(columns, weights, threshold, f1_train, told)


def _probe(
    sides: Sides, true: _Trial, moved: _Trial | None, ranking: Ranking, ks: Sequence[int]
) -> Iterator[SparseProbe]:
    """The probes of one ranking."""
    order, chance = true.train.order(ranking), None if moved is None else moved.train.order(ranking)
    for k in ks:
        found = true.fit(order[:k])
        yield SparseProbe(
            ranking=ranking,
            k=k,
            features=tuple(
                ProbedFeature(feature=int(sides.features[i]), sign=int(sides.signs[i]), weight=float(weight))
                for i, weight in zip(found.columns, found.weights, strict=True)
            ),
            threshold=found.threshold,
            f1_train=found.f1_train,
            held_out=found.told,
            shuffled=UNKNOWN if moved is None or chance is None else moved.fit(chance[:k]).told,
        )

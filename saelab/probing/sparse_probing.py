"""`probe_features`: sparse probing, the few features that best predict a labeled concept (arXiv:2305.01610).

Baselines without an SAE: the majority classifier, a linear probe on activations, the best single neuron.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, get_args

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from saelab.evaluation.feature_classifiers import read_values
from saelab.functional.statistics import (
    UNKNOWN,
    ProbeScore,
    choose_threshold,
    fit_balanced_probe,
    permute_labels,
    score_guess,
)
from saelab.lm.token_labels import LabelsLike, TokenLabels
from saelab.probing.feature_ranking import PENALTY, Columns, Labeled, RankedSides, Ranking
from saelab.probing.labeled_activations import draw_rows
from saelab.stores.corpus import split_documents
from saelab.stores.feature_store import FeatureStore
from saelab.stores.results import Result, format_table

if TYPE_CHECKING:
    from scipy.sparse import csc_matrix, csr_matrix

SAMPLE_TOKENS = 10_000  # of each label, that regressions are fitted to
BLOCK_TOKENS = 2**16
SLACK = 0.01
MOVES = 20
TITLES = ("F1", "accuracy", "balanced", "MCC", "AUROC", "predicted")


def score_majority(rate: float) -> ProbeScore:
    """Scores of the classifier that always predicts true, for a label that is true of a share `rate` of tokens.

    >>> score_majority(0.5).f1, score_majority(0.5).balanced
    (0.6666666666666666, 0.5)
    """
    return ProbeScore(f1=2 * rate / (1 + rate), mcc=0.0, auroc=0.5, accuracy=rate, balanced=0.5, yes=1.0)


def probe_activations(
    x: Float[np.ndarray, "n d_in"],
    y: Bool[np.ndarray, "n"],
    is_train: Bool[np.ndarray, "n"],
    n_fit: int,
    seed: int,
) -> dict[str, ProbeScore]:
    """Held-out scores of two classifiers on activations: a logistic regression and the best single coordinate.

    They are named "activations" and "best neuron". The neuron is the coordinate whose class means differ most in
    standard deviations, with either sign. Decision thresholds are chosen on training tokens as in `probe_features`.

    Args:
        x: (n, d_in) activations of tokens.
        y: (n) whether the label is true of each.
        is_train: (n) tokens to fit on; the others are scored.
        n_fit: most training tokens of each class that both are fitted to.
        seed: draws them.
    """
    y_train = y[is_train]
    drawn = np.flatnonzero(is_train)[draw_rows(y_train, n_fit, seed) | draw_rows(~y_train, n_fit, seed)]
    center, spread = x[drawn].mean(0, dtype=np.float64), x[drawn].std(0, dtype=np.float64)
    scale = np.where(spread > 0, spread, 1.0)
    z = ((x[drawn] - center) / scale).astype(np.float64)
    apart = z[y[drawn]].mean(0) - z[~y[drawn]].mean(0)
    best = int(np.abs(apart).argmax())
    weights = fit_balanced_probe(z, y[drawn], c=PENALTY, solver="lbfgs") / scale
    scores = {"activations": x @ weights.astype(x.dtype), "best neuron": x[:, best] * np.sign(apart[best])}
    return {
        name: score_guess(values[~is_train], y[~is_train], choose_threshold(values[is_train], y_train)[0])
        for name, values in scores.items()
    }


def read_rows(acts: Any, keep: Bool[np.ndarray, "n"]) -> Float[np.ndarray, "m d_in"]:
    """Activations of the tokens kept, float32; ValueError where `acts` does not have one row for each token."""
    if len(acts) != len(keep):
        raise ValueError(f"`acts` must have a row for each of the {len(keep)} tokens, got {len(acts)}.")
    rows = np.flatnonzero(keep)
    x = acts[rows] if isinstance(acts, np.ndarray) else acts[torch.from_numpy(rows)]
    return np.asarray(x.float().cpu() if isinstance(x, torch.Tensor) else x, np.float32)


@dataclass(frozen=True, kw_only=True)
class ProbedFeature:
    """A feature, with one sign of its codes, in a sparse probe."""

    feature: int
    sign: int
    """1 or -1: sign of the codes that count"""
    weight: float
    """of |z| with that sign, over its standard deviation; negative where it predicts that the concept is absent"""


@dataclass(frozen=True, kw_only=True)
class SparseProbe:
    """A logistic regression on k features, each with one sign of its codes."""

    ranking: str
    k: int
    features: tuple[ProbedFeature, ...]
    """by the size of their weights, largest first"""
    threshold: float
    """on the regression's score, with the best F1 above chance (kappa) in training documents"""
    f1_train: float
    """F1 in training documents at that threshold"""
    held_out: ProbeScore
    """scores in held-out documents"""
    shuffled: ProbeScore
    """the same from the ranking on, with permuted labels (`SparseProbes.null`): chance level; NaN where permuting
    leaves a side of the split with one class alone"""
    untrained: ProbeScore
    """the same from the ranking on, with the codes of an untrained SAE; NaN where none is given"""


@dataclass(frozen=True, kw_only=True)
class SparseProbes(Result):
    """Result of `probe_features`."""

    concept: str
    probes: tuple[SparseProbe, ...]
    random: dict[int, ProbeScore]
    """by k: as many features drawn at random, with the true labels"""
    baselines: dict[str, ProbeScore]
    """baselines without a choice of features: "always yes", a regression on "all features", and, where activations are
    given, on all "activations" and by the "best neuron" alone"""
    null: str
    """how labels were permuted for `shuffled`"""
    rate: float
    """share of held-out tokens with the concept"""
    n_train: int
    """training tokens"""
    n_tokens: int
    """held-out tokens"""
    n_documents: int
    """held-out documents"""

    @property
    def f1_always(self) -> float:
        """F1 of always predicting true, `2 p / (1 + p)`."""
        return 2 * self.rate / (1 + self.rate)

    def best(self, k: int | None = None) -> SparseProbe:
        """The probe of `k` features with the best F1 in training documents; with None the smallest probe within 0.01 of
        the best F1. ValueError for a `k` that was not probed.
        """
        some = [probe for probe in self.probes if k in (None, probe.k)]
        if not some:
            sizes = sorted({probe.k for probe in self.probes})
            raise ValueError(f"`k` must be one that was probed, {sizes}, got {k}.")
        top = max(probe.f1_train for probe in some)
        return min((p for p in some if p.f1_train >= top - (0 if k else SLACK)), key=lambda p: (p.k, -p.f1_train))

    @property
    def features(self) -> tuple[ProbedFeature, ...]:
        """Features of the best probe."""
        return self.best().features

    def __str__(self) -> str:
        lines = [
            f"{self.concept}: true of {self.rate:.2%} of {self.n_tokens:,} held-out tokens of {self.n_documents:,} "
            f"documents; chosen and fitted on {self.n_train:,} others",
            f"shuffled: {self.null}; untrained: the same with an untrained dictionary",
        ]
        table = [["", "k", *TITLES, "shuffled F1", "untrained F1", "random F1", "features"]]
        table += [[name, "", *_cells(score)] for name, score in self.baselines.items()]
        for probe in self.probes:
            chance = (probe.shuffled.f1, probe.untrained.f1, self.random[probe.k].f1)
            named = " ".join(_name(feature) for feature in probe.features[:6])
            more = " ..." if probe.k > 6 else ""
            cells = [*_cells(probe.held_out), *(f"{value:.3f}" for value in chance)]
            table.append([probe.ranking, str(probe.k), *cells, f"{named}{more}"])
        return "\n".join([*lines, *format_table(table, left=(0, len(table[0]) - 1))])


def _cells(score: ProbeScore) -> list[str]:
    values = (score.f1, score.accuracy, score.balanced, score.mcc, score.auroc, score.yes)
    return [f"{value:.3f}" for value in values]


def _name(one: ProbedFeature) -> str:
    return f"{'-' if one.weight < 0 else ''}{one.feature}{'+' if one.sign > 0 else '-'}"


def probe_features(
    codes: FeatureStore | Any,
    labels: LabelsLike | Bool[np.ndarray | Tensor, "n_tokens"],
    doc_ids: Shaped[Any, "n_tokens"] | None = None,
    *,
    concept: str | None = None,
    ks: Sequence[int] = (1, 2, 4, 8, 16),
    rankings: Sequence[Ranking] = ("means", "f", "information", "l1", "pruning"),
    train_frac: float = 0.7,
    n_tokens: int = 200_000,
    acts: Any = None,
    untrained: FeatureStore | Any = None,
    seed: int = 0,
) -> SparseProbes:
    """Sparse probes of a concept: logistic regressions on the k best features, with held-out scores and controls.

    Each sign of a feature's codes counts as a feature of its own ("side"), so that signed features count with both.
    Rankings:

        means        difference of means, over the largest code of that sign
        f            ANOVA F, `(n - 2) r^2 / (1 - r^2)`
        information  mutual information with the code in 5 bins: 0, and quarters of the others
        l1           weights of an L1 logistic regression on the 512 best by F (C = 0.1)
        pruning      what is left when a regression on those 512 repeatedly drops its weaker half
        svm          weights of a linear support vector machine on those 512 (C = 0.1)
        exact        for k = 1 and 2 alone: of all pairs the one with the largest R^2 of balanced classes
        swap         the features that add most to R^2, one after another, members swapped while that raises it

    Ranking, fitting (balanced classes, up to 10,000 tokens of each) and the choice of the threshold (best Cohen's
    kappa, 0 for always predicting true) use training documents alone; all scores are of held-out ones. Controls for
    each probe: permuted labels (within documents, or documents exchanged where a label is the same throughout each
    document), an untrained SAE, and randomly drawn features. Baselines for all: always predicting true, a regression on
    all features, and with `acts` one on all activations and the best single neuron. Source: arXiv:2305.01610.

    Args:
        codes: a store, or codes as `score_concepts` takes them.
        labels: (n_tokens) whether the concept is true of each token, or labels of several concepts.
        doc_ids: document of each token, needed where neither `codes` is a store nor the labels have them.
        concept: which of several labels; the name, for display, of a single one.
        ks: numbers of features.
        rankings: any of those above.
        train_frac: share of documents for training.
        n_tokens: most tokens used; of more, documents are drawn by `seed`.
        acts: (n_tokens, d_in) activations of the same tokens, for baselines.
        untrained: codes of an untrained SAE on the same tokens, as `sl.collecting.harvest_untrained` makes them.
        seed: of the split, the samples, the permutation and the random features.

    Raises:
        ValueError: where a side of the split has no token of a class, and for sizes that disagree.

    >>> z = np.tile(np.eye(4), (25, 1))
    >>> found = probe_features(z, z[:, 2] > 0, np.arange(100) // 4, ks=(1,), rankings=("f",))
    >>> found.features[0].feature, found.best().held_out.f1
    (2, 1.0)
    """
    _check(ks, rankings)
    given = TokenLabels.of(labels, None if isinstance(labels, Mapping) else concept, find_documents(codes, doc_ids))
    name, documents = given.find(concept), given.require_documents()
    keep = choose_rows(documents, n_tokens, seed)
    matrix, y = read_codes(codes, keep), given[name].flatten().numpy()[keep]
    documents = documents[keep]
    is_train = split_documents(documents, train_frac, seed)
    for side, rows in (("training", is_train), ("held-out", ~is_train)):
        if not 0 < y[rows].sum() < rows.sum():
            said = f"{int(y[rows].sum())} true of {int(rows.sum())}"
            raise ValueError(f"Both labels must occur in {side} documents, got {said}; give more text.")
    rng = np.random.default_rng(seed)
    elsewhere, null = permute_split(y, documents, is_train, rng)
    bench = ProbeBench.make(matrix, is_train, seed)
    if max(ks) > len(bench.sides):
        raise ValueError(f"`ks` must be at most the number of sides that fire ({len(bench.sides)}), got {max(ks)}.")
    true = bench.trial(y)
    moved = None if elsewhere is None else bench.trial(elsewhere)
    other = (
        None
        if untrained is None
        else ProbeBench.make(read_codes(untrained, keep, "untrained"), is_train, seed).trial(y)
    )
    baselines = {"always yes": score_majority(float(y[~is_train].mean()))}
    baselines["all features"] = true.fit(np.arange(len(bench.sides)), c=PENALTY).score
    if acts is not None:
        baselines |= probe_activations(read_rows(acts, keep), y, is_train, SAMPLE_TOKENS, seed)
    return SparseProbes(
        concept=name,
        probes=tuple(p for ranking in rankings for p in _probe(bench.sides, true, (moved, other), ranking, ks)),
        random={k: true.fit(rng.choice(len(bench.sides), k, replace=False)).score for k in ks},
        baselines=baselines,
        null=null,
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
    if "exact" in rankings and min(ks) > 2:
        raise ValueError(f"`ks` must have 1 or 2 for 'exact', which tries all subsets, got {tuple(ks)}; take 'swap'.")


def find_documents(codes: Any, doc_ids: Any) -> Any:
    """The documents of a store's tokens, or those that were given."""
    return codes.doc_ids if isinstance(codes, FeatureStore) else doc_ids


def choose_rows(documents: np.ndarray, n_tokens: int, seed: int) -> Bool[np.ndarray, "n"]:
    """Mask of the tokens used, those of some documents where there are too many."""
    n = len(documents)
    if n_tokens < 1:
        raise ValueError(f"`n_tokens` must be at least 1, got {n_tokens}.")
    return np.ones(n, bool) if n <= n_tokens else split_documents(documents, n_tokens / n, seed)


def read_codes(codes: Any, keep: np.ndarray, name: str = "codes") -> "csr_matrix":
    """Codes of the tokens used.

    Args:
        codes: a store, or codes as `score_concepts` takes them.
        keep: which of its tokens are used.
        name: what the codes are called in an error.
    """
    from scipy.sparse import csr_matrix, vstack

    values: Any = codes if isinstance(codes, FeatureStore) else csr_matrix(read_values(codes))
    n, n_codes = len(keep), len(codes) if isinstance(codes, FeatureStore) else values.shape[0]
    if n_codes != n:
        raise ValueError(f"`{name}` and `doc_ids` must have one for each token, got {n_codes} and {n}.")
    if isinstance(codes, FeatureStore):
        blocks = range(0, n, BLOCK_TOKENS)
        parts = [codes.matrix(a, a + BLOCK_TOKENS)[keep[a : a + BLOCK_TOKENS]] for a in blocks]
        return vstack(parts, format="csr")
    return values[keep]


def permute_split(
    y: np.ndarray, documents: np.ndarray, is_train: np.ndarray, rng: np.random.Generator
) -> tuple[np.ndarray | None, str]:
    """Permuted labels, and how they were permuted; None where every try leaves a side of the split with one class.

    Args:
        y: the labels.
        documents: document of each token.
        is_train: the tokens of one side of the split.
        rng: source of the permutation.
    """
    null = ""
    for _ in range(MOVES):
        moved, null = permute_labels(y, documents, rng)
        if all(0 < moved[rows].sum() < rows.sum() for rows in (is_train, ~is_train)):
            return moved, null
    return None, null


@dataclass(frozen=True, eq=False)
class FittedProbe:
    """A regression on some columns."""

    columns: Int[np.ndarray, "k"]
    weights: Float[np.ndarray, "k"]
    threshold: float
    f1_train: float
    score: ProbeScore


@dataclass(frozen=True, eq=False)
class ProbeBench:
    """Split codes of one dictionary on training and on held-out tokens."""

    sides: RankedSides
    columns: Columns
    held: "csc_matrix"
    is_train: Bool[np.ndarray, "n"]
    seed: int

    @classmethod
    def make(cls, matrix: "csr_matrix", is_train: np.ndarray, seed: int) -> "ProbeBench":
        sides = RankedSides.split(matrix, is_train)
        by_row = sides.matrix.tocsr()
        return cls(sides, Columns(by_row[is_train].tocsc()), by_row[~is_train].tocsc(), is_train, seed)

    def trial(self, y: np.ndarray) -> "ProbeTrial":
        y_train = y[self.is_train]
        drawn = draw_rows(y_train, SAMPLE_TOKENS, self.seed) | draw_rows(~y_train, SAMPLE_TOKENS, self.seed)
        return ProbeTrial(Labeled(self.columns, y_train, np.flatnonzero(drawn)), self.held, y[~self.is_train])


@dataclass(frozen=True, eq=False)
class ProbeTrial:
    """One labeling of the tokens, with the codes to predict it."""

    train: Labeled
    held: "csc_matrix"
    y_held: Bool[np.ndarray, "n"]

    def fit(self, columns: Int[np.ndarray, "k"], c: float = 1.0) -> FittedProbe:
        """A regression on some columns, with threshold and held-out scores."""
        weights = self.train.fit(columns, c=c)
        by_size = np.argsort(-np.abs(weights), kind="stable")
        columns, weights = columns[by_size], weights[by_size]
        scaled = weights / self.train.columns.deviations[columns]
        threshold, f1_train = choose_threshold(self.train.columns.matrix[:, columns] @ scaled, self.train.y)
        score = score_guess(self.held[:, columns] @ scaled, self.y_held, threshold)
        return FittedProbe(columns, weights, threshold, f1_train, score)


def _probe(
    sides: RankedSides,
    true: ProbeTrial,
    others: tuple[ProbeTrial | None, ProbeTrial | None],
    ranking: Ranking,
    ks: Sequence[int],
) -> Iterator[SparseProbe]:
    """The probes of one ranking, with those for permuted labels and for the untrained SAE's codes."""
    chosen = true.train.choose(ranking, ks)
    theirs = [{} if other is None else other.train.choose(ranking, ks) for other in others]
    for k, columns in chosen.items():
        found = true.fit(columns)
        shuffled, untrained = (
            UNKNOWN if other is None or k not in mine else other.fit(mine[k]).score
            for other, mine in zip(others, theirs, strict=True)
        )
        yield SparseProbe(
            ranking=ranking,
            k=k,
            features=tuple(
                ProbedFeature(feature=int(sides.features[i]), sign=int(sides.signs[i]), weight=float(weight))
                for i, weight in zip(found.columns, found.weights, strict=True)
            ),
            threshold=found.threshold,
            f1_train=found.f1_train,
            held_out=found.score,
            shuffled=shuffled,
            untrained=untrained,
        )

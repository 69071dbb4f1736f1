"""Features as classifiers of concepts: counts and F1 of each feature at each threshold, the best ones, and baselines.

A classifier is a feature with one sign at one of ten thresholds. Codes are quantized to these thresholds (`Levels`), so
that F1 at every threshold takes one pass. Baselines are neurons, PCA, random and untrained dictionaries; a supervised
linear probe is the ceiling.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, Int8, Shaped
from torch import Tensor

from saelab.functional.codes import SparseCodes
from saelab.functional.metrics import exact
from saelab.functional.statistics import auroc_of_ranks, f1, fit_probe, kappa
from saelab.lm.token_labels import LabelsLike, TokenLabels
from saelab.sae.baselines import check_baselines
from saelab.sae.config import SAEConfig
from saelab.sae.initialization import prepare
from saelab.sae.sae import SAE
from saelab.stores.corpus import split_documents

if TYPE_CHECKING:
    from scipy.sparse import csc_matrix, csr_matrix

CodeMatrix: TypeAlias = Any
"""Codes or activations of tokens: scipy sparse (n_tokens, d_sae), `SparseCodes`, or a dense tensor or array."""
N_LEVELS = 10
FRACTIONS = np.arange(N_LEVELS) / N_LEVELS
"""Thresholds as fractions of the largest code of that sign in training stories."""
NOTHING = -1
"""In place of a classifier's number, for a concept with which no feature fires."""
BLOCK_ENTRIES = 2**22  # entries of a block of columns held at a time
SPLIT_GAIN, MAX_SPLIT = 0.03, 10
SAMPLE_TOKENS = 40_000
ENCODE_TOKENS = 2**15


def read_values(codes: CodeMatrix) -> Any:
    """Codes as a scipy csr matrix, dense activations as an array; ValueError unless finite and two-dimensional."""
    from scipy.sparse import csr_matrix, issparse

    values: Any
    if isinstance(codes, SparseCodes):
        parts = (codes.values.detach(), codes.indices, codes.offsets)
        data, indices, offsets = (part.cpu().numpy() for part in parts)
        values = csr_matrix((data, indices, offsets), shape=(len(codes), codes.d_sae))
    elif issparse(codes):
        values = codes.tocsr()
    else:
        values = codes.detach().float().cpu().numpy() if isinstance(codes, Tensor) else np.asarray(codes)
    if values.ndim != 2:
        raise ValueError(
            f"`codes` must have two axes, tokens and features, got shape {values.shape}; flatten the batch."
        )
    if not np.isfinite(values.data if issparse(values) else values).all():
        raise ValueError("`codes` must be finite, got NaN or infinity; check the activations they were made from.")
    return values


def select_rows(values: Any, rows: np.ndarray) -> Any:
    """Rows of the result of `read_values`, stored by column: csc without stored zeros, or an array in Fortran order."""
    from scipy.sparse import issparse

    if not issparse(values):
        return np.asfortranarray(values[rows])
    chosen = values[rows].tocsc()
    chosen.sum_duplicates()
    chosen.eliminate_zeros()
    return chosen


def find_peaks(values: Any) -> Float[np.ndarray, "n_features 2"]:
    """The largest magnitude of each feature's positive and negative codes; 0 for a sign that never occurs."""
    from scipy.sparse import issparse

    ends = [values.max(axis=0), -values.min(axis=0)]
    sides = [end.toarray().ravel() if issparse(values) else end for end in ends]
    return np.stack(sides, 1).clip(min=0).astype(np.float64)


@dataclass(frozen=True, eq=False, repr=False)
class Levels:
    """For each token and feature the number of thresholds that the code exceeds, 0 to 10, with the code's sign.

    A classifier is one feature with one sign at one threshold; classifier `(2 feature + (side < 0)) 10 + i` fires where
    the level of that sign exceeds i, that is `side z > FRACTIONS[i] peak`.
    """

    table: "csc_matrix | Int8[np.ndarray, 'n_tokens n_features']"
    """signed levels, sparse or dense"""

    @property
    def n_features(self) -> int:
        """Number of features, each with two signs."""
        return int(self.table.shape[1])

    def tokens(self, classifier: int) -> Int[np.ndarray, "n_fires"]:
        """Indices of the tokens on which a classifier fires."""
        if classifier == NOTHING:
            return np.zeros(0, np.int64)
        column, level = divmod(classifier, N_LEVELS)
        feature, negative = divmod(column, 2)
        if isinstance(self.table, np.ndarray):
            there = self.table[:, feature]
            return np.flatnonzero(there < -level if negative else there > level)
        part = slice(*self.table.indptr[feature : feature + 2])
        there = self.table.data[part]
        return self.table.indices[part][there < -level if negative else there > level]

    def count(self, tokens: Int[np.ndarray, "n"]) -> Int[np.ndarray, "n_classifiers"]:
        """On how many of some tokens each classifier fires."""
        block = self._by_token[tokens]
        if isinstance(block, np.ndarray):
            rows, columns = np.nonzero(block)
            levels = block[rows, columns]
        else:
            columns, levels = block.indices, block.data
        highest = (2 * columns + (levels < 0)) * N_LEVELS + np.abs(levels) - 1
        counts = np.bincount(highest, minlength=2 * self.n_features * N_LEVELS)
        return _sum_down(counts.reshape(-1, N_LEVELS), axis=1).reshape(-1)

    @cached_property
    def _by_token(self) -> "csr_matrix | Int8[np.ndarray, 'n_tokens n_features']":
        return self.table if isinstance(self.table, np.ndarray) else self.table.tocsr()

    def blocks(self) -> Iterator[tuple[slice, Int[np.ndarray, "n"], Int[np.ndarray, "n"]]]:
        """Blocks of features: the slice, and for each entry its token and highest classifier.

        Classifiers count from the block's first.
        """
        n_entries = self.table.size if isinstance(self.table, np.ndarray) else self.table.nnz
        width = max(1, BLOCK_ENTRIES * self.n_features // max(1, n_entries))
        for start in range(0, self.n_features, width):
            part = slice(start, min(start + width, self.n_features))
            tokens, columns, levels = self._entries(part)
            yield part, tokens, (2 * columns + (levels < 0)) * N_LEVELS + np.abs(levels) - 1

    def _entries(self, part: slice) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        if isinstance(self.table, np.ndarray):
            columns, tokens = np.nonzero(self.table[:, part].T)
            return tokens, columns, self.table[:, part][tokens, columns]
        block = self.table[:, part]
        return block.indices, np.repeat(np.arange(block.shape[1]), np.diff(block.indptr)), block.data


def grade(values: Any, peaks: Float[np.ndarray, "n_features 2"]) -> Levels:
    """The levels of the result of `select_rows`; codes of a sign whose peak is 0 get level 0."""
    from scipy.sparse import csc_matrix

    ceilings = np.where(peaks > 0, peaks, np.inf)
    if isinstance(values, np.ndarray):
        table = np.empty(values.shape, np.int8, order="F")
        for j in range(values.shape[1]):
            table[:, j] = _grade(values[:, j], ceilings[j])
        return Levels(table)
    data = np.empty(values.nnz, np.int8)
    for j in range(values.shape[1]):
        part = slice(*values.indptr[j : j + 2])
        data[part] = _grade(values.data[part], ceilings[j])
    levels = csc_matrix((data, values.indices, values.indptr), shape=values.shape)
    if not data.all():
        levels = levels.copy()  # or dropping the zeros would change `values`
        levels.eliminate_zeros()
    return Levels(levels)


def _grade(z: Shaped[np.ndarray, "n"], ceilings: Float[np.ndarray, "2"]) -> Int8[np.ndarray, "n"]:
    negative = z < 0
    passed = np.searchsorted(FRACTIONS, np.abs(z) / ceilings[negative.astype(np.int8)])
    return np.where(negative, -passed, passed).astype(np.int8)


def count_classifiers(levels: Levels, truth: "csr_matrix") -> tuple[np.ndarray, np.ndarray]:
    """How often each classifier fires with each concept, (n_concepts, n_classifiers), and in total, (n_classifiers,).

    By sparse products: entries are counted once, at their highest classifier; counts of lower thresholds are cumulative
    sums.
    """
    from scipy.sparse import csr_matrix

    n_tokens, n_concepts = truth.shape
    hits = np.zeros((n_concepts, levels.n_features, 2, N_LEVELS), np.int32)
    fires = np.zeros((levels.n_features, 2, N_LEVELS), np.int32)
    for part, tokens, classifiers in levels.blocks():
        shape = (part.stop - part.start, 2, N_LEVELS)
        n_classifiers = int(np.prod(shape))
        peaks = csr_matrix(
            (np.ones(len(classifiers), np.int32), (classifiers, tokens)), shape=(n_classifiers, n_tokens)
        )
        together = (peaks @ truth).toarray().reshape(*shape, n_concepts)
        hits[:, part] = np.moveaxis(_sum_down(together, axis=2), -1, 0)
        fires[part] = _sum_down(np.bincount(classifiers, minlength=n_classifiers).reshape(shape), axis=2)
    return hits.reshape(n_concepts, -1), fires.reshape(-1)


def _sum_down(counts: np.ndarray, axis: int) -> np.ndarray:
    return np.flip(np.flip(counts, axis).cumsum(axis, dtype=np.int32), axis)


@dataclass(frozen=True, eq=False)
class ClassifierCounts:
    """How often classifiers fire with each concept, and in total."""

    hits: Int[np.ndarray, "n_concepts n_classifiers"]
    """tokens with the concept on which the classifier fires"""
    fires: Int[np.ndarray, "n_classifiers"]
    """tokens on which the classifier fires"""
    n_true: Int[np.ndarray, "n_concepts"]
    """tokens with the concept"""
    n_tokens: int

    def f1(self, c: int) -> Float[np.ndarray, "n_classifiers"]:
        """F1 of every classifier as classifier of a concept."""
        return f1(self.hits[c], self.fires, self.n_true[c])

    def kappa(self, c: int) -> Float[np.ndarray, "n_classifiers"]:
        """Cohen's kappa of every classifier: its F1 above chance."""
        return kappa(self.hits[c], self.fires, self.n_true[c], self.n_tokens)

    def accuracy(self, c: int) -> Float[np.ndarray, "n_classifiers"]:
        """Share of the tokens that every classifier is right about."""
        return np.asarray(1 - (self.fires + self.n_true[c] - 2 * self.hits[c]) / self.n_tokens)

    def balanced_accuracy(self, c: int) -> Float[np.ndarray, "n_classifiers"]:
        """Mean of the accuracies on tokens with and without the concept; 0.5 is chance."""
        false = (self.fires - self.hits[c]) / max(1, self.n_tokens - self.n_true[c])
        return np.asarray(0.5 * (1 + self.hits[c] / max(1, self.n_true[c]) - false))


def best_classifier(counts: ClassifierCounts, c: int) -> int:
    """The classifier with the highest F1 for a concept; `NOTHING` where none has any."""
    f1 = counts.f1(c)
    classifier = int(f1.argmax())
    return classifier if f1[classifier] > 0 else NOTHING


def best_pair(counts: ClassifierCounts, a: int, b: int) -> tuple[int, int]:
    """The pair of classifiers of one feature, one sign for a and the other for b, whose lesser kappa is highest."""
    of_a, of_b = (counts.kappa(c).reshape(-1, 2, N_LEVELS) for c in (a, b))
    lesser = np.minimum(of_a.max(2), of_b.max(2)[:, ::-1])
    feature, side = np.unravel_index(int(lesser.argmax()), lesser.shape)
    if lesser[feature, side] <= 0:
        return NOTHING, NOTHING
    first, second = of_a[feature, side].argmax(), of_b[feature, 1 - side].argmax()
    return int((2 * feature + side) * N_LEVELS + first), int((2 * feature + 1 - side) * N_LEVELS + second)


def classifier_union(
    hits: Int[np.ndarray, "n_classifiers"],
    fires: Int[np.ndarray, "n_classifiers"],
    is_true: Bool[np.ndarray, "n_tokens"],
    tokens: Callable[[int], Int[np.ndarray, "n_fires"]],
    count: Callable[[Int[np.ndarray, "n"]], Int[np.ndarray, "n_classifiers"]],
) -> list[int]:
    """The greedy union of at most 10 classifiers for a label, each added while it raises F1 by more than 0.03.

    The first is the one with the highest F1; of equal ones the first counts.

    Args:
        hits: tokens with the label on which each classifier fires.
        fires: tokens on which each fires.
        is_true: the label of each token.
        tokens: function from a classifier to the tokens on which it fires.
        count: function from tokens to the number of them on which each classifier fires.
    """
    predicted, n_true, n_hits, n_fires = np.zeros_like(is_true), int(is_true.sum()), 0, 0
    scores, found, goal = f1(hits, fires, n_true), list[int](), 0.0
    while len(found) < MAX_SPLIT and len(scores) and scores.max() > goal:
        found.append(int(scores.argmax()))
        fired = tokens(found[-1])
        new = fired[~predicted[fired]]
        predicted[new] = True
        true, false = new[is_true[new]], new[~is_true[new]]
        n_hits, n_fires = n_hits + len(true), n_fires + len(new)
        goal = 2 * n_hits / (n_fires + n_true) + SPLIT_GAIN
        # Counting takes the time; what each classifier could still add at most is often too little for it.
        most, least = np.minimum(hits, n_true - n_hits), np.maximum(fires - hits - len(false), 0)
        if (2 * (n_hits + most) / (n_fires + most + least + n_true)).max() <= goal:
            break
        added = count(true)
        hits, fires = hits - added, fires - added - count(false)
        scores = 2 * (n_hits + hits) / (n_fires + fires + n_true)
    return found


class Ranks:
    """Ranks of tokens by the codes of one sign of a feature, `max(side z, 0)`, cached for each."""

    def __init__(self, values: Any) -> None:
        self.values = values
        self.known: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def auroc(self, column: int, true: Int[np.ndarray, "n_true"]) -> float:
        """AUROC of one sign of a feature for the tokens `true`; ties count half, `column` is 2 feature + (side < 0)."""
        if column not in self.known:
            self.known[column] = self._rank(column)
        tokens, ranks = self.known[column]
        n, n_true = self.values.shape[0], len(true)
        n_zero = n - len(tokens)
        fired = np.isin(tokens, true, assume_unique=True)
        total = (ranks[fired] + n_zero).sum() + (n_true - fired.sum()) * (n_zero + 1) / 2
        return auroc_of_ranks(float(total), n_true, n)

    def _rank(self, column: int) -> tuple[np.ndarray, np.ndarray]:
        from scipy.stats import rankdata

        feature, negative = divmod(column, 2)
        if isinstance(self.values, np.ndarray):
            z, tokens = self.values[:, feature], np.arange(len(self.values))
        else:
            part = slice(*self.values.indptr[feature : feature + 2])
            z, tokens = self.values.data[part], self.values.indices[part]
        there = z < 0 if negative else z > 0
        return tokens[there], rankdata(np.abs(z[there]))


def ratio(part: float | np.number, whole: int | np.number) -> float:
    """`part / whole`, NaN where the whole is 0."""
    return float(part / whole) if whole else math.nan


def concept_baselines(
    acts: Float[Tensor, "n_tokens d_in"],
    cfg: SAEConfig,
    labels: LabelsLike,
    doc_ids: Shaped[Any, "n_tokens"] | None = None,
    *,
    train_frac: float = 0.5,
    seed: int = 0,
    baselines: Mapping[str, SAE] | None = None,
) -> dict[str, CodeMatrix]:
    """Baseline codes of the same tokens by name, for `score_concepts`.

    neurons: the centered activations. pca: their principal components. random: an SAE of `cfg` before training, with
    random directions of norm 1. untrained: the same with training activations as directions. probe: logistic regression
    on the concept labels, one column a concept: the ceiling for linear classifiers. Each is fitted to at most 40,000
    tokens of the training stories that `score_concepts` selects with the same `train_frac` and `seed`.

    Args:
        acts: activations of the tokens.
        cfg: configuration of the untrained SAEs.
        labels: which concepts are true of each token, as in `score_concepts`.
        doc_ids: story (document) of each token, needed where the labels do not have them.
        train_frac: share of stories for training.
        seed: of the split, the sample and the random directions.
        baselines: further SAEs by name, such as those of `fit_baselines`.

    Raises:
        ValueError: for baselines with a name or a width that does not fit.
    """
    given = TokenLabels.of(labels, doc_ids=doc_ids)
    train = torch.from_numpy(split_documents(given.require_documents(), train_frac, seed)).nonzero().squeeze(1)
    generator = torch.Generator().manual_seed(seed)
    rows = train[torch.randperm(len(train), generator=generator)[:SAMPLE_TOKENS]].sort().values
    sample = acts[rows].float()
    centered = exact(sample) - exact(sample).mean(0)
    variances, directions = torch.linalg.eigh(centered.T @ centered / len(centered))
    x = acts.float() - sample.mean(0)
    components = x @ directions.flip(1).to(x)
    scales = variances.flip(0).clamp(min=1e-6 * float(variances[-1]) or 1.0).sqrt().to(x)
    whitened = components / scales
    cfg = replace(cfg, dictionary="unit")  # the directions are random ones and tokens, whatever training makes of them
    truth = torch.from_numpy(given.matrix[rows.numpy()].toarray().astype(np.float32))
    own = {
        "neurons": x,
        "pca": components,
        "random": encode_csr(prepare(replace(cfg, init="tied"), sample, seed), acts),
        "untrained": encode_csr(prepare(replace(cfg, init="data"), sample, seed), acts),
        "probe": fit_probe(whitened[rows], truth)(whitened).sigmoid(),
    }
    check_baselines(baselines or {}, cfg, list(own))
    return own | {name: encode_csr(each, acts) for name, each in (baselines or {}).items()}


@torch.no_grad()
def encode_csr(sae: SAE, acts: Float[Tensor, "n_tokens d_in"]) -> "csr_matrix":
    """The codes of many tokens as one scipy matrix (n_tokens, d_sae), encoded in batches."""
    from scipy.sparse import csr_matrix, vstack

    parts = []
    for x in acts.split(ENCODE_TOKENS):
        codes = sae.encode_sparse(x.to(sae.device))
        data, indices, offsets = (part.cpu().numpy() for part in (codes.values.float(), codes.indices, codes.offsets))
        parts.append(csr_matrix((data, indices, offsets), shape=(len(x), codes.d_sae)))
    return vstack(parts, format="csr")

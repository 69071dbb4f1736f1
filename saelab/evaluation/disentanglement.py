"""`infomec`: are codes modular, explicit and compact about known concepts? By mutual information (arXiv:2305.18378)."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Shaped
from torch.nn.functional import binary_cross_entropy_with_logits

from saelab.evaluation.concepts import move_truth
from saelab.evaluation.feature_classifiers import CodeMatrix, read_values
from saelab.functional.statistics import fit_probe
from saelab.lm.token_labels import LabelsLike, TokenLabels
from saelab.stores.corpus import split_documents
from saelab.stores.results import Result, format_table

if TYPE_CHECKING:
    from scipy.sparse import csc_matrix, csr_matrix

N_QUARTERS = 4
N_BINS = 2 * N_QUARTERS  # of codes that are not 0, for each feature
FIT_TOKENS = 20_000
N_NULLS = 4  # permutations whose largest information an entry has to exceed
SHUFFLED = "shuffled concepts"


@dataclass(frozen=True, kw_only=True, eq=False)
class InfoMEC(Result):
    """Result of `infomec`. Each figure is 1 at best; modularity and compactness are 0 where information is spread
    evenly, explicitness where logistic regression knows no more than the rate.
    """

    modularity: float
    """does a feature tell one concept? Of the information of a feature the share about one concept, a mean over
    informative features, rescaled from 1/n_concepts..1; NaN without any
    """
    explicitness: float
    """can concepts be read linearly? `1 - CE / H(y)` of logistic regression on all features, held out, a mean over
    concepts; below 0 where it is worse than the rate
    """
    compactness: float
    """does one feature tell a concept? Of the information about a concept the share that one feature has, a mean over
    concepts that any feature tells, rescaled from 1/n_informative..1; NaN without any, and for a single feature
    """
    n_informative: int
    """features with more information about a concept than any has about permuted ones"""
    n_features: int
    """features that fire"""
    n_told: int
    """concepts that an informative feature tells"""
    n_concepts: int
    n_tokens: int
    information: Float[np.ndarray, "n_all n_concepts"] = field(repr=False)
    """of each feature about each concept, over the concept's entropy; 0 where permuted concepts reach as much"""
    baselines: "dict[str, InfoMEC]" = field(default_factory=dict)
    """the same of other codes, and of these codes with permuted concepts"""

    def __str__(self) -> str:
        head = f"{self.n_concepts} concepts, {self.n_tokens:,} tokens"
        table = [["", "modularity", "explicitness", "compactness", "informative features", "of", "concepts told"]]
        for name, row in {"codes": self, **self.baselines}.items():
            figures = (f"{x:.3f}" for x in (row.modularity, row.explicitness, row.compactness))
            table.append([name, *figures, f"{row.n_informative:,}", f"{row.n_features:,}", str(row.n_told)])
        return "\n".join([head, *format_table(table)])


def infomec(
    codes: Any,
    labels: LabelsLike,
    doc_ids: Shaped[Any, "n_tokens"] | None = None,
    *,
    baselines: Mapping[str, CodeMatrix] | None = None,
    train_frac: float = 0.7,
    seed: int = 0,
) -> InfoMEC:
    """Modularity, explicitness and compactness of codes about known concepts (InfoMEC, arXiv:2305.18378).

    The first and the last are read from a table of the mutual information of each feature and concept, over the
    concept's entropy. A feature counts in nine bins, 0 and the quarters of each sign's codes, with the bias of finite
    samples taken off (Miller and Madow); what permuted concepts reach anywhere in the table counts as 0. Explicitness
    is logistic V-information on documents that the regression was not fitted to.

    Concepts that exclude or imply each other are told by the same features: an SAE can be modular only about concepts
    that vary freely.

    Args:
        codes: (n_tokens, n_features) codes, dense or scipy sparse.
        labels: which concepts are true of each token, at least two.
        doc_ids: document of each token, needed where the labels do not have them.
        baselines: other codes of the same tokens by name, such as those of `concept_baselines`.
        train_frac: share of documents that the regression is fitted to.
        seed: of the split, the sample and the permutation.

    Raises:
        ValueError: for fewer than two concepts, a concept that is true of all or no tokens of a split, and sizes that
            disagree.

    >>> marks = np.random.default_rng(0).random((4000, 3)) < 0.3
    >>> found = infomec(2.0 * marks, TokenLabels.of(marks, ["a", "b", "c"]), np.arange(4000) // 10)
    >>> found.modularity, found.compactness, found.explicitness > 0.95
    (1.0, 1.0, True)
    """
    given = TokenLabels.of(labels, doc_ids=doc_ids)
    documents, truth = given.require_documents(), given.matrix.astype(np.int32)
    if len(given) < 2:
        raise ValueError(f"`labels` must have at least 2 concepts to tell apart, got {list(given.names)}.")
    is_train = split_documents(documents, train_frac, seed)
    for part in (is_train, ~is_train):
        n_true = np.asarray(truth[part].sum(0)).ravel()
        if wrong := [given.names[i] for i in np.flatnonzero((n_true == 0) | (n_true == part.sum()))]:
            raise ValueError(
                f"Concepts must be true of some and false of other tokens of a split, not so: {wrong[:5]}."
            )
    again, *moved = (move_truth(truth, documents, 1_000 * seed + i) for i in range(N_NULLS + 1))
    if SHUFFLED in (baselines or {}):
        raise ValueError(f"Names of `baselines` must differ from '{SHUFFLED}', got it; give it another.")
    rows = {name: _read(name, values, len(documents)) for name, values in (baselines or {}).items()}
    own = _read("codes", codes, len(documents))
    others = {name: _measure(values, truth, moved, is_train, seed) for name, values in rows.items()}
    others[SHUFFLED] = _measure(own, again, moved, is_train, seed)
    return _measure(own, truth, moved, is_train, seed, others)


def _read(name: str, codes: Any, n_tokens: int) -> "csc_matrix":
    from scipy.sparse import csc_matrix

    values = csc_matrix(read_values(codes))
    values.sum_duplicates()
    values.eliminate_zeros()
    if values.shape[0] != n_tokens or not values.shape[1]:
        raise ValueError(
            f"`{name}` must have a row for each of the {n_tokens} tokens and a feature at least, got {values.shape}."
        )
    return values


def _measure(
    values: "csc_matrix",
    truth: "csr_matrix",
    moved: "list[csr_matrix]",
    is_train: Bool[np.ndarray, "n"],
    seed: int,
    baselines: dict[str, InfoMEC] | None = None,
) -> InfoMEC:
    bins = _bin(values)
    table, *nulls = (_inform(bins, marks) for marks in (truth, *moved))
    table = np.where(table > max(null.max(initial=0.0) for null in nulls), table, 0.0)
    useful, told = table[table.max(1) > 0], table.max(0) > 0
    n_useful, n_concepts = useful.shape
    return InfoMEC(
        modularity=_share(useful.max(1) / useful.sum(1), n_concepts) if n_useful else math.nan,
        explicitness=_explain(values, truth, is_train, seed),
        compactness=_share(useful[:, told].max(0) / useful[:, told].sum(0), n_useful) if n_useful else math.nan,
        n_informative=n_useful,
        n_features=int((values.getnnz(0) > 0).sum()),
        n_told=int(told.sum()),
        n_concepts=n_concepts,
        n_tokens=values.shape[0],
        information=table,
        baselines=baselines or {},
    )


def _share(shares: Float[np.ndarray, "n"], n: int) -> float:
    """Mean share of the largest of n, rescaled so that equal shares are 0."""
    return float((shares.mean() - 1 / n) / (1 - 1 / n)) if n > 1 else math.nan


def _bin(values: "csc_matrix") -> "csc_matrix":
    """Which bin each token is in, (n_tokens, n_features N_BINS): quarters of positive codes, then of negative ones."""
    from scipy.sparse import csc_matrix

    columns = np.repeat(np.arange(values.shape[1]), np.diff(values.indptr))
    side = 2 * columns + (values.data < 0)
    order = np.lexsort((np.abs(values.data), side))
    counts = np.bincount(side, minlength=2 * values.shape[1])
    starts = np.cumsum(counts) - counts
    ranks = np.empty(len(side), np.int64)
    ranks[order] = np.arange(len(side)) - starts[side[order]]
    # equal codes share the bin of the first of them: what is binary has one bin
    first = np.empty(len(side), bool)
    first[order] = np.r_[True, (np.diff(side[order]) != 0) | (np.diff(np.abs(values.data)[order]) != 0)][: len(side)]
    ranks[order] = np.maximum.accumulate(np.where(first[order], ranks[order] + starts[side[order]], 0))
    ranks -= starts[side]
    cell = side * N_QUARTERS + ranks * N_QUARTERS // counts[side]
    shape = (values.shape[0], values.shape[1] * N_BINS)
    return csc_matrix((np.ones(len(cell), np.int32), (values.indices, cell)), shape=shape)


def _inform(bins: "csc_matrix", truth: "csr_matrix") -> Float[np.ndarray, "n_features n_concepts"]:
    """Mutual information of bins and concepts over the concepts' entropy, at least 0."""
    n, n_concepts = truth.shape
    together = np.asarray((bins.T @ truth).todense(), np.float64).reshape(-1, N_BINS, n_concepts)
    whole = np.asarray(bins.sum(0), np.float64).reshape(-1, N_BINS)
    n_true = np.asarray(truth.sum(0), np.float64).ravel()
    zero_true, zero = n_true - together.sum(1), n - whole.sum(1)
    together = np.concatenate([together, zero_true[:, None]], 1)
    whole = np.concatenate([whole, zero[:, None]], 1)[..., None]
    found, entropy = np.zeros((len(together), n_concepts)), np.zeros(n_concepts)
    for part, total in ((together, n_true), (whole - together, n - n_true)):
        ratio = np.divide(part * n, whole * total, out=np.ones_like(part), where=part > 0)
        found += (part / n * np.log(ratio)).sum(1)
        entropy -= total / n * np.log(total / n)
    bias = ((whole > 0).sum(1) - 1) / (2 * n)
    return np.asarray(np.maximum(found - bias, 0) / entropy)


def _explain(values: "csc_matrix", truth: "csr_matrix", is_train: Bool[np.ndarray, "n"], seed: int) -> float:
    """Mean over concepts of the held-out 1 - CE / H of a logistic regression on all features."""
    rng, rows = np.random.default_rng(seed), values.tocsr()
    places = [np.flatnonzero(part) for part in (is_train, ~is_train)]
    fitted, held = (np.sort(rng.permutation(part)[:FIT_TOKENS]) for part in places)
    x, x_held = (torch.from_numpy(rows[part].toarray().astype(np.float32)) for part in (fitted, held))
    y, y_held = (torch.from_numpy(truth[part].toarray().astype(np.float32)) for part in (fitted, held))
    logits = fit_probe(x, y, standardize=True)(x_held)
    rates = y.mean(0).clamp(1e-6, 1 - 1e-6).expand_as(y_held)
    loss = binary_cross_entropy_with_logits(logits, y_held, reduction="none").double().mean(0)
    known = binary_cross_entropy_with_logits(rates.logit(), y_held, reduction="none").double().mean(0)
    return float((1 - loss / known).mean())

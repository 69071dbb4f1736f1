"""`probe_intrinsically`: one probe for all subsets of features, and the information that the best k of them carry.

The probe is fitted with some features at a time, the others at 0; which ones is a latent variable (arXiv:2201.08214).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from saelab.functional.statistics import fit_probe
from saelab.lm.token_labels import LabelsLike, TokenLabels
from saelab.probing.feature_ranking import Columns, Labeled, RankedSides
from saelab.probing.labeled_activations import draw_rows
from saelab.probing.sparse_probing import choose_rows, find_documents, permute_split, read_codes
from saelab.stores.corpus import split_documents
from saelab.stores.feature_store import FeatureStore
from saelab.stores.results import Result, format_table

FIT_TOKENS = 8192
N_STEPS, BATCH, N_SUBSETS = 200, 512, 16
LR = 0.05
ENTROPY = 1e-3  # weight of the entropy of the subsets, per token of the likelihood


@dataclass(frozen=True, kw_only=True)
class IntrinsicProbe(Result):
    """Result of `probe_intrinsically`: normalized mutual information of label and k features, `1 - CE / H(y)`.

    CE is the cross-entropy of a probe on held-out tokens and H(y) the label's entropy there: lower bounds of the mutual
    information, at most 1; below 0 where a probe is worse than the rate alone.
    """

    concept: str
    features: tuple[tuple[int, int], ...]
    """feature and sign of its codes, each the one that the probe gains most by after those before it"""
    information: dict[int, float]
    """by k: of the one probe with the first k features, the others at 0"""
    fitted: dict[int, float]
    """by k: of a logistic regression fitted to the first k features"""
    ranked: dict[int, float]
    """by k: of one fitted to the k best features by ANOVA F"""
    random: dict[int, float]
    """by k: of one fitted to k of the features drawn at random"""
    shuffled: dict[int, float]
    """by k: as `fitted`, with permuted labels from the choice of features on; NaN where they cannot be permuted"""
    everything: float
    """of a logistic regression on all the features that were chosen from"""
    null: str
    """how labels were permuted"""
    rate: float
    """share of held-out tokens with the concept"""
    n_tokens: int
    """held-out tokens"""

    def __str__(self) -> str:
        head = (
            f"{self.concept}: true of {self.rate:.2%} of {self.n_tokens:,} held-out tokens; share of its entropy "
            f"that k features tell; all of them: {self.everything:.3f}; shuffled: {self.null}"
        )
        columns = (self.information, self.fitted, self.ranked, self.random, self.shuffled)
        table = [["k", "one probe", "fitted", "best by F", "random", "shuffled", "feature added"]]
        for k in self.information:
            feature, sign = self.features[k - 1]
            cells = [f"{column[k]:.3f}" for column in columns]
            table.append([str(k), *cells, f"{feature}{'+' if sign > 0 else '-'}"])
        return "\n".join([head, *format_table(table)])


def probe_intrinsically(
    codes: FeatureStore | Any,
    labels: LabelsLike | Bool[np.ndarray | Tensor, "n_tokens"],
    doc_ids: Shaped[Any, "n_tokens"] | None = None,
    *,
    concept: str | None = None,
    ks: Sequence[int] = (1, 2, 4, 8),
    n_features: int = 64,
    train_frac: float = 0.7,
    n_tokens: int = 200_000,
    seed: int = 0,
) -> IntrinsicProbe:
    """How much of a label's entropy the best k features tell, by one probe that is fitted for all subsets at once.

        maximize  E_C [ log p(y | z_C) ] + ENTROPY * H(C)      over the probe's weights and the subsets' distribution

    The size of C is uniform in 1..max(ks), and given that the distribution is conditional Poisson, `p(C)` proportional
    to the product of its features' weights. Features are then added one by one where the probe's training likelihood
    rises most, without fitting again. Each sign of a feature counts as a feature. Source: arXiv:2201.08214.

    Args:
        codes: a store, or codes as `score_concepts` takes them.
        labels: (n_tokens) whether the concept is true of each token, or labels of several concepts.
        doc_ids: document of each token, needed where neither `codes` is a store nor the labels have them.
        concept: which of several labels; the name, for display, of a single one.
        ks: numbers of features to report.
        n_features: features that are chosen from, the best by ANOVA F in training documents.
        train_frac: share of documents for training; figures are of the others.
        n_tokens: most tokens used; of more, documents are drawn by `seed`.
        seed: of the split, the samples, the subsets and the permutation.

    Raises:
        ValueError: where a side of the split has no token of a class, and for sizes that disagree.

    >>> z = np.tile(np.eye(4), (50, 1))
    >>> found = probe_intrinsically(z, z[:, 2] > 0, np.arange(200) // 4, ks=(1,))
    >>> found.features[0], found.fitted[1] > 0.9
    ((2, 1), True)
    """
    given = TokenLabels.of(labels, concept if not hasattr(labels, "keys") else None, find_documents(codes, doc_ids))
    name, documents = given.find(concept), given.require_documents()
    keep = choose_rows(documents, n_tokens, seed)
    matrix, y, documents = read_codes(codes, keep), given[name].flatten().numpy()[keep], documents[keep]
    is_train = split_documents(documents, train_frac, seed)
    sides = RankedSides.split(matrix, is_train)
    if not ks or min(ks) < 1 or max(ks) > min(n_features, len(sides)):
        raise ValueError(f"`ks` must be in 1..{min(n_features, len(sides))}, got {tuple(ks)}.")
    for side, rows in (("training", is_train), ("held-out", ~is_train)):
        if not 0 < y[rows].sum() < rows.sum():
            raise ValueError(f"Both labels must occur in {side} documents, got {int(y[rows].sum())} true; give more.")
    rng = np.random.default_rng(seed)
    moved, null = permute_split(y, documents, is_train, rng)
    bench = _SplitCodes(sides, Columns(sides.matrix[is_train]), is_train, min(n_features, len(sides)), max(ks), seed)
    first, order, found = bench.probe(y)
    unknown = dict.fromkeys(ks, float("nan"))
    drawn = rng.permutation(len(first))
    return IntrinsicProbe(
        concept=name,
        features=tuple((int(sides.features[i]), int(sides.signs[i])) for i in first[order]),
        information={k: found[k - 1] for k in ks},
        fitted={k: bench.fitted(y, first[order[:k]]) for k in ks},
        ranked={k: bench.fitted(y, first[:k]) for k in ks},
        random={k: bench.fitted(y, first[drawn[:k]]) for k in ks},
        shuffled=unknown if moved is None else bench.fitted_along(moved, ks),
        everything=bench.fitted(y, first),
        null=null,
        rate=float(y[~is_train].mean()),
        n_tokens=int((~is_train).sum()),
    )


@dataclass(frozen=True, eq=False)
class _SplitCodes:
    """Split codes of training and held-out tokens."""

    sides: RankedSides
    columns: Columns
    is_train: Bool[np.ndarray, "n"]
    n_features: int
    largest: int
    seed: int

    def probe(self, y: Bool[np.ndarray, "n"]) -> tuple[np.ndarray, np.ndarray, list[float]]:
        """The features chosen from, the order in which they are added, and the held-out information at each k."""
        train = Labeled(self.columns, y[self.is_train], np.arange(0))
        first = train.order("f")[: self.n_features]
        x, truth, held, held_truth = self._read(y, first)
        w, b, _ = fit_subset_probe(x, truth, self.largest, self.seed)
        order = add_greedily(x, truth, w, b, self.largest)
        found = [_information(held[:, order[:k]] @ w[order[:k]] + b, held_truth) for k in range(1, len(order) + 1)]
        return first, order.numpy(), found

    def fitted(self, y: Bool[np.ndarray, "n"], chosen: Int[np.ndarray, "k"]) -> float:
        """Held-out information of a logistic regression on some features."""
        x, truth, held, held_truth = self._read(y, chosen)
        return _information(fit_probe(x, truth[:, None])(held)[:, 0], held_truth)

    def fitted_along(self, y: Bool[np.ndarray, "n"], ks: Sequence[int]) -> dict[int, float]:
        """By k, with features chosen for these labels."""
        first, order, _ = self.probe(y)
        return {k: self.fitted(y, first[order[:k]]) for k in ks}

    def _read(self, y: np.ndarray, chosen: np.ndarray) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """A sample of training tokens and the held-out ones, in standard deviations, and their labels."""
        rows = draw_rows(self.is_train, FIT_TOKENS, self.seed)
        scale = self.columns.deviations[chosen]
        x, held = (
            torch.from_numpy((self.sides.matrix[part][:, chosen].toarray() / scale).astype(np.float32))
            for part in (rows, ~self.is_train)
        )
        return x, torch.from_numpy(y[rows]).float(), held, torch.from_numpy(y[~self.is_train]).float()


def _information(logits: Float[Tensor, "n"], y: Float[Tensor, "n"]) -> float:
    """1 - CE / H(y)."""
    rate = y.double().mean()
    entropy = -(rate.xlogy(rate) + (1 - rate).xlogy(1 - rate))
    return float(1 - binary_cross_entropy_with_logits(logits.double(), y.double()) / entropy)


def log_sums(weights: Float[Tensor, "m"], k: int) -> Float[Tensor, "m_and_1 k_and_1"]:
    """Log of the elementary symmetric polynomials: entry (i, j) sums exp(weights) over all subsets of j of the first i.

    >>> log_sums(torch.zeros(4), 2)[4].exp().round().tolist()
    [1.0, 4.0, 6.0]
    """
    impossible = weights.new_full((1,), -torch.inf)
    row = torch.cat([weights.new_zeros(1), impossible.expand(k)])
    rows = [row]
    for weight in weights:
        row = torch.cat([row[:1], torch.logaddexp(row[1:], row[:-1] + weight)])
        rows.append(row)
    return torch.stack(rows)


def draw_subsets(
    sums: Float[Tensor, "m_and_1 k_and_1"],
    weights: Float[Tensor, "m"],
    sizes: Int[Tensor, "n"],
    generator: torch.Generator,
) -> Bool[Tensor, "n m"]:
    """Subsets of given sizes with probability proportional to the product of `exp(weights)` of their members.

    Args:
        sums: `log_sums` of the weights.
        weights: log weight of each member.
        sizes: number of members of each subset.
        generator: source of the draws.
    """
    left, masks = sizes.clone(), torch.zeros(len(sizes), len(weights), dtype=torch.bool)
    for i in range(len(weights), 0, -1):
        chance = (weights[i - 1] + sums[i - 1, (left - 1).clamp(min=0)] - sums[i, left]).exp()
        taken = (torch.rand(len(sizes), generator=generator) < chance) & (left > 0) | (left >= i)
        masks[:, i - 1] = taken
        left = left - taken.long()
    return masks


def fit_subset_probe(
    x: Float[Tensor, "n m"], y: Float[Tensor, "n"], largest: int, seed: int
) -> tuple[Float[Tensor, "m"], Float[Tensor, ""], Float[Tensor, "m"]]:
    """Weights and intercept of a logistic regression for all subsets, and the log weights of their distribution.

    The subsets' weights follow the likelihood by the score function, each subset against the mean of the others.

    Args:
        x: columns.
        y: labels, 0 and 1.
        largest: size of the largest subset.
        seed: of batches and subsets.
    """
    generator = torch.Generator().manual_seed(seed)
    w, b = torch.zeros(x.shape[1], requires_grad=True), y.mean().logit().clone().requires_grad_()
    log_weights = torch.zeros(x.shape[1], requires_grad=True)
    optimizer = torch.optim.Adam([w, b, log_weights], lr=LR)
    for _ in range(N_STEPS):
        rows = torch.randint(len(x), (BATCH,), generator=generator)
        sizes = torch.randint(1, largest + 1, (N_SUBSETS,), generator=generator)
        sums = log_sums(log_weights, largest)
        masks = draw_subsets(sums.detach(), log_weights.detach(), sizes, generator).float()
        logits = x[rows] @ (masks * w).T + b
        loss = binary_cross_entropy_with_logits(logits, y[rows, None].expand_as(logits), reduction="none").mean(0)
        log_p = masks @ log_weights - sums[-1, sizes]
        cost = (loss + ENTROPY * log_p).detach()
        advantage = (cost - cost.mean()) * N_SUBSETS / (N_SUBSETS - 1)
        optimizer.zero_grad()
        (loss.mean() + (advantage * log_p).mean()).backward()
        optimizer.step()
    return w.detach(), b.detach(), log_weights.detach()


def add_greedily(
    x: Float[Tensor, "n m"], y: Float[Tensor, "n"], w: Float[Tensor, "m"], b: Float[Tensor, ""], k: int
) -> Int[Tensor, "k"]:
    """Columns in the order in which they raise the likelihood of a logistic regression most, the others at 0.

    Args:
        x: columns.
        y: labels, 0 and 1.
        w: weights.
        b: intercept.
        k: number of columns.
    """
    parts, so_far, order = x * w, b.expand(len(x)), list[int]()
    for _ in range(k):
        logits = so_far[:, None] + parts
        loss = binary_cross_entropy_with_logits(logits, y[:, None].expand_as(logits), reduction="none").mean(0)
        loss[order] = torch.inf
        order.append(int(loss.argmin()))
        so_far = so_far + parts[:, order[-1]]
    return torch.tensor(order)

"""Statistics: null distributions for text, p values of rules, metrics of binary classifiers, and the bootstrap.

A circular shift of all rows keeps whatever is periodic (alternating labels, one template for all documents), so that
the null would equal the result; permuting all rows breaks the runs that widen the null. So labels are permuted within
documents, and rows are moved in blocks, each shifted circularly by itself. The bootstrap draws whole documents.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Float32, Int, Integer, Shaped
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from saelab.functional.indices import exchange_groups, number_rows, permute_within

INSIDE = 0.9  # of the label's variance lies within documents: tokens are then permuted within these
WITHIN, EXCHANGED = "tokens permuted within documents", "documents exchanged and their tokens permuted"
N_SHIFTS = 24
SHIFTED_FIRINGS = 512  # neighboring ones, on which the spread of the null is measured
CONSTANT = 1e-6
"""A standard deviation below this share of the root mean square is rounding: the values are constant."""
CHUNK_NUMBERS = 2**22  # draws times documents held at a time
LEVEL = 0.95
PROBE_STEPS = 30


def share_inside(y: Bool[np.ndarray, "n"], groups: Shaped[np.ndarray, "n"]) -> float:
    """Share of a label's variance that lies within groups, 0 to 1; 0 where all rows of each group have the same label.

    >>> share_inside(np.array([True, False, True, False]), np.array([0, 0, 1, 1]))
    1.0
    """
    _, numbers, sizes = np.unique(groups, return_inverse=True, return_counts=True)
    true = np.bincount(numbers, y)
    rate = y.mean()
    return float((true * (1 - true / sizes)).sum() / max(len(y) * rate * (1 - rate), 1e-30))


def permute_labels(
    y: Bool[np.ndarray, "n"], doc_ids: Shaped[np.ndarray, "n"], rng: "np.random.Generator"
) -> tuple[Bool[np.ndarray, "n"], str]:
    """Permuted labels of a text for a null distribution, and a description of the permutation.

    Where labels vary within documents, they are permuted there: each document keeps its rate, and neither periods nor
    positions survive. Where they vary mostly between documents that would change little, so documents are exchanged
    first: each receives the labels of another, stretched to its length, and these are then permuted within it.

    Args:
        y: label of each token.
        doc_ids: document of each token.
        rng: source of the permutation.
    """
    if share_inside(y, doc_ids) >= INSIDE:
        return y[permute_within(doc_ids, rng)], WITHIN
    return y[exchange_groups(doc_ids, rng)], EXCHANGED


def dispersion(
    holds: Callable[[np.ndarray], np.ndarray],
    fires: Integer[np.ndarray, "n"],
    rate: float,
    n_tokens: int,
    rng: "np.random.Generator",
    blocks: Int[np.ndarray, "n_tokens"] | None = None,
) -> float:
    """Overdispersion: variance of a rule's hits under the null, relative to independent tokens; at least 1.

    Firings and rules both come in runs, so tokens are not independent samples. The firings are shifted circularly
    through the documents by random steps, those of one block together, which keeps their runs and breaks every tie to
    the text, also where the text is periodic. The variance of the hits is divided by that of independent ones.

    Args:
        holds: function from token positions to whether the rule holds there.
        fires: positions at which the feature fires.
        rate: share of all tokens on which the rule holds.
        n_tokens: number of tokens.
        rng: generator of the random steps.
        blocks: number of the block (a document, or a piece of one) of each token; None shifts all firings together.
    """
    if len(fires) > SHIFTED_FIRINGS:
        start = int(rng.integers(len(fires)))
        fires = fires.take(np.arange(start, start + SHIFTED_FIRINGS), mode="wrap")
    own = number_rows(blocks[fires])[1] if blocks is not None else np.zeros(len(fires), np.int64)
    steps = rng.integers(1, max(n_tokens, 2), size=(N_SHIFTS, int(own.max(initial=0)) + 1))[:, own]
    moved = fires + steps
    moved -= n_tokens * (moved >= n_tokens)  # a division takes longer
    hits = np.count_nonzero(holds(moved), axis=1)
    expected = len(fires) * rate * (1 - rate)
    spread = float(np.mean((hits - len(fires) * rate) ** 2))
    return max(1.0, spread / expected) if expected > 0 else 1.0


def tail(
    hits: Float[np.ndarray, "n"],
    fires: Float[np.ndarray, "n"],
    holds: Float[np.ndarray, "n"],
    n_tokens: int,
    spread: Float[np.ndarray, "n"],
) -> Float[np.ndarray, "n"]:
    """Probability of at least so many hits under the null, with every count divided by `spread`.

    The binomial tail `I_q(hits, trials - hits + 1)`, the larger of taking firings or the rule's tokens as trials.
    Beyond the mean it is above the hypergeometric tail (Fisher's exact test), and it stays accurate where that
    underflows.

    Args:
        hits: number of tokens on which feature and rule coincide, one per rule.
        fires: number of tokens on which the feature fires.
        holds: number of tokens on which the rule holds.
        n_tokens: number of tokens.
        spread: overdispersion of each rule, from `dispersion`.
    """
    from scipy.special import betainc

    found = np.zeros(len(hits))
    for trials, marked in ((fires, holds), (holds, fires)):
        k, m = hits / spread, trials / spread
        with np.errstate(invalid="ignore"):
            p = betainc(np.maximum(k, 1e-9), m - k + 1, np.clip(marked / n_tokens, 0, 1))
        found = np.maximum(found, np.where(hits > 0, p, 1.0))
    return found


def adjust(p: Float[np.ndarray, "n"]) -> Float[np.ndarray, "n"]:
    """Benjamini-Hochberg q values: the smallest false discovery rate at which each hypothesis would be a discovery.

    >>> adjust(np.array([0.01, 0.04, 1.0])).round(3).tolist()
    [0.03, 0.06, 1.0]
    """
    order = np.argsort(p, kind="stable")
    ranked = p[order] * len(p) / np.arange(1, len(p) + 1)
    found = np.empty(len(p))
    found[order] = np.minimum.accumulate(ranked[::-1])[::-1].clip(max=1.0)
    return found


def window_auroc(
    holds: Callable[[np.ndarray], np.ndarray],
    fires: Integer[np.ndarray, "n"],
    active: Bool[np.ndarray, "n_tokens"],
    doc_ids: Shaped[np.ndarray, "n_tokens"],
    rng: "np.random.Generator",
    *,
    reach: int = 8,
    n_windows: int = 64,
) -> float:
    """AUROC of a yes/no rule for which tokens fire, in windows around firings; 0.5 is chance.

    Near a firing the topic is the same, so the rule must identify the token. NaN where all tokens of the windows fire.

    Args:
        holds: function from token positions to whether the rule holds there.
        fires: positions at which the feature fires.
        active: whether the feature fires, for each token.
        doc_ids: document of each token; windows end at its borders.
        rng: generator that draws the windows.
        reach: tokens on each side of a firing.
        n_windows: largest number of windows, drawn where there are more firings.
    """
    chosen = fires if len(fires) <= n_windows else fires[rng.integers(len(fires), size=n_windows)]
    near = chosen[:, None] + np.arange(-reach, reach + 1)
    inside = (near >= 0) & (near < len(active))
    near = np.clip(near, 0, len(active) - 1)
    rows = np.sort(near[inside & (doc_ids[near] == doc_ids[chosen][:, None])])
    rows = rows[np.diff(rows, prepend=-1) > 0]
    truth, said = active[rows], holds(rows)
    return balanced_accuracy(said, truth)


def f1(hits: Any, fires: Any, n_true: Any) -> Float[np.ndarray, "*n"]:
    """F1 of classifiers from counts, `2 hits / (fires + n_true)`; 0 where nothing is predicted and nothing true."""
    return np.asarray(2 * hits / np.maximum(fires + n_true, 1))


def kappa(hits: Any, fires: Any, n_true: Any, n: Any) -> Float[np.ndarray, "*n"]:
    """Cohen's kappa, F1 above chance: `(F1 - E) / (1 - E)`, E the F1 of as many random predictions.

    A classifier that always predicts true has F1 0.67 for a label of every second row, and kappa 0.

    Args:
        hits: number of rows predicted true that are true, or an array, one number per classifier.
        fires: number of rows predicted true.
        n_true: number of rows that are true.
        n: number of rows.

    >>> kappa(np.array([10, 5]), np.array([10, 10]), 10, 20).tolist()
    [1.0, 0.0]
    """
    size = np.maximum(fires + n_true, 1)
    chance = 2.0 * fires * (n_true / n) / size
    return np.asarray((2 * hits / size - chance) / np.maximum(1 - chance, 1e-12))


def choose_threshold(
    scores: Float[np.ndarray, "n"], y: Bool[np.ndarray, "n"], by: Literal["kappa", "balanced"] = "kappa"
) -> tuple[float, float]:
    """The threshold t of `score >= t` with the highest Cohen's kappa, and its F1; equal scores are on one side of it.

    F1 alone would favor always predicting true where scores are uninformative; kappa is 0 for that. `by="balanced"`
    takes the threshold with the highest balanced accuracy, for results that are given in it.

    >>> choose_threshold(np.array([0.0, 0.0, 2.0, 1.0]), np.array([False, False, True, True]))
    (1.0, 1.0)
    """
    order = np.argsort(-scores, kind="stable")
    ordered, hits, fires = scores[order], np.cumsum(y[order]), np.arange(1, len(y) + 1)
    n_true, n = hits[-1], len(y)
    last_of_equals = np.append(ordered[1:] < ordered[:-1], True)
    goal = kappa(hits, fires, n_true, n) if by == "kappa" else hits / n_true - (fires - hits) / (n - n_true)
    at = int(np.where(last_of_equals, goal, -np.inf).argmax())
    return float(ordered[at]), float(f1(hits, fires, n_true)[at])


def balanced_accuracy(guess: Bool[np.ndarray, "n"], y: Bool[np.ndarray, "n"]) -> float:
    """Mean of the accuracies on true and on false rows, 0.5 is chance; also the AUROC of a classifier without scores.

    NaN where all rows are of one class.
    """
    return 0.5 * (1 + float(guess[y].mean()) - float(guess[~y].mean())) if 0 < y.sum() < len(y) else math.nan


def auroc(scores: Shaped[np.ndarray, "n"], y: Bool[np.ndarray, "n"]) -> float:
    """The area under the ROC curve: P(score of a true row > score of a false one), ties counted half; 0.5 is chance."""
    from scipy.stats import rankdata

    return auroc_of_ranks(float(rankdata(scores)[y].sum()), int(y.sum()), len(y))


def auroc_of_ranks(total: float, n_true: int, n: int) -> float:
    """AUROC from the sum of the ranks of true rows, from 1, ties sharing their mean; NaN where all are of one class."""
    return (total - n_true * (n_true + 1) / 2) / (n_true * (n - n_true)) if 0 < n_true < n else math.nan


def correlation(x: Float[np.ndarray, "n"], y: Float[np.ndarray, "n"]) -> float:
    """Pearson's correlation; NaN for fewer than three values or where one side does not vary.

    >>> correlation(np.array([1.0, 2.0, 3.0]), np.array([2.0, 4.0, 6.0]))
    1.0
    """
    if len(x) < 3:
        return math.nan
    sides = [np.asarray(one, np.float64) for one in (x, y)]
    a, b = (one - one.mean() for one in sides)
    sizes = [float(np.linalg.norm(off)) for off in (a, b)]
    if any(size <= CONSTANT * np.linalg.norm(one) for size, one in zip(sizes, sides, strict=True)):
        return math.nan
    return round(float(a @ b) / (sizes[0] * sizes[1]), 12)


def rank_correlation(x: Float[np.ndarray, "n"], y: Float[np.ndarray, "n"]) -> float:
    """Spearman's rank correlation, ties sharing their mean rank.

    >>> rank_correlation(np.array([1.0, 2.0, 30.0]), np.array([2.0, 4.0, 5.0]))
    1.0
    """
    from scipy.stats import rankdata

    return correlation(rankdata(x), rankdata(y))


def similarity_ranks(rows: Float[np.ndarray, "m d"]) -> Float[np.ndarray, "m m"]:
    """Ranks of the correlations of every two rows, with mean 0 and norm 1 over the pairs; all 0 where they are equal.

    Of two matrices with paired rows, half the sum of the products is Spearman's correlation of the similarities: RSA.

    >>> ranks = similarity_ranks(np.array([[1.0, 0.0, 0.0], [1.0, 0.1, 0.0], [0.0, 1.0, 0.0]]))
    >>> round(float((ranks * ranks).sum()) / 2, 9)
    1.0
    """
    from scipy.stats import rankdata

    likeness = np.corrcoef(rows)
    below = np.tril_indices(len(likeness), -1)
    ranks = rankdata(likeness[below].round(12))  # equal rows tie despite rounding errors
    ranks -= ranks.mean()
    table = np.zeros_like(likeness)
    table[below] = ranks / max(np.linalg.norm(ranks), 1e-300)
    return np.asarray(table + table.T)


def spread(n: Any, sums: Any, squares: Any) -> Float[np.ndarray, "*n"]:
    """Standard deviation times sqrt(n), from sums over n rows of values and of their squares; 0 for constant ones."""
    found = np.sqrt(np.maximum(squares - sums**2 / np.maximum(n, 1), 0))
    return np.where(found < CONSTANT * np.sqrt(squares), 0.0, found)


def correlation_of_sums(n: Any, x: Any, y: Any, xx: Any, yy: Any, xy: Any) -> Float[np.ndarray, "*n"]:
    """Pearson's correlations from sums over rows; NaN where one side does not vary.

    Args:
        n: number of rows.
        x: sums of one side, in any shape that broadcasts with the others.
        y: sums of the other side.
        xx: sums of squares of the one side.
        yy: sums of squares of the other side.
        xy: sums of products.

    >>> float(correlation_of_sums(2, 3.0, 3.0, 5.0, 5.0, 4.0).round(6))
    -1.0
    """
    scale = spread(n, x, xx) * spread(n, y, yy)
    return np.asarray(np.divide(xy - x * y / n, scale, out=np.full(np.shape(scale), np.nan), where=scale > 0))


def draw_weights(n: int, n_draws: int, seed: int = 0) -> Float[np.ndarray, "n_draws n"]:
    """Bootstrap weights: how often each of `n` items is drawn with replacement; NaN where there is only one item.

    >>> draw_weights(4, 2).sum(1).tolist()
    [4.0, 4.0]
    """
    if n < 2:
        return np.full((1, n), math.nan)
    return np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), n_draws).astype(float)


class DocumentSums:
    """Sums of per-token terms for each document, in float64.

    Tokens of a document depend on each other, documents do not: the bootstrap draws documents.

    >>> sums = DocumentSums(torch.tensor([[0, 0, 7, -1]]))
    >>> sums.add(torch.tensor([0, 0, 7]), {"n_tokens": torch.ones(3)})
    >>> sums.columns["n_tokens"].tolist(), float(sums.total()["n_tokens"])
    ([2.0, 1.0], 3.0)
    """

    def __init__(self, doc_ids: Int[Tensor, "*shape"]) -> None:
        self.documents: Tensor = torch.unique(doc_ids[doc_ids >= 0])
        self.columns: dict[str, Tensor] = {}

    def add(self, doc_ids: Int[Tensor, "n"], terms: dict[str, Float[Tensor, "n"]]) -> None:
        """Add per-token terms to the sums of their documents."""
        places = torch.searchsorted(self.documents, doc_ids)
        for name, values in terms.items():
            if name not in self.columns:
                self.columns[name] = torch.zeros(len(self.documents), dtype=torch.float64)
            self.columns[name].index_add_(0, places, values.cpu().double())

    @property
    def n_documents(self) -> int:
        """Number of documents with at least one token counted."""
        return int((self.columns["n_tokens"] > 0).sum())

    def total(self) -> dict[str, Float[Tensor, ""]]:
        """Sum of each term over all documents."""
        return {name: column.sum() for name, column in self.columns.items()}

    def resample(self, n_draws: int, seed: int) -> dict[str, Float[Tensor, "n_draws"]]:
        """Bootstrap draws of each total: as many documents with replacement, `n_draws` times, the same for all."""
        counted = self.columns["n_tokens"] > 0
        table = torch.stack([column[counted] for column in self.columns.values()], dim=1)
        n, generator = len(table), torch.Generator().manual_seed(seed)
        size = max(1, CHUNK_NUMBERS // n)
        chunks = []
        for start in range(0, n_draws, size):
            drawn = torch.randint(n, (min(size, n_draws - start), n), generator=generator)
            places = drawn + n * torch.arange(len(drawn))[:, None]
            counts = torch.bincount(places.flatten(), minlength=drawn.numel()).view(-1, n)
            chunks.append(counts.double() @ table)
        return dict(zip(self.columns, torch.cat(chunks).unbind(1), strict=True))


def find_reach(draws: Float[np.ndarray, "n n_draws"], n_clusters: int, n_groups: int = 1) -> Float[np.ndarray, "n"]:
    """Half the width of 95 % intervals, `t sd sqrt(m / (m - g))`, t Student's of m - g degrees of freedom.

    Quantiles of the draws are too narrow for a few clusters: those of two exclude a mean of 0 half of the time. NaN
    where there are too few clusters, or draws, for a spread.

    Args:
        draws: numbers with clusters drawn with replacement; NaN is left out.
        n_clusters: m, how many clusters there are to draw from, prompts or documents for instance.
        n_groups: g, groups that clusters were drawn within.

    >>> find_reach(np.array([[-1.0, 1.0]]), 1000).round(2).tolist(), find_reach(np.array([[-1.0, 1.0]]), 1).tolist()
    ([1.96], [nan])
    """
    from scipy.stats import t

    reach, freedom = np.full(len(draws), np.nan), n_clusters - n_groups
    known = (~np.isnan(draws)).sum(1) > 1
    if known.any() and freedom > 0:
        scale = float(t.ppf((1 + LEVEL) / 2, freedom)) * np.sqrt(n_clusters / freedom)
        reach[known] = scale * np.nanstd(draws[known], axis=1)
    return reach


def find_interval(draws: Float[Tensor, "n_draws"]) -> tuple[float, float]:
    """The 95 % interval of bootstrap draws, from their quantiles; draws that are NaN are left out.

    >>> [round(end, 6) for end in find_interval(torch.arange(1001.0))]
    [25.0, 975.0]
    """
    tail = (1 - LEVEL) / 2
    low, high = draws.double().nanquantile(torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()
    return low, high


def fit_probe(
    x: Float32[Tensor, "n d"], labels: Float32[Tensor, "n n_concepts"], *, standardize: bool = False
) -> torch.nn.Linear:
    """A logistic regression on all concepts at once, with half the squared weights added to the summed loss; with
    `standardize` those of columns of mean 0 and deviation 1. The probe reads x as it is either way.
    """
    if standardize:
        mean, scale = x.mean(0), x.std(0)
        scale[scale <= CONSTANT * x.square().mean(0).sqrt()] = 1
        probe = fit_probe((x - mean) / scale, labels)
        probe.bias.sub_(probe.weight.div_(scale) @ mean)
        return probe
    rate = (labels.sum(0) + 0.5) / (len(x) + 1)
    with torch.random.fork_rng(devices=[]):  # layers draw weights from the global generator
        probe = torch.nn.Linear(x.shape[1], labels.shape[1])
    torch.nn.init.zeros_(probe.weight)
    probe.bias.data.copy_(rate.logit())
    optimizer = torch.optim.LBFGS(
        probe.parameters(), max_iter=PROBE_STEPS, history_size=10, line_search_fn="strong_wolfe"
    )

    def loss() -> Tensor:
        optimizer.zero_grad()
        fit = binary_cross_entropy_with_logits(probe(x), labels, reduction="sum")
        total = (fit + 0.5 * probe.weight.square().sum()) / len(x)
        total.backward()  # type: ignore[no-untyped-call]
        return total

    with torch.enable_grad():
        optimizer.step(loss)  # type: ignore[no-untyped-call]
    return probe.requires_grad_(False)


def fit_balanced_probe(
    x: Any,
    y: Bool[np.ndarray, "n"],
    *,
    c: float = 1.0,
    l1: bool = False,
    solver: Literal["liblinear", "lbfgs"] = "liblinear",
) -> Float[np.ndarray, "d"]:
    """Weights of a logistic regression on one label with both classes weighed alike.

    Args:
        x: (n, d) columns, dense or scipy sparse.
        y: (n) the label.
        c: inverse penalty.
        l1: penalize the sum of |weights| in place of half their squares; only with "liblinear".
        solver: "liblinear" penalizes the intercept like a weight and suits few or sparse columns; "lbfgs" leaves it
            free and suits many dense ones.
    """
    from sklearn.linear_model import LogisticRegression

    settings: dict[str, Any] = {"class_weight": "balanced", "solver": solver, "max_iter": 1000, "C": c}
    if l1:  # scikit-learn 1.8 gave the penalty another name
        settings |= {"penalty": "l1"} if LogisticRegression().penalty == "l2" else {"l1_ratio": 1.0}
    return np.asarray(LogisticRegression(**settings, random_state=0).fit(x, y.astype(np.int64)).coef_[0])


@dataclass(frozen=True, kw_only=True)
class ProbeScore:
    """Held-out metrics of a binary classifier."""

    f1: float
    """[0, 1]; for a label with rate p, a classifier that mostly predicts true scores near 2 p / (1 + p)"""
    mcc: float
    """Matthews correlation, [-1, 1]; 0 is chance"""
    auroc: float
    """[0, 1]; 0.5 is chance"""
    accuracy: float
    """[0, 1]; always predicting the more frequent class scores `max(p, 1 - p)`"""
    balanced: float
    """balanced accuracy, the mean of the accuracies on true and on false tokens, [0, 1]; 0.5 is chance"""
    yes: float
    """share of tokens predicted true; 1 is a classifier that always predicts true, whatever its F1"""


UNKNOWN = ProbeScore(f1=math.nan, mcc=math.nan, auroc=math.nan, accuracy=math.nan, balanced=math.nan, yes=math.nan)


def score_guess(scores: Float[np.ndarray, "n"], y: Bool[np.ndarray, "n"], threshold: float) -> ProbeScore:
    """Metrics of the classifier `score >= threshold`; its AUROC is that of the scores.

    >>> score_guess(np.array([0.0, 1.0, 1.0]), np.array([False, True, False]), 1.0).auroc
    0.75
    """
    guess, n_true, n = scores >= threshold, int(y.sum()), len(y)
    hits, fires = int((guess & y).sum()), int(guess.sum())
    spread = math.sqrt(fires * (n - fires) * n_true * (n - n_true))
    quiet = n - fires - n_true + hits  # true negatives
    return ProbeScore(
        f1=2 * hits / max(1, fires + n_true),
        mcc=(n * hits - fires * n_true) / spread if spread else 0.0,
        auroc=auroc(scores, y),
        accuracy=(hits + quiet) / max(1, n),
        balanced=balanced_accuracy(guess, y),
        yes=fires / max(1, n),
    )

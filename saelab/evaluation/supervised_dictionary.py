"""`fit_supervised_dictionary`: one vector for each value of each known attribute (arXiv:2405.08366).

Also features as classifiers of an attribute's values: best single ones, unions of some, and a linear probe as baseline.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from saelab.evaluation.feature_classifiers import classifier_union
from saelab.functional.metrics import exact
from saelab.functional.statistics import choose_threshold, f1, fit_probe
from saelab.stores.results import Result

Fit = Literal["means", "least-squares"]
Attributes = Mapping[str, str]
"""The attributes of a prompt: their values by name"""
GOOD_F1 = 0.6


@dataclass(frozen=True, eq=False)
class SupervisedDictionary:
    """Supervised dictionary, `x_hat = mean + sum over attributes of u(attribute = value)`, one row for each value."""

    mean: Float[Tensor, "d_in"]
    rows: Float[Tensor, "n_values d_in"]
    """u(attribute = value)"""
    names: tuple[tuple[str, str], ...]
    """attribute and value of each row"""

    def __repr__(self) -> str:
        return f"SupervisedDictionary({len(self.names)} values of {sorted({name for name, _ in self.names})})"

    def encode(self, attributes: Sequence[Attributes]) -> Float[Tensor, "n n_values"]:
        """Indicator codes of each row's attributes: 1 where it has a value, else 0; ValueError for an unknown one."""
        return _mark(attributes, {pair: i for i, pair in enumerate(self.names)})

    def decode(self, z: Float[Tensor, "n n_values"]) -> Float[Tensor, "n d_in"]:
        """Reconstructions of codes, `mean + z rows`."""
        return self.mean + z @ self.rows

    def edit(
        self, x: Float[Tensor, "n d_in"], before: Sequence[Attributes], after: Sequence[Attributes]
    ) -> Float[Tensor, "n d_in"]:
        """Activations with the vectors of the attributes `before` replaced by those of `after`.

        `x - u_before + u_after`, each u the sum over a row's attributes.
        """
        return x + (self.encode(after) - self.encode(before)) @ self.rows


def fit_supervised_dictionary(
    x: Float[Tensor, "n d_in"], attributes: Sequence[Attributes], method: Fit = "means"
) -> SupervisedDictionary:
    """The supervised dictionary of activations with known attributes.

        means           u(a = v) = mean(x | a = v) - mean(x)
        least-squares   the u that make the squared error of x_hat least; of all such u, the shortest

    Means count twice what correlated attributes share, least squares do not. ValueError unless each row has the same
    attributes. Source: arXiv:2405.08366.

    >>> labels = [{"who": "Ann", "when": "now"}, {"who": "Tom", "when": "now"}]
    >>> fit_supervised_dictionary(torch.tensor([[1.0, 2.0], [3.0, 2.0]]), labels).rows
    tensor([[ 0.,  0.],
            [-1.,  0.],
            [ 1.,  0.]])
    """
    if method not in get_args(Fit):
        raise ValueError(f"`method` must be one of {get_args(Fit)}, got '{method}'.")
    if not attributes or len(attributes) != len(x) or len({frozenset(one) for one in attributes}) > 1:
        raise ValueError(
            f"`attributes` must say the same things of each of the {len(x)} rows, got {len(attributes)} of them with "
            f"{len({frozenset(one) for one in attributes})} sets of attributes."
        )
    names = tuple(sorted({pair for one in attributes for pair in one.items()}))
    z = exact(_mark(attributes, {pair: i for i, pair in enumerate(names)}))
    x = exact(x.cpu())
    mean = x.mean(0)
    if method == "means":
        rows = (z.T @ (x - mean)) / z.sum(0)[:, None]
    else:
        rows = torch.linalg.lstsq(z, x - mean, driver="gelsd").solution  # the rows of an attribute add up to any vector
    return SupervisedDictionary(mean.float(), rows.float(), names)


def _mark(attributes: Sequence[Attributes], places: Mapping[tuple[str, str], int]) -> Tensor:
    pairs = [(row, pair) for row, one in enumerate(attributes) for pair in one.items()]
    if unknown := sorted({pair for _, pair in pairs} - set(places)):
        raise ValueError(f"Attributes must have values that were there in fitting, got {unknown[:5]}.")
    z = torch.zeros(len(attributes), len(places))
    z[[row for row, _ in pairs], [places[pair] for _, pair in pairs]] = 1
    return z


@dataclass(frozen=True, kw_only=True)
class AdditiveShare(Result):
    """How much of what combinations of attributes do to activations is a sum of one vector for each value."""

    explained: float
    """share of the variance of the combinations' means that the sums explain, 0 to 1; NaN where there is none"""
    shuffled: float
    """mean of the same for means exchanged among the combinations: what so many vectors explain by chance"""
    shuffled_high: float
    """95th percentile of it"""
    n_combinations: int
    n_values: int
    n_rows: int

    def __str__(self) -> str:
        return (
            f"one vector for each of {self.n_values:,} values explains {self.explained:.3f} of the variance of the "
            f"means of {self.n_combinations:,} combinations ({self.n_rows:,} rows); shuffled {self.shuffled:.3f}, "
            f"up to {self.shuffled_high:.3f}"
        )


def additive_share(
    x: Float[Tensor, "n d_in"], attributes: Sequence[Attributes], *, n_shuffles: int = 100, seed: int = 0
) -> AdditiveShare:
    """The share of the variance between combinations of attributes that their additive part explains.

    With `m_c` the mean of the rows of each combination c of values that occurs, and `u` fitted to these means by least
    squares, `1 - sum_c |m_c - mean - sum of u|^2 / sum_c |m_c - mean|^2`. Means of few rows are noisy, which no sum
    explains. Source: "ideal words", arXiv:2302.14383.

    Args:
        x: (n, d_in) activations.
        attributes: values of the attributes of each row.
        n_shuffles: times that the means are exchanged among the combinations; 0 for none.
        seed: of the exchanges.

    Raises:
        ValueError: as in `fit_supervised_dictionary`, and for a negative number of exchanges.

    >>> x = torch.tensor([[0.0], [1.0], [2.0], [3.0]])
    >>> labels = [{"a": "xxyy"[i], "b": "zwzw"[i]} for i in range(4)]
    >>> additive_share(x, labels, n_shuffles=2).explained
    1.0
    """
    if n_shuffles < 0:
        raise ValueError(f"`n_shuffles` must be at least 0, got {n_shuffles}; use 0 for no exchanges.")
    fitted = fit_supervised_dictionary(x, attributes)  # checks, and names the values
    kinds = [tuple(sorted(one.items())) for one in attributes]
    numbers = {kind: i for i, kind in enumerate(dict.fromkeys(kinds))}
    rows = torch.tensor([numbers[kind] for kind in kinds])
    values = exact(x.cpu())
    sums = torch.zeros(len(numbers), x.shape[1], dtype=torch.float64).index_add_(0, rows, values)
    means = sums / torch.bincount(rows)[:, None]
    means = means - means.mean(0)
    total = float(means.square().sum())
    z = exact(fitted.encode([dict(kind) for kind in numbers]))
    basis, sizes, _ = torch.linalg.svd(z - z.mean(0), full_matrices=False)
    basis = basis[:, sizes > 1e-9 * sizes.max().clamp(min=1e-30)]
    generator = torch.Generator().manual_seed(seed)
    orders = [torch.arange(len(means))]
    orders += [torch.randperm(len(means), generator=generator) for _ in range(n_shuffles)]
    explained = [float((basis.T @ means[order]).square().sum()) / total if total > 0 else math.nan for order in orders]
    return AdditiveShare(
        explained=round(explained[0], 9),
        shuffled=float(np.mean(explained[1:])) if n_shuffles else math.nan,
        shuffled_high=float(np.quantile(explained[1:], 0.95)) if n_shuffles else math.nan,
        n_combinations=len(means),
        n_values=len(fitted.names),
        n_rows=len(x),
    )


@dataclass(frozen=True, kw_only=True)
class AttributeScore:
    """F1 of features as classifiers of one attribute's values at a position, on held-out prompts, means over values."""

    attribute: str
    place: str
    n_values: int
    f1: float
    """of the best feature, `1[z has a given sign]`, chosen on training prompts"""
    f1_union: float
    """of the union of up to 10 features, each added on training prompts while F1 grows by 0.03"""
    f1_probe: float
    """of logistic regression on the activations: the ceiling for linear classifiers"""
    f1_always: float
    """of a feature that always fires, `2 p / (1 + p)`"""
    n_sides: float
    """features in the union"""
    n_found: int
    """values that the best feature classifies well: F1 of 0.6, and half way from that of always predicting true to 1"""
    n_split: int
    """other values that the union classifies well: over-splitting"""
    n_occluded: int
    """values that neither classifies well, although the probe does"""


def score_attributes(
    z: Float[Tensor, "n n_features"],
    x: Float[Tensor, "n d_in"],
    truth: Mapping[str, Bool[np.ndarray, "n n_values"]],
    is_train: Bool[np.ndarray, "n"],
    place: str = "",
) -> list[AttributeScore]:
    """Scores of features as classifiers of each attribute's values, with both signs of signed features.

    Values that are missing on a side of the split are left out, and so are features that never fire. Source:
    arXiv:2405.08366.

    Args:
        z: (n, n_features) codes.
        x: (n, d_in) activations, for the linear probe.
        truth: by attribute, (n, n_values) which rows have each value; several values may be true of a row.
        is_train: (n) rows to choose and fit on; the others are scored.
        place: name of the position, for display.

    >>> z = torch.eye(2).repeat(8, 1)
    >>> found = score_attributes(z, z, {"which": z.numpy() > 0}, np.arange(16) < 8)[0]
    >>> found.f1, found.n_found, round(found.f1_always, 3)
    (1.0, 2, 0.667)
    """
    from scipy.sparse import csc_matrix

    fires = csc_matrix(torch.cat([z > 0, z < 0], 1).numpy())
    train, held = fires[is_train].astype(np.int32), fires[~is_train].astype(np.int32)
    probed = _probe(x, truth, is_train)
    return [_score(name, place, train, held, marks, is_train, probed[name]) for name, marks in truth.items()]


def mark_values(
    attributes: Sequence[Attributes], joined: Mapping[str, Sequence[str]] | None = None
) -> dict[str, Bool[np.ndarray, "n n_values"]]:
    """Mask of the rows that have each value, by attribute.

    `joined` defines more attributes as unions of some: a value holds where any of them has it.

    >>> labels = [{"a": "x", "b": "y"}, {"a": "y", "b": "y"}]
    >>> mark_values(labels, {"either": ("a", "b")})["either"].tolist()
    [[True, True], [False, True]]
    """
    groups = {name: (name,) for name in attributes[0]} | {name: tuple(some) for name, some in (joined or {}).items()}
    found = {}
    for name, members in groups.items():
        columns = [np.array([one[member] for one in attributes]) for member in members]
        values = np.unique(np.concatenate(columns))
        found[name] = np.logical_or.reduce([column[:, None] == values for column in columns])
    return found


def _score(
    name: str, place: str, train: Any, held: Any, marks: np.ndarray, is_train: np.ndarray, probed: np.ndarray
) -> AttributeScore:
    known = marks[is_train].any(0) & marks[~is_train].any(0)
    y, y_held = marks[is_train][:, known], marks[~is_train][:, known]
    unions = [_unite(train, y[:, v]) for v in range(y.shape[1])]
    single = np.array([_test(held, sides[:1], y_held[:, v]) for v, sides in enumerate(unions)])
    union = np.array([_test(held, sides, y_held[:, v]) for v, sides in enumerate(unions)])
    always = 2 * y_held.mean(0) / (1 + y_held.mean(0))
    good = np.maximum(GOOD_F1, (1 + always) / 2)
    found = single >= good
    split = ~found & (union >= good)
    return AttributeScore(
        attribute=name,
        place=place,
        n_values=int(known.sum()),
        f1=float(single.mean()),
        f1_union=float(union.mean()),
        f1_probe=float(probed[known].mean()),
        f1_always=float(always.mean()),
        n_sides=float(np.mean([len(sides) for sides in unions])),
        n_found=int(found.sum()),
        n_split=int(split.sum()),
        n_occluded=int((~found & ~split & (probed[known] >= good)).sum()),
    )


def _unite(train: Any, y: np.ndarray) -> list[int]:
    """Columns whose union predicts a label, the best first; none where no column fires with it."""
    fires = np.asarray(train.sum(0)).ravel()
    return classifier_union(
        y.astype(np.int32) @ train,
        fires,
        y,
        lambda side: train[:, [side]].indices,
        lambda tokens: np.asarray(train[tokens].sum(0)).ravel(),
    )


def _test(held: Any, sides: Sequence[int], y: np.ndarray) -> float:
    predicted = np.zeros(len(y), bool)
    for side in sides:
        predicted[held[:, [side]].indices] = True
    return _score_f1(predicted, y)


def _score_f1(guess: np.ndarray, y: np.ndarray) -> float:
    return float(f1((guess & y).sum(), guess.sum(), int(y.sum())))


def _probe(x: Tensor, truth: Mapping[str, np.ndarray], is_train: np.ndarray) -> dict[str, np.ndarray]:
    """Held-out F1 of each value, by attribute, from one regression on all of them."""
    train = torch.from_numpy(is_train)
    x = (x - x[train].mean(0)) / x[train].std(0).clamp(min=1e-6)
    labels = torch.from_numpy(np.concatenate(list(truth.values()), 1))
    scores = fit_probe(x[train], labels[train].float())(x).numpy().astype(np.float64)
    found = np.zeros(labels.shape[1])
    for v, y in enumerate(labels.numpy().T):
        threshold, _ = choose_threshold(scores[is_train, v], y[is_train])
        found[v] = _score_f1(scores[~is_train, v] >= threshold, y[~is_train])
    ends = np.cumsum([marks.shape[1] for marks in truth.values()])[:-1]
    return dict(zip(truth, np.split(found, ends), strict=True))

"""`preference_probe`: a Bradley-Terry probe fitted to pairs of words, and whether it decides other pairs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from saelab.functional.statistics import CONSTANT, fit_balanced_probe
from saelab.interventions.directions import Direction
from saelab.probing.association_tests import LEVEL, read_rows
from saelab.stores.results import Result, find_row, format_table

OWN = "own pairs, held out"
LIMITS = (
    "It cannot show that the model prefers anything: a probe finds whatever tells the first words of its pairs from "
    "the second ones, and pairs that share words are no independent samples."
)


@dataclass(frozen=True, kw_only=True)
class PreferenceScore:
    """Share of pairs in which a preference probe puts the first word first."""

    name: str
    n_pairs: int
    accuracy: float
    """0.5 is chance; below it the probe decides the pairs the other way"""
    flipped: tuple[float, ...]
    """the same of probes fitted to the pairs with half of them turned round, for each draw"""
    p: float
    """share of these, the probe itself counted, as far from 0.5"""


@dataclass(frozen=True, kw_only=True, eq=False)
class PreferenceProbe(Result):
    """Result of `preference_probe`: pairs decided by a probe of other pairs, beside probes of turned pairs."""

    rows: tuple[PreferenceScore, ...]
    weights: Float[np.ndarray, "d"] = field(repr=False)
    """of the probe of all training pairs"""
    n_pairs: int
    n_folds: int
    seed: int

    def __getitem__(self, name: str) -> PreferenceScore:
        return find_row(self.rows, name=name)

    def direction(self, hook_point: str) -> Direction:
        """The weights as a direction, for `sl.steer` at the hook point that vectors were read at."""
        vector = torch.from_numpy(self.weights).float()
        return Direction(vector / vector.norm(), hook_point, "preference")

    def prefer(self, first: Float[Tensor, "n d"], second: Float[Tensor, "n d"]) -> Float[Tensor, "n"]:
        """Probability that the first of each two vectors is preferred, `sigmoid(w . (first - second))`."""
        return ((first - second) @ torch.from_numpy(self.weights).to(first)).sigmoid()

    @property
    def failed(self) -> tuple[str, ...]:
        """Sets of pairs that probes of turned pairs decide as clearly in more than 1 of 20 draws."""
        return tuple(
            f"{row.name}: probes of turned pairs are as far from 0.5 with p {row.p:.3f}"
            for row in self.rows
            if not row.p <= LEVEL
        )

    def __str__(self) -> str:
        lines = [f"A null is not passed: {one}" for one in self.failed]
        lines.append(
            f"a probe of {self.n_pairs:,} pairs, {self.n_folds} folds of words; {len(self.rows[0].flipped)} draws of "
            f"turned pairs, seed {self.seed}"
        )
        table = [["", "pairs", "first preferred", "turned, mean", "turned, 5 % to 95 %", "p"]]
        for row in self.rows:
            low, high = np.quantile(row.flipped, (0.05, 0.95))
            figures = [f"{row.accuracy:.3f}", f"{np.mean(row.flipped):.3f}", f"{low:.3f} to {high:.3f}", f"{row.p:.3f}"]
            table.append([row.name, str(row.n_pairs), *figures])
        return "\n".join([*lines, *format_table(table), LIMITS])


def preference_probe(
    vectors: Float[Tensor, "n_words d"] | Float[np.ndarray, "n_words d"],
    pairs: Sequence[tuple[int, int]],
    transfer: Mapping[str, Sequence[tuple[int, int]]] | None = None,
    *,
    n_folds: int = 5,
    n_draws: int = 99,
    seed: int = 0,
) -> PreferenceProbe:
    """A probe of which of two words comes first, and how it decides pairs that it was not fitted to.

        P(i over j) = sigmoid(w . (x_i - x_j)),    columns scaled to deviation 1, half the squared weights as penalty

    Own pairs are scored by probes that saw neither of their words (folds of words; a pair whose words are in two folds
    counts in neither). The null fits the same probes to pairs of which each was turned round with probability 1/2: it
    keeps the words and what other pairs have in common with them, which alone decides many pairs one way.

    Source: Bradley and Terry 1952; as a probe of biases, trained on harmless pairs, "What do Llamas really think?".

    Args:
        vectors: (n_words, d) of words or texts.
        pairs: rows of the preferred and of the other one.
        transfer: other pairs by name, the one that would be preferred first.
        n_folds: of words.
        n_draws: fits to turned pairs.
        seed: of folds and turns.

    Raises:
        ValueError: rows that are not there, pairs of a word with itself, fewer than four pairs, a set without pairs, or
            no pair inside one fold.

    >>> x = torch.randn(40, 8, generator=torch.Generator().manual_seed(0))
    >>> order = x[:, 0].argsort(descending=True).tolist()
    >>> pairs = [(order[i], order[j]) for i in range(40) for j in range(i + 10, 40)]
    >>> preference_probe(x, pairs, n_draws=19)["own pairs, held out"].accuracy > 0.9
    True
    """
    x = torch.from_numpy(read_rows(vectors, "vectors"))
    sets = {name: _read_pairs(found, name, len(x)) for name, found in {"pairs": pairs, **(transfer or {})}.items()}
    own = sets.pop("pairs")
    if len(own) < 4 or n_draws < 19 or n_folds < 2:
        raise ValueError(
            f"`pairs` must be at least 4, `n_draws` 19 and `n_folds` 2, got {len(own)}, {n_draws} and {n_folds}."
        )
    scale = x.std(0)
    scale[scale <= CONSTANT * x.square().mean(0).sqrt()] = 1
    x = x / scale
    rng = np.random.default_rng(seed)
    fold = rng.permutation(len(x)) % n_folds
    of_pair = np.where((inside := fold[own])[:, 0] == inside[:, 1], inside[:, 0], -1)
    if not (of_pair >= 0).any():
        raise ValueError(f"Some pairs must have both words in one of the {n_folds} folds; give more, or fewer folds.")

    turned = np.vstack([np.zeros(len(own), bool), rng.random((n_draws, len(own))) < 0.5])
    weights = _fit(x, own, turned)
    hits = [
        _decide(x, _fit(x, own[(seen := (inside != i).all(1))], turned[:, seen]), own[of_pair == i])
        for i in range(n_folds)
        if (of_pair == i).any()
    ]
    scores = {OWN: torch.cat(hits)} | {name: _decide(x, weights, pairs_of) for name, pairs_of in sets.items()}
    rows = []
    for name, found in scores.items():
        accuracy, *draws = found.mean(0).tolist()
        n_far = int((np.abs(np.array(draws) - 0.5) >= abs(accuracy - 0.5) - 1e-6).sum())
        p = (n_far + 1) / (n_draws + 1)
        rows.append(PreferenceScore(name=name, n_pairs=len(found), accuracy=accuracy, flipped=tuple(draws), p=p))
    return PreferenceProbe(
        rows=tuple(rows),
        weights=(weights[0] / scale).numpy(),
        n_pairs=len(own),
        n_folds=n_folds,
        seed=seed,
    )


def _read_pairs(pairs: Sequence[tuple[int, int]], name: str, n: int) -> Int[np.ndarray, "n 2"]:
    rows = np.asarray(pairs, np.int64).reshape(-1, 2)
    if not len(rows) or rows.min() < 0 or rows.max() >= n or (rows[:, 0] == rows[:, 1]).any():
        raise ValueError(f"Pairs of '{name}' must be two different rows of the {n} vectors, got {len(rows)} pairs.")
    return rows


def _fit(
    x: Float[Tensor, "n_words d"], pairs: Int[np.ndarray, "n 2"], turned: Bool[np.ndarray, "n_draws n"]
) -> Float[Tensor, "n_draws d"]:
    """Weights for each draw of turned pairs, from differences in both directions: the best intercept is 0."""
    d = (x[pairs[:, 0]] - x[pairs[:, 1]]).numpy()
    both = np.vstack([d, -d])
    rows = [fit_balanced_probe(both, np.concatenate([~turn, turn])) for turn in turned]
    return torch.from_numpy(np.stack(rows))


def _decide(
    x: Float[Tensor, "n_words d"], weights: Float[Tensor, "n_draws d"], pairs: Int[np.ndarray, "n 2"]
) -> Float[Tensor, "n n_draws"]:
    """1 where a probe puts the first word first, 1/2 where it cannot tell."""
    scores = (x[pairs[:, 0]] - x[pairs[:, 1]]) @ weights.T
    return (scores.sign() + 1) / 2

"""`Attribution`: effects of features at tokens on a metric, their completeness and agreement with exact effects."""

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from saelab.stores.results import Result

N_SHUFFLES = 99
N_SHOWN = 10
NOTHING = 1e-5
"""Differences of the metric below this share of its size count as rounding."""


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """Correlations of estimated with exact effects of features, in [-1, 1]."""

    pearson: float
    spearman: float
    shuffled: float
    """mean Spearman with estimates shuffled among the features of the same token"""
    shuffled_95: float
    """the Spearman that 5 % of the shuffles exceed: what is below is no agreement"""
    top: float
    """share of the ten largest exact effects by magnitude that are among the ten largest estimates"""
    top_shuffled: float
    """mean of the same with estimates shuffled: high where there are not many more than ten features"""
    size: float
    """Spearman of |exact effect| with the norm of the change of the activation: a baseline without gradients"""
    size_estimate: float
    """Spearman of |exact effect| with |estimate|, to compare `size` with"""
    n: int
    """features at tokens"""


@dataclass(frozen=True, kw_only=True, eq=False)
class Attribution(Result):
    """Result of `attribute`; entry i of the arrays is feature `features[i]` at token `positions[i]`."""

    hook_point: str
    metric: str
    method: str
    baseline: str
    """what replaces codes and errors: "zero", "mean" or "counterfactual" values"""
    n_steps: int
    """points of integration; 0 for other methods"""
    clean: float
    """the metric of the unmodified model"""
    patched: float
    """the metric with every code and error of these tokens replaced"""
    tokens: tuple[str, ...]
    """all tokens of the prompt"""
    positions: Int[np.ndarray, "n_nodes"] = field(repr=False)
    features: Int[np.ndarray, "n_nodes"] = field(repr=False)
    codes: Float[np.ndarray, "n_nodes"] = field(repr=False)
    """z, before replacement"""
    sizes: Float[np.ndarray, "n_nodes"] = field(repr=False)
    """norm of the change of the activation when the code is replaced"""
    effects: Float[np.ndarray, "n_nodes"] = field(repr=False)
    """metric with the code replaced less the clean metric, in the metric's units"""
    errors: Float[np.ndarray, "n_tokens"] = field(repr=False)
    """the same for the reconstruction error of each token; 0 for tokens that were not attributed"""
    exact: Float[np.ndarray, "n_nodes"] | None = field(default=None, repr=False)
    """exact effects of features, where requested"""

    @property
    def completeness(self) -> float:
        """Sum of all effects, errors included, over `patched - clean`: 1 is complete; NaN where that is rounding."""
        whole = self.patched - self.clean
        if abs(whole) <= NOTHING * max(abs(self.patched), abs(self.clean)):
            return float("nan")
        return float(self.effects.sum(dtype=np.float64) + self.errors.sum(dtype=np.float64)) / whole

    @cached_property
    def by_token(self) -> Float[np.ndarray, "n_tokens"]:
        """Effects of features, summed over each token."""
        return np.bincount(self.positions, self.effects, len(self.tokens))

    @cached_property
    def by_feature(self) -> dict[int, float]:
        """Effects summed over tokens, by feature, the largest in magnitude first."""
        features, where = np.unique(self.features, return_inverse=True)
        sums = np.bincount(where, self.effects, len(features))
        order = np.argsort(-np.abs(sums), kind="stable")
        return {int(features[i]): float(sums[i]) for i in order}

    def top(self, n: int = N_SHOWN) -> list[tuple[int, int, float, float]]:
        """Token position, feature, code and effect of the `n` largest effects in magnitude."""
        order = _largest(self.effects, n)
        columns = (self.positions[order], self.features[order], self.codes[order], self.effects[order])
        return list(zip(*(column.tolist() for column in columns), strict=True))

    @cached_property
    def agreement(self) -> Agreement | None:
        """Correlations with exact effects; None where those were not requested."""
        return None if self.exact is None else _hold_against(self, self.exact)

    def to_dict(self) -> dict[str, Any]:
        """Every field, completeness and agreement, ready for JSON."""
        agreement = self.agreement
        told = None if agreement is None else dict(vars(agreement))
        return super().to_dict() | {"completeness": self.completeness, "agreement": told}

    def __str__(self) -> str:
        how = f"{self.method}, {self.n_steps} steps" if self.n_steps else self.method
        whole = f"{self.metric}: {self.clean:.4g} as it is, {self.patched:.4g} with codes and errors replaced"
        shares = f"features {self.effects.sum():+.4g}, errors {self.errors.sum():+.4g}"
        lines = [
            f"{whole} ({self.baseline}, {self.hook_point})",
            f"{how}: {len(self.effects):,} features at tokens; {shares}; completeness {self._tell_completeness()}",
        ]
        if self.agreement is not None:
            lines.append(tell_agreement(self.agreement))
        lines.append(f"{'effect':>10} {'code':>9} {'feature':>8}  token")
        lines += [
            f"{effect:+10.4f} {code:+9.3f} {feature:>8}  {position} {self.tokens[position]!r}"
            for position, feature, code, effect in self.top()
        ]
        return "\n".join(lines)

    def _tell_completeness(self) -> str:
        share = self.completeness
        return f"{share:.4f}" if share == share else "unknown, since replacing all changes nothing"


def tell_agreement(agreement: Agreement) -> str:
    """The correlations with exact effects in one line of text.

    >>> null = {"shuffled": 0.0, "shuffled_95": 0.2, "top_shuffled": 0.1}
    >>> one = Agreement(pearson=1.0, spearman=0.9, top=0.7, size=0.5, size_estimate=0.9, n=70, **null)
    >>> tell_agreement(one)[35:]
    'Spearman 0.900 (shuffled 0.000, 95 % below 0.200), 70% of the top 10 (shuffled 10%); by size 0.900, moved 0.500'
    """
    one = agreement
    shuffled = f"shuffled {one.shuffled:.3f}, 95 % below {one.shuffled_95:.3f}"
    signed = f"Pearson {one.pearson:.3f}, Spearman {one.spearman:.3f} ({shuffled})"
    top = f"{one.top:.0%} of the top {N_SHOWN} (shuffled {one.top_shuffled:.0%})"
    return f"with exact effects: {signed}, {top}; by size {one.size_estimate:.3f}, moved {one.size:.3f}"


def _hold_against(found: Attribution, exact: np.ndarray) -> Agreement:
    estimates = found.effects
    rng = np.random.default_rng(0)
    others = [estimates[_shuffle(found.positions, rng)] for _ in range(N_SHUFFLES)]
    shuffled = [rank_correlation(other, exact) for other in others]
    return Agreement(
        pearson=correlation(estimates, exact),
        spearman=rank_correlation(estimates, exact),
        shuffled=float(np.mean(shuffled)),
        shuffled_95=float(np.quantile(shuffled, 0.95)),
        top=_share_top(estimates, exact),
        top_shuffled=float(np.mean([_share_top(other, exact) for other in others])),
        size=rank_correlation(found.sizes, np.abs(exact)),
        size_estimate=rank_correlation(np.abs(estimates), np.abs(exact)),
        n=len(exact),
    )


def _share_top(estimates: Float[np.ndarray, "n"], exact: Float[np.ndarray, "n"]) -> float:
    return float(np.isin(_largest(estimates), _largest(exact)).mean()) if len(exact) else float("nan")


def _largest(values: Float[np.ndarray, "n"], n: int = N_SHOWN) -> Int[np.ndarray, "m"]:
    return np.argsort(-np.abs(values), kind="stable")[:n]


def _shuffle(groups: Int[np.ndarray, "n"], rng: np.random.Generator) -> Int[np.ndarray, "n"]:
    """A random permutation within groups, whose members need not be adjacent."""
    found = np.empty(len(groups), np.int64)
    found[np.argsort(groups, kind="stable")] = np.lexsort((rng.random(len(groups)), groups))
    return found


def correlation(x: Float[np.ndarray, "n"], y: Float[np.ndarray, "n"]) -> float:
    """Pearson's correlation; NaN for fewer than three values or where one side does not vary.

    >>> correlation(np.array([1.0, 2.0, 3.0]), np.array([2.0, 4.0, 6.0]))
    1.0
    """
    x, y = (np.asarray(one, np.float64) - np.mean(one, dtype=np.float64) if len(one) else one for one in (x, y))
    scale = float(np.linalg.norm(x) * np.linalg.norm(y))
    return round(float(x @ y) / scale, 12) if len(x) > 2 and scale > 0 else float("nan")


def rank_correlation(x: Float[np.ndarray, "n"], y: Float[np.ndarray, "n"]) -> float:
    """Spearman's rank correlation, ties sharing their mean rank.

    >>> rank_correlation(np.array([1.0, 2.0, 30.0]), np.array([2.0, 4.0, 5.0]))
    1.0
    """
    from scipy.stats import rankdata

    return correlation(rankdata(x), rankdata(y))

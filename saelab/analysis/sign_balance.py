"""`sign_audit`: do features use both signs? Balance of signs, windows of opposite sign, and antipodal directions."""

import math
from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from saelab.analysis.max_activating import Example, max_activating_examples
from saelab.collecting.harvesting import require_harvested
from saelab.sae.sae import SAE
from saelab.stores.feature_store import FeatureStore
from saelab.stores.results import Result, format_table

BLOCK = 1024
TWO_SIDED = 0.1
"""Share of firings that the rarer sign has from which on a feature counts as two-sided."""
OPPOSITE = -0.7
"""Cosine below which two directions count as antipodal."""


@dataclass(frozen=True, kw_only=True)
class OpposedWindows:
    """The windows of text where one feature's codes of either sign are largest, to read side by side."""

    feature: int
    balance: float
    """share of the firings that the rarer sign has"""
    n_firings: int
    positive: tuple[Example, ...]
    negative: tuple[Example, ...]


@dataclass(frozen=True, kw_only=True, eq=False)
class SignAudit(Result):
    """Whether features use both signs, or have antipodal partners in place of a second sign."""

    n_tokens: int
    min_firings: int
    n_features: int
    """features with `min_firings` or more, which all shares are of"""
    balance: Float[np.ndarray, "d_sae"] = field(repr=False)
    """`min(P(z > 0 | z != 0), P(z < 0 | z != 0))`, 0 to 0.5; NaN for features with fewer firings"""
    two_sided_frac: float
    """share of features whose rarer sign has a tenth of the firings or more"""
    two_sided_untrained: float
    """the same of an untrained dictionary: codes of random directions take both signs; NaN where none is given"""
    antipodal_frac: float
    """share of features whose direction has a cosine below -0.7 with another's; NaN without the SAE"""
    antipodal_random: float
    """the same of as many random directions"""
    windows: tuple[OpposedWindows, ...] = field(repr=False)
    """the most balanced features"""

    @property
    def mean_balance(self) -> float:
        """Mean balance of the features that have one."""
        known = self.balance[~np.isnan(self.balance)]
        return float(known.mean()) if len(known) else math.nan

    def __str__(self) -> str:
        lines = [
            f"{self.n_features:,} of {len(self.balance):,} features fire {self.min_firings} times or more on "
            f"{self.n_tokens:,} tokens",
            *format_table(
                [
                    ["", "features", "chance"],
                    [
                        f"two-sided (>= {TWO_SIDED:.0%})",
                        *map(_percent, (self.two_sided_frac, self.two_sided_untrained)),
                    ],
                    ["mean balance", f"{self.mean_balance:.3f}"],
                    [f"antipodal (< {OPPOSITE:g})", *map(_percent, (self.antipodal_frac, self.antipodal_random))],
                ]
            ),
        ]
        for one in self.windows:
            lines.append(f"feature {one.feature}, balance {one.balance:.2f} of {one.n_firings:,} firings")
            for sign, examples in (("+", one.positive), ("-", one.negative)):
                lines += [f"  {sign} {example.value:+.3g}  {example.text!r}" for example in examples]
        return "\n".join(lines)


def sign_audit(
    store: FeatureStore,
    sae: SAE | None = None,
    *,
    untrained: FeatureStore | None = None,
    n_shown: int = 10,
    n_windows: int = 3,
    min_firings: int = 20,
    seed: int = 0,
) -> SignAudit:
    """Balance of the signs of each feature's codes, and the share of features with an antipodal partner.

    A signed dictionary can represent opposites as the two signs of one feature; one whose codes are never negative
    needs a second feature with the opposite direction. Source: the audit of AbsTopK, arXiv:2510.00404, by counts in
    place of a judge's labels; whether two sides mean opposite things is for the reader of `windows`.

    Args:
        store: feature store of the dictionary.
        sae: the SAE that it was harvested with, for directions; None leaves these out.
        untrained: store of the same tokens by an untrained dictionary (`sl.collecting.harvest_untrained`).
        n_shown: features whose windows are shown, the most balanced first.
        n_windows: windows a sign.
        min_firings: features with fewer firings are left out, as their balance is mostly chance.
        seed: of the random directions.

    Raises:
        ValueError: `min_firings` is below 1, or the stores or the SAE do not belong together.
    """
    if min_firings < 1:
        raise ValueError(f"`min_firings` must be at least 1, got {min_firings}.")
    if untrained is not None and not np.array_equal(untrained.token_ids, store.token_ids):
        raise ValueError(
            f"`untrained` must be a store of the same {len(store)} tokens, got {len(untrained)} or others; make it "
            "with `harvest_untrained`."
        )
    if sae is not None:
        require_harvested(store, sae)
    balance = _balance(store, min_firings)
    known = ~np.isnan(balance)
    order = np.argsort(-np.where(known & (balance > 0), balance, -1.0), kind="stable")
    shown = [j for j in order[:n_shown].tolist() if balance[j] > 0]
    near, chance = (math.nan, math.nan) if sae is None else _find_antipodal(sae, known, seed)
    return SignAudit(
        n_tokens=len(store),
        min_firings=min_firings,
        n_features=int(known.sum()),
        balance=balance,
        two_sided_frac=_two_sided(balance),
        two_sided_untrained=math.nan if untrained is None else _two_sided(_balance(untrained, min_firings)),
        antipodal_frac=near,
        antipodal_random=chance,
        windows=tuple(_show(store, j, float(balance[j]), n_windows, seed) for j in shown),
    )


def antipodal(rows: Float[Tensor, "n d_in"], threshold: float = OPPOSITE) -> Bool[np.ndarray, "n"]:
    """Which directions have a cosine below the threshold with another one.

    >>> antipodal(torch.tensor([[1.0, 0.0], [-2.0, 0.1], [0.0, 1.0]])).tolist()
    [True, True, False]
    """
    rows = rows.float().cpu()
    rows = rows / rows.norm(dim=1, keepdim=True).clamp(min=1e-30)
    least = [(part @ rows.T).amin(1) for part in rows.split(BLOCK)]
    return (torch.cat(least) < threshold).numpy() if least else np.zeros(0, bool)


def _balance(store: FeatureStore, min_firings: int) -> Float[np.ndarray, "d_sae"]:
    fires = store.statistics.fires
    whole = fires.sum(1)
    return np.where(whole >= min_firings, fires.min(1) / np.maximum(whole, 1), np.nan)


def _two_sided(balance: Float[np.ndarray, "d_sae"]) -> float:
    known = balance[~np.isnan(balance)]
    return float((known >= TWO_SIDED).mean()) if len(known) else math.nan


@torch.no_grad()
def _find_antipodal(sae: SAE, known: Bool[np.ndarray, "d_sae"], seed: int) -> tuple[float, float]:
    """Shares of the features with an antipodal partner among them, and of as many random directions."""
    if not known.any():
        return math.nan, math.nan
    rows = sae.directions()[torch.from_numpy(known)]
    random = torch.randn(rows.shape, generator=torch.Generator().manual_seed(seed))
    return float(antipodal(rows).mean()), float(antipodal(random).mean())


def _show(store: FeatureStore, feature: int, balance: float, n_windows: int, seed: int) -> OpposedWindows:
    found = max_activating_examples(store, feature, n_top=n_windows, n_quantiles=0, n_near=0, n_random=0, seed=seed)
    sides = [found.group("top", side).examples for side in (1, -1)]
    n = int(store.statistics.fires[feature].sum())
    return OpposedWindows(feature=feature, balance=balance, n_firings=n, positive=sides[0], negative=sides[1])


def _percent(share: float) -> str:
    return "" if math.isnan(share) else f"{share:.1%}"

"""Dead, near-dead, dense and outlier features, with confidence intervals of their firing rates.

Likely causes of dead features are found by comparing their weights with those of the features that fire.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, Integer
from torch import Tensor

from saelab.collecting.harvesting import require_harvested
from saelab.sae.sae import SAE
from saelab.stores.feature_store import FeatureStore
from saelab.stores.results import Result, format_table

COLLAPSED = 0.1
"""Encoder norm as a share of the live features' median."""
ALIKE = 0.95
"""Decoder cosine to a live feature."""
FAR = 3.0
"""Robust deviations by which a bias lies below those of the live features."""
NEAR = 0.9
"""Share of the smallest code that fires."""
BLOCK = 1024
KINDS = ("dead", "near-dead", "live", "dense", "outlier")
NEAR_DEAD_RATE, DENSE_RATE = 1e-5, 0.1
"""Firing rates below which a feature is near-dead, and above which it is dense, as shares of tokens."""
OUTLIER = 5.0
"""Robust standard deviations of the logarithm of a norm."""


@torch.no_grad()
def find_causes(
    sae: SAE, store: FeatureStore, silent: Sequence[int], acts: Tensor | None = None
) -> dict[int, tuple[str, ...]]:
    """The likely causes of each dead feature, as a dictionary from feature to names of causes.

    - "encoder norm collapsed": ||W_enc|| is below a tenth of the live median.
    - "bias too low": b_enc (for learned thresholds, b_enc minus the threshold) is more than 3 robust deviations below
      the live median.
    - "duplicate of a live feature", "antipode of a live feature": the decoder cosine with a live feature is above 0.95
      or below -0.95.
    - "never near selection": on no row of `acts` does the pre-activation come within a tenth of the smallest code that
      fires.

    Args:
        sae: the SAE whose weights are compared.
        store: feature store harvested with the SAE; features that fire in it are live.
        silent: features to explain; they never count as live.
        acts: (n, d_in) activations in the units of the SAE's input, on which "never near selection" is tested; None
            leaves that test out.

    Returns:
        Only features with at least one cause; empty where no feature is live.
    """
    is_live = torch.from_numpy(store.statistics.fires.sum(1) > 0)
    is_live[list(silent)] = False
    live, features = is_live.nonzero().squeeze(1), torch.tensor(list(silent), dtype=torch.long)
    if len(features) == 0 or len(live) == 0:
        return {}
    norms, bias = sae.W_enc.detach().norm(dim=0).cpu(), _bias_of(sae)
    collapsed = norms[features] < COLLAPSED * norms[live].median()
    spread = float(1.4826 * (bias[live] - bias[live].median()).abs().median())
    low = bias[features] < bias[live].median() - FAR * max(spread, 1e-6)
    cosine = _nearest_cosine(sae.W_dec.detach().cpu(), features, live)
    reach = find_reach(sae, acts, features) if acts is not None else None
    found: dict[int, tuple[str, ...]] = {}
    for i, feature in enumerate(features.tolist()):
        causes = ["encoder norm collapsed"] * bool(collapsed[i]) + ["bias too low"] * bool(low[i])
        if abs(float(cosine[i])) > ALIKE:
            causes.append(f"{'duplicate' if cosine[i] > 0 else 'antipode'} of a live feature")
        if reach is not None and reach[i] < NEAR:
            causes.append("never near selection")
        found[feature] = tuple(causes)
    return {feature: causes for feature, causes in found.items() if causes}


@torch.no_grad()
def find_reach(
    sae: SAE, acts: Float[Tensor, "n d_in"], features: Int[Tensor, "n_features"]
) -> Float[Tensor, "n_features"]:
    """How near each feature's pre-activation comes to firing: its largest ratio to the smallest code that fires on the
    token.

    At 1 the feature would fire. Where codes are signed, absolute values of pre-activations count.
    """
    reach = torch.full((len(features),), -torch.inf)
    for x in acts.split(BLOCK):
        codes = sae.encode_sparse(x.to(sae.device))
        smallest = torch.full((len(x),), torch.inf, device=sae.device)
        smallest.scatter_reduce_(0, codes.rows, codes.values.abs(), "amin")
        u = sae.center(x) @ sae.W_enc[:, features] + sae.b_enc[features]
        shares = (u.abs() if sae.cfg.activation.signed else u) / smallest[:, None]
        reach = torch.maximum(reach, shares.amax(0).cpu())
    return reach


def _bias_of(sae: SAE) -> Tensor:
    """The encoder bias of each feature, less its threshold where thresholds are learned (signed: the bias's size)."""
    bias = sae.b_enc.detach().cpu()
    if sae.cfg.activation.threshold == "learned" and sae.threshold is not None:
        bias = (bias.abs() if sae.cfg.activation.signed else bias) - sae.threshold.detach().cpu()
    return bias


def _nearest_cosine(W_dec: Tensor, features: Tensor, live: Tensor) -> Tensor:
    """For each of `features`, the decoder cosine of largest size with a live feature, with its sign."""
    norms, found = W_dec.norm(dim=1, keepdim=True).clamp(min=1e-12), []
    for part in features.split(BLOCK):
        rows, best = W_dec[part] / norms[part], torch.zeros(len(part), dtype=W_dec.dtype)
        for others in live.split(BLOCK):  # never all of them at once
            cosines = rows @ (W_dec[others] / norms[others]).T
            largest = cosines.gather(1, cosines.abs().argmax(1, keepdim=True)).squeeze(1)
            best = torch.where(largest.abs() > best.abs(), largest, best)
        found.append(best)
    return torch.cat(found)


@dataclass(frozen=True, kw_only=True, eq=False)
class DeadFeatures(Result):
    """Every feature as dead, near-dead, dense, outlier or live, by its firing rate on the tokens of a store."""

    n_tokens: int
    kinds: tuple[str, ...]
    """for each feature "dead", "near-dead", "live", "dense" or "outlier", as `dead_features` defines them"""
    fires: Integer[np.ndarray, "d_sae"]
    """number of tokens on which each feature fires (z != 0, either sign)"""
    low: Float[np.ndarray, "d_sae"]
    """lower end of the firing rate's Clopper-Pearson interval"""
    high: Float[np.ndarray, "d_sae"]
    """upper end; for no firing in N tokens the one-sided limit, just below 3 / N"""
    confidence: float
    near_dead_rate: float
    dense_rate: float
    groups: dict[str, dict[str, int]]
    """features of each kind by prefix group; one group where there are no prefixes"""
    causes: dict[int, tuple[str, ...]]
    """likely causes for dead and near-dead features; empty without the SAE"""
    training: dict[str, int] | None
    """number of features dead both at the end of training and here, at the end of training only, and in the store only;
    None where training kept no count"""
    counted: str = "tokens"
    """what the rows of the store are: "tokens" or "documents\""""

    def of_kind(self, kind: str) -> list[int]:
        """Numbers of the features of one kind, such as "dead"; ValueError for an unknown kind."""
        if kind not in KINDS:
            raise ValueError(f"`kind` must be one of {list(KINDS)}, got '{kind}'.")
        return [i for i, mine in enumerate(self.kinds) if mine == kind]

    @property
    def rates(self) -> Float[np.ndarray, "d_sae"]:
        """Share of tokens on which each feature fires."""
        return self.fires / self.n_tokens

    def share(self, kind: str) -> float:
        """Share of the features that are of one kind, such as "dead"; ValueError for an unknown kind."""
        return len(self.of_kind(kind)) / len(self.kinds)

    def __str__(self) -> str:
        limit = _no_firing_limit(self.n_tokens, self.confidence)
        rows = f"{self.n_tokens:,} {self.counted}"
        lines = [f"{len(self.kinds):,} features on {rows}; no firing means a rate below {limit:.2g}"]
        lines.append(f"near-dead: below {self.near_dead_rate:g}; dense: above {self.dense_rate:g}")
        table = [[name, *(f"{counts.get(kind, 0):,}" for kind in KINDS)] for name, counts in self.groups.items()]
        lines += ["", *format_table([["features", *KINDS], *table])]
        why = Counter(cause for causes in self.causes.values() for cause in causes)
        causes = [[f"{n:,}", cause] for cause, n in why.most_common()]
        lines += ["", *format_table(causes, left=(1,))] if why else []
        if self.training is not None:
            agreement = ", ".join(f"{n} {where}" for where, n in self.training.items())
            lines += ["", f"dead at the end of training and here: {agreement}"]
        return "\n".join(lines)


def dead_features(
    store: FeatureStore,
    sae: SAE | None = None,
    acts: Float[Tensor, "n d_in"] | None = None,
    *,
    near_dead_rate: float = NEAR_DEAD_RATE,
    dense_rate: float = DENSE_RATE,
    confidence: float = 0.95,
    n_explained: int | None = None,
) -> DeadFeatures:
    """Every feature as dead, near-dead, dense, outlier or live, with an interval of its firing rate.

    The rate is r = #(z != 0) / N over the store's N tokens, both signs counted.

    - dead: r = 0.
    - near-dead: 0 < r < `near_dead_rate`.
    - dense: r > `dense_rate`.
    - outlier: otherwise live, but the log-norm of W_enc or W_dec is more than 5 robust standard deviations (1.4826 MAD)
      from the median; needs `sae`.
    - live: the rest.

    Intervals are Clopper-Pearson's. With `sae`, likely causes are given for dead and near-dead features: a small
    encoder norm, a low bias, a decoder direction that equals or opposes a live feature's, pre-activations that never
    come near selection. Where training counted dead features, its count is compared with the store's.

    Args:
        store: feature store with the codes of all features.
        sae: the SAE that the store was harvested with, for outliers and likely causes; None leaves both out.
        acts: (n, d_in) activations in the units of the SAE's input, on which the last of these causes is tested; None
            leaves that test out.
        near_dead_rate: firing rate below which a feature is near-dead, as a share of tokens.
        dense_rate: firing rate above which a feature is dense, as a share of tokens.
        confidence: level of the intervals, in (0, 1).
        n_explained: likely causes are given for the first so many dead and near-dead features, each of which is
            compared with all live ones; None is all.

    Raises:
        ValueError: not 0 <= `near_dead_rate` < `dense_rate` <= 1, `confidence` is not in (0, 1), or `sae` is not the
            SAE of the store.
    """
    if not 0 <= near_dead_rate < dense_rate <= 1 or not 0 < confidence < 1:
        raise ValueError(
            "Rates must satisfy 0 <= near_dead_rate < dense_rate <= 1 and confidence lie in (0, 1), got "
            f"{near_dead_rate}, {dense_rate} and {confidence}."
        )
    if sae is not None:
        require_harvested(store, sae)
    fires = store.statistics.fires.sum(1)
    kinds = find_kinds(store, sae, near_dead_rate, dense_rate)
    low, high = clopper_pearson(fires, len(store), confidence)
    silent = [i for i, kind in enumerate(kinds) if kind in KINDS[:2]]
    return DeadFeatures(
        n_tokens=len(store),
        kinds=kinds,
        fires=fires,
        low=low,
        high=high,
        confidence=confidence,
        near_dead_rate=near_dead_rate,
        dense_rate=dense_rate,
        groups=_by_group(kinds, store.manifest.sae["config"].get("prefixes")),
        causes=find_causes(sae, store, silent[:n_explained], acts) if sae is not None else {},
        training=_compare_with_training(store, kinds),
        counted=store.counted,
    )


def dead_feature_changes(results: Sequence[DeadFeatures]) -> list[dict[str, int]]:
    """Numbers of features that died, revived and stayed dead from each result to the next.

    The results are those of successive checkpoints of one SAE on one text; ValueError where their widths differ.
    """
    found = []
    for before, after in pairwise(results):
        if len(before.kinds) != len(after.kinds):
            raise ValueError(
                f"Checkpoints must be of one width, got {len(before.kinds)} and {len(after.kinds)} features."
            )
        then, now = set(before.of_kind("dead")), set(after.of_kind("dead"))
        found.append({"died": len(now - then), "revived": len(then - now), "stayed dead": len(now & then)})
    return found


def clopper_pearson(
    fires: Integer[np.ndarray, "n"], n_tokens: int, confidence: float
) -> tuple[Float[np.ndarray, "n"], Float[np.ndarray, "n"]]:
    """Exact (Clopper-Pearson) confidence limits of a rate with `fires` successes in `n_tokens` independent trials.

    Where there was no success the upper limit is one-sided, `1 - (1 - confidence)^(1 / N)`, just below 3 / N at 0.95.
    Tokens of a document depend on one another, so true intervals are wider.

    >>> low, high = clopper_pearson(np.array([0, 5]), 100, 0.95)
    >>> [round(float(x), 4) for x in (*low, *high)]
    [0.0, 0.0164, 0.0295, 0.1128]
    """
    from scipy.stats import beta

    tail = (1 - confidence) / 2
    low = np.where(fires > 0, beta.ppf(tail, np.maximum(fires, 1), n_tokens - fires + 1), 0.0)
    high = np.where(fires < n_tokens, beta.ppf(1 - tail, fires + 1, np.maximum(n_tokens - fires, 1)), 1.0)
    return low, np.where(fires == 0, _no_firing_limit(n_tokens, confidence), high)


def find_outliers(sae: SAE) -> Bool[np.ndarray, "d_sae"]:
    """Features whose W_enc or W_dec log-norm lies more than 5 robust standard deviations from the median."""
    found = np.zeros(sae.cfg.d_sae, bool)
    for norms in (sae.W_enc.norm(dim=0), sae.W_dec.norm(dim=1)):
        logs = norms.detach().clamp(min=1e-12).log().cpu().double().numpy()
        off = np.abs(logs - np.median(logs))
        found |= off > OUTLIER * max(1.4826 * float(np.median(off)), 1e-3)  # unit rows differ by rounding alone
    return found


def _no_firing_limit(n_tokens: int, confidence: float) -> float:
    return -math.expm1(math.log1p(-confidence) / n_tokens)


def find_kinds(
    store: FeatureStore,
    sae: SAE | None = None,
    near_dead_rate: float = NEAR_DEAD_RATE,
    dense_rate: float = DENSE_RATE,
) -> tuple[str, ...]:
    """The kind of each feature, one of `KINDS` as `dead_features` defines them.

    Args:
        store: feature store with the codes of all features.
        sae: the SAE of the store, for outliers; None finds none.
        near_dead_rate: firing rate below which a feature is near-dead, as a share of tokens.
        dense_rate: firing rate above which a feature is dense, as a share of tokens.
    """
    rates = store.statistics.fires.sum(1) / len(store)
    kinds = np.full(len(rates), "live", dtype=object)
    if sae is not None:
        kinds[find_outliers(sae)] = "outlier"
    kinds[rates > dense_rate] = "dense"
    kinds[rates < near_dead_rate] = "near-dead"
    kinds[rates == 0] = "dead"
    return tuple(kinds.tolist())


def _by_group(kinds: Sequence[str], prefixes: Any) -> dict[str, dict[str, int]]:
    ends = prefixes if isinstance(prefixes, list) else [len(kinds)]
    spans = list(zip([0, *ends], ends, strict=False))
    groups = {f"{start:,} to {end - 1:,}": dict(Counter(kinds[start:end])) for start, end in spans}
    return groups if len(spans) == 1 else groups | {"all": dict(Counter(kinds))}


def _compare_with_training(store: FeatureStore, kinds: Sequence[str]) -> dict[str, int] | None:
    training: Mapping[str, Any] = store.manifest.sae.get("training") or {}
    if "dead" not in training:
        return None
    then, now = set(training["dead"]), {i for i, kind in enumerate(kinds) if kind == "dead"}
    return {"both": len(then & now), "training only": len(then - now), "store only": len(now - then)}

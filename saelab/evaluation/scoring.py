"""Metrics and their intervals from sums by document, with reasons for those that are undefined."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from saelab.evaluation.bootstrap import DocumentSums, find_interval
from saelab.functional.metrics import ratio, read_scores

SMALLEST_KL = 1e-6  # below this a KL is the rounding of float32
RECOVERED = {"loss_recovered": "zero", "loss_recovered_mean": "mean"}


@dataclass(frozen=True, kw_only=True)
class Scores:
    """Metrics of the SAE by field of `Evaluation`, and of its baselines."""

    sae: dict[str, float]
    rivals: dict[str, dict[str, float]]
    """metrics of each baseline"""
    prefixes: dict[int, float]
    """FVU by prefix length"""
    intervals: dict[str, tuple[float, float]]
    """95 % intervals of the SAE's metrics"""
    reasons: dict[str, str]
    """why a metric is NaN"""


def score(sums: DocumentSums, rivals: Iterable[str], prefixes: Iterable[int], n_bootstrap: int, seed: int) -> Scores:
    """All metrics from the sums, with 95 % intervals of the SAE's.

    Args:
        sums: by document, from `measure`.
        rivals: names of the baselines.
        prefixes: prefix lengths whose FVU is reported.
        n_bootstrap: draws of documents; 0 for no intervals.
        seed: of the draws.
    """
    total = sums.total()
    sae = {name: float(value) for name, value in read_sae(total).items()}
    others = {rival: {name: float(v) for name, v in read_rival(total, rival).items()} for rival in rivals}
    draws, reasons = {}, {}
    if n_bootstrap and sums.n_documents >= 2:
        draws = read_sae(sums.resample(n_bootstrap, seed))
    elif n_bootstrap:
        reasons["intervals"] = f"The bootstrap draws documents and needs at least 2, got {sums.n_documents}."
    unsure = find_unsure(sae, draws)
    for numbers in (sae, *others.values()):
        numbers.update(dict.fromkeys(unsure, math.nan))
    return Scores(
        sae=sae,
        rivals=others,
        prefixes={n: float(ratio(total[f"prefix.{n}"], total["variance"])) for n in prefixes},
        intervals={name: find_interval(values) for name, values in draws.items() if not math.isnan(sae[name])},
        reasons=reasons | unsure | explain(sae, unsure),
    )


def read_sae(sums: dict[str, Float[Tensor, "*draws"]]) -> dict[str, Float[Tensor, "*draws"]]:
    """The SAE's metrics by field name, with the cross-entropies of the unmodified and the ablated model."""
    scores, n = read_rival(sums, "sae"), sums["n_predictions"]
    scores["ce_sae"] = scores.pop("ce")
    references = {"ce_clean": "ce_clean", "ce_zero": "zero.ce", "ce_mean": "mean.ce", "kl_zero": "zero.kl"}
    return scores | {field: ratio(sums[name], n) for field, name in references.items()}


def read_rival(sums: dict[str, Float[Tensor, "*draws"]], name: str) -> dict[str, Float[Tensor, "*draws"]]:
    """The metrics of one reconstruction, given its name in the sums."""
    own = {key.removeprefix(f"{name}."): values for key, values in sums.items() if key.startswith(f"{name}.")}
    ablated = {"ce_zero": sums["zero.ce"], "ce_mean": sums["mean.ce"], "kl_zero": sums["zero.kl"]}
    return read_scores(sums | ablated | own)


def find_unsure(sae: dict[str, float], draws: dict[str, Tensor]) -> dict[str, str]:
    """The ratios to an ablation's damage that are undefined because the damage is within noise, with the reasons."""
    unsure = {}
    for name, ablation in RECOVERED.items():
        damage = sae[f"ce_{ablation}"] - sae["ce_clean"]
        said = f"{ablation.capitalize()} ablation changes the cross-entropy by {damage:+.4g} nats"
        if damage <= 0:
            unsure[name] = f"{said}: it does not hurt, so there is no loss to recover."
        elif draws and (low := find_interval(draws[f"ce_{ablation}"] - draws["ce_clean"])[0]) <= 0:
            unsure[name] = f"{said}, within noise (95 % interval from {low:+.4g}); give more tokens."
    if sae["kl_zero"] <= SMALLEST_KL:
        unsure["kl_score"] = f"Zero ablation changes no prediction (KL {sae['kl_zero']:.2g} nats)."
    return unsure


def explain(sae: dict[str, float], known: dict[str, str]) -> dict[str, str]:
    """Reasons for the other metrics that are NaN."""
    causes = {
        "fvu": "The activations do not vary.",
        "explained_variance": "The activations do not vary.",
        "bias": "The reconstructions have nothing in common with the activations.",
    }
    if math.isnan(sae["ce_clean"]):
        predicted = [name for name in sae if name.startswith(("ce_", "kl", "loss_"))]
        causes |= dict.fromkeys(predicted, "No token kept has a next token to predict.")
    missing = [name for name, value in sae.items() if math.isnan(value) and name not in known]
    return {name: causes.get(name, "The reconstructions are not finite.") for name in missing}

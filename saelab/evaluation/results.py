"""`Evaluation`: result of `evaluate`, metrics with intervals and baselines."""

from dataclasses import dataclass
from typing import Any

from saelab.stores.results import Result, align_columns

ROWS = (
    "fvu", "explained_variance", "cosine", "bias", "l0", "dead_frac", "ce_clean", "ce_sae", "ce_zero", "ce_mean",
    "loss_recovered", "loss_recovered_mean", "kl", "kl_zero", "kl_score",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Evaluation(Result):
    """Metrics of an SAE's reconstructions, and of its language model with the reconstructions spliced in.

    For a transcoder, activations means its targets. Means are over the tokens that the mask keeps; cross-entropies
    (`ce_*`) and `kl*` are in nats a prediction. An undefined metric is NaN, and `reasons` explains why. The formulas
    are in `saelab.functional.metrics`.
    """

    fvu: float
    """fraction of variance unexplained; [0, inf), lower is better, 1 is the mean predictor"""
    explained_variance: float
    """1 - fvu"""
    cosine: float
    """mean cosine of activation and reconstruction; higher is better"""
    bias: float
    """relative reconstruction bias; 1 is none, below 1 shrinkage"""
    l0: float
    """latents that fire on a token, of either sign"""
    dead_frac: float
    """share of latents that fired on none of the `n_tokens` tokens"""
    ce_clean: float
    """cross-entropy of the unmodified model"""
    ce_sae: float
    """with the SAE's reconstructions spliced in"""
    ce_zero: float
    """with zeros spliced in"""
    ce_mean: float
    """with the mean activation spliced in"""
    loss_recovered: float
    """(ce_zero - ce_sae) / (ce_zero - ce_clean); 1 is perfect, 0 no better than zeros"""
    loss_recovered_mean: float
    """the same against mean ablation, the harder reference"""
    kl: float
    """KL(clean || with the SAE); lower is better"""
    kl_zero: float
    """KL(clean || with zeros)"""
    kl_score: float
    """1 - kl / kl_zero; 1 is perfect"""
    n_tokens: int
    """tokens measured and spliced"""
    n_predictions: int
    """next-token predictions that `ce_*` and `kl*` are means over"""
    n_documents: int
    """number of documents, which the intervals resample"""
    removed: dict[str, int]
    """tokens left out, by rule of the mask"""
    density_edges: list[float]
    """bins of the latents' firing density, in log10"""
    density_counts: list[int]
    """latents in each bin; those that never fired are in none"""
    prefixes: dict[int, float]
    """FVU by prefix, for an SAE that has prefixes"""
    intervals: dict[str, tuple[float, float]]
    """95 % intervals of the numbers above, from the document bootstrap"""
    baselines: dict[str, dict[str, float]]
    """the same metrics for the untrained SAE, a random dictionary and PCA, or a linear map for a transcoder; `ce`
    corresponds to the SAE's `ce_sae`"""
    reasons: dict[str, str]
    """why a number is NaN"""
    sae: str
    """the SAE in one line"""
    hook_point: str
    model: str
    text: str
    """source of the tokens"""
    mask: dict[str, Any]
    """rules of the mask"""
    provenance: dict[str, Any] | None
    """record of the activations that the SAE was trained on"""
    versions: dict[str, str]
    """of the libraries that computed the metrics"""
    hook_point_out: str | None = None
    """where a transcoder's reconstructions replace the activation; it reads at `hook_point`"""

    def __str__(self) -> str:
        removed = ", ".join(f"{rule} {n:,}" for rule, n in self.removed.items() if n)
        places = f"at {self.hook_point}"
        if self.hook_point_out is not None:
            places = f"from {self.hook_point} to {self.hook_point_out}"
        lines = [
            self.sae,
            f"Evaluated {places} of {self.model}.",
            f"{self.n_tokens:,} tokens, {self.n_documents:,} documents of {self.text} (left out: {removed or 'none'})",
            "",
        ]
        table = [["", "SAE", "95 % interval", *self.baselines], *map(self._row, ROWS)]
        lines += align_columns(table + [[f"fvu, first {n}", _number(fvu)] for n, fvu in self.prefixes.items()])
        bins = zip(self.density_edges, self.density_counts, strict=False)
        lines += ["", "latents by log10 density: " + "  ".join(f"{edge:g}:{n}" for edge, n in bins)]
        lines += [f"{name}: {reason}" for name, reason in self.reasons.items()]
        return "\n".join(lines)

    def _row(self, name: str) -> list[str]:
        interval = self.intervals.get(name)
        shown = f"{_number(interval[0])} .. {_number(interval[1])}" if interval else ""
        key = "ce" if name == "ce_sae" else name
        others = [_number(scores[key]) if key in scores else "" for scores in self.baselines.values()]
        return [name, _number(getattr(self, name)), shown, *others]


def _number(x: float) -> str:
    return f"{x:.4g}"

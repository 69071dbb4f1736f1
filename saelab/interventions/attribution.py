"""`attribute`: effect of each active feature at each token on a metric, by gradients, relevance or ablating it.

The result, `Attribution`, includes completeness and agreement with exact effects.
"""

from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from saelab.collecting.harvesting import require_harvested
from saelab.functional.codes import SparseCodes
from saelab.functional.indices import permute_within
from saelab.functional.statistics import correlation, rank_correlation
from saelab.interventions.edited_runs import EditedRuns
from saelab.interventions.interventions import TokenSelection
from saelab.interventions.prompt_metrics import Metric, Prompt, Texts, make_prompt_metric, read_one_text
from saelab.lm.hooks import capture
from saelab.lm.huggingface import AnyModel, as_model
from saelab.lm.relevance import RelevanceMethod, require_rules
from saelab.sae.sae import SAE
from saelab.stores.feature_store import FeatureStore
from saelab.stores.results import Result, format_table
from saelab.stores.validation import naming, read_json, refuse_unknown, require_object

N_SHUFFLES = 99
N_SHOWN = 10
NOTHING = 1e-5
"""Differences of the metric below this share of its size count as rounding."""
AttributionMethod = Literal["gradient", "integrated", "relp", "attnlrp", "exact"]
Baseline = Literal["zero", "mean"]
ERROR = -1  # in the place of a feature
N_STEPS, MOST_STEPS, TOLERANCE = 32, 1024, 0.005


@dataclass(frozen=True, kw_only=True)
class AttributionAgreement:
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
        """Sum of all effects, errors included, over `patched - clean`: 1 is complete.

        NaN where `patched` and `clean` are equal but for rounding.
        """
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
    def agreement(self) -> AttributionAgreement | None:
        """Correlations with exact effects; None where those were not requested."""
        return None if self.exact is None else _hold_against(self, self.exact)

    @classmethod
    def load(cls, path: str | Path) -> "Attribution":
        """The attribution that `save` wrote; FileNotFoundError, or ValueError for a file that holds something else."""
        with naming(path):
            plain = require_object(read_json(path), "An attribution")
            known = [one.name for one in fields(cls)]
            refuse_unknown(plain, [*known, *COMPUTED], "An attribution")
            if missing := sorted(set(known) - set(plain)):
                raise ValueError(f"An attribution must have every field, got none for `{missing[0]}`.")
            return cls(**{name: _read_field(name, plain[name]) for name in known})

    def to_dict(self) -> dict[str, Any]:
        """Every field, completeness and agreement, ready for JSON."""
        agreement = self.agreement
        measured = None if agreement is None else dict(vars(agreement))
        return super().to_dict() | {"completeness": self.completeness, "agreement": measured}

    def __str__(self) -> str:
        how = f"{self.method}, {self.n_steps} steps" if self.n_steps else self.method
        whole = f"{self.metric}: {self.clean:.4g} as it is, {self.patched:.4g} with codes and errors replaced"
        shares = f"features {self.effects.sum():+.4g}, errors {self.errors.sum():+.4g}"
        lines = [
            f"{whole} ({self.baseline}, {self.hook_point})",
            f"{how}: {len(self.effects):,} features at tokens; {shares}; completeness {self._format_completeness()}",
        ]
        if self.agreement is not None:
            lines.append(format_agreement(self.agreement))
        table = [
            [f"{effect:+.4f}", f"{code:+.3f}", str(feature), f"{position} {self.tokens[position]!r}"]
            for position, feature, code, effect in self.top()
        ]
        return "\n".join([*lines, *format_table([["effect", "code", "feature", "token"], *table], left=(3,))])

    def _format_completeness(self) -> str:
        share = self.completeness
        return f"{share:.4f}" if share == share else "unknown, since replacing all changes nothing"


COMPUTED = ("completeness", "agreement")
"""what a file has besides the fields"""
ARRAYS = {"positions": np.int64, "features": np.int64} | dict.fromkeys(
    ("codes", "sizes", "effects", "errors"), np.float32
)


def _read_field(name: str, value: Any) -> Any:
    """A field of an attribution from JSON; numbers that are not finite were written as null."""
    try:
        if name in ("clean", "patched"):
            return float("nan") if value is None else float(value)
        if name == "tokens":
            return tuple(map(str, value))
        if name in ARRAYS or (name == "exact" and value is not None):
            found = np.array(value, ARRAYS.get(name, np.float32))
            if found.ndim == 1:
                return found
            raise ValueError("it is no list of numbers")
    except (TypeError, ValueError) as error:
        raise ValueError(f"An attribution must have numbers in `{name}`, got something else ({error}).") from None
    return value


def format_agreement(agreement: AttributionAgreement) -> str:
    """The correlations with exact effects in one line of text.

    >>> null = {"shuffled": 0.0, "shuffled_95": 0.2, "top_shuffled": 0.1}
    >>> one = AttributionAgreement(pearson=1.0, spearman=0.9, top=0.7, size=0.5, size_estimate=0.9, n=70, **null)
    >>> format_agreement(one)[35:]
    'Spearman 0.900 (shuffled 0.000, 95 % below 0.200), 70% of the top 10 (shuffled 10%); by size 0.900, moved 0.500'
    """
    one = agreement
    shuffled = f"shuffled {one.shuffled:.3f}, 95 % below {one.shuffled_95:.3f}"
    signed = f"Pearson {one.pearson:.3f}, Spearman {one.spearman:.3f} ({shuffled})"
    top = f"{one.top:.0%} of the top {N_SHOWN} (shuffled {one.top_shuffled:.0%})"
    return f"with exact effects: {signed}, {top}; by size {one.size_estimate:.3f}, moved {one.size:.3f}"


def _hold_against(found: Attribution, exact: np.ndarray) -> AttributionAgreement:
    from scipy.stats import rankdata

    estimates = found.effects
    rng = np.random.default_rng(0)
    orders = [permute_within(found.positions, rng) for _ in range(N_SHUFFLES)]
    ranks, exact_ranks = rankdata(estimates), rankdata(exact)
    shuffled = [correlation(ranks[order], exact_ranks) for order in orders]
    return AttributionAgreement(
        pearson=correlation(estimates, exact),
        spearman=correlation(ranks, exact_ranks),
        shuffled=float(np.mean(shuffled)),
        shuffled_95=float(np.quantile(shuffled, 0.95)),
        top=_share_top(estimates, exact),
        top_shuffled=float(np.mean([_share_top(estimates[order], exact) for order in orders])),
        size=rank_correlation(found.sizes, np.abs(exact)),
        size_estimate=rank_correlation(np.abs(estimates), np.abs(exact)),
        n=len(exact),
    )


def _share_top(estimates: Float[np.ndarray, "n"], exact: Float[np.ndarray, "n"]) -> float:
    return float(np.isin(_largest(estimates), _largest(exact)).mean()) if len(exact) else float("nan")


def _largest(values: Float[np.ndarray, "n"], n: int = N_SHOWN) -> Int[np.ndarray, "m"]:
    return np.argsort(-np.abs(values), kind="stable")[:n]


def attribute(
    model: AnyModel,
    sae: SAE,
    prompt: Prompt,
    metric: Metric,
    *,
    method: AttributionMethod = "gradient",
    baseline: Baseline = "zero",
    counterfactual: Prompt | None = None,
    store: FeatureStore | None = None,
    where: TokenSelection = "all",
    n_steps: int | None = None,
    check: bool = False,
    hook_point: str | None = None,
    allow_mismatch: bool = False,
    progress: bool = True,
) -> Attribution:
    """The effect of each active feature at each token on a metric of the model's predictions.

        x = sum_i z_i d_i + b + e          the reconstruction error e of each token is a node of its own
        gradient      (z'_i - z_i) dm/dz_i                                       one forward and backward
        integrated    (z'_i - z_i) int_0^1 dm/dz_i da, at x + a (x' - x)         Gauss-Legendre, `n_steps` points
        relp, attnlrp (z'_i - z_i) d_i . c, c by propagation rules               one forward and backward
        exact         m(z_i replaced by z'_i alone) - m(z)                       one row of a forward a feature

    z' and e' are the replacing codes and errors. A negative effect means that replacing the feature lowers the metric.
    Integrated effects of all nodes add up to m(x') - m(x); `completeness` of the result is the ratio reached.

    "relp" and "attnlrp" put layer-wise relevance propagation in place of the model's gradient: norm scales are
    constants, act(h) is h times a constant, and products of two activations pass half each. "relp" takes attention
    patterns as constants, "attnlrp" passes half of the relevance through softmax. In a model without biases, x . c of
    "relp" adds up over tokens to a metric that is linear in the logits. Correlations with exact effects depend on the
    hook point and may be better or worse than the gradient's, ranks above all: measure with `check=True`. Sources:
    arXiv:2403.19647, arXiv:1703.01365, arXiv:2508.21258 (RelP), arXiv:2402.05602 (AttnLRP).

    Args:
        model: language model the SAE belongs to.
        sae: an SAE that reconstructs its own input (no transcoder).
        prompt: a text, which gets a BOS, or token ids.
        metric: a token or its id (its log-probability of coming next, in nats), a pair of tokens (logit of the first
            minus that of the second), "loss" (mean cross-entropy of the prompt's own next tokens, in nats), or a
            differentiable function from logits (batch, n, d_vocab) to numbers (batch,).
        method: "gradient" (one forward and backward), "integrated" (integrated gradients), "relp" or "attnlrp"
            (relevance propagation by the rules of `saelab.lm.relevance.propagating`) or "exact" (each feature replaced
            alone).
        baseline: "zero" replaces codes and errors by 0; "mean" replaces the codes of features that fire by their means
            over `store`, and errors by 0.
        counterfactual: a prompt of as many tokens whose codes and errors replace those of `prompt`; `baseline` is then
            not used.
        store: codes of the SAE on some text, for `baseline="mean"`.
        where: tokens whose features are attributed; special tokens are left out unless asked for.
        n_steps: Gauss-Legendre points of "integrated"; by default 32, doubled until the effects add up to within 0.5 %,
            at most 1024.
        check: measure the exact effects too; `agreement` of the result gives the correlations of the estimates with
            them.
        hook_point: where the SAE reads; by default where it was trained.
        allow_mismatch: go ahead with an SAE of another model, weight processing or hook point.
        progress: show a progress bar while exact effects are measured.

    Raises:
        ValueError: for an unknown method or baseline, a metric that does not give one number a row, prompts of unequal
            length, a transcoder, an SAE of another model, weight processing or hook point (unless `allow_mismatch`),
            "relp" at queries or keys, from which constant attention patterns pass nothing on, and rules for a model
            with autograd functions of its own.

    >>> model, sae = sl.lm.tiny_model(), sl.SAE(sl.SAEConfig(d_in=32, d_sae=64, activation=sl.TopK(k=4)))
    >>> found = attribute(model, sae, "Hello", "!", hook_point="blocks.1.hook_resid_post")
    >>> found.effects.shape, found.errors.shape
    ((20,), (6,))
    """
    model = as_model(model)
    _require(method, baseline, n_steps, sae)
    texts, outcome = read_one_text(model, prompt), make_prompt_metric(model, metric)
    runs = EditedRuns(model, texts, outcome)
    point = runs.match(sae, hook_point, allow_mismatch)
    scene = Scene(runs, point, capture(model, texts.ids, [point])[point][0].float())
    nodes = _find_nodes(scene, sae, where, _read_other(scene, counterfactual), _read_means(sae, baseline, store))
    clean, patched = scene.values(torch.stack([0 * scene.x, nodes.total(scene.x)])).tolist()
    n_taken = 0 if method != "integrated" else n_steps or N_STEPS
    rules = method if method == "relp" or method == "attnlrp" else None
    effects = scene.measure(nodes, progress) if method == "exact" else scene.estimate(nodes, n_taken, rules)
    while n_steps is None and 0 < n_taken < MOST_STEPS and _is_off(effects, clean, patched):
        n_taken *= 2
        effects = scene.estimate(nodes, n_taken)
    exact = scene.measure(nodes, progress) if check and method != "exact" else effects if check else None
    is_feature, errors = nodes.features != ERROR, torch.zeros(len(scene.x))
    errors[nodes.tokens[~is_feature]] = effects[~is_feature]
    return Attribution(
        hook_point=scene.hook_point,
        metric=outcome.name,
        method=method,
        baseline=baseline if counterfactual is None else "counterfactual",
        n_steps=n_taken,
        clean=clean,
        patched=patched,
        tokens=texts.strings(model),
        positions=nodes.tokens[is_feature].numpy(),
        features=nodes.features[is_feature].numpy(),
        codes=nodes.codes[is_feature].numpy(),
        sizes=nodes.vectors[is_feature].norm(dim=1).cpu().numpy(),
        effects=effects[is_feature].numpy(),
        errors=errors.numpy(),
        exact=None if exact is None else exact[is_feature].numpy(),
    )


def _is_off(effects: Float[Tensor, "n_nodes"], clean: float, patched: float) -> bool:
    """Whether the effects do not add up to `patched - clean`, where that is more than rounding."""
    rounding = NOTHING * max(abs(clean), abs(patched))
    return abs(float(effects.double().sum()) - (patched - clean)) > max(TOLERANCE * abs(patched - clean), rounding)


def _require(method: str, baseline: str, n_steps: int | None, sae: SAE) -> None:
    for name, value, choices in (("method", method, AttributionMethod), ("baseline", baseline, Baseline)):
        if value not in get_args(choices):
            raise ValueError(f"`{name}` must be one of {get_args(choices)}, got '{value}'.")
    if n_steps is not None and n_steps < 1:
        raise ValueError(f"`n_steps` must be at least 1, got {n_steps}.")
    require_autoencoder(sae)


def require_autoencoder(sae: SAE) -> None:
    """Raise ValueError for a transcoder, whose codes add up to activations of another place than they are read from."""
    if sae.cfg.d_out is not None:
        raise ValueError("`sae` must reconstruct what it reads, got a transcoder; use one trained on its own input.")


@dataclass(frozen=True, eq=False)
class _Nodes:
    """Nodes of the attribution: features at tokens, and the reconstruction error of each token."""

    tokens: Int[Tensor, "n_nodes"]
    features: Int[Tensor, "n_nodes"]
    """`ERROR` for an error"""
    codes: Float[Tensor, "n_nodes"]
    """z; 0 for an error"""
    vectors: Float[Tensor, "n_nodes d_in"]
    """change of its token's activation when the node is replaced"""

    def total(self, x: Float[Tensor, "n d_in"]) -> Float[Tensor, "n d_in"]:
        """x' - x, all nodes replaced."""
        return torch.zeros_like(x).index_add(0, self.tokens.to(x.device), self.vectors)

    def replace_each(
        self, x: Float[Tensor, "batch n d_in"], runs: Int[Tensor, "batch"]
    ) -> Float[Tensor, "batch n d_in"]:
        """Activations of each run with one node replaced, that of the run's index."""
        x[torch.arange(len(runs)), self.tokens[runs]] += self.vectors[runs.to(self.vectors.device)].to(x)
        return x


@dataclass(frozen=True, eq=False)
class Scene:
    """A prompt whose metric is attributed, and its activations at a hook point."""

    runs: EditedRuns
    """of the prompt, with the metric"""
    hook_point: str
    x: Float[Tensor, "n d_in"]
    """activations of the prompt"""

    def values(
        self, moves: Float[Tensor, "n_runs n d_in"], rules: RelevanceMethod | None = None
    ) -> Float[Tensor, "n_runs"]:
        """The metric with each of `moves` added to the activations; differentiable in `moves`, by rules if given."""
        edits = {self.hook_point: lambda x, runs: x.detach() + moves[runs.to(moves.device)].to(x.dtype)}
        return self.runs.run(edits, torch.zeros(len(moves), dtype=torch.long), grad=moves.requires_grad, rules=rules)

    def gradient(
        self, moves: Float[Tensor, "n_runs n d_in"], rules: RelevanceMethod | None = None
    ) -> Float[Tensor, "n_runs n d_in"]:
        """Gradient dm/dx of each run, or its propagation coefficients; the model's parameters get no gradients."""
        leaf = moves.detach().requires_grad_()
        with torch.enable_grad():
            value = self.values(leaf, rules).sum()
            if rules is not None and not value.requires_grad:
                raise ValueError(
                    f"`method='{rules}'` needs a hook point whose activations the metric depends on while attention "
                    f"patterns are constant, got '{self.hook_point}'; take 'attnlrp' or 'gradient' there."
                )
            if rules is not None:
                require_rules(value)
            return torch.autograd.grad(value, leaf)[0]

    def estimate(self, nodes: _Nodes, n_steps: int, rules: RelevanceMethod | None = None) -> Float[Tensor, "n_nodes"]:
        """Effects by the gradient at x (`n_steps` 0), or by its mean over `n_steps` points from x to x'."""
        total = nodes.total(self.x)
        points, weights = torch.zeros(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
        if n_steps:
            roots, halves = np.polynomial.legendre.leggauss(n_steps)
            points, weights = torch.from_numpy((roots + 1) / 2), torch.from_numpy(halves / 2)
        mean = torch.zeros_like(total, dtype=torch.float64)
        size = self.runs.batch_size
        for part, weight in zip(points.split(size), weights.split(size), strict=True):
            moves = total * part.to(total)[:, None, None]
            mean += torch.einsum("b,bnd->nd", weight.to(mean), self.gradient(moves, rules).double())
        return (nodes.vectors * mean[nodes.tokens.to(mean.device)]).sum(1).float().cpu()

    def measure(self, nodes: _Nodes, progress: bool) -> Float[Tensor, "n_nodes"]:
        """Exact effect of each node, replaced alone."""
        rows = torch.zeros(len(nodes.tokens), dtype=torch.long)
        found = self.runs.run({self.hook_point: nodes.replace_each}, rows, progress="exact" if progress else None)
        return found - self.values(0 * self.x[None])


def _read_other(scene: Scene, counterfactual: Prompt | None) -> Float[Tensor, "n d_in"] | None:
    """Activations of the counterfactual prompt."""
    if counterfactual is None:
        return None
    model = scene.runs.model
    texts = read_one_text(model, counterfactual, "counterfactual")
    require_aligned(scene.runs.texts, texts)
    return capture(model, texts.ids, [scene.hook_point])[scene.hook_point][0].float()


def require_aligned(texts: Texts, others: Texts) -> None:
    """Raise ValueError unless two prompts have the same number of tokens, as comparing them token by token needs."""
    if texts.ids.shape != others.ids.shape:
        raise ValueError(
            f"The two prompts must have equally many tokens, got {int(texts.lengths[0])} and {int(others.lengths[0])}; "
            "choose words of as many tokens, or give token ids."
        )


def _read_means(sae: SAE, baseline: Baseline, store: FeatureStore | None) -> Float[Tensor, "d_sae"]:
    """The codes that replace those of features that fire."""
    if baseline == "zero":
        return torch.zeros(sae.cfg.d_sae)
    if store is None:
        raise ValueError(f"`baseline='mean'` needs `store`, with the means of {sae.cfg.d_sae} features, got None.")
    require_harvested(store, sae)
    sums = store.statistics.sums
    return torch.from_numpy((sums[:, 0] - sums[:, 1]) / len(store)).float()


@torch.no_grad()
def _find_nodes(scene: Scene, sae: SAE, where: TokenSelection, other: Tensor | None, means: Tensor) -> _Nodes:
    """Features that fire at the tokens of a place, in either prompt, and the errors of these tokens."""
    keep = scene.runs.texts.select(scene.runs.model, where)[0].nonzero()[:, 0]
    x = scene.x[keep.to(scene.x.device)].to(sae.device)
    z = sae.encode(x)
    step = (torch.where(z != 0, means.to(z), 0) - z) * sae.output_scale(x)
    rest = sae.decode(z, x=x) - x  # without its error
    if other is not None:
        y = other[keep.to(other.device)].to(sae.device)
        step = sae.encode(y) * sae.output_scale(y) - z * sae.output_scale(x)
        rest = y - x - SparseCodes.from_dense(step).decode(sae.directions())
    rows, features = step.nonzero(as_tuple=True)
    vectors = step[rows, features, None] * sae.directions()[features]
    found = _Nodes(keep[rows.cpu()], features.cpu(), z[rows, features].cpu(), vectors.to(scene.x))
    return replace(
        found,
        tokens=torch.cat([found.tokens, keep]),
        features=torch.cat([found.features, torch.full_like(keep, ERROR)]),
        codes=torch.cat([found.codes, torch.zeros(len(keep))]),
        vectors=torch.cat([found.vectors, rest.to(scene.x)]),
    )

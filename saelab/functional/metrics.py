"""Metrics of reconstruction and next-token prediction, losses of SAE training, and curves of gain against cost.

With x the activations, x_hat their reconstructions, z the codes, sums over all tokens, mean(x) that of every dimension:

    fvu        sum ||x - x_hat||^2 / sum ||x - mean(x)||^2      [0, inf), lower is better; 1 is the mean predictor
    explained_variance   1 - fvu                                (-inf, 1], higher is better
    cosine     mean <x, x_hat> / (||x|| ||x_hat||)              [-1, 1], higher is better
    bias       sum ||x_hat||^2 / sum <x, x_hat>                 1 is none; < 1 shrinkage (arXiv:2404.16014, eq. 10)
    l0         mean #{i: z_i != 0}                              latents a token; signed codes count on both sides
    density_i  #{tokens: z_i != 0} / #tokens                    [0, 1]
    dead_frac  share of latents that never fired in the tokens seen; it means nothing without their number

Spliced into a language model, with ce the mean cross-entropy of the next token, p its predicted distribution, in nats:

    loss_recovered   (ce_ablated - ce) / (ce_ablated - ce_clean)    1 is perfect, 0 no better than the ablation
    kl               mean KL(p_clean || p)                          [0, inf), lower is better
    kl_score         1 - kl / kl_zero                               1 is perfect, 0 no better than zero ablation

Sums over batches are float64, so memory does not grow with the data. Losses of training are unitless and about 1 for a
dictionary that explains nothing.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from saelab.functional.codes import SparseCodes
from saelab.functional.triton_choice import add_residuals, subtract_parts

STEPS = 16  # between two strengths


class ReconstructionSums:
    """Reconstruction metrics from running sums: `add` batches, then read the properties.

    >>> sums = ReconstructionSums(2)
    >>> x = torch.tensor([[0.0, 1.0], [2.0, 1.0]])
    >>> sums.add(x, x.mean(0).expand(2, 2))
    >>> sums.fvu
    1.0
    """

    def __init__(self, d_in: int) -> None:
        self.n_tokens = 0
        self._shift: Tensor | None = None  # a first mean: keeps the variance exact under a large offset
        self._sum = torch.zeros(d_in, dtype=torch.float64)
        self._squares = self._error = self._hat_squares = self._inner = self._cosine = 0.0

    def add(self, x: Float[Tensor, "n_tokens d_in"], x_hat: Float[Tensor, "n_tokens d_in"]) -> None:
        """Add a batch of activations and their reconstructions."""
        if len(x) == 0:
            return
        x, x_hat = exact(x), exact(x_hat)
        if self._shift is None:
            self._shift = x.mean(0)
        centered = x - self._shift
        self._sum = self._sum.to(x.device) + centered.sum(0)
        self._squares += float(centered.square().sum())
        self._error += float((x - x_hat).square().sum())
        self._hat_squares += float(x_hat.square().sum())
        inner = (x * x_hat).sum(-1)
        self._inner += float(inner.sum())
        self._cosine += float((inner / (x.norm(dim=-1) * x_hat.norm(dim=-1)).clamp(min=1e-300)).sum())
        self.n_tokens += len(x)

    @property
    def variance(self) -> float:
        """`sum ||x - mean(x)||^2`, over all tokens."""
        return max(0.0, self._squares - float(self._sum.square().sum()) / max(1, self.n_tokens))

    @property
    def fvu(self) -> float:
        """Fraction of variance unexplained; NaN where the activations do not vary."""
        return _ratio(self._error, self.variance)

    @property
    def explained_variance(self) -> float:
        """`1 - fvu`."""
        return 1 - self.fvu

    @property
    def cosine(self) -> float:
        """Mean cosine between activation and reconstruction."""
        return _ratio(self._cosine, self.n_tokens)

    @property
    def bias(self) -> float:
        """Relative reconstruction bias, 1 for none; NaN where reconstructions are orthogonal to the activations."""
        return _ratio(self._hat_squares, self._inner)


class FiringSums:
    """L0, density and dead latents from running counts of firings by sign: `add` codes, then read the properties.

    >>> sums = FiringSums(3)
    >>> sums.add(SparseCodes.from_dense(torch.tensor([[0.0, -2.0, 1.0], [0.0, 3.0, 0.0]])))
    >>> sums.l0, sums.density.tolist(), sums.dead_frac == 1 / 3
    (1.5, [0.0, 1.0, 0.5], True)
    """

    def __init__(self, d_sae: int) -> None:
        self.n_tokens = 0
        self.positive = torch.zeros(d_sae, dtype=torch.int64)
        self.negative = torch.zeros(d_sae, dtype=torch.int64)

    def add(self, codes: SparseCodes) -> None:
        """Add a batch of codes."""
        self.positive += torch.bincount(codes.indices[codes.values > 0].cpu(), minlength=codes.d_sae)
        self.negative += torch.bincount(codes.indices[codes.values < 0].cpu(), minlength=codes.d_sae)
        self.n_tokens += len(codes)

    @property
    def firings(self) -> Int[Tensor, "d_sae"]:
        """Number of tokens on which each latent fired, with either sign."""
        return self.positive + self.negative

    @property
    def l0(self) -> float:
        """Mean number of latents that fire on a token."""
        return _ratio(float(self.firings.sum()), self.n_tokens)

    @property
    def density(self) -> Float[Tensor, "d_sae"]:
        """Share of tokens on which each latent fires."""
        return self.firings.double() / max(1, self.n_tokens)

    @property
    def dead_frac(self) -> float:
        """Share of latents that fired on none of the tokens added."""
        return float((self.firings == 0).double().mean())


def token_terms(
    x: Float[Tensor, "n_tokens d_in"], x_hat: Float[Tensor, "n_tokens d_in"]
) -> dict[str, Float[Tensor, "n_tokens"]]:
    """Per-token terms of the sums that `read_scores` divides, in float64.

    >>> token_terms(torch.ones(1, 2), torch.zeros(1, 2))["error"]
    tensor([2.], dtype=torch.float64)
    """
    x, x_hat = exact(x), exact(x_hat)
    inner = (x * x_hat).sum(-1)
    return {
        "error": (x - x_hat).square().sum(-1),
        "hat_squares": x_hat.square().sum(-1),
        "inner": inner,
        "cosine": inner / (x.norm(dim=-1) * x_hat.norm(dim=-1)).clamp(min=1e-300),
    }


def read_scores(sums: Mapping[str, Float[Tensor, "*draws"]]) -> dict[str, Float[Tensor, "*draws"]]:
    """The metrics that are ratios of sums over tokens, by name; for one set of sums or many bootstrap draws at once.

    A metric whose denominator is 0 is NaN, and so is a loss recovered where ablation does not hurt.

    Args:
        sums: over tokens, those of `token_terms`, `variance`, `n_tokens` and `firings`; over predictions,
            `n_predictions`, `ce`, `ce_clean`, `ce_zero`, `ce_mean`, `kl` and `kl_zero`.
    """
    n_tokens, n_predictions = sums["n_tokens"], sums["n_predictions"]
    fvu = ratio(sums["error"], sums["variance"])
    return {
        "fvu": fvu,
        "explained_variance": 1 - fvu,
        "cosine": ratio(sums["cosine"], n_tokens),
        "bias": ratio(sums["hat_squares"], sums["inner"]),
        "l0": ratio(sums["firings"], n_tokens),
        "ce": ratio(sums["ce"], n_predictions),
        "loss_recovered": loss_recovered(sums["ce"], sums["ce_clean"], sums["ce_zero"]),
        "loss_recovered_mean": loss_recovered(sums["ce"], sums["ce_clean"], sums["ce_mean"]),
        "kl": ratio(sums["kl"], n_predictions),
        "kl_score": 1 - ratio(sums["kl"], sums["kl_zero"]),
    }


def loss_recovered(
    ce: Float[Tensor, "*draws"], ce_clean: Float[Tensor, "*draws"], ce_ablated: Float[Tensor, "*draws"]
) -> Float[Tensor, "*draws"]:
    """`(ce_ablated - ce) / (ce_ablated - ce_clean)`; NaN where ablation does not raise the loss.

    >>> loss_recovered(torch.tensor([2.0, 2.0]), torch.tensor([1.0, 5.0]), torch.tensor([5.0, 4.0]))
    tensor([0.7500,    nan])
    """
    gap = ce_ablated - ce_clean
    return torch.where(gap > 0, ratio(ce_ablated - ce, gap), torch.nan)


def kl_divergence(logits: Float[Tensor, "n d_vocab"], other: Float[Tensor, "n d_vocab"]) -> Float[Tensor, "n"]:
    """`KL(p || q) = sum_v p_v (log p_v - log q_v)` of p = softmax(logits), q = softmax(other), in nats; 0 when equal.

    >>> kl_divergence(torch.tensor([[0.0, 200.0]]), torch.tensor([[200.0, 0.0]]))
    tensor([200.])
    """
    log_p, log_q = (x.float().log_softmax(-1) for x in (logits, other))
    p = log_p.exp()
    return (p * (log_p - log_q)).masked_fill_(p == 0, 0).sum(-1)  # a logit of -inf in both gives 0, not NaN


def log_histogram(density: Float[Tensor, "d_sae"], n_tokens: int) -> tuple[list[float], list[int]]:
    """Bin edges in log10, half a decade apart from 1 / n_tokens to 1, and the number of latents in each bin.

    Latents of density 0 are in no bin.

    >>> log_histogram(torch.tensor([0.0, 0.01, 0.5, 1.0]), n_tokens=100)
    ([-2.0, -1.5, -1.0, -0.5, 0.0], [1, 0, 0, 2])
    """
    n_bins = max(1, math.ceil(2 * math.log10(max(1, n_tokens)) - 1e-9))
    edges = [-n_bins / 2 + i / 2 for i in range(n_bins + 1)]
    values = density[density > 0].double().log10().clamp(min=edges[0]).cpu()
    counts = torch.histogram(values, torch.tensor(edges, dtype=torch.float64)).hist
    return edges, [int(count) for count in counts]


def effective_rank(spectrum: Float[Tensor, "n"]) -> float:
    """Effective number of directions in a spectrum: `exp(-sum p log p)`, p the spectrum over its sum; 1 to n (flat).

    >>> effective_rank(torch.tensor([2.0, 2.0, 0.0]))
    2.0
    """
    shares = spectrum.double().clamp(min=0)
    shares = shares / shares.sum().clamp(min=torch.finfo(torch.float64).tiny)
    return round(float(torch.special.entr(shares).sum().exp()), 9)


def exact(x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """The same numbers in float64; on the CPU where the device has no float64."""
    return x.detach().cpu().double() if x.device.type == "mps" else x.detach().double()


def ratio(part: Float[Tensor, "*draws"], whole: Float[Tensor, "*draws"]) -> Float[Tensor, "*draws"]:
    """`part / whole`, NaN where the whole is 0."""
    return torch.where(whole == 0, torch.nan, part / whole)


def _ratio(part: float, whole: float | int) -> float:
    return part / whole if whole else math.nan


class _NestedError(torch.autograd.Function):
    """Squared errors of cumulative reconstructions; one buffer of residuals serves forward and backward."""

    @staticmethod
    def forward(ctx: Any, target: Tensor, parts: Tensor) -> tuple[Tensor, Tensor]:
        residuals = torch.empty_like(parts)
        errors = subtract_parts(target, parts, residuals)
        ctx.save_for_backward(residuals)
        last = residuals[-1]
        ctx.mark_non_differentiable(last)
        return errors, last

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor, Tensor]:
        (residuals,) = ctx.saved_tensors
        grad_parts = add_residuals(residuals, grad)
        return -grad_parts[0], grad_parts


_nested_error: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] = _NestedError.apply


def nested_error(
    target: Float[Tensor, "n_rows d_in"], parts: Float[Tensor, "n_groups n_rows d_in"]
) -> tuple[Float[Tensor, "n_groups"], Float[Tensor, "n_rows d_in"]]:
    """Squared error of every prefix, `||target - sum_{h <= g} parts[h]||^2`, and the residual of the last, detached.

    Source: the Matryoshka loss of arXiv:2503.17547, groups accumulated so that all prefixes cost one decode.

    >>> nested_error(torch.ones(1, 2), torch.ones(2, 1, 2))[0].round()
    tensor([0., 2.])
    """
    return _nested_error(target, parts)


def normalized_error(estimate: Float[Tensor, "n_rows d_in"], target: Float[Tensor, "n_rows d_in"]) -> Float[Tensor, ""]:
    """`sum ||estimate - target||^2 / sum ||target - mean(target)||^2`, 0 where the target does not vary.

    In [0, inf), lower is better. The scale of the AuxK loss (arXiv:2406.04093, A.2); the caller detaches the target.

    >>> normalized_error(torch.zeros(2, 1), torch.tensor([[1.0], [-1.0]]))
    tensor(1.)
    """
    variance = (target - target.mean(0)).square().sum()
    error = (estimate - target).square().sum()
    return error / variance if variance > 0 else error * 0


def find_frontier(gain: Float[np.ndarray, "n"], cost: Float[np.ndarray, "n"]) -> Int[np.ndarray, "m"]:
    """Indices of the Pareto-optimal points, which no other beats in gain at no higher cost, by increasing cost.

    The first of equal points counts; NaN is left out.

    >>> find_frontier(np.array([1.0, 3.0, 2.0]), np.array([0.1, 0.2, 0.3])).tolist()
    [0, 1]
    """
    order = np.lexsort((np.arange(len(gain)), -gain, cost))
    order = order[~np.isnan(gain[order] + cost[order])]
    best = np.maximum.accumulate(np.concatenate([[-np.inf], gain[order]]))
    return np.asarray(order[gain[order] > best[:-1]])


def read_gain(
    gain: Float[np.ndarray, "n n_draws"], cost: Float[np.ndarray, "n n_draws"], at: float
) -> Float[np.ndarray, "n_draws"]:
    """The gain where a curve first reaches a cost, interpolated; NaN where it does not.

    Points are in order of increasing strength; the curve starts at gain 0 and cost 0. Between points the gain is linear
    in the square root of the cost, since for small strengths a KL grows with the square of the strength.

    >>> read_gain(np.array([[1.0], [2.0]]), np.array([[0.01], [0.04]]), 0.01)
    array([1.])
    """
    gain, root = _from_origin(gain, cost)
    return _meet(root, gain, float(np.sqrt(at)))


def read_cost(
    gain: Float[np.ndarray, "n n_draws"], cost: Float[np.ndarray, "n n_draws"], at: float
) -> Float[np.ndarray, "n_draws"]:
    """The cost at which a curve first reaches a gain, interpolated as in `read_gain`; NaN where it does not.

    >>> read_cost(np.array([[1.0], [2.0]]), np.array([[0.01], [0.04]]), 1.5).round(6)
    array([0.0225])
    """
    gain, root = _from_origin(gain, cost)
    return _meet(gain, root, at) ** 2


def mean_gain(
    gain: Float[np.ndarray, "n n_draws"],
    cost: Float[np.ndarray, "n n_draws"],
    limit: float,
    judged: Float[np.ndarray, "n n_draws"] | None = None,
) -> Float[np.ndarray, "n_draws"]:
    """The mean, over budgets from 0 to `limit`, of the best gain within the budget.

    That is the area under the frontier over its width. The best gain within a budget is the largest of the points on
    the curve (see `read_gain`) that cost no more; at least 0, the gain of no steering.

    Args:
        gain: by strength, the weakest first, and draw; the best point of each budget is chosen by it.
        cost: of the same points.
        limit: the largest budget.
        judged: gains of the same points on other prompts, which are averaged in place of `gain`. The largest of several
            gains is above 0 by chance alone; the gain of the same point on other prompts is not.

    >>> mean_gain(np.array([[1.0]]), np.array([[0.0]]), 1.0)
    array([1.])
    """
    judged = gain if judged is None else judged
    (gain, root), (judged, _) = _from_origin(gain, cost), _from_origin(judged, cost)
    places = np.linspace(0, len(gain) - 1, STEPS * (len(gain) - 1) + 1)
    gain, judged, cost = _between(gain, places), _between(judged, places), _between(root, places) ** 2
    order = np.argsort(cost, axis=0, kind="stable")
    gain, judged, ends = (np.take_along_axis(one, order, 0) for one in (gain, judged, cost.clip(max=limit)))
    best = np.maximum.accumulate(gain.clip(min=0), axis=0)
    is_new = np.diff(best, axis=0, prepend=0.0) > 0
    last = np.maximum.accumulate(is_new * np.arange(len(gain))[:, None], axis=0)  # row 0 is that of doing nothing
    chosen = np.where(best > 0, np.take_along_axis(judged, last, 0), 0.0)
    widths = np.diff(ends, axis=0, append=np.full_like(ends[:1], limit))
    return np.asarray((chosen * widths).sum(0) / limit)


def _from_origin(gain: np.ndarray, cost: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Gains with the unsteered model first, and square roots of the costs."""
    zero = np.zeros_like(gain[:1])
    return np.concatenate([zero, gain]), np.sqrt(np.concatenate([zero, np.maximum(cost, 0)]))


def _meet(x: np.ndarray, y: np.ndarray, at: float) -> np.ndarray:
    """y, interpolated, where a line through points first has x >= at."""
    beyond = x >= at
    after = beyond.argmax(0)
    before = np.maximum(after - 1, 0)
    (x0, x1), (y0, y1) = ([np.take_along_axis(z, i[None], 0)[0] for i in (before, after)] for z in (x, y))
    share = np.divide(at - x0, x1 - x0, out=np.zeros_like(x0), where=x1 > x0)
    return np.where(beyond.any(0), y0 + share * (y1 - y0), np.nan)


def _between(values: np.ndarray, places: np.ndarray) -> np.ndarray:
    """Values interpolated at fractional row numbers."""
    low = np.minimum(places.astype(int), len(values) - 2)
    share = (places - low)[:, None]
    return np.asarray(values[low] * (1 - share) + values[low + 1] * share)

"""Progressive coding: reconstruction quality when only the most important features of an SAE are kept."""

import math
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from saelab.analysis.feature_similarity import spread_evenly
from saelab.evaluation.splicing import Stage
from saelab.functional.metrics import ReconstructionSums, exact
from saelab.functional.statistics import similarity_ranks
from saelab.lm.hooks import batches_of, forward_size
from saelab.lm.huggingface import AnyModel, as_model
from saelab.lm.masks import TokenMask
from saelab.lm.tokens import Tokens
from saelab.sae.compatibility import match_model, require_threshold
from saelab.sae.sae import SAE
from saelab.stores.results import Result, find_row, format_table

WINDOW = (0.02, 0.5)
"""Ranks that the power law is fitted to, as shares of the features that ever fire."""
N_COMPARED = 2000
CONSTANT = 1e-7  # differences within an activation up to this share of its largest number are rounding


@dataclass(frozen=True, kw_only=True)
class PrunedScore:
    """Quality of a dictionary when only the first `size` features of an order are kept."""

    order: str
    """energy: by E[z^2] ||d||^2; frequency: by firing rate; random; prefix: by index, for Matryoshka sizes"""
    size: int
    fvu: float
    """fraction of variance unexplained; lower is better"""
    l0: float
    """mean number of codes left per token; pruning removes some that were selected"""
    ce: float
    """the model's loss with the pruned reconstruction in place of the activations, nats per token; lower is better"""
    loss_recovered: float
    """(ce_zero - ce) / (ce_zero - ce_clean); NaN where zero ablation does no harm"""
    rsa: float = math.nan
    """representational similarity: Spearman's correlation of the similarities of pairs of tokens (Pearson's r of their
    activations) with those of their reconstructions; 1 keeps their order. NaN where not compared, or where a
    reconstruction is constant"""


@dataclass(frozen=True, kw_only=True)
class PruningCurve(Result):
    """Reconstruction quality by dictionary size; importance and quality are measured on different documents."""

    rows: tuple[PrunedScore, ...]
    exponent: float
    """a of the fit importance ~ rank^-a"""
    r2: float
    """R^2 of that fit in logarithms, over ranks 2 % to 50 % of the features that fire"""
    ce_clean: float
    ce_zero: float
    n_tokens: int
    """tokens on which quality was measured"""
    n_tokens_ranked: int
    """tokens on which importance was measured"""
    n_compared: int = 0
    """tokens of which every two were compared for `rsa`"""

    def get(self, order: str, size: int) -> PrunedScore:
        """The row of a given order and size; KeyError where there is none."""
        return find_row(self.rows, order=order, size=size)

    def __str__(self) -> str:
        lines = [
            f"importance ~ rank^-{self.exponent:.2f} (R^2 {self.r2:.3f}) on {self.n_tokens_ranked:,} tokens;"
            f" quality on {self.n_tokens:,} others, loss {self.ce_clean:.3f}, with zeros {self.ce_zero:.3f}",
        ]
        table = [["order", "size", "FVU", "L0", "loss", "recovered", "RSA"]]
        for row in self.rows:
            scores = [f"{row.fvu:.4f}", f"{row.l0:.2f}", f"{row.ce:.3f}", f"{row.loss_recovered:.4f}", f"{row.rsa:.3f}"]
            table.append([row.order, f"{row.size:,}", *scores])
        return "\n".join([*lines, *format_table(table)])


@torch.no_grad()
def prune_dictionary(
    sae: SAE,
    model: AnyModel,
    tokens: Tokens,
    sizes: tuple[int, ...] | None = None,
    *,
    hook_point: str | tuple[str, str] | None = None,
    mask: TokenMask | None = None,
    batch_size: int | None = None,
    n_compared: int = N_COMPARED,
    seed: int = 0,
    allow_mismatch: bool = False,
) -> PruningCurve:
    """Reconstruction quality when only the codes of the `sizes` most important features are kept (arXiv:2505.00190).

    Activations are encoded once with the whole dictionary. Importance is E[z_i^2] ||d_i||^2, measured on the first half
    of the rows; quality is measured on the other half. The same sizes are also cut by firing rate, in random order and,
    for fixed Matryoshka prefixes, by index.

    Args:
        sae: the SAE to prune.
        model: the language model that it was trained on.
        tokens: two or more rows of text; the first half ranks the features, the rest measures quality.
        sizes: numbers of features kept, each in 1..d_sae; None takes the Matryoshka prefixes, or d_sae divided by 16,
            8, 4, 2 and 1.
        hook_point: where the reconstruction replaces the activations, or (input, target) for a transcoder; None takes
            the SAE's own.
        mask: tokens that are measured and replaced; None takes the mask that the SAE was trained with.
        batch_size: sequences per forward pass; None takes as many as hold about 4096 tokens.
        n_compared: tokens whose similarities are compared with those of their reconstructions, evenly spaced over the
            text; at most 2 leave `rsa` out.
        seed: seed of the random order.
        allow_mismatch: True accepts another model, weight processing or hook point than those of training.

    Raises:
        ValueError: a size is outside 1..d_sae, there are fewer than two rows, or as in `evaluate`.
    """
    model = as_model(model)
    require_threshold(sae)
    sizes = sizes or _default_sizes(sae)
    if len(tokens) < 2 or not all(1 <= size <= sae.cfg.d_sae for size in sizes):
        raise ValueError(
            f"`sizes` must be in 1..{sae.cfg.d_sae} and `tokens` two rows or more, got {sizes} and {len(tokens)} rows."
        )
    place = match_model(sae, model, hook_point, mask, allow_mismatch)
    stage = Stage.at(model, sae, place)
    n_seq = forward_size(tokens, batch_size)
    stage, half = stage.calibrated(tokens, n_seq), len(tokens) // 2
    energy, fires, n_ranked = _rank(sae, stage, tokens[:half], n_seq)
    orders = _orders(sae, energy, fires, seed)
    cuts = list(_cuts(orders, sizes))
    return _measure(sae, stage, tokens[half:], n_seq, cuts, *fit_power_law(energy), n_ranked, n_compared)


def fit_power_law(importance: Float[Tensor, "d_sae"]) -> tuple[float, float]:
    """Exponent a and R^2 of the fit `log I = c - a log rank`, over ranks 2 % to 50 % of the importances above 0.

    Both are NaN where too few are left.

    >>> a, r2 = fit_power_law(torch.arange(1, 1001).double() ** -1.5)
    >>> round(a, 6), round(r2, 6)
    (1.5, 1.0)
    """
    values = importance[importance > 0].double().sort(descending=True).values
    first, last = (math.ceil(share * len(values)) for share in WINDOW)
    if last - first < 3:
        return math.nan, math.nan
    x = torch.arange(first, last, dtype=torch.float64).add(1).log()
    y = values[first:last].log()
    x, y = x - x.mean(), y - y.mean()
    slope = (x * y).sum() / x.square().sum()
    residual = (y - slope * x).square().sum()
    return float(-slope), float(1 - residual / y.square().sum()) if y.square().sum() > 0 else math.nan


def _default_sizes(sae: SAE) -> tuple[int, ...]:
    if isinstance(sae.cfg.prefixes, tuple):
        return sae.cfg.prefixes
    return tuple(sorted({max(1, sae.cfg.d_sae // part) for part in (16, 8, 4, 2, 1)}))


def _rank(sae: SAE, stage: Stage, tokens: Tokens, n_seq: int) -> tuple[Tensor, Tensor, int]:
    """Energy and number of firings of every feature."""
    energy, fires = (torch.zeros(sae.cfg.d_sae, dtype=torch.float64) for _ in range(2))
    n_tokens = 0
    for batch in batches_of(tokens, n_seq):
        x, _, _ = stage.read(batch)
        codes = sae.encode_sparse(x.to(sae.device))
        indices, values = codes.indices.cpu(), codes.values.cpu().double()
        energy.index_add_(0, indices, values.square())
        fires += torch.bincount(indices, minlength=sae.cfg.d_sae)
        n_tokens += len(x)
    return energy * sae.W_dec.square().sum(1).cpu().double() / max(1, n_tokens), fires, n_tokens


def _orders(sae: SAE, energy: Tensor, fires: Tensor, seed: int) -> dict[str, Int[Tensor, "d_sae"]]:
    """The features in each order, most important first."""
    drawn = torch.randperm(sae.cfg.d_sae, generator=torch.Generator().manual_seed(seed))
    orders = {"energy": energy.argsort(descending=True, stable=True)}
    orders |= {"frequency": fires.argsort(descending=True, stable=True), "random": drawn}
    if sae.cfg.prefixes is not None:
        orders["prefix"] = torch.arange(sae.cfg.d_sae)
    return orders


def _cuts(orders: dict[str, Tensor], sizes: tuple[int, ...]) -> Iterator[tuple[str, int, Bool[Tensor, "d_sae"]]]:
    for order, ranked in orders.items():
        for size in sizes:
            kept = torch.zeros(len(ranked), dtype=torch.bool)
            kept[ranked[:size]] = True
            yield order, size, kept


def _measure(
    sae: SAE,
    stage: Stage,
    tokens: Tokens,
    n_seq: int,
    cuts: list[tuple[str, int, Tensor]],
    exponent: float,
    r2: float,
    n_ranked: int,
    n_compared: int,
) -> PruningCurve:
    sums = [ReconstructionSums(sae.cfg.d_target) for _ in cuts]
    compared: dict[int | None, list[Tensor]] = defaultdict(list)  # activations, and reconstructions by cut
    n_each = -(-n_compared * n_seq // len(tokens))
    losses: dict[Any, float] = defaultdict(float)  # summed over predictions
    n_predictions = 0
    n_codes = [0] * len(cuts)
    for batch in batches_of(tokens, n_seq):
        clean = stage.run(batch)
        x, y = clean.rows, clean.targets
        codes = sae.encode_sparse(x.to(sae.device))
        losses["clean"] += _sum(clean.losses(clean.logits))
        losses["zero"] += _sum(clean.splice(torch.zeros_like(y))["ce"])
        n_predictions += int(clean.predicts.sum())
        some = torch.from_numpy(spread_evenly(len(y), n_each)).to(y.device)
        compared[None].append(y[some])
        for i, (_, _, kept) in enumerate(cuts):
            part = codes.select(kept.to(sae.device))
            y_hat = sae.decode(part, x=x.to(sae.device)).to(y)
            sums[i].add(y, y_hat)
            compared[i].append(y_hat[some])
            n_codes[i] += part.indices.numel()
            losses[i] += _sum(clean.splice(y_hat)["ce"])
    ce = {name: total / n_predictions if n_predictions else math.nan for name, total in losses.items()}
    harm, n = ce["zero"] - ce["clean"], sums[0].n_tokens
    likeness, rows = _rank_pairs(compared[None], n_compared), []
    for i, (order, size, _) in enumerate(cuts):
        recovered = (ce["zero"] - ce[i]) / harm if harm > 0 else math.nan
        l0 = n_codes[i] / max(1, n)
        rsa = math.nan if likeness is None else _correlate(likeness, _rank_pairs(compared[i], n_compared))
        scores = {"fvu": sums[i].fvu, "l0": l0, "ce": ce[i], "loss_recovered": recovered, "rsa": rsa}
        rows.append(PrunedScore(order=order, size=size, **scores))
    return PruningCurve(
        rows=tuple(rows),
        exponent=exponent,
        r2=r2,
        ce_clean=ce["clean"],
        ce_zero=ce["zero"],
        n_tokens=n,
        n_tokens_ranked=n_ranked,
        n_compared=0 if likeness is None else len(likeness),
    )


def _rank_pairs(parts: list[Tensor], n_compared: int) -> Float[np.ndarray, "n n"] | None:
    """Ranks of the similarities of every two tokens; None where there are fewer than 3, or one is constant."""
    x = exact(torch.cat(parts)).cpu().numpy()
    x = x[spread_evenly(len(x), n_compared)]
    constant = np.ptp(x, axis=1) <= CONSTANT * np.abs(x).max(1) if len(x) else np.zeros(0, bool)
    return None if len(x) < 3 or constant.any() else similarity_ranks(x)


def _correlate(likeness: Float[np.ndarray, "n n"], other: Float[np.ndarray, "n n"] | None) -> float:
    return math.nan if other is None or not other.any() else float(np.vdot(likeness, other)) / 2


def _sum(losses: Tensor) -> float:
    return float(losses.double().sum())

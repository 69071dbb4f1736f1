"""`meta_sae` and `description_length`: how far the rows of a dictionary, and its codes, can be compressed."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from saelab.evaluation.feature_classifiers import encode_csr
from saelab.functional.metrics import ReconstructionSums
from saelab.lm.hooks import require_finite
from saelab.sae.activation_functions import BatchTopK
from saelab.sae.config import SAEConfig
from saelab.sae.fitting import measure
from saelab.sae.initialization import make_untrained
from saelab.sae.sae import SAE, fit
from saelab.stores.activations import Activations
from saelab.stores.results import Result, format_table
from saelab.training.config import TrainConfig

if TYPE_CHECKING:
    from scipy.sparse import csr_matrix

BINS = (4, 6, 8, 12, 16, 32)
TOLERANCE = 0.01  # of the squared error, that quantized codes may add
UNTRAINED_TOKENS = 16_384


@dataclass(frozen=True, kw_only=True)
class MetaSAE(Result):
    """Result of `meta_sae`: how much of the rows a few shared parts explain, with two kinds of rows that share none."""

    explained_variance: float
    """1 - FVU of the unit rows by the meta-SAE; lower means rows of their own, higher rows made of shared parts"""
    random: float
    """the same for as many random directions"""
    gaussian: float
    """the same for random directions with the covariance of the rows: above it, rows share more than a subspace"""
    l0: float
    """meta-latents a row"""
    dead_frac: float
    """share of meta-latents in no row"""
    n_rows: int
    n_latents: int
    """meta-latents"""
    k: int
    seed: int

    def __str__(self) -> str:
        head = f"{self.n_rows:,} rows by {self.n_latents:,} meta-latents, {self.l0:.2f} a row, seed {self.seed}"
        values = (self.explained_variance, self.gaussian, self.random)
        names = ("rows", "random rows of their covariance", "random rows")
        table = [["explained variance", ""], *([name, f"{v:.3f}"] for name, v in zip(names, values, strict=True))]
        return "\n".join([head, *format_table(table)])


def meta_sae(
    sae: SAE,
    *,
    n_latents: int | None = None,
    k: int = 4,
    n_steps: int = 1500,
    batch_size: int = 1024,
    lr: float | None = None,
    seed: int = 0,
    progress: bool = True,
) -> MetaSAE:
    """Share of the variance of an SAE's unit decoder rows that a BatchTopK SAE on these rows explains.

    A feature that is a combination of others is explained by what they share, an atomic one is not. That is also true
    of directions in a small subspace, so random directions with the rows' covariance are measured beside them. Source:
    arXiv:2502.04878; there 55 % for BatchTopK, and 42 % for Matryoshka in arXiv:2503.17547.

    Args:
        sae: the SAE.
        n_latents: meta-latents; None is a quarter of the SAE's latents.
        k: meta-latents a row, on average.
        n_steps: training steps.
        batch_size: rows a step, at most all of them.
        lr: learning rate; None is that of `TrainConfig`.
        seed: of weights, batches and random directions.
        progress: whether to show a progress bar.

    Raises:
        ValueError: for a number of latents that is not above k.

    >>> sae = sl.SAE(sl.SAEConfig(d_in=8, d_sae=64, activation=sl.TopK(k=4)), seed=0)
    >>> meta_sae(sae, n_steps=4, progress=False).n_latents
    16
    """
    rows = sae.W_dec.detach().float().cpu()
    rows = rows / rows.norm(dim=1, keepdim=True).clamp(min=1e-12)
    n_latents = max(1, len(rows) // 4) if n_latents is None else n_latents
    if not 0 < k < n_latents:
        raise ValueError(f"`n_latents` must be above k ({k}), got {n_latents}; lower `k`, or give a wider SAE.")
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(rows.shape, generator=generator)
    centered = rows - rows.mean(0)
    variances, axes = torch.linalg.eigh(centered.T @ centered / len(rows))
    like = rows.mean(0) + drawn * variances.clamp(min=0).sqrt() @ axes.T
    sources = [each / each.norm(dim=1, keepdim=True) for each in (rows, drawn, like)]
    cfg = SAEConfig(d_in=rows.shape[1], d_sae=n_latents, activation=BatchTopK(k=k))
    batch_size = min(batch_size, len(rows))
    run = TrainConfig(n_tokens=n_steps * batch_size, batch_size=batch_size, lr=lr, seed=seed, n_held_out=0)
    found = []
    for each in sources:
        made = fit([SAE(cfg, seed=seed + 1)], Activations.from_tensor(each), run, progress=progress)[0]
        found.append(measure(made, each))
    return MetaSAE(
        explained_variance=1 - found[0]["fvu"],
        random=1 - found[1]["fvu"],
        gaussian=1 - found[2]["fvu"],
        l0=found[0]["l0"],
        dead_frac=found[0]["dead_frac"],
        n_rows=len(rows),
        n_latents=n_latents,
        k=k,
        seed=seed,
    )


@dataclass(frozen=True, kw_only=True)
class DescriptionLength(Result):
    """Result of `description_length`: bits that the quantized codes of a token take, and the error they leave."""

    bits: float
    """`bits_indices + bits_values`, a token; lower is better at equal `fvu`"""
    bits_indices: float
    """which features fire: sum of `H(p_i)`, p_i the density"""
    bits_values: float
    """how strongly: sum of `p_i H(bin of z_i, where it fires)`"""
    n_bins: int
    """bins of each feature's codes"""
    error: float
    """squared error with quantized codes over that with the codes as they are, less 1"""
    reason: str
    """why `error` is above the tolerance; empty where it is not"""
    fvu: float
    """with quantized codes"""
    l0: float
    n_tokens: int
    baselines: "dict[str, DescriptionLength]" = field(default_factory=dict)

    def __str__(self) -> str:
        table = [["", "bits a token", "which", "how strongly", "bins", "fvu", "l0"]]
        for name, one in {"SAE": self, **self.baselines}.items():
            bits = [f"{value:.2f}" for value in (one.bits, one.bits_indices, one.bits_values)]
            table.append([name, *bits, str(one.n_bins), f"{one.fvu:.4f}", f"{one.l0:.2f}"])
        reasons = [f"{name}: {one.reason}" for name, one in {"SAE": self, **self.baselines}.items() if one.reason]
        return "\n".join([f"Description length of {self.n_tokens:,} tokens", *format_table(table), *reasons])

    def to_dict(self) -> dict[str, Any]:
        """Every field by name, ready for JSON."""
        return super().to_dict() | {"baselines": {name: one.to_dict() for name, one in self.baselines.items()}}


def description_length(
    sae: SAE,
    acts: Float[Tensor, "n_tokens d_in"],
    *,
    bins: Sequence[int] = BINS,
    tolerance: float = TOLERANCE,
    seed: int = 0,
    baselines: bool | Mapping[str, SAE] = True,
) -> DescriptionLength:
    """Bits a token that an SAE's codes take when each feature is coded by itself, at nearly the same error.

        sum over features i of H(p_i) + p_i H(bin of z_i | z_i != 0)

    p_i is the density and H the entropy in bits; codes are rounded to the centers of equal bins between a feature's
    smallest and largest nonzero code. The number of bins is the smallest of `bins` that adds at most `tolerance` to the
    squared error. Only lengths at equal error compare: look at `fvu`. Source: arXiv:2410.11179.

    Args:
        sae: the SAE.
        acts: activations of the tokens.
        bins: numbers of bins to try.
        tolerance: share of the squared error that rounding may add.
        seed: of the untrained SAE.
        baselines: whether to measure an untrained SAE of as many codes a token as well; further SAEs by name.

    Raises:
        ValueError: for a transcoder, an SAE whose features have no fixed directions, and no bins.

    >>> sae = sl.SAE(sl.SAEConfig(d_in=8, d_sae=16, activation=sl.TopK(k=1)), seed=0)
    >>> x = torch.randn(200, 8, generator=torch.Generator().manual_seed(0))
    >>> 0 < description_length(sae, x, baselines=False).bits_indices < 16
    True
    """
    if not bins or min(bins) < 1:
        raise ValueError(f"`bins` must be numbers from 1 on, got {tuple(bins)}.")
    others: dict[str, SAE] = {}
    if baselines is not False:
        others["untrained"] = make_untrained(sae, acts[:UNTRAINED_TOKENS].float(), seed=seed)
        others |= {} if baselines is True else dict(baselines)
    measured = {name: _measure(each, acts, sorted(bins), tolerance, {}) for name, each in others.items()}
    return _measure(sae, acts, sorted(bins), tolerance, measured)


def _measure(
    sae: SAE, acts: Tensor, bins: Sequence[int], tolerance: float, baselines: dict[str, DescriptionLength]
) -> DescriptionLength:
    if sae.cfg.d_out is not None or isinstance(sae.output_scale(acts[:1].to(sae.device)), Tensor):
        raise ValueError(f"An SAE must rebuild its activations by the same vectors at every token, got {sae!r}.")
    if not len(acts):
        raise ValueError("`acts` must hold tokens, got none.")
    require_finite("acts", acts)
    codes = encode_csr(sae, acts)
    rows = sae.directions().float().cpu().numpy()
    with torch.no_grad():
        offset = sae.decode(torch.zeros(1, sae.cfg.d_sae, device=sae.device))[0].float().cpu().numpy()
    x = acts.float().cpu()

    def rebuild(values: np.ndarray) -> ReconstructionSums:
        sums, z = ReconstructionSums(x.shape[1]), codes.copy()
        z.data = values.astype(np.float32)
        sums.add(x, torch.from_numpy(np.asarray(z @ rows + offset)))
        return sums

    plain, rounded, n_bins, error = rebuild(codes.data).fvu, math.nan, bins[-1], math.nan
    for n_bins in bins:
        places, centers = quantize(codes, n_bins)
        rounded = rebuild(centers).fvu
        error = rounded / plain - 1 if plain > 0 else math.nan
        if error <= tolerance:
            break
    which, strength = count_bits(codes, places, n_bins)
    return DescriptionLength(
        bits=which + strength,
        bits_indices=which,
        bits_values=strength,
        n_bins=n_bins,
        error=error,
        reason=_explain(plain, error, bins[-1], tolerance),
        fvu=rounded,
        l0=codes.nnz / codes.shape[0],
        n_tokens=codes.shape[0],
        baselines=baselines,
    )


def quantize(codes: "csr_matrix", n_bins: int) -> tuple[Int[np.ndarray, "nnz"], Float[np.ndarray, "nnz"]]:
    """The bin of each nonzero code, between the smallest and the largest of its feature, and the center of the bin."""
    low, high = np.full(codes.shape[1], np.inf), np.full(codes.shape[1], -np.inf)
    np.minimum.at(low, codes.indices, codes.data)
    np.maximum.at(high, codes.indices, codes.data)
    low, width = low[codes.indices], (high - low)[codes.indices] / n_bins
    places = np.minimum((codes.data - low) / np.where(width > 0, width, 1), n_bins - 1).astype(np.int64)
    return places, low + (places + 0.5) * width


def count_bits(codes: "csr_matrix", places: Int[np.ndarray, "nnz"], n_bins: int) -> tuple[float, float]:
    """Bits a token for which features fire and for the bins of their codes, from empirical frequencies."""
    n = codes.shape[0]
    table = np.bincount(codes.indices.astype(np.int64) * n_bins + places, minlength=codes.shape[1] * n_bins)
    table = table.reshape(-1, n_bins)
    fires = table.sum(1)
    which = _plogp(fires / n).sum() + _plogp(1 - fires / n).sum()
    within = (_plogp(table / np.maximum(fires, 1)[:, None]).sum(1) * fires / n).sum()
    return float(which), float(within)


def _plogp(p: np.ndarray) -> np.ndarray:
    return np.asarray(-p * np.log2(np.where(p > 0, p, 1.0)))


def _explain(plain: float, error: float, most: int, tolerance: float) -> str:
    """Why the error that rounding adds is above the tolerance, or ''."""
    if math.isnan(plain):
        return "the activations do not vary"
    if plain == 0:
        return "the codes rebuild the activations without error, of which rounding could add a share"
    return "" if error <= tolerance else f"no number of bins up to {most} adds at most {tolerance:g}"

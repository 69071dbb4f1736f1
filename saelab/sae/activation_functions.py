"""Activation functions of SAEs: TopK, BatchTopK, GroupMax, Sparsemax, ReLU, JumpReLU and variants."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from difflib import get_close_matches
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from saelab.functional.activation_functions import (
    jumprelu,
    keep_above,
    keep_batch_topk,
    keep_group_max,
    keep_places,
    keep_topk,
    sparsemax,
    step_above,
)
from saelab.functional.codes import SparseCodes
from saelab.functional.row_topk import topk_latents
from saelab.functional.threshold_search import search_above
from saelab.functional.topk import (
    batch_topk_entries,
    group_max_latents,
    pick_topk,
    search_batch_topk,
    search_group_max,
    search_topk,
)
from saelab.sae.activation_registry import ACTIVATIONS, Activation, Competition, register_activation
from saelab.stores.validation import read_fields, require_object

MIN_THRESHOLD = 1e-4  # lower bound of learned thresholds
SPARSE_FRAC = 0.05  # of the pre-activations: with more than this needed, a dense training step is faster


def make_activation(name: str, **settings: Any) -> Activation:
    """Instance of a registered activation; an unknown name or setting raises ValueError with similar ones.

    >>> make_activation("abstopk", k=16)
    AbsTopK(k=16)
    """
    return _find_kind(name, settings)(**settings)


def read_activation(plain: Any) -> Activation:
    """Activation from its `to_dict` form in a file; ValueError for anything else."""
    settings = dict(require_object(plain, "`activation`"))
    name = settings.pop("name", None)
    if not isinstance(name, str):
        raise ValueError(f"`activation` must have a name, got {str(name)[:40]!r}. Was it edited?")
    return read_fields(_find_kind(name, settings), settings)


def _find_kind(name: str, settings: Mapping[str, Any]) -> "type[Activation]":
    if name not in ACTIVATIONS:
        near = get_close_matches(name, ACTIVATIONS, n=5) or sorted(ACTIVATIONS)[:5]
        raise ValueError(f"`activation` must be a registered name, got '{name[:80]}'. Did you mean one of {near}?")
    known = {field.name for field in fields(ACTIVATIONS[name])}
    if unknown := sorted(set(settings) - known):
        raise ValueError(f"Activation '{name}' takes {sorted(known)}, got {unknown[:5]}; remove or rename them.")
    return ACTIVATIONS[name]


@register_activation("topk")
@dataclass(frozen=True)
class TopK(Activation):
    """Keeps the positive ones among each token's k largest pre-activations (arXiv:2406.04093)."""

    competition: ClassVar[Competition] = "token"
    transcoder_lr_scale: ClassVar[float] = 4.0

    k: int = 32
    """latents kept per token"""

    def __call__(self, u: Tensor, threshold: Tensor | None = None, training: bool = False) -> Tensor:
        return keep_topk(u, self.k, self.signed)

    def code(self, u: Tensor, x: Tensor, W: Tensor, bias: Tensor, threshold: Tensor | None) -> Tensor:
        """Codes of each row's k largest pre-activations; of equal ones the latent with the lower index is kept."""
        return keep_places(u, topk_latents(u, x, W, bias, self.k, self.signed), self.signed)

    def search(
        self, x: Tensor, W: Tensor, bias: Tensor, threshold: Tensor | None, training: bool
    ) -> SparseCodes | None:
        """Sparse codes of each row's k largest pre-activations; None where the dense computation is faster."""
        return search_topk(x, W, bias, self.k, self.signed)

    def pick(self, x: Tensor, W: Tensor, bias: Tensor, threshold: Tensor | None, latents: Tensor) -> Tensor:
        """(n_rows, n_latents) codes of the given latents, from only as much of the encoder as ranking them takes."""
        return pick_topk(x, W, bias, latents, self.k, self.signed)


@register_activation("abstopk")
@dataclass(frozen=True)
class AbsTopK(TopK):
    """Keeps each token's k largest pre-activations by magnitude, with their signs (arXiv:2510.00404)."""

    signed: ClassVar[bool] = True
    transcoder_lr_scale: ClassVar[float] = 1.0


@register_activation("batchtopk")
@dataclass(frozen=True)
class BatchTopK(Activation):
    """Keeps the k * n_tokens largest pre-activations of a training batch; uses a fixed threshold afterward
    (arXiv:2412.06410).

    The threshold is the running mean of each batch's smallest kept magnitude, so that in inference a token's codes do
    not depend on its batch.
    """

    competition: ClassVar[Competition] = "batch"
    threshold: ClassVar[Literal["none", "running", "learned"]] = "running"
    transcoder_lr_scale: ClassVar[float] = 4.0

    k: int = 32
    """latents kept per token, on average"""

    def __call__(self, u: Tensor, threshold: Tensor | None = None, training: bool = False) -> Tensor:
        if training or threshold is None or bool(threshold.isnan()):
            return keep_batch_topk(u, self.k, self.signed)
        return keep_above(u, threshold, self.signed)

    def code(self, u: Tensor, x: Tensor, W: Tensor, bias: Tensor, threshold: Tensor | None) -> Tensor:
        """Codes above the threshold, or the batch's k * n_rows largest where training has not set a threshold yet."""
        if threshold is not None and not bool(threshold.isnan()):
            return self(u, threshold)
        kept = torch.zeros_like(u, dtype=torch.bool)
        kept[batch_topk_entries(u, x, W, bias, self.k * len(u), self.signed)] = True
        return (u if self.signed else u.relu()) * kept

    def search(
        self, x: Tensor, W: Tensor, bias: Tensor, threshold: Tensor | None, training: bool
    ) -> SparseCodes | None:
        """Sparse codes above the threshold, or of the batch's k * n_rows largest pre-activations in training; None
        where dense is faster.
        """
        if training or threshold is None or bool(threshold.isnan()):
            return search_batch_topk(x, W, bias, self.k, self.signed)
        return search_above(x, W, bias, threshold, self.signed)

    def pick(self, x: Tensor, W: Tensor, bias: Tensor, threshold: Tensor | None, latents: Tensor) -> Tensor | None:
        """(n_rows, n_latents) codes of the given latents above the threshold; None without a threshold, as then all
        latents compete.
        """
        if threshold is None or bool(threshold.isnan()):
            return None
        return self(_score(x, W, bias, latents), threshold)


@register_activation("batchabstopk")
@dataclass(frozen=True)
class BatchAbsTopK(BatchTopK):
    """BatchTopK by magnitude, keeping signs: the largest |u| of the batch in training, |u| > threshold afterward."""

    signed: ClassVar[bool] = True
    transcoder_lr_scale: ClassVar[float] = 1.0


@register_activation("groupmax")
@dataclass(frozen=True)
class GroupMax(Activation):
    """Keeps the largest pre-activation of each of k groups of adjacent latents, where it is positive (sparsify's
    groupmax).
    """

    competition: ClassVar[Competition] = "group"
    transcoder_lr_scale: ClassVar[float] = 4.0

    k: int = 32
    """number of groups, and so the maximum number of latents kept per token; must divide d_sae"""

    def __call__(self, u: Tensor, threshold: Tensor | None = None, training: bool = False) -> Tensor:
        return keep_group_max(u, self.k)

    def code(self, u: Tensor, x: Tensor, W: Tensor, bias: Tensor, threshold: Tensor | None) -> Tensor:
        """Codes of each group's largest pre-activation; of equal ones the latent with the lower index is kept."""
        return keep_places(u, group_max_latents(u, x, W, bias, self.k), False)

    def search(self, x: Tensor, W: Tensor, bias: Tensor, threshold: Tensor | None, training: bool) -> SparseCodes:
        """Sparse codes of each group's largest pre-activation."""
        return search_group_max(x, W, bias, self.k)

    def check(self, d_sae: int) -> None:
        """Raise ValueError for a k that is out of range or does not divide the number of latents."""
        super().check(d_sae)
        if d_sae % self.k:
            raise ValueError(f"`k` of GroupMax must divide d_sae ({d_sae}) into equal groups, got {self.k}.")


@register_activation("sparsemax")
@dataclass(frozen=True)
class Sparsemax(Activation):
    """Sparsemax of a token's pre-activations in units of the largest, s sparsemax(u / s) with s = scale max(u)
    (arXiv:1602.02068).

    Codes are max(u - t, 0) with a threshold t of the token's own, so that their sum is s: how many latents fire is
    neither fixed as in TopK nor penalized as in ReLU. Sparsemax as it is has sum 1 whatever the token; measured by the
    largest pre-activation, twice the input has twice the codes and as many. Training steps are dense.

    >>> sl.SAE(sl.SAEConfig(d_in=8, d_sae=32, activation=Sparsemax(scale=1.0))).encode(torch.eye(8)).shape
    torch.Size([8, 32])
    """

    scale: float = 2.0
    """sum of a token's codes over its largest pre-activation; more is less sparse"""

    def __post_init__(self) -> None:
        if not 0 < self.scale < float("inf"):
            raise ValueError(f"`scale` must be above 0 and finite, got {self.scale}.")

    def __call__(self, u: Tensor, threshold: Tensor | None = None, training: bool = False) -> Tensor:
        return sparsemax(u, self.scale)


@dataclass(frozen=True)
class _Penalized(Activation):
    """Activation trained with a sparsity penalty, whose weight is fixed or controlled to reach a target L0."""

    target_l0: float = 32.0
    """mean number of active latents per token that the penalty's weight is controlled to reach, where `coefficient` is
    None
    """
    coefficient: float | None = None
    """fixed weight of the penalty; None adapts it to reach `target_l0`"""

    def check(self, d_sae: int) -> None:
        """Raise ValueError for a target L0 that is out of range."""
        if not 0 < self.target_l0 <= d_sae:
            raise ValueError(f"`target_l0` must be in (0, d_sae ({d_sae})], got {self.target_l0}.")


@register_activation("relu")
@dataclass(frozen=True)
class ReLU(_Penalized):
    """max(u, 0) with an L1 penalty, sum_i |z_i|."""

    competition: ClassVar[Competition] = "none"
    lr_scale: ClassVar[float] = 2.0
    transcoder_lr_scale: ClassVar[float] = 4.0

    def __call__(self, u: Tensor, threshold: Tensor | None = None, training: bool = False) -> Tensor:
        return u.relu()

    def search(
        self, x: Tensor, W: Tensor, bias: Tensor, threshold: Tensor | None, training: bool
    ) -> SparseCodes | None:
        """Sparse codes of the positive pre-activations; None where so many are positive that dense is faster.

        In training, where a gradient is needed, dense is faster at lower L0.
        """
        return search_above(x, W, bias, bias.new_zeros(()), False, SPARSE_FRAC if training else 1.0)

    def pick(self, x: Tensor, W: Tensor, bias: Tensor, threshold: Tensor | None, latents: Tensor) -> Tensor:
        """(n_rows, n_latents) codes of the given latents."""
        return self(_score(x, W, bias, latents))

    def penalty(self, u: Tensor, z: Tensor, threshold: Tensor | None) -> Tensor:
        """L1: the codes themselves."""
        return z


@register_activation("log1prelu")
@dataclass(frozen=True)
class Log1pReLU(ReLU):
    """log(1 + max(u, 0)) with an L1 penalty: ReLU whose large codes are compressed, as in sparse retrieval
    (arXiv:2107.05720).

    Codes saturate: a latent that dominates a token counts little more than one that fires strongly, in the penalty
    and in the gradient, 1 / (1 + u), which goes to the encoder. They are not homogeneous, so that rows of W_dec cannot
    be rescaled into W_enc.

    >>> Log1pReLU()(torch.tensor([-1.0, 0.0, 1.0])).tolist() == [0.0, 0.0, torch.tensor(1.0).log1p().item()]
    True
    """

    competition: ClassVar[Competition] = "none"

    def __call__(self, u: Tensor, threshold: Tensor | None = None, training: bool = False) -> Tensor:
        return u.relu().log1p()

    # the same latents fire as in ReLU, whose pre-activations `fire` turns into codes
    search, pick = ReLU.search, ReLU.pick

    def fire(self, u: Tensor, threshold: Tensor | None) -> Tensor:
        """Codes of the given pre-activations."""
        return self(u)


@register_activation("jumprelu")
@dataclass(frozen=True)
class JumpReLU(_Penalized):
    """u where u exceeds a learned threshold, else 0, with an L0 penalty and straight-through gradients
    (arXiv:2407.14435).
    """

    competition: ClassVar[Competition] = "none"
    threshold: ClassVar[Literal["none", "running", "learned"]] = "learned"

    bandwidth: float = 0.1
    """width of the window around the threshold in which the straight-through gradient is non-zero, in units of u"""
    start: float = 0.1
    """threshold at the start of training, in units of u"""

    def __call__(self, u: Tensor, threshold: Tensor | None = None, training: bool = False) -> Tensor:
        assert threshold is not None
        return jumprelu(u, threshold, self.bandwidth, self.signed)

    def search(
        self, x: Tensor, W: Tensor, bias: Tensor, threshold: Tensor | None, training: bool
    ) -> SparseCodes | None:
        """Pre-activations above their threshold; in training also those up to `bandwidth / 2` below it.

        Those carry a gradient to the threshold; `fire` sets their codes to 0.
        """
        assert threshold is not None
        if not training:
            return search_above(x, W, bias, threshold, self.signed)
        # a pre-activation just below its threshold has code 0, but a gradient to the threshold
        return search_above(x, W, bias, threshold - self.bandwidth / 2, self.signed, SPARSE_FRAC)

    def pick(self, x: Tensor, W: Tensor, bias: Tensor, threshold: Tensor | None, latents: Tensor) -> Tensor:
        """(n_rows, n_latents) codes of the given latents."""
        assert threshold is not None
        return self(_score(x, W, bias, latents), threshold[latents])

    def fire(self, u: Tensor, threshold: Tensor | None) -> Tensor:
        """Codes of the given pre-activations: u above the threshold, else 0."""
        assert threshold is not None
        return jumprelu(u, threshold, self.bandwidth, self.signed)

    def penalty(self, u: Tensor, z: Tensor, threshold: Tensor | None) -> Tensor:
        """L0: 1 above the threshold, else 0, with a straight-through gradient to the threshold."""
        assert threshold is not None
        return step_above(u, threshold, self.bandwidth, self.signed)

    def initial_threshold(self, d_sae: int) -> Tensor:
        """(d_sae,) thresholds, all equal to `start`."""
        return torch.full((d_sae,), self.start)


@register_activation("absjumprelu")
@dataclass(frozen=True)
class AbsJumpReLU(JumpReLU):
    """u where |u| exceeds a learned threshold, else 0: JumpReLU by magnitude, keeping signs."""

    signed: ClassVar[bool] = True


@register_activation("gated")
@dataclass(frozen=True)
class Gated(_Penalized):
    """max(u, 0) where a gate is open, else 0 (arXiv:2404.16014): in inference a JumpReLU.

    With u = x W_enc + b_enc a latent's gate has the pre-activation `pi = exp(-r_mag) x W_enc + b_gate`, where W_enc,
    r_mag and b_gate are learned. It is open where pi > 0, which is where u exceeds the threshold `b_enc - exp(r_mag)
    b_gate`, kept positive in training. The penalty is L1 of the gates, sum_i max(pi_i, 0), so that it does not shrink
    codes; a `GateReconstructionLoss` joins the objective.
    """

    competition: ClassVar[Competition] = "none"
    lr_scale: ClassVar[float] = 2.0
    threshold: ClassVar[Literal["none", "running", "learned"]] = "learned"
    gated: ClassVar[bool] = True

    def __call__(self, u: Tensor, threshold: Tensor | None = None, training: bool = False) -> Tensor:
        assert threshold is not None
        return keep_above(u, threshold, False)

    def search(
        self, x: Tensor, W: Tensor, bias: Tensor, threshold: Tensor | None, training: bool
    ) -> SparseCodes | None:
        """Pre-activations above their threshold, whose gates are open; None in training where so many are that dense is
        faster.
        """
        assert threshold is not None
        return search_above(x, W, bias, threshold, False, SPARSE_FRAC if training else 1.0)

    def pick(self, x: Tensor, W: Tensor, bias: Tensor, threshold: Tensor | None, latents: Tensor) -> Tensor:
        """(n_rows, n_latents) codes of the given latents."""
        assert threshold is not None
        return self(_score(x, W, bias, latents), threshold[latents])

    @property
    def penalized(self) -> bool:
        """Whether it has a sparsity penalty: it has that of its gate, which the SAE computes."""
        return True

    def initial_threshold(self, d_sae: int) -> Tensor:
        """(d_sae,) thresholds of gates that are open wherever u is positive."""
        return torch.full((d_sae,), MIN_THRESHOLD)


def _score(x: Tensor, W: Tensor, bias: Tensor, latents: Tensor) -> Tensor:
    """(n_rows, n_latents) pre-activations of the given latents."""
    return torch.addmm(bias[latents], x, W[latents].T)

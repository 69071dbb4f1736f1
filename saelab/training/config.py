"""`TrainConfig`: configuration of a training run; and the protocols of its data and modules.

The configuration has length, learning rate and its schedule, and intervals of logging and saving. Protocols describe
batches of data, losses, and modules that can be trained.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from numbers import Integral
from typing import Any, Protocol, runtime_checkable

from torch import Tensor, nn

from saelab.functional.sparse_products import SparseGradients

MAX_WARMUP_STEPS = 1000
LARGER_BATCHES = (4096, 2048, 1024)
SMALLEST_BATCH = 512
MIN_STEPS = 360
"""of a run; held-out FVU of 185,000 tokens is .080 with 45 steps and .058 with 361 (TopK, LOG.md)"""


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Configuration of a training run. Defaults scale with the length of the run; all budgets are in tokens.

    >>> TrainConfig(n_tokens=2_000_000).n_steps
    488
    >>> TrainConfig(n_tokens=200_000).batch_size
    512
    """

    n_tokens: int = 2_000_000
    """tokens to train on; shorter data is repeated, shuffled again for each pass"""
    batch_size: int = None  # type: ignore[assignment]
    """tokens per step; None is 4096, or in a run too short for 360 such steps, which more steps take to a lower FVU,
    the largest power of two that allows 360, but at least 512"""
    lr: float | None = None
    """peak learning rate; None is derived from width, batch size and length of the run"""
    betas: tuple[float, float] = (0.9, 0.999)
    """Adam's decay rates of the first and second moment"""
    warmup_frac: float = 0.05
    """share of the run over which the learning rate rises linearly from 0, at most 1000 steps"""
    decay_frac: float = 0.2
    """last share of the run, over which the learning rate falls linearly to 0"""
    optim_bits: int = 32
    """bits of each of Adam's two moments of a matrix: 32, or 16, which take half of the memory; see `make_adam`"""
    clip_norm: float = 1.0
    """largest norm of all gradients together; larger ones are scaled down"""
    seed: int = 0
    """seed of the order of the data and of everything else that is random in training"""
    n_held_out: int = 16_384
    """tokens kept out of training to measure FVU on (at most a tenth of the data); 0 keeps none"""
    log_every_tokens: int | None = None
    """tokens between entries of the history; None is a hundredth of the run"""
    save_every_tokens: int | None = None
    """tokens between checkpoints; None is a tenth of the run"""

    def __post_init__(self) -> None:
        if self.batch_size is None:
            object.__setattr__(self, "batch_size", default_batch_size(self.n_tokens))
        for name in ("n_tokens", "batch_size"):
            if not isinstance(value := getattr(self, name), Integral) or value < 1:
                raise ValueError(f"`{name}` must be a whole number of at least 1, got {value}.")
        if self.n_tokens < self.batch_size:
            raise ValueError(
                f"`n_tokens` must hold a batch of {self.batch_size}, got {self.n_tokens}; lower `batch_size`."
            )
        if self.lr is not None and not 0 < self.lr < math.inf:
            raise ValueError(f"`lr` must be positive and finite, got {self.lr}; use None for the default.")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"`betas` must be in [0, 1), got {self.betas}.")
        if self.optim_bits not in (32, 16):
            raise ValueError(f"`optim_bits` must be 32 or 16, got {self.optim_bits}.")
        if self.n_held_out < 0:
            raise ValueError(f"`n_held_out` must be at least 0, got {self.n_held_out}.")
        if not (self.warmup_frac >= 0 and self.decay_frac >= 0 and self.warmup_frac + self.decay_frac <= 1):
            raise ValueError(
                f"`warmup_frac` and `decay_frac` must share one run, got {self.warmup_frac} and {self.decay_frac}."
            )
        if not self.clip_norm > 0:
            raise ValueError(f"`clip_norm` must be positive, got {self.clip_norm}; use math.inf for no clipping.")
        for name in ("log_every_tokens", "save_every_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"`{name}` must be at least 1 token, got {value}; use None for the default.")

    @property
    def n_steps(self) -> int:
        """Number of optimizer steps of the run."""
        return self.n_tokens // self.batch_size

    @property
    def log_every_steps(self) -> int:
        """Number of steps between entries of the history."""
        return max(1, (self.log_every_tokens or self.n_tokens // 100) // self.batch_size)

    @property
    def save_every_steps(self) -> int:
        """Number of steps between checkpoints."""
        return max(1, (self.save_every_tokens or self.n_tokens // 10) // self.batch_size)

    def lr_scale(self, step: int) -> float:
        """Share of the peak learning rate at a step, counted from 0: linear warm-up, constant, linear decay to 0.

        >>> [round(TrainConfig(n_tokens=10 * 512, warmup_frac=0.2).lr_scale(s), 2) for s in (0, 1, 5, 9)]
        [0.5, 1.0, 1.0, 0.5]
        """
        warmup = min(MAX_WARMUP_STEPS, math.ceil(self.warmup_frac * self.n_steps))
        decay = math.ceil(self.decay_frac * self.n_steps)
        rise = (step + 1) / warmup if warmup else 1.0
        fall = (self.n_steps - step) / decay if decay else 1.0
        return max(0.0, min(1.0, rise, fall))

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON values; `optim_bits` where it is not 32, so that older runs can be resumed."""
        fields = asdict(self) | {"betas": list(self.betas)}
        return fields if self.optim_bits != 32 else {name: x for name, x in fields.items() if name != "optim_bits"}


def default_batch_size(n_tokens: int) -> int:
    """Tokens per step of a run whose configuration has none.

    Args:
        n_tokens: length of the run; shorter ones than 512 tokens are one step.

    >>> [default_batch_size(n) for n in (300, 100_000, 400_000, 2_000_000)]
    [300, 512, 1024, 4096]
    """
    for size in LARGER_BATCHES:
        if n_tokens >= MIN_STEPS * size:
            return size
    return max(1, min(SMALLEST_BATCH, n_tokens))


@runtime_checkable
class Batches(Protocol):
    """An iterator of batches (batch, d_in) whose position can be saved and restored."""

    @property
    def d_in(self) -> int:
        """Width of a row."""

    def __next__(self) -> Tensor:
        """The next batch (batch, d_in)."""

    def state_dict(self) -> Mapping[str, Any]:
        """The position in the data, as JSON values and tensors by name."""

    def load_state_dict(self, state: Any) -> None:
        """Continue from the position in the output of `state_dict`."""


@runtime_checkable
class Losses(Protocol):
    """Losses of one batch: `total` is differentiated, `terms` are logged, `l0` is the mean L0."""

    @property
    def terms(self) -> dict[str, Tensor]:
        """Each loss that is logged, by name; scalars."""

    @property
    def total(self) -> Tensor:
        """The scalar loss to differentiate."""

    @property
    def l0(self) -> Tensor:
        """Mean number of latents that fire on a token of the batch."""


@runtime_checkable
class Trainable(Protocol):
    """A module with losses and constraints; `state` is everything but the weights that a checkpoint must hold."""

    state: dict[str, Tensor]

    @property
    def module(self) -> nn.Module:
        """The module whose parameters are trained."""

    @property
    def settings(self) -> dict[str, Any]:
        """Settings that must be the same when a run is resumed, as JSON values."""

    @property
    def dead_after_tokens(self) -> int:
        """Number of tokens without firing after which a latent counts as dead."""

    def prepare(self, sample: Tensor) -> None:
        """Fit normalization and initialize weights from a sample of the data, before the first step."""

    def objective(self, x: Tensor) -> Any:
        """Losses of one batch (`Losses`), without side effects."""

    def observe(self, seen: Any) -> None:
        """Update counters and thresholds from the losses of a step, after its weight update."""

    def differentiate(self, loss: Tensor) -> SparseGradients:
        """Differentiate a loss: gradients are in `.grad` of the parameters but for those returned, which are ready for
        the optimizer.
        """

    def constrain_gradients(self) -> None:
        """Project the gradients in `.grad` before the weight update."""

    def recycle_gradients(self) -> None:
        """Clear the gradients; their memory may be kept for the next step."""

    def constrain_weights(self) -> None:
        """Project the weights after the weight update."""

    def default_lr(self) -> float:
        """Peak learning rate where the configuration has none."""

    def held_out_fvu(self, x: Tensor) -> float:
        """FVU on held-out activations."""


def latent_axes_of(trainable: Trainable) -> Mapping[str, int]:
    """Weights and states of which each of several processes has those of its own latents, and which of their axes is
    that of the latents: the attribute `latent_axes`; none where there is no such attribute.
    """
    axes: Mapping[str, int] = getattr(trainable, "latent_axes", {})
    return axes

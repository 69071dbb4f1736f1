"""`TrainConfig`: length, learning rate and its schedule, and intervals of logging and saving of a training run."""

import math
from dataclasses import asdict, dataclass
from typing import Any

MAX_WARMUP_STEPS = 1000


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Configuration of a training run. Defaults scale with the length of the run; all budgets are in tokens.

    >>> TrainConfig(n_tokens=2_000_000).n_steps
    488
    """

    n_tokens: int = 2_000_000
    """tokens to train on; shorter data is repeated, shuffled again for each pass"""
    batch_size: int = 4096
    """tokens per step"""
    lr: float | None = None
    """peak learning rate; None derives it from width, batch size and length of the run"""
    betas: tuple[float, float] = (0.9, 0.999)
    """Adam's decay rates of the first and second moment"""
    warmup_frac: float = 0.05
    """share of the run over which the learning rate rises linearly from 0, at most 1000 steps"""
    decay_frac: float = 0.2
    """last share of the run, over which the learning rate falls linearly to 0"""
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
        if self.batch_size < 1:
            raise ValueError(f"`batch_size` must be at least 1 token, got {self.batch_size}.")
        if self.n_tokens < self.batch_size:
            raise ValueError(
                f"`n_tokens` must hold a batch of {self.batch_size}, got {self.n_tokens}; lower `batch_size`."
            )
        if self.lr is not None and not 0 < self.lr < math.inf:
            raise ValueError(f"`lr` must be positive and finite, got {self.lr}; use None for the default.")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"`betas` must be in [0, 1), got {self.betas}.")
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

        >>> [round(TrainConfig(n_tokens=10 * 4096, warmup_frac=0.2).lr_scale(s), 2) for s in (0, 1, 5, 9)]
        [0.5, 1.0, 1.0, 0.5]
        """
        warmup = min(MAX_WARMUP_STEPS, math.ceil(self.warmup_frac * self.n_steps))
        decay = math.ceil(self.decay_frac * self.n_steps)
        rise = (step + 1) / warmup if warmup else 1.0
        fall = (self.n_steps - step) / decay if decay else 1.0
        return max(0.0, min(1.0, rise, fall))

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON values."""
        return asdict(self) | {"betas": list(self.betas)}

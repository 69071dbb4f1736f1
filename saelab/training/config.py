"""`TrainConfig`: configuration of a training run; the protocols of its data and modules; and its optimizer.

The configuration has length, learning rate and its schedule, and intervals of logging and saving. Protocols describe
batches of data, losses, and modules that can be trained. The optimizer is Adam with gradient clipping, for weights
stored as they are or transposed.
"""

import math
from collections.abc import Container, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from saelab.functional.compiled import use_numba
from saelab.training.ranks import ALONE, RankGrid

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

    def constrain_gradients(self) -> None:
        """Project the gradients before the weight update."""

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


def make_adam(module: nn.Module, lr: float, cfg: TrainConfig) -> torch.optim.Adam:
    """A fused Adam (arXiv:1412.6980) over the trained parameters; weights and both moments are float32.

    Weights that are stored transposed are passed as their contiguous transpose, which shares their memory, so that no
    step copies them.
    """
    trained = [_in_memory_order(p) for p in module.parameters() if p.requires_grad]
    fused = trained[0].device.type in ("cpu", "cuda")
    return torch.optim.Adam(trained, lr=lr, betas=cfg.betas, fused=fused)


@torch.no_grad()
def step_adam(module: nn.Module, optimizer: torch.optim.Optimizer, normalized_rows: Container[str] = ()) -> None:
    """Update the module's parameters from their gradients by one step of the optimizer.

    Args:
        module: the module.
        optimizer: the result of `make_adam` for it.
        normalized_rows: names of the parameters whose rows are divided by their norms afterwards.
    """
    stored = name_optimized(module, optimizer)
    compiled: dict[str, Tensor] = {}
    for (name, mine), parameter in zip(stored.items(), _trained(module), strict=True):
        grad = parameter.grad
        mine.grad = grad if grad is None or parameter.is_contiguous() else grad.T
        if mine.grad is not None and mine.ndim == 2 and use_numba(mine, mine.grad):
            compiled[name], mine.grad = mine.grad, None
    optimizer.step()
    for name, mine in stored.items():
        if name in compiled:
            _step_compiled(mine, compiled[name], optimizer, name in normalized_rows)
            mine.grad = compiled[name]
        elif name in normalized_rows:
            for rows in torch.split(mine, 256):  # in chunks that fit the CPU cache
                rows /= torch.linalg.vector_norm(rows, dim=1, keepdim=True).clamp(min=1e-12)
    for mine, parameter in zip(stored.values(), _trained(module), strict=True):
        mine.grad = mine.grad if mine is parameter else None  # keep no gradient but the module's own


def _step_compiled(weight: nn.Parameter, grad: Tensor, optimizer: torch.optim.Optimizer, unit: bool) -> None:
    """One step of a compiled Adam, which keeps its state where PyTorch's does."""
    from saelab.functional import numba_kernels

    group, state = optimizer.param_groups[0], optimizer.state[weight]
    if not state:
        moments = {name: torch.zeros_like(weight.detach()) for name in ("exp_avg", "exp_avg_sq")}
        state.update(step=torch.zeros(()), **moments)
    state["step"] += 1
    numba_kernels.step_adam(
        weight.detach(),
        grad,
        state["exp_avg"],
        state["exp_avg_sq"],
        lr=float(group["lr"]),
        betas=group["betas"],
        eps=group["eps"],
        step=int(state["step"]),
        unit=unit,
    )


def name_optimized(module: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, nn.Parameter]:
    """The optimizer's parameters by their names in the module."""
    names = [name for name, parameter in module.named_parameters() if parameter.requires_grad]
    return dict(zip(names, optimizer.param_groups[0]["params"], strict=True))


def average_gradients(module: nn.Module, ranks: RankGrid, own: Container[str]) -> None:
    """Replace gradients by their mean over the ranks that saw other tokens, in place.

    Args:
        module: the module.
        ranks: the processes that train it.
        own: names of the parameters of which each rank of the latents has those of its own; the others, which all have
            alike, get the first one's gradient, so that no rounding ever drives them apart.
    """
    if ranks.alone:
        return
    for name, parameter in module.named_parameters():
        if parameter.grad is None:
            continue
        grad = parameter.grad if parameter.grad.is_contiguous() else parameter.grad.T
        ranks.data.average_(grad)
        if name not in own:
            ranks.latents.spread_(grad)


def clip_gradients(module: nn.Module, limit: float, ranks: RankGrid = ALONE, own: Container[str] = ()) -> Tensor:
    """Scale all gradients so that their joint norm is at most `limit`, and return the norm before.

    Args:
        module: the module.
        limit: largest norm.
        ranks: the processes that have the gradients.
        own: names of the parameters of which each rank of the latents has those of its own; the others count once.
    """
    named = {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
    grads = list(named.values())
    flat = {name: (grad if grad.is_contiguous() else grad.T).reshape(-1) for name, grad in named.items()}
    squares = {name: torch.dot(grad, grad) for name, grad in flat.items()}  # twice as fast as vector_norm
    if ranks.latents.size > 1:
        mine = [name for name in squares if name in own]
        total = ranks.latents.total(torch.stack([squares[name] for name in mine]))
        squares |= dict(zip(mine, total, strict=True))
    norm = torch.stack(list(squares.values())).sum().sqrt()
    scale = (limit / (norm + 1e-12)).clamp(max=1.0)
    if grads[0].device.type != "cpu" or scale < 1:
        for grad in grads:
            grad.mul_(scale)
    return norm


def _trained(module: nn.Module) -> list[nn.Parameter]:
    return [p for p in module.parameters() if p.requires_grad]


def _in_memory_order(parameter: nn.Parameter) -> nn.Parameter:
    return parameter if parameter.is_contiguous() else nn.Parameter(parameter.detach().T)

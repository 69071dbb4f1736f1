"""Protocols of the training loop: batches of data, losses, and modules that can be trained."""

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

from torch import Tensor, nn


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

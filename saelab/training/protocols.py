"""Protocols of the training loop: batches of data, losses, and modules that can be trained."""

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

from torch import Tensor, nn


@runtime_checkable
class Batches(Protocol):
    """An iterator of batches (batch, d_in) whose position can be saved and restored."""

    @property
    def d_in(self) -> int: ...

    def __next__(self) -> Tensor: ...

    def state_dict(self) -> Mapping[str, Any]: ...

    def load_state_dict(self, state: Any) -> None: ...


@runtime_checkable
class Losses(Protocol):
    """Losses of one batch: `total` is differentiated, `terms` are logged, `l0` is the mean L0."""

    @property
    def terms(self) -> dict[str, Tensor]: ...

    @property
    def total(self) -> Tensor: ...

    @property
    def l0(self) -> Tensor: ...


@runtime_checkable
class Trainable(Protocol):
    """A module with losses and constraints; `state` is everything but the weights that a checkpoint must hold."""

    state: dict[str, Tensor]

    @property
    def module(self) -> nn.Module: ...

    @property
    def settings(self) -> dict[str, Any]: ...

    @property
    def dead_after_tokens(self) -> int: ...

    def prepare(self, sample: Tensor) -> None: ...

    def objective(self, x: Tensor) -> Any: ...

    def observe(self, seen: Any) -> None: ...

    def constrain_gradients(self) -> None: ...

    def recycle_gradients(self) -> None: ...

    def constrain_weights(self) -> None: ...

    def default_lr(self) -> float: ...

    def held_out_fvu(self, x: Tensor) -> float: ...

"""`Activation`: what maps pre-activations to codes, found by name.

A variant of your own is one class; training, saving, loading and every analysis then know it:

    @register_activation("soft_topk")
    @dataclass(frozen=True)
    class SoftTopK(Activation):
        k: int = 32

        def __call__(self, u, threshold=None, training=False):
            return (u - u.topk(self.k + 1, dim=-1).values[..., -1:]).relu()
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from difflib import get_close_matches
from typing import Any, ClassVar, Literal, TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saelab.functional.codes import SparseCodes
from saelab.stores.validation import read_fields, require_object

ACTIVATIONS: dict[str, "type[Activation]"] = {}

A = TypeVar("A", bound="type[Activation]")


@dataclass(frozen=True)
class Activation:
    """Maps pre-activations u to codes z. Subclass it as a frozen dataclass and register it; only `__call__` is
    required.
    """

    name: ClassVar[str]
    signed: ClassVar[bool] = False
    """codes of both signs; latents are ranked by |u|"""
    threshold: ClassVar[Literal["none", "running", "learned"]] = "none"
    """what `threshold` holds: nothing, a running scalar kept by training, or one learned value a latent"""
    lr_scale: ClassVar[float] = 1.0
    """what the default learning rate is multiplied by"""
    transcoder_lr_scale: ClassVar[float] = 1.0
    """what that of a transcoder is multiplied by besides (LOG.md)"""

    def __init_subclass__(cls, **settings: Any) -> None:
        super().__init_subclass__(**settings)
        for shortcut in ("code", "search", "pick"):  # an inherited one would find other codes
            if "__call__" in vars(cls) and shortcut not in vars(cls):
                setattr(cls, shortcut, getattr(Activation, shortcut))

    def __call__(
        self, u: Float[Tensor, "*batch d_sae"], threshold: Tensor | None = None, training: bool = False
    ) -> Float[Tensor, "*batch d_sae"]:
        """The codes of dense pre-activations, differentiable."""
        raise NotImplementedError(f"{type(self).__name__} must define __call__(u, threshold=None, training=False).")

    def code(
        self,
        u: Float[Tensor, "n_rows d_sae"],
        x: Float[Tensor, "n_rows d_in"],
        W: Float[Tensor, "d_sae d_in"],
        bias: Float[Tensor, "d_sae"],
        threshold: Tensor | None,
    ) -> Float[Tensor, "n_rows d_sae"]:
        """The codes of dense `u = x W^T + bias`, differentiable. Where latents compete, those too close to call by a
        product's rounding are told apart by x and W, as `search` does.
        """
        return self(u, threshold)

    def search(
        self,
        x: Float[Tensor, "n_rows d_in"],
        W: Float[Tensor, "d_sae d_in"],
        bias: Float[Tensor, "d_sae"],
        threshold: Tensor | None,
        training: bool,
    ) -> SparseCodes | None:
        """The pre-activations that may fire (or, in training, carry a gradient) of `x W^T + bias`, without holding
        all of them.

        None where dense is the only way, or the cheaper one. `fire` makes codes of what is found.
        """
        return None

    def pick(
        self,
        x: Float[Tensor, "n_rows d_in"],
        W: Float[Tensor, "d_sae d_in"],
        bias: Float[Tensor, "d_sae"],
        threshold: Tensor | None,
        latents: Int[Tensor, "n_latents"],
    ) -> Float[Tensor, "n_rows n_latents"] | None:
        """The codes of some latents in inference, differentiable; None where all must be found for that."""
        return None

    def fire(self, u: Float[Tensor, "nnz"], threshold: Tensor | None) -> Float[Tensor, "nnz"]:
        """The codes of pre-activations that `search` found; `threshold` is one number, or one for each."""
        return u

    def penalty(self, u: Tensor, z: Tensor, threshold: Tensor | None) -> Tensor | None:
        """A sparsity loss of each pre-activation, summed over latents and averaged over tokens; None where sparsity
        is structural.
        """
        return None

    @property
    def penalty_weight(self) -> float | None:
        """The weight of the penalty where it is fixed: the field `coefficient`."""
        return getattr(self, "coefficient", None)

    @property
    def penalty_target(self) -> float | None:
        """The mean L0 to which training steers the penalty's weight: the field `target_l0`, where no weight is
        fixed.
        """
        return getattr(self, "target_l0", None) if self.penalty_weight is None else None

    def check_penalty(self) -> None:
        """Refuse a penalty whose weight nobody says (ValueError)."""
        unsaid = self.penalty_weight is None and self.penalty_target is None
        if type(self).penalty is not Activation.penalty and unsaid:
            raise ValueError(
                f"An activation with a `penalty` must say what it weighs, got {self} without `coefficient` and "
                "`target_l0`; give it a field of one of these names: a fixed weight, or the mean L0 to steer it to."
            )

    def initial_threshold(self, d_sae: int) -> Tensor | None:
        """The threshold to start from: NaN means that training has not set it yet."""
        return torch.tensor(torch.nan) if self.threshold == "running" else None

    def check(self, d_sae: int) -> None:
        """Refuse settings that do not fit the width; raises ValueError."""
        k = getattr(self, "k", None)
        if k is not None and not 1 <= k <= d_sae:
            raise ValueError(f"`k` must be in 1..d_sae ({d_sae}), got {k}.")

    def to_dict(self) -> dict[str, Any]:
        """Name and settings, as they stand in config.json."""
        return {"name": self.name, **asdict(self)}


def register_activation(name: str) -> Callable[[A], A]:
    """Make an activation known under a name, for config files and the command line; a taken name is refused
    (ValueError).
    """

    def register(cls: A) -> A:
        taken = ACTIVATIONS.get(name)
        if taken is not None and taken.__qualname__ != cls.__qualname__:
            raise ValueError(f"An activation's name must be free, '{name}' is {taken.__name__}; choose another.")
        cls.name = name
        ACTIVATIONS[name] = cls
        return cls

    return register


def make_activation(name: str, **settings: Any) -> Activation:
    """Build a registered activation; an unknown name or setting raises ValueError with near ones.

    >>> make_activation("abstopk", k=16)
    AbsTopK(k=16)
    """
    return _find_kind(name, settings)(**settings)


def read_activation(plain: Any) -> Activation:
    """The activation that a file says, by name and settings; ValueError for what is none."""
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

"""`Activation`: base class of activation functions, small frozen dataclasses that are registered by name.

To add a variant, define and register one class; training, saving, loading and all analyses can then use it:

    @register_activation("soft_topk")
    @dataclass(frozen=True)
    class SoftTopK(Activation):
        k: int = 32

        def __call__(self, u, threshold=None, training=False):
            return (u - u.topk(self.k + 1, dim=-1).values[..., -1:]).relu()
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Literal, TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saelab.functional.codes import SparseCodes

ACTIVATIONS: dict[str, "type[Activation]"] = {}

Competition = Literal["none", "group", "token", "batch", "unknown"]
A = TypeVar("A", bound="type[Activation]")


@dataclass(frozen=True)
class Activation:
    """Base class of activation functions, which map pre-activations u to codes z. Subclass it as a frozen dataclass and
    register it; only `__call__` is required.
    """

    name: ClassVar[str]
    signed: ClassVar[bool] = False
    """whether codes may be negative; latents are ranked by |u|"""
    threshold: ClassVar[Literal["none", "running", "learned"]] = "none"
    """what the SAE's `threshold` holds: nothing, a running scalar estimated in training, or one learned value per
    latent
    """
    gated: ClassVar[bool] = False
    """whether learned thresholds are those of a gate, which has parameters of its own in training"""
    competition: ClassVar[Competition] = "unknown"
    """which pre-activations a latent's code depends on in training: its own; those of its group (k groups of adjacent
    latents); it is among its token's k largest, or among the batch's k * n_tokens largest; or any of them. Where
    latents are divided among processes, those of "unknown" have to send all of them to each other
    """
    lr_scale: ClassVar[float] = 1.0
    """factor on the default learning rate"""
    transcoder_lr_scale: ClassVar[float] = 1.0
    """further factor on the default learning rate of a transcoder (LOG.md)"""

    def __init_subclass__(cls, **settings: Any) -> None:
        super().__init_subclass__(**settings)
        for shortcut in ("code", "search", "pick"):  # an inherited one would not match the new `__call__`
            if "__call__" in vars(cls) and shortcut not in vars(cls):
                setattr(cls, shortcut, getattr(Activation, shortcut))
        if "__call__" in vars(cls) and "competition" not in vars(cls):
            cls.competition = "unknown"

    def __call__(
        self, u: Float[Tensor, "*batch d_sae"], threshold: Tensor | None = None, training: bool = False
    ) -> Float[Tensor, "*batch d_sae"]:
        """Codes of dense pre-activations, differentiable.

        Args:
            u: (*batch, d_sae) pre-activations.
            threshold: the SAE's threshold, a scalar or (d_sae,); None for an activation without one.
            training: whether the codes are for a training step, where e.g. BatchTopK compares latents over the batch.
        """
        raise NotImplementedError(f"{type(self).__name__} must define __call__(u, threshold=None, training=False).")

    def code(
        self,
        u: Float[Tensor, "n_rows d_sae"],
        x: Float[Tensor, "n_rows d_in"],
        W: Float[Tensor, "d_sae d_in"],
        bias: Float[Tensor, "d_sae"],
        threshold: Tensor | None,
    ) -> Float[Tensor, "n_rows d_sae"]:
        """Codes of dense pre-activations `u = x W^T + bias`, differentiable.

        Where latents compete (top k), pre-activations that differ by no more than the rounding error of the matrix
        product are compared again from x and W, as in `search`, so that both choose the same latents.

        Args:
            u: (n_rows, d_sae) pre-activations, `x W^T + bias`.
            x: (n_rows, d_in) what the encoder reads, as `SAEModule.center` gives it; used only to decide between
                near-equal latents.
            W: (d_sae, d_in) encoder weights, one row per latent; used like `x`.
            bias: (d_sae,) encoder biases.
            threshold: the SAE's threshold, a scalar or (d_sae,); None for an activation without one.
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
        """Pre-activations of `x W^T + bias` that may be active (in training, those that carry a gradient), in sparse
        form, without materialising all of them.

        None where the dense computation is the only way, or the faster one. `fire` turns the values found into codes.

        Args:
            x: (n_rows, d_in) what the encoder reads, as `SAEModule.center` gives it.
            W: (d_sae, d_in) encoder weights, one row per latent.
            bias: (d_sae,) encoder biases.
            threshold: the SAE's threshold, a scalar or (d_sae,); None for an activation without one.
            training: whether the codes are for a training step.
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
        """(n_rows, n_latents) codes of the given latents in inference, differentiable; None where that requires the
        codes of all latents.

        Args:
            x: (n_rows, d_in) what the encoder reads, as `SAEModule.center` gives it.
            W: (d_sae, d_in) encoder weights of all latents, one row per latent.
            bias: (d_sae,) encoder biases of all latents.
            threshold: the SAE's threshold, a scalar or (d_sae,); None for an activation without one.
            latents: (n_latents,) indices of the latents wanted.
        """
        return None

    def fire(self, u: Float[Tensor, "nnz"], threshold: Tensor | None) -> Float[Tensor, "nnz"]:
        """Codes of the pre-activations that `search` found; `threshold` is a scalar, or one value for each of them."""
        return u

    def penalty(self, u: Tensor, z: Tensor, threshold: Tensor | None) -> Tensor | None:
        """Sparsity loss of each pre-activation, to be summed over latents and averaged over tokens; None where sparsity
        is structural (top k).
        """
        return None

    @property
    def penalized(self) -> bool:
        """Whether it has a sparsity penalty."""
        return type(self).penalty is not Activation.penalty

    @property
    def penalty_weight(self) -> float | None:
        """Weight of the penalty where it is fixed: the field `coefficient`."""
        return getattr(self, "coefficient", None)

    @property
    def penalty_target(self) -> float | None:
        """Mean L0 that training controls the penalty's weight to reach: the field `target_l0`, where no weight is
        fixed.
        """
        return getattr(self, "target_l0", None) if self.penalty_weight is None else None

    def check_penalty(self) -> None:
        """Raise ValueError for an activation with a penalty that defines neither a fixed weight nor a target L0."""
        unsaid = self.penalty_weight is None and self.penalty_target is None
        if self.penalized and unsaid:
            raise ValueError(
                f"An activation with a `penalty` must say what it weighs, got {self} without `coefficient` and "
                "`target_l0`; give it a field of one of these names: a fixed weight, or the mean L0 to steer it to."
            )

    def initial_threshold(self, d_sae: int) -> Tensor | None:
        """Threshold at the start of training, or None; NaN means that training has not set it yet."""
        return torch.tensor(torch.nan) if self.threshold == "running" else None

    def check(self, d_sae: int) -> None:
        """Raise ValueError for settings that do not fit the number of latents."""
        k = getattr(self, "k", None)
        if k is not None and not 1 <= k <= d_sae:
            raise ValueError(f"`k` must be in 1..d_sae ({d_sae}), got {k}.")

    def to_dict(self) -> dict[str, Any]:
        """Name and settings as a dictionary, as in config.json."""
        return {"name": self.name, **asdict(self)}


def register_activation(name: str) -> Callable[[A], A]:
    """Class decorator that registers an activation under a name, for config files and the command line; ValueError for
    a name in use.
    """

    def register(cls: A) -> A:
        taken = ACTIVATIONS.get(name)
        if taken is not None and taken.__qualname__ != cls.__qualname__:
            raise ValueError(f"An activation's name must be free, '{name}' is {taken.__name__}; choose another.")
        cls.name = name
        ACTIVATIONS[name] = cls
        return cls

    return register

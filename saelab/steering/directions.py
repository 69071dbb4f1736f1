"""`Direction`: a unit vector at a hook point, which can be steered and ablated like an SAE feature."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Direction:
    """A direction `v` in activation space, scaled to norm 1; its code is `z = x . v`, so that x is `z v` plus the rest.

    Raises:
        ValueError: for a vector that is zero or not finite.

    >>> Direction(torch.tensor([3.0, 4.0]), "blocks.0.hook_resid_post").vector
    tensor([0.6000, 0.8000])
    """

    vector: Float[Tensor, "d_in"]
    """scaled to norm 1, float32"""
    hook_point: str
    name: str = "direction"
    peak: float | None = None
    """largest |z| on data: strengths of unit "max" are multiples of it"""

    def __post_init__(self) -> None:
        norm = float(self.vector.detach().norm())
        if not 0 < norm < float("inf"):
            raise ValueError(f"A direction must be finite and not zero, got a vector of norm {norm}.")
        object.__setattr__(self, "vector", self.vector.float() / self.vector.float().norm())

    @property
    def d_in(self) -> int:
        """Width of the activations."""
        return len(self.vector)

    def encode(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch 1"]:
        """The code `x . v` of each activation, in a last axis of size 1."""
        return (x.to(self.vector) @ self.vector)[..., None]

    def encode_some(self, x: Float[Tensor, "*batch d_in"], latents: Sequence[int]) -> Float[Tensor, "*batch n_latents"]:
        """`encode(x)` repeated once for each requested index, all of which must be 0."""
        return self.encode(x)[..., list(latents)]

    def stretch(self, x: Float[Tensor, "*batch d_in"]) -> float:
        """1.0, the scale of a code of 1 at every token; an SAE's may differ by token."""
        return 1.0

    def __neg__(self) -> "Direction":
        return Direction(-self.vector, self.hook_point, f"-{self.name}", self.peak)


def make_random(like: Direction, seed: int = 0) -> Direction:
    """A random unit vector at the same hook point with the same peak, as a baseline for any direction.

    >>> a = Direction(torch.ones(3), "blocks.0.hook_resid_post")
    >>> round(float(make_random(a, seed=1).vector.norm()), 6)
    1.0
    """
    drawn = torch.randn(like.d_in, generator=torch.Generator().manual_seed(seed))
    return Direction(drawn.to(like.vector), like.hook_point, "random", like.peak)

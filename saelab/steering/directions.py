"""`Direction`: one unit vector at a hook point, steered and ablated like a feature of an SAE."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Direction:
    """A direction `v` of activations, scaled to norm 1; its code is `z = x . v`, so that x is `z v` plus the rest.

    Raises ValueError for a vector that is not finite or has no direction.

    >>> Direction(torch.tensor([3.0, 4.0]), "blocks.0.hook_resid_post").vector
    tensor([0.6000, 0.8000])
    """

    vector: Float[Tensor, "d_in"]
    hook_point: str
    name: str = "direction"
    peak: float | None = None
    """the largest |z| seen on data: what strengths of unit "max" are multiples of"""

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
        """The one code, `x . v`."""
        return (x.to(self.vector) @ self.vector)[..., None]

    def encode_some(self, x: Float[Tensor, "*batch d_in"], latents: Sequence[int]) -> Float[Tensor, "*batch n_latents"]:
        """The code, as often as 0 is among `latents`."""
        return self.encode(x)[..., list(latents)]

    def stretch(self, x: Float[Tensor, "*batch d_in"]) -> float:
        """1: a code adds the same at every token."""
        return 1.0

    def __neg__(self) -> "Direction":
        return Direction(-self.vector, self.hook_point, f"-{self.name}", self.peak)


def make_random(like: Direction, seed: int = 0) -> Direction:
    """A random unit vector at the same hook point, with the same peak: the baseline that any direction must beat.

    >>> a = Direction(torch.ones(3), "blocks.0.hook_resid_post")
    >>> round(float(make_random(a, seed=1).vector.norm()), 6)
    1.0
    """
    drawn = torch.randn(like.d_in, generator=torch.Generator().manual_seed(seed))
    return Direction(drawn.to(like.vector), like.hook_point, "random", like.peak)

"""`Direction` and `Subspace`: a unit vector at a hook point, or the span of several, to steer, project and ablate."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Float
from torch import Tensor

INDEPENDENT = 1e-5  # of the largest singular value: what is below adds no direction of its own


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
    warning: str = ""
    """what speaks against reading the direction by its name, as for one that was found without labels"""

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

    def encode_latents(
        self, x: Float[Tensor, "*batch d_in"], latents: Sequence[int]
    ) -> Float[Tensor, "*batch n_latents"]:
        """`encode(x)` repeated once for each requested index, all of which must be 0."""
        return self.encode(x)[..., list(latents)]

    def output_scale(self, x: Float[Tensor, "*batch d_in"]) -> float:
        """1.0: a code of 1 adds the vector itself at every token; `SAEModule.output_scale` may differ by token."""
        return 1.0

    def __neg__(self) -> "Direction":
        return replace(self, vector=-self.vector, name=f"-{self.name}")


def make_random(like: Direction, seed: int = 0) -> Direction:
    """A random direction of norm 1 with the hook point and peak of `like`, as a baseline for it.

    >>> a = Direction(torch.ones(3), "blocks.0.hook_resid_post")
    >>> round(float(make_random(a, seed=1).vector.norm()), 6)
    1.0
    """
    drawn = torch.randn(like.d_in, generator=torch.Generator().manual_seed(seed))
    return Direction(drawn.to(like.vector), like.hook_point, "random", like.peak)


@dataclass(frozen=True, eq=False)
class Subspace:
    """The span of vectors at a hook point, held as an orthonormal basis Q: `P x = x Q^T Q`.

    `x V^T V` of unit vectors V that are not orthogonal is no projection: Q comes from their singular value
    decomposition, and linearly dependent vectors add nothing to it. ValueError for vectors that are not finite or all
    zero.

    >>> plane = Subspace(torch.tensor([[1.0, 0, 0], [1, 1, 0]]), "blocks.0.hook_resid_post")
    >>> plane.project(torch.tensor([1.0, 2.0, 3.0])).round(decimals=4) + 0.0
    tensor([1., 2., 0.])
    """

    vectors: Float[Tensor, "n d_in"]
    hook_point: str
    name: str = "subspace"
    basis: Float[Tensor, "rank d_in"] = field(init=False, repr=False)
    """orthonormal rows Q"""

    def __post_init__(self) -> None:
        vectors = self.vectors.detach().double()
        if not vectors.isfinite().all() or not (vectors != 0).any():
            raise ValueError(f"Vectors of a subspace must be finite, not all zero, got shape {tuple(vectors.shape)}.")
        _, sizes, basis = torch.linalg.svd(vectors, full_matrices=False)
        object.__setattr__(self, "basis", basis[sizes > INDEPENDENT * sizes[0]].float())

    def project(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_in"]:
        """The component of activations in the subspace."""
        basis = self.basis.to(x)
        return (x @ basis.T) @ basis

    def remove(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_in"]:
        """Directional ablation, `x - P x`, as in `sl.splice(model, {subspace.hook_point: subspace.remove})`."""
        return x - self.project(x)


def as_subspace(source: Direction | Subspace) -> Subspace:
    """A direction as a subspace of rank 1; a subspace as it is."""
    if isinstance(source, Subspace):
        return source
    return Subspace(source.vector.cpu()[None], source.hook_point, source.name)


def make_random_subspaces(like: Subspace, n: int, seed: int = 0) -> list[Subspace]:
    """Random subspaces, `n` of them, of the same rank at the same hook point.

    >>> [one.basis.shape for one in make_random_subspaces(Subspace(torch.eye(4)[:2], "blocks.0.hook_resid_post"), 1)]
    [torch.Size([2, 4])]
    """
    generator = torch.Generator().manual_seed(seed)
    return [Subspace(torch.randn(like.basis.shape, generator=generator), like.hook_point, "random") for _ in range(n)]

"""Archetypal dictionaries: decoder rows kept near the convex hull of the data (arXiv:2502.12892).

    W_dec = rows of  W C + Lambda  at unit length,      W >= 0,  W 1 = 1,  ||Lambda_i|| <= delta

C holds points among the activations, mean-centered; W and Lambda are trained. Rows are normalized, so a row's length
moves into its code: W_dec has unit rows like the default dictionary's, and rankings by |z| keep their meaning.
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from saelab.functional.activation_functions import project_simplex


@dataclass(frozen=True, kw_only=True)
class Archetypal:
    """Settings of a relaxed archetypal dictionary (arXiv:2502.12892): decoder rows are convex combinations of data
    points plus a bounded deviation.

    The points are k-means centroids of the activations that `fit` sees first; the memory of training grows with d_sae *
    n_points. As the points are mean-centered, their hull surrounds the origin and no direction is excluded: the further
    a row turns from all points, the shorter `W C` becomes and the more `delta` can turn it.

    >>> sl.SAEConfig(d_in=8, d_sae=32, dictionary=Archetypal(n_points=64)).dictionary
    Archetypal(n_points=64, delta=0.1)
    """

    n_points: int | None = None
    """number of points whose convex combinations the rows are; None is d_sae"""
    delta: float = 0.1
    """largest distance of a row from the points' hull, in units of their root mean square norm; 0 keeps it inside"""

    def __post_init__(self) -> None:
        if self.n_points is not None and self.n_points < 2:
            raise ValueError(f"`n_points` must be at least 2, got {self.n_points}; use None for d_sae.")
        if not 0 <= self.delta < math.inf:
            raise ValueError(f"`delta` must be at least 0 and finite, got {self.delta}; use 'unit' for no bound.")


class Archetypes(nn.Module):
    """Parameters W and Lambda and points C of an archetypal dictionary; calling it returns W_dec, differentiable in W
    and Lambda.

    Each row starts at a point of its own, drawn with the generator; rows beyond n_points start between two points.
    Without a generator the tensors are left empty, to be filled by loading.

    Args:
        cfg: the constraint.
        d_sae: number of rows.
        d_in: their dimension.
        generator: draws the points and where rows start; None to leave the tensors empty.
    """

    points: Float[Tensor, "n_points d_in"]

    def __init__(self, cfg: Archetypal, d_sae: int, d_in: int, generator: torch.Generator | None) -> None:
        super().__init__()
        self.delta = cfg.delta
        n_points = cfg.n_points or d_sae
        if generator is None:
            points, weights = torch.empty(n_points, d_in), torch.empty(d_sae, n_points)
        else:
            points = torch.randn(n_points, d_in, generator=generator)
            points = points / points.norm(dim=1, keepdim=True)
            weights = _draw_weights(d_sae, n_points, generator)
        self.register_buffer("points", points)
        self.weights = nn.Parameter(weights)
        self.relaxation = nn.Parameter(torch.zeros(d_sae, d_in), requires_grad=cfg.delta > 0)

    def keep(self, own: range) -> None:
        """Keep the rows of these latents alone, in place."""
        if len(own) < len(self.weights):
            self.weights.data = self.weights.data[own.start : own.stop].clone()
            self.relaxation.data = self.relaxation.data[own.start : own.stop].clone()

    def forward(self) -> Float[Tensor, "d_sae d_in"]:
        """(d_sae, d_in) dictionary rows at unit length."""
        atoms = self.weights @ self.points + self.relaxation
        return atoms / atoms.norm(dim=1, keepdim=True).clamp(min=1e-12)

    @torch.no_grad()
    def place(self, centered: Float[Tensor, "n_tokens d_in"], seed: int) -> None:
        """Set the points to centroids of mean-centered activations, scaled to a mean square norm of 1."""
        points = find_points(centered, len(self.points), seed)
        scale = points.square().sum(1).mean().sqrt()
        self.points.copy_(points / scale if scale > 0 else points)

    @torch.no_grad()
    def constrain(self) -> None:
        """Project rows of W onto the simplex, and rows of Lambda onto the ball of radius delta, in place."""
        self.weights.copy_(project_simplex(self.weights))
        norms = self.relaxation.norm(dim=1, keepdim=True).clamp(min=1e-12)
        self.relaxation.mul_((self.delta / norms).clamp(max=1.0))


def _draw_weights(d_sae: int, n_points: int, generator: torch.Generator) -> Tensor:
    order = torch.randperm(n_points, generator=generator)
    first = torch.arange(d_sae) % n_points
    second = (first + torch.randint(1, n_points, (d_sae,), generator=generator)) % n_points
    share = torch.rand(d_sae, 1, generator=generator).masked_fill((torch.arange(d_sae) < n_points)[:, None], 1.0)
    weights = torch.zeros(d_sae, n_points).scatter(1, order[second][:, None], 1 - share)
    return weights.scatter(1, order[first][:, None], share)


def find_points(x: Float[Tensor, "n_tokens d_in"], n: int, seed: int) -> Float[Tensor, "n d_in"]:
    """(n, d_in) k-means centroids of `x`; where `x` has at most `n` distinct rows, those rows, repeated (they span the
    same hull).
    """
    from sklearn.cluster import MiniBatchKMeans

    rows = x.float().cpu().unique(dim=0)
    if len(rows) <= n:
        return rows.repeat(math.ceil(n / len(rows)), 1)[:n].to(x)
    means = MiniBatchKMeans(n, batch_size=max(4096, n), n_init=1, max_iter=30, random_state=seed)
    return torch.from_numpy(means.fit(rows.numpy()).cluster_centers_).to(x)

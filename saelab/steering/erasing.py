"""Edits of activations that take a concept out: sides of features, directions, the least-squares erasure."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from saelab.functional.metrics import exact
from saelab.sae.sae import SAE
from saelab.steering.rankings import Columns, Labelled, Ranking, Sides
from saelab.steering.rivals import find_direction

Edit: TypeAlias = Callable[[Tensor], Tensor]
"""Activations (*batch, d_in) to activations."""
To = Literal["usual", "zero"]
NEAREST = 10
SMALLEST = 1e-6  # of the largest variance: what is below is no direction of the data


@dataclass(frozen=True, eq=False)
class FeatureErasure:
    """Takes the codes of some sides of features to 0: `x' = x - sum_i z_i d_i` over those of the chosen signs."""

    sae: SAE
    features: tuple[int, ...]
    signs: tuple[int, ...]
    """of the codes that are taken out; the other side of a feature stays"""

    @torch.no_grad()
    def __call__(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_in"]:
        flat = x.reshape(-1, x.shape[-1])
        unique = list(dict.fromkeys(self.features))
        columns = torch.tensor([unique.index(j) for j in self.features])
        read = flat.to(self.sae.device)
        z = self.sae.encode_some(read, unique)[:, columns.to(self.sae.device)]
        taken = torch.where(z.sign() == torch.tensor(self.signs).to(z), z, 0)
        step = taken @ self.sae.directions()[list(self.features)].to(z) * self.sae.stretch(read)
        return (flat - step.to(flat)).view_as(x)


@dataclass(frozen=True, eq=False)
class AffineErasure:
    """`x' = x - ((x - centre) A^T) B`: along B, as far as A reads; a projection where they are one orthonormal set."""

    centre: Float[Tensor, "d_in"]
    read: Float[Tensor, "rank d_in"]
    write: Float[Tensor, "rank d_in"]

    def __call__(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_in"]:
        centre, read, write = (part.to(x) for part in (self.centre, self.read, self.write))
        return x - ((x - centre) @ read.T) @ write


def choose_sides(
    codes: Any,
    y: Bool[np.ndarray, "n"],
    k: int,
    ranking: "Ranking | Literal['effect']",
    pull: Float[np.ndarray, "d_sae"],
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Features and signs of the k best sides that fire more, or stronger, where a label holds.

    "effect" ranks by what taking a side out takes off a probe's distance between the two means (arXiv:2411.18895):
    `(mean(z | y) - mean(z | not y)) d . w`, with `pull` the products d . w of all features.
    """
    sides = Sides.split(codes, np.ones(len(y), bool))
    labelled = Labelled(Columns(sides.matrix), y, np.arange(len(y)))
    effects = labelled.differences * sides.signs * pull[sides.features]
    order = np.argsort(-effects, kind="stable") if ranking == "effect" else labelled.order(ranking)
    good = effects > 0 if ranking == "effect" else labelled.differences > 0
    chosen = order[good[order]][:k]
    if len(chosen) < k:
        raise ValueError(f"`k` must be at most the number of sides that tell the concept ({len(chosen)}), got {k}.")
    return tuple(sides.features[chosen].tolist()), tuple(sides.signs[chosen].tolist())


def draw_like(
    codes: Any, features: tuple[int, ...], signs: tuple[int, ...], rng: np.random.Generator
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """As many other sides at random, each among the ten that fire about as often as the one it stands for."""
    sides = Sides.split(codes, np.ones(codes.shape[0], bool))
    counts = np.diff(sides.matrix.indptr)
    place = {pair: i for i, pair in enumerate(zip(sides.features.tolist(), sides.signs.tolist(), strict=True))}
    own = [place[pair] for pair in zip(features, signs, strict=True)]
    free, drawn = np.ones(len(sides), bool), []
    free[own] = False
    for i in own:
        near = np.argsort(np.where(free, np.abs(np.log(counts / counts[i])), np.inf), kind="stable")[:NEAREST]
        drawn.append(int(rng.choice(near[free[near]])))
        free[drawn[-1]] = False
    return tuple(sides.features[drawn].tolist()), tuple(sides.signs[drawn].tolist())


def erase_direction(
    x: Float[Tensor, "n d_in"],
    y: Bool[Tensor, "n"],
    hook_point: str,
    method: Literal["means", "probe"],
    n_directions: int = 1,
    to: To = "usual",
) -> AffineErasure:
    """Directional ablation: codes along directions that tell a label become 0, or what is usual where it does not hold.

    Several directions are found one after another, each in what those before leave (arXiv:2004.07667); between means
    there is only one.
    """
    if method == "means" and n_directions != 1:
        raise ValueError(f"`n_directions` between means must be 1, got {n_directions}; use 'probe'.")
    basis: list[Tensor] = []
    left = x
    for _ in range(n_directions):
        vector = find_direction(left, y, hook_point, method).vector
        for other in basis:
            vector = vector - (vector @ other) * other
        basis.append(vector / vector.norm())
        left = left - (left @ basis[-1])[:, None] * basis[-1]
    return project_out(torch.stack(basis), x[~y].mean(0) if to == "usual" else torch.zeros(x.shape[1]))


def project_out(basis: Float[Tensor, "rank d_in"], centre: Float[Tensor, "d_in"]) -> AffineErasure:
    """The projection along an orthonormal basis, on the plane through a centre."""
    return AffineErasure(centre, basis, basis)


def draw_directions(like: AffineErasure, seed: int) -> AffineErasure:
    """As many random directions, on the plane through the same centre."""
    drawn = torch.randn(like.read.shape[::-1], generator=torch.Generator().manual_seed(seed))
    return project_out(torch.linalg.qr(drawn).Q.T.contiguous(), like.centre)


def erase_least(x: Float[Tensor, "n d_in"], y: Bool[Tensor, "n"]) -> AffineErasure:
    """The smallest change after which no linear probe does better than a constant (arXiv:2306.03819).

        x' = x - ((x - mean) . a) b        a = S^-1/2 u, b = S^1/2 u, u = S^-1/2 (mean(x | y) - mean) / its norm

    S is the covariance of x. The means of both labels become the same, at the least cost in `(x' - x)^2` over S.

    >>> x = torch.tensor([[0.0, 1.0], [1.0, 0.0], [4.0, 0.0], [5.0, 1.0]])
    >>> y = torch.tensor([False, False, True, True])
    >>> erased = erase_least(x, y)(x)
    >>> (erased[y].mean(0) - erased[~y].mean(0)).abs().max() < 1e-5
    tensor(True)
    """
    values = exact(x)
    mean = values.mean(0)
    variances, axes = torch.linalg.eigh((values - mean).T @ (values - mean) / len(values))
    kept = variances > SMALLEST * variances[-1]
    scales, axes = variances[kept].sqrt(), axes[:, kept]
    u = (axes.T @ (values[y].mean(0) - mean)) / scales
    u = u / u.norm().clamp(min=1e-30)
    return AffineErasure(mean.float(), (axes @ (u / scales)).float()[None], (axes @ (u * scales)).float()[None])

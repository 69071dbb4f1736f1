"""Edits that erase a concept from activations: ablated features, ablated directions, least-squares erasure (LEACE)."""

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
"""What codes along an erased direction become: their usual value where the label is false, or zero"""
NEAREST = 10
SMALLEST = 1e-6  # of the largest variance: what is below is no direction of the data


@dataclass(frozen=True, eq=False)
class FeatureErasure:
    """Sets the codes of some features to 0 where they have the given signs: `x' = x - sum_i z_i d_i` over these."""

    sae: SAE
    features: tuple[int, ...]
    """one for each sign that is erased"""
    signs: tuple[int, ...]
    """sign of the codes that are set to 0; codes of the other sign stay"""

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
    """The affine edit `x' = x - ((x - centre) read^T) write`; a projection where both are one orthonormal set."""

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
    """The k features, each with one sign of its codes, that best predict a label.

    Only signs whose mean code is larger where the label is true are considered. "effect" ranks by how much setting the
    codes to 0 reduces the distance of the two class means along a probe (arXiv:2411.18895): `(mean(z | y) - mean(z |
    not y)) d . w`.

    Args:
        codes: (n, d_sae) scipy sparse codes.
        y: (n) the label.
        k: number of features with sign.
        ranking: one of `probe_features`' rankings, or "effect".
        pull: products d . w of each decoder row with the probe's weights, for "effect".

    Returns:
        indices and signs of the features, the best first.

    Raises:
        ValueError: where fewer than k such signs exist.
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
    """Random control features: for each given one, another among the ten nearest in firing rate.

    Args:
        codes: (n, d_sae) scipy sparse codes.
        features: indices of the features to be matched, none of which is drawn.
        signs: their signs.
        rng: draws them.

    Returns:
        indices and signs of the control features.
    """
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
    """Directional ablation: the edit that sets codes along the directions of a label to a constant.

    Args:
        x: (n, d_in) activations.
        y: (n) the label.
        hook_point: where the activations are from.
        method: "means" (difference of means) or "probe" (logistic regression) finds the directions.
        n_directions: how many, each found in what is left by those before (INLP, arXiv:2004.07667); 1 for "means".
        to: the constant: "usual" for the mean code where the label is false, "zero" for 0.

    Raises:
        ValueError: for several directions with "means".
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
    """The edit that removes the component along an orthonormal basis: projection on the plane through `centre`."""
    return AffineErasure(centre, basis, basis)


def draw_directions(like: AffineErasure, seed: int) -> AffineErasure:
    """The edit for equally many random directions about the same centre, as a control."""
    drawn = torch.randn(like.read.shape[::-1], generator=torch.Generator().manual_seed(seed))
    return project_out(torch.linalg.qr(drawn).Q.T.contiguous(), like.centre)


def erase_least(x: Float[Tensor, "n d_in"], y: Bool[Tensor, "n"]) -> AffineErasure:
    """The smallest edit after which no linear probe beats a constant predictor (LEACE, arXiv:2306.03819).

        x' = x - ((x - mean) . a) b        a = S^-1/2 u, b = S^1/2 u, u = S^-1/2 (mean(x | y) - mean) / its norm

    S is the covariance of x. The means of both classes become equal, at the least cost in `(x' - x)^2` over S.

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

"""Directions of a concept fitted to labeled activations, control features, and edits that erase a concept.

Edits are ablated features, ablated directions and least-squares erasure (LEACE).
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal, SupportsIndex, TypeAlias, get_args

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from saelab.functional.indices import read_feature
from saelab.functional.metrics import exact
from saelab.functional.statistics import correlation_of_sums, fit_balanced_probe
from saelab.interventions.directions import Direction
from saelab.lm.token_labels import LabelsLike, pick_marks
from saelab.probing.feature_ranking import Columns, Labeled, RankedSides, Ranking
from saelab.sae.sae import SAE
from saelab.stores.feature_store import FeatureStore, Firings

DirectionMethod = Literal["means", "probe", "pca", "kmeans"]
Edit: TypeAlias = Callable[[Tensor], Tensor]
"""Activations (*batch, d_in) to activations."""
To = Literal["usual", "zero"]
"""What codes along an erased direction become: their usual value where the label is false, or zero"""
NEAREST = 10
UNSUPERVISED = (
    "found without labels: what varies most, or agrees best with itself, need not be what it is named after. Hold it "
    "against labels, random directions and planted distractors (arXiv:2312.10029)."
)
"""the warning that every direction found without labels carries"""
SMALLEST = 1e-6  # of the largest variance: what is below is no direction of the data


def fit_direction(
    x: Float[Tensor, "n d_in"],
    y: Bool[Tensor, "n"],
    hook_point: str,
    method: DirectionMethod = "means",
    *,
    name: str | None = None,
    seed: int = 0,
) -> Direction:
    """The direction that separates labeled activations, pointing to where the label is true.

        means    mean(x | y) - mean(x | not y)
        probe    weights of a logistic regression on x over its one scale, classes weighed alike (L2, C = 1)
        pca      first principal component about the midpoint of the two means, classes weighed alike
        kmeans   difference of two centroids (10 starts, drawn by `seed`)

    For "pca" and "kmeans" the label sets the sign alone: mean(x | y) lies further along the direction than mean(x | not
    y), as for all methods; their `warning` says so. `peak` is the largest |x . v| of the data. Source:
    arXiv:2310.15154.

    Args:
        x: (n, d_in) activations.
        y: (n) the label.
        hook_point: where the activations are from.
        method: "means", "probe", "pca" or "kmeans".
        name: of the direction; by default the method.
        seed: of the starts of k-means.

    Raises:
        ValueError: where a class is missing or the class means are the same.

    >>> x = torch.tensor([[2.0, 1.0], [0.0, 1.0], [2.1, -1.0], [0.0, -1.0]])
    >>> fit_direction(x, torch.tensor([True, False, True, False]), "blocks.0.hook_resid_post").vector
    tensor([1., 0.])
    """
    if method not in get_args(DirectionMethod):
        raise ValueError(f"`method` must be one of {get_args(DirectionMethod)}, got '{method}'.")
    if not (len(x) == len(y) and y.any() and not y.all()):
        raise ValueError(
            f"`y` must hold and not hold of some of the {len(x)} rows, got {len(y)} labels, {int(y.sum())} true."
        )
    x, y = x.detach().float().cpu(), y.cpu()
    apart = x[y].mean(0) - x[~y].mean(0)
    if not (apart != 0).any():
        raise ValueError("Activations must differ in their means where a label holds; theirs are the same.")
    vector = {"means": _subtract_means, "probe": _fit_weights, "pca": _find_component, "kmeans": _split_in_two}[method](
        x, y, seed
    )
    warning = UNSUPERVISED if method in ("pca", "kmeans") else ""
    direction = Direction(vector if vector @ apart >= 0 else -vector, hook_point, name or method, warning=warning)
    return replace(direction, peak=float((x @ direction.vector).abs().max()))


def _subtract_means(x: Tensor, y: Tensor, _seed: int) -> Tensor:
    return x[y].mean(0) - x[~y].mean(0)


def _fit_weights(x: Tensor, y: Tensor, _seed: int) -> Tensor:
    """Weights of a logistic regression; one scale for all dimensions, so that the penalty does not rotate the
    direction.
    """
    centered = x - x.mean(0)
    scaled = centered / centered.square().mean().sqrt()
    return torch.from_numpy(fit_balanced_probe(scaled.numpy(), y.numpy()).astype(np.float32))


def _find_component(x: Tensor, y: Tensor, _seed: int) -> Tensor:
    x = x.double()
    center = (x[y].mean(0) + x[~y].mean(0)) / 2
    parts = [(x[kind] - center) / (2 * int(kind.sum())) ** 0.5 for kind in (y, ~y)]
    covariance = sum(part.T @ part for part in parts)
    assert isinstance(covariance, Tensor)
    return torch.linalg.eigh(covariance).eigenvectors[:, -1].float()


def _split_in_two(x: Tensor, _y: Tensor, seed: int) -> Tensor:
    from sklearn.cluster import KMeans

    centers = KMeans(2, n_init=10, random_state=seed).fit(x.numpy()).cluster_centers_
    return torch.from_numpy(centers[1] - centers[0]).float()


def density_matched_features(
    store: FeatureStore,
    feature: SupportsIndex,
    labels: LabelsLike | Bool[np.ndarray | Tensor, "n_tokens"] | None = None,
    *,
    concept: str | None = None,
    n: int = 1,
    most_correlated: float = 0.05,
    avoid: tuple[int, ...] = (),
) -> list[int]:
    """Control features for a feature: about the same firing rate, and codes uncorrelated with its concept.

    They are the nearest in log density among the features with |correlation| of at most `most_correlated`, both of
    codes and of |z|, with `labels`, or without labels with the feature's own codes.

    Args:
        store: codes of all features on some text.
        feature: index of the feature.
        labels: (n_tokens) whether the concept is true of each token, or labels of several concepts;
            None for the feature's own codes.
        concept: which of several labels.
        n: number of control features.
        most_correlated: largest |correlation| allowed.
        avoid: features to leave out.

    Raises:
        ValueError: for a feature that never fires, for labels of other tokens, for several without `concept`, and where
            there are too few such features.
    """
    feature = read_feature(feature, d_sae=store.d_sae)
    firings = store.statistics.fires.sum(1)
    if firings[feature] == 0:
        raise ValueError(f"`feature` must be one that fires, got {feature}, which never does.")
    if labels is None:
        target = _Column.of(store.feature(feature), len(store))
    else:
        target = _Column.mark(pick_marks(labels, concept).numpy(), len(store))
    live = np.flatnonzero(firings > 0)
    order = live[np.argsort(np.abs(np.log(firings[live] / firings[feature])), kind="stable")]
    found: list[int] = []
    for j in order.tolist():
        if len(found) == n:
            break
        if j != feature and j not in avoid and target.correlate(store.feature(j)) <= most_correlated:
            found.append(j)
    if len(found) < n:
        raise ValueError(
            f"`most_correlated` must leave {n} features, got {most_correlated}, which leaves {len(found)}; raise it."
        )
    return found


class _Column:
    """One number a token, to correlate sparse codes with."""

    def __init__(self, values: np.ndarray) -> None:
        self.values, self.sums = values, (float(values.sum()), float((values**2).sum()))

    @classmethod
    def of(cls, firings: Firings, n: int) -> "_Column":
        values = np.zeros(n)
        values[firings.indices] = firings.values
        return cls(values)

    @classmethod
    def mark(cls, labels: np.ndarray, n: int) -> "_Column":
        if labels.shape != (n,):
            raise ValueError(f"`labels` must have a mark for each of the {n} tokens, got shape {labels.shape}.")
        return cls(labels.astype(np.float64))

    def correlate(self, firings: Firings) -> float:
        """The larger |r| of the codes and of their magnitudes."""
        there, (x, xx), codes = self.values[firings.indices], self.sums, firings.values.astype(np.float64)
        both = (correlation_of_sums(len(self.values), x, z.sum(), xx, z @ z, there @ z) for z in (codes, np.abs(codes)))
        return max(abs(float(np.nan_to_num(r))) for r in both)


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
        z = self.sae.encode_latents(read, unique)[:, columns.to(self.sae.device)]
        taken = torch.where(z.sign() == torch.tensor(self.signs).to(z), z, 0)
        step = taken @ self.sae.directions()[list(self.features)].to(z) * self.sae.output_scale(read)
        return (flat - step.to(flat)).view_as(x)


@dataclass(frozen=True, eq=False)
class AffineErasure:
    """The affine edit `x' = x - ((x - center) read^T) write`; a projection where both are one orthonormal set."""

    center: Float[Tensor, "d_in"]
    read: Float[Tensor, "rank d_in"]
    write: Float[Tensor, "rank d_in"]

    def __call__(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_in"]:
        center, read, write = (part.to(x) for part in (self.center, self.read, self.write))
        return x - ((x - center) @ read.T) @ write


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
    sides = RankedSides.split(codes, np.ones(len(y), bool))
    labeled = Labeled(Columns(sides.matrix), y, np.arange(len(y)))
    effects = labeled.differences * sides.signs * pull[sides.features]
    order = np.argsort(-effects, kind="stable") if ranking == "effect" else labeled.order(ranking)
    good = effects > 0 if ranking == "effect" else labeled.differences > 0
    chosen = order[good[order]][:k]
    if len(chosen) < k:
        raise ValueError(f"`k` must be at most the number of sides that separate the concept ({len(chosen)}), got {k}.")
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
    sides = RankedSides.split(codes, np.ones(codes.shape[0], bool))
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
        vector = fit_direction(left, y, hook_point, method).vector
        for other in basis:
            vector = vector - (vector @ other) * other
        basis.append(vector / vector.norm())
        left = left - (left @ basis[-1])[:, None] * basis[-1]
    return project_out(torch.stack(basis), x[~y].mean(0) if to == "usual" else torch.zeros(x.shape[1]))


def project_out(basis: Float[Tensor, "rank d_in"], center: Float[Tensor, "d_in"]) -> AffineErasure:
    """The edit that removes the component along an orthonormal basis: projection on the plane through `center`."""
    return AffineErasure(center, basis, basis)


def draw_directions(like: AffineErasure, seed: int) -> AffineErasure:
    """The edit for equally many random directions about the same center, as a control."""
    drawn = torch.randn(like.read.shape[::-1], generator=torch.Generator().manual_seed(seed))
    return project_out(torch.linalg.qr(drawn).Q.T.contiguous(), like.center)


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

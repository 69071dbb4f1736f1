"""Baselines for a steered feature: directions fitted to labelled activations, and control features."""

from dataclasses import replace
from typing import Literal, SupportsIndex, get_args

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from saelab.functional.feature_ids import read_feature
from saelab.steering.directions import Direction
from saelab.stores.features import FeatureStore, Firings

Method = Literal["means", "probe", "pca", "kmeans"]


def find_direction(
    x: Float[Tensor, "n d_in"],
    y: Bool[Tensor, "n"],
    hook_point: str,
    method: Method = "means",
    *,
    name: str | None = None,
    seed: int = 0,
) -> Direction:
    """The direction that separates labelled activations, pointing to where the label is true.

        means    mean(x | y) - mean(x | not y)
        probe    weights of a logistic regression on x over its one scale, classes weighed alike (L2, C = 1)
        pca      first principal component about the midpoint of the two means, classes weighed alike
        kmeans   difference of two centroids (10 starts, drawn by `seed`)

    For "pca" and "kmeans" the label sets the sign alone: mean(x | y) lies further along the direction than mean(x | not
    y), as for all methods. `peak` is the largest |x . v| of the data. Source: arXiv:2310.15154.

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
    >>> find_direction(x, torch.tensor([True, False, True, False]), "blocks.0.hook_resid_post").vector
    tensor([1., 0.])
    """
    if method not in get_args(Method):
        raise ValueError(f"`method` must be one of {get_args(Method)}, got '{method}'.")
    if not (len(x) == len(y) and y.any() and not y.all()):
        raise ValueError(
            f"`y` must hold and not hold of some of the {len(x)} rows, got {len(y)} labels, {int(y.sum())} true."
        )
    x, y = x.detach().float().cpu(), y.cpu()
    apart = x[y].mean(0) - x[~y].mean(0)
    if not (apart != 0).any():
        raise ValueError("Activations must differ in their means where a label holds; theirs are the same.")
    vector = {"means": _subtract_means, "probe": _fit_probe, "pca": _find_component, "kmeans": _split_in_two}[method](
        x, y, seed
    )
    direction = Direction(vector if vector @ apart >= 0 else -vector, hook_point, name or method)
    return replace(direction, peak=float((x @ direction.vector).abs().max()))


def _subtract_means(x: Tensor, y: Tensor, _seed: int) -> Tensor:
    return x[y].mean(0) - x[~y].mean(0)


def _fit_probe(x: Tensor, y: Tensor, _seed: int) -> Tensor:
    """Weights of a logistic regression; one scale for all dimensions, so that the penalty does not rotate the
    direction.
    """
    from sklearn.linear_model import LogisticRegression

    centred = x - x.mean(0)
    scaled = centred / centred.square().mean().sqrt()
    probe = LogisticRegression(class_weight="balanced", solver="liblinear", max_iter=1000)
    return torch.from_numpy(probe.fit(scaled.numpy(), y.numpy()).coef_[0].astype(np.float32))


def _find_component(x: Tensor, y: Tensor, _seed: int) -> Tensor:
    x = x.double()
    centre = (x[y].mean(0) + x[~y].mean(0)) / 2
    parts = [(x[kind] - centre) / (2 * int(kind.sum())) ** 0.5 for kind in (y, ~y)]
    covariance = sum(part.T @ part for part in parts)
    assert isinstance(covariance, Tensor)
    return torch.linalg.eigh(covariance).eigenvectors[:, -1].float()


def _split_in_two(x: Tensor, _y: Tensor, seed: int) -> Tensor:
    from sklearn.cluster import KMeans

    centres = KMeans(2, n_init=10, random_state=seed).fit(x.numpy()).cluster_centers_
    return torch.from_numpy(centres[1] - centres[0]).float()


def find_rival(
    store: FeatureStore,
    feature: SupportsIndex,
    labels: Bool[np.ndarray, "n_tokens"] | None = None,
    *,
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
        labels: (n_tokens) the concept; None for the feature's own codes.
        n: number of control features.
        most_correlated: largest |correlation| allowed.
        avoid: features to leave out.

    Raises:
        ValueError: for a feature that never fires, and where there are too few such features.
    """
    feature = read_feature(feature, d_sae=store.d_sae)
    firings = store.statistics.fires.sum(1)
    if firings[feature] == 0:
        raise ValueError(f"`feature` must be one that fires, got {feature}, which never does.")
    target = _Column.of(store.feature(feature), len(store)) if labels is None else _Column.mark(labels, len(store))
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
        self.values = values - values.mean()
        self.size = float(np.sqrt((self.values**2).sum()))

    @classmethod
    def of(cls, firings: Firings, n: int) -> "_Column":
        values = np.zeros(n)
        values[firings.indices] = firings.values
        return cls(values)

    @classmethod
    def mark(cls, labels: np.ndarray, n: int) -> "_Column":
        if len(labels) != n:
            raise ValueError(f"`labels` must have a mark for each of the {n} tokens, got {len(labels)}.")
        return cls(labels.astype(np.float64))

    def correlate(self, firings: Firings) -> float:
        """The larger |r| of the codes and of their magnitudes."""
        there, n, found = self.values[firings.indices], len(self.values), [0.0]
        for z in (firings.values.astype(np.float64), np.abs(firings.values).astype(np.float64)):
            size = np.sqrt(max((z**2).sum() - z.sum() ** 2 / n, 0)) * self.size
            found.append(abs(float(there @ z)) / size if size > 0 else 0.0)
        return max(found)

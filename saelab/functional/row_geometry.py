"""Geometry of a set of vectors: entropy, curvature, intrinsic dimension, anisotropy, neighbors, and rank of classes.

All of it is computed in float64. A number of one set is hard to read by itself: it depends on how many rows there are,
and most numbers on the mean and on a few large dimensions. Compare sets of equal size.
"""

import math
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from saelab.functional.metrics import exact
from saelab.functional.screening import largest_first

N_STD = 3.0
RIDGE = 1e-4
"""Of LiDAR, as a share of the mean variance within classes."""
SAME = 1e-5
"""Distance, as a share of the largest row, up to which rows are one row: float32 rounds the same token of the same text
so far apart in two batches."""


def matrix_entropy(x: Float[Tensor, "n d"]) -> float:
    """Entropy of the spectrum of the rows' Gram matrix over that of a flat one: 0 for one direction, 1 for all alike.

    `-sum p log p / log min(n, d)`, p the eigenvalues of `x x^T` over their sum. Rows are not centered: a common mean is
    a direction of its own, and lowers it. Source: prompt entropy of arXiv:2502.02013. NaN for fewer than two rows or
    columns, and rows of zeros.

    >>> round(matrix_entropy(torch.eye(4)), 6), round(matrix_entropy(torch.ones(4, 4)), 6)
    (1.0, 0.0)
    """
    n = min(x.shape)
    shares = torch.linalg.svdvals(exact(x)).square()
    if n < 2 or not shares.sum() > 0:
        return math.nan
    return float(torch.special.entr(shares / shares.sum()).sum()) / math.log(n)


def curvature(x: Float[Tensor, "n d"]) -> float:
    """Mean angle between successive differences of the rows, in degrees: 0 for a straight line, 180 back and forth.

    120 for independent rows in many dimensions, as two successive differences share a row. Steps of no length have no
    angle and are left out; NaN where none is left. Source: arXiv:2311.04930.

    >>> round(curvature(torch.tensor([[0.0, 0.0], [1.0, 0.0], [1.0, 1.0]])), 6)
    90.0
    """
    steps = exact(x).diff(dim=0)
    lengths = steps.norm(dim=1)
    moved = lengths > SAME * exact(x).norm(dim=1).max().clamp(min=1e-300) if len(x) else lengths > 0
    both = moved[1:] & moved[:-1]
    cosines = (steps[1:] * steps[:-1]).sum(1)[both] / (lengths[1:] * lengths[:-1])[both]
    return float(cosines.clamp(-1, 1).arccos().rad2deg().mean())


def intrinsic_dimension(x: Float[Tensor, "n d"]) -> float:
    """Dimension of the set that the rows lie on, from the ratio of each row's second distance to its first (TwoNN).

        (n - 1) / sum log(r_2 / r_1)

    Maximum likelihood without bias, for rows whose density is even up to the second neighbor. Equal rows count once, as
    the same token at two places in an embedding, and would give a dimension of 0. It grows with the number of rows
    where there is noise, and is too low in more than about ten dimensions. Source: Facco et al. 2017, Scientific
    Reports 7, 12140. NaN for fewer than four different rows, or ones of which all are equally far apart.

    >>> flat = torch.rand(500, 2, generator=torch.Generator().manual_seed(0)) @ torch.eye(2, 9)
    >>> 1.7 < intrinsic_dimension(flat) < 2.3
    True
    """
    if len(x) < 4:
        return math.nan
    apart = _distances(x)
    different = ~(apart == 0).tril(-1).any(1)
    n = int(different.sum())
    if n < 4:
        return math.nan
    first, second = apart[different][:, different].topk(2, largest=False).values.unbind(1)
    total = float((second / first).log().sum())
    return (n - 1) / total if total > 1e-9 * n else math.nan


def mean_cosine(x: Float[Tensor, "n d"]) -> float:
    """Mean cosine of every two rows, -1 / (n - 1) to 1: anisotropy; NaN for fewer than two rows, or rows of zeros.

    A common mean, or one large dimension, makes it high by itself: compare that of centered rows.

    >>> mean_cosine(torch.eye(3)), round(mean_cosine(torch.eye(3) + 9), 2)
    (0.0, 1.0)
    """
    n = len(x)
    lengths = exact(x).norm(dim=1, keepdim=True)
    if n < 2 or not bool((lengths > 0).all()):
        return math.nan
    return float(((exact(x) / lengths).sum(0).square().sum() - n) / (n * (n - 1)))


def outlier_dimensions(x: Float[Tensor, "n d"], n_std: float = N_STD) -> Int[np.ndarray, "n_outliers"]:
    """Columns whose mean absolute value is more than `n_std` standard deviations above the mean of all columns.

    In a few columns there are none, as the largest of d is at most `sqrt(d - 1)` deviations above the mean. Source:
    arXiv:2105.06990, arXiv:2109.04404.

    >>> outlier_dimensions(torch.ones(5, 32) + 99 * torch.eye(32)[7]).tolist()
    [7]
    """
    sizes = exact(x).abs().mean(0)
    return np.flatnonzero((sizes > sizes.mean() + n_std * sizes.std(correction=0)).cpu().numpy())


def find_neighbors(x: Float[Tensor, "n d"], k: int) -> Int[Tensor, "n k"]:
    """The `k` rows nearest to each row, by Euclidean distance, the row itself left out; of equal ones the first.

    ValueError for fewer than k + 1 rows.

    >>> find_neighbors(torch.tensor([[0.0], [1.0], [3.0]]), 1).tolist()
    [[1], [0], [1]]
    """
    if not 1 <= k < len(x):
        raise ValueError(f"`k` must be in 1..{len(x) - 1}, one less than the rows, got {k}.")
    return largest_first(-_distances(x), k)


def shared_neighbors(a: Int[Tensor, "n k"], b: Int[Tensor, "n k"]) -> float:
    """Share of each row's neighbors in one set that are its neighbors in another, 0 to 1, mean over rows.

    Independent sets share k / (n - 1). Source: Doimo et al. 2020, arXiv:2007.03506.

    >>> shared_neighbors(torch.tensor([[1, 2], [0, 2]]), torch.tensor([[2, 3], [0, 2]]))
    0.75
    """
    return float((a[:, :, None] == b[:, None, :]).any(2).double().mean())


def lidar(x: Float[Tensor, "n_classes n_views d"], ridge: float = RIDGE) -> float:
    """Effective rank of what tells classes apart, measured in units of what varies within them; 1 to n_classes - 1.

        exp(-sum p log p),  p the eigenvalues of S_w^-1/2 S_b S_w^-1/2 over their sum

    S_b is the covariance of the classes' means, S_w that of the views around them, with `ridge` times its mean variance
    added. Directions that the views change much count little. Where there are fewer views than dimensions, S_w is the
    ridge in those that no view moves, and these dominate. Source: arXiv:2312.04000, whose ridge is 1e-4 whatever the
    scale. NaN for fewer than two classes or views, and means that are all equal.

    >>> views = torch.eye(5, 16)[:, None] + 0.01 * torch.randn(5, 9, 16, generator=torch.Generator().manual_seed(0))
    >>> 3.5 < lidar(views) <= 4
    True
    """
    n_classes, n_views, d = x.shape
    if n_classes < 2 or n_views < 2:
        return math.nan
    rows = exact(x)
    means = rows.mean(1)
    between, within = means - means.mean(0), (rows - means[:, None]).flatten(0, 1)
    # Outside of what the rows span, S_b is 0: both are taken within it, which is small where d is large.
    span = torch.linalg.svd(torch.cat([between, within]), full_matrices=False)
    basis = span.Vh[span.S / span.S.max().clamp(min=1e-300) > 1e-10]
    between, within = between @ basis.T, within @ basis.T
    noise = within.T @ within / (n_classes * (n_views - 1))
    values, axes = torch.linalg.eigh(noise)
    scale = (values.clamp(min=0) + ridge * values.clamp(min=0).sum() / d).clamp(min=1e-300).rsqrt()
    shares = torch.linalg.svdvals(between @ axes * scale).square()
    total = shares.sum()
    return float(torch.special.entr(shares / total).sum().exp()) if 0 < total < math.inf else math.nan


def permute_columns(x: Float[Tensor, "n d"], rng: "np.random.Generator") -> Float[Tensor, "n d"]:
    """Rows with the same covariance in which principal components do not depend on each other: a null for what more
    than the spectrum does.

    Each component's values are permuted by themselves.
    """
    rows = exact(x)
    mean = rows.mean(0)
    parts = torch.linalg.svd(rows - mean, full_matrices=False)
    order: Any = rng.permuted(np.tile(np.arange(len(rows)), (parts.U.shape[1], 1)), axis=1).T
    moved: Tensor = parts.U.gather(0, torch.from_numpy(np.ascontiguousarray(order)))
    made: Tensor = mean + moved * parts.S @ parts.Vh
    return made


def draw_rotation(d: int, rng: "np.random.Generator") -> Float[Tensor, "d d"]:
    """A random orthogonal matrix, all alike likely.

    >>> turn = draw_rotation(4, np.random.default_rng(0))
    >>> bool(torch.allclose(turn @ turn.T, torch.eye(4).double()))
    True
    """
    q, r = torch.linalg.qr(torch.from_numpy(rng.standard_normal((d, d))))
    turned: Tensor = q * r.diagonal().sign()
    return turned


def _distances(x: Float[Tensor, "n d"]) -> Float[Tensor, "n n"]:
    """Distances of every two rows, 0 for those that are one row, and infinite of a row from itself."""
    rows = exact(x)
    rows = rows - rows.mean(0)  # of squares that nearly cancel a product in float64 leaves distances of 1e-8
    found: Tensor = torch.cdist(rows, rows, compute_mode="use_mm_for_euclid_dist")
    found[found <= SAME * exact(x).norm(dim=1).max()] = 0
    return found.fill_diagonal_(math.inf)

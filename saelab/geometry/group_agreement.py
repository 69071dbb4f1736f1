"""How far groups of vectors are groups by direction: contrast of cosines, z of information, accuracy of prediction."""

import math
import warnings

import numpy as np
from jaxtyping import Int

from saelab.geometry.spectral_clusters import NormalizedVectors

REACHES = 0.5
"""share of a figure from which on a null that reaches it explains it away, and is told first"""
N_PERMUTED = 100  # of groups, for the z of their information
FEWEST = 10  # vectors of a group that is predicted
MOST_PREDICTED = 5000  # vectors that the prediction is fitted to and tried on
PENALTY = 0.01  # C of logistic regression, for standardized columns


def cosine_contrast(vectors: NormalizedVectors, groups: Int[np.ndarray, "n"]) -> tuple[float, float]:
    """Mean cosine of two vectors of a group less that of two of different groups, and its z.

    z is by the mean and the variance over all permutations of the groups, in closed form (Mantel 1967).
    """
    n, sizes = len(vectors), np.bincount(groups).astype(np.float64)
    member = np.eye(len(sizes))[groups]
    inside = float((member * vectors.times(member)).sum()) - n
    rest = vectors.times(np.ones((n, 1)))[:, 0] - 1  # of each vector with all others
    total = float(rest.sum())
    pairs = float((sizes * (sizes - 1)).sum())
    others = n * (n - 1) - pairs
    cosines = (total**2, vectors.squares - n, float((rest**2).sum()))
    same = (pairs**2, pairs, float((sizes * (sizes - 1) ** 2).sum()))
    (a1, a2, a3), (b1, b2, b3) = cosines, same
    two, three = n * (n - 1), n * (n - 1) * (n - 2)
    second = 2 * a2 * b2 / two + 4 * (a3 - a2) * (b3 - b2) / three
    second += (a1 - 4 * a3 + 2 * a2) * (b1 - 4 * b3 + 2 * b2) / (three * (n - 3))
    mean = total * pairs / two
    spread = math.sqrt(max(second - mean**2, 0.0))
    contrast = inside / max(pairs, 1) - (total - inside) / max(others, 1)
    return contrast, (inside - mean) / spread if spread > 0 else math.nan


def information_z(a: np.ndarray, b: np.ndarray, rng: "np.random.Generator") -> float:
    """z of the mutual information against permutations, in which it is AMI's up to a scale."""
    from sklearn.metrics import mutual_info_score

    null = [mutual_info_score(a, rng.permutation(b)) for _ in range(N_PERMUTED)]
    spread = float(np.std(null))
    return float(mutual_info_score(a, b) - np.mean(null)) / spread if spread > 0 else math.nan


def predict_groups(vectors: NormalizedVectors, groups: Int[np.ndarray, "n"], seed: int) -> float:
    """Balanced accuracy on a fifth of the vectors."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import balanced_accuracy_score
    from sklearn.model_selection import train_test_split

    kept = np.random.default_rng(seed).permutation(len(groups))[:MOST_PREDICTED]
    kept = kept[np.bincount(groups[kept], minlength=groups.max() + 1)[groups[kept]] >= FEWEST]
    y = groups[kept]
    if len(np.unique(y)) < 2:
        return math.nan
    x = np.asarray(vectors.columns[:, kept]).T * vectors.scales[kept, None]
    x = (x - x.mean(0)) / np.maximum(x.std(0), 1e-12)
    x, x_test, y, y_test = train_test_split(x, y, test_size=0.2, stratify=y, random_state=seed % 2**31)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        fitted = LogisticRegression(C=PENALTY, max_iter=200, class_weight="balanced").fit(x, y)
    return float(balanced_accuracy_score(y_test, fitted.predict(x_test)))

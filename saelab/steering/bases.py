"""Baseline classifiers of a label without an SAE: always yes, a linear probe on activations, the best single neuron."""

from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float

from saelab.steering.guesses import Told, choose_threshold, score_guess
from saelab.steering.labelled import draw_rows


def tell_always(rate: float) -> Told:
    """Scores of the classifier that always predicts true, for a label that is true of a share `rate` of tokens.

    >>> tell_always(0.5).f1, tell_always(0.5).balanced
    (0.6666666666666666, 0.5)
    """
    return Told(f1=2 * rate / (1 + rate), mcc=0.0, auroc=0.5, accuracy=rate, balanced=0.5, yes=1.0)


def tell_by_activations(
    x: Float[np.ndarray, "n d_in"],
    y: Bool[np.ndarray, "n"],
    is_train: Bool[np.ndarray, "n"],
    n_fit: int,
    seed: int,
) -> dict[str, Told]:
    """Held-out scores of two classifiers on activations: a logistic regression and the best single coordinate.

    They are named "activations" and "best neuron". The neuron is the coordinate whose class means differ most in
    standard deviations, with either sign. Decision thresholds are chosen on training tokens as in `probe_features`.

    Args:
        x: (n, d_in) activations of tokens.
        y: (n) whether the label is true of each.
        is_train: (n) tokens to fit on; the others are scored.
        n_fit: most training tokens of each class that both are fitted to.
        seed: draws them.
    """
    from sklearn.linear_model import LogisticRegression

    y_train = y[is_train]
    drawn = np.flatnonzero(is_train)[draw_rows(y_train, n_fit, seed) | draw_rows(~y_train, n_fit, seed)]
    centre, spread = x[drawn].mean(0, dtype=np.float64), x[drawn].std(0, dtype=np.float64)
    scale = np.where(spread > 0, spread, 1.0)
    z = ((x[drawn] - centre) / scale).astype(np.float64)
    apart = z[y[drawn]].mean(0) - z[~y[drawn]].mean(0)
    best = int(np.abs(apart).argmax())
    probe = LogisticRegression(class_weight="balanced", max_iter=1000, C=0.1).fit(z, y[drawn].astype(np.int64))
    weights = probe.coef_[0] / scale
    scores = {"activations": x @ weights.astype(x.dtype), "best neuron": x[:, best] * np.sign(apart[best])}
    return {
        name: score_guess(values[~is_train], y[~is_train], choose_threshold(values[is_train], y_train)[0])
        for name, values in scores.items()
    }


def read_rows(acts: Any, keep: Bool[np.ndarray, "n"]) -> Float[np.ndarray, "m d_in"]:
    """Activations of the tokens kept, float32; ValueError where `acts` does not have one row for each token."""
    if len(acts) != len(keep):
        raise ValueError(f"`acts` must have a row for each of the {len(keep)} tokens, got {len(acts)}.")
    rows = np.flatnonzero(keep)
    x = acts[rows] if isinstance(acts, np.ndarray) else acts[torch.from_numpy(rows)]
    return np.asarray(x.float().cpu() if isinstance(x, torch.Tensor) else x, np.float32)

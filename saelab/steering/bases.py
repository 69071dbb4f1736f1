"""What a label can be told by without a dictionary: all numbers of an activation, and the best single one of them."""

from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float

from saelab.steering.guesses import Told, choose_threshold, score_guess
from saelab.steering.labelled import draw_rows


def tell_always(rate: float) -> Told:
    """Saying yes always, of what is true of a share `rate` of tokens.

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
    """How well held-out labels are told by activations: by a logistic regression on all of them, and by one neuron.

    The neuron is the coordinate whose means differ most in standard deviations, either way up. Both are fitted to at
    most `n_fit` training tokens of each label; thresholds as those of `probe_features`.
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
    """The activations of the tokens that are kept; ValueError where there is not one row for each token."""
    if len(acts) != len(keep):
        raise ValueError(f"`acts` must have a row for each of the {len(keep)} tokens, got {len(acts)}.")
    rows = np.flatnonzero(keep)
    x = acts[rows] if isinstance(acts, np.ndarray) else acts[torch.from_numpy(rows)]
    return np.asarray(x.float().cpu() if isinstance(x, torch.Tensor) else x, np.float32)

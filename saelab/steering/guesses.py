"""How well scores tell a label."""

import math
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float


@dataclass(frozen=True, kw_only=True)
class Told:
    """How well a probe tells a label of held-out documents."""

    f1: float
    """[0, 1]; for what is rarely true, any guess that is mostly yes scores near 2 p / (1 + p)"""
    mcc: float
    """Matthews correlation, [-1, 1]; 0 is chance"""
    auroc: float
    """[0, 1]; 0.5 is chance"""


UNKNOWN = Told(f1=math.nan, mcc=math.nan, auroc=math.nan)


def score_guess(scores: Float[np.ndarray, "n"], y: Bool[np.ndarray, "n"], threshold: float) -> Told:
    """How well `score >= threshold` tells a label, and the scores' order.

    >>> score_guess(np.array([0.0, 1.0, 1.0]), np.array([False, True, False]), 1.0).auroc
    0.75
    """
    guess, n_true, n = scores >= threshold, int(y.sum()), len(y)
    hits, fires = int((guess & y).sum()), int(guess.sum())
    spread = math.sqrt(fires * (n - fires) * n_true * (n - n_true))
    return Told(
        f1=2 * hits / max(1, fires + n_true),
        mcc=(n * hits - fires * n_true) / spread if spread else 0.0,
        auroc=auroc(scores, y),
    )


def choose_threshold(scores: Float[np.ndarray, "n"], y: Bool[np.ndarray, "n"]) -> tuple[float, float]:
    """The threshold `score >= t` with the best F1, and that F1; equal scores are on one side of it.

    >>> choose_threshold(np.array([0.0, 0.0, 2.0, 1.0]), np.array([False, False, True, True]))
    (1.0, 1.0)
    """
    order = np.argsort(-scores, kind="stable")
    ordered, hits = scores[order], np.cumsum(y[order])
    f1 = 2 * hits / (np.arange(1, len(y) + 1) + hits[-1])
    last_of_equals = np.append(ordered[1:] < ordered[:-1], True)
    at = int(np.where(last_of_equals, f1, -1).argmax())
    return float(ordered[at]), float(f1[at])


def auroc(scores: Float[np.ndarray, "n"], y: Bool[np.ndarray, "n"]) -> float:
    """The chance that a true token scores above one that is not, equal scores half; 0.5 is chance."""
    from sklearn.metrics import roc_auc_score

    return float(roc_auc_score(y, scores))

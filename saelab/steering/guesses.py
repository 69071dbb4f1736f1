"""Metrics of binary classifiers: F1, MCC, AUROC, accuracy, and the choice of a decision threshold."""

import math
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float


@dataclass(frozen=True, kw_only=True)
class Told:
    """Held-out metrics of a binary classifier."""

    f1: float
    """[0, 1]; for a label with rate p, a classifier that mostly predicts true scores near 2 p / (1 + p)"""
    mcc: float
    """Matthews correlation, [-1, 1]; 0 is chance"""
    auroc: float
    """[0, 1]; 0.5 is chance"""
    accuracy: float
    """[0, 1]; always predicting the more frequent class scores `max(p, 1 - p)`"""
    balanced: float
    """balanced accuracy, the mean of the accuracies on true and on false tokens, [0, 1]; 0.5 is chance"""
    yes: float
    """share of tokens predicted true; 1 is a classifier that always predicts true, whatever its F1"""


UNKNOWN = Told(f1=math.nan, mcc=math.nan, auroc=math.nan, accuracy=math.nan, balanced=math.nan, yes=math.nan)


def score_guess(scores: Float[np.ndarray, "n"], y: Bool[np.ndarray, "n"], threshold: float) -> Told:
    """Metrics of the classifier `score >= threshold`; its AUROC is that of the scores.

    >>> score_guess(np.array([0.0, 1.0, 1.0]), np.array([False, True, False]), 1.0).auroc
    0.75
    """
    guess, n_true, n = scores >= threshold, int(y.sum()), len(y)
    hits, fires = int((guess & y).sum()), int(guess.sum())
    spread = math.sqrt(fires * (n - fires) * n_true * (n - n_true))
    quiet = n - fires - n_true + hits  # told right of what is not true
    return Told(
        f1=2 * hits / max(1, fires + n_true),
        mcc=(n * hits - fires * n_true) / spread if spread else 0.0,
        auroc=auroc(scores, y),
        accuracy=(hits + quiet) / max(1, n),
        balanced=(hits / max(1, n_true) + quiet / max(1, n - n_true)) / 2,
        yes=fires / max(1, n),
    )


def choose_threshold(scores: Float[np.ndarray, "n"], y: Bool[np.ndarray, "n"]) -> tuple[float, float]:
    """The threshold t of `score >= t` with the highest Cohen's kappa, and its F1; equal scores are on one side of it.

    F1 alone would favor always predicting true where scores are uninformative; kappa, the F1 above that of as many
    random predictions over the most that can be gained, is 0 for that.

    >>> choose_threshold(np.array([0.0, 0.0, 2.0, 1.0]), np.array([False, False, True, True]))
    (1.0, 1.0)
    """
    order = np.argsort(-scores, kind="stable")
    ordered, hits, fires = scores[order], np.cumsum(y[order]), np.arange(1, len(y) + 1)
    n_true, size = hits[-1], fires + hits[-1]
    f1, chance = 2 * hits / size, 2 * fires * (n_true / len(y)) / size
    last_of_equals = np.append(ordered[1:] < ordered[:-1], True)
    kappa = (f1 - chance) / np.maximum(1 - chance, 1e-12)
    at = int(np.where(last_of_equals, kappa, -np.inf).argmax())
    return float(ordered[at]), float(f1[at])


def auroc(scores: Float[np.ndarray, "n"], y: Bool[np.ndarray, "n"]) -> float:
    """The area under the ROC curve: P(score of a true row > score of a false one), ties counted half; 0.5 is chance."""
    from sklearn.metrics import roc_auc_score

    return float(roc_auc_score(y, scores))

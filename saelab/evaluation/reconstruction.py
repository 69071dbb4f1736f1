"""F1 of concepts predicted from codes: a concept is predicted where a feature with high precision for it fires."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Bool

from saelab.evaluation.levels import FRACTIONS, N_LEVELS, Levels
from saelab.evaluation.units import UnitCounts

if TYPE_CHECKING:
    from scipy.sparse import csr_matrix

PRECISION, MIN_FIRES = 0.95, 10


def reconstruct_truth(
    levels: Levels,
    held: Levels,
    counts: UnitCounts,
    truth: "csr_matrix",
    held_truth: "csr_matrix",
    scored: Bool[np.ndarray, "n_concepts"],
) -> dict[str, Any]:
    """Fields of `ConceptScores` on reconstruction: held-out F1 at the threshold with the best pooled F1 in training.

    Args:
        levels: quantized codes of training stories.
        held: quantized codes of held-out stories.
        counts: of units in training stories.
        truth: (n_tokens, n_concepts) of training stories.
        held_truth: (n_tokens, n_concepts) of held-out stories.
        scored: concepts that count; the others are left out.
    """
    from scipy.sparse import diags

    keep = diags(scored.astype(np.int32), dtype=np.int32)
    truth, held_truth = truth @ keep, held_truth @ keep
    truth.eliminate_zeros()
    held_truth.eliminate_zeros()
    precise = (counts.fires >= MIN_FIRES) & (counts.hits >= PRECISION * counts.fires) & scored[:, None]
    by_level: np.ndarray = precise.reshape(len(scored), -1, N_LEVELS)
    trained = [_pooled_f1(predicted, truth) for predicted in _predict(levels, by_level, range(N_LEVELS))]
    known = [i for i, f1 in enumerate(trained) if not math.isnan(f1)]
    best = max(known, key=lambda i: trained[i], default=0)
    predicted = _predict(held, by_level, [best])[0]
    return {
        "reconstruction": _pooled_f1(predicted, held_truth),
        "reconstruction_macro": _mean_f1(predicted, held_truth),
        "reconstruction_fraction": float(FRACTIONS[best]),
        "n_precise": int(by_level[..., best].any(0).sum()),
    }


def _predict(
    levels: Levels, precise: Bool[np.ndarray, "n_concepts n_sides n_levels"], chosen: Sequence[int]
) -> "list[csr_matrix]":
    """Predictions (n_tokens, n_concepts) for each chosen level: 1 where a precise feature fires above that level."""
    from scipy.sparse import csr_matrix

    n_tokens, useful = levels.table.shape[0], np.any(precise, axis=0)
    predicted = [csr_matrix((n_tokens, len(precise)), dtype=np.int32) for _ in chosen]
    for part, tokens, units in levels.blocks():
        sides, passed = np.divmod(units, N_LEVELS)
        mine = slice(2 * part.start, 2 * part.stop)
        for i, level in enumerate(chosen):
            there = np.flatnonzero((passed >= level) & useful[mine, level][sides])
            ones, shape = np.ones(len(there), np.int32), (n_tokens, mine.stop - mine.start)
            fired = csr_matrix((ones, (tokens[there], sides[there])), shape=shape)
            predicted[i] = predicted[i] + fired @ csr_matrix(precise[:, mine, level].T.astype(np.int32))
    for matrix in predicted:
        matrix.data[:] = 1
    return predicted


def _pooled_f1(predicted: "csr_matrix", truth: "csr_matrix") -> float:
    whole = predicted.nnz + truth.nnz
    return 2 * int(predicted.multiply(truth).sum()) / whole if whole else math.nan


def _mean_f1(predicted: "csr_matrix", truth: "csr_matrix") -> float:
    hits, both = (np.asarray(m.sum(1)).ravel() for m in (predicted.multiply(truth), predicted + truth))
    some = both.nonzero()[0]
    return float((2 * hits[some] / both[some]).mean()) if len(some) else math.nan

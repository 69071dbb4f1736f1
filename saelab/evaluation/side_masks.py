"""Sides of features with the tokens on which each is on, where its magnitude is above a quantile; and how they fit."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
from jaxtyping import Bool, Float, Int

from saelab.evaluation.feature_classifiers import BLOCK_ENTRIES, CodeMatrix, read_values
from saelab.stores.feature_store import FeatureStore

if TYPE_CHECKING:
    from scipy.sparse import csc_matrix, csr_matrix

Coded: TypeAlias = FeatureStore | CodeMatrix
"""A feature store, or codes or activations as `read_values` takes them."""


@dataclass(frozen=True, eq=False)
class SideMasks:
    """Some sides of features, and the tokens on which each is on."""

    features: Int[np.ndarray, "n_sides"]
    signs: Int[np.ndarray, "n_sides"]
    thresholds: Float[np.ndarray, "n_sides"]
    fires: Bool[np.ndarray, "n_sides"]
    """whether it fires in training documents at all"""
    on: "csr_matrix"
    """(n_sides, n_tokens) in int32"""


def mask_codes(
    codes: Coded, is_train: Bool[np.ndarray, "n_tokens"], quantile: float, name: str = "codes"
) -> Iterator[SideMasks]:
    """Both sides of all features in blocks, of which one is held at a time; a side is on above a quantile of tokens.

    Args:
        codes: a store, codes or activations.
        is_train: tokens that thresholds are chosen on.
        quantile: share of these on which a side is on, at most.
        name: what the codes are called in an error.
    """
    n = len(is_train)
    values = codes if isinstance(codes, FeatureStore) else read_values(codes)
    n_codes, n_features = (len(values), values.d_sae) if isinstance(values, FeatureStore) else values.shape
    if n_codes != n:
        raise ValueError(f"`{name}` must have a row for each of the {n} tokens of the labels, got {n_codes}.")
    if isinstance(values, np.ndarray):
        yield from mask_activations(lambda start, stop: values[:, start:stop], n_features, is_train, quantile)
        return
    by_column = values if isinstance(values, FeatureStore) else values.tocsc()
    n_entries = values.n_entries if isinstance(values, FeatureStore) else values.nnz
    width = max(1, BLOCK_ENTRIES * n_features // max(1, n_entries))
    for start in range(0, n_features, width):
        stop = min(start + width, n_features)
        own = by_column.columns(start, stop) if isinstance(by_column, FeatureStore) else by_column[:, start:stop]
        yield _mask_columns(own, start, is_train, quantile)


def _mask_columns(columns: "csc_matrix", first: int, is_train: np.ndarray, quantile: float) -> SideMasks:
    """Both sides of some columns of codes."""
    rows, values = columns.indices, columns.data
    features = np.repeat(np.arange(columns.shape[1]), np.diff(columns.indptr))
    sides, sizes = 2 * features + (values < 0), np.abs(values)
    n_sides, limit = 2 * columns.shape[1], math.floor(quantile * int(is_train.sum()))
    seen = np.flatnonzero(is_train[rows] & (sizes > 0))
    order = seen[np.lexsort((-sizes[seen], sides[seen]))]
    counts = np.bincount(sides[seen], minlength=n_sides)
    starts, thresholds = np.cumsum(counts) - counts, np.zeros(n_sides)
    full = counts > limit
    thresholds[full] = sizes[order[starts[full] + limit]]
    on = np.flatnonzero(sizes > thresholds[sides])
    return _make_masks(sides[on], rows[on], thresholds, counts > 0, first, len(is_train))


def mask_activations(
    read: Callable[[int, int], Float[np.ndarray, "n_tokens n"]],
    n_features: int,
    is_train: Bool[np.ndarray, "n_tokens"],
    quantile: float,
) -> Iterator[SideMasks]:
    """Both sides of dense columns in blocks; thresholds are not below 0.

    Args:
        read: function from the first column and the one after the last to these columns.
        n_features: number of columns.
        is_train: tokens that thresholds are chosen on.
        quantile: share of these on which a side is on, at most.
    """
    n, limit = len(is_train), math.floor(quantile * int(is_train.sum()))
    width = max(1, BLOCK_ENTRIES // n)
    for start in range(0, n_features, width):
        own = np.asarray(read(start, min(start + width, n_features)))
        thresholds, fires, sides, rows = np.zeros(2 * own.shape[1]), np.zeros(2 * own.shape[1], bool), [], []
        for j in range(own.shape[1]):
            column = np.ascontiguousarray(own[:, j])
            for side, sign in ((2 * j, 1), (2 * j + 1, -1)):
                train = sign * column[is_train]
                at = len(train) - 1 - limit
                thresholds[side], fires[side] = max(float(np.partition(train, at)[at]), 0.0), bool((train > 0).any())
                found = np.flatnonzero(sign * column > thresholds[side])
                sides.append(np.full(len(found), side))
                rows.append(found)
        yield _make_masks(np.concatenate(sides), np.concatenate(rows), thresholds, fires, start, n)


def _make_masks(
    sides: np.ndarray, rows: np.ndarray, thresholds: np.ndarray, fires: np.ndarray, first: int, n_tokens: int
) -> SideMasks:
    from scipy.sparse import csr_matrix

    on = csr_matrix((np.ones(len(rows), np.int32), (sides, rows)), shape=(len(thresholds), n_tokens))
    numbers = np.arange(len(thresholds))
    return SideMasks(first + numbers // 2, 1 - 2 * (numbers % 2), thresholds, fires, on)


@dataclass(frozen=True, eq=False)
class SideFits:
    """The best concept of each side and the best side of each concept, for one labeling."""

    features: Int[np.ndarray, "n_sides"]
    signs: Int[np.ndarray, "n_sides"]
    thresholds: Float[np.ndarray, "n_sides"]
    n_on: Int[np.ndarray, "n_sides"]
    fires: Bool[np.ndarray, "n_sides"]
    concept: Int[np.ndarray, "n_sides"]
    """-1 where the side is on for no token of a concept in training documents"""
    trained: Float[np.ndarray, "n_sides"]
    iou: Float[np.ndarray, "n_sides"]
    possible: Float[np.ndarray, "n_sides"]
    chance: Float[np.ndarray, "n_sides"]
    best_trained: Float[np.ndarray, "n_concepts"]
    best_side: Int[np.ndarray, "n_concepts"]
    """-1 where no side is on for any of its tokens"""
    best_iou: Float[np.ndarray, "n_concepts"]

    @classmethod
    def join(cls, parts: "Sequence[SideFits]") -> "SideFits":
        """The fits of all blocks; of equally good sides of a concept the first counts."""
        columns = {
            name: np.concatenate([getattr(part, name) for part in parts])
            for name in cls.__dataclass_fields__
            if not name.startswith("best_")
        }
        offsets = np.cumsum([0, *(len(part.features) for part in parts[:-1])])
        trained = np.stack([part.best_trained for part in parts])
        at, concepts = trained.argmax(0), np.arange(trained.shape[1])
        sides = np.stack([np.where(p.best_side < 0, -1, p.best_side + o) for p, o in zip(parts, offsets, strict=True)])
        held = np.stack([part.best_iou for part in parts])
        best = {"best_trained": trained, "best_side": sides, "best_iou": held}
        return cls(**columns, **{name: table[at, concepts] for name, table in best.items()})


def fit_sides(
    blocks: Iterator[SideMasks], truths: "Sequence[csr_matrix]", is_train: Bool[np.ndarray, "n_tokens"]
) -> list[SideFits]:
    """How sides and concepts fit, for each labeling: chosen on training tokens, scored on the others.

    Args:
        blocks: the sides.
        truths: labelings, (n_tokens, n_concepts) in int32.
        is_train: tokens that are chosen on.
    """
    from scipy.sparse import diags

    halves = [rows.astype(np.int32) for rows in (is_train, ~is_train)]
    split = [[diags(rows, dtype=np.int32) @ truth for rows in halves] for truth in truths]
    n_true = [[np.asarray(part.sum(0)).ravel() for part in parts] for parts in split]
    found: list[list[SideFits]] = [[] for _ in truths]
    for block in blocks:
        n_on = [np.asarray(block.on @ rows).ravel() for rows in halves]
        for fits, parts, sizes in zip(found, split, n_true, strict=True):
            hits = [(block.on @ part).toarray() for part in parts]
            fits.append(_fit(block, hits, n_on, sizes, int((~is_train).sum())))
    return [SideFits.join(fits) for fits in found]


def _fit(
    block: SideMasks, hits: list[np.ndarray], n_on: list[np.ndarray], n_true: list[np.ndarray], n: int
) -> SideFits:
    trained, held = (
        inside / np.maximum(on[:, None] + true[None] - inside, 1)
        for inside, on, true in zip(hits, n_on, n_true, strict=True)
    )
    sides, concept = np.arange(len(trained)), trained.argmax(1)
    on, true = n_on[1].astype(np.float64), n_true[1][concept].astype(np.float64)
    hit = on * true / n
    best = trained.argmax(0)
    none = trained.max(0, initial=0) == 0
    return SideFits(
        features=block.features,
        signs=block.signs,
        thresholds=block.thresholds,
        n_on=n_on[1],
        fires=block.fires,
        concept=np.where(trained.max(1) > 0, concept, -1),
        trained=trained.max(1),
        iou=np.where(trained.max(1) > 0, held[sides, concept], 0.0),
        possible=np.minimum(on, true) / np.maximum(np.maximum(on, true), 1),
        chance=hit / np.maximum(on + true - hit, 1e-12),
        best_trained=trained.max(0),
        best_side=np.where(none, -1, best),
        best_iou=np.where(none, 0.0, held[best, np.arange(len(best))]),
    )

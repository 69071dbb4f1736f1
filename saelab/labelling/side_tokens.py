"""Additional predicates: tokens that predict single feature sides, however rare they are."""

from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Bool, Integer

from saelab.labelling.contingency import feature_blocks
from saelab.labelling.families import one_of_each
from saelab.labelling.predicates import Predicates
from saelab.labelling.views import TokenView
from saelab.stores.features import FeatureStore

if TYPE_CHECKING:
    pass

LEVELS = (0.0, 0.4, 0.7)
"""Shares of a side's largest |z| at which tokens are compared with it."""
LEAST_F1 = 0.5
"""Smallest F1 with which a token becomes a predicate."""


def add_side_tokens(store: FeatureStore, predicates: Predicates, is_train: Bool[np.ndarray, "n_tokens"]) -> Predicates:
    """The predicates, with one more for each token that predicts some feature side in training documents.

    Tokens count from F1 0.5 on. Predicates without any of kind "token" are returned unchanged, as they were selected by
    the caller.
    """
    if not predicates.family("token"):
        return predicates
    from scipy.sparse import csr_matrix, hstack

    wanted = find_side_tokens(store, is_train)
    names, numbers = one_of_each(TokenView(store.text), "token", len(store.text))
    here = numbers[store.places]
    told = np.unique(here[np.isin(store.token_ids, wanted)])
    new = np.array([j for j in told.tolist() if names[j] not in predicates.places], np.int64)
    if len(new) == 0:
        return predicates
    columns = np.full(len(names), -1)
    columns[new] = np.arange(len(new))
    rows = np.flatnonzero(columns[here] >= 0)
    added = csr_matrix((np.ones(len(rows), bool), (rows, columns[here[rows]])), shape=(len(store), len(new)))
    return Predicates(
        hstack([predicates.matrix, added], format="csr"),
        predicates.names + tuple(names[j] for j in new.tolist()),
        predicates.kinds + ("token",) * len(new),
    )


def find_side_tokens(store: FeatureStore, is_train: Bool[np.ndarray, "n_tokens"]) -> Integer[np.ndarray, "n"]:
    """The tokens that best predict some side of some feature in training documents."""
    ids, numbers = np.unique(store.token_ids, return_inverse=True)
    holds = np.bincount(numbers[is_train], minlength=len(ids))
    found = np.zeros(len(ids), bool)
    for start, stop in feature_blocks(store):
        columns = store.columns(start, stop)
        kept = is_train[columns.indices]
        feature = np.repeat(np.arange(stop - start), np.diff(columns.indptr))[kept]
        codes, tokens = columns.data[kept], numbers[columns.indices[kept]]
        unit, sizes = 2 * feature + (codes < 0), np.abs(codes)
        peaks = np.zeros(2 * (stop - start), sizes.dtype)
        np.maximum.at(peaks, unit, sizes)
        for level in LEVELS:
            here = sizes >= level * peaks[unit]
            found[_best_tokens(unit[here], tokens[here], holds)] = True
    return ids[found]


def _best_tokens(unit: np.ndarray, tokens: np.ndarray, holds: np.ndarray) -> np.ndarray:
    """The best token of each side, where its F1 is large enough."""
    pairs, both = np.unique(unit.astype(np.int64) * len(holds) + tokens, return_counts=True)
    units, which = pairs // len(holds), pairs % len(holds)
    f1 = 2 * both / (np.bincount(unit)[units] + holds[which])
    order = np.lexsort((-f1, units))
    first = order[np.append(True, np.diff(units[order]) != 0)[: len(order)]]
    return which[first[f1[first] >= LEAST_F1]]

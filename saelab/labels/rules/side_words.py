"""Words as predicates where they tell the documents on which a side of a feature fires, however rare they are."""

from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Bool, Int

from saelab.functional.indices import ROWS_AT_ONCE
from saelab.labels.rules.contingency import LEAST_F1, LEVELS, feature_blocks, one_ahead, read_columns
from saelab.labels.rules.predicates import WORD, Predicates
from saelab.stores.feature_store import FeatureStore
from saelab.training.ranks import ALONE, RankGrid, Steps, run_together

if TYPE_CHECKING:
    from scipy.sparse import csc_matrix, csr_matrix


def add_side_words(
    store: FeatureStore, predicates: Predicates, is_train: Bool[np.ndarray, "n_documents"], ranks: RankGrid = ALONE
) -> Predicates:
    """The predicates of documents, with one more for each word that predicts some feature side in training documents.

    Words count from F1 0.5 on. Predicates without any of kind "document word" are returned unchanged, as they were
    selected by the caller.

    Args:
        store: feature store of documents.
        predicates: conditions on them.
        is_train: which documents are for training.
        ranks: processes, each of which looks at a share of the features; all get the same predicates.
    """
    if not predicates.family(WORD):
        return predicates
    from scipy.sparse import hstack

    ids, words = _read_words(store)
    names = [f"the word {store.text.strings.get(i, str(i)).strip().casefold()!r}" for i in ids.tolist()]
    wanted = _find_words(store, words, is_train, ranks).tolist()
    new = [j for j in wanted if names[j] not in predicates.places and words[:, [j]].nnz < len(store)]
    if not new:
        return predicates
    return Predicates(
        hstack([predicates.matrix, words[:, new].astype(bool)], format="csr"),
        predicates.names + tuple(names[j] for j in new),
        predicates.kinds + (WORD,) * len(new),
        predicates.left_out,
    )


def _read_words(store: FeatureStore) -> "tuple[Int[np.ndarray, 'n'], csr_matrix]":
    """Token ids of all words, and (n_documents, n_words) which documents hold each."""
    from scipy.sparse import csr_matrix

    parts = []
    for start in range(0, len(store), ROWS_AT_ONCE):
        rows, found = store.words.read(start, start + ROWS_AT_ONCE)
        parts.append((rows + start, found))
    rows, found = (np.concatenate(column) for column in zip(*parts, strict=True))
    ids, columns = np.unique(found, return_inverse=True)
    ones = np.ones(len(rows), np.float32)
    return ids, csr_matrix((ones, (rows, columns)), shape=(len(store), len(ids)))


def _find_words(
    store: FeatureStore, words: "csr_matrix", is_train: Bool[np.ndarray, "n_documents"], ranks: RankGrid
) -> Int[np.ndarray, "n"]:
    """The words that best predict some side of some feature at some level, found by several processes."""
    holds = np.asarray(words[np.flatnonzero(is_train)].sum(0)).ravel()
    found = np.zeros(words.shape[1], bool)

    def read(block: tuple[int, int]) -> "csc_matrix | None":
        features = np.arange(*block)
        features = features[features % ranks.size == ranks.index]
        return read_columns(store, features) if len(features) else None

    def search() -> Steps:
        for columns in one_ahead(read, feature_blocks(store)):
            for sign in (1, -1) if columns is not None else ():
                found[_best_words(columns, sign, is_train, words, holds)] = True
            yield

    run_together(search(), ranks)
    return np.unique(np.concatenate(ranks.gather_arrays(np.flatnonzero(found))))


def _best_words(
    columns: "csc_matrix", sign: int, is_train: np.ndarray, words: "csr_matrix", holds: np.ndarray
) -> Int[np.ndarray, "n"]:
    """The best word of one side of each feature at each level, where its F1 is large enough."""
    sides = columns.copy()
    sides.data = np.maximum(sign * sides.data, 0) * is_train[sides.indices]
    peaks = sides.max(0).toarray().ravel()
    chosen = [np.zeros(0, np.int64)]
    for level in LEVELS:
        fires = sides.copy()
        low = np.repeat(level * peaks, np.diff(fires.indptr))
        fires.data = ((sides.data > 0) & (sides.data >= low)).astype(np.float32)
        fires.eliminate_zeros()
        both = (fires.T @ words).tocsr()
        own = np.repeat(np.arange(both.shape[0]), np.diff(both.indptr))
        f1 = 2 * both.data / (np.diff(fires.indptr)[own] + holds[both.indices])
        order = np.lexsort((-f1, own))
        first = order[np.append(True, np.diff(own[order]) != 0)[: len(order)]]
        chosen.append(both.indices[first[f1[first] >= LEAST_F1]].astype(np.int64))
    return np.unique(np.concatenate(chosen))

"""The tokens on which features fire most often, and the words that mark off the documents on which they fire."""

import numpy as np
from jaxtyping import Int, Integer, Shaped

from saelab.stores.feature_store import FeatureStore, Firings

DENSE_IDS = 16
"""Token ids are counted in a table of at most so many times their number."""
MANY_DOCUMENTS, N_MARKS = 2**14, 4
"""Documents whose words are counted, of more evenly spaced ones; and words that mark off documents."""


def top_words(store: FeatureStore, firings: Firings, n: int = 10) -> list[tuple[str, float]]:
    """The tokens on which a feature fires most often, each with its share of the firings; of documents, the words that
    mark off those on which it fires, each with the share that holds it.
    """
    if len(firings) == 0:
        return []
    rows = firings.indices
    if store.of_documents and len(rows) > MANY_DOCUMENTS:
        rows = rows[np.linspace(0, len(rows) - 1, MANY_DOCUMENTS).astype(np.int64)]
    return [(name_token(store, i), count / len(rows)) for i, count in rank_tokens(store, rows, n)]


def rank_tokens(store: FeatureStore, rows: Integer[np.ndarray, "n_rows"], n: int) -> list[tuple[int, int]]:
    """The most frequent token ids of some rows, each with its count; of equally frequent ones the lowest comes first.

    Of documents, words are ranked by how much they mark off these from all: p log(p / q) for a word in a share p of
    these and q of all, its part of the Kullback-Leibler divergence.

    Args:
        store: feature store with the text.
        rows: rows of the store, in ascending order.
        n: token ids to return.
    """
    ids, counts = count_ids(store.words.at(rows)[1])
    order = np.argsort(-weigh_words(store, ids, counts, len(rows)), kind="stable")[:n]
    return list(zip(ids[order].tolist(), counts[order].tolist(), strict=True))


def weigh_words(
    store: FeatureStore,
    ids: Integer[np.ndarray, "n"],
    counts: Int[np.ndarray, "n"],
    n_rows: int | Int[np.ndarray, "n"],
) -> Shaped[np.ndarray, "n"]:
    """What tokens are ranked by: their counts among `n_rows` rows; of documents p log(p / q), as `rank_tokens` has it.

    Args:
        store: feature store with the text.
        ids: token ids.
        counts: number of the rows that have each.
        n_rows: number of rows.
    """
    if not store.of_documents:
        return counts
    p, q = counts / np.maximum(1, n_rows), np.array(store.count_tokens(ids.tolist())) / len(store)
    return p * np.log(p / q)


def count_ids(ids: Integer[np.ndarray, "n"]) -> tuple[Integer[np.ndarray, "m"], Int[np.ndarray, "m"]]:
    """The distinct ids in ascending order and how often each occurs: `np.unique`, faster where there are many.

    >>> [found.tolist() for found in count_ids(np.array([7, 5, 7]))]
    [[5, 7], [1, 2]]
    """
    if int(ids.max(initial=0)) > DENSE_IDS * len(ids):
        return np.unique(ids, return_counts=True)
    counts = np.bincount(ids)
    present = np.flatnonzero(counts)
    return present, counts[present]


def find_centers(store: FeatureStore, rows: Integer[np.ndarray, "n"]) -> list[int]:
    """The token ids of some rows, in ascending order; of documents, those of the words that mark them off."""
    if store.of_documents:
        return sorted(i for i, _ in rank_tokens(store, rows, N_MARKS))
    return np.unique(store.tokens_at(rows)).tolist()


def name_token(store: FeatureStore, token_id: int) -> str:
    """The text of a token id in a store, such as " the"; `<7>` where it has none."""
    return store.text.strings.get(token_id, f"<{token_id}>")


def count_top_tokens(store: FeatureStore, start: int, stop: int, n: int = 10) -> Int[np.ndarray, "n_features n"]:
    """Ids of the tokens on which each of the features `start:stop` fires most often, as `top_words` ranks them.

    The store is read shard by shard; only the counts of these features' tokens are held.

    Args:
        store: feature store to read.
        start: first feature.
        stop: feature after the last.
        n: tokens of each feature; -1 where there are fewer.
    """
    keys, counts = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
    for offsets, ids in store.firing_tokens(start, stop):
        own = np.repeat(np.arange(stop - start, dtype=np.int64), np.diff(offsets)) << 32 | ids
        found = np.unique(own, return_counts=True)
        keys.append(found[0])
        counts.append(found[1])
    pairs, places = np.unique(np.concatenate(keys), return_inverse=True)
    n_fires = np.bincount(places, np.concatenate(counts), len(pairs)).astype(np.int64)
    features = pairs >> 32
    weights = weigh_words(store, pairs & 0xFFFFFFFF, n_fires, store.statistics.fires[start:stop].sum(1)[features])
    order = np.lexsort((-weights, features))  # stable: of equal counts the lowest id comes first
    ranks = np.arange(len(order)) - np.searchsorted(features, features)  # rows of a feature stay together
    tops = np.full((stop - start, n), -1)
    kept = ranks < n
    tops[features[kept], ranks[kept]] = (pairs & 0xFFFFFFFF)[order][kept]
    return tops

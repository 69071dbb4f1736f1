"""Table of a store's features: firing density, counts and sizes by sign, and most frequent tokens."""

from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

import numpy as np

from saelab.analyses.contexts import top_words
from saelab.stores.features import FeatureStore
from saelab.stores.results import Result, align_columns

COLUMNS = ("feature", "density", "n_positive", "n_negative", "balance", "mean", "peak")


@dataclass(frozen=True, kw_only=True)
class FeatureTable(Result):
    """A table of features and the number of tokens it was measured on; `pandas.DataFrame(table.rows)` converts it."""

    n_tokens: int
    d_sae: int
    sort: str
    rows: tuple[dict[str, Any], ...]
    """one per feature, with density, the share of tokens on which it fires; n_positive and n_negative, its firings by
    sign; balance, the share of the less frequent sign among them, 0 to 0.5, NaN without firings; mean and peak |z| over
    firings; words, the three tokens with most firings"""

    def __str__(self) -> str:
        lines = [f"{len(self.rows):,} of {self.d_sae:,} features on {self.n_tokens:,} tokens, by {self.sort}"]
        table = [["feature", "density", "+", "-", "balance", "mean", "peak", "words"]]
        for row in self.rows:
            counts = f"{row['n_positive']:,}", f"{row['n_negative']:,}", f"{row['balance']:.2f}"
            sizes = f"{row['mean']:.3g}", f"{row['peak']:.3g}"
            words = "  ".join(repr(word) for word in row["words"])
            table.append([str(row["feature"]), f"{row['density']:.2e}", *counts, *sizes, words])
        return "\n".join([*lines, *align_columns(table, left=(len(table[0]) - 1,))])


def list_features(
    store: FeatureStore, *, sort: str = "density", top: int | None = 20, descending: bool = True
) -> FeatureTable:
    """The first `top` features sorted by one column of the table; equal values by feature number, NaN last.

    Args:
        store: feature store that is summarized.
        sort: column to sort by: feature, density, n_positive, n_negative, balance, mean or peak.
        top: number of rows; None returns all features.
        descending: True puts the largest values first.

    Raises:
        ValueError: the column does not exist, or `top` is below 1.
    """
    if sort not in COLUMNS:
        near = get_close_matches(sort, COLUMNS, n=5) or list(COLUMNS[:5])
        raise ValueError(f"`sort` must be a column, got '{sort}'. Did you mean one of {near}?")
    if top is not None and top < 1:
        raise ValueError(f"`top` must be at least 1, or None for all, got {top}.")
    columns = _measure(store)
    keys = -columns[sort] if descending else columns[sort]
    order = np.argsort(keys, kind="stable")[:top].tolist()  # NaN sorts last either way
    rows = tuple({name: columns[name][j].item() for name in COLUMNS} | {"words": _words(store, j)} for j in order)
    return FeatureTable(n_tokens=len(store), d_sae=store.d_sae, sort=sort, rows=rows)


def _measure(store: FeatureStore) -> dict[str, np.ndarray]:
    seen = store.statistics
    fires = seen.fires.sum(1)
    with np.errstate(invalid="ignore"):
        balance, mean = seen.fires.min(1) / fires, seen.sums.sum(1) / fires
    values = (
        np.arange(store.d_sae), fires / len(store), seen.fires[:, 0], seen.fires[:, 1], balance, mean, seen.peaks.max(1)
    )  # fmt: skip
    return dict(zip(COLUMNS, values, strict=True))


def _words(store: FeatureStore, feature: int) -> list[str]:
    return [word for word, _ in top_words(store, store.feature(feature), 3)]

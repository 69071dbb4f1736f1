"""`list_features`: the features of a store as a table: how often, how strongly, with which sign and on which words."""

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
    """Rows of features, with how many tokens they rest on; `pandas.DataFrame(table.rows)` takes it as it is."""

    n_tokens: int
    d_sae: int
    sort: str
    rows: tuple[dict[str, Any], ...]
    """by feature: density, the share of tokens on which it fires; n_positive and n_negative firings; balance, the
    lesser sign's share of them, 0 to 0.5, NaN without firings; mean and peak |z| over firings; words, the three that
    carry most firings"""

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
    """The first `top` features by a column (all of them with None), ties by number; NaN comes last.

    ValueError for a column that does not exist and for fewer than one row.
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

"""Table of the most similar universal pairs, with each feature's label and most frequent tokens."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from saelab.labelling.book import LabelBook
from saelab.labelling.wording import join_texts
from saelab.stores.features import FeatureStore
from saelab.stores.results import Result, align_columns
from saelab.universality.matches import Comparison
from saelab.universality.partners import Matches

N_WORDS = 3
SIGNS = {1: "+", -1: "-"}
FAINT = 0.1
"""a sign with a smaller share of |z| is not shown"""
CLEAR = 0.05
"""above this p, the value is shown as it is, without a "<" before it"""


@dataclass(frozen=True, kw_only=True)
class UniversalTable(Result):
    """A table of universal pairs, the most similar first; `pandas.DataFrame(table.rows)` converts it."""

    similarity: str
    n_pairs: int
    """number of universal pairs, of which the rows are the first"""
    rows: tuple[dict[str, Any], ...]
    """one per pair, with a and b, the features; side_a and side_b, 1 or -1 where sides were compared, else 0;
    similarity with its sign; n_both, rows on which both fire, -1 for directions; p and q, the larger of both features;
    p_text, with < where no null value was so large; label_a and label_b, empty where there is none; words_a and
    words_b, by sign the tokens with the largest shares of the sum of |z|"""

    def __str__(self) -> str:
        lines = [f"{len(self.rows):,} of {self.n_pairs:,} universal pairs by {self.similarity}"]
        table = [["a", "b", "similar", "p", "both", "what they fire on"]]
        for row in self.rows:
            said = [" ".join(filter(None, (row[f"label_{x}"], tell_words(row[f"words_{x}"])))) for x in "ab"]
            table.append([*map(str, self.cells(row)), f"{said[0]} | {said[1]}"])
        return "\n".join([*lines, *align_columns(table, left=(5,))])

    @staticmethod
    def cells(row: dict[str, Any]) -> tuple[str, str, str, str, str]:
        """Features, similarity, p and number of common rows of a table row, as text."""
        a, b = (f"{row[x]}{SIGNS.get(row[f'side_{x}'], '')}" for x in "ab")
        both = "-" if row["n_both"] < 0 else f"{row['n_both']:,}"
        return a, b, f"{row['similarity']:+.3f}", row["p_text"], both


def list_universal(
    comparison: Comparison, store_a: FeatureStore, store_b: FeatureStore, *, top: int | None = 20
) -> UniversalTable:
    """A table of the first `top` universal pairs by size of similarity, with the labels of the features.

    The pairs are each other's best and universal on both sides; labels are the chosen ones of the stores' label
    databases.

    Args:
        comparison: result of `compare`.
        store_a: the first store compared or, where directions were compared, a store of the same SAE.
        store_b: the second, likewise.
        top: number of pairs; None lists all.

    Raises:
        ValueError: the stores are not those of the comparison, or `top` is below 1.
    """
    check_stores(comparison, store_a, store_b)
    if top is not None and top < 1:
        raise ValueError(f"`top` must be at least 1, or None for all, got {top}.")
    with LabelBook.open(store_a) as book_a, LabelBook.open(store_b) as book_b:
        rows = tuple(
            _describe(comparison, pair, (store_a, store_b), (book_a, book_b))
            for pair in comparison.universal_pairs[:top].tolist()
        )
    return UniversalTable(similarity=comparison.similarity, n_pairs=len(comparison.universal_pairs), rows=rows)


def check_stores(comparison: Comparison, store_a: FeatureStore, store_b: FeatureStore) -> None:
    """Check that two stores are those of a comparison, by widths and firing counts; ValueError where they are not."""
    for name, side, store in (("a", comparison.a, store_a), ("b", comparison.b, store_b)):
        width = len(side.fires) // (2 if comparison.sides else 1)
        if store.d_sae != width:
            raise ValueError(
                f"`store_{name}` must be of the {width} features compared as {name}, got {store.d_sae}; give those "
                "that were compared, in their order."
            )
        counted = comparison.n_rows is not None and (name == "a" or not comparison.alignment)  # rows of the store
        fires = store.statistics.fires
        if counted and (side.fires > (fires.ravel() if comparison.sides else fires.sum(1))).any():
            raise ValueError(
                f"`store_{name}` must be the one compared as {name}, got one in which features fire less often; give "
                "those that were compared, in their order."
            )


def split_side(comparison: Comparison, number: int) -> tuple[int, int]:
    """The feature that a number of the comparison stands for, and its side: 1 or -1, or 0 where sides were not
    compared.
    """
    return (number // 2, 1 - 2 * (number % 2)) if comparison.sides else (number, 0)


def tell_p(side: Matches, number: int) -> str:
    """p of a feature as text, such as "< 1/1,025" where none of 1,024 null values is as large.

    The lowest p of one side is 1 / (n + 1), with an n that is about the same for rare and frequent features.
    """
    p, lowest = float(side.p[number]), float(side.p.min())
    n = round(1 / p)
    return f"< 1/{n:,}" if p < min(CLEAR, 2 * lowest) and abs(n * p - 1) < 1e-9 else f"{p:.2g}"


def tell_words(words: dict[str, list[str]]) -> str:
    """Tokens by sign as one line of text; the sign is left out where there is only +."""
    plain = list(words) == ["+"]
    return "  ".join(("" if plain else f"{sign} ") + " ".join(map(repr, some)) for sign, some in words.items())


def _describe(
    comparison: Comparison,
    pair: list[int],
    stores: tuple[FeatureStore, FeatureStore],
    books: tuple[LabelBook, LabelBook],
) -> dict[str, Any]:
    sides = comparison.a, comparison.b
    weaker = int(sides[1].p[pair[1]] > sides[0].p[pair[0]])
    row: dict[str, Any] = {
        "similarity": float(sides[0].similarity[pair[0]]),
        "n_both": int(sides[0].n_both[pair[0]]),
        "p": float(sides[weaker].p[pair[weaker]]),
        "q": max(float(side.q[j]) for side, j in zip(sides, pair, strict=True)),
        "p_text": tell_p(sides[weaker], pair[weaker]),
    }
    for name, number, store, book in zip("ab", pair, stores, books, strict=True):
        feature, sign = split_side(comparison, number)
        chosen = book.chosen(feature)
        labels = [label for label in chosen if label.sign == sign] or chosen if sign else chosen
        found = {"": feature, "side": sign, "label": join_texts(labels), "words": _words(store, feature, sign)}
        row |= {f"{key}_{name}".lstrip("_"): value for key, value in found.items()}
    return row


def _words(store: FeatureStore, feature: int, side: int) -> dict[str, list[str]]:
    """By sign the tokens with most of the sum of |z|: of one side, or of each side with a tenth of it or more."""
    at = store.feature(feature)
    ids, sums = store.token_ids[at.indices], np.abs(at.values.astype(np.float64))
    words = {}
    for sign in (side,) if side else (1, -1):
        kept = at.values * sign > 0
        if sums[kept].sum() > (0 if side else FAINT * sums.sum()):
            known, place = np.unique(ids[kept], return_inverse=True)
            order = np.argsort(-np.bincount(place, sums[kept]), kind="stable")[:N_WORDS]
            words[SIGNS[sign]] = [store.text.strings.get(int(i), f"<{i}>") for i in known[order]]
    return words

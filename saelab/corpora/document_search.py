"""`rank_documents`: documents of a corpus by the features that they are to have, given by number or by their labels."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

from saelab.corpora.document_features import DocumentFeatures, Documents, SideId, as_documents
from saelab.labels.text_search import rank_texts
from saelab.stores.feature_names import FeatureNames, name_sides, require_names
from saelab.stores.results import Result, format_table

SideWeights: TypeAlias = Mapping[SideId, float] | Mapping[int, float] | Mapping[tuple[int, int], float]
"""weights by feature, or by feature and sign"""
N_LABELS = 8
"""most features that a query in words stands for"""
SHOWN = 10


@dataclass(frozen=True, kw_only=True)
class FoundDocument:
    """A document that has the features asked for."""

    row: int
    """row of the documents that were searched"""
    doc_id: int
    """its number in the store"""
    score: float
    """sum of the weighted shares of each feature, see `rank_documents`"""
    features: tuple[int, ...]
    """features asked for that fire in it"""
    text: str
    """how it begins"""


@dataclass(frozen=True, kw_only=True)
class DocumentRanking(Result):
    """Documents by how much they have of the features asked for, best first."""

    n_documents: int
    """documents searched"""
    wanted: tuple[tuple[int, int, float, str], ...]
    """feature, sign, weight and name of each side asked for"""
    rows: tuple[FoundDocument, ...]

    def __str__(self) -> str:
        asked = ", ".join(
            f"{weight:+g} x {feature}{'' if sign > 0 else ' -'}{f' ({name})' if name else ''}"
            for feature, sign, weight, name in self.wanted
        )
        lines = [f"{len(self.rows):,} of {self.n_documents:,} documents by {asked or 'no feature'}"]
        table = [["document", "score", "features", "text"]]
        table += [
            [str(row.doc_id), f"{row.score:+.3f}", ", ".join(map(str, row.features)), " ".join(row.text.split())]
            for row in self.rows[:SHOWN]
        ]
        return "\n".join(lines + format_table(table, left=(2, 3)))


def rank_documents(
    documents: Documents,
    wanted: SideWeights | str,
    *,
    labels: FeatureNames | None = None,
    top: int = 10,
) -> DocumentRanking:
    """The documents that have most of some features, and least of those with a weight below 0.

    The score of a document is the sum over sides asked for of weight x log(n / documents that fire) x pooled magnitude
    / its largest: a rare feature counts more, and each at most its weight times that. Documents without any of the
    features with weights above 0 are left out. A query in words stands for the sides whose labels match it
    (`saelab.labels.rank_texts`), the best eight, with weight 1.

    Args:
        documents: feature store, or documents from `pool_documents`.
        wanted: weight of each feature, or of each (feature, sign); or words to find in their labels.
        labels: names of features, as texts by feature or a label store; needed for words.
        top: most documents.

    Raises:
        ValueError: words without labels or that no label matches, features that do not exist, `top` below 1.
    """
    require_names(labels)
    documents = as_documents(documents)
    if top < 1:
        raise ValueError(f"`top` must be at least 1, got {top}.")
    asked: dict[Any, float] = (
        dict.fromkeys(match_labels(wanted, labels), 1.0) if isinstance(wanted, str) else dict(wanted)
    )
    sides = {documents.column_of(side): float(weight) for side, weight in asked.items()}
    if not sides or not np.isfinite(list(sides.values())).all():
        raise ValueError(f"`wanted` must give at least one feature a finite weight, got {wanted!r}.")
    columns = np.array(list(sides))
    part = documents.matrix[:, columns].toarray().astype(np.float64)
    fires = part > 0
    rarity = np.log(len(documents) / np.maximum(fires.sum(0), 1))
    weights = np.array(list(sides.values()))
    scores = part / np.maximum(part.max(0), 1e-30) @ (weights * rarity)
    has_any = fires[:, weights > 0].any(1) if (weights > 0).any() else np.ones(len(documents), bool)
    order = np.lexsort((np.arange(len(scores)), -np.where(has_any, scores, -np.inf)))[: min(top, int(has_any.sum()))]
    name = name_sides(labels, (columns // 2).tolist())
    return DocumentRanking(
        n_documents=len(documents),
        wanted=tuple(
            (int(c) // 2, 1 - 2 * (int(c) % 2), sides[int(c)], name(int(c) // 2, 1 - 2 * (int(c) % 2))) for c in columns
        ),
        rows=tuple(_describe(documents, row, scores, columns[fires[row]]) for row in order.tolist()),
    )


def _describe(documents: DocumentFeatures, row: int, scores: np.ndarray, columns: np.ndarray) -> FoundDocument:
    return FoundDocument(
        row=row,
        doc_id=int(documents.doc_ids[row]),
        score=float(scores[row]),
        features=tuple(dict.fromkeys((columns // 2).tolist())),
        text=documents.text(row),
    )


def match_labels(words: str, labels: FeatureNames | None) -> list[tuple[int, int]]:
    """The sides whose labels match words, the best first, at most eight; of a whole feature the positive one.

    Raises:
        ValueError: no labels are given, or none matches.
    """
    if labels is None:
        raise ValueError(f"Words are looked up in labels, got {words!r} and none; give `labels`, or numbers.")
    if isinstance(labels, Mapping):
        known = [((int(feature), 1), text) for feature, text in labels.items()]
    else:
        rows = [row for row in labels.shown() if row.kind != "none"]
        known = [((int(row.feature), -1 if row.sign < 0 else 1), row.text) for row in rows]
    found = [known[i][0] for i in rank_texts([text for _, text in known], words)]
    if not found:
        raise ValueError(f"`wanted` must match a label, got {words!r} and {len(known):,} labels; try other words.")
    return list(dict.fromkeys(found))[:N_LABELS]

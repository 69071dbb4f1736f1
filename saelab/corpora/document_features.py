"""`pool_documents`: the codes of a feature store with one row a document and one column a side of a feature."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, get_args

import numpy as np
from jaxtyping import Bool, Float, Int, Integer

from saelab.functional.indices import find_runs
from saelab.stores.feature_store import FeatureStore

if TYPE_CHECKING:
    from scipy.sparse import csr_matrix

DocumentPooling = Literal["max", "share", "mean"]
SideId: TypeAlias = int | tuple[int, int]
"""a feature and its sign, 1 or -1; a number alone is the positive side of that feature"""
N_SHOWN = 24  # tokens of a document that are shown


@dataclass(frozen=True, kw_only=True, eq=False)
class DocumentFeatures:
    """Codes pooled over the tokens of each document, one row a document; `len()` is the number of documents.

    Column 2 j is the positive side of feature j and column 2 j + 1 its negative side, by magnitude: all values are at
    least 0, and a feature fires in a document where it is above 0. A document of a store whose row is a document has
    the codes of that row.
    """

    store: FeatureStore
    by: DocumentPooling
    matrix: "csr_matrix"
    """pooled magnitudes, (n_documents, 2 d_sae)"""
    doc_ids: Integer[np.ndarray, "n_documents"]
    """number of each document in the store"""
    starts: Int[np.ndarray, "n_documents"]
    """first row of each document in the store"""
    n_tokens: Int[np.ndarray, "n_documents"]
    """tokens of each document that the mask kept"""

    def __len__(self) -> int:
        return len(self.doc_ids)

    def __repr__(self) -> str:
        return f"DocumentFeatures({len(self):,} documents, {self.d_sae:,} features, by={self.by!r})"

    @property
    def d_sae(self) -> int:
        """Number of features."""
        return self.store.d_sae

    @property
    def n_fires(self) -> Int[np.ndarray, "n_sides"]:
        """Number of documents in which each side fires."""
        return np.bincount(self.matrix.indices, minlength=2 * self.d_sae)

    def rows(self, chosen: Bool[np.ndarray, "n_documents"] | Int[np.ndarray, "n"]) -> "DocumentFeatures":
        """Some of the documents, by a mask or by their rows.

        Raises:
            ValueError: no document is chosen, or one that does not exist.
        """
        index = np.flatnonzero(chosen) if chosen.dtype == bool else chosen
        wrong = chosen.dtype == bool and len(chosen) != len(self)
        if wrong or len(index) == 0 or index.min() < -len(self) or index.max() >= len(self):
            raise ValueError(
                f"`chosen` must pick at least one of {len(self)} documents, by a mask of that length or by rows, got "
                f"{len(chosen)} of dtype {chosen.dtype}, {len(index)} chosen."
            )
        columns = {name: getattr(self, name)[index] for name in ("matrix", "doc_ids", "starts", "n_tokens")}
        return replace(self, **columns)

    def side(self, side: SideId) -> Float[np.ndarray, "n_documents"]:
        """The pooled magnitudes of one side of a feature; ValueError for one that does not exist."""
        return np.asarray(self.matrix[:, [self.column_of(side)]].toarray()[:, 0], np.float64)

    def column_of(self, side: SideId) -> int:
        """The column of one side of a feature; ValueError for one that does not exist."""
        feature, sign = side if isinstance(side, tuple) else (side, 1)
        if not 0 <= feature < self.d_sae or sign not in (-1, 1):
            raise ValueError(
                f"A side must be a feature in 0..{self.d_sae - 1}, or a pair of it and 1 or -1, got {side!r}."
            )
        return 2 * int(feature) + (sign < 0)

    def text(self, row: int, n_tokens: int = N_SHOWN) -> str:
        """The beginning of a document as text."""
        place = int(self.store.where[int(self.starts[row]) : int(self.starts[row]) + 1][0])
        start, _ = self.store.text.window(place, n_tokens, 0)
        stop = self.store.text.window(start, 0, n_tokens - 1)[1]
        return "".join(self.store.text.words(start, stop))


Documents: TypeAlias = FeatureStore | DocumentFeatures
"""a feature store, whose documents are pooled by the largest magnitude, or documents that were pooled before"""


def pool_documents(store: FeatureStore, by: DocumentPooling = "max") -> DocumentFeatures:
    """The codes of a store pooled over the tokens of each document, one row a document.

    Positive and negative codes are pooled apart, by magnitude. One shard is held at a time.

    Args:
        store: feature store, of tokens or of documents.
        by: "max", the largest magnitude in the document; "share", the share of its tokens on which the side fires;
            "mean", the mean magnitude over its tokens. The largest of more tokens is larger: where corpora differ in
            the length of documents, take one of the others.

    Raises:
        ValueError: an unknown pooling, or a store without rows.
    """
    if by not in get_args(DocumentPooling):
        raise ValueError(f"`by` must be one of {list(get_args(DocumentPooling))}, got {by!r}.")
    if len(store) == 0:
        raise ValueError("`store` must have rows, got none; harvest a text with a mask that keeps some tokens.")
    from scipy.sparse import diags, vstack

    starts = store.find_documents()
    n_tokens = np.diff(np.append(starts, len(store)))
    parts = list(_join_cut_documents(_pool_shards(store, by, starts), by))
    matrix = vstack(parts, format="csr")
    if by != "max":
        matrix = (diags(1 / n_tokens) @ matrix).tocsr().astype(np.float32)
    matrix.sort_indices()
    doc_ids = np.asarray(store.text.doc_ids[store.where.at(starts)])
    return DocumentFeatures(
        store=store, by=by, matrix=matrix, doc_ids=doc_ids, starts=starts.astype(np.int64), n_tokens=n_tokens
    )


def as_documents(source: Documents) -> DocumentFeatures:
    """The source's documents, pooled by the largest magnitude where it is a store."""
    return source if isinstance(source, DocumentFeatures) else pool_documents(source)


def require_same_dictionary(a: DocumentFeatures, b: DocumentFeatures) -> None:
    """Raise ValueError where two corpora are not coded by the same SAE, or not pooled alike."""
    saes = [str(one.store.manifest.request.get("sae") or "") for one in (a, b)]
    if a.d_sae != b.d_sae or (all(saes) and saes[0] != saes[1]):
        raise ValueError(
            f"Both corpora must be coded by the same SAE, got {a.d_sae} and {b.d_sae} features, SAEs {saes[0]!r} and "
            f"{saes[1]!r}; harvest both texts with one SAE."
        )
    if a.by != b.by:
        raise ValueError(f"Both corpora must be pooled alike, got {a.by!r} and {b.by!r}; give both the same `by`.")


def _pool_shards(store: FeatureStore, by: DocumentPooling, starts: np.ndarray) -> Iterator[tuple[int, "csr_matrix"]]:
    """Of each shard the first document, and the pooled codes of that document and those that follow it."""
    for first, arrays in store.shards():
        n = len(arrays["places"])
        if n:
            own = np.searchsorted(starts, np.arange(first, first + n), "right") - 1
            yield int(own[0]), _pool(arrays, own - own[0], by, store.d_sae)


def _pool(arrays: Mapping[str, np.ndarray], documents: np.ndarray, by: DocumentPooling, d_sae: int) -> "csr_matrix":
    """Pooled codes of one shard: entries are read by feature, in which those of one document follow each other."""
    from scipy.sparse import csr_matrix

    offsets = arrays["feature_offsets"].astype(np.int64)
    features = np.repeat(np.arange(d_sae), offsets[1:] - offsets[:-1])
    rows, values = documents[arrays["feature_tokens"]], arrays["feature_values"].astype(np.float32)
    begins = find_runs(features * len(documents) + rows)
    found = []
    for side, sign in enumerate((1, -1)):
        sizes = np.maximum(sign * values, 0)
        reduce: Callable[..., Any] = np.maximum.reduceat if by == "max" else np.add.reduceat
        pooled = reduce(sizes > 0 if by == "share" else sizes, begins, dtype=np.float32) if len(begins) else sizes
        fires = np.flatnonzero(pooled)
        found.append((pooled[fires], rows[begins[fires]], 2 * features[begins[fires]] + side))
    data, row, column = (np.concatenate(part) for part in zip(*found, strict=True))
    return csr_matrix((data, (row, column)), shape=(int(documents[-1]) + 1, 2 * d_sae), dtype=np.float32)


def _join_cut_documents(parts: Iterable[tuple[int, "csr_matrix"]], by: DocumentPooling) -> Iterator["csr_matrix"]:
    """The pooled codes of all documents in pieces; a document that lies in several shards is one row."""
    from scipy.sparse import vstack

    last, document = None, -1
    for first, part in parts:
        if last is not None and first == document:  # goes on with the last document of the shard before
            head = last.maximum(part[:1]) if by == "max" else last + part[:1]
            part = vstack([head, part[1:]], format="csr")
        elif last is not None:
            yield last
        yield part[:-1]
        last, document = part[-1:], first + part.shape[0] - 1
    if last is not None:
        yield last

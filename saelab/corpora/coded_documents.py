"""`CodedDocuments`: the tokens of documents with their sparse codes by side of a feature, read for some at a time."""

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from saelab.evaluation.feature_classifiers import read_values
from saelab.evaluation.side_masks import Coded, read_acts
from saelab.functional.indices import find_runs
from saelab.lm.token_labels import LabelsLike, TokenLabels
from saelab.stores.feature_store import FeatureStore

if TYPE_CHECKING:
    from scipy.sparse import csr_matrix

AT_ONCE = 2**16  # tokens that are read at a time


class TokenCodes(NamedTuple):
    """Codes of some tokens by side: entry e of token t, in `offsets[t]:offsets[t + 1]`, is of `sides[e]`."""

    sides: Int[Tensor, "nnz"]
    values: Float[Tensor, "nnz"]
    offsets: Int[Tensor, "n_1"]


class CodedDocuments:
    """Tokens in the order of their documents, with codes by side and, where they are given, activations.

    Args:
        codes: a store, or codes as `score_concepts` takes them.
        doc_ids: document of each token; None takes those of the store.
        acts: activations of the same tokens.
    """

    def __init__(
        self,
        codes: Coded,
        doc_ids: Shaped[Any, "_"] | None = None,
        acts: Float[Tensor, "_ _"] | None = None,
    ) -> None:
        from scipy.sparse import csr_matrix

        self.store = codes if isinstance(codes, FeatureStore) else None
        if doc_ids is None and self.store is None:
            raise ValueError("`doc_ids` must be given with codes that are not in a store, got None.")
        documents = np.asarray(self.store.doc_ids if doc_ids is None and self.store is not None else doc_ids)
        given: Any = codes if isinstance(codes, FeatureStore) else csr_matrix(read_values(codes))
        self.matrix: Any = given if self.store is None else None
        self.d_sae = int(given.d_sae if self.store is not None else given.shape[1])
        n = len(given) if self.store is not None else given.shape[0]
        if documents.shape != (n,):
            raise ValueError(
                f"`doc_ids` must have one for each of the {n} tokens of the codes, got shape {documents.shape}."
            )
        self.acts = None if acts is None else read_acts(acts, n)
        self.rows = np.argsort(documents, kind="stable")
        self.ids, starts = np.unique(documents[self.rows], return_index=True)
        self.starts = np.append(starts, n).astype(np.int64)

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def width(self) -> int | None:
        """Width of the activations; None where there are none."""
        return None if self.acts is None else int(self.acts.shape[1])

    def find(self, document: int) -> int:
        """The index of a document by its number; ValueError where there is none."""
        at = int(np.searchsorted(self.ids, document))
        if at >= len(self) or self.ids[at] != document:
            raise ValueError(f"`document` must be the number of one of {len(self)} documents, got {document}.")
        return at

    def tokens_of(self, documents: Int[np.ndarray, "m"]) -> tuple[Int[np.ndarray, "n"], Int[np.ndarray, "n"]]:
        """Rows of the tokens of some documents, ascending, and the index in `documents` of each."""
        parts = [self.rows[self.starts[i] : self.starts[i + 1]] for i in documents.tolist()]
        rows, own = np.concatenate(parts), np.repeat(np.arange(len(documents)), [len(part) for part in parts])
        order = np.argsort(rows, kind="stable")
        return rows[order], own[order]

    def codes_of(self, rows: Int[np.ndarray, "n"], place: Int[np.ndarray, "n_sides"]) -> TokenCodes:
        """Magnitudes of some tokens' codes, of the sides that have a place; side 2 j is of positive codes of j.

        Args:
            rows: tokens, ascending.
            place: number of each side in a table; -1 for those that are left out.
        """
        if self.store is not None:
            offsets, features, values = self.store.codes_of(rows)
        else:
            part = self.matrix[rows]
            offsets, features, values = part.indptr.astype(np.int64), part.indices.astype(np.int64), part.data
        sides = place[2 * features + (values < 0)]
        kept = (sides >= 0) & (values != 0)
        ends = np.concatenate([[0], np.cumsum(kept)])[offsets]
        parts = sides[kept].astype(np.int64), np.abs(values[kept]).astype(np.float32), ends.astype(np.int64)
        return TokenCodes(*map(torch.from_numpy, parts))

    def acts_of(self, rows: Int[np.ndarray, "n"]) -> Float[Tensor, "n d_in"]:
        """Activations of some tokens; ValueError where there are none."""
        if self.acts is None:
            raise ValueError("`acts` must be given: this head reads activations, got None.")
        return self.acts[torch.from_numpy(rows)].detach().float().cpu()

    def batches(self, documents: Int[np.ndarray, "m"] | None = None) -> list[Int[np.ndarray, "n"]]:
        """Documents by index, ascending, in parts of about 65,536 tokens.

        Args:
            documents: which; None for all.
        """
        chosen = np.arange(len(self)) if documents is None else np.sort(documents)
        if len(chosen) == 0:
            return []
        part = np.cumsum(np.diff(self.starts)[chosen]) // AT_ONCE
        return np.split(chosen, np.flatnonzero(np.diff(part)) + 1)

    def largest(
        self, place: Int[np.ndarray, "n_sides"], n: int, documents: Int[np.ndarray, "m"] | None = None
    ) -> "csr_matrix":
        """The largest magnitude of each of `n` sides in each document, (n_documents, n); computed in parts.

        Args:
            place: number of each side; -1 for those that are left out.
            n: number of sides that have a place.
            documents: which, ascending; None for all.
        """
        from scipy.sparse import csr_matrix, vstack

        parts = [csr_matrix((0, n), dtype=np.float32)]
        for chosen in self.batches(documents):
            rows, own = self.tokens_of(chosen)
            codes = self.codes_of(rows, place)
            keys = np.repeat(own, np.diff(codes.offsets.numpy())) * n + codes.sides.numpy()
            order = np.argsort(keys, kind="stable")
            begins = find_runs(keys[order])
            if len(begins):
                peaks, at = np.maximum.reduceat(codes.values.numpy()[order], begins), keys[order][begins]
            else:
                peaks, at = np.zeros(0, np.float32), keys
            parts.append(csr_matrix((peaks, (at // n, at % n)), shape=(len(chosen), n)))
        return vstack(parts, format="csr")


def label_documents(labels: LabelsLike, doc_ids: Shaped[Any, "n_tokens"] | None = None) -> TokenLabels:
    """Labels of documents from those of their tokens: a document has a label where some token of it has.

    Args:
        labels: which concepts are true of each token.
        doc_ids: document of each token, where the labels do not have them.

    >>> found = label_documents({"odd": [True, False, False]}, np.array([4, 4, 7]))
    >>> found["odd"].tolist(), found.doc_ids.tolist()
    ([True, False], [4, 7])
    """
    from scipy.sparse import csr_matrix

    given = TokenLabels.of(labels, doc_ids=doc_ids)
    kept = given.require_documents() >= 0
    documents, own = np.unique(given.require_documents()[kept], return_inverse=True)
    inside = csr_matrix((np.ones(len(own), np.int32), (own, np.flatnonzero(kept))), (len(documents), given.n_tokens))
    return TokenLabels(
        given.concepts, (inside @ given.matrix.astype(np.int32)).astype(bool), (len(documents),), documents
    )


def attend(scores: Float[Tensor, "n n_labels"], own: Int[Tensor, "n"], n_documents: int) -> Float[Tensor, "n n_labels"]:
    """Softmax of scores over the tokens of each document.

    Args:
        scores: of each token for each label.
        own: document of each token, from 0.
        n_documents: number of documents.

    >>> attend(torch.zeros(3, 1), torch.tensor([0, 0, 1]), 2)[:, 0].tolist()
    [0.5, 0.5, 1.0]
    """
    index = own[:, None].expand_as(scores)
    top = scores.new_full((n_documents, scores.shape[1]), -torch.inf)
    top = top.scatter_reduce(0, index, scores.detach(), "amax")
    weights = (scores - top[own]).exp()
    return weights / weights.new_zeros(n_documents, scores.shape[1]).index_add(0, own, weights)[own]

"""`TokenLabels`: which concepts are true of which tokens, in one shape for probes, scores and erasure.

`Concept`: a binary label of tokens, with its parent and its opposite where it has them.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch
from jaxtyping import Bool, Int, Shaped
from torch import Tensor

from saelab.lm.tokens import PADDING

if TYPE_CHECKING:
    from scipy.sparse import csc_matrix, csr_matrix


@dataclass(frozen=True)
class Concept:
    """A binary label of tokens, with its kind, parent and opposite where it has them."""

    name: str
    kind: str = ""
    """such as "class", "word", "pole" or "state"; default control pairs are of "one-sided" ones"""
    parent: str | None = None
    """name of the more general concept, which is true wherever this one is"""
    opposite: str | None = None
    """name of the opposed concept"""
    topic: str | None = None


@dataclass(frozen=True, eq=False, repr=False)
class TokenLabels(Mapping[str, Tensor]):
    """Which concepts are true of which tokens; a mapping from names to boolean tensors, `labels["name"]`.

    Made by `TokenLabels.of`. Tokens are rows of a text, `shape` (n_seq, ctx_len), or one after another, (n_tokens,);
    `select` takes some of them, as a token mask or a feature store does.

    >>> labels = TokenLabels.of({"vowel": torch.tensor([[True, False], [False, True]])}, doc_ids=[[0, 0], [1, 1]])
    >>> labels, labels["vowel"].tolist()
    (TokenLabels(2 of 4 tokens labeled, shape=(2, 2), names=['vowel']), [[True, False], [False, True]])
    """

    concepts: tuple[Concept, ...]
    matrix: "csr_matrix"
    """(n_tokens, n_concepts), True where a concept is true of a token; columns as in `concepts`, the rows of a text one
    after another
    """
    shape: tuple[int, ...]
    """(n_seq, ctx_len) or (n_tokens,)"""
    doc_ids: Shaped[np.ndarray, "n_tokens"] | None = None
    """document of each token, -1 for padding; None where it is not known"""

    def __post_init__(self) -> None:
        wanted = (int(np.prod(self.shape)), len(self.concepts))
        if tuple(self.matrix.shape) != wanted:
            raise ValueError(
                f"Labels must be (n_tokens, n_concepts), {wanted} by their tokens and names, got "
                f"{tuple(self.matrix.shape)}."
            )
        if self.doc_ids is not None and len(self.doc_ids) != wanted[0]:
            raise ValueError(f"`doc_ids` must have one for each of the {wanted[0]} tokens, got {len(self.doc_ids)}.")
        if len(set(self.names)) < len(self.concepts):
            raise ValueError(f"Names of labels must differ, got {list(self.names)[:5]}...")

    @classmethod
    def of(cls, labels: Any, names: str | Sequence[str | Concept] | None = None, doc_ids: Any = None) -> "TokenLabels":
        """`TokenLabels` made from arrays, tensors, scipy matrices or a dictionary of them.

        Args:
            labels: a mapping from names to marks, True or False (or 1 and 0) for each token, all of one shape, (n_seq,
                ctx_len) or (n_tokens,); or such marks of a single concept; or, with several `names`, a matrix
                (n_tokens, n_concepts), dense or scipy sparse; or `TokenLabels`, which stay as they are.
            names: one name for marks, by default "concept"; names or `Concept`s of the columns for a matrix.
            doc_ids: document of each token, in the shape of the marks.

        Raises:
            ValueError: for shapes that disagree, values other than true and false, and names that are missing or given
                twice.
        """
        documents = None if doc_ids is None else _read_array(doc_ids).reshape(-1)
        if isinstance(labels, Mapping) and names is not None:
            raise ValueError(f"`names` go with arrays, got {names!r} with labels that have names. Leave `names` out.")
        if isinstance(labels, TokenLabels):
            return labels if documents is None else replace(labels, doc_ids=documents)
        if names is not None and not isinstance(names, str):
            matrix, concepts = _read_matrix(labels), tuple(Concept(x) if isinstance(x, str) else x for x in names)
            return cls(concepts, matrix, matrix.shape[:1], documents)
        given = labels if isinstance(labels, Mapping) else {names or "concept": labels}
        if not given:
            raise ValueError("Labels must have at least one name, got none.")
        marks = {name: _read_marks(values, name) for name, values in given.items()}
        if len(shapes := {one.shape for one in marks.values()}) > 1:
            raise ValueError(f"Marks must be of one shape, one for each token, got {sorted(shapes)}.")
        return cls.place({name: np.flatnonzero(one) for name, one in marks.items()}, shapes.pop(), documents)

    @classmethod
    def place(
        cls,
        places: Mapping[str, Int[np.ndarray, "_"]],
        shape: tuple[int, ...],
        doc_ids: Shaped[np.ndarray, "n_tokens"] | None = None,
    ) -> "TokenLabels":
        """`TokenLabels` made from the indices of the tokens that each label is true of.

        Args:
            places: indices of tokens by name of label, counted from 0 row after row.
            shape: (n_seq, ctx_len) or (n_tokens,) of the text.
            doc_ids: document of each token, -1 for padding; None where it is not known.
        """
        from scipy.sparse import csc_matrix

        columns = [np.unique(one) for one in places.values()]
        bounds, ones = np.cumsum([0, *map(len, columns)]), np.ones(sum(map(len, columns)), bool)
        rows = np.concatenate([np.empty(0, np.int64), *columns])
        matrix = csc_matrix((ones, rows, bounds), shape=(int(np.prod(shape)), len(columns))).tocsr()
        return cls(tuple(map(Concept, places)), matrix, tuple(shape), doc_ids)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the concepts."""
        return tuple(concept.name for concept in self.concepts)

    @property
    def n_tokens(self) -> int:
        """Number of tokens, labeled or not."""
        return int(self.matrix.shape[0])

    def __getitem__(self, name: str) -> Bool[Tensor, "*shape"]:
        if name not in self._columns:
            raise KeyError(name)
        found, column = torch.zeros(self.n_tokens, dtype=torch.bool), self._columns[name]
        start, stop = self._by_concept.indptr[column : column + 2]
        found[torch.from_numpy(self._by_concept.indices[start:stop].astype(np.int64))] = True
        return found.view(self.shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.concepts)

    def __contains__(self, name: object) -> bool:
        return name in self._columns

    def __eq__(self, other: object) -> bool:
        return self is other

    __hash__ = object.__hash__

    def __repr__(self) -> str:
        n, names = int((self.matrix.getnnz(1) > 0).sum()), list(self.names)
        named = f"names={names}" if len(names) <= 5 else f"{len(names)} names"
        return f"TokenLabels({n:,} of {self.n_tokens:,} tokens labeled, shape={self.shape}, {named})"

    def require_documents(self) -> Shaped[np.ndarray, "n_tokens"]:
        """Document of each token; ValueError where it is not known."""
        if self.doc_ids is None:
            raise ValueError("`doc_ids` must be given with labels that do not have them, got None.")
        return self.doc_ids

    def find(self, name: str | None) -> str:
        """`name` if it is one of the labels; for None the name of the only label. ValueError otherwise."""
        if name is None and len(self) == 1:
            return self.names[0]
        if name is None or name not in self:
            near = get_close_matches(name or "", self.names, n=5) or list(self.names)[:5]
            raise ValueError(f"`concept` must be one of the labels, got {name!r}. Did you mean one of: {near}?")
        return name

    def select(self, chosen: Any) -> "TokenLabels":
        """Labels of the chosen tokens only, as (n_tokens,).

        `chosen` is a boolean mask of the labels' shape, or indices of tokens, counted from 0 row after row. ValueError
        for a mask of another shape and for values that are no integers.

        >>> TokenLabels.of([True, False, True], "odd").select([2])["odd"].tolist()
        [True]
        """
        rows = _read_array(chosen)
        if rows.dtype == bool and rows.shape != self.shape:
            raise ValueError(f"A mask must have the shape of the labels, {self.shape}, got {rows.shape}.")
        if rows.size and rows.dtype.kind not in "biu":
            raise ValueError(f"Tokens must be a mask or integers, got {rows.dtype}.")
        rows = np.flatnonzero(rows) if rows.dtype == bool else rows.reshape(-1).astype(np.int64)
        documents = None if self.doc_ids is None else self.doc_ids[rows]
        return TokenLabels(self.concepts, self.matrix[rows], (len(rows),), documents)

    def spread(self, mask: Bool[Tensor, "n_seq ctx_len"]) -> "TokenLabels":
        """Labels in the shape of `mask`: those of token i at the i-th place where it is True, none where it is False.

        It undoes `select` with that mask. ValueError unless `mask` is True at as many places as there are tokens.

        >>> TokenLabels.of([True], "odd").spread(torch.tensor([[False, True]]))["odd"].tolist()
        [[False, True]]
        """
        from scipy.sparse import csr_matrix

        places = mask.flatten().nonzero()[:, 0].cpu().numpy()
        if len(places) != self.n_tokens:
            raise ValueError(f"`mask` must be True at the {self.n_tokens} tokens of the labels, got {len(places)}.")
        sizes = np.zeros(mask.numel(), np.int64)
        sizes[places] = self.matrix.getnnz(1)
        parts = (self.matrix.data, self.matrix.indices, np.concatenate([[0], sizes.cumsum()]))
        matrix = csr_matrix(parts, shape=(mask.numel(), len(self)))
        documents = None
        if self.doc_ids is not None:
            documents = np.full(mask.numel(), PADDING, self.doc_ids.dtype)
            documents[places] = self.doc_ids
        return TokenLabels(self.concepts, matrix, tuple(mask.shape), documents)

    @cached_property
    def _by_concept(self) -> "csc_matrix":
        return self.matrix.tocsc()

    @cached_property
    def _columns(self) -> dict[str, int]:
        return {name: c for c, name in enumerate(self.names)}


LabelsLike: TypeAlias = TokenLabels | Mapping[str, Any]
"""Labels of tokens: `TokenLabels`, or what `TokenLabels.of` reads by name, a dictionary of arrays or tensors."""


def pick_marks(labels: Any, concept: str | None = None) -> Bool[Tensor, "*shape"]:
    """The marks of one concept among labels of tokens, or plain marks as they are; ValueError where it is not there.

    Args:
        labels: `TokenLabels`, marks by name, or the marks of a single concept as `TokenLabels.of` reads them.
        concept: which of several labels.

    >>> pick_marks({"odd": [False, True], "even": [True, False]}, "odd").tolist()
    [False, True]
    """
    given = TokenLabels.of(labels, None if isinstance(labels, Mapping) else concept)
    return given[given.find(concept)]


def _read_array(values: Any) -> np.ndarray:
    return np.asarray(values.detach().cpu() if isinstance(values, Tensor) else values)


def _read_marks(values: Any, name: str) -> Bool[np.ndarray, "*shape"]:
    """Marks of one concept; ValueError for others than true and false."""
    found = _read_array(values)
    if found.ndim not in (1, 2):
        raise ValueError(
            f"Marks must be (n_tokens,) or (n_seq, ctx_len), got shape {found.shape} for '{name}'; a matrix of several "
            "concepts needs their `names`."
        )
    _require_binary(found, name)
    return found.astype(bool)


def _read_matrix(values: Any) -> "csr_matrix":
    """A matrix (n_tokens, n_concepts) as booleans; ValueError for another shape or other values."""
    from scipy.sparse import csr_matrix, issparse

    given = values if issparse(values) else _read_array(values)
    if given.ndim != 2:
        raise ValueError(f"Labels with several names must be (n_tokens, n_concepts), got shape {tuple(given.shape)}.")
    matrix = csr_matrix(given)
    _require_binary(matrix.data, "the matrix")
    matrix = matrix.astype(bool)
    matrix.eliminate_zeros()
    return matrix


def _require_binary(values: np.ndarray, name: str) -> None:
    if values.dtype == bool:
        return
    other = values[~np.isin(values, (0, 1))]
    if other.size:
        raise ValueError(f"Labels must be True or False, or 1 and 0, got {other.flat[0]} in '{name}'.")

"""Predicates on the tokens of a store, as a sparse boolean matrix with one named column each."""

import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Bool

from saelab.labelling.families import DISJOINT, SHARES, affixes, fixed, one_of_each
from saelab.labelling.views import Part, TokenView
from saelab.stores.features import FeatureStore

if TYPE_CHECKING:
    from scipy.sparse import csr_matrix

N_PREDICATES = 1000
N_FIXED = 60
"""Approximate number of conditions that do not depend on the text; the rest of `size` is taken from the text."""


@dataclass(frozen=True)
class Predicate:
    """A user-defined condition: `holds` returns a boolean for each token of a `TokenView`.

    >>> Predicate("three-letter words", lambda view: view.mark_words(lambda word: len(word) == 3)).kind
    'own'
    """

    name: str
    holds: Callable[[TokenView], Any]
    kind: str = "own"


def word_pattern(pattern: str, name: str | None = None, part: Part = "all") -> Predicate:
    """A predicate for words that a regular expression matches completely.

    `part` chooses which tokens of a split word it marks.
    """
    compiled = re.compile(pattern)
    return Predicate(name or f"words like /{pattern}/", lambda view: view.mark_words(compiled.fullmatch, part))


def text_pattern(pattern: str, name: str | None = None) -> Predicate:
    """A predicate for tokens that overlap a match of a regular expression in the running text of a sequence."""
    re.compile(pattern)
    return Predicate(name or f"text like /{pattern}/", lambda view: view.find(pattern))


@dataclass(frozen=True, eq=False)
class Predicates:
    """Conditions on the tokens of a store: column j of `matrix` is true where the condition `names[j]` holds."""

    matrix: "csr_matrix"
    """(n_tokens, n_predicates), boolean"""
    names: tuple[str, ...]
    kinds: tuple[str, ...]
    left_out: Mapping[str, str] = field(default_factory=dict)
    """reason for each condition that was left out, by name"""

    def __len__(self) -> int:
        return len(self.names)

    def __repr__(self) -> str:
        n, per_token = self.matrix.shape[0], self.matrix.nnz / max(1, self.matrix.shape[0])
        return f"Predicates({len(self)} on {n:,} tokens, {per_token:.1f} true of a token)"

    @cached_property
    def places(self) -> dict[str, int]:
        """The column of each name."""
        return {name: j for j, name in enumerate(self.names)}

    def column(self, name: str) -> Bool[np.ndarray, "n_tokens"]:
        """The tokens on which a predicate holds; KeyError where there is none of that name."""
        return self.matrix[:, [self.places[name]]].toarray().ravel()

    def family(self, kind: str) -> list[int]:
        """The columns of one kind."""
        return [j for j, mine in enumerate(self.kinds) if mine == kind]

    def without(self, *kinds: str) -> "Predicates":
        """The predicates without some kinds."""
        kept = [j for j, kind in enumerate(self.kinds) if kind not in kinds]
        names, kinds = (tuple(listed[j] for j in kept) for listed in (self.names, self.kinds))
        return Predicates(self.matrix[:, kept], names, kinds, self.left_out)


def make_predicates(
    store: FeatureStore,
    *,
    size: int = N_PREDICATES,
    sizes: Mapping[str, int] | None = None,
    metadata: Mapping[int, str] | None = None,
    concepts: tuple[Any, Sequence[str]] | None = None,
    own: Sequence[Predicate] = (),
) -> Predicates:
    """About `size` conditions on the tokens of a store, and the caller's own, from which rules are built.

    About sixty do not depend on the text: case, digits, punctuation, place in word, sentence, document and sequence,
    quotes, brackets, repetition, neighbours. The others are the most frequent tokens, words, pairs of tokens, previous
    and next tokens, suffixes, prefixes and stems of the text. A predicate on words holds on all tokens of a word; "word
    end" holds on the last token of words of several tokens, where the word is complete.

    Predicates that hold on no token or on all, or have the name of another, are left out: `left_out` has the reasons,
    and a warning names those that the caller gave.

    Args:
        store: feature store whose text is described.
        size: approximate number of predicates.
        sizes: number of predicates of single families: "token", "word", "word end", "bigram", "previous token", "next
            token", "suffix", "prefix", "stem".
        metadata: a value for each document id; each different value becomes a predicate.
        concepts: sparse boolean matrix with one row per token of the store, and the names of its columns.
        own: the caller's own conditions.

    Raises:
        ValueError: a family does not exist, or an array has another length than the store.
    """
    wanted = {kind: round(share * max(0, size - N_FIXED)) for kind, share in SHARES.items()} | dict(sizes or {})
    if unknown := set(wanted) - set(SHARES):
        raise ValueError(f"`sizes` must name families among {list(SHARES)}, got {sorted(unknown)}.")
    view = TokenView(store.text)
    parts = _Parts(store)
    for kind, name, marks in fixed(view):
        parts.add(kind, name, marks)
    for kind, n in wanted.items():
        if kind in DISJOINT:
            parts.add_family(kind, *one_of_each(view, kind, n))
        else:
            for found in affixes(view, kind, n):
                parts.add(*found)
    if metadata is not None:
        values = [metadata.get(int(doc), "") for doc in np.unique(view.doc_ids)]
        listed = sorted(set(values) - {""})
        numbers = np.array([listed.index(value) if value else -1 for value in values])
        where = numbers[np.searchsorted(np.unique(view.doc_ids), view.doc_ids)]
        parts.add_family("document", [f"documents of {value!r}" for value in listed], where)
    for predicate in own:
        parts.add(predicate.kind, predicate.name, _asked(predicate, view))
    if concepts is not None:
        parts.add_matrix("concept", *concepts)
    joined = parts.join()
    given = [predicate.name for predicate in own] + list(concepts[1] if concepts is not None else ())
    if lost := [f"'{name}' ({joined.left_out[name]})" for name in given if name in joined.left_out]:
        warnings.warn(f"Predicates that tell nothing are left out: {', '.join(lost[:5])}.", stacklevel=2)
    return joined


def _asked(predicate: Predicate, view: TokenView) -> np.ndarray:
    found = np.asarray(predicate.holds(view))
    if found.shape != (len(view),) or found.dtype != bool:
        raise ValueError(
            f"Predicate '{predicate.name}' must give one boolean for each of the {len(view)} tokens of the view, got "
            f"{found.dtype} of shape {found.shape}."
        )
    return found


class _Parts:
    """Columns collected for the rows of a store."""

    def __init__(self, store: FeatureStore) -> None:
        self.places, self.n_tokens = store.places, len(store)
        self.rows: list[np.ndarray] = []
        self.columns: list[np.ndarray] = []
        self.names: list[str] = []
        self.kinds: list[str] = []

    def add(self, kind: str, name: str, marks: Bool[np.ndarray, "n"]) -> None:
        """Add one condition, given for every token of the text."""
        rows = np.flatnonzero(marks[self.places]).astype(np.int32)
        self._append(kind, [name], rows, np.zeros(len(rows), np.int32))

    def add_family(self, kind: str, names: Sequence[str], numbers: np.ndarray) -> None:
        """Add conditions of which at most one holds on each token, given as its number, or -1."""
        here = numbers[self.places]
        rows = np.flatnonzero(here >= 0)
        self._append(kind, names, rows.astype(np.int32), here[rows].astype(np.int32))

    def add_matrix(self, kind: str, matrix: Any, names: Sequence[str]) -> None:
        """Add columns that exist already."""
        from scipy.sparse import coo_matrix

        if matrix.shape != (self.n_tokens, len(names)):
            raise ValueError(
                f"`concepts` must be (n_tokens, n_names), {(self.n_tokens, len(names))} here, got {matrix.shape}."
            )
        found = coo_matrix(matrix)
        kept = found.data != 0
        self._append(kind, names, found.row[kept].astype(np.int32), found.col[kept].astype(np.int32))

    def _append(self, kind: str, names: Sequence[str], rows: np.ndarray, columns: np.ndarray) -> None:
        self.rows.append(rows)
        self.columns.append(columns + np.int32(len(self.names)))
        self.names += list(names)
        self.kinds += [kind] * len(names)

    def join(self) -> Predicates:
        """All conditions that hold on some but not all tokens, each name once."""
        from scipy.sparse import csr_matrix

        rows, columns = np.concatenate(self.rows), np.concatenate(self.columns)
        counts = np.bincount(columns, minlength=len(self.names))
        first = {name: j for j, name in reversed(list(enumerate(self.names)))}
        kept = [j for j, name in enumerate(self.names) if first[name] == j and 0 < counts[j] < self.n_tokens]
        numbers = np.full(len(self.names), -1, np.int32)
        numbers[kept] = np.arange(len(kept), dtype=np.int32)
        why = {name: self._tell(int(counts[j])) for j, name in enumerate(self.names) if numbers[first[name]] < 0}
        why |= {name: "another has its name" for j, name in enumerate(self.names) if first[name] != j}
        inside = numbers[columns] >= 0
        rows, columns = rows[inside], numbers[columns[inside]]
        shape = (self.n_tokens, len(kept))
        matrix = csr_matrix((np.ones(len(rows), bool), (rows, columns)), shape=shape)
        return Predicates(matrix, tuple(self.names[j] for j in kept), tuple(self.kinds[j] for j in kept), why)

    def _tell(self, n: int) -> str:
        return "holds of no token" if n == 0 else f"holds of {n:,} of {self.n_tokens:,} tokens"

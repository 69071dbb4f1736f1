"""Code matrices of a feature store with rows and columns selected, aligned, averaged by document or permuted."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Integer

from saelab.functional.marking import number_rows
from saelab.functional.permuting import MovedBlocks
from saelab.stores.packing import as_csr

if TYPE_CHECKING:
    from scipy.sparse import csr_matrix

Values = Literal["codes", "firing", "sides"]
"""codes with their sign; 1 where a feature fires; |z| of positive and negative codes, as columns 2 j and 2 j + 1"""

SPREAD = 2
"""Permuted rows are read in one stretch where that is at most so many times as many rows as are asked for."""


@runtime_checkable
class Encoded(Protocol):
    """Protocol for rows of codes: a feature store, or an object that reads like one."""

    @property
    def d_sae(self) -> int: ...

    @property
    def l0(self) -> float: ...

    def __len__(self) -> int: ...

    def matrix(self, start: int = 0, stop: int | None = None) -> "csr_matrix": ...


@runtime_checkable
class Chosen(Protocol):
    """Protocol for some rows of a store in increasing order: an array, or an object that computes slices of one."""

    def __len__(self) -> int: ...

    def __getitem__(self, part: slice, /) -> np.ndarray: ...


@runtime_checkable
class Weights(Protocol):
    """Protocol for a sparse matrix, or an object that computes row slices of one."""

    @property
    def shape(self) -> tuple[int, int]: ...

    def __getitem__(self, part: slice, /) -> "csr_matrix": ...


@dataclass(frozen=True, eq=False)
class Codes:
    """The codes of some rows of a store, as sparse matrices read slice by slice.

    Steps are applied in this order: `rows` selects rows of the store, `weights` makes each row a weighted sum of the
    store's rows (alignment of tokenizers), `groups` averages runs of rows (documents), and `order` permutes the rows.
    Nothing here grows with the text but what `rows` and `weights` may hold themselves.
    """

    store: Encoded
    values: Values = "codes"
    rows: Chosen | None = None
    weights: Weights | None = None
    groups: Integer[np.ndarray, "n_groups"] | None = None
    """first row of each group"""
    columns: Integer[np.ndarray, "m"] | None = None
    """columns selected; None for all"""
    order: Integer[np.ndarray, "n_rows"] | MovedBlocks | None = None
    """the row that stands at each position; neighbours in it are read together"""

    @property
    def n_rows(self) -> int:
        """Number of rows, or of groups of rows."""
        return self.n_tokens if self.groups is None else len(self.groups)

    @property
    def n_tokens(self) -> int:
        """Number of rows before they are grouped."""
        if self.weights is not None:
            return int(self.weights.shape[0])
        return len(self.store) if self.rows is None else len(self.rows)

    @property
    def width(self) -> int:
        """Number of columns."""
        return self.full_width if self.columns is None else len(self.columns)

    @property
    def full_width(self) -> int:
        """Number of columns before some are selected."""
        return self.store.d_sae * (2 if self.values == "sides" else 1)

    @property
    def n_entries(self) -> float:
        """Approximate number of codes that are not zero."""
        return self.store.l0 * self.n_tokens

    def matrix(self, start: int, stop: int) -> "csr_matrix":
        """The sparse matrix of rows start to stop - 1."""
        if self.order is None or stop <= start:
            return self._plain(start, stop)
        rows = self.order[start:stop]
        ordered = np.sort(rows)
        return _read(self._plain, ordered)[np.searchsorted(ordered, rows)]

    def _plain(self, start: int, stop: int) -> "csr_matrix":
        if self.groups is None:
            found = self._tokens(start, stop)
        else:
            ends = np.append(self.groups[start : stop + 1], self.n_tokens)[: stop - start + 1]
            found = self._means(ends)
        return found if self.columns is None else found[:, self.columns]

    def _means(self, ends: Integer[np.ndarray, "n_1"]) -> "csr_matrix":
        from scipy.sparse import csr_matrix

        sizes, first, end = np.diff(ends), int(ends[0]), int(ends[-1])
        shares = np.repeat(1 / sizes, sizes).astype(np.float32)
        sums = csr_matrix((shares, np.arange(end - first), ends - first), (len(sizes), end - first))
        return sums @ self._tokens(first, end)

    def _tokens(self, start: int, stop: int) -> "csr_matrix":
        if self.weights is not None:
            part = self.weights[start:stop]
            rows, numbers = number_rows(part.indices)
            found = _read(self.store.matrix, rows)
            shares = as_csr(part.data, numbers, part.indptr, (part.shape[0], len(rows)))
            sums = shares @ (self._split(found) if self.values == "sides" else found)
            return self._mark(sums) if self.values == "firing" else sums
        if self.rows is None:
            return self._turn(self.store.matrix(start, stop))
        rows = self.rows[start:stop]
        if len(rows) == 0:
            return self._turn(self.store.matrix(0, 0))
        found = self.store.matrix(int(rows[0]), int(rows[-1]) + 1)
        whole = len(rows) == found.shape[0]
        return self._turn(found if whole else found[rows - rows[0]])

    def _turn(self, found: "csr_matrix") -> "csr_matrix":
        """Codes converted to the values asked for: codes, firing or sides."""
        if self.values == "firing":
            return self._mark(found)
        return self._split(found) if self.values == "sides" else found

    def _mark(self, found: "csr_matrix") -> "csr_matrix":
        found.data = (found.data != 0).astype(np.float32)
        return found

    def _split(self, found: "csr_matrix") -> "csr_matrix":
        from scipy.sparse import csr_matrix

        indices = 2 * found.indices + (found.data < 0)
        return csr_matrix((np.abs(found.data), indices, found.indptr), shape=(found.shape[0], self.full_width))

    def moved(self, order: Integer[np.ndarray, "n_rows"] | MovedBlocks) -> "Codes":
        """The same codes with their rows permuted."""
        return replace(self, order=order)

    def only(self, columns: Integer[np.ndarray, "m"]) -> "Codes":
        """The same codes with some of the columns."""
        return replace(self, columns=columns)


def _read(matrix: "Callable[[int, int], csr_matrix]", rows: Integer[np.ndarray, "n"]) -> "csr_matrix":
    """Some rows in increasing order, read with the rows between them where those are few, else run by run."""
    if len(rows) == 0:
        return matrix(0, 0)
    first, end = int(rows[0]), int(rows[-1]) + 1
    if end - first <= SPREAD * len(rows):
        found = matrix(first, end)
        return found if len(rows) == end - first else found[rows - first]
    from scipy.sparse import vstack

    runs = np.split(rows, np.flatnonzero(np.diff(rows) > 1) + 1)
    return vstack([matrix(int(run[0]), int(run[-1]) + 1) for run in runs], format="csr")

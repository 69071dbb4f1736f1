"""All similarities between the features of two dictionaries, computed in blocks.

Code matrices of a feature store can have rows and columns selected, aligned, averaged by document or permuted.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import TYPE_CHECKING, Literal, Protocol, get_args, runtime_checkable

import numpy as np
import torch
from jaxtyping import Bool, Float, Float32, Int, Int32, Integer
from torch import Tensor

from saelab.functional.indices import MovedBlocks, number_rows
from saelab.functional.statistics import spread
from saelab.stores.activations import Activations
from saelab.stores.packing import as_csr

if TYPE_CHECKING:
    from scipy.sparse import csc_matrix, csr_matrix

Values = Literal["codes", "firing", "sides"]
"""codes with their sign; 1 where a feature fires; |z| of positive and negative codes, as columns 2 j and 2 j + 1"""

SPREAD = 2
"""Permuted rows are read in one stretch where that is at most so many times as many rows as are asked for."""
BLOCK_CELLS = 2**22
"""Similarities held at once by each thread, where the codes are read only once."""
CHUNK_ENTRIES = 2**22
"""Codes of one side held at once; a longer text is read again for every block of features."""
LARGE_BLOCK_CELLS = 2**27
"""Similarities held at once where the codes are read several times."""
SimilarityBlock = tuple[int, Callable[[], Tensor]]
"""The first feature of a block, and a function that computes its similarities with all features of the other side."""
Similarity = Literal["correlation", "documents", "phi", "jaccard", "decoder", "encoder"]
CHUNK = 65536


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
class ComparedCodes:
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
    """the row at each position; neighbors in it are read together"""

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

    def moved(self, order: Integer[np.ndarray, "n_rows"] | MovedBlocks) -> "ComparedCodes":
        """The same codes with their rows permuted."""
        return replace(self, order=order)

    def only(self, columns: Integer[np.ndarray, "m"]) -> "ComparedCodes":
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


@dataclass(frozen=True, eq=False)
class Moments:
    """Firing counts, sums and sums of squares of each column of codes."""

    n: int
    fires: Int[np.ndarray, "d"]
    sums: Float[np.ndarray, "d"]
    squares: Float[np.ndarray, "d"]

    @classmethod
    def of(cls, codes: ComparedCodes) -> "Moments":
        """The moments over all rows, chunk by chunk."""
        fires = np.zeros(codes.width, np.int64)
        sums, squares = np.zeros(codes.width), np.zeros(codes.width)
        for start, stop in chunks(codes):
            found = codes.matrix(start, stop)
            fires += np.bincount(found.indices, minlength=codes.width)
            sums += np.bincount(found.indices, found.data, minlength=codes.width)
            squares += np.bincount(found.indices, found.data.astype(np.float64) ** 2, minlength=codes.width)
        return cls(codes.n_rows, fires, sums, squares)

    @cached_property
    def spread(self) -> Float[np.ndarray, "d"]:
        """Standard deviations times sqrt(n); 0 for columns that never vary."""
        return spread(self.n, self.sums, self.squares)

    def only(self, columns: Int[np.ndarray, "m"]) -> "Moments":
        """The moments of some columns."""
        return Moments(self.n, self.fires[columns], self.sums[columns], self.squares[columns])

    def scale(self, min_count: int) -> Float[np.ndarray, "d"]:
        """1 / spread; 0 for columns that fire on fewer than `min_count` rows or never vary."""
        known = (self.fires >= min_count) & (self.spread > 0)
        return np.divide(1, self.spread, out=np.zeros_like(self.spread), where=known)


def chunks(*sides: ComparedCodes) -> Iterator[tuple[int, int]]:
    """Ranges of rows in which no side has too many codes to hold."""
    n_rows = sides[0].n_rows
    per_row = max(1.0, *(side.n_entries / max(n_rows, 1) for side in sides))
    step = max(1, int(CHUNK_ENTRIES / per_row))
    return ((start, min(start + step, n_rows)) for start in range(0, n_rows, step))


def rows_of_blocks(width: int, reread: bool = False) -> int:
    """Number of features in a block, which holds their similarities with `width` others.

    `reread` says that codes are read again for every block.
    """
    return max(1, (LARGE_BLOCK_CELLS if reread else BLOCK_CELLS) // max(1, width))


def correlation_blocks(
    a: ComparedCodes, b: ComparedCodes, seen: tuple[Moments, Moments], min_count: int, jaccard: bool = False
) -> Iterator[SimilarityBlock]:
    """Pearson correlations, or Jaccard indices, between all columns of a and of b, block by block of columns of a.

    Correlation is `(sum x y - sum x sum y / n) / (spread x spread y)`, zeros included; the Jaccard index is |both fire|
    / |either fires|. Products are sparse: the cost is the number of pairs of codes on one row, linear in rows.

    Args:
        a: codes of one side.
        b: codes of the other side, on the same rows.
        seen: moments of a and of b.
        min_count: columns with fewer firings have similarity 0 with all.
        jaccard: True computes Jaccard indices of firing instead of correlations.
    """
    parts = list(chunks(a, b))
    work = _Products(a, b, parts)
    step = rows_of_blocks(b.width, reread=len(parts) > 1)
    finish = _finish_jaccard(seen, min_count) if jaccard else _finish_correlation(seen, min_count)

    def make(start: int) -> Tensor:
        return finish(start, work.block(start, min(start + step, a.width)))

    return ((start, partial(make, start)) for start in range(0, a.width, step))


def cosine_blocks(a: Float[np.ndarray, "d_a d"], b: Float[np.ndarray, "d_b d"]) -> Iterator[SimilarityBlock]:
    """Cosines between all rows of a and of b, block by block of rows of a; 0 for a row of zeros."""
    a, b = (rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-30) for rows in (a, b))
    step = rows_of_blocks(len(b))

    def make(start: int) -> Tensor:
        return torch.from_numpy(a[start : start + step] @ b.T)

    return ((start, partial(make, start)) for start in range(0, len(a), step))


class _Products:
    """Sums over rows of x y for a block of columns of one side and all columns of the other."""

    def __init__(self, a: ComparedCodes, b: ComparedCodes, parts: list[tuple[int, int]]) -> None:
        self.a, self.b, self.parts = a, b, parts
        self.kept = self._read(*parts[0]) if len(parts) == 1 else None

    def _read(self, start: int, stop: int) -> "tuple[csc_matrix, ComparedRows | csr_matrix]":
        rows = self.b.matrix(start, stop)
        return self.a.matrix(start, stop).tocsc(), ComparedRows.pad(rows) or rows

    def block(self, first: int, end: int) -> Float[Tensor, "n d_b"]:
        """The sums of one block, in float32."""
        found = torch.zeros(end - first, self.b.width)
        for part in self.parts:
            columns, rows = self.kept or self._read(*part)
            if isinstance(rows, ComparedRows):
                self._add(rows, columns, first, found)
            else:
                found += torch.from_numpy((columns[:, first:end].T @ rows).toarray())
        return found

    def _add(self, rows: "ComparedRows", columns: "csc_matrix", first: int, into: Tensor) -> None:
        """Add the products of a chunk; where blocks are few and large, the rows of a block are computed in parallel."""
        n = 1 if self.kept is not None else max(1, torch.get_num_threads())
        size = -(-len(into) // n)
        if n == 1:
            rows.add_products(columns, first, into)
            return
        with ThreadPoolExecutor(n) as pool:
            starts = range(0, len(into), size)
            list(pool.map(lambda a: rows.add_products(columns, first + a, into[a : a + size]), starts))


@dataclass(frozen=True, eq=False)
class ComparedRows:
    """Sparse rows with about equally many codes, padded to rectangles: adding whole rows is three times faster than
    scipy.
    """

    columns: Int32[Tensor, "n k"]
    values: Float32[Tensor, "n k"]

    @classmethod
    def pad(cls, matrix: "csr_matrix") -> "ComparedRows | None":
        """Rows padded with zeros in column 0; None where that would take more than twice the memory."""
        counts = np.diff(matrix.indptr)
        n, k = len(counts), int(counts.max(initial=0))
        if matrix.nnz == 0 or n * k > 2 * matrix.nnz:
            return None
        if matrix.nnz == n * k:
            columns, values = matrix.indices.reshape(n, k), matrix.data.reshape(n, k)
        else:
            columns, values = np.zeros((n, k), np.int32), np.zeros((n, k), np.float32)
            filled = np.arange(k) < counts[:, None]
            columns[filled], values[filled] = matrix.indices, matrix.data
        return cls(torch.from_numpy(columns.astype(np.int32, copy=False)), torch.from_numpy(values))

    def add_products(self, side: "csc_matrix", first: int, into: Float[Tensor, "m d_b"]) -> None:
        """Add to row i of `into` these rows, each multiplied by its code in column first + i of the other side."""
        for i, sums in enumerate(into):
            part = slice(*side.indptr[first + i : first + i + 2])
            if part.stop > part.start:
                rows, codes = torch.from_numpy(side.indices[part]), torch.from_numpy(side.data[part])
                values = self.values.index_select(0, rows).mul_(codes[:, None])
                sums.index_add_(0, self.columns.index_select(0, rows).view(-1), values.view(-1))


def _finish_correlation(seen: tuple[Moments, Moments], min_count: int) -> Callable[[int, Tensor], Tensor]:
    n, scales = max(1, seen[0].n), [of.scale(min_count) for of in seen]
    left, right = (
        torch.from_numpy((of.sums * scale / np.sqrt(n)).astype(np.float32))
        for of, scale in zip(seen, scales, strict=True)
    )
    rows, columns = (torch.from_numpy(scale.astype(np.float32)) for scale in scales)

    def finish(start: int, sums: Tensor) -> Tensor:
        part = slice(start, start + len(sums))
        return sums.mul_(rows[part, None]).mul_(columns).addr_(left[part], right, alpha=-1.0).clamp_(-1.0, 1.0)

    return finish


def _finish_jaccard(seen: tuple[Moments, Moments], min_count: int) -> Callable[[int, Tensor], Tensor]:
    fires = [torch.from_numpy(of.fires.astype(np.float32)) for of in seen]
    known = [side >= min_count for side in fires]

    def finish(start: int, both: Tensor) -> Tensor:
        part = slice(start, start + len(both))
        either = (fires[0][part, None] + fires[1] - both).clamp_(min=1)
        return both.div_(either).mul_(known[0][part, None] & known[1])

    return finish


def count_both(
    a: "csc_matrix", b: "csc_matrix", pairs: Int[np.ndarray, "n 2"], wanted: Bool[np.ndarray, "n"] | None = None
) -> Int[np.ndarray, "n"]:
    """For each pair of columns, the number of rows on which both are not zero; -1 where not `wanted`.

    Args:
        a: codes of one side, with row indices ascending in each column.
        b: codes of the other side, likewise.
        pairs: (column of a, column of b).
        wanted: pairs to count; None counts all.
    """
    found = np.full(len(pairs), -1)
    for k in np.flatnonzero(wanted) if wanted is not None else range(len(pairs)):
        i, j = pairs[k]
        x, y = (side.indices[slice(*side.indptr[at : at + 2])] for side, at in ((a, i), (b, j)))
        few, many = (x, y) if len(x) < len(y) else (y, x)
        at = np.searchsorted(many, few)
        found[k] = int((many[np.minimum(at, len(many) - 1)] == few).sum()) if len(many) else 0
    return found


def count_pairs(a: ComparedCodes, b: ComparedCodes, pairs: Int[np.ndarray, "n 2"]) -> Int[np.ndarray, "n"]:
    """For each pair of a feature of `a` and one of `b`, the number of rows on which both fire."""
    found = np.zeros(len(pairs), np.int64)
    for start, stop in chunks(a, b) if len(pairs) else ():
        found += count_both(a.matrix(start, stop).tocsc(), b.matrix(start, stop).tocsc(), pairs)
    return found


def choose_similarity(similarity: str | None, stores: bool) -> Similarity:
    """The similarity that is asked for, or the default; ValueError for one that stores, or SAEs, do not have."""
    kinds: tuple[Similarity, ...] = get_args(Similarity)
    allowed = kinds[:4] if stores else kinds[4:]
    found = next((kind for kind in allowed if similarity in (None, kind)), None)
    if found is None:
        raise ValueError(f"`similarity` must be one of {list(allowed)}, got {similarity!r}.")
    return found


@dataclass(frozen=True, eq=False)
class ActivationAxes:
    """Activations in a basis, readable as rows of codes."""

    acts: Activations
    mean: Float[torch.Tensor, "d"]
    directions: Float[torch.Tensor, "d d"]

    @classmethod
    def of(cls, acts: Activations, basis: str) -> "ActivationAxes":
        """Activations in the basis of neurons, or of the covariance's eigenvectors."""
        total, squares = torch.zeros(acts.d_in).double(), torch.zeros(acts.d_in, acts.d_in).double()
        for start in range(0, len(acts), CHUNK):
            x = acts[start : start + CHUNK].double()
            total += x.sum(0)
            squares += x.T @ x
        mean = total / len(acts)
        directions = torch.eye(acts.d_in).double()
        if basis == "pca":
            directions = torch.linalg.eigh(squares / len(acts) - torch.outer(mean, mean)).eigenvectors.flip(1)
        return cls(acts, mean.float(), directions.float())

    @property
    def d_sae(self) -> int:
        """Number of directions."""
        return self.acts.d_in

    @property
    def l0(self) -> float:
        """Number of directions: no value is 0."""
        return float(self.acts.d_in)

    def __len__(self) -> int:
        return len(self.acts)

    def matrix(self, start: int = 0, stop: int | None = None) -> "csr_matrix":
        """Centered values of some rows."""
        from scipy.sparse import csr_matrix

        return csr_matrix(((self.acts[start:stop].float() - self.mean) @ self.directions).numpy())

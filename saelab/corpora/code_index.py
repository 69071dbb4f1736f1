"""`CodeIndex`: an inverted index of sparse codes in memory, which finds the rows that are most like a query."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import torch
from jaxtyping import Float, Float32, Int, Integer, Shaped

from saelab.corpora.document_features import DocumentFeatures
from saelab.stores.feature_store import FeatureStore
from saelab.stores.files import save_tensors
from saelab.stores.packing import as_csr
from saelab.stores.tensors import TensorFile

if TYPE_CHECKING:
    from scipy.sparse import csr_matrix, spmatrix

StoredValues = Literal["none", "uint8", "float16"]
BLOCK = 65_536
"""rows of a block: their numbers fit 16 bits, and their scores a processor's cache"""
STEPS = 255  # of uint8
KIND, VERSION = "saelab code index", "1"
DTYPES = {"none": None, "uint8": np.uint8, "float16": np.float16}


@dataclass(frozen=True, kw_only=True, eq=False)
class _Block:
    """The rows of a block by side: side i is fired by `rows[offsets[i]:offsets[i + 1]]`."""

    offsets: Int[np.ndarray, "n_sides_1"]
    rows: Integer[np.ndarray, "nnz"]
    values: Shaped[np.ndarray, "nnz"] | None
    """magnitudes as they are stored; None where all count as 1"""
    scale: Float32[np.ndarray, "n"]
    """1 over the norm of each row's weighted code; 0 of a row without codes"""


class CodeIndex:
    """Sparse codes by feature, in memory, searched by cosine; `len()` is the number of rows.

    A row's vector has the weight of a side times its magnitude for each feature that fires, or the weight alone where
    codes are binarized (`values="none"`, 2 bytes a code). Weights are log(n / rows that fire) of the idf of information
    retrieval, or 1. Codes of opposite signs count against each other. A search reads the rows of the query's features
    and no others, so it takes the longer the denser these are.

    Args:
        blocks: the rows, by side, in parts.
        weights: (n_sides,) of sides: of one sign each where there are twice as many as features, else of both.
        steps: (n_sides,) what stored magnitudes of a side are multiples of; None where they are stored as they are.
        n_features: number of features.
        values: how magnitudes are stored.

    >>> from scipy.sparse import csr_matrix
    >>> index = CodeIndex.build(csr_matrix([[1.0, 0.0, 2.0], [0.0, 3.0, 0.0]]))
    >>> rows, scores = index.search(csr_matrix([[0.0, 1.0, 0.0]]), top=1)
    >>> rows.tolist(), scores.round(3).tolist()
    ([[1]], [[1.0]])
    """

    def __init__(
        self,
        blocks: Sequence[_Block],
        weights: Float[np.ndarray, "n_sides"],
        steps: Float[np.ndarray, "n_sides"] | None,
        n_features: int,
        values: StoredValues,
    ) -> None:
        self._blocks, self.weights, self._steps = blocks, weights, steps
        self.n_features, self.values = n_features, values
        self._signed = len(weights) == 2 * n_features

    @classmethod
    def build(
        cls,
        codes: "spmatrix | FeatureStore | DocumentFeatures",
        *,
        values: StoredValues = "none",
        idf: bool = True,
    ) -> "CodeIndex":
        """The index of codes: a scipy matrix (n_rows, n_features), all rows of a store, or pooled documents.

        Of pooled documents each side is a feature of its own, as in their matrix.

        Args:
            codes: the codes; entries of 0 do not fire.
            values: what is stored of a code beside its row: "none" (2 bytes a code in all), "uint8" for its magnitude
                in 255 steps up to the largest of its side (3 bytes), or "float16" (4 bytes).
            idf: weight sides by how rarely they fire.

        Raises:
            ValueError: no rows, codes that are not finite, or unknown `values`.
        """
        if values not in get_args(StoredValues):
            raise ValueError(f"`values` must be one of {list(get_args(StoredValues))}, got {values!r}.")
        given = _read(codes)
        if given.shape[0] == 0 or not np.isfinite(given.data).all():
            raise ValueError(
                f"`codes` must be at least one row of finite numbers, got {given.shape[0]} rows, "
                f"{int((~np.isfinite(given.data)).sum())} codes not finite."
            )
        n, n_features = given.shape
        sides = _by_side(given, signed=bool((given.data < 0).any()))
        counts = np.bincount(sides.indices, minlength=sides.shape[1])
        weights = np.log(n / np.maximum(counts, 1)) if idf else np.ones(len(counts))
        steps = None
        if values == "uint8":
            steps = np.maximum(sides.max(axis=0).toarray().ravel(), 1e-30) / STEPS
        blocks = [_make_block(sides[start : start + BLOCK], values, weights, steps) for start in range(0, n, BLOCK)]
        return cls(blocks, weights, steps, n_features, values)

    def __len__(self) -> int:
        return sum(len(block.scale) for block in self._blocks)

    def __repr__(self) -> str:
        size = f"{len(self):,} rows, {self.n_features:,} features, values={self.values!r}"
        return f"CodeIndex({size}, {self.n_bytes / len(self):.1f} bytes a row)"

    @property
    def n_bytes(self) -> int:
        """Bytes of all arrays that a search needs."""
        arrays = [self.weights, self._steps]
        for block in self._blocks:
            arrays += [block.offsets, block.rows, block.values, block.scale]
        return sum(array.nbytes for array in arrays if array is not None)

    def save(self, path: str | Path) -> None:
        """Write all that a search needs as one safetensors file with checksums, atomically.

        >>> import tempfile
        >>> from scipy.sparse import csr_matrix
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     CodeIndex.build(csr_matrix([[1.0, 0.0], [1.0, 3.0]])).save(f"{folder}/index.safetensors")
        ...     CodeIndex.load(f"{folder}/index.safetensors")
        CodeIndex(2 rows, 2 features, values='none', 21.0 bytes a row)
        """
        arrays: dict[str, np.ndarray | None] = {"weights": self.weights, "steps": self._steps}
        for i, block in enumerate(self._blocks):
            arrays |= {f"{name}.{i}": getattr(block, name) for name in _Block.__dataclass_fields__}
        tensors = {name: torch.from_numpy(array) for name, array in arrays.items() if array is not None}
        facts = {"kind": KIND, "version": VERSION, "values": self.values, "n_features": str(self.n_features)}
        save_tensors(path, tensors, facts | {"n_blocks": str(len(self._blocks))})

    @classmethod
    def load(cls, path: str | Path) -> "CodeIndex":
        """The index that `save` wrote; no other file can make a search read or write out of bounds.

        Raises:
            FileNotFoundError: no such file.
            ValueError: another kind of file, or one that is damaged or whose parts do not fit each other.
        """
        file = TensorFile.open(path)
        facts = file.metadata
        n_features, n_blocks = (_read_count(facts.get(name, "")) for name in ("n_features", "n_blocks"))
        if facts.get("kind") != KIND or facts.get("version") != VERSION or facts.get("values") not in DTYPES:
            raise ValueError(f"{path} must be an index of version {VERSION} that `CodeIndex.save` wrote, got {facts}.")
        values: StoredValues = facts["values"]  # type: ignore[assignment]
        names = ["weights", *(["steps"] if values == "uint8" else [])]
        parts = ["offsets", "rows", "scale", *(["values"] if values != "none" else [])]
        wanted = {*names, *(f"{part}.{i}" for part in parts for i in range(min(n_blocks, len(file.specs))))}
        if wanted != set(file.specs) or n_blocks < 1:
            raise ValueError(f"{path} must hold the {n_blocks} blocks that its header tells of. Was it edited?")
        arrays = {name: file.read(name).clone().numpy() for name in file.specs}
        n_sides = arrays["weights"].size
        parts_of = [{part: arrays[f"{part}.{i}"] for part in parts} for i in range(n_blocks)]
        fits = n_sides in (n_features, 2 * n_features) and all(
            _is_sound(arrays[name], np.float64, (n_sides,)) and (arrays[name] >= 0).all() for name in names
        )
        full = all(one["scale"].size == BLOCK for one in parts_of[:-1])
        if not fits or not full or not all(_is_whole(one, n_sides, DTYPES[values]) for one in parts_of):
            raise ValueError(f"{path} must hold arrays that fit each other, got others. Was it edited?")
        blocks = [_Block(**({"values": None} | one)) for one in parts_of]
        return cls(blocks, arrays["weights"], arrays.get("steps"), n_features, values)

    def search(
        self, queries: "spmatrix", top: int = 10
    ) -> tuple[Int[np.ndarray, "n_queries top"], Float[np.ndarray, "n_queries top"]]:
        """The `top` rows most like each query, best first, and their cosines; of equal ones the first row.

        Args:
            queries: codes of the queries, (n_queries, n_features).
            top: number of rows; -1 with a score of -inf stands for those that there are not.

        Raises:
            ValueError: queries of another width, or `top` below 1.
        """
        given = _read(queries)
        if given.shape[1] != self.n_features or top < 1:
            raise ValueError(
                f"`queries` must have {self.n_features} columns and `top` be at least 1, got {given.shape[1]} and "
                f"{top}."
            )
        rows, scores = np.full((given.shape[0], top), -1), np.full((given.shape[0], top), -np.inf)
        for i in range(given.shape[0]):
            part = slice(*given.indptr[i : i + 2])
            found = self._find(given.indices[part], given.data[part].astype(np.float64), top)
            rows[i, : len(found[0])], scores[i, : len(found[0])] = found
        return rows, scores

    def _find(self, features: np.ndarray, codes: np.ndarray, top: int) -> tuple[np.ndarray, np.ndarray]:
        sides, factors = self._weigh(features, codes)
        rows, scores = np.zeros(0, np.int64), np.zeros(0)
        first = 0
        for block in self._blocks:
            own = self._score(block, sides, factors)
            least = scores[-1] if len(scores) == top else -np.inf
            near = np.flatnonzero(own > least) if len(scores) == top else np.arange(len(own))
            if len(near) > 4 * top:
                least = np.partition(own[near], -top)[-top]
                near = near[own[near] >= least]
            rows, scores = np.append(rows, near + first), np.append(scores, own[near])
            best = np.argsort(-scores, kind="stable")[:top]
            rows, scores = rows[best], scores[best]
            first += len(own)
        return rows, scores

    def _weigh(self, features: np.ndarray, codes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Sides to read and the factor of each, for a query of norm 1; opposite sides have the factor's negative."""
        sizes = np.ones(len(codes)) if self.values == "none" else np.abs(codes)
        if not self._signed:  # nothing here is negative: a negative code is against its feature
            sides, signs = features, np.sign(codes)
        else:
            sides, signs = 2 * features + (codes < 0), np.ones(len(codes))
        own = self.weights[sides] * sizes
        factors = signs * own * self.weights[sides] / max(float(np.linalg.norm(own)), 1e-30)
        if self._signed:
            # The other side has a weight of its own: the product of both vectors' entries is with that.
            other = -own * self.weights[sides ^ 1] / max(float(np.linalg.norm(own)), 1e-30)
            sides, factors = np.append(sides, sides ^ 1), np.append(factors, other)
        if self._steps is not None:
            factors = factors * self._steps[sides]
        return sides, factors

    def _score(self, block: _Block, sides: np.ndarray, factors: np.ndarray) -> np.ndarray:
        bounds = block.offsets[sides], block.offsets[sides + 1]
        parts = [slice(start, stop) for start, stop in zip(*(one.tolist() for one in bounds), strict=True)]
        if not parts:
            return np.zeros(len(block.scale))
        weights = np.repeat(factors, bounds[1] - bounds[0])
        if block.values is not None:
            weights *= np.concatenate([block.values[part] for part in parts])
        rows = np.concatenate([block.rows[part] for part in parts])
        return np.bincount(rows, weights, len(block.scale)) * block.scale


def _read_count(text: str) -> int:
    """A number of a header; 0 for anything else."""
    return int(text) if text.isascii() and text.isdigit() and len(text) < 10 else 0


def _is_sound(array: np.ndarray, dtype: Any, shape: tuple[int, ...]) -> bool:
    return array.dtype == dtype and array.shape == shape and bool(np.isfinite(array).all())


def _is_whole(block: dict[str, np.ndarray], n_sides: int, stored: Any) -> bool:
    """Whether a block's arrays have their types, and point nowhere else than into each other."""
    offsets, rows, scale = block["offsets"], block["rows"], block["scale"]
    n, nnz = scale.size, rows.size
    if not _is_sound(offsets, np.int32, (n_sides + 1,)) or not _is_sound(scale, np.float32, (n,)):
        return False
    rises = offsets[0] == 0 and offsets[-1] == nnz and bool((np.diff(offsets) >= 0).all())
    inside = _is_sound(rows, np.uint16, (nnz,)) and (nnz == 0 or int(rows.max()) < n)
    told = stored is None or _is_sound(block["values"], stored, (nnz,))
    return bool(0 < n <= BLOCK and (scale >= 0).all() and rises and inside and told)


def _read(codes: "spmatrix | FeatureStore | DocumentFeatures") -> "csr_matrix":
    from scipy.sparse import csr_matrix

    if isinstance(codes, FeatureStore | DocumentFeatures):
        return codes.matrix() if isinstance(codes, FeatureStore) else codes.matrix
    given = csr_matrix(codes)
    if (given.data == 0).any():
        given = given.copy()
        given.eliminate_zeros()
    return given


def _by_side(codes: "csr_matrix", signed: bool) -> "csr_matrix":
    """Magnitudes, with two columns a feature where any code is negative."""
    if not signed:
        return codes
    columns = 2 * codes.indices.astype(np.int64) + (codes.data < 0)
    shape = codes.shape[0], 2 * codes.shape[1]
    return as_csr(np.abs(codes.data), columns, codes.indptr, shape)


def _make_block(rows: "csr_matrix", values: StoredValues, weights: np.ndarray, steps: np.ndarray | None) -> _Block:
    by_side = rows.tocsc()
    sides = np.repeat(np.arange(rows.shape[1]), by_side.indptr[1:] - by_side.indptr[:-1])
    stored, sizes = None, np.ones(len(sides))
    if steps is not None:
        stored = np.maximum(np.rint(by_side.data / steps[sides]), 1).astype(np.uint8)  # none that fires is lost
        sizes = stored * steps[sides]
    elif values == "float16":
        stored = by_side.data.astype(np.float16)
        sizes = stored.astype(np.float64)
    squares = np.bincount(by_side.indices, (weights[sides] * sizes) ** 2, rows.shape[0])
    scale = np.divide(1, np.sqrt(squares), out=np.zeros(len(squares)), where=squares > 0)
    return _Block(
        offsets=by_side.indptr.astype(np.int32),
        rows=by_side.indices.astype(np.uint16),
        values=stored,
        scale=scale.astype(np.float32),
    )

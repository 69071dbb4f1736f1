"""Shards of a feature store: sparse codes by token and by feature, in the smallest integers that fit.

A shard is read as memory-mapped arrays, whose parts are checked when they are first read.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from jaxtyping import Float, Integer
from numpy.typing import NDArray

from saelab.stores.tensors import TensorFile

if TYPE_CHECKING:
    from scipy.sparse import csr_matrix

TINIEST = 2.0**-24
"""The smallest float16 above 0: a code that fires must not become a code that does not."""
LARGEST = 65504.0
"""The largest finite float16."""
Array: TypeAlias = NDArray[Any]
MAPPED_BYTES = 2**25
"""Bytes read of a store's mapped files before the maps are released; what was read stays resident until then."""
FAULT_BYTES = 2**16
"""Bytes that the system may map for a single number that is read."""


def pack_codes(
    offsets: Integer[np.ndarray, "n_1"],
    latents: Integer[np.ndarray, "nnz"],
    values: Float[np.ndarray, "nnz"],
    d_sae: int,
) -> dict[str, np.ndarray]:
    """The arrays of a shard by name: codes ordered by token (latents ascending) and by feature (tokens ascending).

    Args:
        offsets: (n_tokens + 1,) token i owns the codes `offsets[i]` to `offsets[i + 1]`.
        latents: latent of each code.
        values: the codes, float16 or float32; they keep their dtype and bits.
        d_sae: number of latents.
    """
    bits = values.view(np.int16 if values.dtype == np.float16 else np.int32)  # scipy does not sort float16
    n = len(offsets) - 1
    by_token = as_csr(bits, latents, offsets, (n, d_sae))
    by_feature = by_token.tocsc()
    if not _ascend(latents, offsets):
        by_token = by_feature.tocsr()
    return {
        "offsets": by_token.indptr.astype(np.int32, copy=False),
        "latents": by_token.indices.astype(smallest_int(d_sae - 1)),
        "values": by_token.data.view(values.dtype),
        "feature_offsets": by_feature.indptr.astype(np.int32, copy=False),
        "feature_tokens": by_feature.indices.astype(smallest_int(n - 1)),
        "feature_values": by_feature.data.view(values.dtype),
    }


def _ascend(latents: np.ndarray, offsets: np.ndarray) -> bool:
    """Whether the latents of every token are in ascending order."""
    if len(latents) < 2:
        return True
    rises = latents[1:] > latents[:-1]
    borders = offsets[1:-1]
    rises[borders[(borders > 0) & (borders < len(latents))] - 1] = True
    return bool(rises.all())


def as_csr(values: Any, indices: Any, offsets: Any, shape: tuple[int, int]) -> "csr_matrix":
    """A scipy CSR matrix made from its arrays without checks, and without copies where their types allow.

    Args:
        values: the non-zero entries, row by row.
        indices: column of each entry.
        offsets: (n_rows + 1,) row i owns the entries `offsets[i]` to `offsets[i + 1]`.
        shape: (n_rows, n_columns).
    """
    from scipy.sparse import csr_matrix

    found = csr_matrix(shape, dtype=values.dtype)
    found.data, found.indices, found.indptr = values, indices.astype(np.int32, copy=False), offsets
    return found


def round_values(values: Float[np.ndarray, "nnz"], dtype: str) -> Float[np.ndarray, "nnz"]:
    """Codes in the dtype of a store: "float32" unchanged, "float16" rounded to nearest, but never to 0.

    The error of float16 is at most 2^-11 of the value, and at most 2^-24 for values below 2^-14.

    Raises:
        ValueError: a value is not finite, or beyond 65504, the largest float16.

    >>> round_values(np.array([1.0, -1e-12], np.float32), "float16").tolist()
    [1.0, -5.960464477539063e-08]
    """
    if not bool(np.isfinite(values).all()):
        raise ValueError(
            f"Codes must be finite to be stored, {int((~np.isfinite(values)).sum())} of {len(values)} are NaN or "
            "infinite. Are the SAE's weights?"
        )
    if dtype == "float32":
        return values.astype(np.float32, copy=False)
    peak = float(np.abs(values).max(initial=0.0))
    if peak > LARGEST:
        raise ValueError(f"Codes must be at most {LARGEST:.0f} to be stored in float16, got {peak:.6g}; use float32.")
    rounded = values.astype(np.float16)
    lost = (rounded == 0) & (values != 0)
    rounded[lost] = np.copysign(np.float16(TINIEST), values[lost])
    return rounded


def smallest_int(largest: int) -> np.dtype[Any]:
    """The smallest of uint8, uint16 and int32 that holds 0..largest; ValueError from 2^31 on.

    >>> smallest_int(24_575)
    dtype('uint16')
    """
    for dtype in (np.uint8, np.uint16, np.int32):
        if largest <= np.iinfo(dtype).max:
            return np.dtype(dtype)
    raise ValueError(f"Sizes must be below 2^31, got {largest}.")


class MapBudget:
    """Bounds the resident memory of a store: releases the maps of all shards whenever `MAPPED_BYTES` were read.

    Arrays that are still in use keep their own map; the next read maps again, without repeating checks.
    """

    def __init__(self) -> None:
        self._read = 0
        self._release: list[Callable[[], None]] = []

    def add(self, release: Callable[[], None]) -> None:
        """Add a shard by the function that releases its maps."""
        self._release.append(release)

    def count(self, n_bytes: int) -> None:
        """Count bytes that were read, and release all maps where the budget is used up."""
        self._read += max(n_bytes, FAULT_BYTES)
        if self._read > MAPPED_BYTES:
            self._read = 0
            for release in self._release:
                release()


if TYPE_CHECKING:
    ArraysByName = Mapping[str, Array]
else:
    ArraysByName = Mapping  # a type checker at run time would read what it holds


class ShardArrays(ArraysByName):
    """The arrays of a shard by name, memory-mapped. Where values by feature are not stored they are looked up.

    Before a part is returned, its checksum and its numbers are checked: offsets rise from 0 to the number of codes,
    latents are below d_sae, tokens below the number of rows, and codes are finite and not 0. Code that multiplies or
    gathers does not check them again.

    Args:
        file: the shard's file.
        d_sae: number of features.
        budget: of the store, shared by its shards.

    Raises:
        ValueError: on reading, where a part is damaged or the file was replaced; the message names it.
    """

    def __init__(self, file: TensorFile, d_sae: int, budget: MapBudget) -> None:
        self._file, self._budget = file, budget
        budget.add(self._release)
        self._identity = file.identify()
        self._maps: dict[str, Array] = {}
        n_tokens = file.specs["places"].shape[0]
        self._bounds = {"latents": d_sae, "feature_tokens": n_tokens, "places": 2**31, "pixels": 256}
        self._n_entries = file.specs["latents"].shape[0]

    def __getitem__(self, name: str) -> Array:
        n = self._n_entries if name == "feature_values" else self._file.specs[name].shape[0]
        return self.part(name, 0, n)

    def __iter__(self) -> Iterator[str]:
        return iter(self._file.specs)

    def __len__(self) -> int:
        return len(self._file.specs)

    def of_features(self, start: int, stop: int) -> tuple[Array, Array, Array]:
        """Offsets from 0, tokens and values of features `start:stop`."""
        offsets = self.part("feature_offsets", start, stop + 1).astype(np.int64)
        part = int(offsets[0]), int(offsets[-1])
        return offsets - offsets[0], self.part("feature_tokens", *part), self.part("feature_values", *part)

    def of_rows(self, start: int, stop: int) -> "csr_matrix":
        """Codes of rows `start:stop`, (stop - start, d_sae) in float32."""
        offsets = self.part("offsets", start, stop + 1)
        part = int(offsets[0]), int(offsets[-1])
        values = self.part("values", *part).astype(np.float32)
        return as_csr(
            values, self.part("latents", *part), offsets - offsets[0], (stop - start, self._bounds["latents"])
        )

    def part(self, name: str, start: int, stop: int) -> Array:
        """Entries `start:stop` of an array, checked when they are first read; ValueError for damage."""
        if name == "feature_values" and name not in self._file.specs:
            return self._look_up(start, stop)
        array = self._maps.get(name)
        if array is None:
            array = self._maps[name] = self._map(name)
        if new := self._file.check(name, start, stop):
            cause = self._find_fault(name, array, new.start, new.stop)
            if cause:
                self._file.forget(name)
                raise ValueError(
                    f"{self._file.path} must hold a store's codes, but its {name} {cause}. It was edited or written "
                    "wrongly: harvest again."
                )
        part = array[start:stop]
        self._budget.count(part.nbytes + len(new) * array.itemsize)
        return part

    def _look_up(self, start: int, stop: int) -> Array:
        """Entries `start:stop` of the values by feature, found among those by token where they are not stored.

        Raises:
            ValueError: the codes by token lack one.
        """
        rows, ends = self.part("feature_tokens", start, stop).astype(np.int64), self["feature_offsets"]
        features = np.searchsorted(ends, np.arange(start, stop), "right") - 1
        offsets, latents = self["offsets"], self["latents"]
        low, high = offsets[rows].astype(np.int64), offsets[rows + 1].astype(np.int64)
        last = np.maximum(high - 1, 0)
        for _ in range(int((high - low).max(initial=0)).bit_length()):  # binary search, of all entries at once
            middle = np.minimum((low + high) // 2, last)
            below = latents[middle] < features
            low, high = np.where(below, middle + 1, low), np.where(below, high, middle)
        found = np.minimum(low, last)
        if len(found) and not np.array_equal(latents[found], features):
            raise ValueError(
                f"{self._file.path} must hold the same codes by token and by feature, got others. It was edited or "
                "written wrongly: harvest again."
            )
        values: Array = self["values"][found]
        return values

    def _map(self, name: str) -> Array:
        """One array; ValueError where the file is no longer the one that was checked."""
        if self._file.identify() != self._identity:
            raise ValueError(
                f"{self._file.path} must stay as it was opened, but it was replaced or edited. Load the store again."
            )
        return self._file.map(name).numpy()

    def _release(self) -> None:
        self._maps.clear()
        self._file.release()

    def _find_fault(self, name: str, array: Array, start: int, stop: int) -> str:
        """Description of what is wrong with entries `start:stop`; empty where nothing is."""
        if name.endswith("offsets"):
            return self._find_fault_of_offsets(array, start, stop)
        part = array[start:stop]
        if name.endswith("values"):
            return "" if bool(np.isfinite(part).all()) and bool(part.all()) else "are not all finite and not 0"
        low, high = int(part.min()), int(part.max())
        if low < 0 or high >= self._bounds[name]:
            return f"must be in 0..{self._bounds[name] - 1}, got {low} to {high}"
        return ""

    def _find_fault_of_offsets(self, array: Array, start: int, stop: int) -> str:
        part = array[max(0, start - 1) : stop + 1]
        ends = int(part[0]), int(part[-1])
        whole = (start > 0 or ends[0] == 0) and (stop < len(array) or ends[1] == self._n_entries)
        if not whole or ends[0] < 0 or ends[1] > self._n_entries or bool((part[1:] < part[:-1]).any()):
            return f"must rise from 0 to {self._n_entries}"
        return ""

"""One shard of a feature store as arrays: what is read of it for the first time is checked, by part."""

import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np

from saelab.stores.tensors import TensorFile

Array = np.ndarray
MAPPED_BYTES = 2**25
"""Of a store's mapped files so much is read before the maps are let go: what was read stays resident until then."""
FAULT_BYTES = 2**16
"""What the system may map around a single number that is read."""


class MapBudget:
    """Lets go of all maps of a store's shards whenever `MAPPED_BYTES` were read through them.

    Arrays that somebody still holds keep their own map, and what is asked for next is mapped again, without new checks.
    """

    def __init__(self) -> None:
        self._read = 0
        self._release: list[Callable[[], None]] = []

    def add(self, release: Callable[[], None]) -> None:
        """One more shard, with what lets go of its maps."""
        self._release.append(release)

    def count(self, n_bytes: int) -> None:
        """Note that so much was read."""
        self._read += max(n_bytes, FAULT_BYTES)
        if self._read > MAPPED_BYTES:
            self._read = 0
            for release in self._release:
                release()


class ShardArrays(Mapping):  # a type checker at run time would read what it holds
    """The arrays of a shard by name, memory-mapped.

    Before anybody gets a part, its checksum is compared, and its numbers are held against what they point at: offsets
    rise from 0 to the number of codes, latents are below d_sae, tokens below the number of rows, and codes are finite
    and not 0. Nothing that multiplies or gathers looks at them again. Raises ValueError naming the file.
    """

    def __init__(self, file: TensorFile, d_sae: int, budget: MapBudget) -> None:
        self._file, self._budget = file, budget
        budget.add(self._release)
        self._identity = _identify(file.path)
        self._maps: dict[str, Array] = {}
        n_tokens = file.specs["places"].shape[0]
        self._bounds = {"latents": d_sae, "feature_tokens": n_tokens, "places": 2**31}
        self._n_entries = file.specs["latents"].shape[0]

    def __getitem__(self, name: str) -> Array:
        return self.part(name, 0, self._file.specs[name].shape[0])

    def __iter__(self) -> Iterator[str]:
        return iter(self._file.specs)

    def __len__(self) -> int:
        return len(self._file.specs)

    def part(self, name: str, start: int, stop: int) -> Array:
        """Entries start..stop of an array, checked."""
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

    def _map(self, name: str) -> Array:
        """One array; ValueError where another file stands there than the one that was checked."""
        if _identify(self._file.path) != self._identity:
            raise ValueError(
                f"{self._file.path} must stay as it was opened, but it was replaced or edited. Load the store again."
            )
        return self._file.map(name).numpy()

    def _release(self) -> None:
        self._maps.clear()
        self._file.release()

    def _find_fault(self, name: str, array: Array, start: int, stop: int) -> str:
        """What is wrong with entries start..stop, or nothing."""
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


def _identify(path: Path) -> tuple[int, ...]:
    """What differs between a file and one that took its place."""
    found = os.stat(path)
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns

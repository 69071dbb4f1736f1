"""One shard of a feature store as arrays: what is read of it for the first time is checked, by part."""

from collections.abc import Iterator, Mapping

import numpy as np

from saelab.stores.tensors import TensorFile

Array = np.ndarray


class ShardArrays(Mapping):  # a type checker at run time would read what it holds
    """The arrays of a shard by name, memory-mapped.

    Before anybody gets a part, its checksum is compared, and its numbers are held against what they point at: offsets
    rise from 0 to the number of codes, latents are below d_sae, tokens below the number of rows, and codes are finite
    and not 0. Nothing that multiplies or gathers looks at them again. Raises ValueError naming the file.
    """

    def __init__(self, file: TensorFile, d_sae: int) -> None:
        self._file = file
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
        if name not in self._maps:
            self._maps[name] = self._file.map(name).numpy()
        array = self._maps[name]
        if new := self._file.check(name, start, stop):
            cause = self._find_fault(name, array, new.start, new.stop)
            if cause:
                self._file.forget(name)
                raise ValueError(
                    f"{self._file.path} must hold a store's codes, but its {name} {cause}. It was edited or written "
                    "wrongly: harvest again."
                )
        return array[start:stop]

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

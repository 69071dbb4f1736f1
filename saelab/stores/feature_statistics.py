"""Statistics of every feature of a store: firing counts, sums, maxima and a histogram of sizes, by sign."""

from collections.abc import Iterable
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int

from saelab.stores.files import save_tensors

N_BINS = 48
LOWEST = -24
"""Bin b counts magnitudes from 2^(b - 24) to below 2^(b - 23); the outer bins take what is beyond them."""
STATISTICS = "statistics.safetensors"


@dataclass(frozen=True, eq=False)
class FeatureStatistics:
    """Statistics over the tokens of a store, by feature and sign: column 0 is positive codes, column 1 negative."""

    fires: Int[np.ndarray, "d_sae 2"]
    """number of tokens on which the feature fires"""
    sums: Float[np.ndarray, "d_sae 2"]
    """sum of |z|"""
    squares: Float[np.ndarray, "d_sae 2"]
    """sum of z^2"""
    peaks: Float[np.ndarray, "d_sae 2"]
    """largest |z|; 0 where there is none"""
    histogram: Int[np.ndarray, "d_sae 2 n_bins"]
    """number of firings by octave of |z|"""

    @classmethod
    def zeros(cls, d_sae: int) -> "FeatureStatistics":
        """Statistics of no tokens, to which shards are added."""
        counts, floats = np.zeros((d_sae, 2), np.int64), np.zeros((d_sae, 2))
        histogram = np.zeros((d_sae, 2, N_BINS), np.int64)
        return cls(counts, floats, floats.copy(), floats.copy(), histogram)

    @classmethod
    def from_arrays(cls, arrays: dict[str, np.ndarray], d_sae: int) -> "FeatureStatistics":
        """The statistics in the output of `to_arrays`.

        Raises:
            ValueError: names, shapes or dtypes differ, or a value is not finite, or negative where that cannot be.
        """
        wanted = {name: (array.dtype, array.shape) for name, array in cls.zeros(d_sae).to_arrays().items()}
        got = {name: (array.dtype, array.shape) for name, array in arrays.items()}
        if got != wanted:
            names = sorted(name for name in wanted.keys() | got.keys() if wanted.get(name) != got.get(name))
            raise ValueError(
                f"statistics must be of {d_sae} features; {names[0]!r} should be {wanted.get(names[0])}, got "
                f"{got.get(names[0])}. Harvest again with resume=False."
            )
        for name, array in arrays.items():
            if not (bool(np.isfinite(array).all()) and (name == "sums" or bool((array >= 0).all()))):
                raise ValueError(
                    f"statistics must be finite and at least 0, got others in `{name}`. Harvest again "
                    "with resume=False."
                )
        return cls(**arrays)

    def add(self, offsets: Int[np.ndarray, "d_sae_1"], values: Float[np.ndarray, "nnz"]) -> None:
        """Add a shard's codes in order of features.

        Args:
            offsets: (d_sae + 1,) feature j owns the codes `offsets[j]` to `offsets[j + 1]`.
            values: the codes.
        """
        fired = np.flatnonzero(np.diff(offsets))
        if len(fired) == 0:
            return
        starts, values = offsets[:-1][fired], values.astype(np.float32)
        for side, part in enumerate((np.maximum(values, 0), np.maximum(-values, 0))):
            self.fires[fired, side] += np.add.reduceat(part > 0, starts, dtype=np.int64)
            self.sums[fired, side] += np.add.reduceat(part, starts, dtype=np.float64)
            self.squares[fired, side] += np.add.reduceat(np.square(part, dtype=np.float64), starts)
            self.peaks[fired, side] = np.maximum(self.peaks[fired, side], np.maximum.reduceat(part, starts))
        self._count_octaves(np.diff(offsets), values)

    def _count_octaves(self, counts: np.ndarray, values: np.ndarray) -> None:
        bits = values.view(np.int32)
        octaves = np.clip(((bits >> 23) & 255) - 127 - LOWEST, 0, N_BINS - 1)
        sides = 2 * np.repeat(np.arange(len(counts), dtype=np.int32), counts) + (bits < 0)
        cells = np.bincount(sides * N_BINS + octaves, minlength=self.histogram.size)
        np.add(self.histogram, cells.reshape(self.histogram.shape), out=self.histogram)

    def to_arrays(self) -> dict[str, np.ndarray]:
        """The fields as arrays, by name."""
        return {f.name: getattr(self, f.name) for f in fields(self)}


def measure(d_sae: int, shards: Iterable[tuple[np.ndarray, np.ndarray]]) -> FeatureStatistics:
    """Statistics of all features.

    Args:
        d_sae: number of features.
        shards: (offsets, values) of each shard's codes in order of features.

    >>> found = measure(2, [(np.array([0, 1, 3]), np.array([0.5, 2.0, -1.0], np.float16))])
    >>> found.fires.tolist(), found.peaks.tolist()
    ([[1, 0], [1, 1]], [[0.5, 0.0], [2.0, 1.0]])
    """
    found = FeatureStatistics.zeros(d_sae)
    for offsets, values in shards:
        found.add(offsets, values)
    return found


def save_statistics(folder: Path, statistics: FeatureStatistics) -> dict[str, str]:
    """Write the statistics of a store and return their file's checksum, by file name."""
    tensors = {name: torch.from_numpy(array) for name, array in statistics.to_arrays().items()}
    return {STATISTICS: save_tensors(folder / STATISTICS, tensors)}

"""`FeatureStore`: the sparse feature activations of a corpus on disk, read by token or by feature.

Statistics of every feature are computed when a store is written: firing counts, sums, maxima, histogram; by sign.
"""

from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any, SupportsIndex, TypeAlias

import numpy as np
import torch
from jaxtyping import Bool, Float, Float32, Int, Integer
from numpy.typing import NDArray

from saelab.functional.indices import ROWS_AT_ONCE, ChosenRuns, MarkedRows, find_runs, read_feature
from saelab.stores.corpus import Places, StoredText, choose_documents
from saelab.stores.files import checksum, find_inside, save_tensors
from saelab.stores.manifest import FeatureManifest, Provenance
from saelab.stores.packing import MapBudget, ShardArrays, as_csr
from saelab.stores.results import Drawn
from saelab.stores.tensors import TensorFile, load_tensors
from saelab.stores.validation import naming

if TYPE_CHECKING:
    from scipy.sparse import csc_matrix, csr_matrix

N_BINS = 48
LOWEST = -24
"""Bin b counts magnitudes from 2^(b - 24) to below 2^(b - 23); the outer bins take what is beyond them."""
IntegerArray: TypeAlias = NDArray[np.integer[Any]]
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


@dataclass(frozen=True, eq=False)
class Firings:
    """Non-zero codes of one feature or one token: tokens (or features) in increasing order, and the code of each."""

    indices: Integer[np.ndarray, "n"]
    """tokens of a feature, or features of a token"""
    values: Float32[np.ndarray, "n"]
    """the codes, never 0"""

    def __len__(self) -> int:
        return len(self.indices)


@dataclass(frozen=True, eq=False)
class Feature(Firings, Drawn):
    """The non-zero codes of one feature; displayed as a card in Jupyter."""

    store: "FeatureStore"
    feature: int

    def __str__(self) -> str:
        n_negative = int((self.values < 0).sum())
        signs = f", {n_negative:,} of them negative" if n_negative else ""
        return f"feature {self.feature}: {len(self):,} firings on {len(self.store):,} tokens{signs}"


class FeatureStore:
    """The sparse feature activations of a corpus on disk, written by `harvest` and read by token or by feature.

    Row i is one token that the mask kept, in the order of the text. Opening is instant whatever the size: shards are
    memory-mapped when they are read, and only the parts that are read are held. Each part is checked when it is first
    read: its checksum, and that its numbers are offsets, tokens, features and codes of this store.
    """

    def __init__(self, folder: Path, manifest: FeatureManifest, files: Sequence[TensorFile]) -> None:
        self.folder, self.manifest = folder, manifest
        self._starts = [0, *accumulate(shard.n_tokens for shard in manifest.shards)]
        budget = MapBudget()
        self._shards = [ShardArrays(file, manifest.d_sae, budget) for file in files]

    @classmethod
    def load(cls, folder: str | Path) -> "FeatureStore":
        """The store in a folder that `harvest` wrote; sizes, shapes and dtypes of its files are checked.

        Raises:
            FileNotFoundError: the folder or a file of it is missing.
            ValueError: a file is truncated or edited, or the store is unfinished.
        """
        manifest = FeatureManifest.load_complete(folder)
        files = manifest.check_shards(folder)
        if (found := sum(file.specs["latents"].shape[0] for file in files)) != manifest.n_entries:
            raise ValueError(
                f"{folder} must hold the {manifest.n_entries} codes of its manifest.json, got {found}. Was it edited?"
            )
        return cls(Path(folder), manifest, files)

    def verify(self) -> None:
        """Compare the checksum of every file with the manifest; ValueError naming the first that differs."""
        self.manifest.check_shards(self.folder, verify=True)
        for file, crc32 in self.manifest.files.items():
            path = find_inside(self.folder, file)
            if checksum(path) != crc32:
                raise ValueError(
                    f"{path} must have the checksum in the manifest, got another. Harvest again with resume=False."
                )

    @property
    def d_sae(self) -> int:
        """Number of features."""
        return self.manifest.d_sae

    @property
    def n_tokens(self) -> int:
        """Number of tokens (rows); equal to `len`."""
        return self._starts[-1]

    def __len__(self) -> int:
        return self.n_tokens

    @property
    def n_entries(self) -> int:
        """Number of non-zero codes."""
        return self.manifest.n_entries

    @property
    def l0(self) -> float:
        """Mean number of features that fire per token."""
        return self.n_entries / self.n_tokens

    @property
    def signed(self) -> bool:
        """Whether any code is negative."""
        return bool(self.statistics.fires[:, 1].any())

    @property
    def provenance(self) -> Provenance:
        """Origin of the activations that were encoded: model, hook point, text, mask."""
        with naming(self.folder / "manifest.json"):
            return Provenance.from_dict(self.manifest.provenance)

    def __repr__(self) -> str:
        size = f"{self.n_tokens:,} tokens, {self.d_sae:,} features, l0 {self.l0:.4g}"
        return f"FeatureStore({size}, of {self.manifest.source})"

    @cached_property
    def text(self) -> StoredText:
        """All tokens of the corpus, those that the mask dropped included."""
        return StoredText.load(self.folder)

    @cached_property
    def statistics(self) -> FeatureStatistics:
        """Firing counts, sums, maxima and histogram of every feature, by sign."""
        path = find_inside(self.folder, STATISTICS)
        with naming(path):
            arrays = {name: tensor.numpy() for name, tensor in load_tensors(path).items()}
            return FeatureStatistics.from_arrays(arrays, self.d_sae)

    @cached_property
    def places(self) -> Integer[np.ndarray, "n_tokens"]:
        """Index in `text` of each row."""
        return self.where[:]

    @cached_property
    def where(self) -> Places:
        """Index in `text` of each row, read when it is sliced, unless `places` has read all of it already."""
        if "places" in self.__dict__:
            return Places([len(self)], lambda _, start, stop: self.places[start:stop], len(self.text), self.folder)
        sizes, shards = np.diff(self._starts).tolist(), self._shards
        return Places(sizes, lambda i, *part: shards[i].part("places", *part), len(self.text), self.folder)

    def find_documents(self, rows: MarkedRows | None = None) -> Int[np.ndarray, "n_runs"]:
        """Indices into `rows` at which a new document begins.

        Args:
            rows: the rows; None for all rows of the store.
        """
        return self._find_runs(rows)[0]

    def _find_runs(self, rows: MarkedRows | None) -> tuple[IntegerArray, IntegerArray]:
        """Positions within `rows` at which runs of one document begin, and the document of each."""
        n, starts, documents = (
            len(self) if rows is None else len(rows),
            [np.zeros(0, np.int64)],
            [np.zeros(0, np.int64)],
        )
        for start in range(0, n, ROWS_AT_ONCE):
            part = slice(max(0, start - 1), start + ROWS_AT_ONCE)  # with the row before, which may be of the same run
            ids = self.text.doc_ids[self._places_of(part, rows)]
            new = find_runs(ids)[min(start, 1) :]
            starts.append(new + part.start)
            documents.append(ids[new])
        return np.concatenate(starts), np.concatenate(documents)

    def _places_of(self, part: slice, rows: MarkedRows | None) -> IntegerArray:
        if rows is None:
            return self.where[part]
        chosen = rows[part]
        first = int(chosen[0])
        places: IntegerArray = self.where[first : int(chosen[-1]) + 1][chosen - first]
        return places

    @cached_property
    def doc_ids(self) -> Integer[np.ndarray, "n_tokens"]:
        """The document of each row."""
        ids: IntegerArray = self.text.doc_ids[self.places]
        return ids

    @cached_property
    def token_ids(self) -> Integer[np.ndarray, "n_tokens"]:
        """The token id of each row."""
        ids: IntegerArray = self.text.token_ids[self.places]
        return ids

    def read_tokens(self, start: int, stop: int) -> Integer[np.ndarray, "n"]:
        """The token ids of rows `start:stop`, read into memory."""
        ids: IntegerArray = self.text.token_ids[self.where[start:stop]]
        return ids

    def count_tokens(self, ids: Iterable[int]) -> list[int]:
        """Number of rows of each of the given token ids."""
        return [self._token_counts[i] for i in ids]

    @cached_property
    def _token_counts(self) -> Counter[int]:
        counts: Counter[int] = Counter()
        for start in range(0, len(self), ROWS_AT_ONCE):
            ids, n = np.unique(self.read_tokens(start, start + ROWS_AT_ONCE), return_counts=True)
            counts.update(dict(zip(ids.tolist(), n.tolist(), strict=True)))
        return counts

    def split(self, train_frac: float = 0.5, seed: int = 0) -> Bool[np.ndarray, "n_tokens"]:
        """Boolean mask of the rows of training documents; every document is entirely on one side.

        Args:
            train_frac: share of the documents that are drawn for training.
            seed: of the draw.
        """
        return self.split_runs(train_frac, seed)[:]

    def split_runs(self, train_frac: float = 0.5, seed: int = 0) -> ChosenRuns:
        """The mask that `split` returns, held as one bool per run of rows of a document instead of one per row."""
        starts, documents = self._find_runs(None)
        return ChosenRuns(starts, choose_documents(documents, train_frac, seed), len(self))

    def spread(self, n_tokens: int) -> "FeatureStore":
        """A store of about `n_tokens` of these tokens: shards evenly spaced over the text, or this store if it has no
        more. Rows are renumbered from 0; the folder, and with it the file of labels, is the same.
        """
        if len(self) <= n_tokens:
            return self
        shards = len(self._shards)
        n = max(1, round(shards * n_tokens / len(self)))
        if n >= shards:
            return self
        return _part(self, [round(i * (shards - 1) / max(1, n - 1)) for i in range(n)])

    def token(self, i: int) -> Firings:
        """The features that fire at token (row) `i`, and their codes.

        Negative `i` counts from the end; IndexError for a row that does not exist.
        """
        if not -len(self) <= i < len(self):
            raise IndexError(f"Token must be in -{len(self)}..{len(self) - 1}, got {i}.")
        i %= len(self)
        shard = bisect_right(self._starts, i) - 1
        arrays, row = self._shards[shard], i - self._starts[shard]
        start, stop = arrays.part("offsets", row, row + 2).tolist()
        latents, values = (arrays.part(name, start, stop) for name in ("latents", "values"))
        return Firings(latents.astype(np.int64), values.astype(np.float32))

    def feature(self, j: SupportsIndex) -> Feature:
        """The tokens at which feature `j` fires, and its codes there; displayed as a card in Jupyter.

        Negative `j` counts from the end; IndexError for a feature that does not exist.
        """
        j = read_feature(j)
        if not -self.d_sae <= j < self.d_sae:
            raise IndexError(f"Feature must be in -{self.d_sae}..{self.d_sae - 1}, got {j}.")
        j %= self.d_sae
        tokens, values = [np.zeros(0, np.int64)], [np.zeros(0, np.float32)]
        for start, arrays in zip(self._starts[:-1], self._shards, strict=True):
            _, where, codes = _slice(arrays, j, j + 1)
            tokens.append(where.astype(np.int64) + start)
            values.append(codes.astype(np.float32))
        return Feature(np.concatenate(tokens), np.concatenate(values), self, j)

    def matrix(self, start: int = 0, stop: int | None = None) -> "csr_matrix":
        """The codes of tokens `start:stop`, by default all, as a scipy CSR matrix (n, d_sae) in float32."""
        from scipy.sparse import csr_matrix, vstack

        start, stop, _ = slice(start, stop).indices(len(self))
        pieces = [csr_matrix((0, self.d_sae), dtype=np.float32)]
        for shard in range(len(self._shards)):
            first, end = max(start, self._starts[shard]), min(stop, self._starts[shard + 1])
            if first < end:
                pieces.append(self._rows(shard, first - self._starts[shard], end - self._starts[shard]))
        return vstack(pieces, format="csr")

    def columns(self, start: int = 0, stop: int | None = None) -> "csc_matrix":
        """The codes of features `start:stop`, by default all, as a scipy CSC matrix (n_tokens, n) in float32."""
        from scipy.sparse import csc_matrix

        start, stop, _ = slice(start, stop).indices(self.d_sae)
        parts = [_slice(arrays, start, stop) for arrays in self._shards]
        counts = np.stack([np.diff(offsets) for offsets, _, _ in parts]) if parts else np.zeros((1, stop - start))
        # Entry e of a shard goes behind those of the same feature in the shards before it.
        ends = np.concatenate([[0], np.cumsum(counts.sum(0))]).astype(np.int64)
        places = ends[:-1] + np.cumsum(counts, axis=0) - counts
        tokens, values = np.empty(ends[-1], np.int32), np.empty(ends[-1], np.float32)
        for shard, (offsets, where, codes) in enumerate(parts):
            into = np.arange(len(where)) + np.repeat(places[shard] - offsets[:-1], counts[shard])
            tokens[into], values[into] = where.astype(np.int32) + self._starts[shard], codes
        return csc_matrix((values, tokens, ends), shape=(len(self), stop - start))

    def shard_matrices(self, start: int, stop: int) -> Iterator[tuple["csr_matrix", "csc_matrix"]]:
        """Iterator over shards: the codes of all features as CSR, and those of features `start:stop` as CSC."""
        from scipy.sparse import csc_matrix

        for shard, arrays in enumerate(self._shards):
            n = self.manifest.shards[shard].n_tokens
            offsets, tokens, values = _slice(arrays, start, stop)
            columns = csc_matrix((values.astype(np.float32), tokens.astype(np.int32), offsets), shape=(n, stop - start))
            yield self._rows(shard, 0, n), columns

    def shards(self) -> Iterator[tuple[int, Mapping[str, np.ndarray]]]:
        """Iterator over shards: the first row and the memory-mapped arrays of each, to process everything in bounded
        memory.
        """
        return zip(self._starts[:-1], self._shards, strict=True)

    def _rows(self, shard: int, first: int, end: int) -> "csr_matrix":
        arrays = self._shards[shard]
        offsets = arrays.part("offsets", first, end + 1)
        part = int(offsets[0]), int(offsets[-1])
        values = arrays.part("values", *part).astype(np.float32)
        return as_csr(values, arrays.part("latents", *part), offsets - offsets[0], (end - first, self.d_sae))


def _part(store: FeatureStore, shards: Sequence[int]) -> FeatureStore:
    """A store of some shards of another; of its text, what lies between the first and the last place of each."""
    chosen = [store._shards[i] for i in shards]
    manifest = replace(
        store.manifest,
        shards=tuple(store.manifest.shards[i] for i in shards),
        n_entries=sum(len(arrays["latents"]) for arrays in chosen),
    )
    part = FeatureStore(store.folder, manifest, [])
    part._shards = chosen
    spans, places, offset = list[slice](), [], 0
    for own in (arrays["places"] for arrays in chosen):
        first, stop = int(own[0]), int(own[-1]) + 1
        places.append(own - np.int32(first - offset))
        spans.append(slice(first, stop))
        offset += stop - first
    columns = {
        name: np.concatenate([getattr(store.text, name)[span] for span in spans])
        for name in ("token_ids", "doc_ids", "positions")
    }
    orders = ((arrays["feature_offsets"], arrays["feature_values"]) for arrays in chosen)
    part.__dict__["text"] = StoredText(**columns, strings=store.text.strings)
    part.__dict__["places"] = np.concatenate(places)
    part.__dict__["statistics"] = measure(store.d_sae, orders)
    return part


def _slice(arrays: ShardArrays, start: int, stop: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Offsets from 0, tokens and values of some features in one shard."""
    offsets = arrays.part("feature_offsets", start, stop + 1).astype(np.int64)
    part = int(offsets[0]), int(offsets[-1])
    return offsets - offsets[0], arrays.part("feature_tokens", *part), arrays.part("feature_values", *part)


def save_statistics(folder: Path, statistics: FeatureStatistics) -> dict[str, str]:
    """Write the statistics of a store and return their file's checksum, by file name."""
    tensors = {name: torch.from_numpy(array) for name, array in statistics.to_arrays().items()}
    return {STATISTICS: save_tensors(folder / STATISTICS, tensors)}

"""`FeatureStore`: the sparse feature activations of a corpus on disk, read by token or by feature."""

import hashlib
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any, SupportsIndex, TypeAlias

import numpy as np
from jaxtyping import Bool, Float32, Int, Integer
from numpy.typing import NDArray

from saelab.functional.indices import ROWS_AT_ONCE, ChosenRuns, MarkedRows, find_runs, read_feature
from saelab.stores.corpus import Places, StoredText, choose_documents
from saelab.stores.feature_statistics import STATISTICS, FeatureStatistics, measure
from saelab.stores.files import find_inside
from saelab.stores.hub import HubAccess, Upload, find_folder, push_store
from saelab.stores.manifest import FeatureManifest, Provenance
from saelab.stores.packing import MapBudget, ShardArrays
from saelab.stores.payload import draw_file, draw_pixels
from saelab.stores.results import Drawn
from saelab.stores.row_words import RowWords
from saelab.stores.tensors import TensorFile
from saelab.stores.validation import naming

if TYPE_CHECKING:
    from scipy.sparse import csc_matrix, csr_matrix

IntegerArray: TypeAlias = NDArray[np.integer[Any]]


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
        return f"feature {self.feature}: {len(self):,} firings on {len(self.store):,} {self.store.counted}{signs}"


class FeatureStore:
    """The sparse feature activations of a corpus on disk, written by `harvest` and read by token or by feature.

    Row i is one token that the mask kept, in the order of the text, or one document. Opening is instant: shards are
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

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        name: str | None = None,
        *,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
    ) -> "FeatureStore":
        """The store in a folder, or in a dataset repository on the Hub, of which only what is read is fetched: codes in
        blocks of 256 KiB, the tokens of the text and the statistics as wholes. What was fetched is kept.

        Args:
            source: local folder, or dataset repository 'owner/name'.
            name: folder in it; None is its top.
            revision: branch, tag or commit on the Hub; None is the default branch.
            token: Hub access token; None uses the stored login.
            cache_dir: folder that downloads are kept in; None is Hugging Face's.
            local_files_only: whether to look in that folder alone and fetch nothing.

        Raises:
            FileNotFoundError: where there is no store, or the Hub cannot be reached; ValueError as for `load`.
        """
        hub = HubAccess(revision=revision, token=token, cache_dir=cache_dir, local_files_only=local_files_only)
        return cls.load(find_folder(source, name, FeatureManifest.files_of_kind, hub))

    def push_to_hub(
        self,
        repo_id: str,
        *,
        path_in_repo: str | None = None,
        revision: str | None = None,
        commit_message: str = "Upload feature store",
        create_pr: bool = False,
        private: bool = False,
        token: str | bool | None = None,
    ) -> str:
        """Upload the store to a dataset repository, created if need be; returns the commit's address.

        Without local paths and labels. An upload that was cut off goes on when it is repeated.

        Args:
            repo_id: 'owner/name' on the Hub.
            path_in_repo: folder in the repository; None is its top.
            revision: branch, made if need be; None is the default branch.
            commit_message: message of the commit.
            create_pr: whether to open a pull request instead; its address is returned.
            private: whether a new repository is private.
            token: Hub access token; None uses the stored login.
        """
        self.verify()
        to = Upload(repo_id, path_in_repo, revision, commit_message, create_pr, private, token)
        return push_store(self.folder, self.manifest, to, "store = sl.FeatureStore.from_pretrained({where})")

    def verify(self) -> None:
        """Compare the checksum of every file with the manifest; ValueError naming the first that differs."""
        self.manifest.verify(self.folder)

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

    def at_source(self, name: str) -> "FeatureStore":
        """The store of a crosscoder's codes as one of a source of its activations: the same rows and codes, with the
        model and hook point of that source as provenance; it goes with `sae.source(name)`.

        Raises:
            ValueError: for a name that is none of the sources.
        """
        other = copy(self)
        other.manifest = replace(self.manifest, provenance=self.provenance.at_source(name).to_dict())
        return other

    def find_recorded(self, recorded: str) -> str:
        """A recorded name of an SAE or a model: a folder near the store or here where there is one, else the name."""
        near = [self.folder / recorded, self.folder.parent / recorded, Path(recorded)]
        return next((str(place) for place in near if place.is_dir()), recorded)

    def __repr__(self) -> str:
        size = f"{self.n_tokens:,} {self.counted}, {self.d_sae:,} features, l0 {self.l0:.4g}"
        return f"FeatureStore({size}, of {self.manifest.source})"

    @property
    def of_documents(self) -> bool:
        """Whether a row is a document, as in what is harvested from the result of `embed`, rather than a token."""
        return self.text.of_documents

    @property
    def counted(self) -> str:
        """What its rows are, as a word: tokens, or documents."""
        return "documents" if self.of_documents else "tokens"

    @cached_property
    def text(self) -> StoredText:
        """All tokens of the corpus, those that the mask dropped included; of documents, their words."""
        return StoredText.load(self.folder, self.manifest.payload is not None)

    def draw_document(self, row: int) -> str:
        """The image of a document as a data URI, from its pixels or its file; empty where there is none to show."""
        payload = (self.manifest.payload or {}) if self.of_documents else {}
        if "paths" in payload:
            return draw_file("".join(self.text.words(*self.words.span(row, row + 1))))
        shard = bisect_right(self._starts, row) - 1
        row -= self._starts[shard]
        return draw_pixels(self._shards[shard].part("pixels", row, row + 1)[0]) if "pixels" in payload else ""

    @cached_property
    def words(self) -> RowWords:
        """The token of each row, or the different words of each document."""
        return RowWords(self.text, self.where, len(self))

    @cached_property
    def statistics(self) -> FeatureStatistics:
        """Firing counts, sums, maxima and histogram of every feature, by sign."""
        path = find_inside(self.folder, STATISTICS)
        with naming(path):
            file = TensorFile.open(path)  # mapped: a wide store's histograms are large, and seldom read
            arrays = {name: file.read(name).numpy() for name in file.specs}
            return FeatureStatistics.from_arrays(arrays, self.d_sae)

    @cached_property
    def fingerprint(self) -> str:
        """Hash of how often each side of each feature fires, by which processes compare what they have."""
        fires = np.ascontiguousarray(self.statistics.fires, "<i8")
        return hashlib.sha256(f"{len(self)}".encode() + fires.tobytes()).hexdigest()[:16]

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

    def tokens_at(self, rows: Integer[np.ndarray, "n"]) -> Integer[np.ndarray, "n"]:
        """The token ids of some rows, in ascending order; only those are read."""
        ids: IntegerArray = self.text.token_ids[self.where.at(rows)]
        return ids

    def count_tokens(self, ids: Iterable[int]) -> list[int]:
        """Number of rows of each of the given token ids; of documents, of those that hold the word."""
        return [self.words.counts[i] for i in ids]

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
        more. Rows are renumbered from 0; the folder, and with it the file of labels, is the same. ValueError for less
        than 1.
        """
        if n_tokens < 1:
            raise ValueError(f"`n_tokens` must be at least 1, got {n_tokens}.")
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

    def codes_of(
        self, rows: Integer[np.ndarray, "n"]
    ) -> tuple[Int[np.ndarray, "n_1"], Int[np.ndarray, "nnz"], Float32[np.ndarray, "nnz"]]:
        """The codes of some tokens: offsets, features and values; token `rows[i]` owns `offsets[i]:offsets[i + 1]`.

        Args:
            rows: tokens (rows) in ascending order.
        """
        counts, latents, values = [np.zeros(1, np.int64)], [np.zeros(0, np.int64)], [np.zeros(0, np.float32)]
        bounds = np.searchsorted(rows, self._starts)
        for shard in np.flatnonzero(np.diff(bounds)).tolist():
            arrays, own = self._shards[shard], rows[bounds[shard] : bounds[shard + 1]] - self._starts[shard]
            offsets = arrays["offsets"]
            starts, n = offsets[own].astype(np.int64), (offsets[own + 1] - offsets[own]).astype(np.int64)
            entries = np.repeat(starts - (np.cumsum(n) - n), n) + np.arange(n.sum())
            counts.append(n)
            latents.append(arrays["latents"][entries].astype(np.int64))
            values.append(arrays["values"][entries].astype(np.float32))
        return np.cumsum(np.concatenate(counts)), np.concatenate(latents), np.concatenate(values)

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
            _, where, codes = arrays.of_features(j, j + 1)
            tokens.append(where.astype(np.int64) + start)
            values.append(codes.astype(np.float32))
        return Feature(np.concatenate(tokens), np.concatenate(values), self, j)

    def sample_firings(self, j: int, n: int) -> Int[np.ndarray, "m"]:
        """Rows at which feature `j` fires, in ascending order: all, or those of evenly spaced shards with about `n` of
        them or more.
        """
        step = max(1, min(len(self._shards), int(self.statistics.fires[j].sum()) // max(1, n)))
        found = [np.zeros(0, np.int64)]
        for start, arrays in zip(self._starts[:-1:step], self._shards[::step], strict=True):
            part = arrays.part("feature_offsets", j, j + 2).tolist()
            found.append(arrays.part("feature_tokens", *part).astype(np.int64) + start)
        return np.concatenate(found)

    def firing_tokens(
        self, start: int, stop: int
    ) -> Iterator[tuple[Int[np.ndarray, "n_features_1"], Integer[np.ndarray, "nnz"]]]:
        """Iterator over shards: the token ids on which features `start:stop` fire, and where those of each begin; of
        documents the words of each.

        Args:
            start: first feature.
            stop: feature after the last.

        Returns:
            Pairs of offsets, (stop - start + 1,), and token ids: feature `start + i` owns the ids
            `offsets[i]:offsets[i + 1]`.
        """
        for first, end, arrays in zip(self._starts, self._starts[1:], self._shards, strict=False):
            offsets = arrays.part("feature_offsets", start, stop + 1).astype(np.int64)
            rows = arrays.part("feature_tokens", int(offsets[0]), int(offsets[-1]))
            yield self.words.of_firings(offsets - offsets[0], rows, first, end)

    def matrix(self, start: int = 0, stop: int | None = None) -> "csr_matrix":
        """The codes of tokens `start:stop`, by default all, as a scipy CSR matrix (n, d_sae) in float32."""
        from scipy.sparse import csr_matrix, vstack

        start, stop, _ = slice(start, stop).indices(len(self))
        pieces = [csr_matrix((0, self.d_sae), dtype=np.float32)]
        for shard in range(len(self._shards)):
            first, end = max(start, self._starts[shard]), min(stop, self._starts[shard + 1])
            if first < end:
                pieces.append(self._shards[shard].of_rows(first - self._starts[shard], end - self._starts[shard]))
        return vstack(pieces, format="csr")

    def columns(self, start: int = 0, stop: int | None = None) -> "csc_matrix":
        """The codes of features `start:stop`, by default all, as a scipy CSC matrix (n_tokens, n) in float32."""
        from scipy.sparse import csc_matrix

        start, stop, _ = slice(start, stop).indices(self.d_sae)
        parts = [arrays.of_features(start, stop) for arrays in self._shards]
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
            offsets, tokens, values = arrays.of_features(start, stop)
            columns = csc_matrix((values.astype(np.float32), tokens.astype(np.int32), offsets), shape=(n, stop - start))
            yield self._shards[shard].of_rows(0, n), columns

    def shards(self) -> Iterator[tuple[int, Mapping[str, np.ndarray]]]:
        """Iterator over shards: the first row and the memory-mapped arrays of each, to process everything in bounded
        memory.
        """
        return zip(self._starts[:-1], self._shards, strict=True)


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
    for i, own in ((i, store._shards[i]["places"]) for i in shards):
        first, stop = int(own[0]), int(own[-1]) + 1
        if store.of_documents:  # to the end of the last
            stop = store.words.span(store._starts[i], store._starts[i + 1])[1]
        places.append(own - np.int32(first - offset))
        spans.append(slice(first, stop))
        offset += stop - first
    columns: dict[str, Any] = {
        name: np.concatenate([getattr(store.text, name)[span] for span in spans])
        for name in ("token_ids", "doc_ids", "positions")
    }
    orders = ((arrays["feature_offsets"], arrays["feature_values"]) for arrays in chosen)
    part.__dict__["text"] = replace(store.text, **columns)
    part.__dict__["places"] = np.concatenate(places)
    part.__dict__["statistics"] = measure(store.d_sae, orders)
    return part

"""`Activations`: activations at one hook point, one row per token, in memory or memory-mapped from a folder.

`ActivationPairs` holds activations at two hook points for the same tokens, for training a transcoder.
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from jaxtyping import Float, Int, Int32, UInt8
from torch import Tensor

from saelab.stores.hub import HubAccess, Upload, find_folder, push_store
from saelab.stores.joined import PART_TOKENS, JoinedRows, JoinedSource
from saelab.stores.manifest import INT_COLUMNS, ActivationsManifest, Provenance
from saelab.stores.neighbors import NeighborBatches
from saelab.stores.payload import PayloadKinds
from saelab.stores.row_columns import FolderRows, MemoryRows, RowColumns
from saelab.stores.shuffling import BUFFER_TOKENS, ShuffledBatches
from saelab.stores.validation import naming


class Activations:
    """Activations at one hook point, one row per token, with the token id, document and position of each.

    Row i is one token that the mask kept, in the order of the text; or one document, with its text or image, in what
    `embed` returns. A folder is read through memory maps: opening one
    is instant whatever its size, and only the rows that are indexed are held in memory.

    Args:
        rows: the columns, of memory or of a folder.
        hook_point: where in the model they were read.
        provenance: what they were made from; None where that is not known.
        span: first row and the one after the last, for a part; None for all.

    >>> acts = Activations.from_tensor(torch.arange(6.0).view(3, 2))
    >>> acts[1:].tolist(), acts.d_in, len(acts)
    ([[2.0, 3.0], [4.0, 5.0]], 2, 3)
    """

    def __init__(
        self, rows: RowColumns, hook_point: str, provenance: Provenance | None, span: tuple[int, int] | None = None
    ) -> None:
        self._rows = rows
        self._span = span or (0, rows.n_tokens)
        self.hook_point = hook_point
        self.provenance = provenance

    @classmethod
    def load(cls, folder: str | Path, hook_point: str | None = None, *, verify: bool = False) -> "Activations":
        """The activations at one hook point of a folder written by `collect`.

        Sizes, shapes and dtypes of every shard are checked against the manifest, the checksum of each block of 256 KiB
        when it is first read.

        Args:
            folder: the folder.
            hook_point: which hook point; needed where the folder holds several.
            verify: whether all checksums are compared now, which reads everything.

        Raises:
            FileNotFoundError: the folder or a file of it is missing.
            ValueError: a file is truncated or edited, the folder is unfinished, or it has no such hook point.
        """
        manifest = ActivationsManifest.load_complete(folder)
        name = _choose(manifest, folder, hook_point)
        with naming(Path(folder) / "manifest.json"):
            origin = Provenance.from_dict(manifest.provenance)
        provenance = origin.at(name, (manifest.median_norms or {}).get(name))
        return cls(FolderRows(Path(folder), manifest, verify), name, provenance)

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        name: str | None = None,
        *,
        hook_point: str | None = None,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
    ) -> "Activations":
        """The activations in a folder, or in a dataset repository on the Hub, of which only what is read is fetched, in
        blocks of 256 KiB. What was fetched is kept for the next time.

        Args:
            source: local folder, or dataset repository 'owner/name'.
            name: folder in it; None is its top.
            hook_point: which hook point; needed where the folder holds several.
            revision: branch, tag or commit on the Hub; None is the default branch.
            token: Hub access token; None uses the stored login.
            cache_dir: folder that downloads are kept in; None is Hugging Face's.
            local_files_only: whether to look in that folder alone and fetch nothing.

        Raises:
            FileNotFoundError: where there are none, or the Hub cannot be reached; ValueError as for `load`.
        """
        hub = HubAccess(revision=revision, token=token, cache_dir=cache_dir, local_files_only=local_files_only)
        return cls.load(find_folder(source, name, ActivationsManifest.files_of_kind, hub), hook_point)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        path_in_repo: str | None = None,
        revision: str | None = None,
        commit_message: str = "Upload activations",
        create_pr: bool = False,
        private: bool = False,
        token: str | bool | None = None,
    ) -> str:
        """Upload the folder of these activations, all hook points and rows, to a dataset repository, created if need
        be; returns the commit's address.

        Local paths are left out. An upload that was cut off goes on when it is repeated.

        Args:
            repo_id: 'owner/name' on the Hub.
            path_in_repo: folder in the repository; None is its top.
            revision: branch, made if need be; None is the default branch.
            commit_message: message of the commit.
            create_pr: whether to open a pull request instead; its address is returned.
            private: whether a new repository is private.
            token: Hub access token; None uses the stored login.

        Raises:
            ValueError: the activations are in no folder, or a file is not what was written.
        """
        if not isinstance(self._rows, FolderRows):
            raise ValueError("Activations must be in a folder to be uploaded, got some in memory. `collect` into one.")
        self._rows.manifest.check_shards(self._rows.folder, verify=True)
        to = Upload(repo_id, path_in_repo, revision, commit_message, create_pr, private, token)
        load = "acts = sl.Activations.from_pretrained({where})"
        if len(self._rows.manifest.d_in) > 1:
            load = f'acts = sl.Activations.from_pretrained({{where}}, hook_point="{self.hook_point}")'
        return push_store(self._rows.folder, self._rows.manifest, to, load)

    @classmethod
    def from_tensor(
        cls,
        x: Float[Tensor, "n_tokens d_in"],
        provenance: Provenance | None = None,
        **columns: Int32[Tensor, " n_tokens"],
    ) -> "Activations":
        """Activations that wrap a tensor without copying it.

        Args:
            x: (n_tokens, d_in) activations.
            provenance: where they came from, hook point included.
            **columns: `token_ids`, `doc_ids` and `positions` of the rows, int32; any of them may be missing.

        Raises:
            ValueError: a column has another name.
        """
        if unknown := sorted(set(columns) - set(INT_COLUMNS)):
            raise ValueError(f"Columns must be among {INT_COLUMNS}, got {unknown[:5]}. Remove them.")
        hook_point = provenance.hook_point if provenance else ""
        return cls(MemoryRows({hook_point: x} | columns), hook_point, provenance)

    @classmethod
    def join(
        cls, sources: Mapping[str, "Activations"], rows: Mapping[str, Int[Tensor, " n_tokens"]] | None = None
    ) -> "Activations":
        """Activations of several sources side by side, for a crosscoder: row i is row i of each, one after the other.

        Sources are hook points of one model, or models, of the same tokens. Nothing is copied before it is read. Token
        ids, documents and positions are those of the first source.

        Args:
            sources: two or more activations by name, in the order of the columns.
            rows: for a source whose rows are not those of the others, such as of another tokenizer, its row for each
                joined row. Tokens of such a source are not compared.

        Raises:
            ValueError: the sources are not of the same tokens and mask, or differ in length, or `rows` names rows or
                sources that do not exist.

        >>> a, b = (Activations.from_tensor(torch.full((3, 2), x)) for x in (0.0, 1.0))
        >>> Activations.join({"base": a, "tuned": b})[1:].tolist()
        [[0.0, 0.0, 1.0, 1.0], [0.0, 0.0, 1.0, 1.0]]
        """
        if not isinstance(sources, Mapping) or not all(isinstance(one, Activations) for one in sources.values()):
            raise ValueError("`sources` must be activations by name, {'base': acts, 'tuned': other_acts}.")
        first = next(iter(sources.values()), None)
        column = "" if first is None else first.hook_point
        joined = JoinedRows(sources, rows or {}, column)
        origins = {name: acts.provenance for name, acts in sources.items() if acts.provenance is not None}
        if len(origins) < len(sources):
            return cls(joined, column, None)
        return cls(joined, column, Provenance.join(origins, joined.n_tokens, joined.index))

    @property
    def sources(self) -> tuple[JoinedSource, ...] | None:
        """Names and widths of the sources that `join` put side by side; None for activations of one."""
        return self._rows.sources if isinstance(self._rows, JoinedRows) else None

    @property
    def d_in(self) -> int:
        """Width of a row."""
        return self._rows.columns[self.hook_point][1][0]

    @property
    def dtype(self) -> torch.dtype:
        """The dtype in which the activations are stored."""
        return self._rows.columns[self.hook_point][0]

    @property
    def n_tokens(self) -> int:
        """Number of rows; equal to `len`."""
        return self._span[1] - self._span[0]

    def __len__(self) -> int:
        return self.n_tokens

    def __repr__(self) -> str:
        place = f" at {self.hook_point}" if self.hook_point else ""
        rows = "tokens" if self.payload is None else "documents"
        return f"Activations({self.n_tokens} {rows}, d_in {self.d_in}, {self.dtype}{place})"

    @property
    def payload(self) -> PayloadKinds | None:
        """What each row has to show, where rows are documents: "texts", "paths" of images, "pixels" with their shape;
        None where rows are tokens.
        """
        return self._rows.payload

    @property
    def texts(self) -> list[str] | None:
        """Text of each document, or path of its image; None where there is none."""
        return self.read_texts(0, len(self))

    def read_texts(self, start: int, stop: int) -> list[str] | None:
        """The texts or paths of the documents `start:stop`; None where there is none."""
        if {"texts", "paths"}.isdisjoint(self.payload or ()):
            return None
        return self._rows.read_strings(self._span[0] + start, self._span[0] + min(stop, len(self)))

    def read_pixels(self, start: int, stop: int) -> UInt8[Tensor, "n height width channels"] | None:
        """The images of the documents `start:stop`; None where there is none."""
        if "pixels" not in self._rows.columns:
            return None
        _, shape = self._rows.columns["pixels"]
        out = torch.empty(max(0, min(stop, len(self)) - start), *shape, dtype=torch.uint8)
        self._rows.copy_slice("pixels", self._span[0] + start, out)
        return out

    @property
    def token_ids(self) -> Int32[Tensor, " n_tokens"] | None:
        """Token id of each row."""
        return self._column("token_ids")

    @property
    def doc_ids(self) -> Int32[Tensor, " n_tokens"] | None:
        """Number of the document each row comes from."""
        return self._column("doc_ids")

    @property
    def positions(self) -> Int32[Tensor, " n_tokens"] | None:
        """Position of each row in its sequence, from 0."""
        return self._column("positions")

    def __getitem__(self, index: int | slice | Int[Tensor, " n"]) -> Float[Tensor, "*n d_in"]:
        """Copy of one row, of a slice of rows, or of the rows with the given numbers, in the stored dtype."""
        if isinstance(index, int):
            return self[_checked(torch.tensor([index]), len(self))][0]
        if isinstance(index, slice):
            start, stop, step = index.indices(len(self))
            if step == 1:
                out = torch.empty(max(stop - start, 0), self.d_in, dtype=self.dtype)
                self.copy_slice(start, out)
                return out
            index = torch.arange(start, stop, step)
        index = _checked(index, len(self))
        out = torch.empty(len(index), self.d_in, dtype=self.dtype)
        self._rows.copy_rows(self.hook_point, index + self._span[0], out)
        return out

    def copy_slice(self, start: int, out: Float[Tensor, "n d_in"]) -> None:
        """Fill `out` with consecutive rows, the first of which is row `start`."""
        self._rows.copy_slice(self.hook_point, self._span[0] + start, out)

    def rows(self, start: int, stop: int) -> "Activations":
        """The rows `start:stop` as a lazily read view, such as a held-out part; ValueError for an invalid range."""
        if not 0 <= start < stop <= len(self):
            raise ValueError(f"`start` and `stop` must satisfy 0 <= start < stop <= {len(self)}, got {start}, {stop}.")
        span = (self._span[0] + start, self._span[0] + stop)
        return Activations(self._rows, self.hook_point, self.provenance, span)

    def neighbor_batches(
        self, batch_size: int, seed: int = 0, *, buffer_tokens: int = BUFFER_TOKENS
    ) -> NeighborBatches:
        """Iterator over shuffled batches of pairs of neighboring tokens; see `NeighborBatches`.

        Args:
            batch_size: rows per batch, twice as many as pairs.
            seed: of the order of the pairs.
            buffer_tokens: rows held in memory and shuffled together.
        """
        return NeighborBatches(self, batch_size, seed, buffer_tokens=buffer_tokens)

    def batches(
        self,
        batch_size: int,
        seed: int = 0,
        *,
        buffer_tokens: int = BUFFER_TOKENS,
        drop_last: bool = True,
        epochs: int | None = None,
    ) -> ShuffledBatches:
        """Iterator over shuffled batches, the same for the same seed whatever the shard sizes; see `ShuffledBatches`.

        Args:
            batch_size: rows per batch.
            seed: of the order of the rows.
            buffer_tokens: rows held in memory and shuffled together.
            drop_last: whether a last, shorter batch of an epoch is left out.
            epochs: passes over the rows; None for no end.
        """
        return ShuffledBatches(self, batch_size, seed, buffer_tokens=buffer_tokens, drop_last=drop_last, epochs=epochs)

    def _column(self, name: str) -> Int32[Tensor, " n_tokens"] | None:
        if name not in self._rows.columns:
            return None
        out = torch.empty(len(self), dtype=torch.int32)
        self._rows.copy_slice(name, self._span[0], out)
        return out


def _checked(index: Tensor, n: int) -> Tensor:
    index = torch.where(index < 0, index + n, index).long().cpu()
    if len(index) and (int(index.min()) < 0 or int(index.max()) >= n):
        raise IndexError(f"Row numbers must be in -{n}..{n - 1}, got one outside.")
    return index


def _choose(manifest: ActivationsManifest, folder: str | Path, hook_point: str | None) -> str:
    held = list(manifest.d_in)
    if hook_point is None and len(held) == 1:
        return held[0]
    if hook_point not in held:
        raise ValueError(f"`hook_point` must be one of those in {folder}, got {hook_point!r}. Choose from {held[:5]}.")
    return str(hook_point)


class ActivationPairs:
    """Inputs and targets of a transcoder for the same tokens; rows are (d_in + d_out) wide.

    Args:
        inputs: activations that the transcoder encodes.
        targets: activations that it reconstructs.

    Raises:
        ValueError: the two are not of the same tokens: number of rows, token ids, documents, positions and origin are
            compared, as far as both have them.

    >>> x = Activations.from_tensor(torch.arange(6.0).view(3, 2))
    >>> pairs = ActivationPairs(x, Activations.from_tensor(torch.ones(3, 1)))
    >>> pairs[1:].tolist()
    [[2.0, 3.0, 1.0], [4.0, 5.0, 1.0]]
    """

    def __init__(self, inputs: Activations, targets: Activations) -> None:
        if len(inputs) != len(targets):
            raise ValueError(
                f"Pairs must have as many inputs as targets, got {len(inputs)} and {len(targets)}; collect both hook "
                "points in one call."
            )
        self.inputs, self.targets = inputs, targets
        self.provenance: Provenance | None = None
        if inputs.provenance and targets.provenance:
            self.provenance = inputs.provenance.paired(targets.provenance)
        self._check_tokens()

    def _check_tokens(self) -> None:
        """Compare the columns of both, a part of the rows at a time."""
        for start in range(0, len(self), PART_TOKENS):
            x, y = (acts.rows(start, min(start + PART_TOKENS, len(self))) for acts in (self.inputs, self.targets))
            for name in INT_COLUMNS:
                mine, other = getattr(x, name), getattr(y, name)
                if mine is not None and other is not None and not torch.equal(mine, other):
                    row = start + int((mine != other).nonzero()[0])
                    raise ValueError(
                        f"Pairs must be of the same tokens, their {name} differ from row {row} on; collect both hook "
                        "points in one call."
                    )

    @property
    def d_in(self) -> int:
        """Width of the input activations."""
        return self.inputs.d_in

    @property
    def d_out(self) -> int:
        """Width of the target activations."""
        return self.targets.d_in

    @property
    def n_tokens(self) -> int:
        """Number of pairs; equal to `len`."""
        return len(self.inputs)

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, index: slice) -> Float[Tensor, "n d_in_d_out"]:
        """Copy of a slice of pairs, each an input followed by its target."""
        return torch.cat([self.inputs[index], self.targets[index]], dim=1)

    def rows(self, start: int, stop: int) -> "ActivationPairs":
        """The pairs `start:stop` as a lazily read view, such as a held-out part; ValueError for an invalid range."""
        part = object.__new__(ActivationPairs)
        part.inputs, part.targets = self.inputs.rows(start, stop), self.targets.rows(start, stop)
        part.provenance = self.provenance
        return part

    def batches(
        self, batch_size: int, seed: int = 0, *, buffer_tokens: int = BUFFER_TOKENS, epochs: int | None = None
    ) -> ShuffledBatches:
        """Iterator over shuffled batches of pairs (batch_size, d_in + d_out); see `ShuffledBatches`.

        Args:
            batch_size: pairs per batch.
            seed: of the order of the pairs.
            buffer_tokens: pairs held in memory and shuffled together.
            epochs: passes over the pairs; None for no end.
        """
        return ShuffledBatches(_Joined(self), batch_size, seed, buffer_tokens=buffer_tokens, epochs=epochs)

    def neighbor_batches(
        self, batch_size: int, seed: int = 0, *, buffer_tokens: int = BUFFER_TOKENS
    ) -> NeighborBatches:
        """Iterator over shuffled batches (batch_size, d_in + d_out) of neighboring tokens; see `NeighborBatches`.

        Args:
            batch_size: rows per batch, twice as many as pairs of neighbors.
            seed: of their order.
            buffer_tokens: rows held in memory and shuffled together.
        """
        return NeighborBatches(_Joined(self), batch_size, seed, buffer_tokens=buffer_tokens)


class _Joined:
    """Pairs as rows that `ShuffledBatches` and `NeighborBatches` can read."""

    def __init__(self, pairs: ActivationPairs) -> None:
        self.pairs = pairs
        self.d_in = pairs.d_in + pairs.d_out
        self.dtype = torch.promote_types(pairs.inputs.dtype, pairs.targets.dtype)

    @property
    def doc_ids(self) -> Int32[Tensor, " n_tokens"] | None:
        """Document of each pair."""
        return self.pairs.inputs.doc_ids

    def __len__(self) -> int:
        return len(self.pairs)

    def copy_slice(self, start: int, out: Float[Tensor, "n d"]) -> None:
        """Fill `out` with consecutive pairs, the first of which is pair `start`."""
        self.pairs.inputs.copy_slice(start, out[:, : self.pairs.d_in])
        self.pairs.targets.copy_slice(start, out[:, self.pairs.d_in :])

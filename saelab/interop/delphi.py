"""`write_delphi` and `convert_delphi`: latent caches of delphi (EleutherAI), written from and read as feature stores.

A cache of one hook point is a folder of safetensors files, each with the codes of a range of latents on all tokens.
"""

import re
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int32, Integer
from safetensors import SafetensorError, safe_open
from torch import Tensor

from saelab.collecting.harvesting import SHARD_TOKENS
from saelab.collecting.writers import ShardWriter, claim_folder
from saelab.lm.masks import TokenMask
from saelab.lm.tokenizers import token_strings
from saelab.lm.tokens import Tokens
from saelab.stores.corpus import StoredText
from saelab.stores.feature_statistics import measure, save_statistics
from saelab.stores.feature_store import FeatureStore
from saelab.stores.files import as_file_name, checksum, replace_folder, save_tensors, write_json
from saelab.stores.jobs import hidden
from saelab.stores.manifest import FeatureManifest, Provenance
from saelab.stores.packing import pack_codes
from saelab.stores.sharing import shareable
from saelab.stores.validation import read_json

NAME = re.compile(r"(\d+)_(\d+)")
LARGEST_ID = 2**31 - 1
CONFIG = "config.json"
CTX_LEN = ("cache_ctx_len", "ctx_len")
"""what delphi calls the length of its rows, since 0.1 and before"""
N_SPLITS = 5
SMALLEST = 1e-5  # delphi omits codes up to this magnitude
SHORT, WIDE = np.uint16, np.uint32


@dataclass(frozen=True, eq=False)
class PlacedCodes:
    """Codes of some sequences in CSR form by token, and the indices of these tokens in the text."""

    offsets: Integer[np.ndarray, "n_1"]
    """where each token's entries begin, and the end of the last"""
    latents: Integer[np.ndarray, "nnz"]
    """latent of each entry"""
    values: Float[np.ndarray, "nnz"]
    """code of each entry"""
    places: Int32[np.ndarray, "n"]
    """index of each token in the text"""


@dataclass(frozen=True, eq=False)
class _Split:
    """One file: the codes of latents `first` to `last` in text order, read on demand."""

    path: Path
    first: int
    last: int
    arrays: dict[str, Any]
    """slices by name; nothing is read before it is indexed"""

    @classmethod
    def open(cls, path: Path, first: int, last: int) -> "_Split":
        """File whose names, shapes and dtypes are checked."""
        try:
            file: Any = safe_open(path, framework="numpy")
            arrays = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - it is no dict
        except SafetensorError as error:
            raise ValueError(
                f"{path} must be a whole safetensors file ({error}). Was it cut off? Copy it again."
            ) from None
        found = {name: (array.get_dtype(), *array.get_shape()) for name, array in arrays.items()}
        dtype, *shape = found.get("activations", ("missing",))
        integers = [("U16", *shape, 3), ("U32", *shape, 3), ("I32", *shape, 3), ("I64", *shape, 3)]
        if dtype not in ("F16", "F32") or len(shape) != 1 or found.get("locations") not in integers:
            raise ValueError(
                f"{path} must hold integer `locations` (n, 3) and float16 or float32 `activations` (n), as delphi "
                f"writes them, got {found}. Is it of another program?"
            )
        return cls(path, first, last, arrays)

    def require_within(self, shape: Sequence[int]) -> None:
        """Raise ValueError for a code beyond the last sequence, or tokens of another shape than given."""
        n = self.arrays["activations"].get_shape()[0]
        if (entry := self._find(shape[0])) < n:
            raise ValueError(
                f"{self.path}: `locations` must lie in the {shape[0]} sequences of the tokens, got {n - entry} beyond. "
                "Give the tokens that were cached."
            )
        if "tokens" in self.arrays and self.arrays["tokens"].get_shape() != list(shape):
            self._refuse_tokens()

    def read(self, first: int, stop: int, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Row, latent and value of each code in sequences `first` to `stop` with these tokens; rows are counted
        from 0.
        """
        if "tokens" in self.arrays and not np.array_equal(self.arrays["tokens"][first:stop], ids):
            self._refuse_tokens()
        entries = slice(self._find(first), self._find(stop))
        locations, values = self.arrays["locations"][entries].astype(np.int64), self.arrays["activations"][entries]
        lowest, end = (first, 0, 0), (stop, ids.shape[1], self.last - self.first + 1)
        outside = ((locations < lowest) | (locations >= end)).any(1)
        if outside.any():
            raise ValueError(
                f"{self.path}: `locations` must be (sequence, position, latent) from {lowest} to below {end} among the "
                f"entries of these sequences, in the order of the text, got {tuple(locations[outside][0].tolist())}. "
                "Was the file edited, or was it made from other tokens?"
            )
        if n_bad := int((~np.isfinite(values)).sum()):
            raise ValueError(f"{self.path}: `activations` must be finite, got {n_bad} that are not. Cache again.")
        fires = values != 0
        rows = (locations[fires, 0] - first) * ids.shape[1] + locations[fires, 1]
        return rows, locations[fires, 2] + self.first, values[fires]

    def _find(self, seq: int) -> int:
        """Index of the first entry of a sequence or of a later one."""
        locations = self.arrays["locations"]
        return bisect_left(range(locations.get_shape()[0]), seq, key=lambda i: int(locations[i : i + 1][0, 0]))

    def _refuse_tokens(self) -> None:
        raise ValueError(f"{self.path} must be of the same tokens as the other files, or those given, got others.")


@dataclass(frozen=True, eq=False)
class DelphiCache:
    """All files of one hook point, and its tokens; each sequence is a document."""

    folder: Path
    config: dict[str, Any]
    splits: tuple[_Split, ...]
    tokens: Tokens
    hook_point: str

    @classmethod
    def open(cls, folder: Path, ids: Integer[Tensor, "n_seq ctx_len"] | None, hook_point: str | None) -> "DelphiCache":
        """Cache in a folder; ValueError unless every latent occurs exactly once and token ids are known."""
        ranges = _find_ranges(folder)
        config = read_json(folder / "config.json")
        if not isinstance(config, dict) or "model_name" not in config:
            raise ValueError(f"{folder / 'config.json'} must have a `model_name`, as delphi writes it. Was it edited?")
        if (n := config.get("n_splits", len(ranges))) != len(ranges):
            raise ValueError(
                f"{folder} must hold the {n} files that its config.json lists, got {len(ranges)}. Copy the others."
            )
        splits = tuple(_Split.open(*item) for item in ranges)
        tokens = _as_tokens(_own_ids(folder, splits) if ids is None else _given_ids(ids, config), config)
        for split in splits:
            split.require_within(tokens.ids.shape)
        return cls(folder, config, splits, tokens, hook_point or folder.resolve().name)

    @property
    def d_sae(self) -> int:
        """Number of latents in all files."""
        return self.splits[-1].last + 1

    @property
    def dtype(self) -> str:
        """Dtype of the values: "float32" where any file has it, else "float16"."""
        return (
            "float32" if any(split.arrays["activations"].get_dtype() == "F32" for split in self.splits) else "float16"
        )

    def read(self, first: int, stop: int) -> PlacedCodes:
        """Codes of sequences `first` to `stop`, from all files."""
        from scipy.sparse import csr_matrix

        ids = self.tokens.ids[first:stop].numpy()
        parts = [split.read(first, stop, ids) for split in self.splits]
        rows, latents, values = (np.concatenate(columns) for columns in zip(*parts, strict=True))
        values = values.astype(self.dtype)
        bits = values.view(np.int16 if self.dtype == "float16" else np.int32)  # scipy does not sort float16
        by_token = csr_matrix((bits, (rows, latents)), shape=(ids.size, self.d_sae))  # duplicates are summed
        if n_more := len(bits) - by_token.nnz:
            raise ValueError(
                f"{self.folder} must hold one value for each latent at a token, got {n_more} more in the sequences "
                f"{first}..{stop - 1}. Cache again."
            )
        places = np.arange(first * ids.shape[1], stop * ids.shape[1], dtype=np.int32)
        return PlacedCodes(by_token.indptr, by_token.indices, by_token.data.view(values.dtype), places)

    def text(self, tokenizer: Any) -> StoredText:
        """All tokens of the cache, with their strings where a tokenizer is given."""
        ids, doc_ids = self.tokens.ids.flatten().numpy(), self.tokens.doc_ids.flatten().numpy()
        positions = np.tile(np.arange(self.tokens.ctx_len, dtype=np.int32), len(self.tokens))
        strings = token_strings(tokenizer, np.unique(ids).tolist()) if tokenizer is not None else {}
        return StoredText(token_ids=ids, doc_ids=doc_ids, positions=positions, strings=strings)

    def request(self) -> dict[str, Any]:
        """File checksums, token hash and hook point: what determines the bytes of a store made from this cache."""
        paths = [self.folder / "config.json", *(split.path for split in self.splits)]
        files = {path.name: checksum(path) for path in paths}
        return {"files": files, "tokens_sha256": self.tokens.sha256, "hook_point": self.hook_point}

    def origin(self) -> Provenance:
        """Provenance as far as it is recorded. delphi loads models as Hugging Face does, and masks no token."""
        return Provenance(
            model=self.config["model_name"],
            weight_processing="none",
            hook_point=self.hook_point,
            text=self.tokens.source,
            tokens_sha256=self.tokens.sha256,
            mask=TokenMask(special=False).to_dict(),
            dtype="unknown",
            ctx_len=self.tokens.ctx_len,
            n_tokens=self.tokens.n_tokens,
            seed=None,
            versions={},
        )


def _find_ranges(folder: Path) -> list[tuple[Path, int, int]]:
    """Files with their first and last latent, in order; ValueError unless together they hold every latent exactly
    once.
    """
    named = [(path, NAME.fullmatch(path.stem)) for path in folder.glob("*.safetensors")]
    found = sorted((int(match[1]), int(match[2]), path) for path, match in named if match)
    if not found:
        near = sorted(str(path.parent) for path in folder.glob("*/0_*.safetensors"))[:5]
        hint = f"Did you mean one of: {', '.join(near)}?" if near else "Check its name."
        raise FileNotFoundError(
            f"`folder` must be the folder of one hook point in a latent cache, got {folder}. {hint}"
        )
    expected = 0
    for first, last, path in found:
        if first != expected or last < first:
            advice = "Copy the file that is missing." if first > expected else "Remove the file that overlaps another."
            raise ValueError(f"The files must hold every latent once: {path} should begin with {expected}. {advice}")
        expected = last + 1
    return [(path, first, last) for first, last, path in found]


def _own_ids(folder: Path, splits: Sequence[_Split]) -> np.ndarray:
    for split in splits:
        if "tokens" in split.arrays:
            return np.asarray(split.arrays["tokens"][:])
    raise ValueError(
        f"{folder} was saved without its tokens. Give `tokens`, the ids that were cached: delphi drops those beyond "
        "`n_tokens` and the last batch unless it is full."
    )


def _given_ids(ids: Tensor, config: dict[str, Any]) -> np.ndarray:
    """Token ids that the caller gave; ValueError for more than were cached, as every firing rate would be wrong."""
    n_tokens = config.get("n_tokens", ids.numel())
    ctx_len = next((config[name] for name in CTX_LEN if name in config), ids.shape[1])
    if ids.numel() > n_tokens or ids.shape[1] != ctx_len:
        raise ValueError(
            f"`tokens` must be the ids that were cached, in rows of {ctx_len} and at most {n_tokens} by config.json, "
            f"got {tuple(ids.shape)}. Leave out what was not cached."
        )
    return ids.cpu().numpy()


def _as_tokens(ids: np.ndarray, config: dict[str, Any]) -> Tokens:
    if ids.ndim != 2 or ids.size == 0 or ids.min() < 0 or ids.max() > LARGEST_ID:
        raise ValueError(f"Tokens must be (n_seq, ctx_len) ids in 0..{LARGEST_ID}, got {ids}. Cache again.")
    doc_ids = torch.arange(len(ids), dtype=torch.int32)[:, None].expand(ids.shape).contiguous()
    names = ("dataset_repo", "dataset_name", "dataset_split")
    source = " ".join(str(config[name]) for name in names if config.get(name)) or "unknown"
    return Tokens(ids=torch.from_numpy(ids.astype(np.int32)), doc_ids=doc_ids, source=source)


def write_delphi(
    store: FeatureStore, folder: str | Path, *, n_splits: int = N_SPLITS, pad_id: int | None = None
) -> Path:
    """Write `{hook point}/{first}_{last}.safetensors` and `config.json` into a folder; returns the hook point's folder.

    Each file has the codes of a range of latents: `locations` (n, 3) of sequence, position and latent counted from the
    file's first, in text order, `activations` in float16, and all `tokens`. Codes of |z| <= 1e-5 are left out, as
    delphi does; negative ones are written, though delphi itself counts only positive ones as active. Tokens that the
    mask removed are included, without codes.

    Args:
        store: the feature store.
        folder: folder in which the hook point's folder is made.
        n_splits: number of files to divide the latents into.
        pad_id: token id that fills up sequences shorter than the longest; None requires all to be of one length.

    Raises:
        ValueError: where sequences are of different lengths and there is no `pad_id`, and for codes beyond float16.
    """
    if not 1 <= n_splits <= store.d_sae:
        raise ValueError(f"`n_splits` must be in 1..{store.d_sae}, got {n_splits}.")
    origin = store.provenance
    place = Path(folder) / as_file_name(origin.hook_point)
    tokens, places = _lay_out(store, pad_id)
    ids = torch.from_numpy(tokens.astype(np.int64))
    ends = np.linspace(0, store.d_sae, n_splits + 1).astype(int).tolist()
    config = {
        "dataset_repo": shareable(origin.text),
        "dataset_split": "",
        "dataset_name": "",
        "dataset_column": "text",
        "batch_size": 1,
        **dict.fromkeys(CTX_LEN, int(tokens.shape[1])),
        "n_tokens": int(tokens.size),
        "n_splits": n_splits,
        "model_name": shareable(origin.model),
    }
    with replace_folder(place, last=CONFIG, stale=(CONFIG, "[0-9]*_[0-9]*.safetensors")) as temp:
        for first, stop in pairwise(ends):
            locations, values = _locate(store, first, stop, places, tokens.shape[1])
            tensors = {"locations": locations, "activations": values, "tokens": ids}
            save_tensors(temp / f"{first}_{stop - 1}.safetensors", tensors)
        write_json(temp / CONFIG, config)
    return place


def _lay_out(store: FeatureStore, pad_id: int | None) -> tuple[Int32[np.ndarray, "n_seq ctx_len"], np.ndarray]:
    """Token ids in rows, and the index of each token of the text there: sequence * ctx_len + position."""
    text = store.text
    positions = np.asarray(text.positions, np.int64)
    begins = np.flatnonzero(np.diff(positions, prepend=positions[:1] + 1) <= 0)
    sequence = np.searchsorted(begins, np.arange(len(positions)), side="right") - 1
    ctx_len = int(positions.max()) + 1
    n_short = len(begins) * ctx_len - len(positions)
    if n_short and pad_id is None:
        raise ValueError(
            f"`pad_id` must be given, as sequences are of different lengths and delphi's are all of {ctx_len}, got "
            "none; pass the tokenizer's padding token."
        )
    tokens = np.full((len(begins), ctx_len), pad_id or 0, np.int32)
    tokens[sequence, positions] = text.token_ids
    return tokens, sequence * ctx_len + positions


def _locate(
    store: FeatureStore, first: int, stop: int, places: Integer[np.ndarray, "n"], ctx_len: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Locations and values of the codes of a range of latents, in text order."""
    rows = store.columns(first, stop).tocsr()
    rows.sort_indices()
    at = np.repeat(places[store.places], np.diff(rows.indptr))
    kept = np.abs(rows.data) > SMALLEST
    triples = np.stack([at // ctx_len, at % ctx_len, rows.indices], 1)[kept]
    narrow = triples.max(initial=0) < 2**16
    locations = torch.from_numpy(triples.astype(SHORT if narrow else WIDE))
    if (largest := float(np.abs(rows.data[kept]).max(initial=0))) > float(np.finfo(np.float16).max):
        raise ValueError(f"delphi's codes are float16, up to 65504, got {largest:.4g}. Scale the SAE down first.")
    return locations, torch.from_numpy(rows.data[kept].astype(np.float16))


def convert_delphi(
    folder: str | Path,
    out: str | Path,
    *,
    tokens: Integer[Tensor, "n_seq ctx_len"] | None = None,
    tokenizer: Any = None,
    hook_point: str | None = None,
    shard_tokens: int = SHARD_TOKENS,
    progress: bool = True,
    resume: bool = True,
) -> FeatureStore:
    """Feature store made in `out` from the latent cache that delphi (EleutherAI) wrote for one hook point.

    Codes keep sign and value to the bit (delphi has left out |z| <= 1e-5); zeros are dropped. Every token is a row, as
    delphi has no token mask, and every sequence is a document, as it does not record documents. Memory use is the
    tokens and the codes of `shard_tokens` rows or one sequence. An interrupted call continues where it stopped when it
    is made again, and ends with the same bytes.

    Args:
        folder: folder of the hook point: `config.json` and files `{first}_{last}.safetensors`.
        out: folder of the feature store.
        tokens: (n_seq, ctx_len) ids that were cached; needed where the cache was saved without them.
        tokenizer: gives the strings of tokens; None shows them as <id>.
        hook_point: name of the hook point in TransformerLens' spelling; None is delphi's name.
        shard_tokens: rows per shard, rounded down to whole sequences.
        progress: whether to show a progress bar.
        resume: continue an interrupted call; False deletes what `out` holds and starts over.

    Raises:
        FileNotFoundError: where there is no cache.
        ValueError: naming the file, where latents are missing or occur twice, for locations outside the tokens, values
            that are not finite and tokens that differ; and for an `out` begun with other arguments.

    >>> convert_delphi("latents/layers.2", "store")
    Traceback (most recent call last):
    FileNotFoundError: `folder` must be the folder of one hook point in a latent cache, got latents/layers.2. ...
    """
    if shard_tokens < 1:
        raise ValueError(f"`shard_tokens` must be at least 1, got {shard_tokens}.")
    cache, out = DelphiCache.open(Path(folder), tokens, hook_point), Path(out)
    n_seq = max(1, shard_tokens // cache.tokens.ctx_len)
    request = cache.request() | {"tokenizer": getattr(tokenizer, "name_or_path", None), "shard_sequences": n_seq}
    with claim_folder(out, request, FeatureManifest, lambda: _begin(cache, request), resume) as manifest:
        if not manifest.complete:
            buffers = _Packer(cache.d_sae), _Packer(cache.d_sae)
            with ShardWriter(out, manifest, n_seq * cache.tokens.ctx_len, buffers) as writer:
                _write_shards(cache, writer, n_seq, progress)
                _finish(cache, writer, tokenizer)
        return FeatureStore.load(out)


def _begin(cache: DelphiCache, request: dict[str, Any]) -> FeatureManifest:
    return FeatureManifest(
        d_sae=cache.d_sae,
        dtype=cache.dtype,
        sae={"config": {"d_sae": cache.d_sae}, "delphi": cache.config},
        source=f"delphi's cache of {cache.config['model_name']} at {cache.hook_point}",
        request=request,
        provenance=cache.origin().to_dict(),
    )


def _write_shards(cache: DelphiCache, writer: ShardWriter, n_seq: int, progress: bool) -> None:
    """Write a shard for every `n_seq` sequences."""
    from tqdm.auto import tqdm

    ctx_len, n_all = cache.tokens.ctx_len, len(cache.tokens)
    bar = {"total": n_all * ctx_len, "initial": writer.next_seq * ctx_len, "unit": " tokens", "unit_scale": True}
    with tqdm(**bar, disable=hidden(progress)) as shown:
        for first in range(writer.next_seq, n_all, n_seq):
            stop = min(first + n_seq, n_all)
            codes = cache.read(first, stop)
            writer.add(codes, len(codes.places), stop - first, {})
            shown.update(len(codes.places))


def _finish(cache: DelphiCache, writer: ShardWriter, tokenizer: Any) -> None:
    """Write remaining rows, the text and the statistics."""
    writer.flush()
    manifest = writer.manifest
    assert isinstance(manifest, FeatureManifest)
    store = FeatureStore(writer.folder, manifest, manifest.check_shards(writer.folder))
    orders = ((arrays["feature_offsets"], arrays["feature_values"]) for _, arrays in store.shards())
    files = save_statistics(writer.folder, measure(cache.d_sae, orders))
    writer.finish(cache.origin(), files=files | cache.text(tokenizer).save(writer.folder))


class _Packer:
    """Codes of the next shard, added all at once."""

    def __init__(self, d_sae: int) -> None:
        self._d_sae = d_sae

    def add(self, reading: PlacedCodes, start: int, stop: int) -> None:
        """Set the shard's codes."""
        assert (start, stop) == (0, len(reading.places))
        self._codes = reading

    def take(self) -> dict[str, Tensor]:
        """The codes ordered by token and by feature."""
        codes = self._codes
        packed = pack_codes(codes.offsets, codes.latents, codes.values, self._d_sae) | {"places": codes.places}
        return {name: torch.from_numpy(array) for name, array in packed.items()}

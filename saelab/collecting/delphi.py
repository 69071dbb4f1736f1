"""Reading delphi's latent cache of one hook point: safetensors files, each with the codes of a range of latents on all
tokens.
"""

import re
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int32, Integer
from safetensors import SafetensorError, safe_open
from torch import Tensor

from saelab.lm.masks import TokenMask
from saelab.lm.strings import token_strings
from saelab.lm.tokens import Tokens
from saelab.stores.corpus import StoredText
from saelab.stores.files import checksum, read_json
from saelab.stores.provenance import Provenance

NAME = re.compile(r"(\d+)_(\d+)")
LARGEST_ID = 2**31 - 1


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
                f"{folder} must hold the {n} files that its config.json tells of, got {len(ranges)}. Copy the others."
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
    n_tokens, ctx_len = config.get("n_tokens", ids.numel()), config.get("ctx_len", ids.shape[1])
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

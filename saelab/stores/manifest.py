"""The manifest of an activations folder: what lies in it, checked against the files before anything is read."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch

from saelab.stores.files import TensorSpec, checksum, read_header, read_json, write_json

SCHEMA_VERSION = 1
INT_COLUMNS = ("token_ids", "doc_ids", "positions")


@dataclass(frozen=True, kw_only=True)
class Shard:
    """One safetensors file of an activations folder."""

    file: str
    n_tokens: int
    crc32: str


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What an activations folder holds and how far its collecting has come."""

    d_in: dict[str, int]
    "Width by hook point, in the order asked for."
    dtype: str
    "Of the activations; token ids, document ids and positions are int32."
    request: dict[str, Any]
    "The arguments that decide the bytes; resuming with others is refused."
    provenance: dict[str, Any]
    "Of the first hook point."
    shards: tuple[Shard, ...] = ()
    next_seq: int = 0
    "First sequence that has rows outside the shards."
    skip_rows: int = 0
    "Rows of the batch starting there that are in the shards already."
    removed: dict[str, int] = field(default_factory=dict)
    "Tokens removed by each rule of the mask before that sequence."
    median_norms: dict[str, float] | None = None
    "By hook point, where the mask has a norm rule."
    complete: bool = False

    @property
    def n_tokens(self) -> int:
        """Rows in all shards."""
        return sum(shard.n_tokens for shard in self.shards)

    def save(self, folder: str | Path) -> None:
        """Write `manifest.json` into `folder`, atomically."""
        counts = {"hook_points": list(self.d_in), "n_tokens": self.n_tokens}
        head = {"schema_version": SCHEMA_VERSION, "kind": "activations"}
        write_json(Path(folder) / "manifest.json", head | counts | asdict(self))

    @classmethod
    def load(cls, folder: str | Path) -> "Manifest":
        """Read `manifest.json`; FileNotFoundError when missing, ValueError when it is not one of ours or was edited."""
        path = Path(folder) / "manifest.json"
        data = read_json(path)
        if not isinstance(data, dict) or data.get("kind") != "activations":
            raise ValueError(f"{path} must be of kind 'activations'. Give a folder that `collect` wrote.")
        if (version := data.get("schema_version")) != SCHEMA_VERSION:
            raise ValueError(f"{path} must have schema_version {SCHEMA_VERSION}, got {version}. Collect it again.")
        try:
            shards = tuple(Shard(**shard) for shard in data["shards"])
            manifest = cls(**{f.name: data[f.name] for f in fields(cls)} | {"shards": shards})
            agrees = manifest.n_tokens == data["n_tokens"] and list(manifest.d_in) == data["hook_points"]
        except (KeyError, TypeError) as error:
            raise ValueError(f"{path} must have every field of a manifest ({error}). Was it edited?") from None
        if not agrees:
            raise ValueError(f"{path}: n_tokens and hook_points must agree with shards and d_in. Was it edited?")
        return manifest

    def check_shards(self, folder: str | Path, verify: bool = False) -> list[dict[str, TensorSpec]]:
        """Compare every shard's header and size (with `verify` its checksum too) with the manifest.

        Returns where each tensor lies, by shard. Raises FileNotFoundError or ValueError naming the shard.
        """
        found = []
        for shard in self.shards:
            path = Path(folder) / shard.file
            specs, _ = read_header(path)
            self._check_specs(path, specs, shard.n_tokens)
            if verify and checksum(path) != shard.crc32:
                raise ValueError(f"{path} must have the checksum in the manifest, got another. Collect it again.")
            found.append(specs)
        return found

    def _check_specs(self, path: Path, specs: Mapping[str, TensorSpec], n_tokens: int) -> None:
        wanted: dict[str, Any] = {name: (self.dtype, (n_tokens, d_in)) for name, d_in in self.d_in.items()}
        wanted |= dict.fromkeys(INT_COLUMNS, ("int32", (n_tokens,)))
        got = {name: (dtype_name(spec.dtype), spec.shape) for name, spec in specs.items()}
        if got != wanted:
            names = sorted(name for name in wanted.keys() | got.keys() if wanted.get(name) != got.get(name))
            raise ValueError(
                f"{path} must agree with manifest.json; {names[0]!r} should be {wanted.get(names[0])}, "
                f"got {got.get(names[0])}. Was one of them edited or replaced?"
            )


def dtype_name(dtype: torch.dtype) -> str:
    """The name of a dtype without `torch.`.

    >>> dtype_name(torch.bfloat16)
    'bfloat16'
    """
    return str(dtype).removeprefix("torch.")

"""Manifests of activation and feature stores, which list a folder's files; and provenance.

Files are checked against the manifest when a folder is opened. `Provenance` (model, hook point, text and mask of
activations) is saved with everything that is made from them.
"""

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, ClassVar, TypeAlias, TypeVar

import torch
from torch import Tensor

from saelab.stores.files import checksum, find_inside, require_file_name, write_json
from saelab.stores.packing import smallest_int
from saelab.stores.sharing import shareable, shareable_parts
from saelab.stores.tensors import TensorFile, TensorSpec
from saelab.stores.validation import SEAL, SHOWN, naming, read_fields, read_sealed, refuse_unknown, require_object

SCHEMA_VERSION = 1
MAX_SIZE = 2**48
FLOATS = ("float32", "float16", "bfloat16", "float64")
INT_COLUMNS = ("token_ids", "doc_ids", "positions")
PAYLOADS, MAX_SIDE = {"texts": 0, "paths": 0, "pixels": 3}, 2**16
"""What a document may have to show, with the number of axes of it; and the longest axis."""
AnyManifest = TypeVar("AnyManifest", bound="Manifest")
Layout: TypeAlias = tuple[str, tuple[int, ...]]
"""dtype and shape of a tensor"""


@dataclass(frozen=True, kw_only=True)
class Shard:
    """One safetensors file of a folder."""

    file: str
    n_tokens: int
    crc32: str


@dataclass(frozen=True, kw_only=True)
class Manifest(ABC):
    """Contents of a folder of shards and progress of writing it; one subclass per kind of folder."""

    kind: ClassVar[str]
    verb: ClassVar[str]
    "Name of the function that writes such folders."
    files_of_kind: ClassVar[tuple[str, ...]] = ("shard-*.safetensors",)
    "Patterns of the files of such a folder, without the manifest."
    allowed_files: ClassVar[tuple[str, ...]] = ()
    "Patterns of other files that may be kept in it, such as labels."
    later: ClassVar[tuple[str, ...]] = ("payload",)
    "Fields that folders of older versions lack."

    request: dict[str, Any]
    "The arguments that decide the bytes; resuming with others is refused."
    provenance: dict[str, Any]
    "Origin of the activations at the first hook point."
    shards: tuple[Shard, ...] = ()
    next_seq: int = 0
    "First sequence that is not entirely in the shards."
    skip_rows: int = 0
    "Rows of the batch starting at that sequence that are in the shards already."
    removed: dict[str, int] = field(default_factory=dict)
    "Number of tokens removed by each rule of the mask before that sequence."
    complete: bool = False
    payload: dict[str, list[int]] | None = None
    "What each row has to show, where rows are documents: texts, paths, or pixels with their shape; None for tokens."

    @property
    def n_tokens(self) -> int:
        """Number of rows in all shards."""
        return sum(shard.n_tokens for shard in self.shards)

    @property
    def counted(self) -> str:
        """What its rows are, as a word: tokens, or documents."""
        return "tokens" if self.payload is None else "documents"

    @property
    def has_strings(self) -> bool:
        """Whether rows are documents with a text or a path each."""
        return not {"texts", "paths"}.isdisjoint(self.payload or ())

    @abstractmethod
    def counts(self) -> dict[str, Any]:
        """Derived values that are saved with the fields, and must agree with them when the manifest is read."""

    def _expect_pixels(self, n_tokens: int) -> dict[str, Layout]:
        """Dtype and shape of the images of a shard, where the payload has any."""
        shape = (self.payload or {}).get("pixels")
        return {} if shape is None else {"pixels": ("uint8", (n_tokens, *shape))}

    @abstractmethod
    def expect(self, n_tokens: int, specs: Mapping[str, TensorSpec]) -> dict[str, Layout]:
        """Dtype and shape of each tensor of a shard of `n_tokens` rows whose header is `specs`."""

    def with_shard(self: AnyManifest, shard: Shard, tensors: Mapping[str, Tensor]) -> AnyManifest:
        """A copy of the manifest with one more shard, which holds `tensors`."""
        return replace(self, shards=(*self.shards, shard))

    def save(self, folder: str | Path) -> None:
        """Write `manifest.json` into `folder`, atomically."""
        head = {"schema_version": SCHEMA_VERSION, "kind": self.kind}
        write_json(Path(folder) / "manifest.json", head | self.counts() | asdict(self), sealed=True)

    def published(self: AnyManifest) -> AnyManifest:
        """A copy in which every path is cut to its last part: what a folder that others get says of its origin."""
        own = {
            f.name: shareable_parts(getattr(self, f.name)) for f in fields(self) if f.name not in ("shards", "files")
        }
        return replace(self, **own)

    @classmethod
    def load(cls: type[AnyManifest], folder: str | Path) -> AnyManifest:
        """The manifest in `manifest.json` of a folder.

        Raises:
            FileNotFoundError: the folder or the file is missing.
            ValueError: it is of another kind or version, or was damaged or edited.
        """
        path = Path(folder) / "manifest.json"
        if not path.is_file():
            there = "a file" if path.parent.exists() else "no such folder"
            there = f"a folder without {cls.kind}" if path.parent.is_dir() else there
            raise FileNotFoundError(
                f"A folder of {cls.kind} must be one that `{cls.verb}` wrote, got '{folder}': {there}. Give another "
                f"one, or make one with `saelab {cls.verb}`."
            )
        data, check_seal = read_sealed(path)
        if not isinstance(data, dict) or data.get("kind") != cls.kind:
            got = str(data.get("kind"))[:SHOWN] if isinstance(data, dict) else "none"
            raise ValueError(
                f"{path} must be of kind '{cls.kind}', got '{got}'. Give a folder that `{cls.verb}` wrote."
            )
        if (version := data.get("schema_version")) != SCHEMA_VERSION:
            raise ValueError(
                f"{path} must have schema_version {SCHEMA_VERSION}, got {version}. Run `{cls.verb}` again "
                "with resume=False."
            )
        with naming(path):
            manifest = cls._read(data)
        check_seal()
        return manifest

    @classmethod
    def _read(cls: type[AnyManifest], data: dict[str, Any]) -> AnyManifest:
        names = [f.name for f in fields(cls)]
        if missing := [name for name in names if name not in data and name not in cls.later]:
            raise ValueError(f"A manifest must have every field, got none for {missing[:5]}. Was it edited?")
        shards = data["shards"] if isinstance(data["shards"], list) else [data["shards"]]
        own = {name: data[name] for name in names if name in data}
        manifest = read_fields(cls, own | {"shards": tuple(read_fields(Shard, shard) for shard in shards)})
        counted = manifest.counts()
        refuse_unknown(data, ["schema_version", "kind", SEAL, *counted, *names], "A manifest")
        if differing := [name for name, value in counted.items() if data.get(name) != value]:
            raise ValueError(f"{' and '.join(differing)} must agree with its other fields. Was it edited?")
        manifest.check()
        return manifest

    def check(self) -> None:
        """Check file names and sizes; ValueError for a name that is a path, and for a size out of range."""
        for shard in self.shards:
            require_file_name(shard.file)
        if len({shard.file for shard in self.shards}) < len(self.shards):
            raise ValueError("Every shard must have a file of its own, got one twice. Was it edited?")
        sizes = {
            "n_tokens of a shard": min((shard.n_tokens for shard in self.shards), default=1),
            "next_seq": self.next_seq + 1,
            "skip_rows": self.skip_rows + 1,
            "removed": min(self.removed.values(), default=0) + 1,
            **self.sizes(),
        }
        if wrong := [name for name, size in sizes.items() if not 1 <= size <= MAX_SIZE]:
            raise ValueError(f"`{wrong[0]}` must be a size, at least 0 and below 2^48. Was it edited?")
        for kind, shape in (self.payload or {}).items():
            if kind not in PAYLOADS or len(shape) != PAYLOADS[kind] or not all(1 <= n <= MAX_SIDE for n in shape):
                raise ValueError(f"`payload` must be among {list(PAYLOADS)}, got {kind[:40]!r}: {shape[:5]}.")

    def sizes(self) -> dict[str, int]:
        """Further numbers that must be at least 1, by name."""
        return {}

    @classmethod
    def load_complete(cls: type[AnyManifest], folder: str | Path) -> AnyManifest:
        """The manifest of a folder that is to be read; ValueError as for `load`, and where the folder is unfinished."""
        manifest = cls.load(folder)
        if not manifest.complete:
            verb = "embed" if cls.verb == "collect" and manifest.payload is not None else cls.verb
            raise ValueError(
                f"{folder} must be complete to be read; `{verb}` stopped after {manifest.n_tokens} {manifest.counted}. "
                f"Run the same `{verb}` again, without resume=False: it goes on where it stopped."
            )
        return manifest

    def check_shards(self, folder: str | Path, verify: bool = False) -> list[TensorFile]:
        """The shards as open files, whose headers and sizes agree with the manifest; blocks are checked when read.

        Args:
            folder: the folder of the manifest.
            verify: whether checksums are compared too, which reads every shard.

        Raises:
            FileNotFoundError: a shard is missing.
            ValueError: a shard is truncated, edited, or of another shape or dtype; the message names it.
        """
        found = []
        for shard in self.shards:
            with _advised():
                path = find_inside(folder, shard.file)
                file = TensorFile.open(path)
                self._check_specs(path, file.specs, shard.n_tokens)
                if verify and checksum(path) != shard.crc32:
                    raise ValueError(f"{path} must have the checksum in the manifest, got another.")
            found.append(file)
        return found

    def _check_specs(self, path: Path, specs: Mapping[str, TensorSpec], n_tokens: int) -> None:
        wanted = self.expect(n_tokens, specs)
        got = {name: (dtype_name(spec.dtype), spec.shape) for name, spec in specs.items()}
        if got != wanted:
            names = sorted(name for name in wanted.keys() | got.keys() if wanted.get(name) != got.get(name))
            raise ValueError(
                f"{path} must agree with manifest.json; {names[0]!r} should be {wanted.get(names[0])}, "
                f"got {got.get(names[0])}. Was one of them edited or replaced?"
            )


@dataclass(frozen=True, kw_only=True)
class ActivationsManifest(Manifest):
    """Manifest of a folder of activations, which `collect` writes."""

    kind = "activations"
    verb = "collect"

    d_in: dict[str, int]
    "Width of the activations by hook point, in the order requested."
    dtype: str
    "Dtype of the activations; token ids, document ids and positions are int32."
    median_norms: dict[str, float] | None = None
    "Median norm by hook point, where the mask has a norm rule."

    def counts(self) -> dict[str, Any]:
        """Names of the hook points, and number of rows."""
        return {"hook_points": list(self.d_in), "n_tokens": self.n_tokens}

    def sizes(self) -> dict[str, int]:
        """Width of the activations at each hook point."""
        return {f"d_in of {name}": d_in for name, d_in in self.d_in.items()}

    def check(self) -> None:
        """Check names, sizes, hook points and dtype; ValueError where one cannot be right."""
        super().check()
        if not self.d_in:
            raise ValueError("`d_in` must name a hook point at least, got none. Was it edited?")
        if self.dtype not in FLOATS:
            raise ValueError(f"`dtype` must be one of {list(FLOATS)}, got {self.dtype[:40]!r}. Was it edited?")

    def expect(self, n_tokens: int, specs: Mapping[str, TensorSpec]) -> dict[str, Layout]:
        """Dtype and shape of the activations of each hook point, and of the integer columns, or of the payload."""
        wanted: dict[str, Layout] = {name: (self.dtype, (n_tokens, d_in)) for name, d_in in self.d_in.items()}
        if self.payload is None:
            return {**wanted, **dict.fromkeys(INT_COLUMNS, ("int32", (n_tokens,)))}
        if self.has_strings:
            n_bytes = specs["texts"].shape[:1] if "texts" in specs else (0,)
            wanted |= {"texts": ("uint8", n_bytes), "text_ends": ("int64", (n_tokens,))}
        return wanted | self._expect_pixels(n_tokens)


@dataclass(frozen=True, kw_only=True)
class FeatureManifest(Manifest):
    """Manifest of a feature store, which `harvest` writes."""

    kind = "features"
    verb = "harvest"
    files_of_kind = ("shard-*.safetensors", "tokens.safetensors", "strings.json", "statistics.safetensors")
    allowed_files = ("labels*.sqlite", "labels*.vectors.safetensors", "answers.jsonl", "answers.part-*.jsonl")

    d_sae: int
    dtype: str
    "Dtype of the codes, float16 or float32."
    sae: dict[str, Any]
    "The SAE's config, origin and training, and where it was loaded from."
    source: str = ""
    "Description of the SAE in one line."
    n_entries: int = 0
    "Number of non-zero codes in all shards."
    files: dict[str, str] = field(default_factory=dict)
    "Checksums of the files that are not shards, by name."

    def verify(self, folder: str | Path) -> None:
        """Compare the checksum of every file with this manifest; ValueError naming the first that differs."""
        self.check_shards(folder, verify=True)
        for file, crc32 in self.files.items():
            path = find_inside(folder, file)
            if checksum(path) != crc32:
                raise ValueError(
                    f"{path} must have the checksum in the manifest, got another. Harvest again with resume=False."
                )

    def counts(self) -> dict[str, Any]:
        """Number of rows, as `n_tokens`."""
        return {"n_tokens": self.n_tokens}

    def sizes(self) -> dict[str, int]:
        """Number of features, and of codes plus one (a store may have no codes, but sizes must be at least 1)."""
        return {"d_sae": self.d_sae, "n_entries": self.n_entries + 1}

    def check(self) -> None:
        """Check names, sizes, dtype and the SAE's config; ValueError where one cannot be right."""
        super().check()
        for file in self.files:
            require_file_name(file)
        if self.dtype not in ("float16", "float32"):
            raise ValueError(f"`dtype` must be float16 or float32, got {self.dtype[:40]!r}. Was it edited?")
        if self.d_sae >= 2**31:
            raise ValueError(f"`d_sae` must be below 2^31, got {self.d_sae}. Was it edited?")
        require_object(self.sae.get("config", {}), "`config` of `sae`")

    def expect(self, n_tokens: int, specs: Mapping[str, TensorSpec]) -> dict[str, Layout]:
        """Dtype and shape of the codes by token and by feature, and of the rows' places in the text."""
        shape = specs["latents"].shape if "latents" in specs else (0,)
        latents, tokens = (str(smallest_int(size - 1)) for size in (self.d_sae, n_tokens))
        wanted: dict[str, Layout] = {
            "offsets": ("int32", (n_tokens + 1,)),
            "feature_offsets": ("int32", (self.d_sae + 1,)),
        }
        wanted |= {"latents": (latents, shape), "feature_tokens": (tokens, shape), "places": ("int32", (n_tokens,))}
        wanted["values"] = (self.dtype, shape)
        if self.payload is None:
            return wanted | {"feature_values": (self.dtype, shape)}
        return wanted | self._expect_pixels(n_tokens)  # values by feature are looked up: a document has few codes

    def with_shard(self, shard: Shard, tensors: Mapping[str, Tensor]) -> "FeatureManifest":
        """A copy of the manifest with one more shard, whose codes are added to `n_entries`."""
        return replace(super().with_shard(shard, tensors), n_entries=self.n_entries + len(tensors["latents"]))


@contextmanager
def _advised() -> Iterator[None]:
    """Context in which errors about a missing or damaged shard add how to write the folder again."""
    try:
        yield
    except (FileNotFoundError, ValueError) as error:
        advice = "run what wrote the folder again with resume=False: that deletes it and starts over"
        raise type(error)(f"{error} Where there is no copy, {advice}.") from None


def dtype_name(dtype: torch.dtype) -> str:
    """The name of a dtype without `torch.`.

    >>> dtype_name(torch.bfloat16)
    'bfloat16'
    """
    return str(dtype).removeprefix("torch.")


@dataclass(frozen=True, kw_only=True)
class Provenance:
    """Origin of the activations at one hook point: model, text, mask and versions.

    >>> origin = Provenance(model="gpt2", weight_processing="none", hook_point="blocks.0.hook_resid_post", text="a.txt",
    ...     tokens_sha256="", mask={}, dtype="float32", ctx_len=128, n_tokens=10, seed=None, versions={})
    >>> origin.at("blocks.1.hook_resid_post").hook_point
    'blocks.1.hook_resid_post'
    """

    model: str
    "Name or folder of the language model."
    weight_processing: str
    "How its weights were processed, such as folding of layer norms."
    hook_point: str
    "Place in the model, by its TransformerLens name."
    text: str
    "Source of the text: a file, a data set or a description."
    tokens_sha256: str
    "Hash of the token ids and document ids."
    mask: dict[str, Any]
    "Fields of the token mask."
    dtype: str
    "Dtype of the stored activations."
    ctx_len: int | None
    "Tokens in a sequence."
    n_tokens: int
    "Number of rows that the mask kept."
    seed: int | None
    "Seed of the order of sequences, where it is random."
    versions: dict[str, str]
    "Versions of saelab, torch, transformer-lens and transformers."
    removed: dict[str, int] = field(default_factory=dict)
    "Number of tokens removed by each rule of the mask."
    median_norm: float | None = None
    "Median norm that the mask's norm rule refers to."
    hook_point_out: str | None = None
    "Hook point whose activations a transcoder reconstructs, where these are pairs."
    median_norm_out: float | None = None
    "Median norm that the mask's norm rule refers to at that hook point."
    model_sketch: tuple[float, ...] | None = None
    "A few numbers computed from the language model's weights, which identify it whatever its name."
    autocast: str | None = None
    "Dtype of the language model's products under `torch.autocast`, where that was used."
    pooling: str | None = None
    "How the vectors of a document's tokens became its row, where rows are documents; None where they are tokens."
    backend: str | None = None
    "What ran the language model: transformer_lens or huggingface, whose numbers are the same up to rounding."
    sources: dict[str, dict[str, Any]] | None = None
    "Provenance of each source by name, where several are joined; the other fields are those of the first."

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON values, without local paths; those of a second hook point, of autocast, pooling, the back
        end and several sources only where there are any.
        """
        plain = asdict(self) | {"model": shareable(self.model), "text": shareable(self.text)}
        if self.hook_point_out is None:
            del plain["hook_point_out"], plain["median_norm_out"]
        plain["model_sketch"] = None if self.model_sketch is None else list(self.model_sketch)  # as after JSON
        for name in ("model_sketch", "autocast", "backend", "pooling", "sources"):
            if plain[name] is None:
                del plain[name]
        return plain

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "Provenance":
        """The provenance in the output of `to_dict`; ValueError for an unknown or missing field or a wrong type."""
        return read_fields(cls, data)

    def at(self, hook_point: str, median_norm: float | None = None) -> "Provenance":
        """A copy at another hook point, with the median norm there."""
        return replace(self, hook_point=hook_point, median_norm=median_norm)

    @classmethod
    def join(cls, parts: Mapping[str, "Provenance"], n_tokens: int, paired: Collection[str] = ()) -> "Provenance":
        """The origin of activations of several sources, joined token by token.

        Args:
            parts: origin of each source by its name.
            n_tokens: number of joined rows.
            paired: sources whose rows were paired by number, which may be of other tokens.

        Raises:
            ValueError: the others are not of the same tokens and mask, or a source is joined itself.
        """
        name, first = next(
            (name, part) for name, part in parts.items() if name not in paired or len(paired) == len(parts)
        )
        for other, part in parts.items():
            if part.sources is not None:
                raise ValueError(
                    f"Sources must be of one hook point each, '{other}' is joined from {list(part.sources)}."
                )
            for key in () if other in paired else ("tokens_sha256", "mask"):
                if getattr(part, key) != getattr(first, key):
                    raise ValueError(
                        f"Sources must be of the same tokens, got `{key}` {getattr(first, key)!r} of '{name}' and "
                        f"{getattr(part, key)!r} of '{other}'; collect them from the same tokens with the same mask."
                    )
        told = {name: part.to_dict() for name, part in parts.items()}
        return replace(next(iter(parts.values())), n_tokens=n_tokens, sources=told)

    def at_source(self, name: str) -> "Provenance":
        """The origin of one of the joined sources; ValueError for a name that is none of them."""
        if name not in (self.sources or {}):
            raise ValueError(f"`name` must be one of the sources {list(self.sources or {})}, got '{name}'.")
        return Provenance.from_dict((self.sources or {})[name])

    @property
    def place(self) -> str:
        """Text naming the hook point: `at A`, or `from A to B` for pairs."""
        out = self.hook_point_out
        return f"at {self.hook_point}" if out is None else f"from {self.hook_point} to {out}"

    def paired(self, target: "Provenance") -> "Provenance":
        """The origin of pairs of these activations with those of `target`, token by token.

        Raises:
            ValueError: the two are not of the same tokens, mask and model.
        """
        for name in ("model", "weight_processing", "tokens_sha256", "mask", "n_tokens"):
            if (mine := getattr(self, name)) != (other := getattr(target, name)):
                raise ValueError(
                    f"Pairs must be of the same tokens, got `{name}` {mine!r} and {other!r}; collect both hook points "
                    "in one call."
                )
        return replace(self, hook_point_out=target.hook_point, median_norm_out=target.median_norm)

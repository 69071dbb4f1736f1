"""`SAEFiles`: a folder or single file that may hold an SAE, and the safe reading of its tensors and configuration.

Tensors come from safetensors, PyTorch's zip format or NumPy's npz; nothing in them is executed. They are
memory-mapped, so that names, shapes and dtypes are known before any value is read. In the place of any weights file
there may be several, and an index that names the file of each tensor, as Hugging Face's libraries write large models:
`model-00001-of-00002.safetensors`, ..., `model.safetensors.index.json`. Keys of other libraries'
configurations are validated by type; numbers that must be present are checked by `require_number`.
"""

import math
import pickle
import re
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from typing_extensions import TypedDict

from saelab.stores.files import await_settled, find_inside, inside
from saelab.stores.tensors import TensorFile, TensorSpec, map_tensor
from saelab.stores.validation import check_settings, read_json

INDEX = ".index.json"
SHARD = re.compile(r"(.+)-\d{5}-of-\d{5}(\.\w+)")
ARCHIVES = (".npz",)
PICKLES = (".pt", ".pth", ".bin")
SMALL = 2**24  # bytes up to which a compressed array may have any compression ratio
MAX_RATIO = 20  # largest compression ratio of a larger array: weights hardly compress
NAMED = re.compile(r"GLOBAL ([\w.]+)")  # function or class that a pickle refers to, in PyTorch's message
LOCAL_HEADER = 30  # bytes before a member's name in a zip file


class Metadata(TypedDict, total=False):
    """Metadata of a SAELens SAE; in files from before 6.0 the same keys are in the configuration itself."""

    sae_lens_version: str | None
    model_name: str | None
    hook_name: str | None
    hook_name_out: str | None
    dataset_path: str | None
    context_size: int | None
    seqpos_slice: list[int | None] | None
    exclude_special_tokens: bool | list[int] | None
    model_from_pretrained_kwargs: dict[str, Any] | None
    saelab: dict[str, Any] | None


class Trainer(TypedDict, total=False):
    """The "trainer" section of a dictionary_learning run."""

    dict_class: str | None
    k: float | None
    lm_name: str | None
    submodule_name: str | None


class TensorBuffer(TypedDict, total=False):
    """The "buffer" section of a dictionary_learning run."""

    ctx_len: int | None


class Said(Metadata, total=False):
    """Configuration of any supported library."""

    metadata: Metadata | None
    trainer: Trainer | None
    buffer: TensorBuffer | None
    architecture: str | None
    activation: str | None
    activation_fn: str | None
    activation_fn_str: str | None
    activation_fn_kwargs: dict[str, Any] | None
    normalize_activations: str | bool | None
    hook_point: str | None
    apply_b_dec_to_input: bool | None
    rescale_acts_by_decoder_norm: bool | None
    finetuning_scaling_factor: bool | None
    residual_threshold: float | None
    stop_on_duplicate_support: bool | None
    max_iterations: int | None
    scaling_factor: float | None
    num_latents: int | None
    signed: bool | None
    transcode: bool | None
    skip_connection: bool | None
    affine_connection: bool | None
    hf_hook_point_in: str | None
    hf_hook_point_out: str | None
    hook_point_in: str | None
    hook_point_out: str | None
    sae_type: str | None
    norm_activation: str | None
    act_fn: str | None
    use_decoder_bias: bool | None
    apply_decoder_bias_to_pre_encoder: bool | None
    sparsity_include_decoder_norm: bool | None
    dataset_average_activation_norm: dict[str, float] | None
    sae_class: str | None
    arguments: dict[str, Any] | None
    running_threshold: float | None


def read_tensors(path: Path) -> Mapping[str, Any]:
    """Contents of a weights file, or of the several in its place, by name: tensors, memory-mapped and not yet read, and
    plain values stored with them.

    Raises:
        FileNotFoundError: where there is no file.
        ValueError: for one that is cut off, is no such file, would have to run code to be read, or declares arrays
            larger than its bytes can hold.
    """
    if not path.is_file():
        if (index := path.with_name(path.name + INDEX)).is_file():
            return _Sharded(index)
        raise FileNotFoundError(f"An SAE's weights must be a file, got {path}, where there is none. Check the name.")
    if path.suffix in PICKLES:
        return _read_pickle(path)
    if path.suffix in ARCHIVES:
        return _read_archive(path)
    return _Checked(TensorFile.open(path))


class _Checked(Mapping):  # unparametrized, as a runtime type checker would read its values
    """The tensors of a safetensors file; each is compared with its checksum, if it has one, on access."""

    def __init__(self, file: TensorFile) -> None:
        self._file = file
        self._maps = file.map_all()

    def __getitem__(self, name: str) -> Tensor:
        self._file.check(name)
        return self._maps[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._file.specs)

    def __len__(self) -> int:
        return len(self._file.specs)

    def __contains__(self, name: object) -> bool:
        return name in self._file.specs


class _Index(TypedDict):
    weight_map: dict[str, str]


class _Sharded(Mapping):
    """The tensors of several files by the index that lists them; each file is opened for the first tensor of it."""

    def __init__(self, index: Path) -> None:
        self._index = index
        self._places = check_settings(_Index, read_json(index), str(index))["weight_map"]
        self._files: dict[str, Mapping[str, Any]] = {}
        if missing := [
            file for file in sorted(set(self._places.values())) if not find_inside(index.parent, file).is_file()
        ]:
            raise FileNotFoundError(f"{index} must have all files that it lists, got no {missing[:5]}. Copy them, too.")

    def __getitem__(self, name: str) -> Any:
        file = self._places[name]
        if file not in self._files:
            self._files[file] = read_tensors(self._index.parent / file)
        if name not in self._files[file]:
            raise ValueError(
                f"{self._index} must list what its files hold, got no '{name}' in {file}. Copy both again."
            )
        return self._files[file][name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    def __contains__(self, name: object) -> bool:
        return name in self._places


def find_whole(path: Path) -> Path:
    """Path of the weights file that an index, or one of the files that it lists, stands for; any other as it is."""
    if path.name.endswith(INDEX):
        return path.with_name(path.name.removesuffix(INDEX))
    found = SHARD.fullmatch(path.name)
    return path.with_name(f"{found[1]}{found[2]}") if found else path


def is_weights(path: Path) -> bool:
    """Whether there is a weights file, or an index of several in its place."""
    return path.is_file() or path.with_name(path.name + INDEX).is_file()


def _read_pickle(path: Path) -> Mapping[str, Any]:
    """A dictionary that `torch.save` wrote. Only tensors and plain values are unpickled; anything else is refused."""
    try:
        zipped = zipfile.is_zipfile(path)
        if zipped:
            with zipfile.ZipFile(path) as archive:
                _refuse_compressed(path, archive)
    except (zipfile.BadZipFile, OSError, EOFError, NotImplementedError, OverflowError, KeyError) as error:
        raise ValueError(f"{path} must be a whole PyTorch file, got a damaged one ({error}). Copy it again.") from None
    try:
        held = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except (
        *(pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError, AttributeError, TypeError),
        *(OSError, IndexError, OverflowError, MemoryError, AssertionError, ImportError, NotImplementedError),
    ) as error:
        raise ValueError(
            f"{path} must be a whole PyTorch file of tensors and plain values, got {_name_cause(error)}. It was not "
            "unpickled further: what it holds could run code. Ask for safetensors; or, where it was made, save a "
            "module's state instead of the module: torch.save(module.state_dict(), path)."
        ) from None
    if not isinstance(held, Mapping) or not all(isinstance(name, str) for name in held):
        raise ValueError(f"{path} must hold a dictionary of tensors by name, got a {type(held).__name__}.")
    return held


def _name_cause(error: Exception) -> str:
    """What stopped the unpickler, without PyTorch's own message, which advises to run the code."""
    found = NAMED.search(str(error))
    return f"one that names {found[1]}" if found else f"another ({type(error).__name__})"


def _refuse_compressed(path: Path, archive: zipfile.ZipFile) -> None:
    if any(info.compress_type != zipfile.ZIP_STORED for info in archive.infolist()):
        raise ValueError(
            f"{path} must be stored uncompressed, as torch.save does, got a compressed file. Write it again."
        )


def _read_archive(path: Path) -> Mapping[str, Tensor]:
    """Arrays of an npz file: uncompressed ones are memory-mapped; small or slightly compressed ones are read."""
    try:
        with zipfile.ZipFile(path) as archive:
            return {info.filename.removesuffix(".npy"): _read_array(path, archive, info) for info in archive.infolist()}
    except (
        zipfile.BadZipFile,
        zlib.error,
        OSError,
        EOFError,
        KeyError,
        SyntaxError,
        OverflowError,
        IndexError,
    ) as error:
        raise ValueError(f"{path} must be a whole npz file, got another ({error}). Was it cut off?") from None


def _read_array(path: Path, archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> Tensor:
    shape, fortran, dtype, start = _read_array_header(path, archive, info)
    n_bytes = int(np.prod(shape, dtype=np.float64) * dtype.itemsize)
    if info.file_size != start + n_bytes:
        raise ValueError(
            f"{path}: '{info.filename}' must have {start + n_bytes} bytes by its header {shape}, got {info.file_size}. "
            "It was cut off or made up; copy it again."
        )
    if info.compress_type == zipfile.ZIP_STORED and not fortran:
        return map_tensor(path, TensorSpec(_to_torch(path, dtype), shape, _find_data(path, info) + start))
    if n_bytes > max(SMALL, MAX_RATIO * info.compress_size):
        raise ValueError(
            f"{path}: '{info.filename}' must not unpack to more than {MAX_RATIO} times its size, got {n_bytes} bytes "
            f"in {info.compress_size}. Weights do not compress like that; store them uncompressed."
        )
    with archive.open(info) as member:
        return torch.from_numpy(np.array(np.lib.format.read_array(member, allow_pickle=False)))


def _read_array_header(
    path: Path, archive: zipfile.ZipFile, info: zipfile.ZipInfo
) -> tuple[tuple[int, ...], bool, np.dtype, int]:
    """Shape, order, dtype and length of the header; ValueError for what is no array of numbers."""
    with archive.open(info) as member:
        try:
            version = np.lib.format.read_magic(member)
            read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape, fortran, dtype = read(member)
        except ValueError as error:
            raise ValueError(f"{path}: '{info.filename}' must be an array, got another ({error}).") from None
        if dtype.hasobject:
            raise ValueError(
                f"{path}: '{info.filename}' must be an array of numbers, got objects, which could run code. Not read."
            )
        return shape, fortran, dtype, member.tell()


def _find_data(path: Path, info: zipfile.ZipInfo) -> int:
    """Offset of a stored member's data: after its local header, a name and an extra field."""
    with open(path, "rb") as file:
        file.seek(info.header_offset)
        header = file.read(LOCAL_HEADER)
    n_name, n_extra = (int.from_bytes(header[i : i + 2], "little") for i in (26, 28))
    return info.header_offset + LOCAL_HEADER + n_name + n_extra


def _to_torch(path: Path, dtype: np.dtype) -> torch.dtype:
    try:
        return torch.from_numpy(np.empty(0, dtype)).dtype
    except TypeError:
        raise ValueError(f"{path} must hold numbers that PyTorch knows, got {dtype}.") from None


@dataclass(frozen=True)
class SAEFiles:
    """A folder with files of known names, or one weights file of any name."""

    folder: Path
    file: str | None = None
    """the only weights file to look at"""

    @classmethod
    def open(cls, path: Path, name: str | None = None) -> "SAEFiles":
        """Source for a folder, a sub-folder or file in it, or a file.

        Raises:
            ValueError: for a name that leaves the folder.
            FileNotFoundError: where there is neither a folder nor a file.
        """
        place = path if name is None else path / inside(name)
        if place.is_dir():
            await_settled(place)
        if (whole := find_whole(place)) != place and is_weights(whole):
            place = whole
        if is_weights(place) and not place.is_dir():
            return cls(place.parent, place.name)
        if not place.is_dir():
            near = sorted(item.name for item in path.iterdir())[:5] if path.is_dir() else []
            hint = f"Choose one of {near}." if near else "Check the path."
            raise FileNotFoundError(f"An SAE must be a folder or a file, got {place}, which is neither. {hint}")
        return cls(place)

    def has(self, *names: str) -> bool:
        """Whether all these files exist; of a single-file source only that file and JSON files count."""
        return all(is_weights(self.folder / inside(name)) and self._may_read(name) for name in names)

    def _may_read(self, name: str) -> bool:
        return self.file is None or name == self.file or name.endswith(".json")

    def json(self, name: str) -> dict[str, Any]:
        """The object in a JSON file of the folder; ValueError where it holds anything else."""
        held = read_json(self.folder / inside(name), constants=True)
        if not isinstance(held, dict):
            raise ValueError(f"{self.folder / name} must hold an object, got a {type(held).__name__}. Was it edited?")
        return held

    def settings(self, name: str) -> dict[str, Any]:
        """A configuration in a JSON file, validated: the keys that saelab reads have the expected types, else
        ValueError.
        """
        held = self.json(name)
        check_settings(Said, held, str(self.folder / name))
        return held

    def json_if_there(self, name: str) -> dict[str, Any]:
        """A validated configuration in a JSON file, or an empty one where there is no such file."""
        return self.settings(name) if (self.folder / inside(name)).is_file() else {}

    def tensors(self, name: str) -> Mapping[str, Any]:
        """Contents of a weights file by name, memory-mapped."""
        return read_tensors(self.folder / inside(name))

    @cached_property
    def pickle(self) -> str | None:
        """Name of the PyTorch file: the one that was named, or the folder's only one; None without."""
        if self.file is not None:
            return self.file if Path(self.file).suffix in PICKLES else None
        found = sorted(path.name for path in self.folder.iterdir() if path.suffix in PICKLES)
        return found[0] if len(found) == 1 else None

    @property
    def place(self) -> Path:
        """Path of the folder or the file, for messages."""
        return self.folder if self.file is None else self.folder / self.file


def require_tensors(held: Mapping[str, Any], names: tuple[str, ...], place: Path) -> dict[str, Tensor]:
    """The named tensors; ValueError for one that is missing or not a tensor."""
    wrong = [name for name in names if not isinstance(held.get(name), Tensor)]
    if wrong:
        raise ValueError(f"{place} must hold tensors {list(names)}, got none for {wrong[:5]}. Is the file whole?")
    return {name: held[name] for name in names}


def require_number(settings: Mapping[str, Any], name: str, place: Path) -> Any:
    """A number in a configuration; ValueError where it is missing or not a finite number."""
    value = settings.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{place} must say a number for `{name}`, got {value!r}. Was it edited?")
    return value

"""`Source`: a folder or single file that may hold an SAE, through which all of its files are opened."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from saelab.sae.formats.said import Said
from saelab.sae.formats.tensorfiles import PICKLES, read_tensors
from saelab.stores.files import await_settled, read_json
from saelab.stores.validation import check_settings


@dataclass(frozen=True)
class Source:
    """A folder with files of known names, or one weights file of any name."""

    folder: Path
    file: str | None = None
    """the only weights file to look at"""

    @classmethod
    def open(cls, path: Path, name: str | None = None) -> "Source":
        """Source for a folder, a sub-folder or file in it, or a file.

        Raises:
            ValueError: for a name that leaves the folder.
            FileNotFoundError: where there is neither a folder nor a file.
        """
        place = path if name is None else path / inside(name)
        if place.is_dir():
            await_settled(place)
        if place.is_file():
            return cls(place.parent, place.name)
        if not place.is_dir():
            near = sorted(item.name for item in path.iterdir())[:5] if path.is_dir() else []
            hint = f"Choose one of {near}." if near else "Check the path."
            raise FileNotFoundError(f"An SAE must be a folder or a file, got {place}, which is neither. {hint}")
        return cls(place)

    def has(self, *names: str) -> bool:
        """Whether all these files exist; of a single-file source only that file and JSON files count."""
        return all((self.folder / inside(name)).is_file() and self._may_read(name) for name in names)

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


def inside(name: str) -> str:
    """The name itself; ValueError for one that leads out of the folder."""
    parts = Path(name).parts
    if not parts or Path(name).is_absolute() or ".." in parts or name.startswith("~"):
        raise ValueError(f"A file must be named by its path inside the SAE's folder, got '{name}', which leaves it.")
    return name


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

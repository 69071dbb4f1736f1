"""Reading and writing a saved SAE: `config.json` and `model.safetensors` in one folder, Hugging Face style, and
`origin.safetensors` where the SAE was converted from another library's format.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor
from typing_extensions import NotRequired, TypedDict

from saelab.sae.formats.readings import Origin
from saelab.sae.formats.tensorfiles import read_tensors
from saelab.stores.files import read_json, replace_folder, save_tensors, write_json
from saelab.stores.validation import SEAL, check_settings, naming, read_sealed

SCHEMA_VERSION = 1
CONFIG, WEIGHTS, KEPT = "config.json", "model.safetensors", "origin.safetensors"
KEYS = ("schema_version", "kind", "config", "provenance", "training", "origin")


class _Described(TypedDict):
    config: dict[str, Any]
    provenance: NotRequired[dict[str, Any]]
    training: NotRequired[dict[str, Any]]
    origin: NotRequired[dict[str, Any]]


def write_sae(folder: Path, described: dict[str, Any], tensors: Mapping[str, Tensor], origin: Origin | None) -> None:
    """Write an SAE's files atomically, replacing an older SAE in the folder; other files in the folder are kept.

    Args:
        folder: folder to write to.
        described: configuration, provenance and training as `SAE.describe` returns them.
        tensors: the state dict.
        origin: settings and unchanged tensors of the foreign file that the SAE was loaded from, so that it can be
            written back exactly; None for an SAE of saelab.
    """
    with replace_folder(folder, last=CONFIG, stale=(CONFIG, WEIGHTS, KEPT)) as temp:
        save_tensors(temp / WEIGHTS, tensors, {"format": "pt"})
        if origin is not None:
            described = described | {"origin": origin.to_dict()}
            save_tensors(temp / KEPT, origin.kept, {"format": "pt"})
        write_json(temp / CONFIG, {"schema_version": SCHEMA_VERSION, "kind": "sae", **described}, sealed=True)


def read_config(folder: Path) -> dict[str, Any]:
    """Contents of config.json as a dictionary with the keys "config", "provenance" and "training".

    Raises:
        FileNotFoundError: where there is no config.json.
        ValueError: for what is not an SAE of this schema version.
    """
    described = read_json(folder / CONFIG)
    if not isinstance(described, dict) or described.get("kind") != "sae":
        raise ValueError(f"{folder / CONFIG} must describe an SAE ('kind': 'sae'); give what save_pretrained wrote.")
    if (version := described.get("schema_version")) != SCHEMA_VERSION:
        raise ValueError(
            f"An SAE must have schema_version {SCHEMA_VERSION}, got {version} in {folder}; upgrade saelab."
        )
    if unknown := sorted(set(described) - {*KEYS, SEAL}):
        raise ValueError(f"{folder / CONFIG} must hold only {list(KEYS)}, got {unknown[:5]}; remove them.")
    with naming(folder / CONFIG):
        described = check_settings(_Described, described, "An SAE's description")
    return {"provenance": None, "training": None} | described


def check_config(folder: Path) -> None:
    """Compare config.json with its checksum; ValueError where it was edited. Call it after its contents were validated,
    whose messages are more precise.
    """
    _, check_seal = read_sealed(folder / CONFIG)
    check_seal()


def read_sae(folder: Path) -> tuple[dict[str, Any], Mapping[str, Any], Origin | None]:
    """Contents of config.json, the weights by name, and the foreign file's settings; tensors are memory-mapped and not
    yet read.
    """
    described = read_config(folder)
    origin = None
    with naming(folder / CONFIG):
        if described.get("origin") is not None:
            origin = Origin.from_dict(described["origin"], read_tensors(folder / KEPT))
    return described, read_tensors(folder / WEIGHTS), origin

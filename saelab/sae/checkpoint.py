"""The SAE's folder: `config.json` and `model.safetensors`, Hugging Face style; beside them `origin.safetensors` where
it was read from another format.
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
    """Write the files, all of them or none, in the place of an older SAE; what else the folder holds stays."""
    with replace_folder(folder, last=CONFIG, stale=(CONFIG, WEIGHTS, KEPT)) as temp:
        save_tensors(temp / WEIGHTS, tensors, {"format": "pt"})
        if origin is not None:
            described = described | {"origin": origin.to_dict()}
            save_tensors(temp / KEPT, origin.kept, {"format": "pt"})
        write_json(temp / CONFIG, {"schema_version": SCHEMA_VERSION, "kind": "sae", **described}, sealed=True)


def read_config(folder: Path) -> dict[str, Any]:
    """Read config.json; FileNotFoundError, or ValueError for what is not an SAE of this version."""
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
    """Compare config.json with its checksum, after what it says was understood; ValueError where it was edited."""
    _, check_seal = read_sealed(folder / CONFIG)
    check_seal()


def read_sae(folder: Path) -> tuple[dict[str, Any], Mapping[str, Any], Origin | None]:
    """Read config.json, and map the weights and what is kept of another format: no value is read yet."""
    described = read_config(folder)
    origin = None
    with naming(folder / CONFIG):
        if described.get("origin") is not None:
            origin = Origin.from_dict(described["origin"], read_tensors(folder / KEPT))
    return described, read_tensors(folder / WEIGHTS), origin

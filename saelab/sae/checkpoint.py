"""The SAE's folder: `config.json` and `model.safetensors`, Hugging Face style; beside them `origin.safetensors` where
it was read from another format.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from saelab.sae.formats.readings import Origin
from saelab.stores.files import (
    map_tensor,
    read_header,
    read_json,
    replace_folder,
    save_tensors,
    write_json,
)

SCHEMA_VERSION = 1
CONFIG, WEIGHTS, KEPT = "config.json", "model.safetensors", "origin.safetensors"
KEYS = ("schema_version", "kind", "config", "provenance", "training", "origin")


def write_sae(folder: Path, described: dict[str, Any], tensors: Mapping[str, Tensor], origin: Origin | None) -> None:
    """Write the files, all of them or none, in the place of an older SAE; what else the folder holds stays."""
    with replace_folder(folder, last=CONFIG, stale=(CONFIG, WEIGHTS, KEPT)) as temp:
        save_tensors(temp / WEIGHTS, tensors, {"format": "pt"})
        if origin is not None:
            described = described | {"origin": origin.to_dict()}
            save_tensors(temp / KEPT, origin.kept, {"format": "pt"})
        write_json(temp / CONFIG, {"schema_version": SCHEMA_VERSION, "kind": "sae", **described})


def read_config(folder: Path) -> dict[str, Any]:
    """Read config.json; FileNotFoundError, or ValueError for what is not an SAE of this version."""
    described = read_json(folder / CONFIG)
    if not isinstance(described, dict) or described.get("kind") != "sae":
        raise ValueError(f"{folder / CONFIG} must describe an SAE ('kind': 'sae'); give what save_pretrained wrote.")
    if described["schema_version"] != SCHEMA_VERSION:
        raise ValueError(
            f"An SAE must have schema_version {SCHEMA_VERSION}, got "
            f"{described['schema_version']} in {folder}; upgrade saelab."
        )
    if unknown := sorted(set(described) - set(KEYS)):
        raise ValueError(f"{folder / CONFIG} must hold only {list(KEYS)}, got {unknown}; remove them.")
    return described


def read_sae(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor], Origin | None]:
    """Read config.json, and map the weights and what is kept of another format: no value is read yet."""
    described = read_config(folder)
    origin = None
    if described.get("origin") is not None:
        origin = Origin.from_dict(described["origin"], _map(folder / KEPT))
    return described, _map(folder / WEIGHTS), origin


def _map(path: Path) -> dict[str, Tensor]:
    specs, _ = read_header(path)
    return {name: map_tensor(path, spec) for name, spec in specs.items()}

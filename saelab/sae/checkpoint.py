"""The SAE's folder: `config.json` and `model.safetensors`, Hugging Face style."""

from pathlib import Path
from typing import Any

from torch import Tensor

from saelab.stores.files import load_tensors, read_json, save_tensors, write_json

SCHEMA_VERSION = 1
CONFIG, WEIGHTS = "config.json", "model.safetensors"
KEYS = ("schema_version", "kind", "config", "provenance", "training")


def write_sae(folder: Path, described: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Write the two files, each atomically; the weights first, so that a config never stands beside older weights."""
    folder.mkdir(parents=True, exist_ok=True)
    save_tensors(folder / WEIGHTS, tensors, {"format": "pt"})
    write_json(folder / CONFIG, {"schema_version": SCHEMA_VERSION, "kind": "sae", **described})


def read_sae(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read config.json and the weights; FileNotFoundError, or ValueError for what is not an SAE of this version."""
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
    return described, load_tensors(folder / WEIGHTS)


def find_folder(source: str | Path, revision: str | None = None) -> Path:
    """The local folder of an SAE: as given, or downloaded from the Hub where no such folder exists and the name is a
    Hub id.
    """
    if Path(source).is_dir():
        return Path(source)
    parts = str(source).split("/")
    if len(parts) != 2 or not all(parts) or str(source).startswith((".", "~")):
        raise FileNotFoundError(
            f"An SAE must be a folder or a Hub id 'owner/name', got '{source}', which is neither; check the path."
        )
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(source), revision=revision, allow_patterns=[CONFIG, WEIGHTS]))
    except OSError as error:  # the Hub's own errors derive from it
        raise FileNotFoundError(
            f"'{source}' is no local folder and could not be fetched from the Hub ({type(error).__name__}); "
            "check the name and the connection."
        ) from error

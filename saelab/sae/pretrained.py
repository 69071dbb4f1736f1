"""Loading and saving SAEs: a folder, the Hugging Face Hub, a release name, and files of other libraries.

A saved SAE is `config.json` and `model.safetensors` in one folder, Hugging Face style, and `origin.safetensors` where
it was converted from another library's format. On loading each tensor that is needed is copied once.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from typing_extensions import NotRequired, TypedDict

from saelab.sae.archetypal import Archetypal
from saelab.sae.config import SAEConfig
from saelab.sae.formats.conventions import Convention, compose, narrow, own, take_latents
from saelab.sae.formats.hub import find_release, find_source
from saelab.sae.formats.origin import Origin, SAEFacts, make_provenance
from saelab.sae.formats.registry import OWN, keep_origin, read_foreign
from saelab.sae.formats.sources import SAEFiles, read_tensors
from saelab.stores.files import replace_folder, save_tensors, write_json
from saelab.stores.hub import HubAccess
from saelab.stores.manifest import Provenance
from saelab.stores.validation import SEAL, check_settings, naming, read_json, read_sealed

SCHEMA_VERSION = 1
CONFIG, WEIGHTS, KEPT = "config.json", "model.safetensors", "origin.safetensors"
KEYS = ("schema_version", "kind", "config", "provenance", "training", "origin")
SAEParts = tuple[SAEConfig, dict[str, Tensor], Provenance | None, dict[str, Any] | None, Origin | None]
"""configuration, state dict, provenance where known, the training record of an SAE that saelab wrote, and what is kept
of another library's file to write it back"""


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


def locate(source: str | Path, name: str | None, hub: HubAccess, overrides: SAEFacts) -> tuple[SAEFiles, SAEFacts]:
    """Folder or file of an SAE, downloaded if necessary, and the facts known about it: what the caller gave, else what
    its release entry gives.

    Args:
        source: local path, Hub id `owner/name`, or name of a release.
        name: sub-folder or file in it, or the release's SAE id; None for the source itself.
        hub: revision, token and cache on the Hub.
        overrides: facts given by the caller; these override the release's.
    """
    release = None if Path(source).expanduser().exists() else find_release(str(source), name)
    if release is None:
        return find_source(source, name, hub), overrides
    repo, path, facts = release
    known = {name: value for name, value in vars(facts).items() if getattr(overrides, name) is None}
    return find_source(repo, path, hub), replace(overrides, **known)


def load(
    source: SAEFiles, overrides: SAEFacts, format: str, latents: Sequence[int] | None, dtype: torch.dtype
) -> SAEParts:
    """Parts of the SAE in a folder or file.

    Args:
        source: the folder or file.
        overrides: facts that the caller gave; these override the file's.
        format: name of its format, from `find_format`.
        latents: indices of the latents to load, in that order; None is all.
        dtype: dtype of the weights.

    Raises:
        ValueError: where the files are no SAE, do not fit their configuration, or leave out a fact that the caller did
            not give.
    """
    if format == OWN:
        return _load_own(source, overrides, latents, dtype)
    with naming(source.place):
        reading = read_foreign(source, format, overrides)
        cfg, tensors, changed = compose(reading.parts, reading.how, latents, dtype)
        origin = keep_origin(reading, changed) if latents is None else None
        return cfg, tensors, make_provenance(reading, overrides), None, origin


def _load_own(source: SAEFiles, overrides: SAEFacts, latents: Sequence[int] | None, dtype: torch.dtype) -> SAEParts:
    if given := [name for name, value in vars(SAEFacts()).items() if getattr(overrides, name) != value]:
        raise ValueError(f"An SAE of saelab's own must be loaded as it says itself, got {given}; leave them out.")
    described, tensors, origin = read_sae(source.folder)
    with naming(source.folder / CONFIG):
        cfg = SAEConfig.from_dict(described["config"])
        provenance = Provenance.from_dict(described["provenance"]) if described["provenance"] else None
    if latents is not None:
        tensors, cfg, origin = take_latents(dict(tensors), latents), _narrow_config(cfg, len(latents)), None
    held = {name: own(tensor, dtype, latent_major=name == "W_enc") for name, tensor in tensors.items()}
    return cfg, held, provenance, described["training"], origin


def _narrow_config(cfg: SAEConfig, d_sae: int) -> SAEConfig:
    if isinstance(cfg.dictionary, Archetypal):
        raise ValueError("`latents` must be left out for an archetypal dictionary: all its rows are mixed from points.")
    if cfg.pruning is not None:
        raise ValueError("`latents` must be left out for a pruned SAE: which codes it drops depends on all latents.")
    how = narrow(Convention(activation=cfg.activation, encoder=cfg.encoder), d_sae)
    return cfg.adapt(d_sae=d_sae, activation=how.activation, prefixes=None)


@contextmanager
def on_meta() -> Iterator[None]:
    """Context manager in which modules are created without allocating memory, whatever widths a file claims; ValueError
    for widths that overflow.
    """
    try:
        with torch.device("meta"):
            yield
    except (RuntimeError, OverflowError) as error:
        raise ValueError(f"The widths must be those of an SAE, got larger ones than any memory ({error}).") from None


def fill(module: torch.nn.Module, tensors: Mapping[str, Tensor], place: Path) -> None:
    """Assign tensors to a module's parameters and buffers without a copy; ValueError where they do not fit or are not
    finite.
    """
    try:
        module.load_state_dict(tensors, assign=True)
    except RuntimeError as error:
        raise ValueError(f"The weights in {place} must fit its config.json: {error}") from error
    for name, tensor in module.state_dict().items():
        check_weights(name, tensor, place)


def check_weights(name: str, tensor: Tensor, place: Path) -> None:
    """Raise ValueError for NaN or infinite values in a weight tensor.

    A threshold may be infinite, for a latent that is never active; a scalar threshold that training has not set yet is
    NaN.
    """
    if bool(tensor.sum().isfinite()):
        return
    is_threshold = name.rpartition(".")[2] == "threshold"  # of a cross-layer transcoder in `layers`
    wrong = tensor.isnan() if is_threshold else ~tensor.isfinite()
    if bool(wrong.any()) and not (is_threshold and tensor.ndim == 0):
        where = wrong.nonzero()[0].tolist()
        raise ValueError(
            f"The weights in {place} must be finite, {int(wrong.sum())} of {tensor.numel()} in {name} are NaN or "
            f"infinite, the first at {where}. Training had failed, or the file was edited; take an earlier one."
        )

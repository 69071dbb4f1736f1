"""Loading an SAE of any supported format from a local path, the Hugging Face Hub or a release name; each tensor that is
needed is copied once.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from saelab.sae.archetypes import Archetypal
from saelab.sae.checkpoint import CONFIG, check_config, read_sae
from saelab.sae.config import SAEConfig
from saelab.sae.formats.conventions import Convention, compose, narrow, own, take_latents
from saelab.sae.formats.hub import find_source
from saelab.sae.formats.readers import OWN, find_format, read_foreign
from saelab.sae.formats.readings import Asked, Origin, make_provenance
from saelab.sae.formats.releases import find_release
from saelab.sae.formats.sources import Source
from saelab.sae.formats.writers import keep_origin
from saelab.stores.provenance import Provenance
from saelab.stores.validation import naming


@dataclass(frozen=True, eq=False)
class Loaded:
    """Parts of a loaded SAE: configuration, tensors, provenance, training record and foreign origin."""

    cfg: SAEConfig
    """configuration"""
    tensors: dict[str, Tensor]
    """state dict"""
    provenance: Provenance | None
    """provenance of the activations it was trained on, where known"""
    training: dict[str, Any] | None
    """training record, of an SAE that saelab wrote"""
    origin: Origin | None
    """what is kept of another library's file, to write it back"""
    place: Path
    """path that it was loaded from"""
    check: Callable[[], None] = lambda: None
    """checks, after everything else, that the configuration file is unchanged since it was written"""


def locate(source: str | Path, name: str | None, revision: str | None, asked: Asked) -> tuple[Source, Asked]:
    """Folder or file of an SAE, downloaded if necessary, and the facts known about it: what the caller gave, else what
    its release entry gives.

    Args:
        source: local path, Hub id `owner/name`, or name of a release.
        name: sub-folder or file in it, or the release's SAE id; None for the source itself.
        revision: git revision on the Hub; None is the default branch.
        asked: facts given by the caller; these override the release's.
    """
    release = None if Path(source).expanduser().exists() else find_release(str(source), name)
    if release is None:
        return find_source(source, name, revision), asked
    said = {field.name: getattr(asked, field.name) for field in fields(Asked)}
    known = {key: getattr(release.facts, key) if value is None else value for key, value in said.items()}
    return find_source(release.repo, release.path, revision), Asked(**known)


def load(source: Source, asked: Asked, format: str | None, latents: Sequence[int] | None, dtype: torch.dtype) -> Loaded:
    """Parts of the SAE in a folder or file, of whatever format.

    Args:
        source: the folder or file.
        asked: facts that the caller gave; these override the file's.
        format: name of the format, needed only where a folder holds several; None detects it.
        latents: indices of the latents to load, in that order; None is all.
        dtype: dtype of the weights.

    Raises:
        ValueError: where the files are no SAE, do not fit their configuration, or leave out a fact that the caller did
            not give.
    """
    format = find_format(source, format)
    if format == OWN:
        return _load_own(source, asked, latents, dtype)
    with naming(source.place):
        reading = read_foreign(source, format, asked)
        composed = compose(reading.parts, reading.how, latents, dtype)
        origin = keep_origin(reading, composed.changed) if latents is None else None
        provenance = make_provenance(reading, asked)
    return Loaded(composed.cfg, composed.tensors, provenance, None, origin, source.place)


def _load_own(source: Source, asked: Asked, latents: Sequence[int] | None, dtype: torch.dtype) -> Loaded:
    if asked != Asked():
        given = [field.name for field in fields(Asked) if getattr(asked, field.name) is not None]
        raise ValueError(f"An SAE of saelab's own must be loaded as it says itself, got {given}; leave them out.")
    described, tensors, origin = read_sae(source.folder)
    with naming(source.folder / CONFIG):
        cfg = SAEConfig.from_dict(described["config"])
        provenance = Provenance.from_dict(described["provenance"]) if described["provenance"] else None
    if latents is not None:
        tensors, cfg, origin = take_latents(dict(tensors), latents), _narrow_config(cfg, len(latents)), None
    held = {name: own(tensor, dtype, latent_major=name == "W_enc") for name, tensor in tensors.items()}
    return Loaded(
        cfg, held, provenance, described["training"], origin, source.place, partial(check_config, source.folder)
    )


def _narrow_config(cfg: SAEConfig, d_sae: int) -> SAEConfig:
    if isinstance(cfg.dictionary, Archetypal):
        raise ValueError("`latents` must be left out for an archetypal dictionary: all its rows are mixed from points.")
    how = narrow(Convention(activation=cfg.activation, encoder=cfg.encoder), d_sae)
    return replace(cfg, d_sae=d_sae, activation=how.activation, prefixes=None)


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
    wrong = tensor.isnan() if name == "threshold" else ~tensor.isfinite()
    if bool(wrong.any()) and not (name == "threshold" and tensor.ndim == 0):
        where = wrong.nonzero()[0].tolist()
        raise ValueError(
            f"The weights in {place} must be finite, {int(wrong.sum())} of {tensor.numel()} in {name} are NaN or "
            f"infinite, the first at {where}. Training had failed, or the file was edited; take an earlier one."
        )

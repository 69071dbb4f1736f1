"""Writing an SAE in another library's format: bit for bit as it was read, or converted where the format can
express it.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from saelab.sae.coder import Coder
from saelab.sae.formats import dictionary_learning, saelens_writing, sparsify
from saelab.sae.formats.conventions import compose
from saelab.sae.formats.readings import Origin, Reading, dtype_name
from saelab.sae.normaliser import PER_TOKEN
from saelab.stores.files import replace_folder
from saelab.stores.provenance import Provenance

Named = Mapping[str, Tensor]


@dataclass(frozen=True)
class Writer:
    """Functions of one format: `describe` gives the configuration, `find_parts` the weights, `write` writes the
    files.
    """

    describe: Callable[[Coder, Provenance | None], dict[str, Any]]
    find_parts: Callable[[Coder], dict[str, Tensor]]
    write: Callable[[Path, dict[str, Any], Named, Named], None]
    last: str
    """the file by which the format is recognised; written last"""
    find_extras: Callable[[Coder], dict[str, Tensor]] = lambda coder: {}


WRITERS = {
    "saelens": Writer(
        saelens_writing.describe, saelens_writing.find_parts, saelens_writing.write, saelens_writing.CONFIG
    ),
    "sparsify": Writer(sparsify.describe, sparsify.find_parts, sparsify.write, sparsify.CONFIG),
    "dictionary_learning": Writer(
        dictionary_learning.describe,
        dictionary_learning.find_parts,
        dictionary_learning.write,
        dictionary_learning.CONFIG,
        dictionary_learning.find_extras,
    ),
}


def write_foreign(
    folder: Path, coder: Coder, provenance: Provenance | None, origin: Origin | None, format: str
) -> None:
    """Write an SAE into a folder in another library's format.

    One that was read from that format and is unchanged is written as it was. Otherwise a linear normaliser is folded
    into the weights.

    Args:
        folder: folder to write to; an SAE of that format in it is replaced.
        coder: the SAE.
        provenance: provenance of its activations, for formats that record it.
        origin: what was kept when it was read from another library's format; None otherwise.
        format: "saelens", "sparsify" or "dictionary_learning".

    Raises:
        ValueError: with the reason, where the format cannot express the SAE.
    """
    if format not in WRITERS:
        raise ValueError(f"`format` must be 'saelab' or one of {list(WRITERS)}, got '{format}'.")
    writer = WRITERS[format]
    if origin is not None and origin.format == format and (parts := restore(origin, coder)) is not None:
        extras = {name: tensor for name, tensor in origin.kept.items() if name not in parts}
        files = origin.settings, parts, extras
    else:
        _require_threshold(coder)
        folded = coder if coder.cfg.normaliser in PER_TOKEN else coder.fold()
        files = writer.describe(folded, provenance), writer.find_parts(folded), writer.find_extras(folded)
    with replace_folder(folder, last=writer.last, stale=()) as temp:
        writer.write(temp, *files)


def _require_threshold(coder: Coder) -> None:
    if coder.cfg.activation.threshold == "running" and (coder.threshold is None or bool(coder.threshold.isnan())):
        raise ValueError(
            f"{coder.cfg.activation} must have its inference threshold to be written, got none; train the SAE first."
        )


def keep_origin(reading: Reading, changed: frozenset[str]) -> Origin:
    """Origin of a reading, so that the SAE can be written back; tensors are kept only for formats that can be
    written.
    """
    writes = reading.format in WRITERS
    kept = {name: reading.parts[name] for name in changed} | dict(reading.extras) if writes else {}
    dtypes = {name: dtype_name(part.dtype) for name, part in reading.parts.items()}
    return Origin(reading.format, reading.how, reading.settings, dtypes, kept)


@torch.no_grad()
def restore(origin: Origin, coder: Coder) -> dict[str, Tensor] | None:
    """The tensors that were read, from those kept and the SAE's own; None where the SAE has changed since."""
    own = coder.state_dict()
    parts = {}
    for name, dtype in origin.dtypes.items():
        part = origin.kept.get(name, own.get(name))
        if part is None:
            return None
        parts[name] = part if name in origin.kept else part.cpu().to(getattr(torch, dtype))
    try:
        again = compose(parts, origin.how, dtype=coder.dtype)
    except ValueError:
        return None
    same = replace(again.cfg, aux=coder.cfg.aux, init=coder.cfg.init) == coder.cfg and _same(again.tensors, own)
    return parts if same else None


def _same(again: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> bool:
    """Whether two sets of tensors are equal up to rounding differences of summation order."""
    return set(again) == set(own) and all(
        again[name].shape == own[name].shape
        and torch.allclose(again[name].float(), own[name].cpu().float(), rtol=1e-6, atol=1e-8)
        for name in again
    )

"""Registry of the formats of SAE files: detecting, reading and writing them.

An SAE is written bit for bit as it was read, or converted where the format can express it.
"""

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from saelab.sae.formats import (
    circuit_tracer,
    dictionary_learning,
    gemma_scope,
    openai,
    openmoss,
    overcomplete,
    saelens,
    sparsify,
)
from saelab.sae.formats.conventions import compose
from saelab.sae.formats.origin import Origin, ParsedSAE, SAEFacts, dtype_name
from saelab.sae.formats.sources import SAEFiles
from saelab.sae.module import SAEModule
from saelab.sae.normalizer import PER_TOKEN
from saelab.stores.files import replace_folder
from saelab.stores.manifest import Provenance

OWN = "saelab"
Named = Mapping[str, Tensor]


@dataclass(frozen=True)
class FormatReader:
    """Functions of one format: `recognize` tests whether a source has the format, `read` reads it."""

    recognize: Callable[[SAEFiles], bool]
    read: Callable[[SAEFiles, SAEFacts], ParsedSAE]
    files: tuple[str, ...]
    """files to download from a folder on the Hub"""


READERS = {
    "saelens": FormatReader(saelens.recognize, saelens.read, (saelens.CONFIG, saelens.WEIGHTS, saelens.SCALER)),
    "sparsify": FormatReader(sparsify.recognize, sparsify.read, (sparsify.CONFIG, sparsify.WEIGHTS)),
    "dictionary_learning": FormatReader(
        dictionary_learning.recognize,
        dictionary_learning.read,
        (dictionary_learning.CONFIG, dictionary_learning.WEIGHTS),
    ),
    "gemma_scope": FormatReader(gemma_scope.recognize_first, gemma_scope.read_first, (gemma_scope.ARCHIVE,)),
    "gemma_scope_2": FormatReader(
        gemma_scope.recognize_second, gemma_scope.read_second, (gemma_scope.CONFIG, gemma_scope.WEIGHTS)
    ),
    "llama_scope": FormatReader(
        openmoss.recognize_llama_scope, openmoss.read_llama_scope, (openmoss.HYPERPARAMETERS, openmoss.FINAL)
    ),
    "openmoss": FormatReader(
        openmoss.recognize,
        openmoss.read,
        (openmoss.CONFIG, openmoss.WEIGHTS, openmoss.PICKLED, openmoss.FINAL, openmoss.LANGUAGE_MODEL),
    ),
    "openai": FormatReader(openai.recognize_openai, openai.read_openai, ()),
    "qwen_scope": FormatReader(openai.recognize_qwen_scope, openai.read_qwen_scope, ()),
    "circuit_tracer": FormatReader(
        circuit_tracer.recognize_transcoder, circuit_tracer.read_transcoder, (circuit_tracer.CONFIG,)
    ),
    "overcomplete": FormatReader(
        overcomplete.recognize, overcomplete.read, (overcomplete.CONFIG, overcomplete.WEIGHTS)
    ),
}
FORMATS = (OWN, *READERS)
CROSS_LAYER, CIRCUIT_TRACER = "cross_layer_transcoder", "circuit_tracer"
"""formats of cross-layer transcoders: saelab's own, by its kind, and circuit-tracer's"""


def is_own(source: SAEFiles) -> bool:
    """Whether the files are an SAE that saelab wrote."""
    return source.file is None and source.has("config.json") and source.json("config.json").get("kind") == "sae"


def is_cross_layer(source: SAEFiles) -> bool:
    """Whether a folder holds a cross-layer transcoder, of saelab or in circuit-tracer's files."""
    return is_own_cross_layer(source) or circuit_tracer.recognize(source.folder)


def is_own_cross_layer(source: SAEFiles) -> bool:
    """Whether the files are a cross-layer transcoder that saelab wrote."""
    return source.has("config.json") and source.json("config.json").get("kind") == CROSS_LAYER


def require_room(folder: Path, format: str) -> None:
    """Raise ValueError where a folder holds an SAE of another format, or a cross-layer transcoder: with a second one,
    neither could be detected.
    """
    if not folder.is_dir():
        return
    source, others = SAEFiles.open(folder), []
    known = {OWN: is_own} | {name: reader.recognize for name, reader in READERS.items()}
    known |= {CROSS_LAYER: is_own_cross_layer, CIRCUIT_TRACER: lambda source: circuit_tracer.recognize(source.folder)}
    for name, recognize in known.items():
        with suppress(ValueError):  # damaged files may be written over
            others += [name] * (name != format and recognize(source))
    if others:
        raise ValueError(
            f"A folder must hold one SAE, got {folder} for {format}, which holds one of {' and '.join(others)}. Choose "
            "another folder."
        )


def find_format(source: SAEFiles, named: str | None = None) -> str:
    """Name of a source's format; ValueError where it has none, or several and none was named."""
    if named is not None and named not in FORMATS:
        raise ValueError(f"`format` must be one of {list(FORMATS)}, got '{named}'.")
    found = [name for name, reader in READERS.items() if reader.recognize(source)]
    if is_own(source):
        found.insert(0, OWN)
    if named is not None:
        if named not in found:
            raise ValueError(f"`format` must be what is there, {found or 'none that is known'}, got '{named}'.")
        return named
    if len(found) > 1:
        raise ValueError(
            f"An SAE's folder must hold one SAE, got those of {' and '.join(found)} in {source.place}; "
            f"pass format='{found[0]}' or another of them."
        )
    if not found:
        held = sorted(path.name for path in source.folder.iterdir())[:5]
        if source.file is None and is_cross_layer(source):
            raise ValueError(
                f"An SAE must read one hook point, got a cross-layer transcoder in {source.place}; load it by "
                "sl.sae.CLT.from_pretrained and take a layer: clt.layer(number)."
            )
        if not held:
            raise FileNotFoundError(f"An SAE's folder must hold its files, got {source.place}, which is empty.")
        raise ValueError(
            f"An SAE must be of a known format ({', '.join(FORMATS)}), got {source.place}, which holds {held}. Name "
            "the sub-folder or the file as the second argument."
        )
    return found[0]


def read_foreign(source: SAEFiles, format: str, overrides: SAEFacts) -> ParsedSAE:
    """Weights and convention of a source in another library's format."""
    return READERS[format].read(source, overrides)


@dataclass(frozen=True)
class FormatWriter:
    """Functions of one format: `describe` gives the configuration, `find_parts` the weights, `write` writes the
    files.
    """

    describe: Callable[[SAEModule, Provenance | None], dict[str, Any]]
    find_parts: Callable[[SAEModule], dict[str, Tensor]]
    write: Callable[[Path, dict[str, Any], Named, Named], None]
    last: str
    """the file by which the format is recognized; written last"""
    find_extras: Callable[[SAEModule], dict[str, Tensor]] = lambda coder: {}
    check_folder: Callable[[Path, dict[str, Any], Named], None] = lambda folder, settings, parts: None
    """raises ValueError where the SAE does not go with others of the format in the folder"""


WRITERS = {
    "saelens": FormatWriter(saelens.describe, saelens.find_parts, saelens.write, saelens.CONFIG),
    "sparsify": FormatWriter(sparsify.describe, sparsify.find_parts, sparsify.write, sparsify.CONFIG),
    "dictionary_learning": FormatWriter(
        dictionary_learning.describe,
        dictionary_learning.find_parts,
        dictionary_learning.write,
        dictionary_learning.CONFIG,
        dictionary_learning.find_extras,
    ),
    "circuit_tracer": FormatWriter(
        circuit_tracer.describe_transcoder,
        circuit_tracer.find_transcoder_parts,
        circuit_tracer.write_transcoder,
        circuit_tracer.CONFIG,
        check_folder=circuit_tracer.check_layers,
    ),
    "overcomplete": FormatWriter(
        overcomplete.describe,
        overcomplete.find_parts,
        overcomplete.write,
        overcomplete.CONFIG,
        overcomplete.find_extras,
    ),
}


def write_foreign(
    folder: Path, coder: SAEModule, provenance: Provenance | None, origin: Origin | None, format: str
) -> None:
    """Write an SAE into a folder in another library's format.

    One that was read from that format and is unchanged is written as it was. Otherwise a linear normalizer is folded
    into the weights.

    Args:
        folder: folder to write to; an SAE of that format in it is replaced, of circuit_tracer one of the same layer.
        coder: the SAE.
        provenance: provenance of its activations, for formats that record it.
        origin: what was kept when it was read from another library's format; None otherwise.
        format: name of one in `WRITERS`.

    Raises:
        ValueError: with the reason, where the format cannot express the SAE.
    """
    if format not in WRITERS:
        raise ValueError(f"`format` must be 'saelab' or one of {list(WRITERS)}, got '{format}'.")
    writer = WRITERS[format]
    if coder.cfg.sources is not None:
        raise ValueError(
            f"{format} has no crosscoders, got one of {[source.name for source in coder.cfg.sources]}; write its "
            "sources one by one: sae.source(name)."
        )
    if coder.cfg.pruning is not None:
        raise ValueError(f"An SAE in {format}'s format must keep all codes, got one with pruning; write that without.")
    if origin is not None and origin.format == format and (parts := restore(origin, coder)) is not None:
        extras = {name: tensor for name, tensor in origin.kept.items() if name not in parts}
        files = origin.settings, parts, extras
    else:
        _require_threshold(coder)
        folded = coder if coder.cfg.normalizer in PER_TOKEN else coder.fold()
        files = writer.describe(folded, provenance), writer.find_parts(folded), writer.find_extras(folded)
    writer.check_folder(folder, *files[:2])
    with replace_folder(folder, last=writer.last, stale=()) as temp:
        writer.write(temp, *files)


def _require_threshold(coder: SAEModule) -> None:
    if coder.cfg.activation.threshold == "running" and (coder.threshold is None or bool(coder.threshold.isnan())):
        raise ValueError(
            f"{coder.cfg.activation} must have its inference threshold to be written, got none; train the SAE first."
        )


def keep_origin(reading: ParsedSAE, changed: frozenset[str]) -> Origin:
    """Origin of a reading, so that the SAE can be written back; tensors are kept only for formats that can be
    written.
    """
    writes = reading.format in WRITERS
    kept = {name: reading.parts[name] for name in changed} | dict(reading.extras) if writes else {}
    dtypes = {name: dtype_name(part.dtype) for name, part in reading.parts.items()}
    return Origin(reading.format, reading.how, reading.settings, dtypes, kept)


@torch.no_grad()
def restore(origin: Origin, coder: SAEModule) -> dict[str, Tensor] | None:
    """The tensors that were read, from those kept and the SAE's own; None where the SAE has changed since."""
    own = coder.state_dict()
    parts = {}
    for name, dtype in origin.dtypes.items():
        part = origin.kept.get(name, own.get(name))
        if part is None:
            return None
        parts[name] = part if name in origin.kept else part.cpu().to(getattr(torch, dtype))
    try:
        cfg, tensors, _ = compose(parts, origin.how, dtype=coder.dtype)
    except ValueError:
        return None
    same = replace(cfg, objective=coder.cfg.objective, init=coder.cfg.init) == coder.cfg and _same(tensors, own)
    return parts if same else None


def _same(again: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> bool:
    """Whether two sets of tensors are equal up to rounding differences of summation order."""
    return set(again) == set(own) and all(
        again[name].shape == own[name].shape
        and torch.allclose(again[name].float(), own[name].cpu().float(), rtol=1e-6, atol=1e-8)
        for name in again
    )

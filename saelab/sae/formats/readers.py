"""Registry of formats that can be read, and detection of the format of a folder or file."""

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from saelab.sae.formats import dictionary_learning, gemma_scope, openmoss, pickles, saelens, sparsify
from saelab.sae.formats.readings import Asked, Reading
from saelab.sae.formats.sources import Source

OWN = "saelab"


@dataclass(frozen=True)
class Reader:
    """Functions of one format: `recognise` tests whether a source has the format, `read` reads it."""

    recognise: Callable[[Source], bool]
    read: Callable[[Source, Asked], Reading]
    files: tuple[str, ...]
    """files to download from a folder on the Hub"""


READERS = {
    "saelens": Reader(saelens.recognise, saelens.read, (saelens.CONFIG, saelens.WEIGHTS, saelens.SCALER)),
    "sparsify": Reader(sparsify.recognise, sparsify.read, (sparsify.CONFIG, sparsify.WEIGHTS)),
    "dictionary_learning": Reader(
        dictionary_learning.recognise,
        dictionary_learning.read,
        (dictionary_learning.CONFIG, dictionary_learning.WEIGHTS),
    ),
    "gemma_scope": Reader(gemma_scope.recognise_first, gemma_scope.read_first, (gemma_scope.ARCHIVE,)),
    "gemma_scope_2": Reader(
        gemma_scope.recognise_second, gemma_scope.read_second, (gemma_scope.CONFIG, gemma_scope.WEIGHTS)
    ),
    "llama_scope": Reader(
        openmoss.recognise_llama_scope, openmoss.read_llama_scope, (openmoss.HYPERPARAMETERS, openmoss.FINAL)
    ),
    "openmoss": Reader(
        openmoss.recognise,
        openmoss.read,
        (openmoss.CONFIG, openmoss.WEIGHTS, openmoss.PICKLED, openmoss.FINAL, openmoss.LANGUAGE_MODEL),
    ),
    "openai": Reader(pickles.recognise_openai, pickles.read_openai, ()),
    "qwen_scope": Reader(pickles.recognise_qwen_scope, pickles.read_qwen_scope, ()),
}
FORMATS = (OWN, *READERS)


def is_own(source: Source) -> bool:
    """Whether the files are an SAE that saelab wrote."""
    return source.file is None and source.has("config.json") and source.json("config.json").get("kind") == "sae"


def require_room(folder: Path, format: str) -> None:
    """Raise ValueError where a folder holds an SAE of another format: with a second one, neither could be detected."""
    if not folder.is_dir():
        return
    source, others = Source.open(folder), []
    for name, recognise in [(OWN, is_own), *((name, reader.recognise) for name, reader in READERS.items())]:
        with suppress(ValueError):  # damaged files may be written over
            others += [name] * (name != format and recognise(source))
    if others:
        raise ValueError(
            f"A folder must hold one SAE, got {folder} for {format}, which holds one of {' and '.join(others)}. Choose "
            "another folder."
        )


def find_format(source: Source, named: str | None = None) -> str:
    """Name of a source's format; ValueError where it has none, or several and none was named."""
    if named is not None and named not in FORMATS:
        raise ValueError(f"`format` must be one of {list(FORMATS)}, got '{named}'.")
    found = [name for name, reader in READERS.items() if reader.recognise(source)]
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
        if not held:
            raise FileNotFoundError(f"An SAE's folder must hold its files, got {source.place}, which is empty.")
        raise ValueError(
            f"An SAE must be of a known format ({', '.join(FORMATS)}), got {source.place}, which holds {held}. Name "
            "the sub-folder or the file as the second argument."
        )
    return found[0]


def read_foreign(source: Source, format: str, asked: Asked) -> Reading:
    """Weights and convention of a source in another library's format."""
    return READERS[format].read(source, asked)

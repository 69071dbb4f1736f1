"""Downloading a single SAE from a Hugging Face Hub repository: only its own files, not those of other SAEs there."""

from pathlib import Path, PurePosixPath

from saelab.sae.formats.readers import READERS
from saelab.sae.formats.sources import Source, inside
from saelab.sae.formats.sparsify import RUN
from saelab.sae.formats.tensorfiles import ARCHIVES, PICKLES

OWN_FILES = ("config.json", "model.safetensors", "origin.safetensors")
WEIGHT_SUFFIXES = (*PICKLES, *ARCHIVES, ".safetensors")


def find_source(source: str | Path, name: str | None = None, revision: str | None = None) -> Source:
    """Local folder or file of an SAE, downloaded from the Hub repository 'owner/name' where `source` is no local path;
    `name` is a sub-folder or file.

    Raises:
        FileNotFoundError: for what is neither a path nor a repository, and where the Hub cannot be reached.
    """
    path = Path(source).expanduser()
    if path.exists():
        return Source.open(path, name)
    parts = str(source).split("/")
    if len(parts) != 2 or not all(parts) or str(source).startswith((".", "~")):
        raise FileNotFoundError(
            f"An SAE must be a folder, or a release or Hub id 'owner/name', got '{source}', which is neither; check "
            "the path."
        )
    return Source.open(_fetch(str(source), list_files(name), revision), name)


def list_files(name: str | None) -> list[str]:
    """Paths of all files that an SAE may consist of: those of a sub-folder, or a single file and the configuration next
    to it.
    """
    known = dict.fromkeys([*OWN_FILES, *(file for reader in READERS.values() for file in reader.files)])
    place = PurePosixPath(inside(name)) if name is not None else PurePosixPath()
    if place.suffix in WEIGHT_SUFFIXES:
        return [str(place), str(place.parent / "config.json")]
    above = [str(place.parent / RUN)] if name is not None else []
    return [*(str(place / file) for file in known), *above]


def _fetch(repo: str, files: list[str], revision: str | None) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(repo, revision=revision, allow_patterns=files))
    except OSError as error:  # base class of huggingface_hub's errors
        raise FileNotFoundError(
            f"'{repo}' is no local folder and could not be fetched from the Hub ({type(error).__name__}); "
            "check the name and the connection."
        ) from error

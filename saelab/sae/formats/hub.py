"""Downloading a single SAE from the Hugging Face Hub, by repository and path or by release name.

Only the SAE's own files are downloaded. `releases.json` lists releases as SAELens does, facts only, an entry per
family: regular expressions of release names and of SAE ids; the repository and the path in it; the model, the hook
point and whatever else the files leave out. `{...}` is replaced by a named group of either expression.
"""

import re
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path, PurePosixPath
from typing import Any

from saelab.sae.activation_functions import Activation, make_activation
from saelab.sae.formats.origin import SAEFacts
from saelab.sae.formats.registry import READERS
from saelab.sae.formats.sources import ARCHIVES, PICKLES, SAEFiles, inside
from saelab.sae.formats.sparsify import RUN
from saelab.stores.validation import read_fields, read_json

OWN_FILES = ("config.json", "model.safetensors", "origin.safetensors")
WEIGHT_SUFFIXES = (*PICKLES, *ARCHIVES, ".safetensors")
TABLE = Path(__file__).parent / "releases.json"


def find_source(source: str | Path, name: str | None = None, revision: str | None = None) -> SAEFiles:
    """Local folder or file of an SAE, downloaded from the Hub repository 'owner/name' where `source` is no local path;
    `name` is a sub-folder or file.

    Raises:
        FileNotFoundError: for what is neither a path nor a repository, and where the Hub cannot be reached.
    """
    path = Path(source).expanduser()
    if path.exists():
        return SAEFiles.open(path, name)
    parts = str(source).split("/")
    if len(parts) != 2 or not all(parts) or str(source).startswith((".", "~")):
        raise FileNotFoundError(
            f"An SAE must be a folder, or a release or Hub id 'owner/name', got '{source}', which is neither; check "
            "the path."
        )
    return SAEFiles.open(_fetch(str(source), list_files(name), revision), name)


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


@dataclass(frozen=True, kw_only=True)
class Release:
    """One family of published SAEs; string fields may refer to named groups of `name` and `id`, and to `{id}`
    itself.
    """

    name: str
    """regular expression of the release's name"""
    repo: str
    """Hub repository 'owner/name'"""
    id: str = ".+"
    """regular expression of an SAE's id in it"""
    path: str = "{id}"
    """sub-folder or file in the repository"""
    model: str | None = None
    """name of the model; None leaves this and the following to the files"""
    hook_point: str | None = None
    hook_point_out: str | None = None
    weight_processing: str | None = None
    activation: dict[str, Any] | None = None
    """name and settings of the activation function, where the files lack them"""
    scale: float | None = None
    """factor by which activations are multiplied before the encoder"""


_added: list[Release] = []


def register_release(
    name: str,
    repo: str,
    *,
    path: str = "{id}",
    id: str = ".+",
    model: str | None = None,
    hook_point: str | None = None,
    hook_point_out: str | None = None,
    weight_processing: str | None = None,
    activation: Activation | None = None,
    scale: float | None = None,
) -> None:
    """Register a release for `SAE.from_pretrained(name, id)`; it overrides a listed one of the same name.

    Args:
        name: regular expression of the release's name.
        repo: Hub repository 'owner/name'.
        path: sub-folder or file in the repository; like all strings below it may contain `{id}` and named groups of
            `name` and `id`.
        id: regular expression of an SAE's id.
        model: name of the model; None leaves this and the following to the files.
        hook_point: hook point that the SAE reads.
        hook_point_out: hook point that a transcoder writes.
        weight_processing: processing of the model's weights in training, "none" or "folded".
        activation: activation function with its k.
        scale: factor by which activations are multiplied before the encoder.

    Raises:
        ValueError: for an invalid regular expression, and for a path that leaves the repository.

    >>> register_release("mine", "me/saes", id=r"layer_(?P<layer>\\d+)", model="gpt2",
    ...     hook_point="blocks.{layer}.hook_resid_post")
    >>> find_release("mine", "layer_3")[2].hook_point
    'blocks.3.hook_resid_post'
    """
    for pattern in (name, id):
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(f"`name` and `id` must be regular expressions, got '{pattern}' ({error}).") from None
    inside(path)
    _added.insert(
        0,
        Release(
            name=name,
            repo=repo,
            id=id,
            path=path,
            model=model,
            hook_point=hook_point,
            hook_point_out=hook_point_out,
            weight_processing=weight_processing,
            activation=activation.to_dict() if activation else None,
            scale=scale,
        ),
    )


@cache
def _read_table() -> tuple[Release, ...]:
    return tuple(read_fields(Release, entry) for entry in read_json(TABLE))


def find_release(name: str, id: str | None) -> tuple[str, str, SAEFacts] | None:
    """Repository and path of an SAE of a release, and the facts known about it; None where no release has that name,
    ValueError for an id that the release lacks.
    """
    found = [(entry, match) for entry in (*_added, *_read_table()) if (match := re.fullmatch(entry.name, name))]
    if not found:
        return None
    for entry, match in found:
        if id is not None and (of_id := re.fullmatch(entry.id, id)):
            groups = {**match.groupdict(), **of_id.groupdict(), "id": id}
            return _fill(entry, {key: value for key, value in groups.items() if value is not None})
    patterns = [entry.id for entry, _ in found][:5]
    raise ValueError(f"`name` must be an id of release '{name}', got {id!r}; ids look like {patterns}.")


def _fill(entry: Release, groups: dict[str, str]) -> tuple[str, str, SAEFacts]:
    texts = {key: value.format(**groups) for key, value in asdict(entry).items() if isinstance(value, str)}
    activation = None
    if entry.activation is not None:
        settings = {k: v.format(**groups) if isinstance(v, str) else v for k, v in entry.activation.items()}
        numbers: dict[str, Any] = {k: int(v) if k == "k" else v for k, v in settings.items()}
        activation = make_activation(**numbers)
    facts = SAEFacts(
        model=texts.get("model"),
        hook_point=texts.get("hook_point"),
        hook_point_out=texts.get("hook_point_out"),
        weight_processing=texts.get("weight_processing"),
        activation=activation,
        scale=entry.scale,
    )
    return texts["repo"], inside(texts["path"]), facts

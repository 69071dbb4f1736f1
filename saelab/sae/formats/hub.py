"""Finding and downloading a single SAE: a local path, a repository on the Hugging Face Hub, or a release by its name.

Only the SAE's own files are downloaded. Releases are those of `releases.json`, and families that were added here:
regular expressions of release names and of SAE ids, the repository and the path in it, the model, the hook point and
whatever else the files leave out. `{...}` is replaced by a named group of either expression.
"""

import glob
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from saelab.sae.activation_functions import Activation, make_activation
from saelab.sae.formats.circuit_tracer import CONFIG as CIRCUIT_TRACER_CONFIG
from saelab.sae.formats.origin import SAEFacts
from saelab.sae.formats.registry import READERS
from saelab.sae.formats.releases import find_near, find_published, pick, read_table, suggest
from saelab.sae.formats.sources import ARCHIVES, INDEX, PICKLES, SAEFiles, find_whole, is_weights
from saelab.sae.formats.sparsify import RUN
from saelab.stores.files import inside
from saelab.stores.hub import HubAccess, describe_failure

OWN_FILES = ("config.json", "model.safetensors", "origin.safetensors")
ANY_HUB = HubAccess()
WEIGHT_SUFFIXES = (*PICKLES, *ARCHIVES, ".safetensors")


def find_source(source: str | Path, name: str | None = None, hub: HubAccess = ANY_HUB) -> SAEFiles:
    """Local folder or file of an SAE, downloaded from the Hub repository 'owner/name' where `source` is no local path;
    `name` is a sub-folder or file.

    Raises:
        FileNotFoundError: for what is neither a path nor a repository, and where the Hub cannot be reached or has none.
    """
    path = Path(source).expanduser()
    if path.exists() or is_weights(path):
        return SAEFiles.open(path, name)
    parts = str(source).split("/")
    if len(parts) != 2 or not all(parts) or str(source).startswith((".", "~")):
        hint = suggest(find_near(str(source), read_table())) if len(parts) == 1 else ""
        raise FileNotFoundError(
            f"An SAE must be a folder, or a release or Hub id 'owner/name', got '{source}', which is neither. "
            f"{hint or 'Check the path.'}"
        )
    repo, wanted = str(source), list_files(name)
    folder = _fetch(repo, wanted, hub)
    if not any(is_weights(folder / file) for file in wanted):
        raise FileNotFoundError(_describe_absence(repo, name, folder, hub))
    return SAEFiles.open(folder, name)


def list_files(name: str | None) -> list[str]:
    """Paths of all files that an SAE may consist of: those of a sub-folder, or a single file and the configuration next
    to it. In the place of a file of weights there may be several.
    """
    place = PurePosixPath(find_whole(Path(inside(name))).as_posix()) if name is not None else PurePosixPath()
    if place.suffix in WEIGHT_SUFFIXES:
        return [str(place), *(str(place.parent / name) for name in ("config.json", CIRCUIT_TRACER_CONFIG))]
    above = [str(place.parent / RUN)] if name is not None else []
    return [*(str(place / file) for file in _list_known()), *above]


def _list_known() -> list[str]:
    """Names of the files that SAEs of all formats consist of."""
    return list(dict.fromkeys([*OWN_FILES, *(file for reader in READERS.values() for file in reader.files)]))


def _fetch(repo: str, files: list[str], hub: HubAccess) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(
                repo,
                revision=hub.revision,
                token=hub.token,
                cache_dir=hub.cache_dir,
                local_files_only=hub.local_files_only,
                allow_patterns=[pattern for file in files for pattern in _match(PurePosixPath(file))],
            )
        )
    except OSError as error:  # base class of huggingface_hub's errors
        near = find_near(repo, {entry["repo"] for entry in read_table().values()})
        raise FileNotFoundError(describe_failure(repo, hub, error, suggest(near))) from error


def _match(file: PurePosixPath) -> list[str]:
    """Patterns of a file, and of the index and the parts that may be in its place."""
    if file.suffix not in WEIGHT_SUFFIXES:
        return [glob.escape(str(file))]
    parts = f"{glob.escape(str(file.with_suffix('')))}-?????-of-?????{file.suffix}"
    return [glob.escape(str(file)), glob.escape(f"{file}{INDEX}"), parts]


def _describe_absence(repo: str, name: str | None, folder: Path, hub: HubAccess) -> str:
    """What is said where a repository holds no SAE at a path: where it holds some."""
    places = _find_places(_list_repository(repo, folder, hub))
    near = find_near(name, places) if name is not None else ()
    hint = suggest(near) or suggest(places[:5], "It has SAEs at") or "Check the name."
    at = "at its top" if name is None else f"at '{name}'"
    return f"'{repo}' must hold an SAE {at}, got none of the files of one there. {hint}"


def _list_repository(repo: str, folder: Path, hub: HubAccess) -> Iterable[str]:
    """Paths of the files of a repository; of those in the cache where the Hub is not to be asked or does not answer."""
    from huggingface_hub import HfApi

    if not hub.local_files_only:
        try:
            return HfApi(token=hub.token).list_repo_files(repo, revision=hub.revision)
        except Exception:
            pass
    return [path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*")) if path.is_file()]


def _find_places(files: Iterable[str]) -> list[str]:
    """Folders and files that may be SAEs: what `name` may be."""
    known = {file for file in _list_known() if not file.endswith(".json")}
    found: dict[str, None] = {}
    for file in files:
        path = PurePosixPath(file)
        if path.suffix in WEIGHT_SUFFIXES:
            held = next((own for own in known if file == own or file.endswith(f"/{own}")), None)
            found[file if held is None else file[: -len(held)].rstrip("/")] = None
    return [place for place in found if place]


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


def find_release(name: str, id: str | None) -> tuple[str, str, SAEFacts] | None:
    """Repository and path of an SAE of a release, and the facts known about it; None where no release has that name.

    Raises:
        ValueError: for an id that the release lacks, with near ones, and for an SAE that saelab cannot read.
    """
    found = [(entry, match) for entry in _added if (match := re.fullmatch(entry.name, name))]
    for entry, match in found:
        if id is not None and (of_id := re.fullmatch(entry.id, id)):
            groups = {**match.groupdict(), **of_id.groupdict(), "id": id}
            return _fill(entry, {key: value for key, value in groups.items() if value is not None})
    if found and name not in read_table():
        raise ValueError(
            f"`name` must be an id of release '{name}', got {id!r}. Its ids are as `register_release` said."
        )
    published = find_published(name, id)
    if published is None:
        return None
    if published.unread is not None:
        raise ValueError(
            f"An SAE must be of a kind that saelab has, got '{id}' of release '{name}', which is {published.unread}."
        )
    return published.repo, inside(published.path), _find_facts(name, str(id))


def _find_facts(release: str, id: str) -> SAEFacts:
    """What the files of a published SAE leave out."""
    entry = read_table()[release]
    i = entry["id"].index(id)
    given = {name: pick(entry, name, i) for name in (*entry.get("missing", ()), "weight_processing")}
    activation = entry.get("activation")
    return SAEFacts(
        **given,
        activation=make_activation(**activation) if activation is not None else None,
        likely_scale=pick(entry, "scale", i),
    )


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

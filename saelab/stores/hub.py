"""Repositories on the Hugging Face Hub: how they are asked, stores uploaded to them, and stores read from them by part.

A store is a folder of a dataset repository, as SAEs are folders of model repositories. What is uploaded names no local
folder. Its manifest is uploaded last, so that nobody opens half a store, and files that are there already are not sent
again. Of a store that is opened the manifest comes at once, and of its other files the parts that are read.
"""

import hashlib
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath
from typing import Any

from saelab.stores.files import FILE_NAME, find_inside, inside, write_atomic
from saelab.stores.manifest import FeatureManifest, Manifest
from saelab.stores.partial_files import PartialFile, serve_folder

KIND = "dataset"
"""of the repositories that hold stores"""
CARD, MANIFEST, LABELS = "README.md", "manifest.json", "labels.json.gz"
PER_COMMIT = 1 << 31
"""bytes of one commit; an upload that was cut off repeats one at most"""
BY_PART = ".safetensors"


@dataclass(frozen=True, kw_only=True)
class HubAccess:
    """How to ask the Hub, as Hugging Face's own functions name it."""

    revision: str | None = None
    """branch, tag or commit; None is the default branch"""
    token: str | bool | None = field(default=None, repr=False)
    """access token; None uses the stored login"""
    cache_dir: str | Path | None = None
    """folder of the cache; None is Hugging Face's"""
    local_files_only: bool = False
    """whether to look in the cache alone"""


@dataclass(frozen=True)
class Upload:
    """Where something goes on the Hub, as Hugging Face's own functions name it."""

    repo_id: str
    """'owner/name'"""
    path_in_repo: str | None = None
    """folder in the repository; None is its top"""
    revision: str | None = None
    """branch, made if need be; None is the default branch"""
    commit_message: str = "Upload SAE"
    create_pr: bool = False
    """whether to open a pull request instead"""
    private: bool = False
    """whether a new repository is private"""
    token: str | bool | None = field(default=None, repr=False)
    """access token; None uses the stored login"""

    def begin(self, kind: str | None = None) -> Any:
        """Hugging Face's client, with the repository and the branch made where they are missing."""
        from huggingface_hub import HfApi

        api: Any = HfApi(token=self.token)
        of = {} if kind is None else {"repo_type": kind}
        api.create_repo(self.repo_id, private=self.private, exist_ok=True, **of)
        if self.revision is not None and not self.revision.startswith("refs/"):
            api.create_branch(self.repo_id, branch=self.revision, exist_ok=True, **of)
        return api


def describe_failure(repo: str, hub: HubAccess, error: Exception, hint: str = "") -> str:
    """What is said where a repository could not be read.

    Args:
        repo: 'owner/name'.
        hub: how it was asked.
        error: what Hugging Face's client raised.
        hint: what to say where there is no such repository.
    """
    from huggingface_hub import constants
    from huggingface_hub.errors import (
        GatedRepoError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    if isinstance(error, GatedRepoError):
        return (
            f"'{repo}' must be open to you, and its authors grant access at https://huggingface.co/{repo}. Ask there, "
            "then pass token= or log in with `hf auth login`."
        )
    if isinstance(error, RepositoryNotFoundError):
        hint = hint or "Check the name; for a private one pass token= or log in with `hf auth login`."
        return f"'{repo}' must be a local folder or a repository on the Hub, got none that is open to you. {hint}"
    if isinstance(error, RevisionNotFoundError):
        return f"`revision` must be a branch, tag or commit of '{repo}', got '{hub.revision}', which it does not have."
    offline = hub.local_files_only or constants.HF_HUB_OFFLINE
    if isinstance(error, LocalEntryNotFoundError | OfflineModeIsEnabled) and offline:
        why = "local_files_only" if hub.local_files_only else "HF_HUB_OFFLINE"
        at = f" at revision '{hub.revision}'" if hub.revision else ""
        return (
            f"'{repo}'{at} must be in the cache {hub.cache_dir or constants.HF_HUB_CACHE}, as {why} forbids to fetch "
            "it, got none there. Load it once with a connection."
        )
    return (
        f"'{repo}' is no local folder and could not be fetched from the Hub ({type(error).__name__}); check the name "
        "and the connection."
    )


# ---- reading
def is_repository(source: str | Path) -> bool:
    """Whether a source that is no local path can be a repository, 'owner/name'."""
    parts = str(source).split("/")
    return (
        not Path(source).expanduser().exists()
        and len(parts) == 2
        and all(parts)
        and not str(source).startswith((".", "~"))
    )


def find_folder(source: str | Path, name: str | None, patterns: Sequence[str], hub: HubAccess) -> Path:
    """The local folder of a store: that of a path, or one whose files are fetched from the Hub when they are read.

    Args:
        source: local folder, or repository 'owner/name'.
        name: folder in it; None is its top.
        patterns: names of the files that such a store may have.
        hub: how to ask.

    Raises:
        FileNotFoundError: for what is neither, and where the Hub has no store there or cannot be reached.
        ValueError: for a name that leads out of the repository.
    """
    if not is_repository(source):
        return Path(source) if name is None else Path(source) / inside(name)
    try:
        return _open_repository(str(source), inside(name) if name is not None else "", patterns, hub)
    except FileNotFoundError:
        raise
    except (OSError, ConnectionError) as error:
        raise FileNotFoundError(describe_failure(str(source), hub, error)) from error


def _open_repository(repo: str, path: str, patterns: Sequence[str], hub: HubAccess) -> Path:
    from huggingface_hub import HfApi, HfFileSystem, cached_assets_path, constants

    given = {} if hub.cache_dir is None else {"assets_dir": Path(hub.cache_dir)}
    home = cached_assets_path("saelab", namespace=repo, subfolder="commits", **given)
    asked = f"{hub.revision or ''}:{path}" if path else hub.revision or ""
    note = home / f"{hashlib.sha256(asked.encode()).hexdigest()[:16]}.commit"
    if hub.local_files_only or constants.HF_HUB_OFFLINE:
        return _open_cached(repo, path, hub, home, note)
    api = HfApi(token=hub.token)
    commit = str(api.repo_info(repo, repo_type=KIND, revision=hub.revision).sha)
    folder = home / commit / path
    files = {name: entry.size for name, entry in _list_files(api, repo, path, commit).items()}
    if MANIFEST not in files and LABELS not in files:
        at = f"at '{path}'" if path else "at its top"
        raise FileNotFoundError(f"'{repo}' must hold a store {at}, got no {MANIFEST} there. Check the name.")
    system = HfFileSystem(token=hub.token)
    opened, lock = dict[str, Any](), threading.Lock()

    def read(file: str, start: int, stop: int) -> bytes:
        with lock:
            if file not in opened:
                place = PurePosixPath(f"datasets/{repo}@{commit}", path, file)
                opened[file] = system.open(str(place), "rb", cache_type="none")
            opened[file].seek(start)
            return bytes(opened[file].read(stop - start))

    serve_folder(folder, read)
    for file, size in files.items():
        if not FILE_NAME.fullmatch(file) or not any(
            fnmatch(file, pattern) for pattern in (*patterns, MANIFEST, LABELS)
        ):
            continue
        if file.endswith(BY_PART):
            PartialFile.make(folder / file, size)
        elif not (folder / file).is_file():
            write_atomic(folder / file, read(file, 0, size))
    write_atomic(note, commit.encode())
    return folder


def _open_cached(repo: str, path: str, hub: HubAccess, home: Path, note: Path) -> Path:
    from huggingface_hub.errors import LocalEntryNotFoundError

    commit = note.read_text() if note.is_file() else hub.revision or ""
    folder = home / commit / path
    if not commit or not any((folder / file).is_file() for file in (MANIFEST, LABELS)):
        raise FileNotFoundError(describe_failure(repo, hub, LocalEntryNotFoundError("")))
    return folder


# ---- uploading
def push_store(folder: Path, manifest: Manifest, to: Upload, load: str) -> str:
    """Upload a store's own files; returns the address of the commit. Labels and answers in the folder stay.

    Args:
        folder: the store's folder.
        manifest: its manifest, which is uploaded without local paths.
        to: repository, folder and branch.
        load: line of Python that opens the store, for the card; `{where}` stands for repository and folder.
    """
    names = [shard.file for shard in manifest.shards]
    names += [*manifest.files] if isinstance(manifest, FeatureManifest) else []
    with tempfile.TemporaryDirectory() as temp:
        manifest.published().save(temp)
        files = {name: find_inside(folder, name) for name in names} | {MANIFEST: Path(temp, MANIFEST)}
        return push_files(files, to, patterns=manifest.files_of_kind, card=write_card(manifest.published(), to, load))


def write_card(manifest: Manifest, to: Upload, load: str) -> str:
    """Markdown of a store's card, with the Hub's header: what it holds and how to open it."""
    origin = manifest.provenance
    place = to.repo_id if to.path_in_repo is None else f"{to.repo_id}/{to.path_in_repo}"
    where = f'"{to.repo_id}"' + (f', "{to.path_in_repo}"' if to.path_in_repo else "")
    told = {
        "holds": f"{manifest.kind} of {manifest.n_tokens:,} {manifest.counted}",
        "SAE": getattr(manifest, "source", ""),
        "model": f"{origin.get('model')} (weight processing: {origin.get('weight_processing')})",
        "hook point": origin.get("hook_point"),
        "text": origin.get("text"),
    }
    rows = [f"| {name} | {str(value).replace('|', chr(92) + '|')} |" for name, value in told.items() if value]
    head = ["---", "library_name: saelab", 'tags: ["sparse-autoencoder", "interpretability", "saelab"]', "---"]
    code = ["```python", "import saelab as sl", "", load.format(where=where), "```", ""]
    more = "What is read of it is fetched, and nothing else."
    return "\n".join([*head, "", f"# {place}", "", "| | |", "|---|---|", *rows, "", *code, more, ""])


def push_files(files: Mapping[str, Path], to: Upload, *, patterns: Sequence[str] = (), card: str = "") -> str:
    """Upload the files of a store, the manifest last; returns the address of the last commit, or of the pull request.

    Large stores take several commits. Files that the repository has already are not sent again, so that an upload that
    was cut off goes on when it is repeated.

    Args:
        files: path of each file by its name in the store.
        to: repository, folder and branch.
        patterns: names of a store's files; others of these that the folder has are removed.
        card: text of the card, where the folder has none; empty for none.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    place = PurePosixPath(inside(to.path_in_repo) if to.path_in_repo is not None else "")
    api = to.begin(KIND)
    there = _list_files(api, to.repo_id, "" if to.path_in_repo is None else str(place), to.revision)
    new = {name: file for name, file in files.items() if name.endswith(BY_PART) and not _is_same(file, there.get(name))}
    last: list[Any] = [CommitOperationAdd(str(place / name), file) for name, file in files.items() if name not in new]
    last = [one for one in last if not one.path_in_repo.endswith(BY_PART)]
    if card and CARD not in there:
        last.append(CommitOperationAdd(str(place / CARD), card.encode()))
    stale = [name for name in there if name not in files and any(fnmatch(name, pattern) for pattern in patterns)]
    last += [CommitOperationDelete(str(place / name)) for name in stale]
    commits = [[CommitOperationAdd(str(place / name), new[name]) for name in names] for names in _group(new)] + [last]
    if len(commits) > 1 and MANIFEST in there and MANIFEST in files:
        commits[0].append(CommitOperationDelete(str(place / MANIFEST)))  # it is of the files that are being replaced
    revision, address = to.revision, ""
    for i, operations in enumerate(commits, 1):
        part = f" ({i} of {len(commits)})" if len(commits) > 1 else ""
        done = api.create_commit(
            to.repo_id,
            operations,
            commit_message=to.commit_message + part,
            repo_type=KIND,
            revision=revision,
            create_pr=to.create_pr and i == 1,
        )
        revision = done.pr_revision or revision
        address = done.pr_url or (address if to.create_pr else done.commit_url)
    return str(address)


def _list_files(api: Any, repo: str, path: str, revision: str | None) -> dict[str, Any]:
    """The files in a folder of a repository by name; none where there is no such folder."""
    from huggingface_hub.errors import EntryNotFoundError

    try:
        found = list(api.list_repo_tree(repo, path or None, repo_type=KIND, revision=revision))
    except EntryNotFoundError:
        return {}
    return {PurePosixPath(entry.path).name: entry for entry in found if hasattr(entry, "size")}


def _is_same(file: Path, entry: Any) -> bool:
    lfs = getattr(entry, "lfs", None)
    if lfs is None or lfs.size != file.stat().st_size:
        return False
    found = hashlib.sha256()
    with open(file, "rb") as data:
        while chunk := data.read(1 << 20):
            found.update(chunk)
    return bool(found.hexdigest() == lfs.sha256)


def _group(files: Mapping[str, Path]) -> Iterator[list[str]]:
    """Names of the files of each commit."""
    part, size = list[str](), 0
    for name, file in files.items():
        if part and size + file.stat().st_size > PER_COMMIT:
            yield part
            part, size = [], 0
        part, size = [*part, name], size + file.stat().st_size
    if part:
        yield part

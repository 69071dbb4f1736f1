"""Safe names: checks of file names read from files, and text without local paths, passwords or control codes."""

import os
import re
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit

RESERVED = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", re.IGNORECASE)
FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,199}")
CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069]")
"""Characters that move a terminal's cursor or reverse the direction of its text"""


def require_file_name(name: str) -> str:
    """The same name, if it is that of a file and no path; ValueError for a path and for names that Windows reserves.

    >>> require_file_name("shard-00000.safetensors")
    'shard-00000.safetensors'
    """
    if not FILE_NAME.fullmatch(name) or RESERVED.fullmatch(name) or name.endswith("."):
        raise ValueError(
            f"A file must be named by letters, digits, '.', '_' and '-' alone, got {name[:80]!r}, which may lead out "
            "of the folder. Was the manifest edited?"
        )
    return name


def as_file_name(text: str) -> str:
    """A file or folder name made from a text: characters other than letters, digits, '.', '_' and '-' become '-'.

    >>> as_file_name("../blocks.0.hook_resid_post")
    '-blocks.0.hook_resid_post'
    """
    name = re.sub(r"[^A-Za-z0-9_.-]+", "-", text).lstrip(".")[:150].rstrip(".") or "unnamed"
    return f"_{name}" if RESERVED.fullmatch(name) else name


def find_inside(folder: str | Path, name: str) -> Path:
    """Path of a named file in a folder.

    Links of the Hugging Face cache, from a snapshot to its repository's blobs, are followed.

    Raises:
        ValueError: the name is a path, or the file is a link that leads out of the folder.
    """
    path = Path(folder) / require_file_name(name)
    if path.is_symlink():
        place, home = path.resolve(), Path(folder).resolve()
        blobs = [above.parent / "blobs" for above in home.parents if above.name == "snapshots"]
        if place.parent != home and not any(place.is_relative_to(folder) for folder in blobs):
            raise ValueError(
                f"{path} must be a file of its folder, got a link to {place}. Copy that file here if it is meant."
            )
    return path


def shareable(name: str) -> str:
    """A name without private parts: a local path is cut to its last part.

    A Hugging Face id is kept, and so is a URL, without its password.

    >>> shareable("/home/ada/models/tiny"), shareable("EleutherAI/pythia-70m")
    ('tiny', 'EleutherAI/pythia-70m')
    """
    if "://" in name:
        return hide_password(name) if not name.startswith("file:") else name.rstrip("/").rpartition("/")[2]
    local = name.startswith(("/", "~", ".", "\\")) or re.match(r"[A-Za-z]:[\\/]", name) or "\\" in name
    deep = name.count("/") > 1 or (name.count("/") == 1 and Path(name).exists())
    return re.split(r"[\\/]", name.rstrip("\\/"))[-1] if local or deep else name


def relative_place(name: str, folder: str | Path) -> str:
    """The path of a local folder relative to another, so that it reveals no home directory.

    Only its last part is returned where the two share no more than the root or a home directory, and a name that is no
    local folder is returned as it is.

    >>> relative_place("/work/ada/sae", "/work/ada/store")
    '../sae'
    """
    if not name or not (Path(name).is_absolute() or name.startswith("~") or Path(name).exists()):
        return name
    there, here = Path(name).expanduser().absolute(), Path(folder).expanduser().absolute()
    try:
        shared = Path(os.path.commonpath([there, here]))
    except ValueError:  # on two drives
        return there.name
    if len(shared.parts) <= 2 or shared in (Path.home(), Path.home().parent):
        return there.name
    return Path(os.path.relpath(there, here)).as_posix()


def shareable_words(text: str) -> str:
    """A text in which every absolute path is cut to its last part.

    >>> shareable_words("SAE(TopK(k=2), at blocks.0 of /home/ada/tiny)")
    'SAE(TopK(k=2), at blocks.0 of tiny)'
    """
    return re.sub(r"(?<![\w/:.])(?:~|[A-Za-z]:)?(?:[\\/][^\s,;()\\/]+)+", lambda path: shareable(path[0]), text)


def hide_password(url: str) -> str:
    """A URL whose user name and password, if any, are replaced by `***`.

    >>> hide_password("https://ada:secret@host:1234/v1")
    'https://***@host:1234/v1'
    """
    parts = urlsplit(url)
    _, at, host = parts.netloc.rpartition("@")
    return urlunsplit(parts._replace(netloc=f"***@{host}")) if at else url


def find_secrets(url: str) -> list[str]:
    """The secrets in a URL: `name:password` and the password alone; empty without one.

    >>> find_secrets("https://ada:secret@host/v1")
    ['ada:secret', 'secret']
    """
    secret, at, _ = urlsplit(url).netloc.rpartition("@")
    return [part for part in (secret, secret.partition(":")[2]) if part] if at else []


def printable(text: str) -> str:
    """A text that is safe to print: control characters and marks of text direction are replaced by their escape codes.

    >>> printable("a\x1b[2J" + chr(10) + "b")
    'a\\\\x1b[2J\\nb'
    """
    return CONTROL.sub(lambda found: found[0] if found[0] in "\n\t" else _code(found[0]), text)


def _code(character: str) -> str:
    return ascii(character)[1:-1]

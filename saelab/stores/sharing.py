"""What texts tell others: names, paths and addresses without what is private in them.

A file that others get names no local folder, user, machine, password or key. What a folder needs for its owner's own
use, such as where its SAE lies, is cut at the door: when it is uploaded or exported.
"""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlsplit, urlunsplit

ADDRESS = re.compile(r"[a-z][a-z0-9+.-]*://[^\s,;()\"'<>]+", re.IGNORECASE)
PRIVATE_HOSTS = (".local", ".lan", ".internal", ".home", ".localdomain", ".intranet", ".corp")
MACHINES = ("http", "https", "ws", "wss", "ftp", "ftps", "sftp", "ssh", "git", "tcp", "grpc")
"""schemes whose addresses name a machine; that of others is a bucket, or `datasets` in hf://datasets/owner/name"""
PRIVATE_ADDRESS = re.compile(r"(127|10|192\.168|169\.254|172\.(1[6-9]|2\d|3[01]))\.[\d.]+|[0-9a-f:]*:[0-9a-f:]*")
PATH = re.compile(r"~|file:|\.{1,2}/|[A-Za-z]:[\\/]|\\\\|/[^/\n]+/")
"""how a text begins that is a path as a whole, blanks included"""
SHORTEST_KEY = 8
"""letters; shorter values in a query are settings, such as the version of a protocol"""
LOCAL = re.compile(
    r"(?<![\w/.<])(?:~|[A-Za-z]:)?(?:[\\/](?:home|Users)[\\/][^,;()'\"<>\n\\/]+(?=[\\/]))?(?:[\\/][^\s,;()\\/]+)+"
)
"""an absolute path; the name of a home directory may have blanks, and names behind it end at one"""


def shareable(name: str) -> str:
    """A name without private parts: a local path is cut to its last part.

    A Hugging Face id is kept, and so is a URL, without its password, without its query, in which keys are sent, and
    without the name of a machine that is not on the internet.

    >>> shareable("/home/ada/models/tiny"), shareable("EleutherAI/pythia-70m")
    ('tiny', 'EleutherAI/pythia-70m')
    >>> shareable("http://ada:secret@gpu-7:8000/v1")
    'http://local/v1'
    >>> shareable("hf://datasets/roneneldan/TinyStories/train.txt"), shareable("https://host.org/text?key=secret")
    ('hf://datasets/roneneldan/TinyStories/train.txt', 'https://host.org/text')
    """
    if "://" in name:
        return _shareable_address(name) if not name.startswith("file:") else name.rstrip("/").rpartition("/")[2]
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


def tell_apart(a: str | Path, b: str | Path) -> tuple[str, str]:
    """Names of two folders that tell them apart and nothing of where they are: their last parts, with the folder above
    where these are equal and it lies in the home directory or deeper.

    >>> tell_apart("/work/runs/a/store", "/work/runs/b/store"), tell_apart("/home/ada/store", "/home/bob/store")
    (('a/store', 'b/store'), ('store', 'store (2)'))
    """
    there = [Path(name).resolve() for name in (a, b)]
    names = [path.name for path in there]
    if names[0] != names[1] or there[0] == there[1]:
        return names[0], names[1]
    above = [path.parent for path in there]
    homes = (Path("/home"), Path("/Users"), Path.home().parent)
    if above[0].name == above[1].name or any(len(path.parts) <= 2 or path.parent in homes for path in above):
        return names[0], f"{names[1]} (2)"
    return f"{above[0].name}/{names[0]}", f"{above[1].name}/{names[1]}"


def shareable_words(text: str) -> str:
    """A text in which every absolute path is cut to its last part, and every URL as `shareable` does.

    >>> shareable_words("SAE(TopK(k=2), at blocks.0 of /home/ada/tiny)")
    'SAE(TopK(k=2), at blocks.0 of tiny)'
    """
    text = ADDRESS.sub(lambda url: shareable(url[0]), text)
    return LOCAL.sub(lambda path: shareable(path[0]), text)


def _shareable_address(url: str) -> str:
    """A URL without a name, password or query, and without a host that only a local network knows."""
    parts = urlsplit(url)._replace(query="", fragment="")
    host = (parts.hostname or "").lower() if parts.scheme in MACHINES else ""
    if host and ("." not in host or host.endswith(PRIVATE_HOSTS) or PRIVATE_ADDRESS.match(host)):
        return urlunsplit(parts._replace(netloc="local"))
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))


def shareable_parts(value: Any) -> Any:
    """A value of JSON in whose texts every path is cut to its last part.

    >>> shareable_parts({"sae": "../runs/sae", "of": ["harvest of /home/ada/tiny", 3]})
    {'sae': 'sae', 'of': ['harvest of tiny', 3]}
    """
    if isinstance(value, Mapping):
        return {name: shareable_parts(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [shareable_parts(one) for one in value]
    if not isinstance(value, str):
        return value
    return shareable(value) if PATH.match(value) else shareable_words(value)


def hide_password(url: str) -> str:
    """A URL whose user name and password, and whose query, if any, are replaced by `***`.

    >>> hide_password("https://ada:secret@host:1234/v1"), hide_password("https://host/v1?key=secret")
    ('https://***@host:1234/v1', 'https://host/v1?***')
    """
    parts = urlsplit(url)
    _, at, host = parts.netloc.rpartition("@")
    netloc = f"***@{host}" if at else parts.netloc
    shown = parts._replace(netloc=netloc, query="***" if parts.query else "", fragment="")
    return urlunsplit(shown) if at or parts.query else url


def find_secrets(url: str) -> list[str]:
    """The secrets in a URL: `name:password`, the password alone, and what is long in its query; empty without one.

    >>> find_secrets("https://ada:secret@host/v1?key=0123456789")
    ['ada:secret', 'secret', '0123456789']
    """
    parts = urlsplit(url)
    secret, at, _ = parts.netloc.rpartition("@")
    found = [part for part in (secret, secret.partition(":")[2]) if part] if at else []
    return found + [value for _, value in parse_qsl(parts.query) if len(value) >= SHORTEST_KEY]

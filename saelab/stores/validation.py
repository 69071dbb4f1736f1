"""Validated reading of JSON files: configurations and manifests.

Types, ranges and unknown keys are checked by pydantic, from the annotations of a dataclass or TypedDict.
"""

import json
import re
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import MISSING, fields, is_dataclass
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Any, NoReturn, TypeVar, get_args, get_origin, get_type_hints

T = TypeVar("T")

MAX_DEPTH = 64
MAX_DIGITS = 19
"""largest number of digits of an integer: no size, seed or count needs more than 64 bits"""
SEAL = "crc32"
SHOWN = 80
_SEAL_TEXT = re.compile(rb',?\s*"crc32":\s*"[0-9a-f]{8}"(?=\s*\}\s*$)')


def parse_json(text: bytes | str, *, constants: bool = False) -> Any:
    """The value of a JSON text.

    Args:
        text: JSON, in UTF-8 where it is bytes.
        constants: whether NaN and Infinity, which are no JSON, are allowed.

    Raises:
        ValueError: the text is not JSON, has a key twice, nests deeper than 64 levels, or has an integer beyond 64
            bits.

    >>> parse_json('{"k": 16}')
    {'k': 16}
    """
    if isinstance(text, bytes):
        text = text.decode()
    try:
        found = json.loads(
            text.removeprefix("\ufeff"),
            object_pairs_hook=_refuse_doubles,
            parse_int=_read_int,
            parse_constant=float if constants else _refuse_constant,
        )
    except RecursionError:
        raise ValueError(f"it is nested deeper than {MAX_DEPTH} levels") from None
    if text.count("{") + text.count("[") > MAX_DEPTH:
        _check_depth(found)
    return found


def read_json(path: str | Path, *, constants: bool = False) -> Any:
    """The value of a JSON file. Its own checksum (`seal`), if any, is not compared: see `read_sealed`.

    Args:
        path: the file.
        constants: whether NaN and Infinity, which are no JSON, are allowed.

    Raises:
        FileNotFoundError: the file is missing.
        ValueError: the file is not JSON; see `parse_json`.
    """
    return _parse(path, _read_bytes(path), constants)


def read_sealed(path: str | Path) -> tuple[object, Callable[[], None]]:
    """The value of a JSON file, and a function that compares the file's text with the checksum in it.

    Call the function after the value has been validated, so that errors name the wrong value; it raises ValueError
    where the file was damaged or edited. The file is read once, as another writer may replace it.

    Raises:
        FileNotFoundError: the file is missing.
        ValueError: the file is not JSON; see `parse_json`.
    """
    text = _read_bytes(path)
    held = _parse(path, text, constants=False)
    return held, lambda: _check_seal(path, text, held)


def _parse(path: str | Path, text: bytes, constants: bool) -> Any:
    try:
        return parse_json(text, constants=constants)
    except ValueError as error:
        cause = str(error) or type(error).__name__
        raise ValueError(f"{path} must hold JSON, got something else ({cause}). Was it edited or cut off?") from None


def _read_bytes(path: str | Path) -> bytes:
    try:
        return Path(path).read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        raise FileNotFoundError(f"`path` must be an existing JSON file, got {path}. Check the folder's name.") from None
    except IsADirectoryError:
        raise ValueError(f"{path} must be a JSON file, got a folder. Check the name.") from None


def _refuse_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"key {next(key for key in keys if keys.count(key) > 1)[:SHOWN]!r} comes twice")
    return found


def _read_int(digits: str) -> int:
    if len(digits.lstrip("-")) > MAX_DIGITS:
        raise ValueError(f"the number {digits[:20]}... is beyond 64 bits")
    return int(digits)


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON; NaN and infinities are written as null")


def _check_depth(found: object) -> None:
    level = [found]
    for _ in range(MAX_DEPTH + 1):
        level = [
            item
            for held in level
            if isinstance(held, dict | list)
            for item in (held.values() if isinstance(held, dict) else held)
            if isinstance(item, dict | list)
        ]
        if not level:
            return
    raise ValueError(f"it is nested deeper than {MAX_DEPTH} levels")


def seal(text: str) -> bytes:
    """The text of a JSON object with its checksum added as the last key; white space does not count.

    >>> seal('{"k": 1}')
    b'{"k": 1, "crc32": "1cabb40e"}'
    """
    body, gap, end = text.rstrip()[:-1].rstrip(), " ", "}"
    if "\n" in body:
        gap, end = "\n  ", "\n}"
    comma = "" if body == "{" else ","
    return f'{body}{comma}{gap}"{SEAL}": "{_sum_up(text.encode())}"{end}'.encode()


def _check_seal(path: str | Path, text: bytes, held: object) -> None:
    if not isinstance(held, dict) or SEAL not in held:
        return
    if not _SEAL_TEXT.search(text) or _sum_up(_SEAL_TEXT.sub(b"", text)) != held[SEAL]:
        raise ValueError(
            f"{path} must hold what was written, but it has another checksum: it was damaged or edited. If you changed "
            f'it on purpose, remove its line "{SEAL}".'
        )


def _sum_up(text: bytes) -> str:
    return f"{zlib.crc32(b''.join(text.split())):08x}"


@contextmanager
def naming(path: str | Path) -> Iterator[None]:
    """Context in which a ValueError about the contents of a file names the file."""
    try:
        yield
    except ValueError as error:
        if str(path) in str(error):
            raise
        raise ValueError(f"{path}: {error}") from None


def read_fields(cls: type[T], plain: object, *, extra: bool = False) -> T:
    """An instance of the dataclass `cls` from a JSON object, validated against its annotations.

    Args:
        plain: the JSON object; values may also be instances of dataclasses already.
        extra: whether unknown keys are ignored.

    Raises:
        ValueError: a value has another type than annotated or is not finite, a key is missing, or a key is unknown;
            similar keys are suggested.
    """
    plain = require_object(plain, cls.__name__)
    assert is_dataclass(cls)
    known = [field.name for field in fields(cls) if field.init]
    if not extra:
        refuse_unknown(plain, known, cls.__name__)
    given = {name: plain[name] for name in known if name in plain}
    return cls(**_validate(_make_shape(cls), given, cls.__name__))


def refuse_unknown(plain: Mapping[str, object], known: list[str], name: str) -> None:
    """Raise ValueError for a key that is not known, suggesting similar ones.

    Args:
        plain: the JSON object.
        known: keys that it may have.
        name: what the error message calls the object.
    """
    for key in plain:
        if key not in known:
            near = get_close_matches(key, known, n=5) or known[:5]
            raise ValueError(f"{name} has no key '{key[:SHOWN]}'. Did you mean one of {near}?")


def require_object(plain: object, name: str) -> dict[str, Any]:
    """The same value, if it is a JSON object; else ValueError, in which it is called `name`."""
    if not isinstance(plain, dict):
        raise ValueError(f"{name} must be a JSON object, got {_show(plain)}. Was it edited?")
    return plain


def check_settings(shape: type, plain: object, name: str) -> Any:
    """A JSON object whose known keys are validated; others are kept. For configurations of other libraries.

    Args:
        shape: TypedDict with the known keys.
        plain: the JSON object; a key with the value null counts as missing.
        name: what error messages call the object.

    Raises:
        ValueError: a value has another type than annotated, or a required key is missing.
    """
    plain = require_object(plain, name)
    hints = _hints(shape)
    given = {key: value for key, value in plain.items() if key in hints and value is not None}
    return plain | _validate(shape, given, name)


def _validate(shape: type, given: dict[str, Any], name: str) -> dict[str, Any]:
    from pydantic import ValidationError

    hints = _hints(shape)
    given = {key: _as_tuple(hints[key], value) for key, value in given.items()}
    try:
        return dict(_adapter(shape).validate_python(given))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join(str(part) for part in first["loc"][:3])
        if first["type"] == "missing":
            raise ValueError(f"{name} must have every field, got none for `{key}`. Was it edited?") from None
        rule = first["msg"].replace("Input should be", "must be").replace("Field required", "must be there")
        raise ValueError(
            f"{name}: `{key}` {rule}, got {_show(first['input'])}. Was it edited, or written by another version?"
        ) from None


def _as_tuple(hint: object, value: object) -> object:
    """A JSON list as a tuple, where the field is one, and so the lists in it."""
    wants = next((part for part in (hint, *get_args(hint)) if get_origin(part) is tuple), None)
    if wants is None or not isinstance(value, list):
        return value
    parts = get_args(wants)
    each = [parts[0]] * len(value) if parts[1:] == (...,) else [*parts, *[Any] * (len(value) - len(parts))]
    return tuple(_as_tuple(part, one) for part, one in zip(each, value, strict=False))


def _show(value: object) -> str:
    shown = repr(value)
    return shown if len(shown) <= SHOWN else f"{shown[:SHOWN]}..."


@cache
def _hints(shape: type) -> dict[str, Any]:
    return get_type_hints(shape)


@cache
def _make_shape(cls: type) -> type:
    """The fields of a dataclass as a TypedDict."""
    from typing_extensions import NotRequired, TypedDict

    assert is_dataclass(cls)
    try:
        hints = get_type_hints(cls)
    except NameError:  # a user's class, whose annotations have names of its own scope
        hints = {field.name: Any for field in fields(cls)}
    needed = {field.name: field.default is MISSING and field.default_factory is MISSING for field in fields(cls)}
    shape = {name: hints[name] if must else NotRequired[hints[name]] for name, must in needed.items()}
    # a type checker knows no TypedDict that is made at run time
    return TypedDict(cls.__name__, shape)  # type: ignore[operator, no-any-return]


@cache
def _adapter(shape: type) -> Any:
    from pydantic import ConfigDict, TypeAdapter, with_config

    settings = ConfigDict(strict=True, allow_inf_nan=False, arbitrary_types_allowed=True)
    return TypeAdapter(with_config(settings)(shape))

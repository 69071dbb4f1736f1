"""Files of documents: text, JSON, JSON lines, CSV and parquet, compressed or not, on the disk or on the Hub.

They are read a row at a time; anything ambiguous raises an error.
"""

import bz2
import csv
import gzip
import io
import json
import lzma
import os
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TextIO


def _open_zstd(path: Path, mode: str) -> Any:
    """A file compressed by Zstandard, opened for reading."""
    try:
        from pyarrow import CompressedInputStream
    except ImportError as error:
        raise ImportError("Reading .zst needs pyarrow, which is not installed: pip install pyarrow") from error
    return CompressedInputStream(str(path), "zstd")


OPENERS: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open, ".zst": _open_zstd}
KINDS = {".jsonl": "JSONL", ".ndjson": "JSONL", ".json": "JSON", ".csv": ",", ".tsv": "\t", ".parquet": "parquet"}
REFUSED = {
    ".zip": "Unpack it first.",
    ".tar": "Unpack it first.",
    ".arrow": "Give datasets.load_from_disk(folder), or datasets.Dataset.from_file(path).",
    ".pdf": "Convert it to text first.",
    ".docx": "Convert it to text first.",
    ".npy": "Give numpy.load(path).",
    ".xlsx": "Give pandas.read_excel(path).",
}
IDS, MASK = "input_ids", "attention_mask"
"""names of the token ids and of the mask of what is not padding in tokenized data sets"""
UTF_16 = (b"\xff\xfe", b"\xfe\xff")
HUB = re.compile(
    r"hf:/{1,2}(?P<kind>datasets/|spaces/|models/)?(?P<repo>(?!(?:datasets|spaces|models)/)[^/@]+/[^/@]+)(?:@(?P<revision>[^/]+))?/(?P<file>.+)"
)
"""hf://datasets/owner/name@revision/path, as huggingface_hub and pandas have it; a `Path` of it has one slash"""


def find_kind(path: str | os.PathLike[str]) -> tuple[Path, str]:
    """A file of documents, and its kind by the suffix; ValueError for one that cannot be read."""
    found = _require_file(path)
    packed = found.suffix.lower() if found.suffix.lower() in OPENERS else ""
    suffix = Path(found.stem).suffix.lower() if packed else found.suffix.lower()
    if suffix in REFUSED:
        raise ValueError(f"A file of documents must be text, JSON, CSV or parquet, got '{found}'. {REFUSED[suffix]}")
    kind = KINDS.get(suffix, "text")
    if packed and kind == "parquet":
        raise ValueError(f"A parquet file must not be compressed as a whole, got '{found}'. Unpack it first.")
    return found, kind


def open_rows(path: str | os.PathLike[str], separator: str | None, field: str) -> Iterator[tuple[str, Any]]:
    """Iterator over the documents or rows of a file, each with a description of its location for messages."""
    found, kind = find_kind(path)
    if kind == "parquet":
        return read_parquet(found, field)
    if kind == "text":
        return _number(_read_text(found, separator), f"'{found}', document")
    if kind in ("JSON", "JSONL"):
        return _read_json(found) if kind == "JSON" else _read_jsonl(found)
    return _read_table(found, kind, field)


def _number(rows: Iterable[Any], what: str) -> Iterator[tuple[str, Any]]:
    return ((f"{what} {i}", row) for i, row in enumerate(rows))


def _require_file(given: str | os.PathLike[str]) -> Path:
    """The path; FileNotFoundError where it does not exist, ValueError for a folder."""
    name = os.fsdecode(given)
    if name.startswith("hf:/"):
        return _fetch(name)
    shown = name if len(name) <= 60 else name[:57] + "..."
    try:
        path = Path(name).expanduser()
        is_file, is_folder = path.is_file(), path.is_dir()
    except (OSError, ValueError, RuntimeError):  # too long for a path, or no home folder of that name
        path, is_file, is_folder = Path(), False, False
    if is_folder:
        raise ValueError(
            f"`texts` must be a file or hold documents, got the folder '{shown}'. Give one of its files, or "
            "datasets.load_from_disk(folder) where a data set was saved."
        )
    if not is_file:
        remote = " Download it first, or give datasets.load_dataset(...)." if ":/" in name else ""
        raise FileNotFoundError(
            f"`texts` must be an existing file or a list of documents, got '{shown}'. "
            f"Put a single document into a list.{remote}"
        )
    return path


def _fetch(name: str) -> Path:
    """A file of the Hub, downloaded to Hugging Face's cache, which later calls read."""
    match = HUB.fullmatch(name)
    if match is None:
        raise ValueError(
            f"A file on the Hub must be given as hf://datasets/owner/name/path, with @revision behind the name if need "
            f"be, got '{name}'."
        )
    from huggingface_hub import hf_hub_download

    kind = (match["kind"] or "models/")[:-2]
    revision = match["revision"] and match["revision"].replace("%2F", "/")
    try:
        return Path(hf_hub_download(match["repo"], match["file"], repo_type=kind, revision=revision))
    except OSError as error:  # base class of huggingface_hub's errors
        raise FileNotFoundError(
            f"'{name}' could not be fetched from the Hub ({type(error).__name__}); check the name, and the connection."
        ) from error


@contextmanager
def _opened(path: Path) -> Iterator[TextIO]:
    """Context manager with a UTF-8 file opened as text, without a byte order mark; ValueError naming the file for
    anything else.
    """
    opener = OPENERS.get(path.suffix.lower(), open)
    try:
        with opener(path, "rb") as raw:
            if raw.read(2) in UTF_16:
                raise ValueError(f"A text file must be UTF-8, got '{path}', which is UTF-16. Convert it first.")
        with opener(path, "rb") as raw, io.TextIOWrapper(raw, encoding="utf-8-sig") as file:
            yield file
    except UnicodeDecodeError as error:
        raise ValueError(f"A text file must be UTF-8, got '{path}': {error.reason}. Convert it first.") from error
    except (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile) as error:
        raise ValueError(f"A compressed file must be whole, got '{path}': {error}. Copy it again.") from error
    except OSError as error:
        if error.errno is not None:
            raise
        raise ValueError(f"A compressed file must be whole, got '{path}': {error}. Copy it again.") from error


def _lines(path: Path) -> Iterator[str]:
    """Lines, ending in \\n whatever the file's line endings; ValueError for bytes that are no text."""
    with _opened(path) as file:
        for number, line in enumerate(file, start=1):
            if "\0" in line:
                raise ValueError(
                    f"A text file must be UTF-8, got '{path}' with a NUL character in line {number}: is it UTF-16, or "
                    "no text? Convert it first."
                )
            yield line


def _read_text(path: Path, separator: str | None) -> Iterator[str]:
    lines: list[str] = []
    for line in _lines(path):
        if separator is not None and line.strip() != separator:
            lines.append(line)
            continue
        if separator is None:
            lines.append(line)
        yield "".join(lines).strip("\n")
        lines = []
    yield "".join(lines).strip("\n")


def _read_jsonl(path: Path) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(_lines(path), start=1):
        if line.strip():
            yield f"'{path}' line {number}", _parse(line, f"'{path}' line {number}", "Each line of a JSONL file")


def _read_json(path: Path) -> Iterator[tuple[str, Any]]:
    """Rows of a JSON list, or one row per line."""
    with _opened(path) as file:
        start = file.read(1)
        while start.isspace():
            start = file.read(1)
        rest = file.read() if start == "[" else ""
    if start != "[":
        yield from _read_jsonl(path)
        return
    yield from _number(_parse(start + rest, f"'{path}'", "A JSON file of documents"), f"'{path}', row")


def _parse(text: str, where: str, what: str) -> Any:
    try:
        return json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        reason = getattr(error, "msg", "too many brackets inside each other")
        raise ValueError(f"{what} must be one JSON value, got {where}: {reason}.") from error


def _read_table(path: Path, comma: str, field: str) -> Iterator[tuple[str, Any]]:
    """Values of a column in the rows of a table whose first line names the columns."""
    rows = csv.DictReader(_lines(path), delimiter=comma, strict=True)
    try:
        _require_field(field, rows.fieldnames or [], path)
        i = 0
        while (row := _next_row(rows)) is not None:
            yield f"'{path}', row {i}", row[field] if row[field] is not None else ""
            i += 1
    except csv.Error as error:
        raise ValueError(f"A table must be whole, got '{path}': {error}. Write it again.") from error


def _next_row(rows: "csv.DictReader[str]") -> dict[str, Any] | None:
    """A row with values of any length; the csv module's global limit is raised and restored."""
    before = csv.field_size_limit(2**31 - 1)
    try:
        return next(rows, None)
    finally:
        csv.field_size_limit(before)


def _require_field(field: str, names: Iterable[str], path: Path) -> None:
    if field not in names:
        raise ValueError(f"`field` must be a column of '{path}', got {field!r}. {format_columns(field, names)}")


def format_columns(field: str, names: Iterable[str]) -> str:
    """Message that lists similar names and the existing columns for a missing one."""
    names = [str(name) for name in names]
    near = get_close_matches(field.lower(), [name.lower() for name in names], n=3)
    listed = [name for name in names if name.lower() in near]
    hint = f"Did you mean {listed}? " if listed else ""
    ids = f" For ids that are there already give field={IDS!r}." if IDS in names and field != IDS else ""
    return f"{hint}Columns: {names[:5]}. Set `field`.{ids}"


@contextmanager
def opened_parquet(path: Path) -> Iterator[Any]:
    """Context manager with a parquet file; ValueError naming the file where it is damaged."""
    try:
        from pyarrow import ArrowInvalid
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise ImportError("Reading parquet needs pyarrow, which is not installed: pip install pyarrow") from error
    try:
        with ParquetFile(path) as file:
            yield file
    except ArrowInvalid as error:
        raise ValueError(f"A parquet file must be whole, got '{path}': {str(error).splitlines()[0]}") from error


def read_parquet(path: Path, field: str, index: int = 0, size: int = 1) -> Iterator[tuple[str, Any]]:
    """Rows of a parquet file, or of one of several runs of its row groups, each with its location.

    Args:
        path: the file.
        field: the column that is read.
        index: which of the runs.
        size: number of runs.
    """
    with opened_parquet(path) as file:
        names = file.schema_arrow.names
        _require_field(field, names, path)
        columns = [field, *([MASK] if field == IDS and MASK in names else [])]
        start, stop = index * file.num_row_groups // size, (index + 1) * file.num_row_groups // size
        first = sum(file.metadata.row_group(i).num_rows for i in range(start))
        for batch in file.iter_batches(batch_size=1024, row_groups=range(start, stop), columns=columns):
            yield from ((f"'{path}', row {first + i}", row) for i, row in enumerate(batch.to_pylist()))
            first += len(batch)

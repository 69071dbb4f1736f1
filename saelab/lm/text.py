"""Reading documents from lists, files and data sets, one at a time."""

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

_SUFFIXES = {".jsonl": "JSONL", ".ndjson": "JSONL", ".parquet": "parquet"}


def read_documents(
    texts: str | Path | Iterable[Any], *, separator: str | None = "<|endoftext|>", field: str = "text"
) -> Iterator[str]:
    """Documents one by one, in order, never more than a block of them in memory; blank ones are left out.

    `texts` is a path (`.jsonl` and `.parquet` by their suffix, everything else as UTF-8 text whose documents are
    divided by lines equal to `separator`, or are the lines themselves with `separator=None`) or an iterable of strings
    or of rows, such as a Hugging Face data set, streaming or not; `field` names the text in a row. FileNotFoundError
    for a path that is not there, ValueError or TypeError for a row without text.

    >>> from saelab.lm.text import read_documents
    >>> list(read_documents([{"text": "one"}, " ", "two"]))
    ['one', 'two']
    """
    return (document for document in _read(texts, separator, field) if document.strip())


def describe_source(texts: str | Path | Iterable[Any]) -> str:
    """Where the text came from, in a few words, for provenance."""
    if isinstance(texts, str | Path):
        return Path(texts).name
    info = getattr(texts, "info", None)
    if (name := getattr(info, "dataset_name", None)) is not None:
        return f"data set {name}, split {getattr(texts, 'split', None) or 'unknown'}"
    return type(texts).__name__


def _read(texts: str | Path | Iterable[Any], separator: str | None, field: str) -> Iterator[str]:
    if not isinstance(texts, str | Path):
        return (_text_of(row, field, f"item {i}") for i, row in enumerate(texts))
    path = Path(texts).expanduser()
    if not path.is_file():
        raise FileNotFoundError(
            f"`texts` must be an existing file or a list of documents, got '{_shorten(str(texts))}'. "
            "Put a single document into a list."
        )
    kind = _SUFFIXES.get(path.suffix.lower(), "text")
    if kind == "JSONL":
        return _read_jsonl(path, field)
    if kind == "parquet":
        return _read_parquet(path, field)
    return _read_text(path, separator)


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


def _lines(path: Path) -> Iterator[str]:
    """Lines of a UTF-8 file; ValueError naming the file for any other encoding."""
    try:
        with path.open(encoding="utf-8") as file:
            yield from file
    except UnicodeDecodeError as error:
        raise ValueError(f"A text file must be UTF-8, got '{path}': {error.reason}. Convert it first.") from error


def _read_jsonl(path: Path, field: str) -> Iterator[str]:
    for number, line in enumerate(_lines(path), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(
                f"Each line of a JSONL file must be one JSON object, got '{path}' line {number}: {error.msg}."
            ) from error
        yield _text_of(row, field, f"'{path}' line {number}")


def _read_parquet(path: Path, field: str) -> Iterator[str]:
    try:
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise ImportError("Reading parquet needs pyarrow, which is not installed: pip install pyarrow") from error
    with ParquetFile(path) as file:
        names = file.schema_arrow.names
        if field not in names:
            raise ValueError(f"`field` must be a column of '{path}', got '{field}'. Columns: {names[:5]}.")
        for batch in file.iter_batches(batch_size=1024, columns=[field]):
            for i, value in enumerate(batch.column(0).to_pylist()):
                yield _text_of(value, field, f"'{path}', a row near {i}")


def _text_of(row: Any, field: str, where: str) -> str:
    """The text in a row; TypeError or ValueError saying where it is missing."""
    if isinstance(row, Mapping):
        if field not in row:
            raise ValueError(f"Every row must have the field '{field}', got {list(row)[:5]} at {where}. Set `field`.")
        row = row[field]
    if not isinstance(row, str):
        raise TypeError(f"A document must be a string, got {type(row).__name__} at {where}.")
    return row


def _shorten(text: str, width: int = 60) -> str:
    return text if len(text) <= width else text[: width - 3] + "..."

"""Reading documents one at a time from lists, tables, data sets and files.

Files may be text, JSON, JSON lines, CSV and parquet, compressed or not; anything ambiguous raises an error.
"""

import bz2
import csv
import gzip
import io
import json
import lzma
import os
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TextIO, TypeAlias

import numpy as np
import torch

from saelab.lm.conversations import Conversation

OPENERS: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
KINDS = {".jsonl": "JSONL", ".ndjson": "JSONL", ".json": "JSON", ".csv": ",", ".tsv": "\t", ".parquet": "parquet"}
REFUSED = {
    ".zip": "Unpack it first.",
    ".zst": "Unpack it first: zstd -d.",
    ".tar": "Unpack it first.",
    ".arrow": "Give datasets.load_from_disk(folder), or datasets.Dataset.from_file(path).",
    ".pdf": "Convert it to text first.",
    ".docx": "Convert it to text first.",
    ".npy": "Give numpy.load(path).",
    ".xlsx": "Give pandas.read_excel(path).",
}
IDS, MASK = "input_ids", "attention_mask"
"""names of the token ids and of the mask of what is not padding in tokenized data sets"""
DIVISIBLE = {f"{kind}Iterable" for kind in ("Examples", "ArrowExamples", "RebatchedArrowExamples", "SelectColumns")} | {
    f"{kind}ExamplesIterable" for kind in ("Typed", "Formatted", "Mapped", "Filtered")
}
"""layers of a streaming data set of `datasets` whose shards, read one after another, are the whole"""
UTF_16 = (b"\xff\xfe", b"\xfe\xff")
Row: TypeAlias = str | np.ndarray | Conversation
"""a document: its text, its token ids, or messages"""


def _find_kind(path: str | os.PathLike[str]) -> tuple[Path, str]:
    """A file of documents, and its kind by the suffix; ValueError for one that cannot be read."""
    found = _require_file(path)
    packed = found.suffix.lower() if found.suffix.lower() in OPENERS else ""
    suffix = Path(found.stem).suffix.lower() if packed else found.suffix.lower()
    if suffix in REFUSED:
        raise ValueError(f"A file of documents must be text, JSON, CSV or parquet, got '{found}'. {REFUSED[suffix]}")
    return found, KINDS.get(suffix, "text")


def open_rows(path: str | os.PathLike[str], separator: str | None, field: str) -> Iterator[tuple[str, Any]]:
    """Iterator over the documents or rows of a file, each with a description of its location for messages."""
    found, kind = _find_kind(path)
    if kind == "parquet":
        return _read_parquet(found, field)
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
        remote = " Download it first, or give datasets.load_dataset(...)." if "://" in name else ""
        raise FileNotFoundError(
            f"`texts` must be an existing file or a list of documents, got '{shown}'. "
            f"Put a single document into a list.{remote}"
        )
    return path


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
def _opened_parquet(path: Path) -> Iterator[Any]:
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


def _read_parquet(path: Path, field: str, index: int = 0, size: int = 1) -> Iterator[tuple[str, Any]]:
    """Rows of a parquet file, or of one of `size` runs of its row groups."""
    with _opened_parquet(path) as file:
        names = file.schema_arrow.names
        _require_field(field, names, path)
        columns = [field, *([MASK] if field == IDS and MASK in names else [])]
        start, stop = index * file.num_row_groups // size, (index + 1) * file.num_row_groups // size
        first = sum(file.metadata.row_group(i).num_rows for i in range(start))
        for batch in file.iter_batches(batch_size=1024, row_groups=range(start, stop), columns=columns):
            yield from ((f"'{path}', row {first + i}", row) for i, row in enumerate(batch.to_pylist()))
            first += len(batch)


def read_documents(texts: Any, *, separator: str | None = "<|endoftext|>", field: str = "text") -> Iterator[str]:
    """Iterator over documents as strings, in order, with at most a block of them in memory; blank ones are left out.

    A path is read by its suffix: `.jsonl`, `.json`, `.csv`, `.tsv` and `.parquet` have a text in each row; everything
    else is UTF-8 text. All but parquet may be compressed: `.gz`, `.bz2`, `.xz`.

    Args:
        texts: a path, or what holds documents: a list, an iterator, an array or column of strings, or an object with
            rows or columns, such as a data set (streaming or not), a DataFrame, a table or a dict of columns.
        separator: line that divides the documents of a text file; None makes each line a document.
        field: name of the column or key that holds the text.

    Raises:
        FileNotFoundError: for a path that does not exist.
        ValueError, TypeError: for what has no text: bytes, sets, all splits of a data set at once, a missing column,
            missing values.

    >>> from saelab.lm.documents import read_documents
    >>> list(read_documents([{"text": "one"}, " ", "two"])), list(read_documents({"text": ["three"]}))
    (['one', 'two'], ['three'])
    """
    for i, row in enumerate(read_rows(texts, separator=separator, field=field)):
        if not isinstance(row, str):
            what = "a conversation" if isinstance(row, Conversation) else "token ids"
            raise TypeError(f"A document must be a string, got {what} at item {i}. Give them to `tokenize`.")
        yield row


def read_rows(texts: Any, *, separator: str | None = "<|endoftext|>", field: str = "text") -> Iterator[Row]:
    """Iterator over documents as in `read_documents`, each a string, token ids (a list, array or tensor of integers) or
    a conversation (a list of messages).
    """
    return keep_rows(find_rows(texts, separator, field), field)


def keep_rows(rows: Iterable[tuple[str, Any]], field: str) -> Iterator[Row]:
    """Documents of rows that come with their locations, the blank ones left out."""
    found = (_read_row(row, field, where) for where, row in rows)
    return (row for row in found if (row.strip() if isinstance(row, str) else len(row)))


def describe_source(texts: Any) -> str:
    """Short description of where text came from, for provenance."""
    if isinstance(texts, str | os.PathLike):
        return Path(texts).name
    info = getattr(texts, "info", None)
    if (name := getattr(info, "dataset_name", None)) is not None:
        return f"data set {name}, split {getattr(texts, 'split', None) or 'unknown'}"
    return type(texts).__name__


def list_prompts(prompts: Any, name: str = "Prompts", conversations: bool = True) -> list[Any]:
    """Prompts as a list, also of a single one, conversations as `Conversation`; TypeError for anything but texts and
    conversations, such as a mapping.

    >>> list_prompts("One"), list_prompts(("Two", "three"))
    (['One'], ['Two', 'three'])
    """
    if isinstance(prompts, str):
        return [prompts]
    if conversations and (alone := Conversation.find(prompts)) is not None:
        return [alone]
    if isinstance(prompts, bytes | Mapping | set | frozenset) or hasattr(prompts, "columns"):
        raise TypeError(f"{name} must be a text or a list of texts, got {type(prompts).__name__}; give a list.")
    found = [(conversations and Conversation.find(prompt)) or prompt for prompt in prompts]
    if bad := [prompt for prompt in found if isinstance(prompt, Mapping | bytes)]:
        raise TypeError(f"{name} must be texts, got a {type(bad[0]).__name__} among them.{_advise([bad[0]])}")
    return found


def find_rows(texts: Any, separator: str | None, field: str) -> Iterator[tuple[str, Any]]:
    """Iterator over the rows of `texts`, each with a description of its location for messages."""
    if isinstance(texts, str | os.PathLike):
        yield from open_rows(texts, separator, field)
        return
    _require_documents(texts)
    for i, row in enumerate(_open_columns(texts, field)):
        yield f"item {i}", row


def open_part(texts: Any, field: str, index: int, size: int) -> tuple[Iterator[tuple[str, Any]], dict[str, Any]] | None:
    """One of several consecutive parts of a parquet file or of a streaming data set, which is read without the others:
    its rows with their locations, and what is known of the whole. None for what has no such parts, or fewer.

    Args:
        texts: as in `read_documents`.
        field: name of the column or key that holds the text.
        index: place of the part.
        size: number of parts.
    """
    if isinstance(texts, str | os.PathLike):
        path, kind = _find_kind(texts)
        if kind != "parquet":
            return None
        with _opened_parquet(path) as file:
            facts = {"rows": file.metadata.num_rows, "row groups": file.num_row_groups}
        return (_read_parquet(path, field, index, size), facts) if facts["row groups"] >= size else None
    if not hasattr(texts, "shard") or hasattr(texts, "__len__") or not _is_divisible(texts):
        return None
    if texts.num_shards < size and hasattr(texts, "reshard"):
        texts = texts.reshard()  # into the row groups of its files
    if texts.num_shards < size:
        return None
    info = texts.info
    facts = {"shards": texts.num_shards, "features": str(texts.features), "splits": str(info.splits)}
    part = texts.shard(num_shards=size, index=index, contiguous=True)
    return ((f"{where} of part {index}", row) for where, row in find_rows(part, None, field)), facts


def _is_divisible(texts: Any) -> bool:
    """Whether a streaming data set is known to be its shards one after another: not shuffled, mixed or cut, and without
    functions of a row's number or of several rows.
    """
    layer, layers = getattr(texts, "_ex_iterable", None), []
    while layer is not None:
        layers.append(layer)
        layer = getattr(layer, "ex_iterable", None)
    crossing = any(getattr(layer, name, False) for layer in layers for name in ("with_indices", "batched"))
    elsewhere = getattr(texts, "_distributed", None) or getattr(texts, "_shuffling", None)
    known = bool(layers) and all(type(layer).__name__ in DIVISIBLE for layer in layers)
    return known and not crossing and not elsewhere


def _require_documents(texts: Any) -> None:
    """Raise TypeError or ValueError for objects whose iteration would not give documents."""
    kind = type(texts).__name__
    if isinstance(texts, bytes | bytearray | memoryview):
        raise TypeError(f"`texts` must hold strings, got {kind}. Decode them: [data.decode('utf-8')].")
    if isinstance(texts, set | frozenset):
        raise TypeError(f"`texts` must have an order, got a {kind}. Give a list, such as sorted(texts).")
    if hasattr(texts, "read") and hasattr(texts, "readline"):
        raise TypeError(f"`texts` must be a path or hold documents, got an open file ({kind}). Give its path.")
    if hasattr(texts, "special_ids") and hasattr(texts, "doc_ids"):
        raise TypeError(f"`texts` must be text or rows of ids, got {kind}, which is tokenized. Use it as it is.")
    if hasattr(texts, "collect") and hasattr(texts, "columns"):
        raise TypeError(f"`texts` must be there already, got a {kind}. Call its .collect() first.")
    if isinstance(texts, Mapping) and texts and all(_is_data_set(value) for value in texts.values()):
        names = [str(name) for name in texts]
        raise ValueError(
            f"`texts` must be one split of a data set, got {kind} with the splits {names[:5]}. "
            f"Give one of them, such as texts[{names[0]!r}]."
        )


def _is_data_set(value: Any) -> bool:
    """Whether an object is a split: rows of named columns."""
    return hasattr(value, "column_names") or hasattr(value, "columns")


def _open_columns(texts: Any, field: str) -> Iterable[Any]:
    """Rows of anything that has rows, or the values of the requested column."""
    names, column = _find_columns(texts)
    if names is None:
        return _values(texts)
    if field not in names:
        raise ValueError(f"`field` must be a column of `texts`, got {field!r}. {format_columns(field, names)}")
    if names.count(field) > 1:
        raise ValueError(
            f"`field` must be one column of `texts`, got {field!r}, which {names.count(field)} are called."
        )
    if field == IDS and MASK in names:
        pairs = zip(_values(column(IDS)), _values(column(MASK)), strict=True)
        return ({IDS: ids, MASK: mask} for ids, mask in pairs)
    return _values(column(field))


def _find_columns(texts: Any) -> tuple[list[str] | None, Callable[[str], Any]]:
    """Names of the columns and how to get one; None for what has no columns, or iterates over its rows by itself."""
    if isinstance(texts, Mapping):
        return [str(name) for name in texts], lambda name: _require_column(texts[name], name)
    if hasattr(texts, "column_names"):  # data sets iterate over rows; pyarrow tables do not
        if not hasattr(texts, "to_pydict") or hasattr(texts, "features"):
            return None, texts.__getitem__
        return list(texts.column_names), texts.column
    if hasattr(texts, "columns") and hasattr(texts, "__getitem__"):  # pandas, polars
        named = {str(name): name for name in texts.columns}
        return [str(name) for name in texts.columns], lambda name: texts[named[name]]
    if hasattr(texts, "schema") and hasattr(texts, "column"):  # a RecordBatch
        return list(texts.schema.names), texts.column
    return None, lambda name: None


def _require_column(values: Any, name: str) -> Any:
    if isinstance(values, str | bytes) or not hasattr(values, "__iter__"):
        raise TypeError(
            f"A dict of columns must hold a list for {name!r}, got {type(values).__name__}. "
            "Put a single row into a list."
        )
    return values


def _values(column: Any) -> Iterable[Any]:
    """Values of a column, array or list, as Python values."""
    if isinstance(column, np.ndarray | torch.Tensor):
        if column.ndim == 0 or column.ndim > 2 or getattr(column.dtype, "names", None):
            raise ValueError(
                f"An array of documents must have one dimension, of token ids two, got shape {tuple(column.shape)} and "
                f"dtype {column.dtype}."
            )
        return column.tolist() if isinstance(column, np.ndarray) and column.dtype.kind in "UO" else column
    if hasattr(column, "to_pylist"):
        return (value for part in getattr(column, "chunks", [column]) for value in part.to_pylist())
    if not hasattr(column, "__iter__") and not hasattr(column, "__getitem__"):
        raise TypeError(f"`texts` must be a path or hold documents, got {type(column).__name__}. Give a list.")
    values: Iterable[Any] = column
    return values


def _read_row(row: Any, field: str, where: str) -> Row:
    """Text or ids of a row; TypeError or ValueError naming its location where there are none."""
    seen = None
    if isinstance(row, Mapping):
        if field not in row:
            advice = "Put a conversation into a list." if "role" in row else format_columns(field, row)
            raise ValueError(f"Every row must have the field {field!r}, got none at {where}. {advice}")
        seen = row.get(MASK) if field == IDS else None
        row = row[field]
    if isinstance(row, str):
        return _require_characters(row, where)
    if (conversation := Conversation.find(row)) is not None:
        return conversation
    if (ids := _as_ids(row)) is not None:
        return ids if seen is None else ids[np.asarray(seen, dtype=bool)]
    advice = _advise(row)
    raise TypeError(f"A document must be a string, got {type(row).__name__} at {where}.{advice}")


def _as_ids(row: Any) -> np.ndarray | None:
    """Token ids unchanged; None for anything else."""
    if isinstance(row, torch.Tensor):
        row = row.detach().cpu().numpy()
    if isinstance(row, list | tuple):
        if not row or not all(isinstance(i, int | np.integer) and not isinstance(i, bool | np.bool_) for i in row):
            return np.empty(0, np.int64) if isinstance(row, list | tuple) and not row else None
        row = np.array(row)
    return row if isinstance(row, np.ndarray) and row.ndim == 1 and row.dtype.kind in "iu" else None


def _advise(row: Any) -> str:
    """Advice for a value that is no document, for messages."""
    if isinstance(row, bytes):
        return " Decode it: data.decode('utf-8')."
    if isinstance(row, list | tuple) and row and isinstance(row[0], str):
        return " Join its words: ' '.join(words)."
    if isinstance(row, list | tuple) and row and isinstance(row[0], Mapping):
        return ' Every message of a conversation needs a role: {"role": "user", "content": "Hello"}.'
    if isinstance(row, int | np.integer) or (isinstance(row, torch.Tensor | np.ndarray) and row.ndim == 0):
        return " Put a single row of token ids into a list."
    if row is None or isinstance(row, float):
        return " Leave rows without text out first."
    return " Give strings, or rows of token ids."


def _require_characters(text: str, where: str) -> str:
    """The text itself; ValueError where it cannot be encoded as UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"A document must be Unicode text, got half of a surrogate pair ({text[error.start]!a}) at character "
            f"{error.start} of {where}. Mend it: text.encode('utf-16', 'surrogatepass').decode('utf-16', 'replace')."
        ) from None
    return str(text)

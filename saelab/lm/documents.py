"""Reading documents one at a time from lists, tables, data sets and files; anything ambiguous raises an error."""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch

from saelab.lm.conversations import Conversation
from saelab.lm.document_files import IDS, MASK, find_kind, format_columns, open_rows, opened_parquet, read_parquet

DIVISIBLE = {f"{kind}Iterable" for kind in ("Examples", "ArrowExamples", "RebatchedArrowExamples", "SelectColumns")} | {
    f"{kind}ExamplesIterable" for kind in ("Typed", "Formatted", "Mapped", "Filtered")
}
"""layers of a streaming data set of `datasets` whose shards, read one after another, are the whole"""
Row: TypeAlias = str | np.ndarray | Conversation
"""a document: its text, its token ids, or messages"""


def read_documents(texts: Any, *, separator: str | None = "<|endoftext|>", field: str = "text") -> Iterator[str]:
    """Iterator over documents as strings, in order, with at most a block of them in memory; blank ones are left out.

    A path is read by its suffix: `.jsonl`, `.json`, `.csv`, `.tsv` and `.parquet` have a text in each row; everything
    else is UTF-8 text. All but parquet may be compressed: `.gz`, `.bz2`, `.xz`, `.zst`. A file on the Hub is given as
    `hf://datasets/owner/name/path`.

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
        path, kind = find_kind(texts)
        if kind != "parquet":
            return None
        with opened_parquet(path) as file:
            facts = {"rows": file.metadata.num_rows, "row groups": file.num_row_groups}
        return (read_parquet(path, field, index, size), facts) if facts["row groups"] >= size else None
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
            is_message = isinstance(row.get("role"), str)
            advice = "Put a conversation into a list." if is_message else format_columns(field, row)
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

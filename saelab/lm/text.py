"""Reading documents one at a time from lists, tables, data sets and files; anything ambiguous raises an error."""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch

from saelab.lm.textfiles import IDS, MASK, open_rows, tell_columns

Row: TypeAlias = str | np.ndarray
"""a document: its text, or its token ids"""


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

    >>> from saelab.lm.text import read_documents
    >>> list(read_documents([{"text": "one"}, " ", "two"])), list(read_documents({"text": ["three"]}))
    (['one', 'two'], ['three'])
    """
    for i, row in enumerate(read_rows(texts, separator=separator, field=field)):
        if not isinstance(row, str):
            raise TypeError(f"A document must be a string, got token ids at item {i}. Give them to `tokenize`.")
        yield row


def read_rows(texts: Any, *, separator: str | None = "<|endoftext|>", field: str = "text") -> Iterator[Row]:
    """Iterator over documents as in `read_documents`, each a string or token ids: a list, array or tensor of
    integers.
    """
    rows = (_read_row(row, field, where) for where, row in _find_rows(texts, separator, field))
    return (row for row in rows if (row.strip() if isinstance(row, str) else len(row)))


def describe_source(texts: Any) -> str:
    """Short description of where text came from, for provenance."""
    if isinstance(texts, str | os.PathLike):
        return Path(texts).name
    info = getattr(texts, "info", None)
    if (name := getattr(info, "dataset_name", None)) is not None:
        return f"data set {name}, split {getattr(texts, 'split', None) or 'unknown'}"
    return type(texts).__name__


def list_prompts(prompts: Any, name: str = "Prompts") -> list[Any]:
    """Prompts as a list, also of a single one; TypeError for anything but texts, such as a mapping.

    >>> list_prompts("One"), list_prompts(("Two", "three"))
    (['One'], ['Two', 'three'])
    """
    if isinstance(prompts, str):
        return [prompts]
    if isinstance(prompts, bytes | Mapping | set | frozenset) or hasattr(prompts, "columns"):
        raise TypeError(f"{name} must be a text or a list of texts, got {type(prompts).__name__}; give a list.")
    found = list(prompts)
    if bad := [prompt for prompt in found if isinstance(prompt, Mapping | bytes)]:
        raise TypeError(f"{name} must be texts, got a {type(bad[0]).__name__} among them.{_advise([bad[0]])}")
    return found


def _find_rows(texts: Any, separator: str | None, field: str) -> Iterator[tuple[str, Any]]:
    """Rows, each with a description of its location for messages."""
    if isinstance(texts, str | os.PathLike):
        yield from open_rows(texts, separator, field)
        return
    _require_documents(texts)
    for i, row in enumerate(_open_columns(texts, field)):
        yield f"item {i}", row


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
        raise ValueError(f"`field` must be a column of `texts`, got {field!r}. {tell_columns(field, names)}")
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
            raise ValueError(
                f"Every row must have the field {field!r}, got none at {where}. {tell_columns(field, row)}"
            )
        seen = row.get(MASK) if field == IDS else None
        row = row[field]
    if isinstance(row, str):
        return _require_characters(row, where)
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
        return " Write a conversation as text first: tokenizer.apply_chat_template(messages, tokenize=False)."
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

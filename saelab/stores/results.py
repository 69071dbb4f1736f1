"""`Result`: what every result can do beside printing itself."""

import html
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from saelab.stores.files import write_json

_drawings: dict[type, Callable[[Any], str]] = {}


def register_drawing(kind: type, draw: Callable[[Any], str]) -> None:
    """Say how objects of a type look in Jupyter, as HTML: pictures stand on a higher floor than what they show."""
    _drawings[kind] = draw


class Drawn:
    """Base of what draws itself in Jupyter: by its registered drawing, else as it prints itself."""

    def _repr_html_(self) -> str:
        draw = _drawings.get(type(self))
        return draw(self) if draw else f"<pre>{html.escape(str(self))}</pre>"


class Result(Drawn):
    """Base of frozen dataclasses that print themselves: they draw themselves in Jupyter, and are written as JSON."""

    def to_dict(self) -> dict[str, Any]:
        """Every field by name, ready for JSON: lists for tuples and arrays, strings for keys."""
        found: dict[str, Any] = _plain(asdict(self))  # type: ignore[call-overload]
        return found

    def save(self, path: str | Path) -> None:
        """Write `to_dict()` as JSON, NaN as null."""
        write_json(path, self.to_dict())


def align_columns(rows: Sequence[Sequence[str]], left: Collection[int] = (0,)) -> list[str]:
    """Rows of cells as lines: every column is as wide as its widest cell, two spaces from the next, and right-aligned
    but for those of `left`. Rows may end early.

    >>> align_columns([["", "n"], ["a long name", "1,234"], ["b", "5"]])
    ['                 n', 'a long name  1,234', 'b                5']
    """
    n = max((len(row) for row in rows), default=0)
    widths = [max((len(row[i]) for row in rows if i < len(row)), default=0) for i in range(n)]
    return [
        "  ".join(
            cell.ljust(width) if i in left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=False))
        ).rstrip()
        for row in rows
    ]


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value.tolist() if isinstance(value, np.ndarray | np.generic) else value

"""`Result`: base class of results, which are displayed in Jupyter and saved as JSON; and text tables."""

import html
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, is_dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from saelab.stores.files import write_json

T = TypeVar("T")
_drawings: dict[type, Callable[[Any], str]] = {}
DRAWN_IN = tuple(
    f"saelab.visualization.{name}"
    for name in (
        "family_trees",
        "feature_cards",
        "graph_page",
        "intervention_plots",
        "layer_plots",
        "universality_plots",
    )
)
"""modules that register drawings, by name: they are on a higher floor, and imported when something is first drawn"""


def register_drawing(kind: type[T], draw: Callable[[T], str]) -> None:
    """Register the function that draws objects of a type as HTML in Jupyter.

    A registry, because drawing code is on a higher floor than the types that it draws.

    Args:
        kind: the type; subclasses are not included.
        draw: function from an object of the type to HTML.
    """
    _drawings[kind] = draw


class Drawn:
    """Base of objects that are displayed in Jupyter: by their registered drawing, else as their text."""

    def _repr_html_(self) -> str:
        for module in DRAWN_IN:
            import_module(module)
        draw = _drawings.get(type(self))
        return draw(self) if draw else f"<pre>{html.escape(str(self))}</pre>"


class Result(Drawn):
    """Base of result dataclasses, which print as a table, are displayed in Jupyter and save as JSON."""

    def to_dict(self) -> dict[str, Any]:
        """Every field by name, as JSON values: lists for tuples and arrays, strings for keys."""
        assert is_dataclass(self)  # of every subclass
        return {name: _plain(value) for name, value in asdict(self).items()}

    def save(self, path: str | Path) -> None:
        """Write `to_dict()` as JSON, atomically; NaN and infinities become null."""
        write_json(path, self.to_dict())


def format_table(rows: Sequence[Sequence[str]], left: Collection[int] = (0,)) -> list[str]:
    """A table as lines of text: columns as wide as their widest cell, two spaces apart.

    Args:
        rows: cells of each row; rows may be shorter than others.
        left: columns that are left-aligned; all others are right-aligned.

    >>> format_table([["", "n"], ["a long name", "1,234"], ["b", "5"]])
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


def format_spread(draws: Sequence[float], digits: int = 3) -> str:
    """The mean of some draws, with the smallest and the largest in brackets where there are several.

    >>> format_spread([1.0, 3.0], 1), format_spread([0.5], 2)
    ('2.0 (1.0..3.0)', '0.50')
    """
    mean = f"{np.mean(draws):.{digits}f}"
    return f"{mean} ({min(draws):.{digits}f}..{max(draws):.{digits}f})" if len(draws) > 1 else mean


def find_row(rows: Sequence[T], **values: object) -> T:
    """The first row whose fields have the given values; KeyError that lists the values there are."""
    for row in rows:
        if all(getattr(row, name) == value for name, value in values.items()):
            return row
    known = [", ".join(repr(getattr(row, name)) for name in values) for row in rows]
    got = ", ".join(map(repr, values.values()))
    raise KeyError(f"{', '.join(values)} must be one of: {'; '.join(dict.fromkeys(known))}; got {got}.")


def _plain(value: object) -> object:
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value.tolist() if isinstance(value, np.ndarray | np.generic) else value

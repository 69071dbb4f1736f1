"""Activations of several sources side by side, row by row, for a crosscoder: names and widths, and the rows."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Int
from torch import Tensor

from saelab.stores.manifest import INT_COLUMNS

PART_TOKENS = 1 << 20  # rows whose columns are compared at a time


@dataclass(frozen=True, kw_only=True)
class JoinedSource:
    """One of the sources whose activations are joined: a hook point, a model, a layer, a seed."""

    name: str
    """name, unique among the sources"""
    d_in: int
    """width of its activations"""


@runtime_checkable
class _SourceRows(Protocol):
    """Activations of one source."""

    def __len__(self) -> int: ...

    @property
    def d_in(self) -> int: ...

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def payload(self) -> dict[str, list[int]] | None: ...

    def read_texts(self, start: int, stop: int) -> list[str] | None: ...

    def copy_slice(self, start: int, out: Tensor) -> None: ...

    def __getitem__(self, index: Tensor) -> Tensor: ...

    def rows(self, start: int, stop: int) -> "_SourceRows": ...


class JoinedRows:
    """Rows of several sources next to each other, read from each when they are copied; and the columns of the first.

    Args:
        parts: activations by name of the source.
        rows: for sources whose row i is not row i of the others, the row of each joined one.
        column: name of the joined activations.

    Raises:
        ValueError: for fewer than two sources, rows that do not exist, and sources of other tokens.
    """

    def __init__(
        self, parts: Mapping[str, _SourceRows], rows: Mapping[str, Int[Tensor, " n_tokens"]], column: str
    ) -> None:
        if len(parts) < 2:
            raise ValueError(f"`sources` must be at least two activations by name, got {sorted(parts)}.")
        if unknown := sorted(set(rows) - set(parts)):
            raise ValueError(f"`rows` must be of the sources {list(parts)}, got {unknown}.")
        self.parts = parts
        self.index = {name: _check_rows(name, chosen, len(parts[name])) for name, chosen in rows.items()}
        lengths = {name: len(self.index.get(name, part)) for name, part in parts.items()}
        self.n_tokens = next(iter(lengths.values()))
        if len(set(lengths.values())) > 1:
            raise ValueError(
                f"Sources must have as many rows as each other, got {lengths}; collect them from the same tokens with "
                "the same mask, or give the `rows` that belong together."
            )
        widths = [part.d_in for part in parts.values()]
        self.ends = list(accumulate(widths, initial=0))
        dtype = next(iter(parts.values())).dtype
        for part in parts.values():
            dtype = torch.promote_types(dtype, part.dtype)
        self.columns: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {column: (dtype, (sum(widths),))}
        first = next(iter(parts.values()))
        small = first.rows(0, 1)
        self.columns |= {name: (torch.int32, ()) for name in INT_COLUMNS if getattr(small, name) is not None}
        shown = first.payload  # images are left to the sources
        self.payload = None if shown is None else {kind: size for kind, size in shown.items() if kind != "pixels"}
        self._check_tokens()

    @property
    def sources(self) -> tuple[JoinedSource, ...]:
        """Name and width of each source, in the order of the columns."""
        return tuple(JoinedSource(name=name, d_in=part.d_in) for name, part in self.parts.items())

    def read_strings(self, start: int, stop: int) -> list[str]:
        """The texts of documents `start:stop` of the first source."""
        name, part = next(iter(self.parts.items()))
        if name not in self.index:
            return part.read_texts(start, stop) or []
        return [text for row in self.index[name][start:stop].tolist() for text in part.read_texts(row, row + 1) or ()]

    def copy_slice(self, column: str, start: int, out: Tensor) -> None:
        """Fill `out` with consecutive rows, the first of which is row `start`."""
        if column in INT_COLUMNS:
            out.copy_(self._ints(next(iter(self.parts)), column, start, start + len(out)))
            return
        for (name, part), low, high in zip(self.parts.items(), self.ends, self.ends[1:], strict=False):
            if name in self.index:
                out[:, low:high] = part[self.index[name][start : start + len(out)]]
            else:
                part.copy_slice(start, out[:, low:high])

    def copy_rows(self, column: str, index: Tensor, out: Tensor) -> None:
        """Fill `out` with the rows of the given numbers."""
        for (name, part), low, high in zip(self.parts.items(), self.ends, self.ends[1:], strict=False):
            out[:, low:high] = part[self.index[name][index] if name in self.index else index]

    def _ints(self, name: str, column: str, start: int, stop: int) -> Tensor:
        """An integer column of a source for some of the joined rows."""
        if name not in self.index:
            found: Tensor = getattr(self.parts[name].rows(start, stop), column)
            return found
        if not hasattr(self, "_columns"):
            self._columns: dict[str, Tensor] = {}
        if column not in self._columns:  # of the first source alone
            self._columns[column] = getattr(self.parts[name], column)
        return self._columns[column][self.index[name][start:stop]]

    def _check_tokens(self) -> None:
        """Compare the columns of sources that are joined row by row, a part of the rows at a time."""
        plain = [name for name in self.parts if name not in self.index]
        for start in range(0, self.n_tokens, PART_TOKENS):
            stop = min(start + PART_TOKENS, self.n_tokens)
            for column in INT_COLUMNS:
                held = {name: getattr(self.parts[name].rows(start, stop), column) for name in plain}
                known = {name: values for name, values in held.items() if values is not None}
                for name, values in list(known.items())[1:]:
                    first, expected = next(iter(known.items()))
                    if not torch.equal(values, expected):
                        row = start + int((values != expected).nonzero()[0])
                        raise ValueError(
                            f"Sources must be of the same tokens, the {column} of '{first}' and '{name}' differ from "
                            f"row {row} on; collect them from the same tokens with the same mask, or give the `rows` "
                            "that belong together."
                        )


def check_sources(sources: Sequence[JoinedSource], d_in: int) -> None:
    """Raise ValueError unless sources have different names and positive widths that add up to `d_in`."""
    names = [source.name for source in sources]
    if len(sources) < 2 or len(set(names)) < len(names) or not all(names):
        raise ValueError(f"`sources` must be at least two of different names, got {names}.")
    widths = {source.name: source.d_in for source in sources}
    if min(widths.values()) < 1 or sum(widths.values()) != d_in:
        raise ValueError(f"`d_in` must be the sum of the widths of its `sources`, got {d_in} and {widths}.")


def _check_rows(name: str, rows: Tensor, n: int) -> Tensor:
    rows = rows.long().cpu()
    if rows.ndim != 1 or len(rows) == 0 or int(rows.min()) < 0 or int(rows.max()) >= n:
        raise ValueError(f"`rows` of '{name}' must be row numbers in 0..{n - 1}, at least one, got others.")
    return rows

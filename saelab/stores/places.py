"""`Places`: the index in the text of each row of a feature store, read one shard at a time."""

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence
from functools import cached_property
from itertools import accumulate
from pathlib import Path

import numpy as np
from jaxtyping import Int, Integer

from saelab.stores.corpus import ascends


class Places:
    """Index in the text of each row, read in pieces of which none is kept; indexed by slices of rows.

    Args:
        sizes: number of rows of each piece.
        read: function of (piece, start, stop) that returns the places of rows start..stop of a piece.
        n_text: number of tokens of the text.
        folder: the store's folder, for error messages.

    Raises:
        ValueError: on first use, where places do not ascend within the text.
    """

    def __init__(
        self, sizes: Sequence[int], read: Callable[[int, int, int], np.ndarray], n_text: int, folder: Path
    ) -> None:
        self._starts, self._read = [0, *accumulate(sizes)], read
        self._sizes, self._n_text, self._folder = sizes, n_text, folder

    def __len__(self) -> int:
        return self._starts[-1]

    def __getitem__(self, part: slice) -> Integer[np.ndarray, "n"]:
        start, stop, _ = part.indices(len(self))
        found = [np.zeros(0, np.int32)]
        if start < stop and len(self._first):  # this checks them
            for piece in range(bisect_right(self._starts, start) - 1, bisect_left(self._starts, stop)):
                first, end = (min(max(at - self._starts[piece], 0), self._sizes[piece]) for at in (start, stop))
                found.append(self._read(piece, first, end))
        return np.concatenate(found)

    def find(self, places: Integer[np.ndarray, "n"]) -> tuple[Int[np.ndarray, "n"], Int[np.ndarray, "n"]]:
        """Number of rows before each of the given places of the text, and the row at it, -1 where the mask dropped it.

        Args:
            places: indices in the text, in any order.
        """
        before, rows = np.zeros(len(places), np.int64), np.full(len(places), -1)
        pieces = np.searchsorted(self._first, places, "right") - 1
        for piece in np.unique(pieces[pieces >= 0]).tolist():
            own, here = self._read(piece, 0, self._sizes[piece]), pieces == piece
            sought = places[here].astype(own.dtype)  # of another type, the search would convert every place first
            at = np.searchsorted(own, sought)
            before[here] = at + self._starts[piece]
            if len(own):
                rows[here] = np.where(own[np.minimum(at, len(own) - 1)] == sought, before[here], -1)
        return before, rows

    @cached_property
    def _first(self) -> Int[np.ndarray, "n_pieces"]:
        """First place of each piece in the text."""
        first, last = [], -1
        for piece, size in enumerate(self._sizes):
            own = self._read(piece, 0, size)
            if size and (int(own[0]) <= last or int(own[-1]) >= self._n_text or not ascends(own, strictly=True)):
                raise ValueError(
                    f"`places` of {self._folder} must ascend within its {self._n_text} tokens of text, got others. It "
                    "was edited or written wrongly: harvest again."
                )
            first.append(int(own[0]) if size else last + 1)
            last = int(own[-1]) if size else last
        return np.array(first, np.int64)

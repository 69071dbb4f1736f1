"""`NeighborBatches`: shuffled batches of pairs of neighboring rows, for losses that compare a token with the next."""

from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saelab.stores.shuffling import BUFFER_TOKENS, ShuffledBatches


@runtime_checkable
class DocumentRows(Protocol):
    """Rows in the order of the text, with the document of each."""

    @property
    def d_in(self) -> int:
        """Width of a row."""

    @property
    def dtype(self) -> torch.dtype:
        """Dtype in which the rows are stored."""

    @property
    def doc_ids(self) -> Int[Tensor, "n_rows"] | None:
        """Document of each row, or None where it is not known."""

    def copy_slice(self, start: int, out: Float[Tensor, "n d"]) -> None:
        """Fill `out` with consecutive rows, the first of which is row `start`."""


class NeighborBatches:
    """Iterator over batches (batch_size, d_in) whose row i and row i + batch_size / 2 are neighbors: one row and the
    next one of the same document.

    Pairs are shuffled as `ShuffledBatches` shuffles rows. In an epoch every row but a document's last is once the first
    of a pair, so most rows occur twice.

    Args:
        rows: the data source, such as `Activations`, with `doc_ids`.
        batch_size: rows per batch; even.
        seed: of the order of the pairs.
        buffer_tokens: rows held in memory and shuffled together.

    Raises:
        ValueError: for an odd batch size, rows without documents, and too few neighbors.

    >>> from saelab.stores.activations import Activations
    >>> acts = Activations.from_tensor(torch.arange(6.0).view(6, 1), doc_ids=torch.tensor([0, 0, 0, 1, 1, 1]).int())
    >>> batch = next(NeighborBatches(acts, 4)).flatten()
    >>> (batch[2:] - batch[:2]).tolist()
    [1.0, 1.0]
    """

    def __init__(
        self, rows: DocumentRows, batch_size: int, seed: int = 0, *, buffer_tokens: int = BUFFER_TOKENS
    ) -> None:
        if batch_size % 2:
            raise ValueError(f"`batch_size` must be even where batches are pairs of neighbors, got {batch_size}.")
        pairs = _NeighborPairs(rows)
        if len(pairs) < batch_size // 2:
            raise ValueError(
                f"`batch_size` must be at most twice the {len(pairs)} pairs of neighboring rows, got {batch_size}; "
                "lower it or collect more."
            )
        self.rows = rows
        self._batches = ShuffledBatches(pairs, batch_size // 2, seed, buffer_tokens=max(buffer_tokens, batch_size) // 2)

    @property
    def d_in(self) -> int:
        """Width of a row."""
        return self.rows.d_in

    def __iter__(self) -> "NeighborBatches":
        return self

    def __next__(self) -> Float[Tensor, "batch d_in"]:
        pairs = next(self._batches)
        return torch.cat([pairs[:, : self.d_in], pairs[:, self.d_in :]])

    def state_dict(self) -> dict[str, int]:
        """Seed and position of the iterator."""
        return self._batches.state_dict()

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue, bit for bit, from the position in `state`; ValueError where it is of other rows."""
        self._batches.load_state_dict(state)


class _NeighborPairs:
    """Pairs of neighbors as rows of twice the width that `ShuffledBatches` can read."""

    def __init__(self, rows: DocumentRows) -> None:
        if rows.doc_ids is None:
            raise ValueError(
                "Neighboring rows must be of one document, got rows without `doc_ids`; collect activations with "
                "saelab, or give `doc_ids` to `Activations.from_tensor`."
            )
        self.rows, self.d_in, self.dtype = rows, 2 * rows.d_in, rows.dtype
        self.starts = (rows.doc_ids[1:] == rows.doc_ids[:-1]).nonzero()[:, 0]

    def __len__(self) -> int:
        return len(self.starts)

    def copy_slice(self, start: int, out: Float[Tensor, "n d"]) -> None:
        """Fill `out` with consecutive pairs, the first of which is pair `start`."""
        starts = self.starts[start : start + len(out)]
        first, d = int(starts[0]), self.rows.d_in
        block = torch.empty(int(starts[-1]) + 2 - first, d, dtype=self.dtype)
        self.rows.copy_slice(first, block)
        torch.index_select(block, 0, starts - first, out=out[:, :d])
        torch.index_select(block, 0, starts - first + 1, out=out[:, d:])

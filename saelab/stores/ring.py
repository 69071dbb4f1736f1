"""`RingBuffer`: a preallocated shuffle buffer of rows, for activations that are streamed instead of stored."""

import torch
from jaxtyping import Float
from torch import Tensor


class RingBuffer:
    """A preallocated buffer that shuffles rows: rows are added, and batches sampled from them without replacement.

    Fill it, sample until it is `half_empty`, and fill it again: every batch is a uniform sample of all unread rows.
    `_order` is a permutation of the slots: those before `_cursor` are free, the others hold unread rows in random
    order. A batch is therefore the next part of the permutation, and new rows overwrite sampled ones in place.

    Args:
        capacity: rows of the buffer, at least 2.
        d_in: width of a row.
        dtype: dtype of the buffer.
        seed: of the order of the rows.
        device: device of the buffer.

    >>> ring = RingBuffer(capacity=4, d_in=1, seed=0)
    >>> ring.add(torch.arange(4.0).view(4, 1))
    >>> sorted(ring.sample(4).flatten().tolist())
    [0.0, 1.0, 2.0, 3.0]
    """

    def __init__(
        self,
        capacity: int,
        d_in: int,
        *,
        dtype: torch.dtype = torch.float32,
        seed: int = 0,
        device: str | torch.device = "cpu",
    ) -> None:
        if capacity < 2 or d_in < 1:
            raise ValueError(f"`capacity` must be at least 2 and `d_in` at least 1, got {capacity} and {d_in}.")
        self.capacity, self.d_in = capacity, d_in
        self._rows = torch.empty(capacity, d_in, dtype=dtype, device=device)
        self._order = torch.arange(capacity, device=device)
        self._cursor = capacity
        self._mixed = True
        # On the CPU whatever the device, so that a seed means the same everywhere.
        self._generator = torch.Generator().manual_seed(seed)

    @property
    def n_unread(self) -> int:
        """Number of rows that can be sampled."""
        return self.capacity - self._cursor

    @property
    def n_free(self) -> int:
        """Number of rows that can be added."""
        return self._cursor

    @property
    def half_empty(self) -> bool:
        """Whether at most half of the capacity is unread, so that rows should be added."""
        return self.n_unread <= self.capacity // 2

    def add(self, rows: Float[Tensor, "n d_in"]) -> None:
        """Add rows in the place of sampled ones, in the buffer's dtype; ValueError where they do not fit."""
        if len(rows) > self.n_free:
            raise ValueError(f"`rows` must be at most n_free ({self.n_free}), got {len(rows)}. Sample first.")
        if rows.shape[1] != self.d_in:
            raise ValueError(f"`rows` must have d_in ({self.d_in}) columns, got {rows.shape[1]}.")
        slots = self._order[self._cursor - len(rows) : self._cursor]
        self._rows.index_copy_(0, slots, rows.to(self._rows))
        self._cursor -= len(rows)
        self._mixed = False

    def sample(self, batch_size: int, out: Float[Tensor, "batch d_in"] | None = None) -> Float[Tensor, "batch d_in"]:
        """A batch of random unread rows, which count as read; ValueError where fewer than `batch_size` are unread.

        The batch is written into `out` where that is given.
        """
        if not 1 <= batch_size <= self.n_unread:
            raise ValueError(
                f"`batch_size` must be in 1..n_unread ({self.n_unread}), got {batch_size}. Add rows first."
            )
        if not self._mixed:
            self._mix()
        slots = self._order[self._cursor : self._cursor + batch_size]
        self._cursor += batch_size
        return torch.index_select(self._rows, 0, slots, out=out)

    def state_dict(self) -> dict[str, Tensor]:
        """The unread rows in the order of their sampling, and the state of the generator."""
        return {
            "rows": self._rows[self._order[self._cursor :]],
            "mixed": torch.tensor(self._mixed),
            "generator": self._generator.get_state(),
        }

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Continue, bit for bit, from the state in `state`; ValueError where it does not fit this buffer."""
        rows = state["rows"]
        if rows.shape[1] != self.d_in or len(rows) > self.capacity or rows.dtype != self._rows.dtype:
            raise ValueError(
                f"The state must fit a buffer of {self.capacity} rows of d_in {self.d_in} in {self._rows.dtype}, got "
                f"{tuple(rows.shape)} in {rows.dtype}. Build the buffer with the arguments it was saved with."
            )
        # The slot of a row is not visible outside, so the rows may be stored in order.
        self._order = torch.arange(self.capacity, device=self._rows.device)
        self._cursor = self.capacity - len(rows)
        self._rows[self._cursor :] = rows.to(self._rows.device)
        self._mixed = bool(state["mixed"])
        self._generator.set_state(state["generator"])

    def _mix(self) -> None:
        unread = self._order[self._cursor :]
        shuffle = torch.randperm(len(unread), generator=self._generator).to(unread.device)
        self._order[self._cursor :] = unread[shuffle]
        self._mixed = True

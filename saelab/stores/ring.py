"""`RingBuffer`: rows go in, shuffled rows come out, and the memory is taken once."""

import torch
from jaxtyping import Float
from torch import Tensor


class RingBuffer:
    """A preallocated, seeded buffer that mixes rows.

    `_order` is a permutation of the slots: those before `_cursor` are free, those behind it hold unread rows in random
    order. A batch is therefore the next piece of the permutation, and new rows overwrite served ones in place. Fill it,
    serve until it is `half_empty`, fill it again: every batch is drawn evenly and without replacement from all unread
    rows.

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
        """Rows that can be sampled."""
        return self.capacity - self._cursor

    @property
    def n_free(self) -> int:
        """Rows that can be added."""
        return self._cursor

    @property
    def half_empty(self) -> bool:
        """Whether it is time to add rows: at most half of the capacity is unread."""
        return self.n_unread <= self.capacity // 2

    def add(self, rows: Float[Tensor, "n d_in"]) -> None:
        """Store rows in the place of served ones, in the buffer's dtype; ValueError when they do not fit."""
        if len(rows) > self.n_free:
            raise ValueError(f"`rows` must be at most n_free ({self.n_free}), got {len(rows)}. Sample first.")
        if rows.shape[1] != self.d_in:
            raise ValueError(f"`rows` must have d_in ({self.d_in}) columns, got {rows.shape[1]}.")
        slots = self._order[self._cursor - len(rows) : self._cursor]
        self._rows.index_copy_(0, slots, rows.to(self._rows))
        self._cursor -= len(rows)
        self._mixed = False

    def sample(self, batch_size: int, out: Float[Tensor, "batch d_in"] | None = None) -> Float[Tensor, "batch d_in"]:
        """Take `batch_size` random unread rows, into `out` where given; ValueError when fewer are unread."""
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
        """The unread rows in the order in which they will come, and the generator."""
        return {
            "rows": self._rows[self._order[self._cursor :]],
            "mixed": torch.tensor(self._mixed),
            "generator": self._generator.get_state(),
        }

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Go on, bit for bit, where `state` was taken; ValueError when it does not fit this buffer."""
        rows = state["rows"]
        if rows.shape[1] != self.d_in or len(rows) > self.capacity or rows.dtype != self._rows.dtype:
            raise ValueError(
                f"The state must fit a buffer of {self.capacity} rows of d_in {self.d_in} in {self._rows.dtype}, got "
                f"{tuple(rows.shape)} in {rows.dtype}. Build the buffer with the arguments it was saved with."
            )
        # Which slot a row lies in is never seen outside, so the rows may be laid down in order.
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

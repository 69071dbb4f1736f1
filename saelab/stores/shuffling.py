"""Shuffled batches of rows in bounded memory: `ShuffledBatches` of stored rows, `RingBuffer` of streamed ones.

Both are seeded and their state can be saved.
"""

import hashlib
from bisect import bisect_right
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

BUFFER_TOKENS = 1 << 17
BLOCK_TOKENS = 128


@runtime_checkable
class RowSource(Protocol):
    """A data source whose rows can be copied by slices."""

    @property
    def d_in(self) -> int:
        """Width of a row."""

    @property
    def dtype(self) -> torch.dtype:
        """Dtype in which the rows are stored."""

    def __len__(self) -> int:
        """Number of rows."""

    def copy_slice(self, start: int, out: Float[Tensor, "n d_in"]) -> None:
        """Fill `out` with consecutive rows, the first of which is row `start`."""


class ShuffledBatches:
    """Iterator over shuffled batches (batch_size, d_in) of `rows`, in the stored dtype.

    The rows are cut into blocks of 128. Each epoch puts the blocks into a new random order and reads them, a window of
    `buffer_tokens` rows at a time, into one preallocated tensor; the rows of a window are returned in random order. The
    order depends on the rows, `seed` and `buffer_tokens` alone: not on shards or on the batches returned before. Every
    epoch returns each row at most once.

    Args:
        rows: the data source, such as `Activations`.
        batch_size: rows per batch, at most `len(rows)`.
        seed: of the order of the rows.
        buffer_tokens: rows held in memory and shuffled together, at least `batch_size`.
        drop_last: whether a last, shorter batch of an epoch is left out.
        epochs: passes over the rows; None for no end.

    >>> from saelab.stores.activations import Activations
    >>> batches = Activations.from_tensor(torch.arange(6.0).view(6, 1)).batches(3, seed=0, epochs=1)
    >>> sorted(torch.cat(list(batches)).flatten().tolist())
    [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]
    """

    def __init__(
        self,
        rows: RowSource,
        batch_size: int,
        seed: int = 0,
        *,
        buffer_tokens: int = BUFFER_TOKENS,
        drop_last: bool = True,
        epochs: int | None = None,
    ) -> None:
        if not 1 <= batch_size <= len(rows):
            raise ValueError(f"`batch_size` must be in 1..n_tokens ({len(rows)}), got {batch_size}.")
        if buffer_tokens < batch_size:
            raise ValueError(f"`buffer_tokens` must be at least batch_size ({batch_size}), got {buffer_tokens}.")
        if epochs is not None and epochs < 1:
            raise ValueError(f"`epochs` must be at least 1, or None for no end, got {epochs}.")
        self.rows, self.batch_size, self.seed = rows, batch_size, seed
        self.buffer_tokens, self.drop_last, self.epochs = buffer_tokens, drop_last, epochs
        self._blocks_per_window = max(1, min(buffer_tokens, len(rows)) // BLOCK_TOKENS)
        self._buffer: Tensor | None = None
        self._start(epoch=0, position=0)

    @property
    def d_in(self) -> int:
        """Width of a row."""
        return self.rows.d_in

    def __iter__(self) -> "ShuffledBatches":
        return self

    def __next__(self) -> Float[Tensor, "batch d_in"]:
        left = len(self.rows) - self._position
        if left == 0 or (self.drop_last and left < self.batch_size):
            self._start(self._epoch + 1, position=0)
            left = len(self.rows)
        if self.epochs is not None and self._epoch >= self.epochs:
            raise StopIteration
        return self._take(min(self.batch_size, left))

    def state_dict(self) -> dict[str, int]:
        """Seed and position of the iterator, and what they depend on; a few integers."""
        return {
            "seed": self.seed,
            "epoch": self._epoch,
            "position": self._position,
            "n_tokens": len(self.rows),
            "buffer_tokens": self.buffer_tokens,
        }

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue, bit for bit, from the position in `state`; ValueError if it is of other rows or another buffer."""
        for key in ("n_tokens", "buffer_tokens"):
            if state[key] != self.state_dict()[key]:
                raise ValueError(
                    f"`{key}` must be what it was when the state was saved ({state[key]}), "
                    f"got {self.state_dict()[key]}. Use the same activations and buffer, or start again."
                )
        if not (0 <= state["position"] <= len(self.rows) and state["epoch"] >= 0):
            raise ValueError(
                f"`position` must be in 0..{len(self.rows)} and `epoch` at least 0, got {state['position']} and "
                f"{state['epoch']}. Was the checkpoint edited?"
            )
        self.seed = state["seed"]
        self._start(state["epoch"], state["position"])

    def _start(self, epoch: int, position: int) -> None:
        n_blocks = -(-len(self.rows) // BLOCK_TOKENS)
        self._epoch, self._position = epoch, position
        self._blocks = torch.randperm(n_blocks, generator=self._generator("blocks", epoch))
        sizes = torch.full((n_blocks,), BLOCK_TOKENS)
        sizes[self._blocks == n_blocks - 1] = len(self.rows) - (n_blocks - 1) * BLOCK_TOKENS
        ends = sizes.cumsum(0)[self._blocks_per_window - 1 :: self._blocks_per_window].tolist()
        if not ends or ends[-1] < len(self.rows):
            ends.append(len(self.rows))
        self._window_bounds = [0, *ends]
        self._window = -1

    def _take(self, n: int) -> Tensor:
        out = torch.empty(n, self.d_in, dtype=self.rows.dtype)
        done = 0
        while done < n:
            window, served = self._enter_window()
            take = self._order[served : served + n - done]
            torch.index_select(window, 0, take, out=out[done : done + len(take)])
            done += len(take)
            self._position += len(take)
        return out

    def _enter_window(self) -> tuple[Tensor, int]:
        """The window that holds the current position, filled, and how many of its rows are served."""
        bounds = self._window_bounds
        number = bisect_right(bounds, self._position) - 1
        if number != self._window:
            self._fill(number)
        n_rows = bounds[number + 1] - bounds[number]
        assert self._buffer is not None
        return self._buffer[:n_rows], self._position - bounds[number]

    def _fill(self, number: int) -> None:
        if self._buffer is None:
            shape = (self._blocks_per_window * BLOCK_TOKENS, self.d_in)
            self._buffer = torch.empty(shape, dtype=self.rows.dtype)
        per_window, done = self._blocks_per_window, 0
        places: list[tuple[int, int, int]] = []  # first row, place in the buffer, rows
        for block in self._blocks[number * per_window : (number + 1) * per_window].tolist():
            size = min(BLOCK_TOKENS, len(self.rows) - block * BLOCK_TOKENS)
            places.append((block * BLOCK_TOKENS, done, size))
            done += size
        for start, place, size in sorted(places):  # in the order of the files, each of which is opened once
            self.rows.copy_slice(start, self._buffer[place : place + size])
        self._order = torch.randperm(done, generator=self._generator("rows", self._epoch, number))
        self._window = number

    def _generator(self, *key: str | int) -> torch.Generator:
        # Drawn from the key, not from a running generator: any window of any epoch can be rebuilt from a few integers.
        digest = hashlib.sha256(repr((self.seed, *key)).encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


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

    @property
    def no_rows(self) -> Float[Tensor, "0 d_in"]:
        """No rows, of the buffer's width, dtype and device."""
        return self._rows[:0]

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

"""`PrefetchedBatches`: batches that a thread reads into page-locked memory, one ahead of the step that uses them.

An accelerator copies from such memory by itself, while the step before is still computing.
"""

from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from saelab.training.config import Batches


def prefetch(batches: Batches, device: torch.device) -> Batches:
    """The same batches, read ahead where they are trained on by a CUDA device; for other devices as they are.

    Args:
        batches: iterator that nothing else advances, with a position that is quick to save.
        device: device of the weights.
    """
    return PrefetchedBatches(batches) if device.type == "cuda" and torch.cuda.is_available() else batches


class PrefetchedBatches:
    """Iterator over the batches of another one, which is at most one batch ahead; position and order are the same.

    An error of the other one is raised where its batch is asked for.

    Args:
        batches: the other iterator; use it through this one alone.
        pin: whether to copy each batch to page-locked memory.

    >>> from saelab.stores.shuffling import ShuffledBatches
    >>> acts = sl.Activations.from_tensor(torch.arange(6.0).view(6, 1))
    >>> ahead = PrefetchedBatches(ShuffledBatches(acts, 3, seed=0), pin=False)
    >>> torch.equal(next(ahead), next(ShuffledBatches(acts, 3, seed=0)))
    True
    """

    def __init__(self, batches: Batches, pin: bool = True) -> None:
        self._batches, self._pin = batches, pin
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="saelab-prefetch")
        self._next: Future[Tensor | None] | None = None
        self._position: Mapping[str, Any] = {}

    @property
    def d_in(self) -> int:
        """Width of a row."""
        return self._batches.d_in

    def __iter__(self) -> "PrefetchedBatches":
        return self

    def __next__(self) -> Tensor:
        asked, self._next = self._next or self._ask(), None
        batch = asked.result()
        if batch is None:
            raise StopIteration
        self._next = self._ask()
        return batch

    def state_dict(self) -> Mapping[str, Any]:
        """The position after the batch that was last returned."""
        return self._batches.state_dict() if self._next is None else self._position

    def load_state_dict(self, state: Any) -> None:
        """Continue from the position in the output of `state_dict`."""
        if self._next is not None:
            self._next.exception()  # waits
            self._next = None
        self._batches.load_state_dict(state)

    def _ask(self) -> "Future[Tensor | None]":
        self._position = self._batches.state_dict()
        return self._thread.submit(self._read)

    def _read(self) -> Tensor | None:
        """The next batch, or None at the end."""
        batch = next(self._batches, None)
        return batch.pin_memory() if self._pin and batch is not None else batch

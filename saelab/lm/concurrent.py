"""Several forward passes at a time, for models whose operations are too small to be worth dividing among processors.

Operations of a narrow model take tens of microseconds, of which waiting for the last of several threads is a good part.
Threads that each run a batch of their own wait for nothing.
"""

from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from queue import SimpleQueue
from typing import TypeAlias, TypeVar

import torch
from torch import Tensor

from saelab.lm.hook_points import hook_points_of
from saelab.lm.hooks import read_sites, to_model, within_context
from saelab.lm.model_checks import Model
from saelab.lm.unwrapped import strip

Item = TypeVar("Item")
Result = TypeVar("Result")
Capture: TypeAlias = Callable[[Tensor], dict[str, Tensor]]
"""Activations by hook point for (batch, ctx_len) ids, as from `capture`."""
LARGEST_WIDTH = 512  # of the residual stream; operations on more are divided well
MOST_AT_ONCE = 4  # as each holds a batch's intermediate values, and all share Python's interpreter lock


def make_captures(model: Model, hook_points: Sequence[str]) -> list[Capture]:
    """Functions with the values of `capture` at some hook points, each of which a thread may call while others call
    the others; none where one forward pass at a time is as good: with one thread, on another device, for a wide model,
    or one that is edited or hooked now.

    They are of the model's present weights and hooks.

    Args:
        model: the language model.
        hook_points: names of the hook points.

    >>> model, ids = sl.lm.tiny_model(), torch.ones(1, 4, dtype=torch.long)
    >>> name = "blocks.0.hook_resid_post"
    >>> all(torch.equal(f(ids)[name], sl.lm.capture(model, ids, [name])[name]) for f in make_captures(model, [name]))
    True
    """
    n = min(MOST_AT_ONCE, torch.get_num_threads())
    if n == 1 or model.cfg.d_model > LARGEST_WIDTH:
        return []
    home, names = hook_points_of(model), list(dict.fromkeys(hook_points))
    running, sites = home.route(names)
    if not home.is_bare or next(running.parameters()).device.type != "cpu":
        return []

    def copy() -> Capture:
        own, twins = strip(running)  # modules and hooks of its own, with the same weights
        at = {name: (twins[module], side) for name, (module, side) in zip(names, sites, strict=True)}

        def read(ids: Tensor) -> dict[str, Tensor]:
            with within_context(model, ids):
                return read_sites(own, at, to_model(model, ids), stop=True)

        return read

    return [copy() for _ in range(n)]


def map_in_order(workers: Sequence[Callable[[Item], Result]], items: Iterable[Item]) -> Generator[Result, None, None]:
    """Each item's result from one of the workers, in the order of the items; each worker has one item at a time.

    Torch's threads are divided among the workers, and the calling thread has a worker's share of them too until the
    iterator ends or is closed.

    >>> list(map_in_order([lambda x: 2 * x, lambda x: x + x], range(4)))
    [0, 2, 4, 6]
    """
    if len(workers) == 1:
        yield from map(workers[0], items)
        return
    free: SimpleQueue[Callable[[Item], Result]] = SimpleQueue()
    for worker in workers:
        free.put(worker)

    def run(item: Item) -> Result:
        worker = free.get()
        try:
            return worker(item)
        finally:
            free.put(worker)

    n_threads, ahead = torch.get_num_threads(), deque[Future[Result]]()
    share = max(1, n_threads // len(workers))
    pool = ThreadPoolExecutor(len(workers), "forward", initializer=torch.set_num_threads, initargs=(share,))
    torch.set_num_threads(share)  # of this thread: what it does beside the others must not take all processors
    try:
        for item in items:
            ahead.append(pool.submit(run, item))
            if len(ahead) > len(workers):  # one more than are at work, so that none waits for this thread
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
        torch.set_num_threads(n_threads)

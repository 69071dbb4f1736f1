"""Jobs on several threads, interrupted by Ctrl-C without losing those under way."""

import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

from saelab.training.interrupt import DeferredInterrupt

J = TypeVar("J")
R = TypeVar("R")
LOOK = 0.05  # seconds between two looks at whether Ctrl-C was pressed


def run_jobs(
    work: Callable[[J], R], jobs: Sequence[J], n_parallel: int, stop: threading.Event, interrupt: DeferredInterrupt
) -> Iterator[tuple[J, R]]:
    """Pairs of job and result in order of completion.

    After Ctrl-C or an error no new job is started, and those under way are awaited; the first error is raised at the
    end.

    Args:
        work: function from a job to its result, called on several threads.
        jobs: the jobs.
        n_parallel: number of threads.
        stop: event that is set after Ctrl-C or an error, for jobs that wait for something.
        interrupt: deferred Ctrl-C, which is checked twenty times a second.
    """
    results: queue.SimpleQueue[tuple[J, R] | BaseException | None] = queue.SimpleQueue()
    todo: queue.SimpleQueue[J] = queue.SimpleQueue()
    for job in jobs:
        todo.put(job)
    n_working = min(n_parallel, len(jobs))
    for _ in range(n_working):  # daemons: a second Ctrl-C does not wait for them
        threading.Thread(target=_labour, args=(work, todo, results, stop), daemon=True).start()
    error: BaseException | None = None
    try:
        while n_working:
            if interrupt.requested:
                stop.set()
            try:
                found = results.get(timeout=LOOK)
            except queue.Empty:
                continue
            if found is None:
                n_working -= 1
            elif isinstance(found, BaseException):
                error = error or found
            else:
                yield found
    finally:
        stop.set()
    if error is not None:
        raise error


def _labour(
    work: Callable[[J], R],
    todo: "queue.SimpleQueue[J]",
    results: "queue.SimpleQueue[tuple[J, R] | BaseException | None]",
    stop: threading.Event,
) -> None:
    while not stop.is_set():
        try:
            job = todo.get_nowait()
        except queue.Empty:
            break
        try:
            results.put((job, work(job)))
        except BaseException as error:
            stop.set()
            results.put(error)
    results.put(None)

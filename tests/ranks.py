"""Processes that train together, for tests: four of them, started once, run functions of test modules."""

import importlib
import multiprocessing
import os
import sys
import tempfile
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any
from unittest.mock import patch

import torch

N_RANKS = 4
TIMEOUT = 90.0  # seconds that a function may take
IMPORTED = ["torch.distributed.device_mesh", "torch.testing", "transformer_lens", "scipy.sparse"]
"""what most functions need"""


class Pool:
    """Four processes in one group.

    Functions are called as `f(*args)` in each, and may use `mesh_of`.
    """

    def __init__(self) -> None:
        context = multiprocessing.get_context("forkserver" if sys.platform == "linux" else "spawn")
        if sys.platform == "linux":  # what the server has imported need not be imported by four processes
            context.set_forkserver_preload(IMPORTED)
            with one_thread():
                importlib.import_module("multiprocessing.forkserver").ensure_running()
        self.folder = tempfile.TemporaryDirectory()
        self.pipes, self.processes = [], []
        for rank in range(N_RANKS):
            mine, theirs = context.Pipe()
            process = context.Process(
                target=_serve, args=(rank, f"{self.folder.name}/store", theirs, sys.path), daemon=True
            )
            with one_thread():
                process.start()
            self.pipes.append(mine)
            self.processes.append(process)

    def run(self, function: Any, *args: Any) -> list[Any]:
        """What the function returns in each process; raises the first one's error."""
        for pipe in self.pipes:
            pipe.send((function.__module__, function.__qualname__, args))
        answers = []
        for rank, pipe in enumerate(self.pipes):
            if not pipe.poll(TIMEOUT):
                raise TimeoutError(f"process {rank} did not answer {function.__qualname__}{args}")
            answers.append(pipe.recv())
        for failed, answer in answers:
            if failed:
                raise answer
        return [answer for _, answer in answers]

    def close(self) -> None:
        for process in self.processes:
            process.terminate()
        for process in self.processes:
            process.join(10)
        self.folder.cleanup()


@contextmanager
def one_thread() -> Iterator[None]:
    """Context in which processes begin whose libraries use one thread."""
    with patch.dict(os.environ, dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")):
        yield


def _serve(rank: int, store: str, pipe: Any, path: list[str]) -> None:
    sys.path[:] = path
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=N_RANKS)
    while True:
        module, name, args = pipe.recv()
        try:
            answer = (False, getattr(importlib.import_module(module), name)(*args))
        except BaseException as error:
            traceback.print_exc()
            answer = (True, type(error)(*error.args))
        pipe.send(answer)


@cache
def mesh_of(n_data: int, n_latents: int) -> Any:
    """The mesh of all processes in this shape."""
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh("cpu", (n_data, n_latents), mesh_dim_names=("data", "latents"))

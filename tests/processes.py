"""Processes for tests to interrupt and kill. They are forked from one that has imported saelab: that takes seconds."""

import multiprocessing
import os
import pkgutil
import signal
import sys
import time
import traceback
from collections.abc import Callable
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import torch

import saelab.cli

COMMANDS = [f"saelab.cli.{module.name}" for module in pkgutil.iter_modules(saelab.cli.__path__)]
COMMANDS += ["saelab.explorer.app", "torch._dynamo"]
"""commands, and what they import when they run: the last by any optimizer"""
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["pytest", *COMMANDS])


class Child:
    """A process of its own that runs one function, importable by its name; what it says on stderr goes to a file."""

    def __init__(self, errors: Path, function: Callable[..., object], *arguments: object) -> None:
        self._errors = errors
        self._process = CONTEXT.Process(target=_run, args=(errors, function, arguments), daemon=True)
        self._process.start()

    def wait_until(self, happened: Callable[[], bool], timeout: float = 90) -> None:
        """Return once something has happened; AssertionError where the process ends before or time runs out."""
        end = time.monotonic() + timeout
        while not happened():
            assert self._process.is_alive(), f"it ended before it could be stopped: {self._errors.read_text()}"
            assert time.monotonic() < end, f"nothing happened in {timeout} seconds"
            time.sleep(0.005)

    def send(self, signum: signal.Signals) -> None:
        """Send a signal."""
        assert self._process.pid is not None
        os.kill(self._process.pid, signum)

    def wait(self, timeout: float = 60) -> tuple[int | None, str]:
        """Exit code, minus the signal's number where one ended it, and what it wrote to stderr."""
        self._process.join(timeout)
        return self._process.exitcode, self._errors.read_text()


def _run(errors: Path, function: Callable[..., object], arguments: tuple[object, ...]) -> None:
    # By its path: a folder of tests may have a conftest.py of its own before it on the path.
    spec = spec_from_file_location("root_conftest", Path(__file__).parents[1] / "conftest.py")
    assert spec is not None and spec.loader is not None
    conftest = module_from_spec(spec)
    spec.loader.exec_module(conftest)
    conftest.move_seeds(int(os.environ.get("SAELAB_SEED_OFFSET", "0")))
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))  # as conftest.py has it: some kernels round by it
    with errors.open("w", buffering=1) as file:
        sys.stderr = file
        try:
            code = function(*arguments)
        except BaseException:
            traceback.print_exc()
            code = 1
        raise SystemExit(code)

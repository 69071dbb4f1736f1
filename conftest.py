"""Fixtures and doctest names for the whole repository."""

import gc
import os
import signal
import sys
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

# Many small products: more threads only get in each other's way, and those of numpy spin while another process works.
for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(variable, "1")

# Each process that tests start would compile all of saelab that it imports, and each run of pytest its rewritten tests.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False

import numpy as np
import pytest
import torch
from checked import install

install()  # before saelab is imported

import saelab as sl

torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))

# A suite started with `&` by a script inherits an ignored Ctrl-C, and so would the processes that its tests interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)

SHARED_DATA = Path(__file__).parent / ".." / "shared" / "data"


PLANTED = tuple(str(Path(__file__).parent / folder) + os.sep for folder in ("tests", "saelab/synthetic"))
"""where worlds are planted and samples drawn"""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--seed-offset", type=int, default=0, help="Other planted worlds: moves the tests' seeds.")
    parser.addoption("--backend", default="auto", help="What runs the tiny model: transformer_lens or huggingface.")
    parser.addoption("--one-in", type=int, default=1, help="Runs one in N tests of each file, the first among them.")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """With `--one-in N` all tests are collected, and one in N that are not deselected otherwise runs, in every file."""
    n = config.getoption("--one-in")
    left_out = []
    for _, tests in groupby(list(items), key=lambda item: item.path):
        left_out += [item for i, item in enumerate(tests) if i % n]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in set(left_out)]


def pytest_collection_finish() -> None:
    """Garbage is looked for among what tests make, not each time among all that was imported and collected for them."""
    gc.collect()
    gc.freeze()


def pytest_configure(config: pytest.Config) -> None:
    """With `--seed-offset N` every seed that a test or a planted world sets is moved, before any test is read."""
    move_seeds(config.getoption("--seed-offset"))


def move_seeds(n: int) -> None:
    """See `--seed-offset`; in processes that tests start, too, which find it in their environment."""
    os.environ["SAELAB_SEED_OFFSET"] = str(n)
    offset = 1_000_000 * n
    if not offset:
        return
    default_rng = np.random.default_rng

    def is_planted() -> bool:
        file = sys._getframe(2).f_code.co_filename
        return file.startswith(PLANTED) and not file.endswith("same_seeds.py")

    class ShiftedGenerator(torch.Generator):
        def manual_seed(self, seed: int) -> torch.Generator:
            return super().manual_seed(seed + offset * is_planted())

    def shifted_rng(seed: Any = None) -> np.random.Generator:
        if not is_planted() or seed is None or isinstance(seed, np.random.Generator):
            return default_rng(seed)
        return default_rng([*seed, offset] if isinstance(seed, list | tuple) else int(seed) + offset)

    torch.Generator, np.random.default_rng = ShiftedGenerator, shifted_rng


@pytest.fixture(autouse=True)
def _doctest_names(doctest_namespace: dict[str, Any]) -> None:
    doctest_namespace.update(sl=sl, torch=torch)


@pytest.fixture(scope="session")
def tiny(request: pytest.FixtureRequest) -> Any:
    """A tiny random llama-like model: d_model 32, 3 layers, byte-level tokenizer; `--backend` chooses what runs it."""
    from saelab.lm.models import load_model

    return load_model("tiny", backend=request.config.getoption("--backend"))


@pytest.fixture(scope="session")
def tiny_tokens(tiny: Any) -> Any:
    """64 packed rows of 32 tokens of made-up text."""
    from saelab.lm.tokens import tokenize

    animals, verbs = ("cat", "dog", "owl", "fox"), ("sees", "hears", "likes", "finds")
    texts = [f"The {a} {v} the {b}." for a in animals for v in verbs for b in animals if a != b]
    return tokenize(tiny, texts * 2, ctx_len=32, n_tokens=2048)


@pytest.fixture(scope="session")
def signed_sae() -> sl.SAE:
    """An untrained SAE of the tiny model whose codes have both signs."""
    return sl.SAE(sl.SAEConfig(d_in=32, d_sae=48, activation=sl.AbsTopK(k=3), normalizer="none"), seed=0)


@pytest.fixture(scope="session")
def signed_store(tiny, tiny_tokens, signed_sae, tmp_path_factory) -> sl.FeatureStore:
    """Its store, to be read only: tests that write labels make their own."""
    out = tmp_path_factory.mktemp("signed") / "store"
    return sl.harvest(signed_sae, tiny, tiny_tokens[:16], out, hook_point="blocks.1.hook_resid_post", progress=False)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real model and text for tests; they are not part of the repository."""
    if not SHARED_DATA.is_dir():
        pytest.skip(f"no real data at {SHARED_DATA}")
    return SHARED_DATA.resolve()


@pytest.fixture(scope="session")
def pool() -> Iterator[Any]:
    """Four processes in one group, that run functions of test modules."""
    from ranks import Pool

    pool = Pool()
    yield pool
    pool.close()

"""Fixtures and doctest names for the whole repository."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Many small products: more threads only get in each other's way, and those of numpy spin while another process works.
for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(variable, "1")

import numpy as np
import pytest
import torch

import saelab as sl

torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))

# A suite started with `&` by a script inherits an ignored Ctrl-C, and so would the processes that its tests interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)

SHARED_DATA = Path(__file__).parent / ".." / "shared" / "data"


class _ShiftedGenerator(torch.Generator):
    """PyTorch's generator, every seed moved: other planted worlds, other samples, other random weights."""

    offset = 0

    def manual_seed(self, seed: int) -> "torch.Generator":
        return super().manual_seed(seed + self.offset)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--seed-offset", type=int, default=0, help="Run on other planted worlds: all seeds, moved by this."
    )


@pytest.fixture(scope="session", autouse=True)
def _seed_offset(pytestconfig: pytest.Config) -> Iterator[None]:
    """Moves every seed of the tests and of the library, with `--seed-offset N`, by N million."""
    offset = 1_000_000 * pytestconfig.getoption("--seed-offset")
    if not offset:
        yield
        return
    default_rng = np.random.default_rng

    def shifted_rng(seed: Any = None) -> np.random.Generator:
        if isinstance(seed, int | np.integer):
            return default_rng(int(seed) + offset)
        return default_rng([*seed, offset] if isinstance(seed, list | tuple) else seed)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_ShiftedGenerator, "offset", offset)
        patch.setattr(torch, "Generator", _ShiftedGenerator)
        patch.setattr(np.random, "default_rng", shifted_rng)
        yield


@pytest.fixture(autouse=True)
def _doctest_names(doctest_namespace: dict[str, Any]) -> None:
    doctest_namespace.update(sl=sl, torch=torch)


@pytest.fixture(scope="session")
def tiny() -> Any:
    """A tiny random llama-like model: d_model 32, 3 layers, byte-level tokenizer."""
    from saelab.lm.models import tiny_model

    return tiny_model()


@pytest.fixture(scope="session")
def tiny_tokens(tiny: Any) -> Any:
    """64 packed rows of 32 tokens of made-up text."""
    from saelab.lm.tokens import tokenize

    animals, verbs = ("cat", "dog", "owl", "fox"), ("sees", "hears", "likes", "finds")
    texts = [f"The {a} {v} the {b}." for a in animals for v in verbs for b in animals if a != b]
    return tokenize(tiny, texts * 2, ctx_len=32, n_tokens=2048)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real model and text for tests; they are not part of the repository."""
    if not SHARED_DATA.is_dir():
        pytest.skip(f"no real data at {SHARED_DATA}")
    return SHARED_DATA.resolve()

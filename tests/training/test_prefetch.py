"""Batches that are read ahead are those that would be read in time, and so is the position."""

import threading
from collections.abc import Mapping
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

import saelab as sl
from saelab.sae import fitting
from saelab.training.prefetch import PrefetchedBatches, prefetch

ACTS = sl.Activations.from_tensor(torch.randn(1000, 8, generator=torch.Generator().manual_seed(0)))


def plain(**settings: Any) -> Any:
    return ACTS.batches(64, seed=1, **settings)


def ahead(**settings: Any) -> PrefetchedBatches:
    return PrefetchedBatches(plain(**settings), pin=False)


def test_batches_are_the_same_to_the_end() -> None:
    found, expected = list(ahead(epochs=2)), list(plain(epochs=2))
    assert len(found) == len(expected) == 2 * (1000 // 64)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    finished = ahead(epochs=1)
    list(finished)
    assert next(finished, None) is None and next(finished, None) is None
    assert finished.d_in == 8 and iter(finished) is finished


@pytest.mark.parametrize("n_read", [0, 1, 5, 15, 16])
def test_a_position_is_that_of_the_batches_returned(n_read: int) -> None:
    one, other = ahead(), plain()
    for _ in range(n_read):
        next(one), next(other)
    assert one.state_dict() == other.state_dict()
    resumed = ahead()
    next(resumed)
    resumed.load_state_dict(one.state_dict())
    assert resumed.state_dict() == one.state_dict()
    expected = next(other)
    assert torch.equal(next(resumed), expected) and torch.equal(next(one), expected)


class Source:
    """Batches of which one fails; counts what was read."""

    d_in = 1

    def __init__(self, fails_at: int) -> None:
        self.fails_at, self.n, self.threads = fails_at, 0, set[str]()

    def __next__(self) -> Tensor:
        self.threads.add(threading.current_thread().name)
        if self.n == self.fails_at:
            raise OSError("the disk went")
        self.n += 1
        return torch.full((2, 1), float(self.n))

    def state_dict(self) -> Mapping[str, Any]:
        return {"n": self.n}

    def load_state_dict(self, state: Any) -> None:
        self.n = state["n"]


def test_an_error_is_raised_where_its_batch_is_asked_for() -> None:
    source = Source(fails_at=3)
    batches = PrefetchedBatches(source, pin=False)
    assert [float(next(batches)[0, 0]) for _ in range(3)] == [1, 2, 3]
    assert batches.state_dict() == {"n": 3}
    with pytest.raises(OSError, match="the disk went"):
        next(batches)
    assert batches.state_dict() == {"n": 3}
    source.fails_at = -1
    assert float(next(batches)[0, 0]) == 4
    assert not any("MainThread" in name for name in source.threads)


def test_at_most_one_batch_is_ahead() -> None:
    source = Source(fails_at=-1)
    batches = PrefetchedBatches(source, pin=False)
    assert source.n == 0
    for i in range(1, 6):
        next(batches)
        assert i <= source.n <= i + 1
    batches.load_state_dict({"n": 1})
    assert float(next(batches)[0, 0]) == 2


def test_only_accelerators_read_ahead() -> None:
    batches = plain()
    assert prefetch(batches, torch.device("cpu")) is batches
    with patch.object(torch.cuda, "is_available", lambda: True):
        assert isinstance(prefetch(batches, torch.device("cuda")), PrefetchedBatches)
        assert prefetch(batches, torch.device("cpu")) is batches


def test_training_and_resuming_read_ahead_alike(tmp_path: Any) -> None:
    def train(n_tokens: int, out: Any, resume: bool = False) -> sl.SAE:
        cfg = sl.SAEConfig(d_in=8, d_sae=16, activation=sl.TopK(k=2))
        run = sl.TrainConfig(n_tokens=n_tokens, batch_size=64, save_every_tokens=3 * 64)
        return sl.SAE(cfg, seed=0).fit(ACTS, run, out=out, resume=resume, progress=False)

    expected = train(20 * 64, None)
    with patch.object(fitting, "prefetch", lambda batches, device: PrefetchedBatches(batches, pin=False)):
        whole = train(20 * 64, None)
        with patch.object(PrefetchedBatches, "_read", stop_at(9)), pytest.raises(OSError):
            train(20 * 64, tmp_path)
        resumed = train(20 * 64, tmp_path, resume=True)
    for sae in (whole, resumed):
        assert all(torch.equal(a, b) for a, b in zip(sae.parameters(), expected.parameters(), strict=True))


def stop_at(n: int) -> Any:
    """A read that fails at its n-th call."""
    read, calls = PrefetchedBatches._read, []

    def limited(self: PrefetchedBatches) -> Tensor | None:
        calls.append(1)
        if len(calls) == n:
            raise OSError("the disk went")
        return read(self)

    return limited

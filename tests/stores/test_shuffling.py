"""Shuffled batches: every row once an epoch, the same for the same seed whatever the shards, restored bit for bit."""

import pytest
import torch

from saelab.stores.activations import Activations
from tests.folders import write_folder


def numbered(n: int) -> torch.Tensor:
    return torch.arange(n, dtype=torch.float32).view(n, 1)


def take(batches, n):
    return [next(batches) for _ in range(n)]


def equal(one, other) -> bool:
    return len(one) == len(other) and all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("shard_tokens", [37, 128, 1000, 5000])
@pytest.mark.parametrize("buffer_tokens", [128, 300, 1024, 1 << 17])
def test_same_batches_whatever_the_shards(tmp_path, shard_tokens, buffer_tokens):
    x = numbered(2300)
    memory = Activations.from_tensor(x).batches(100, seed=5, buffer_tokens=buffer_tokens)
    folder = Activations.load(write_folder(tmp_path, x, shard_tokens)).batches(100, seed=5, buffer_tokens=buffer_tokens)
    assert equal(take(memory, 50), take(folder, 50))


@pytest.mark.parametrize("n", [1, 127, 128, 129, 1000, 1153])
@pytest.mark.parametrize("buffer_tokens", [64, 256, 1 << 17])
def test_every_row_once_an_epoch(n, buffer_tokens):
    size = min(n, 60)
    batches = Activations.from_tensor(numbered(n)).batches(
        size, seed=1, buffer_tokens=buffer_tokens, drop_last=False, epochs=2
    )
    rows = torch.cat(list(batches)).flatten()
    for epoch in (rows[:n], rows[n:]):
        assert epoch.sort().values.tolist() == list(range(n))
    if n > 100:
        assert not torch.equal(rows[:n], rows[n:])


def test_last_short_batch():
    acts = Activations.from_tensor(numbered(25))
    assert [len(b) for b in acts.batches(10, epochs=2)] == [10, 10] * 2
    assert [len(b) for b in acts.batches(10, epochs=2, drop_last=False)] == [10, 10, 5] * 2


def test_no_end_by_default():
    batches = Activations.from_tensor(numbered(10)).batches(10)
    assert all(batch.sum() == 45 for batch in take(batches, 20))


def test_ended_stays_ended():
    batches = Activations.from_tensor(numbered(10)).batches(5, epochs=1)
    assert len(list(batches)) == 2 and list(batches) == []


def test_a_window_mixes_far_apart_rows():
    batch = next(Activations.from_tensor(numbered(100_000)).batches(1000, buffer_tokens=20_000))
    blocks = (batch.flatten() // 128).unique()
    assert len(blocks) > 140  # of the 156 blocks in a window
    assert batch.max() - batch.min() > 90_000


@pytest.mark.parametrize("drop_last", [True, False])
@pytest.mark.parametrize("n_before", [0, 1, 7, 23, 24, 60])
def test_restored_reading_goes_on_bit_for_bit(n_before, drop_last):
    acts = Activations.from_tensor(numbered(2345))
    batches = acts.batches(100, seed=2, buffer_tokens=512, drop_last=drop_last)
    take(batches, n_before)
    state = batches.state_dict()
    other = acts.batches(100, seed=77, buffer_tokens=512, drop_last=drop_last)
    take(other, 3)
    other.load_state_dict(state)
    assert equal(take(batches, 60), take(other, 60))


def test_state_is_small_and_guarded():
    batches = Activations.from_tensor(numbered(300)).batches(10)
    assert all(isinstance(value, int) for value in batches.state_dict().values())
    for other in (
        Activations.from_tensor(numbered(299)).batches(10),
        Activations.from_tensor(numbered(300)).batches(10, buffer_tokens=128),
    ):
        with pytest.raises(ValueError, match="must be what it was"):
            other.load_state_dict(batches.state_dict())


def test_seeds_differ_and_leave_the_global_state_alone():
    before = torch.get_rng_state()
    acts = Activations.from_tensor(numbered(1000))
    one, same, other = (take(acts.batches(50, seed=seed), 5) for seed in (0, 0, 1))
    assert equal(one, same) and not equal(one, other)
    assert torch.equal(torch.get_rng_state(), before)


def test_batches_are_the_readers_own():
    x = numbered(200)
    batches = Activations.from_tensor(x).batches(50)
    first = next(batches)
    kept = first.clone()
    next(batches).zero_()
    assert torch.equal(first, kept) and torch.equal(x, numbered(200))


def test_window_memory_is_bounded():
    batches = Activations.from_tensor(numbered(100_000)).batches(64, buffer_tokens=1024)
    next(batches)
    assert batches._buffer.shape == (1024, 1)


def test_stored_dtype_is_served():
    assert next(Activations.from_tensor(numbered(9).bfloat16()).batches(3)).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"batch_size": 0}, "`batch_size` must be in 1..n_tokens"),
        ({"batch_size": 101}, "`batch_size` must be in 1..n_tokens"),
        ({"batch_size": 50, "buffer_tokens": 49}, "`buffer_tokens` must be at least"),
        ({"batch_size": 50, "epochs": 0}, "`epochs` must be at least 1"),
    ],
)
def test_wrong_use_is_named(arguments, match):
    with pytest.raises(ValueError, match=match):
        Activations.from_tensor(numbered(100)).batches(**arguments)

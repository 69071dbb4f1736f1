"""The ring buffer: nothing lost, nothing served twice, evenly mixed, restored bit for bit."""

import pytest
import torch

from saelab.stores.shuffling import RingBuffer


def numbered(start: int, n: int, d_in: int = 1) -> torch.Tensor:
    return torch.arange(start, start + n, dtype=torch.float32).view(-1, 1).expand(n, d_in).contiguous()


@pytest.mark.parametrize("capacity", [8, 9, 64])
def test_every_row_is_served_once(capacity):
    ring, served, new = RingBuffer(capacity, 3, seed=1), [], 0
    for _ in range(100):
        while ring.half_empty and ring.n_free >= 3:
            ring.add(numbered(new, 3, 3))
            new += 3
        served.append(ring.sample(2))
    served.append(ring.sample(ring.n_unread))
    rows = torch.cat(served)
    assert torch.equal(rows, rows[:, :1].expand_as(rows))
    assert rows[:, 0].sort().values.tolist() == list(range(new))


def test_the_first_batch_is_an_even_draw():
    counts = torch.zeros(16)
    for seed in range(2000):
        ring = RingBuffer(16, 1, seed=seed)
        ring.add(numbered(0, 16))
        counts[ring.sample(4).flatten().long()] += 1
    # Each row is among the four with probability 1/4: mean 500, standard deviation 19.
    assert (counts - 500).abs().max() < 5 * 19.4


def test_new_rows_mix_with_kept_ones():
    ring = RingBuffer(1000, 1, seed=0)
    ring.add(numbered(0, 1000))
    ring.sample(500)
    assert ring.half_empty
    ring.add(numbered(1000, 500))
    n_new = int((ring.sample(200) >= 1000).sum())
    assert 60 < n_new < 140


def test_memory_is_taken_once():
    ring = RingBuffer(64, 2, seed=0)
    place = ring._rows.data_ptr()
    for start in range(0, 640, 32):
        if ring.half_empty:
            ring.add(numbered(start, 32, 2))
        if ring.n_unread >= 32:
            ring.sample(32)
    assert ring._rows.data_ptr() == place


def test_out_is_filled_in_place():
    ring, out = RingBuffer(8, 2), torch.zeros(4, 2)
    ring.add(numbered(0, 8, 2))
    assert ring.sample(4, out=out).data_ptr() == out.data_ptr()
    assert out.sum() > 0


@pytest.mark.parametrize("n_before", [0, 1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_restored_buffer_goes_on_bit_for_bit(n_before, dtype):
    def step(ring: RingBuffer, i: int) -> torch.Tensor:
        if ring.n_free >= 8:
            ring.add(torch.randn(8, 2, generator=torch.Generator().manual_seed(i)))
        return ring.sample(3)

    ring = RingBuffer(16, 2, dtype=dtype, seed=3)
    ring.add(numbered(0, 8, 2))  # added and not yet mixed: the state must say so
    for i in range(n_before):
        step(ring, i)
    state = {name: tensor.clone() for name, tensor in ring.state_dict().items()}
    wanted = [step(ring, i) for i in range(n_before, n_before + 12)]
    other = RingBuffer(16, 2, dtype=dtype, seed=99)
    other.load_state_dict(state)
    got = [step(other, i) for i in range(n_before, n_before + 12)]
    assert all(torch.equal(a, b) for a, b in zip(wanted, got, strict=True))


def test_state_is_a_copy():
    ring = RingBuffer(8, 1)
    ring.add(numbered(0, 8))
    state = ring.state_dict()
    before = state["rows"].clone()
    ring.sample(8)
    ring.add(numbered(100, 8))
    assert torch.equal(state["rows"], before)


def test_same_seed_same_rows_and_global_state_alone():
    before = torch.get_rng_state()
    batches = []
    for seed in (0, 0, 1):
        ring = RingBuffer(64, 1, seed=seed)
        ring.add(numbered(0, 64))
        batches.append(ring.sample(64))
    assert torch.equal(batches[0], batches[1]) and not torch.equal(batches[0], batches[2])
    assert torch.equal(torch.get_rng_state(), before)


def test_wrong_use_says_what_to_do():
    ring = RingBuffer(4, 2)
    with pytest.raises(ValueError, match="Add rows first"):
        ring.sample(1)
    with pytest.raises(ValueError, match="at most n_free"):
        ring.add(torch.zeros(5, 2))
    with pytest.raises(ValueError, match="must have d_in"):
        ring.add(torch.zeros(1, 3))
    with pytest.raises(ValueError, match="`capacity`"):
        RingBuffer(1, 2)
    with pytest.raises(ValueError, match="must fit a buffer"):
        RingBuffer(4, 3).load_state_dict(ring.state_dict())

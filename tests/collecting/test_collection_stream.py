"""Streaming: every row once an epoch, shuffled, and restored bit for bit."""

import pytest
import torch

from saelab.collecting.collection import collect, stream
from saelab.lm.masks import TokenMask
from saelab.lm.models import tiny_model
from saelab.lm.tokens import tokenize
from saelab.stores.files import save_tensors
from saelab.stores.tensors import load_tensors

HOOK = "blocks.0.hook_resid_post"
SIZES = {"batch_size": 20, "buffer_tokens": 128, "n_seq": 2}


@pytest.fixture(scope="module")
def model():
    return tiny_model(n_layers=1)


@pytest.fixture(scope="module")
def tokens(model):
    return tokenize(model, [f"{i} cats sat on a mat." for i in range(12)], ctx_len=16)


def take(batches, n):
    return [next(batches) for _ in range(n)]


def equal(one, other) -> bool:
    return len(one) == len(other) and all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def in_order(rows):
    return torch.tensor(sorted(rows.tolist()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_epoch_is_what_collect_gives_in_another_order(model, tokens, dtype):
    collected = collect(model, tokens, HOOK, dtype=dtype, progress=False)
    batches = stream(model, tokens, HOOK, dtype=dtype, epochs=1, **SIZES | {"batch_size": 1})
    rows = torch.cat(list(batches))
    assert rows.dtype == dtype and batches.d_in == 32 and len(rows) == len(collected)
    torch.testing.assert_close(in_order(rows.float()), in_order(collected[:].float()), atol=1e-5, rtol=1e-2)
    assert not torch.equal(rows[:20], collected[:20])
    assert batches.provenance.removed == collected.provenance.removed
    assert batches.provenance.n_tokens == len(rows) and batches.provenance.seed == 0


def test_it_ends_when_the_rows_left_fill_no_batch(model, tokens):
    n = len(collect(model, tokens, HOOK, progress=False))
    batches = stream(model, tokens, HOOK, epochs=2, **SIZES)
    assert [len(batch) for batch in batches] == [20] * (2 * n // 20)
    assert list(batches) == []


def test_without_epochs_there_is_no_end(model, tokens):
    batches = stream(model, tokens, HOOK, **SIZES)
    take(batches, 40)
    assert batches.provenance.n_tokens > 3 * tokens.n_tokens / 2


@pytest.mark.parametrize("n_before", [0, 1, 4, 15, 31])
def test_restored_stream_goes_on_bit_for_bit(model, tokens, tmp_path, n_before):
    batches = stream(model, tokens, HOOK, mask=TokenMask(max_norm_ratio=1.2), **SIZES)
    take(batches, n_before)
    state = batches.state_dict()
    # As a checkpoint keeps it.
    save_tensors(tmp_path / "state", {name: x for name, x in state.items() if isinstance(x, torch.Tensor)})
    state = state | load_tensors(tmp_path / "state")
    wanted, removed = take(batches, 14), batches.removed  # more than the buffer holds, and more than an epoch
    other = stream(model, tokens, HOOK, mask=TokenMask(max_norm_ratio=1.2), **SIZES)
    take(other, 3)
    other.load_state_dict(state)
    assert equal(wanted, take(other, 14))
    assert other.removed == removed and removed["norm"] > 0


@pytest.mark.parametrize(
    "change",
    [{"seed": 1}, {"buffer_tokens": 256}, {"n_seq": 1}, {"mask": TokenMask(special=False)}, {"tokens": slice(0, 8)}],
)
def test_the_state_of_another_stream_is_refused(model, tokens, change):
    state = stream(model, tokens, HOOK, **SIZES).state_dict()
    arguments = {"model": model, "tokens": tokens, "hook_point": HOOK, **SIZES, **change}
    if "tokens" in change:
        arguments["tokens"] = tokens[change["tokens"]]
    with pytest.raises(ValueError, match="must be what it was when the state was saved"):
        stream(**arguments).load_state_dict(state)


def test_seeds_differ_and_leave_the_global_state_alone(model, tokens):
    before = torch.get_rng_state()
    one, same, other = (take(stream(model, tokens, HOOK, seed=seed, **SIZES), 10) for seed in (0, 0, 1))
    assert equal(one, same) and not equal(one, other)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_batch_is_the_readers_own(model, tokens):
    batches = stream(model, tokens, HOOK, **SIZES)
    first = next(batches)
    kept = first.clone()
    take(batches, 10)
    assert torch.equal(first, kept)


@pytest.mark.parametrize("change", [{"buffer_tokens": 39}, {"batch_size": 65}, {"n_seq": 5}, {"batch_size": 0}])
def test_too_small_a_buffer_is_named(model, tokens, change):
    with pytest.raises(ValueError, match="`buffer_tokens` must be at least twice"):
        stream(model, tokens, HOOK, **SIZES | change)

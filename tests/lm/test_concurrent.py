"""Several forward passes at a time: the values of one at a time, in order, and nothing left behind."""

import threading
import time
from collections import Counter
from contextlib import closing

import pytest
import torch

from saelab.collecting.collection import collect
from saelab.lm.concurrent import MOST_AT_ONCE, make_captures, map_in_order
from saelab.lm.hooks import capture, replace_activations
from saelab.lm.models import tiny_model
from saelab.lm.tokens import tokenize

HOOKS = ["blocks.0.hook_resid_post", "blocks.1.hook_resid_pre"]


@pytest.fixture(autouse=True)
def three_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_captures_at_once_have_the_values_of_one(architecture):
    model = tiny_model(architecture=architecture)
    ids = [torch.randint(0, 200, (3, 8), generator=torch.Generator().manual_seed(i)) for i in range(24)]
    captures = make_captures(model, HOOKS)
    assert len(captures) == 3, "as many as torch has threads"
    with closing(map_in_order(captures, ids)) as found:
        for batch, acts in zip(ids, found, strict=True):
            expected = capture(model, batch, HOOKS)
            assert list(acts) == HOOKS
            assert all(torch.equal(acts[name], expected[name]) for name in HOOKS)
    assert all(not module._forward_hooks for module in model.original_model.modules()), "a hook is left"


def test_threads_are_few_and_models_that_gain_nothing_run_alone():
    torch.set_num_threads(MOST_AT_ONCE + 3)
    model = tiny_model()
    assert len(make_captures(model, HOOKS)) == MOST_AT_ONCE
    with replace_activations(model, {"blocks.0.hook_resid_post": torch.zeros_like}):
        assert make_captures(model, HOOKS) == [], "the edit would not be felt"
    seen = []
    handle = model.original_model.register_forward_hook(lambda *_: seen.append(1))
    assert make_captures(model, HOOKS) == [], "a user's hook would not run"
    handle.remove()
    model.cfg.d_model = 4096
    assert make_captures(model, HOOKS) == []
    model.cfg.d_model = 32
    torch.set_num_threads(1)
    assert make_captures(model, HOOKS) == []


def test_results_come_in_order_and_each_worker_has_one_item_at_a_time():
    busy, threads = Counter(), set()

    def worker(name):
        def work(item):
            busy[name] += 1
            assert busy[name] == 1, "two items at a time"
            threads.add(torch.get_num_threads())
            time.sleep(0.002 * (7 * item % 5))
            busy[name] -= 1
            return item, name

        return work

    torch.set_num_threads(4)
    found = list(map_in_order([worker("a"), worker("b")], range(30)))
    assert [item for item, _ in found] == list(range(30))
    assert {name for _, name in found} == {"a", "b"}
    assert threads == {2}, "torch's threads are divided"
    assert torch.get_num_threads() == 4


def test_an_error_comes_in_its_turn_and_ends_the_threads():
    def work(item):
        if item == 3:
            raise ValueError("the third")
        return item

    found = []
    with pytest.raises(ValueError, match="the third"):
        found.extend(map_in_order([work, work], range(1000)))
    assert found == [0, 1, 2] and torch.get_num_threads() == 3
    with closing(map_in_order([work, work], range(3))) as results:
        assert next(results) == 0
    assert torch.get_num_threads() == 3
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("forward")]


def test_an_iterator_left_early_reads_no_more():
    seen = []
    with closing(map_in_order([seen.append, seen.append], range(1000))) as results:
        next(results)
    assert len(seen) <= 4


def test_a_folder_has_the_same_bytes_with_one_thread_and_with_three(tmp_path):
    model = tiny_model(n_layers=2)
    tokens = tokenize(model, [f"{i} cats sat on a mat." for i in range(40)], ctx_len=16)
    for n, name in ((3, "three"), (1, "one")):
        torch.set_num_threads(n)
        collect(model, tokens, HOOKS, tmp_path / name, batch_size=4, shard_tokens=30, progress=False)
    one, three = ({p.name: p.read_bytes() for p in (tmp_path / n).iterdir()} for n in ("one", "three"))
    assert one == three


def test_a_row_that_is_not_finite_is_named_from_a_thread():
    model = tiny_model(n_layers=2)
    tokens = tokenize(model, [f"{i} cats sat on a mat." for i in range(40)], ctx_len=16)
    with torch.no_grad():
        next(model.parameters()).fill_(torch.inf)
    with pytest.raises(ValueError, match="finite"):
        collect(model, tokens, HOOKS, batch_size=4, progress=False)
    assert torch.get_num_threads() == 3

"""Hooks of others on a model: they take part in every forward of the user's, and in none of saelab's own."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

import saelab as sl
from saelab.lm.generation import GREEDY
from saelab.lm.hook_points import hook_points_of
from saelab.lm.models import tiny_model

PLACE = "blocks.1.hook_resid_post"
AFTER = "blocks.2.hook_resid_post"


def some_ids(rows: int = 2, length: int = 9) -> Tensor:
    return torch.randint(3, 250, (rows, length), generator=torch.Generator().manual_seed(0))


def first(x: Any) -> Tensor:
    return x[0] if isinstance(x, tuple) else x


def added(output: Any) -> Any:
    """What a user's hook makes of a module's output."""
    return (output[0] + 0.5, *output[1:]) if isinstance(output, tuple) else output + 0.5


@contextmanager
def by_torch(model: Any, calls: list) -> Iterator[None]:
    """A forward hook on a wrapped module of Hugging Face's."""
    block = model.blocks[0].original_component
    with block.register_forward_hook(lambda _m, _i, out: calls.append(first(out).shape) or added(out)):
        yield


@contextmanager
def by_pre_hook(model: Any, calls: list) -> Iterator[None]:
    """A pre-hook with keyword arguments on the module behind."""

    def change(_module: Any, args: tuple, kwargs: dict) -> Any:
        calls.append(None)
        if args:
            return (args[0] + 0.5, *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": kwargs["hidden_states"] + 0.5}

    with model.blocks[1].register_forward_pre_hook(change, with_kwargs=True):
        yield


@contextmanager
def by_transformer_lens(model: Any, calls: list) -> Iterator[None]:
    model.blocks[0].hook_out.add_hook(lambda x, hook: calls.append(x.shape) or x + 0.5)
    yield
    model.blocks[0].hook_out.remove_hooks("fwd")


@contextmanager
def by_hooks_context(model: Any, calls: list) -> Iterator[None]:
    with model.hooks(fwd_hooks=[("blocks.0.hook_out", lambda x, hook: calls.append(x.shape) or x + 0.5)]):
        yield


@contextmanager
def by_global_hook(model: Any, calls: list) -> Iterator[None]:
    """PyTorch's hook of all modules, which minds one."""

    def change(module: Any, _args: Any, output: Any) -> Any:
        if module is model.blocks[0]:
            calls.append(None)
            return added(output)
        return None

    with torch.nn.modules.module.register_module_forward_hook(change):
        yield


WAYS = [by_torch, by_pre_hook, by_transformer_lens, by_hooks_context, by_global_hook]
ways = pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)


@pytest.fixture(params=["llama", "gpt2"])
def fresh(request: pytest.FixtureRequest) -> Any:
    """A model that saelab has not seen."""
    return tiny_model(architecture=request.param, backend="transformer_lens")


@pytest.fixture(params=[False, True], ids=["at once", "later"])
def model(request: pytest.FixtureRequest) -> Any:
    """A model with hooks put on before saelab has used it, or after."""
    made = tiny_model(backend="transformer_lens")
    if request.param:
        sl.lm.capture(made, some_ids(), [PLACE])
    return made


@ways
def test_a_hook_of_the_users_takes_part_and_is_not_probed(model: Any, way: Callable) -> None:
    ids, calls, edits = some_ids(), [], []
    with sl.splice(tiny_model(backend="transformer_lens"), {"blocks.0.hook_resid_post": lambda x: x + 0.5}) as same:
        expected, x = sl.lm.logits(same, ids), sl.lm.capture(same, ids, [AFTER])[AFTER]
        with sl.splice(same, {PLACE: lambda x: 2 * x}):
            doubled = sl.lm.logits(same, ids)
    with way(model, calls):
        torch.testing.assert_close(sl.lm.logits(model, ids), expected, rtol=1e-4, atol=1e-5)
        assert len(calls) == 1  # a forward of the user's, and no other
        torch.testing.assert_close(sl.lm.capture(model, ids, [AFTER])[AFTER], x, rtol=1e-4, atol=1e-5)
        with sl.splice(model, {PLACE: lambda x: edits.append(x.shape) or 2 * x}):
            assert edits == [] and len(calls) == 2
            torch.testing.assert_close(sl.lm.logits(model, ids), doubled, rtol=1e-4, atol=1e-5)
        assert edits == [(2, 9, 32)] and len(calls) == 3
    sl.lm.logits(model, ids)
    assert len(calls) == 3


def test_gradients_run_through_hooks_of_the_users(fresh: Any) -> None:
    """A backward hook that doubles what comes in doubles the gradient behind it."""
    ids = some_ids()

    def gradient(factor: float) -> Tensor:
        moved = torch.zeros(2, 9, 32, requires_grad=True)
        with sl.splice(fresh, {"blocks.0.hook_out": lambda x: x.detach() + moved}):
            sl.lm.logits(fresh, ids, grad=True).square().sum().backward()
        assert moved.grad is not None
        return moved.grad / factor

    clean = gradient(1)
    fresh.blocks[1].hook_out.add_hook(lambda g, hook: 2 * g, dir="bwd")
    torch.testing.assert_close(gradient(2), clean, rtol=1e-3, atol=1e-4)


@ways
def test_all_uses_of_a_hooked_model(way: Callable, tiny_tokens: Any) -> None:
    """With somebody's hook, everything gives what a model gives whose weights do what the hook does."""
    sae = sl.SAE(sl.SAEConfig(d_in=32, d_sae=64, activation=sl.TopK(k=4)), seed=1)
    tokens, results = tiny_tokens[:8], []
    for hooked in (True, False):
        model = tiny_model(backend="transformer_lens")
        with way(model, []) if hooked else sl.splice(model, {"blocks.0.hook_resid_post": lambda x: x + 0.5}):
            found = sl.evaluate(sae, model, tokens, hook_point=PLACE, progress=False)
            effects = sl.interventions.attribute(model, sae, "ab", "c", hook_point=PLACE, progress=False)
            with sl.steer(model, sae, {3: 5.0}, hook_point=PLACE):
                text = sl.generate(model, "ab", 5, sampling=GREEDY, progress=False).samples[0].ids
            results.append((text, found, effects))
    (text, found, effects), (same_text, same_found, same_effects) = results
    assert text == same_text
    for name in ("fvu", "ce_clean", "ce_sae", "ce_zero", "kl"):
        assert getattr(found, name) == pytest.approx(getattr(same_found, name), abs=1e-4)
    assert (effects.features == same_effects.features).all()
    assert effects.effects == pytest.approx(same_effects.effects, abs=1e-5)


def test_hook_points_are_cached(fresh: Any) -> None:
    fresh.add_hook("blocks.0.hook_out", lambda x, hook: None)
    first = hook_points_of(fresh)
    sl.lm.logits(fresh, some_ids())
    with sl.splice(fresh, {PLACE: lambda x: x + 1}):
        assert hook_points_of(fresh) is first


def test_an_sae_on_a_module_of_the_bridge_is_a_hook_too(fresh: Any) -> None:
    sae = sl.SAE(sl.SAEConfig(d_in=32, d_sae=64, activation=sl.TopK(k=4)), seed=1)
    ids = some_ids()
    with sl.splice(fresh, {PLACE: lambda x: sae(x)}):
        expected = sl.lm.logits(fresh, ids)
    with sl.sae.hook_sae(fresh.blocks[1], sae):
        torch.testing.assert_close(sl.lm.logits(fresh, ids), expected, rtol=1e-4, atol=1e-5)


def test_weights_edited_inside_a_block(fresh: Any) -> None:
    """Hook points are found again then, with nothing that runs the edit."""
    ids, calls = some_ids(), []
    with sl.splice(fresh, {PLACE: lambda x: calls.append(1) or x + 1}), torch.no_grad():
        before = sl.lm.logits(fresh, ids)
        for weight in fresh.blocks[2].parameters():
            weight.mul_(1.5)
        after, itself = sl.lm.logits(fresh, ids), fresh(ids)
    assert len(calls) == 3
    torch.testing.assert_close(after, itself, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(after, before, atol=1e-3)


def test_hooks_on_the_bridge_itself_are_refused(model: Any) -> None:
    ids = some_ids()
    for register in (model.register_forward_pre_hook, model.register_forward_hook):
        with register(lambda *_: None), pytest.raises(ValueError, match="one on the bridge itself"):
            sl.lm.logits(model, ids)
    assert sl.lm.logits(model, ids).shape == (*ids.shape, 259)


def test_every_module_may_have_a_hook(fresh: Any) -> None:
    """Hooks that only look change nothing, wherever they are."""
    ids = some_ids()
    clean = sl.lm.logits(fresh, ids)
    hooked = set()
    for module in {*fresh.modules(), *fresh.original_model.modules()} - {fresh}:
        module.register_forward_hook(lambda m, _i, _o: hooked.add(m))
        module.register_forward_pre_hook(lambda _m, _a, _k: None, with_kwargs=True)
    assert sl.lm.verify_hooks(fresh).ok
    torch.testing.assert_close(sl.lm.logits(fresh, ids), clean, rtol=1e-4, atol=1e-5)
    with sl.splice(fresh, {PLACE: lambda x: x.roll(1, -1)}):
        assert not torch.allclose(sl.lm.logits(fresh, ids), clean, atol=1e-3)
    assert fresh.blocks[0] in hooked


def test_hooks_of_an_object_are_not_on_its_copy(fresh: Any) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    hf_model = GPT2LMHeadModel(GPT2Config(vocab_size=259, n_embd=16, n_layer=1, n_head=2)).eval()
    hf_model.transformer.h[0].register_forward_hook(lambda *_: None)
    with pytest.warns(UserWarning, match="hooks of its own"):
        sl.load_model(hf_model, tokenizer=fresh.tokenizer, backend="transformer_lens")

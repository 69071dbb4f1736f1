"""Reading and replacing activations: the right tensors, once, and nothing left behind."""

import gc
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from saelab.lm.hooks import capture, find_hook_point, logits, next_token_loss, replace_activations
from saelab.lm.models import load_model, tiny_model
from saelab.lm.verification import verify_hooks

POST = "blocks.1.hook_resid_post"


def some_ids(rows: int = 3, length: int = 12, seed: int = 0) -> Tensor:
    return torch.randint(3, 250, (rows, length), generator=torch.Generator().manual_seed(seed))


def count_hooks(model: Any) -> int:
    """Every forward hook on the model."""
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.original_model.modules())


@pytest.fixture(params=["llama", "gpt2"], scope="module")
def model(request: pytest.FixtureRequest) -> Iterator[Any]:
    """Shared by the tests that leave a model as it was, which is checked at the end."""
    model = tiny_model(architecture=request.param, backend="transformer_lens")
    logits(model, some_ids())
    before = count_hooks(model), {name: p.clone() for name, p in model.named_parameters()}
    yield model
    assert count_hooks(model) == before[0]
    assert all(torch.equal(p, before[1][name]) and p.grad is None for name, p in model.named_parameters())
    assert not any(module.training for module in model.original_model.modules())


@pytest.fixture(params=["llama", "gpt2"])
def fresh(request: pytest.FixtureRequest) -> Any:
    """For tests that change it, or that are about the first look at a hook point."""
    return tiny_model(architecture=request.param, backend="transformer_lens")


def test_old_and_canonical_spellings_are_the_same_tensor(model: Any) -> None:
    ids = some_ids()
    pairs = [(POST, "blocks.1.hook_out"), ("blocks.1.hook_resid_pre", "blocks.1.hook_in")]
    pairs += [("blocks.1.hook_mlp_out", "blocks.1.mlp.hook_out"), ("blocks.1.hook_attn_out", "blocks.1.attn.hook_out")]
    for old, new in pairs:
        x = capture(model, ids, [old, new])
        assert torch.equal(x[old], x[new])
        assert find_hook_point(model, old) == old


def test_captured_is_what_the_bridge_caches(fresh: Any) -> None:
    ids = some_ids()
    names = ["blocks.0.hook_in", "blocks.0.hook_attn_out", "blocks.1.hook_mlp_out", POST, "blocks.2.attn.hook_z"]
    names += ["blocks.2.ln1.hook_normalized"]
    _, cache = fresh.run_with_cache(ids)
    for name, x in capture(fresh, ids, names).items():
        torch.testing.assert_close(x, cache[name].reshape(x.shape), rtol=1e-4, atol=1e-5)


def test_logits_are_the_bridges(model: Any) -> None:
    ids = some_ids()
    with torch.no_grad():
        torch.testing.assert_close(logits(model, ids), model(ids), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", ["huggingface", "transformer_lens"])
def test_the_forward_stops_after_the_last_hook_needed(backend: str) -> None:
    fresh: Any = tiny_model(backend=backend)
    names = ["blocks.0.hook_resid_post", "blocks.1.ln1.hook_normalized"]
    capture(fresh, some_ids(), names)
    ran: list[str] = []
    for name, module in fresh.original_model.named_modules():
        if name.rpartition(".")[2] in {"0", "1", "2", "lm_head"}:
            module.register_forward_pre_hook(lambda *_, name=name: ran.append(name[-1]))
    capture(fresh, some_ids(), names)
    assert ran == ["0", "1"]
    ran.clear()
    capture(fresh, some_ids(), names, stop=False)
    assert ran == ["0", "1", "2", "d"]


def test_wrong_names_list_at_most_five_near_ones(model: Any) -> None:
    with pytest.raises(ValueError, match=r"'blocks\.9\.hook_resid_post'") as error:
        capture(model, some_ids(), ["blocks.9.hook_resid_post"])
    assert "blocks.2.hook_resid_post" in str(error.value)
    assert 1 <= str(error.value).count("blocks.") - 1 <= 5
    with pytest.raises(ValueError, match="got 'zzz'"):
        find_hook_point(model, "zzz")
    with pytest.raises(ValueError), replace_activations(model, {"nowhere": torch.zeros_like}):
        pass


def test_a_hook_that_does_not_fire_is_an_error_with_its_count(model: Any) -> None:
    silent = "blocks.1.hook_q_input"  # fires only with an option of the bridge
    with pytest.raises(RuntimeError, match=f"'{silent}' fired 0 times"):
        capture(model, some_ids(), [silent])
    with pytest.raises(RuntimeError, match="fired 0 times"), replace_activations(model, {silent: torch.zeros_like}):
        pass


def test_a_hook_that_fires_twice_is_an_error_with_its_count(fresh: Any) -> None:
    block = fresh.original_model.get_submodule("model.layers" if fresh.cfg.final_rms else "transformer.h")
    block[2] = block[1]  # one module at two depths
    with pytest.raises(RuntimeError, match="fired 2 times"):
        capture(fresh, some_ids(), [POST])


def test_only_one_vector_per_token_is_captured(model: Any) -> None:
    with pytest.raises(ValueError, match="one vector per token"):
        capture(model, some_ids(), ["blocks.1.attn.hook_pattern"])


def test_padding_on_the_right_changes_nothing(model: Any) -> None:
    ids = some_ids(rows=1, length=7)
    padded = torch.nn.functional.pad(ids, (0, 5), value=0)
    for name in (POST, "blocks.1.ln2.hook_normalized"):
        alone, together = capture(model, ids, [name])[name], capture(model, padded, [name])[name]
        torch.testing.assert_close(together[:, :7], alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", [POST, "blocks.1.hook_mlp_out", "blocks.1.attn.hook_z"])
def test_splice_changes_what_flows_on_everywhere(fresh: Any, name: str) -> None:
    ids, seen = some_ids(), []

    def edit(x: Tensor) -> Tensor:
        seen.append(x.shape)
        return x * 0 + 0.5

    after = "blocks.2.hook_resid_post"
    clean = capture(fresh, ids, [after])[after]
    with replace_activations(fresh, {name: edit}):
        inside = capture(fresh, ids, [name, after])
        spliced, by_itself = logits(fresh, ids), fresh(ids).detach()
    assert seen == [(*ids.shape, 32)] * 3  # never called by saelab's own probing
    assert (inside[name] == 0.5).all()
    assert not torch.allclose(inside[after], clean, atol=1e-3)
    torch.testing.assert_close(spliced, by_itself, rtol=1e-4, atol=1e-5)
    assert torch.equal(capture(fresh, ids, [after])[after], clean)


def test_an_identity_edit_changes_nothing(model: Any) -> None:
    ids = some_ids()
    clean = logits(model, ids)
    with replace_activations(model, {POST: lambda x: x}):
        assert torch.equal(logits(model, ids), clean)


def test_edits_may_work_in_place(model: Any) -> None:
    ids, shift = some_ids(), torch.arange(32.0)
    name = "blocks.1.ln2.hook_in"  # the same tensor also goes around the MLP, where the edit must not show
    with replace_activations(model, {name: lambda x: x + shift}):
        expected = logits(model, ids)
    with replace_activations(model, {name: lambda x: x.add_(shift)}):
        assert torch.equal(logits(model, ids), expected)


def test_splices_nest(model: Any) -> None:
    ids = some_ids()
    with replace_activations(model, {POST: lambda x: x + 1, "blocks.0.hook_mlp_out": torch.zeros_like}):
        with replace_activations(model, {POST: lambda x: 2 * x}):
            both = capture(model, ids, [POST])[POST]
        one = capture(model, ids, [POST])[POST]
    torch.testing.assert_close(both, 2 * one)


def test_a_new_hook_point_inside_a_splice_sees_the_edit(fresh: Any) -> None:
    calls: list[Tensor] = []
    with replace_activations(fresh, {"blocks.0.hook_resid_post": lambda x: calls.append(x) or torch.ones_like(x)}):
        x = capture(fresh, some_ids(), ["blocks.1.hook_resid_pre"])["blocks.1.hook_resid_pre"]
    assert (x == 1).all()
    assert len(calls) == 1


def test_nothing_is_left_behind_even_after_errors(model: Any) -> None:
    ids = some_ids()
    logits(model, ids)
    before = count_hooks(model)
    parameters = {name: p.clone() for name, p in model.named_parameters()}

    def broken(x: Tensor) -> Tensor:
        raise KeyError("edit")

    capture(model, ids, [POST])
    for failing in (broken, lambda x: x[:, :1], lambda x: 3.0):
        with (
            pytest.raises((KeyError, ValueError)),
            replace_activations(model, {POST: failing, "blocks.2.hook_out": torch.relu}),
        ):
            logits(model, ids)
    with pytest.raises(ValueError, match=r"ids must be in 0\.\."):
        capture(model, ids + 10_000, [POST])
    with pytest.raises(IndexError), torch.no_grad():
        model(torch.full((1, 2), 10_000))
    assert count_hooks(model) == before
    assert all(torch.equal(p, parameters[name]) for name, p in model.named_parameters())
    assert not capture(model, ids, [POST])[POST].requires_grad


def test_a_wrong_edit_is_named(model: Any) -> None:
    with replace_activations(model, {POST: lambda x: x[..., :-1]}), pytest.raises(ValueError, match=POST):
        logits(model, some_ids())


def test_edits_come_back_to_the_models_dtype(model: Any) -> None:
    with replace_activations(model, {POST: lambda x: x.double()}):
        assert logits(model, some_ids()).dtype == torch.float32


def test_splice_lets_gradients_through(model: Any) -> None:
    shift = torch.zeros(32, requires_grad=True)
    with replace_activations(model, {POST: lambda x: x + shift}):
        (gradient,) = torch.autograd.grad(model(some_ids()).square().mean(), shift)
    assert gradient.abs().max() > 0


def test_hooks_of_the_user_are_seen(fresh: Any) -> None:
    ids = some_ids()
    clean = capture(fresh, ids, [POST])[POST]
    handle = fresh.blocks[0].hook_out.register_forward_hook(lambda _m, _i, x: x + 1)
    edited = capture(fresh, ids, [POST])[POST]
    handle.remove()
    assert not torch.allclose(edited, clean, atol=1e-3)
    assert torch.equal(capture(fresh, ids, [POST])[POST], clean)


@torch.no_grad()
@pytest.mark.parametrize(("part", "factor"), [("", 0.5), ("attn.q", 4)])  # GPT-2's bridge has query weights of its own
def test_edited_weights_are_seen(fresh: Any, part: str, factor: float) -> None:
    ids = some_ids()
    clean = capture(fresh, ids, [POST])[POST]
    for parameter in fresh.blocks[1].get_submodule(part).parameters():
        parameter.mul_(factor)
    _, cache = fresh.run_with_cache(ids)
    edited = capture(fresh, ids, [POST])[POST]
    assert not torch.allclose(edited, clean, atol=1e-3)
    torch.testing.assert_close(edited, cache[POST], rtol=1e-4, atol=1e-5)


def test_processed_weights_are_seen(fresh: Any) -> None:
    ids = some_ids()
    clean = capture(fresh, ids, [POST])[POST]
    fresh.enable_compatibility_mode()
    _, cache = fresh.run_with_cache(ids)
    torch.testing.assert_close(capture(fresh, ids, [POST])[POST], cache[POST], rtol=1e-3, atol=1e-4)
    if not fresh.cfg.final_rms:  # centring is for LayerNorm models
        assert not torch.allclose(cache[POST], clean, atol=1e-3)
    with pytest.raises(ValueError, match="raw weights"):
        verify_hooks(fresh)


def test_dropout_is_off_and_the_training_flag_stays(fresh: Any) -> None:
    ids = some_ids()
    clean = {name: capture(fresh, ids, [name])[name] for name in (POST, "blocks.1.ln1.hook_normalized")}
    fresh.original_model.train()
    for name, x in clean.items():
        assert torch.equal(capture(fresh, ids, [name])[name], x)
    assert all(module.training for module in fresh.original_model.modules())


@pytest.mark.parametrize("backend", ["huggingface", "transformer_lens"])
def test_a_forgotten_model_is_freed(backend: str) -> None:
    model = tiny_model(backend=backend)
    capture(model, some_ids(), [POST])
    alive = weakref.ref(model.original_model)
    del model
    gc.collect()
    assert alive() is None


def test_hooks_agree_with_hugging_face(model: Any) -> None:
    result = verify_hooks(model)
    assert result.ok
    assert len(result.hook_points) == model.cfg.n_layers + 1
    assert "agree" in str(result) and result.to_dict()["ok"] is True


def test_verification_can_fail(model: Any) -> None:
    with replace_activations(model, {POST: lambda x: 1.01 * x + 0.01}):
        result = verify_hooks(model)
    assert not result.ok
    assert max(result.captured[:2]) < 1e-6 and result.captured[2] > 1e-3


def test_verification_sees_a_wrong_bridge(fresh: Any) -> None:
    fresh.blocks[1].hook_out.register_forward_hook(lambda _m, _i, x: x + 0.1)
    assert not verify_hooks(fresh, some_ids()).ok


def test_loss_is_cross_entropy_in_nats() -> None:
    scores = torch.randn(2, 5, 11, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    ids = some_ids(2, 5) % 11
    expected = -scores.log_softmax(-1)[:, :-1].gather(-1, ids[:, 1:, None])[..., 0]
    torch.testing.assert_close(next_token_loss(scores.float(), ids), expected.float())
    assert next_token_loss(scores.bfloat16(), ids.int()).dtype == torch.float32


def test_the_real_model_agrees_with_hugging_face(shared_data: Path) -> None:
    model = load_model(shared_data / "stories260k", device="cpu")
    result = verify_hooks(model, some_ids(4, 64))
    assert max(result.captured) <= 1e-6 and model.original_model.config._attn_implementation == "sdpa"
    bridge = load_model(shared_data / "stories260k", device="cpu", backend="transformer_lens")
    assert max(verify_hooks(bridge, some_ids(4, 64)).captured) <= 1e-5


def test_rows_beyond_learned_positions_are_said_to_be_too_long() -> None:
    model = tiny_model(architecture="gpt2", ctx_len=16)
    ids = torch.ones(1, 20, dtype=torch.long)
    for read in (lambda: logits(model, ids), lambda: capture(model, ids, [POST])):
        with pytest.raises(ValueError, match="must fit the model's context of 16 tokens, got 20"):
            read()

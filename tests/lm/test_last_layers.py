"""A model's own logits from its own residual stream, alone or through the model, and what stays as it was."""

import pytest
import torch
from test_hook_points import LLAMA_LIKE, random_model, some_ids

import saelab as sl
from saelab.lm.hook_points import hook_points_of
from saelab.lm.last_layers import LastLayers
from saelab.lm.verification import find_residuals

CAPPED = {"head_dim": 8, "final_logit_softcapping": 5.0, "num_key_value_heads": 2}
FAMILIES = {
    "llama": ("Llama", {}, True),
    "granite": ("Granite", {"logits_scaling": 8.0}, True),
    "gemma2": ("Gemma2", CAPPED, False),  # a head alone would leave out the softcap
}


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_the_models_own(family: str) -> None:
    name, sizes, is_alone = FAMILIES[family]
    _, model = random_model(f"{name}ForCausalLM", f"{name}Config", "auto", hidden_size=32, **LLAMA_LIKE, **sizes)
    last, ids = LastLayers.measure(model), some_ids(2, 6)
    bridge = sl.load_model(model.original_model, tokenizer=model.tokenizer, backend="transformer_lens")
    assert LastLayers.measure(bridge).norm is None  # a bridge runs whole
    assert (last.norm is not None) is is_alone
    x = sl.lm.capture(model, ids, [last.last])[last.last]
    assert torch.allclose(last(x.flatten(0, 1)), sl.lm.logits(model, ids).flatten(0, 1), atol=1e-4)
    earlier = find_residuals(hook_points_of(model))[1]
    y = 2 * sl.lm.capture(model, ids, [earlier])[earlier]
    with sl.splice(model, {last.last: lambda _: y}):
        expected = sl.lm.logits(model, ids).flatten(0, 1)
    assert torch.allclose(last(y.flatten(0, 1)), expected, atol=1e-4)  # whatever is put there is read alike


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_gradients_are_the_slopes_and_the_model_keeps_its_own(family: str) -> None:
    name, sizes, _ = FAMILIES[family]
    _, model = random_model(f"{name}ForCausalLM", f"{name}Config", "auto", hidden_size=32, **LLAMA_LIKE, **sizes)
    last = LastLayers.measure(model)
    x = torch.randn(3, 32, generator=torch.Generator().manual_seed(0)).requires_grad_()
    with torch.enable_grad():
        (slope,) = torch.autograd.grad(last(x)[:, 5].sum(), x)
    step = 1e-2 * torch.randn(3, 32, generator=torch.Generator().manual_seed(1))
    sides = [last(x.detach() + sign * step)[:, 5].double() for sign in (1, -1)]
    assert torch.allclose((sides[0] - sides[1]) / 2, (slope * step).sum(1).double(), rtol=0.02, atol=1e-4)
    assert all(weight.grad is None for weight in model.parameters())
    with torch.no_grad():
        assert not last(x).requires_grad

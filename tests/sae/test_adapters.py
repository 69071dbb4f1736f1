"""An SAE inside plain torch modules: a Hugging Face model without TransformerLens."""

import pytest
import torch
from torch import nn
from unchecked import unchecked

import saelab as sl
from saelab.sae.adapters import hook_sae

D = 32


@pytest.fixture(scope="module")
def llama():
    """A plain random Llama of two layers."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": D, "intermediate_size": 2 * D, "num_attention_heads": 4, "num_hidden_layers": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=64, max_position_embeddings=32, **sizes)).eval()
    with torch.no_grad():
        for i, weight in enumerate(model.parameters()):
            weight.copy_(0.1 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(i)))
    return model


@pytest.fixture
def ids():
    return torch.arange(5, 25).view(2, 10)


def some_sae(activation=None, **axes):
    """Reconstructs badly, so that replacing is seen."""
    return sl.SAE(sl.SAEConfig(d_in=D, d_sae=64, activation=activation or sl.AbsTopK(k=4), **axes), seed=1)


def logits(model, ids):
    with torch.no_grad():
        return model(ids, use_cache=False).logits


def hidden(model, ids):
    """What the second layer is given."""
    seen = []

    def look(_, args, kwargs):
        seen.append(args[0] if args else kwargs["hidden_states"])

    handle = model.model.layers[1].register_forward_pre_hook(look, with_kwargs=True)
    try:
        logits(model, ids)
    finally:
        handle.remove()
    return seen[0]


def hooks_of(model):
    return [hook for m in model.modules() for hook in (*m._forward_hooks.values(), *m._forward_pre_hooks.values())]


def test_the_reconstruction_flows_on_and_codes_are_recorded(llama, ids):
    layer, sae = llama.model.layers[0], some_sae()
    x, before = hidden(llama, ids), logits(llama, ids)
    with hook_sae(layer, sae) as hooked:
        after, flowing = logits(llama, ids), hidden(llama, ids)
    with torch.no_grad():
        torch.testing.assert_close(flowing, sae(x))
        torch.testing.assert_close(hooked.codes[0].to_dense(), sae.encode(x))
    assert len(hooked.codes) == 2 and hooked.codes[0].batch_shape == (2, 10)
    assert not torch.allclose(after, before, atol=1e-3)
    assert torch.equal(logits(llama, ids), before) and not hooks_of(llama)


def test_only_recording_changes_nothing(llama, ids):
    before = logits(llama, ids)
    with hook_sae(llama.model.layers[1], some_sae(), replace=False) as hooked:
        assert torch.equal(logits(llama, ids), before)
    assert len(hooked.codes) == 1


def test_an_edit_with_the_error_kept_adds_its_direction(llama, ids):
    sae, x = some_sae(), hidden(llama, ids)

    def push(z):
        return z + 3.0 * torch.nn.functional.one_hot(torch.tensor(7), 64)

    with hook_sae(llama.model.layers[0], sae, replace=False, edit=push):
        moved = hidden(llama, ids)
    torch.testing.assert_close(moved, x + 3.0 * sae.directions()[7])
    with hook_sae(llama.model.layers[0], sae, replace=False, edit=lambda z: z):
        torch.testing.assert_close(hidden(llama, ids), x)
    with hook_sae(llama.model.layers[0], sae, edit=torch.zeros_like):
        torch.testing.assert_close(hidden(llama, ids), sae.decode(torch.zeros(2, 10, 64)).detach())


def test_tokens_that_are_not_kept_stay(llama, ids):
    keep = torch.ones(2, 10, dtype=torch.bool)
    keep[:, 0] = False
    x = hidden(llama, ids)
    with hook_sae(llama.model.layers[0], some_sae(), keep=keep):
        found = hidden(llama, ids)
    assert torch.equal(found[:, 0], x[:, 0]) and not torch.equal(found[:, 1:], x[:, 1:])
    with hook_sae(llama.model.layers[0], some_sae(), keep=keep[:1]), pytest.raises(ValueError, match="`keep` must be"):
        logits(llama, ids)


def test_the_input_of_a_module(llama, ids):
    sae, x = some_sae(), hidden(llama, ids)
    with hook_sae(llama.model.layers[1], sae, side="input") as hooked:
        at_input = logits(llama, ids)
    with hook_sae(llama.model.layers[0], sae):
        at_output = logits(llama, ids)
    torch.testing.assert_close(at_input, at_output)
    torch.testing.assert_close(hooked.codes[0].to_dense(), sae.encode(x).detach())


@pytest.mark.parametrize("skip", [False, True])
def test_a_transcoder_stands_for_a_module(llama, ids, skip):
    sae, mlp = some_sae(d_out=D, skip=skip), llama.model.layers[0].mlp
    with torch.no_grad():
        if skip:
            sae.W_skip.copy_(torch.eye(D))
    seen = {}
    handle = mlp.register_forward_pre_hook(lambda _, args: seen.update(x=args[0]))
    with hook_sae(mlp, sae) as hooked:
        spliced = hidden(llama, ids)
    handle.remove()
    with torch.no_grad():
        torch.testing.assert_close(hooked.codes[0].to_dense(), sae.encode(seen["x"]))
        before_mlp = hidden(llama, ids) - mlp(seen["x"])
        torch.testing.assert_close(spliced, before_mlp + sae(seen["x"]))


def test_gradients_flow_through_the_reconstruction(llama, ids):
    sae = some_sae()
    with hook_sae(llama.model.layers[0], sae):
        llama(ids, use_cache=False).logits.sum().backward()
    assert sae.W_dec.grad.any() and sae.W_enc.grad.any() and llama.model.embed_tokens.weight.grad.any()
    llama.zero_grad(set_to_none=True)


def test_tuples_half_precision_and_nesting():
    class Pair(nn.Module):
        def forward(self, x):
            return x * 2, "kept"

    sae, x = some_sae(), torch.randn(3, D, generator=torch.Generator().manual_seed(0)).bfloat16()
    pair = Pair()
    with torch.no_grad(), hook_sae(pair, sae) as first, hook_sae(pair, sae) as second:
        out, kept = pair(x)
    assert kept == "kept" and out.dtype == torch.bfloat16
    with torch.no_grad():
        assert torch.equal(out, sae(sae(x * 2)))
    assert len(first.codes) == len(second.codes) == 1


def test_nothing_stays_behind_an_error(llama, ids):
    wrong = sl.SAE(sl.SAEConfig(d_in=D + 1, d_sae=64))
    before = logits(llama, ids)
    with pytest.raises(ValueError, match="must have d_in"), hook_sae(llama.model.layers[0], wrong):
        logits(llama, ids)
    assert not hooks_of(llama) and torch.equal(logits(llama, ids), before)
    with pytest.raises(ValueError, match="`side` must be 'output' for a transcoder"):
        hook_sae(llama.model.layers[0], some_sae(d_out=D), side="input").__enter__()
    with pytest.raises(ValueError, match="`side` must be 'input' or 'output'"), unchecked():
        hook_sae(llama.model.layers[0], some_sae(), side="both").__enter__()

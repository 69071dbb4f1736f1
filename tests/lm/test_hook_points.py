"""Hook points of families that lay things out in their own way, and of bridges that are not right."""

from typing import Any

import pytest
import torch
from torch import Tensor

import saelab as sl
from saelab.lm.hook_points import share_weights
from saelab.lm.hooks import capture, logits, replace_activations
from saelab.lm.huggingface import HuggingFaceModel
from saelab.lm.models import _make_tiny, _wrap, load_model, tiny_model
from saelab.lm.verification import verify_hooks

POST = "blocks.1.hook_resid_post"


def some_ids(rows: int = 3, length: int = 12) -> Tensor:
    return torch.randint(3, 250, (rows, length), generator=torch.Generator().manual_seed(0))


def random_model(hf_class: str, config_class: str, backend: str = "transformer_lens", **sizes: Any) -> tuple[Any, Any]:
    """A Hugging Face model of random weights, all of which matter, and saelab's, in a bridge or plain."""
    import transformers

    config = getattr(transformers, config_class)(
        vocab_size=259, bos_token_id=0, eos_token_id=1, pad_token_id=2, **sizes
    )
    hf_model = getattr(transformers, hf_class)(config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in hf_model.named_parameters():
            noise = 0.15 * torch.randn(weight.shape, generator=generator)
            weight.copy_(1 + noise if "norm" in name and weight.ndim == 1 else noise)
    return hf_model, load_model(hf_model, tokenizer=tiny_model().tokenizer, backend=backend)


LLAMA_LIKE: dict[str, Any] = {"num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "falcon": ("FalconForCausalLM", "FalconConfig", {"num_hidden_layers": 3, "num_attention_heads": 4}),
    "mamba": ("MambaForCausalLM", "MambaConfig", {"num_hidden_layers": 3, "state_size": 8}),
    "rwkv": ("RwkvForCausalLM", "RwkvConfig", {"num_hidden_layers": 3}),
    "opt": ("OPTForCausalLM", "OPTConfig", {"ffn_dim": 64, "word_embed_proj_dim": 32, **LLAMA_LIKE}),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_hooks_agree_in_families_that_count_hidden_states_otherwise(family: str) -> None:
    hf_class, config_class, sizes = FAMILIES[family]
    sizes = {key: value for key, value in sizes.items() if (family, key) != ("opt", "intermediate_size")}
    hf_model, model = random_model(hf_class, config_class, hidden_size=32, **sizes)
    assert verify_hooks(model).ok
    with replace_activations(model, {"blocks.0.hook_out": lambda x: 1.01 * x + 0.01}):
        assert not verify_hooks(model).ok
    ids = some_ids()
    with torch.no_grad():
        torch.testing.assert_close(logits(model, ids), hf_model(ids, use_cache=False).logits, rtol=1e-4, atol=1e-5)


def test_parts_that_a_model_has_not_stay_away() -> None:
    """transformer_lens puts a wrapper of nothing where Granite's hybrids without positions have no rotary part."""
    layers = {"layer_types": ["mamba", "attention"], "num_local_experts": 2, "num_experts_per_tok": 1}
    mixer = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_chunk_size": 8}
    sizes: dict[str, Any] = {**LLAMA_LIKE, **layers, **mixer, "num_key_value_heads": 2, "intermediate_size": 32}
    hf_model, model = random_model(
        "GraniteMoeHybridForCausalLM",
        "GraniteMoeHybridConfig",
        "auto",
        hidden_size=32,
        shared_intermediate_size=32,
        **sizes,
    )
    assert model.original_model is hf_model and hf_model.model.rotary_emb is None
    with pytest.raises(ValueError, match=r"Original component not set.*backend='huggingface'"):
        load_model(hf_model, tokenizer=model.tokenizer, backend="transformer_lens")
    with torch.no_grad():
        assert torch.equal(logits(model, some_ids()), hf_model(some_ids(), use_cache=False).logits)
    assert verify_hooks(model).ok


def test_rows_of_all_texts_one_after_another_are_read_and_edited() -> None:
    """OPT's MLP sees (batch * n, d)."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "ffn_dim": 64}
    hf_model, model = random_model("OPTForCausalLM", "OPTConfig", word_embed_proj_dim=32, **sizes)
    ids, seen = some_ids(2, 5), []
    with (
        hf_model.model.decoder.layers[0].fc2.register_forward_hook(lambda _m, _i, out: seen.append(out)),
        torch.no_grad(),
    ):
        hf_model(ids)
    x = capture(model, ids, ["blocks.0.hook_mlp_out"])["blocks.0.hook_mlp_out"]
    torch.testing.assert_close(x, seen[0].view(2, 5, 32))
    first_only = torch.tensor([2.0, 1.0])[:, None, None]
    clean = logits(model, ids)
    with replace_activations(model, {"blocks.0.hook_mlp_out": lambda x: x * first_only}):
        moved, itself = logits(model, ids), model(ids)
    torch.testing.assert_close(moved, itself, rtol=1e-4, atol=1e-5)
    assert torch.equal(moved[1], clean[1]) and not torch.allclose(moved[0], clean[0], atol=1e-3)


def test_hook_points_that_fire_only_for_hooks_of_the_bridges_own_kind() -> None:
    scales = {"residual_multiplier": 0.22, "embedding_multiplier": 12.0, "logits_scaling": 8.0}
    _, model = random_model("GraniteForCausalLM", "GraniteConfig", hidden_size=32, **LLAMA_LIKE, **scales)
    ids, names = some_ids(), ["blocks.1.hook_attn_out", "blocks.1.hook_mlp_out"]
    _, cache = model.run_with_cache(ids)
    for name, x in capture(model, ids, names).items():
        torch.testing.assert_close(x, cache[name])
        before, after = (
            capture(model, ids, [f"blocks.1.hook_{side}"])[f"blocks.1.hook_{side}"] for side in ("in", "out")
        )
        with replace_activations(model, {name: torch.zeros_like}):
            without = capture(model, ids, ["blocks.1.hook_out"])["blocks.1.hook_out"]
        if name == names[1]:  # the last thing added to the stream
            torch.testing.assert_close(after - without, x, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(without, after, atol=1e-3) and not torch.allclose(without, before, atol=1e-3)
    model.reset_hooks()
    assert not model.blocks[1].hook_mlp_out.fwd_hooks


def test_an_edit_that_the_model_does_not_feel_is_refused() -> None:
    """A mixture's router hands its logits out beside what it goes by."""
    sizes = {"hidden_size": 32, "num_key_value_heads": 2, "num_local_experts": 4, **LLAMA_LIKE}
    _, model = random_model("MixtralForCausalLM", "MixtralConfig", **sizes)
    ids, name = some_ids(), "blocks.0.mlp.gate.hook_out"
    with pytest.raises(ValueError, match="not on its path"), replace_activations(model, {name: torch.zeros_like}):
        logits(model, ids)
    seen: list[Tensor] = []
    with replace_activations(model, {name: lambda x: seen.append(x) or x}):  # reading is no edit
        logits(model, ids)
    torch.testing.assert_close(seen[0], capture(model, ids, [name])[name])
    with (
        replace_activations(model, {"blocks.0.ln1.hook_normalized": lambda x: x.mul_(0)}),
        pytest.warns(UserWarning, match="hook edited"),
    ):
        assert not torch.allclose(logits(model, ids), model(ids) * 0, atol=1e-3)


def break_bridge(wrong: Any) -> None:
    mlp, right = wrong.blocks[1].mlp, wrong.blocks[1].mlp.forward
    object.__setattr__(mlp, "forward", lambda *args, **kwargs: 1.5 * right(*args, **kwargs))


def fail_bridge(wrong: Any) -> None:
    """As transformer_lens 4.3's of CodeGen does with transformers 5.24."""

    def fail(*_: Any, **__: Any) -> None:
        raise AttributeError("no attribute 'embed_positions'")

    vars(wrong.blocks[0])["forward"] = fail  # set as an attribute it would go to Hugging Face's module


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (break_bridge, "one whose logits are .* away from Hugging Face's"),
        (fail_bridge, "fails with AttributeError: no attribute 'embed_positions'"),
    ],
)
def test_where_the_bridge_is_wrong_hugging_face_is_right(spoil: Any, reason: str) -> None:
    """A bridge that does something else, or nothing, is refused; opened again its modules are Hugging Face's."""
    model, wrong = (_wrap(*_make_tiny()) for _ in range(2))  # not looked at yet
    ids = some_ids()
    expected = logits(model, ids), capture(model, ids, [POST])[POST]
    spoil(wrong)
    for use in (lambda: logits(wrong, ids), lambda: load_model(wrong)):
        with pytest.raises(ValueError, match=reason):
            use()
    found = load_model(wrong, backend="huggingface")
    assert isinstance(found, HuggingFaceModel)
    torch.testing.assert_close(logits(found, ids), expected[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(capture(found, ids, [POST])[POST], expected[1], rtol=1e-4, atol=1e-5)
    with replace_activations(found, {POST: torch.zeros_like}), replace_activations(model, {POST: torch.zeros_like}):
        torch.testing.assert_close(logits(found, ids), logits(model, ids), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match=r"'blocks\.1\.attn\.hook_pattern'.*backend='transformer_lens'"):
        capture(found, ids, ["blocks.1.attn.hook_pattern"])
    assert verify_hooks(found).ok


def test_only_causal_models() -> None:
    from transformer_lens.model_bridge import TransformerBridge
    from transformers import BertConfig, BertForMaskedLM

    bert = BertForMaskedLM(BertConfig(vocab_size=259, hidden_size=32, **LLAMA_LIKE)).eval()
    bridge = TransformerBridge.boot_transformers("bert", hf_model=bert, tokenizer=tiny_model().tokenizer, device="cpu")
    with pytest.raises(ValueError, match="earlier tokens only, got BertForMaskedLM"):
        capture(bridge, some_ids(), ["blocks.1.hook_out"])
    with pytest.raises(ValueError, match=r"got an encoder \(BertForMaskedLM"):
        capture(bert, some_ids(), ["blocks.1.hook_out"])
    with pytest.raises(TypeError, match="causal Hugging Face model, got a Linear"):
        capture(torch.nn.Linear(2, 2), some_ids(), [POST])


def test_folding_that_changes_predictions_is_refused(tmp_path: Any) -> None:
    """transformer_lens 3.9 and 4.3 fold the norm into Qwen2-MoE's experts, and not into what gates the shared one."""
    sizes = {"hidden_size": 32, "num_key_value_heads": 2, "num_experts": 4, "moe_intermediate_size": 32, **LLAMA_LIKE}
    hf_model, raw = random_model("Qwen2MoeForCausalLM", "Qwen2MoeConfig", shared_expert_intermediate_size=32, **sizes)
    hf_model.save_pretrained(tmp_path)
    tiny_model().tokenizer.save_pretrained(tmp_path)
    assert verify_hooks(raw).ok
    with pytest.raises(ValueError, match="away from Hugging Face's then"):
        load_model(tmp_path, device="cpu", weight_processing="folded", progress=False)


@pytest.mark.parametrize("backend", ["huggingface", "transformer_lens"])
def test_a_model_that_shares_weights_shares_no_hooks(backend: str) -> None:
    model, ids, point = sl.lm.tiny_model(seed=5, backend=backend), torch.arange(65, 77)[None], POST
    expected = sl.lm.logits(model, ids)

    def is_as_expected(found: Tensor) -> bool:
        return torch.allclose(found, expected, rtol=1e-4, atol=1e-5)

    with sl.splice(model, {point: torch.zeros_like}):
        other = share_weights(model)
        assert is_as_expected(sl.lm.logits(other, ids)) and not is_as_expected(sl.lm.logits(model, ids))
    fired: list[str] = []
    for module in model.original_model.modules():
        module.register_forward_hook(lambda *_: fired.append("a hook of the first model"))
    with sl.splice(other, {point: torch.zeros_like}):
        moved = sl.lm.logits(other, ids), other.original_model(ids).logits
    assert not fired and not any(map(is_as_expected, moved))
    model.original_model.train()
    assert not other.original_model.training
    assert is_as_expected(sl.lm.logits(share_weights(share_weights(model)), ids))  # the one between is gone
    with torch.no_grad():
        next(model.parameters()).mul_(2)
    assert not is_as_expected(sl.lm.logits(other, ids))


def test_folded_weights_are_not_shared() -> None:
    model = sl.lm.tiny_model(backend="transformer_lens")
    model.enable_compatibility_mode()
    for use in (lambda: share_weights(model), lambda: load_model(model, backend="huggingface")):
        with pytest.raises(ValueError, match="raw weights, got a bridge that has folded them"):
            use()
    assert load_model(model) is model

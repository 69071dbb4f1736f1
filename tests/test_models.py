"""Loading models: folders without network, objects left alone, tiny models, clear errors."""

import socket
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch

from saelab.lm.hooks import logits
from saelab.lm.models import describe_model, load_model, tiny_model


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Every attempt to reach the network fails and is remembered."""
    attempts: list[Any] = []

    def refuse(*args: Any, **_: Any) -> None:
        attempts.append(args)
        raise OSError("no network in this test")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    return attempts


def hf_tiny(**kwargs: Any) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return LlamaForCausalLM(LlamaConfig(vocab_size=259, intermediate_size=32, **sizes, **kwargs)).eval()


def test_a_local_folder_touches_no_network(tmp_path: Path, no_network: list[Any]) -> None:
    hf_model, tokenizer = hf_tiny(), tiny_model().tokenizer
    hf_model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    model = load_model(tmp_path, device="cpu")
    assert no_network == []
    ids = torch.randint(0, 259, (2, 8), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(logits(model, ids), hf_model(ids).logits)
    assert model.tokenizer.decode(model.tokenizer("abc", add_special_tokens=False)["input_ids"]) == "abc"


def test_tiny_models_need_no_network_and_follow_their_seed(no_network: list[Any]) -> None:
    state = torch.random.get_rng_state()
    models = [tiny_model(seed=seed) for seed in (0, 0, 1)]
    assert no_network == []
    assert torch.equal(torch.random.get_rng_state(), state)
    ids = torch.arange(10)[None]
    same, again, other = (logits(model, ids) for model in models)
    assert torch.equal(same, again)
    assert not torch.allclose(same, other)


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_tiny_tokenizer_round_trips(architecture: Any) -> None:
    model = tiny_model(architecture=architecture)
    text = "Any text: caf\u00e9, \u6f22\u5b57 and\ttabs\n"
    ids = model.tokenizer(text, add_special_tokens=False)["input_ids"]
    assert model.tokenizer.decode(ids) == text
    assert max(ids) < model.cfg.d_vocab
    special = {model.tokenizer.bos_token_id, model.tokenizer.eos_token_id, model.tokenizer.pad_token_id}
    assert len(special) == (1 if architecture == "gpt2" else 3)


def test_a_model_object_is_left_as_it_is() -> None:
    hf_model = hf_tiny()
    modules = {name: type(module) for name, module in hf_model.named_modules()}
    attention = hf_model.config._attn_implementation
    model = load_model(hf_model, tokenizer=tiny_model().tokenizer)
    assert {name: type(module) for name, module in hf_model.named_modules()} == modules
    assert hf_model.config._attn_implementation == attention
    assert hf_model.lm_head.bias is None
    shared = {p.data_ptr() for p in model.original_model.parameters()}
    assert hf_model.model.layers[0].mlp.up_proj.weight.data_ptr() in shared


def test_a_bridge_is_returned_as_it_is(tiny: Any) -> None:
    assert load_model(tiny) is tiny


def test_dtype_is_float32_unless_asked(tmp_path: Path) -> None:
    hf_tiny().to(torch.bfloat16).save_pretrained(tmp_path)
    tiny_model().tokenizer.save_pretrained(tmp_path)
    for asked, expected in ((None, torch.float32), (torch.bfloat16, torch.bfloat16)):
        model = load_model(tmp_path, device="cpu", dtype=asked)
        assert {p.dtype for p in model.parameters()} == {expected}
        assert logits(model, torch.arange(5)[None]).dtype == expected


def test_loading_mistakes_are_named(tmp_path: Path, tiny: Any, no_network: list[Any]) -> None:
    with pytest.raises(FileNotFoundError, match="no/such/folder"):
        load_model("no/such/folder")
    with pytest.raises(FileNotFoundError, match="missing"):
        load_model(tmp_path / "missing")
    with pytest.raises(ValueError, match=r"config\.json"):
        load_model(tmp_path)
    with pytest.raises(ValueError, match="device"):
        load_model(tiny, device="cpu")
    with pytest.raises(ValueError, match="tokenizer"):
        load_model(hf_tiny())


def test_a_wrong_id_is_a_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="nobody/no-such-model"):
        load_model("nobody/no-such-model")


def test_description_names_versions_and_processing() -> None:
    model = tiny_model()
    name, processing, versions = describe_model(model)
    assert name.startswith("tiny-llama")
    assert processing == "none"
    assert versions["torch"] == version("torch")
    assert set(versions) == {"saelab", "torch", "transformer-lens", "transformers"}
    model.enable_compatibility_mode()
    assert describe_model(model).weight_processing == "folded"


def test_the_real_model_loads(shared_data: Path, no_network: list[Any]) -> None:
    model = load_model(str(shared_data / "stories260k"), device="cpu")
    assert (model.cfg.n_layers, model.cfg.d_model) == (5, 64)
    assert no_network == []


@pytest.mark.parametrize(("shown", "hub_shown"), [(True, True), (True, False), (False, True), (False, False)])
def test_bars_are_hidden_only_while_loading(
    shown: bool, hub_shown: bool, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    from huggingface_hub import utils as hub
    from transformers.utils import logging

    hf_tiny().save_pretrained(tmp_path)
    tiny_model().tokenizer.save_pretrained(tmp_path)
    try:
        (logging.enable_progress_bar if shown else logging.disable_progress_bar)()
        (hub.enable_progress_bars if hub_shown else hub.disable_progress_bars)()
        capfd.readouterr()
        load_model(tmp_path, device="cpu", progress=False)
        with pytest.raises(ValueError, match="a model folder"):
            (tmp_path / "model.safetensors").unlink()
            load_model(tmp_path, device="cpu", progress=False)
        assert capfd.readouterr() == ("", "")
        assert (logging.is_progress_bar_enabled(), not hub.are_progress_bars_disabled()) == (shown, hub_shown)
    finally:
        logging.enable_progress_bar()

"""Loading models: folders without network, objects left alone, tiny models, clear errors."""

import socket
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch

import saelab as sl
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
    model = tiny_model(backend="transformer_lens")
    name, processing, versions, backend = describe_model(model)
    assert backend == "transformer_lens"
    assert name.startswith("tiny-llama")
    assert processing == "none"
    assert versions["torch"] == version("torch")
    assert set(versions) == {"saelab", "torch", "transformer-lens", "transformers"}
    model.enable_compatibility_mode(no_processing=True)
    assert describe_model(model).weight_processing == "none"
    model.process_weights()
    assert describe_model(model).weight_processing == "folded"
    model = tiny_model(backend="transformer_lens")
    model.enable_compatibility_mode()
    assert describe_model(model).weight_processing == "folded"
    del model._weights_processed
    with pytest.raises(RuntimeError, match=r"must say .* whether its weights were processed"):
        describe_model(model)


@pytest.mark.parametrize("name", ["tiny", "tales"])
def test_a_folder_does_not_stand_for_a_built_in_model(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hf_tiny().save_pretrained(tmp_path / name)
    tiny_model().tokenizer.save_pretrained(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    with pytest.warns(UserWarning, match=f"Write './{name}' for the folder"):
        model = load_model(name, progress=False)
    own = hf_tiny().config.hidden_size
    assert model.cfg.d_model != own
    for folder in (f"./{name}", Path(name)):
        assert load_model(folder, progress=False).cfg.d_model == own


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


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random GPT-2 whose norms and biases all matter, in a folder."""
    from transformers import GPT2Config, GPT2LMHeadModel

    folder = tmp_path_factory.mktemp("gpt2") / "small"
    tokenizer = tiny_model().tokenizer
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        sizes = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32}
        model = GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), bos_token_id=0, eos_token_id=1, **sizes))
        for weight in model.parameters():
            torch.nn.init.normal_(weight, mean=0.2, std=0.3)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("backend", ["huggingface", "transformer_lens"])
def test_loading_draws_no_random_numbers(gpt2: Path, backend: str) -> None:
    state = torch.random.get_rng_state()
    load_model(gpt2, device="cpu", backend=backend, progress=False)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_folded_weights_are_those_of_transformer_lens_two(gpt2: Path) -> None:
    raw: Any = load_model(gpt2, backend="transformer_lens", progress=False)
    folded = load_model(gpt2, weight_processing="folded", progress=False)
    assert (describe_model(raw).weight_processing, describe_model(folded).weight_processing) == ("none", "folded")
    ids = torch.randint(4, 250, (2, 9), generator=torch.Generator().manual_seed(0))
    stream, normalized, read = "blocks.1.hook_resid_pre", "blocks.1.ln1.hook_normalized", "blocks.1.ln1.hook_out"
    before, after = (sl.lm.capture(model, ids, [stream, normalized, read]) for model in (raw, folded))
    centered = before[stream] - before[stream].mean(-1, keepdim=True)
    assert not torch.allclose(before[stream], centered, atol=0.1)
    torch.testing.assert_close(after[stream], centered, rtol=1e-3, atol=1e-3)  # written to it is what is centred
    unit = centered / (centered.square().mean(-1, keepdim=True) + raw.cfg.eps).sqrt()
    assert not torch.allclose(before[read], unit, atol=0.1)
    for name in (normalized, read):
        torch.testing.assert_close(after[name], unit, rtol=1e-3, atol=1e-3)  # gain and bias went into what reads it
    predictions = (sl.lm.logits(model, ids).log_softmax(-1) for model in (raw, folded))
    torch.testing.assert_close(*predictions, rtol=1e-3, atol=1e-3)


def test_an_sae_of_folded_weights_wants_them(gpt2: Path, tmp_path: Path) -> None:
    raw, folded = load_model(gpt2, progress=False), load_model(gpt2, weight_processing="folded", progress=False)
    tokens = sl.tokenize(raw, ["The cat met the dog, and the owl."] * 4, ctx_len=16)
    sae = sl.SAE(sl.SAEConfig(d_in=16, d_sae=32, activation=sl.TopK(k=4)))
    sae.provenance = sl.collect(folded, tokens, "blocks.1.hook_resid_pre", progress=False).provenance
    assert sl.harvest(sae, folded, tokens, tmp_path / "store", progress=False).provenance.weight_processing == "folded"
    with pytest.raises(ValueError, match=r"trained: 'folded', now: 'none'.*`weight_processing`"):
        sl.harvest(sae, raw, tokens, tmp_path / "other", progress=False)


def test_unknown_processing_is_refused(gpt2: Path) -> None:
    with pytest.raises(ValueError, match="must be one of"):
        load_model(gpt2, weight_processing="centred")
    with pytest.raises(ValueError, match="whose weights it changes"):
        load_model(tiny_model(), weight_processing="folded")

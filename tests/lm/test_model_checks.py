"""What may stand behind the door: the rest is refused in one sentence, and loading starts nothing unasked."""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from unchecked import unchecked

import saelab as sl
from saelab.lm.hooks import logits
from saelab.lm.models import load_model, tiny_model

SIZES: dict[str, Any] = {"vocab_size": 259, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
SIZES |= {"intermediate_size": 32}
VISION = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
VISION |= {"image_size": 28, "patch_size": 14}


def made(name: str, config: str, **sizes: Any) -> Any:
    """A random Hugging Face model of any kind."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return getattr(transformers, name)(getattr(transformers, config)(**sizes)).eval()


def llama(**changes: Any) -> Any:
    return made("LlamaForCausalLM", "LlamaConfig", **{**SIZES, **changes})


def some_ids() -> torch.Tensor:
    return torch.randint(3, 250, (2, 9), generator=torch.Generator().manual_seed(0))


def saved(model: Any, folder: Path, tokenizer: bool = True, **changes: Any) -> Path:
    model.save_pretrained(folder)
    if tokenizer:
        tiny_model().tokenizer.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    return folder


T5 = {"vocab_size": 259, "d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}
OTHERS: dict[str, tuple[str, str, dict[str, Any], str]] = {
    "encoder": ("BertForMaskedLM", "BertConfig", SIZES, "got an encoder .BertForMaskedLM"),
    "bare encoder": ("BertModel", "BertConfig", SIZES, "got an encoder .BertModel"),
    "encoder with a decoder": ("T5ForConditionalGeneration", "T5Config", T5, "must be a decoder alone"),
    "classifier": ("LlamaForSequenceClassification", "LlamaConfig", SIZES, "made for another task"),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_what_is_no_causal_model_is_refused_as_folder_and_as_object(kind: str, tmp_path: Path) -> None:
    name, config, sizes, reason = OTHERS[kind]
    model = made(name, config, **sizes)
    with pytest.raises(ValueError, match=reason):
        load_model(saved(model, tmp_path), device="cpu")
    with pytest.raises(ValueError, match=reason):
        load_model(model, tokenizer=tiny_model().tokenizer)


def test_a_model_without_its_head_is_not_given_a_random_one(tmp_path: Path) -> None:
    bare = made("LlamaModel", "LlamaConfig", **SIZES)
    with pytest.raises(ValueError, match=r"without 1 of them \(lm_head\.weight\)"):
        load_model(saved(bare, tmp_path / "bare"), device="cpu")
    with pytest.raises(ValueError, match="has no language-model head"):
        load_model(bare, tokenizer=tiny_model().tokenizer)
    tied = made("GPT2Model", "GPT2Config", vocab_size=259, n_embd=16, n_layer=1, n_head=2)  # its head is its embedding
    assert load_model(saved(tied, tmp_path / "tied"), device="cpu").cfg.n_layers == 1
    folder = saved(llama(), tmp_path / "torn")
    weights = load_file(folder / "model.safetensors")
    save_file({k: v for k, v in weights.items() if "layers.1" not in k}, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="without 9 of them"):
        load_model(folder, device="cpu")


def test_tokenizers_are_there_and_fit(tmp_path: Path) -> None:
    folder = saved(llama(), tmp_path / "none", tokenizer=False)
    with pytest.raises(ValueError, match="must hold its tokenizer"):
        load_model(folder, device="cpu")
    tokenizer = tiny_model().tokenizer
    assert load_model(folder, device="cpu", tokenizer=tokenizer).cfg.d_vocab == 259
    with pytest.raises(ValueError, match=r"vocabulary of 200, got ids up to 258"):
        load_model(llama(vocab_size=200), tokenizer=tokenizer)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<pad of somebody>"]})  # that text never holds
    assert load_model(llama(), tokenizer=tokenizer).cfg.d_vocab == 259
    empty = transformers.PreTrainedTokenizerFast(tokenizer_object=_empty_tokenizer(), bos_token="<s>")
    with pytest.raises(ValueError, match="special ones only"):
        load_model(llama(), tokenizer=empty)


def _empty_tokenizer() -> Any:
    from tokenizers import Tokenizer, models

    return Tokenizer(models.BPE(vocab={}, merges=[]))


def test_weights_must_be_whole_and_of_floating_point(tmp_path: Path) -> None:
    folder = saved(llama(), tmp_path, quantization_config={"quant_method": "gptq", "bits": 4})
    with pytest.raises(ValueError, match="quantized by gptq"):
        load_model(folder, device="cpu")
    tokenizer = tiny_model().tokenizer
    with pytest.raises(ValueError, match="whole on one device"):
        load_model(llama().to("meta"), tokenizer=tokenizer)
    eighth = llama()
    eighth.lm_head.weight = torch.nn.Parameter(eighth.lm_head.weight.to(torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match="floating point"):
        load_model(eighth, tokenizer=tokenizer)


def test_adapters_are_merged_first() -> None:
    adapter = type("Linear", (torch.nn.Linear,), {"__module__": "peft.tuners.lora.layer"})
    model = llama()
    model.model.layers[0].mlp.up_proj = adapter(16, 32)
    with pytest.raises(ValueError, match="merge_and_unload"):
        load_model(model, tokenizer=tiny_model().tokenizer)


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # PyTorch's, of itself, where it begins to compile
def test_compiled_models_are_taken_as_they_were() -> None:
    hf_model, ids = llama(), some_ids()
    with torch.no_grad():
        expected = hf_model(ids).logits
    model = load_model(torch.compile(hf_model), tokenizer=tiny_model().tokenizer)
    torch.testing.assert_close(logits(model, ids), expected)
    hf_model.compile()
    assert torch.equal(logits(load_model(hf_model, tokenizer=tiny_model().tokenizer), ids), logits(model, ids))
    bridge = tiny_model(backend="transformer_lens")
    compiled: Any = torch.compile(bridge)
    assert load_model(compiled) is bridge
    with unchecked(), pytest.raises(TypeError, match="got a function"):  # what torch makes of an object of saelab's
        load_model(torch.compile(tiny_model(backend="huggingface")))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "thing", [None, {"a": 1}, 3, torch.nn.Linear(2, 2), torch.nn.DataParallel(torch.nn.Linear(2, 2))]
)
def test_other_objects_are_named(thing: Any) -> None:
    with unchecked(), pytest.raises(TypeError, match=f"got a {type(thing).__name__}"):
        load_model(thing)


def test_what_is_no_model_is_said_in_a_line() -> None:
    ids, plain = some_ids(), llama()
    with unchecked():
        for wrong in ("tiny", torch.nn.Linear(2, 2), 3):
            for use in (
                lambda wrong=wrong: sl.lm.capture(wrong, ids, ["a"]),
                lambda wrong=wrong: sl.tokenize(wrong, ["a"]),
                lambda wrong=wrong: logits(wrong, ids),
            ):
                kind = type(wrong).__name__
                with pytest.raises(TypeError, match=rf"what `saelab.load_model` returns, or a.*got a {kind}"):
                    use()
    with pytest.raises(ValueError, match="needs a model with a tokenizer, got one without"):
        sl.tokenize(plain, ["a"])


def test_unknown_kinds_are_named_in_a_line(tmp_path: Path) -> None:
    folder = saved(llama(), tmp_path, model_type="nonesuch")
    with pytest.raises(ValueError, match=r"got '.*'.*`nonesuch`") as error:
        load_model(folder, device="cpu")
    assert "\n" not in str(error.value)
    other = made("BioGptForCausalLM", "BioGptConfig", **SIZES)  # which transformer_lens has no bridge for
    with pytest.raises(ValueError, match=r"has a bridge for, got .*supported architecture") as error:
        load_model(other, tokenizer=tiny_model().tokenizer, backend="transformer_lens")
    assert len(str(error.value)) < 200


MIXED: dict[str, Any] = {
    "gemma3": lambda: made(
        "Gemma3ForConditionalGeneration",
        "Gemma3Config",
        text_config={
            **SIZES,
            "num_key_value_heads": 1,
            "head_dim": 8,
            "sliding_window": 4,
            "max_position_embeddings": 32,
        },
        vision_config=VISION,
        mm_tokens_per_image=4,
        image_token_index=258,
    ),
    "llava": lambda: made(
        "LlavaForConditionalGeneration",
        "LlavaConfig",
        text_config=transformers.LlamaConfig(**SIZES, max_position_embeddings=32),
        vision_config=transformers.CLIPVisionConfig(**VISION),
        image_token_index=258,
    ),
}


QWEN = {"num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 32}
TURNS = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}
EYES = {"depth": 1, "hidden_size": 32, "num_heads": 2, "intermediate_size": 32, "out_hidden_size": 32}


def test_libraries_that_prepare_pictures_are_not_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformer_lens' adapter of this family asks for torchvision before all else."""
    adapters = pytest.importorskip("transformer_lens.model_bridge.supported_architectures.qwen3_vl")
    monkeypatch.setattr(adapters.Qwen3VLArchitectureAdapter, "required_libraries", ["no_such_library"])
    vision = EYES | {"deepstack_visual_indexes": [], "num_position_embeddings": 16}
    text = {**SIZES, **QWEN, "rope_parameters": TURNS}
    hf_model = made("Qwen3VLForConditionalGeneration", "Qwen3VLConfig", text_config=text, vision_config=vision)
    model, ids = load_model(hf_model, tokenizer=tiny_model().tokenizer), some_ids()
    with torch.no_grad():
        expected = hf_model(ids, use_cache=False)
    torch.testing.assert_close(logits(model, ids), expected.logits, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:Hook alias:UserWarning")  # transformer_lens 3.9, of its own map of CLIP
@pytest.mark.parametrize("family", MIXED)
def test_text_of_a_multimodal_model_without_a_processor(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformer_lens would install torchvision for it; nothing is started, and the language tower is read."""
    started: list[Any] = []

    def start(_self: Any, *args: Any, **_: Any) -> None:
        started.append(args)
        raise FileNotFoundError("not in this test")

    monkeypatch.setattr(subprocess.Popen, "__init__", start)
    hf_model, ids = MIXED[family](), some_ids()
    model = load_model(saved(hf_model, tmp_path), device="cpu", progress=False)
    assert started == []
    with torch.no_grad():
        expected = hf_model(ids)
    torch.testing.assert_close(logits(model, ids), expected.logits, rtol=1e-4, atol=1e-5)
    assert sl.lm.verify_hooks(model, ids).ok
    with pytest.raises(ValueError, match=r"1\.\.32"):
        sl.tokenize(model, ["text"], ctx_len=33)
    assert subprocess.Popen.__init__ is start


def test_processes_start_again_behind_the_door(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A library that starts one while a model loads gets an error, and its sentence reaches the user."""
    from transformer_lens.model_bridge import TransformerBridge

    saved(llama(), tmp_path)
    monkeypatch.setattr(TransformerBridge, "boot_transformers", lambda *_, **__: os.system("exit 3"))
    with pytest.raises(ValueError, match="starts no process, a library wanted 'exit 3'"):
        load_model(tmp_path, device="cpu", backend="transformer_lens")
    monkeypatch.setattr(TransformerBridge, "boot_transformers", lambda *_, **__: subprocess.run(["true"]))
    with pytest.raises(ValueError, match=r"a library wanted \['true'\]"):
        load_model(tmp_path, device="cpu", backend="transformer_lens")
    assert subprocess.run(["true"]).returncode == 0 and os.system("exit 0") == 0

"""A folder begun by one back end is continued by the other; one of an earlier saelab by the one that began it."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import saelab as sl
from saelab.collecting import writers
from saelab.collecting.collection import collect
from saelab.collecting.reader import fingerprint
from saelab.lm.models import tiny_model
from saelab.stores.validation import read_json

HOOK = "blocks.1.ln2.hook_normalized"
SIZES: dict[str, Any] = {"batch_size": 4, "shard_tokens": 30, "progress": False}
BACKENDS = ("huggingface", "transformer_lens")
Models = dict[str, Any]


@pytest.fixture(params=["llama", "gpt2"], scope="module")
def models(request: pytest.FixtureRequest) -> Models:
    """GPT-2's bridge has weights of its own for queries, keys and values."""
    return {name: tiny_model(architecture=request.param, n_layers=2, backend=name) for name in BACKENDS}


def make_tokens(models: Models) -> sl.Tokens:
    return sl.tokenize(models["huggingface"], [f"{i} cats sat on a mat." for i in range(12)], ctx_len=16)


def begin(model: Any, tokens: sl.Tokens, folder: Path) -> None:
    """The first two shards."""
    save, n = writers.save_tensors, 0

    def fail(*args: Any, **kwargs: Any) -> Any:
        nonlocal n
        n += 1
        if n > 2:
            raise RuntimeError("the power went")
        return save(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(RuntimeError, match="the power went"):
        patch.setattr(writers, "save_tensors", fail)
        collect(model, tokens, HOOK, folder, **SIZES)
    assert len(list(folder.glob("*.safetensors"))) == 2


@pytest.mark.parametrize("first", BACKENDS)
def test_either_goes_on(models: Models, tmp_path: Path, first: str) -> None:
    tokens, other = make_tokens(models), next(name for name in BACKENDS if name != first)
    begin(models[first], tokens, tmp_path)
    found = collect(models[other], tokens, HOOK, tmp_path, **SIZES)
    expected = collect(models[first], tokens, HOOK, batch_size=4, progress=False)
    torch.testing.assert_close(found[:], expected[:], rtol=1e-5, atol=1e-5)
    assert collect(models[first], tokens, HOOK, tmp_path, **SIZES).n_tokens == found.n_tokens


def test_what_an_earlier_bridge_began_a_bridge_goes_on_with(models: Models, tmp_path: Path) -> None:
    tokens, bridge = make_tokens(models), models["transformer_lens"]
    begin(bridge, tokens, tmp_path)
    manifest = read_json(tmp_path / "manifest.json")
    del manifest["crc32"]
    manifest["request"]["weights"] = fingerprint(dict(bridge.named_parameters()))
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=r"weights: there .*backend='transformer_lens'"):
        collect(models["huggingface"], tokens, HOOK, tmp_path, **SIZES)
    assert len(list(tmp_path.glob("*.safetensors"))) == 2
    found = collect(bridge, tokens, HOOK, tmp_path, **SIZES)
    torch.testing.assert_close(found[:], collect(bridge, tokens, HOOK, batch_size=4, progress=False)[:])


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize("changed", BACKENDS)
def test_changed_weights_are_others(tmp_path: Path, architecture: Any, changed: str) -> None:
    """Also those that a bridge has of its own, of which Hugging Face's model knows nothing."""
    models = {name: tiny_model(architecture=architecture, n_layers=2, backend=name) for name in BACKENDS}
    tokens = make_tokens(models)
    begin(models["huggingface"], tokens, tmp_path)
    with torch.no_grad():
        model = models[changed]
        weight = model.blocks[0].attn.q.weight if changed == "transformer_lens" else next(model.parameters())
        weight.mul_(3)
    with pytest.raises(ValueError, match="weights: there"):
        collect(models[changed], tokens, HOOK, tmp_path, **SIZES)


def test_folded_weights_are_others(tmp_path: Path) -> None:
    raw, folded = tiny_model(n_layers=2), tiny_model(n_layers=2, backend="transformer_lens")
    tokens = sl.tokenize(raw, [f"{i} cats sat on a mat." for i in range(12)], ctx_len=16)
    begin(raw, tokens, tmp_path)
    folded.enable_compatibility_mode()
    with pytest.raises(ValueError, match=r"weights: there"):
        collect(folded, tokens, HOOK, tmp_path, **SIZES)

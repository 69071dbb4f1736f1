"""Weights in several files, as huggingface_hub writes them: read as from one, and no more of them than is needed."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from foreign import MAKERS, PLACE, Made, load, some_activations
from huggingface_hub import save_torch_state_dict
from safetensors.torch import load_file, save_file

import saelab as sl

X = some_activations()
MADE_OF_SAFETENSORS = [
    *("saelens jumprelu", "saelens skip transcoder", "sparsify topk", "sparsify skip transcoder"),
    *("gemma scope 2", "llama scope", "openmoss relu", "circuit_tracer skip"),
]


def split(path: Path, size: int | str = 300) -> list[str]:
    """The tensors of a file in files of some bytes each, and an index; the file itself is gone."""
    held = load_file(path)
    path.unlink()
    save_torch_state_dict(
        held,
        path.parent,
        filename_pattern=f"{path.stem}{{suffix}}.safetensors",
        max_shard_size=size,
        shared_tensors_to_discard=[],
    )
    names = sorted(file.name for file in path.parent.glob(f"{path.stem}-*"))
    assert len(names) > 2 and path.with_name(f"{path.name}.index.json").is_file()
    return names


@pytest.mark.parametrize("maker", MADE_OF_SAFETENSORS)
def test_the_same_sae_from_one_file_or_several(maker: str, tmp_path: Path) -> None:
    made = MAKERS[maker](tmp_path)
    whole = load(tmp_path, made)
    (path,) = tmp_path.rglob("*.safetensors")
    split(path)
    again = load(tmp_path, made)
    assert torch.equal(again.encode(X), whole.encode(X)) and torch.equal(again(X), whole(X))
    assert again.provenance == whole.provenance


def test_saelabs_own(tmp_path: Path) -> None:
    sae = sl.SAE(sl.SAEConfig(d_in=6, d_sae=20, activation=sl.JumpReLU(target_l0=4.0)), seed=0)
    sae.save_pretrained(tmp_path)
    split(tmp_path / "model.safetensors")
    again = sl.SAE.from_pretrained(tmp_path)
    assert all(torch.equal(tensor, sae.state_dict()[name]) for name, tensor in again.state_dict().items())
    few = sl.SAE.from_pretrained(tmp_path, latents=[7, 3])
    assert torch.allclose(few.encode(X), sae.encode(X)[:, [7, 3]], atol=1e-6)


@pytest.mark.parametrize(
    "name", ["layer_3.safetensors", "layer_3.safetensors.index.json", "layer_3-00002-of-00003.safetensors"]
)
def test_any_of_the_names_stands_for_the_whole(name: str, tmp_path: Path) -> None:
    made = MAKERS["circuit_tracer skip"](tmp_path)
    whole = load(tmp_path, made)
    assert "layer_3-00002-of-00003.safetensors" in split(tmp_path / "layer_3.safetensors")
    assert torch.equal(sl.SAE.from_pretrained(tmp_path, name)(X), whole(X))
    assert torch.equal(sl.SAE.from_pretrained(tmp_path / name)(X), whole(X))


def test_only_the_files_that_are_needed_are_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from saelab.stores.tensors import TensorFile

    made = MAKERS["sparsify topk"](tmp_path)
    (path,) = tmp_path.rglob("sae.safetensors")
    save_file(load_file(path) | {f"state.{i}": torch.zeros(50) for i in range(5)}, path)
    split(path, 200)
    opened, open_file = [], TensorFile.open
    monkeypatch.setattr(TensorFile, "open", lambda path: opened.append(Path(path).name) or open_file(path))
    load(tmp_path, made)
    places = json.loads(path.with_name("sae.safetensors.index.json").read_text())["weight_map"]
    needed = {file for name, file in places.items() if not name.startswith("state.")}
    assert needed <= set(opened) <= needed | {"sae.safetensors"} and set(places.values()) - needed


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    made = MAKERS["sparsify topk"](tmp_path)
    (path,) = tmp_path.rglob("sae.safetensors")
    names, folder = split(path), path.parent
    index = folder / "sae.safetensors.index.json"
    said = json.loads(index.read_text())

    def refuse(error: type[Exception], told: str) -> None:
        with pytest.raises(error, match=told):
            load(tmp_path, made)

    (folder / names[1]).rename(folder / "away")
    refuse(FileNotFoundError, rf"all files that it lists, got no \['{names[1]}'\]")
    (folder / "away").rename(folder / names[1])
    changed: list[tuple[Any, str]] = [
        ({"weight_map": {**said["weight_map"], "b_dec": said["weight_map"]["W_dec"]}}, "got no 'b_dec' in"),
        ({"weight_map": {**said["weight_map"], "b_dec": "../away"}}, "letters, digits"),
        ({"weight_map": {"W_dec": 3}}, "weight_map"),
        ({}, "weight_map"),
        ([], "must be an object|must hold an object|JSON object"),
    ]
    for content, told in changed:
        index.write_text(json.dumps(content))
        refuse(ValueError, told)


def test_the_hub_is_asked_for_all_of_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fnmatch import fnmatch

    made: Made = MAKERS["saelens topk"](tmp_path)
    whole = load(tmp_path, made)
    names = split(tmp_path / "sae_weights.safetensors")
    asked: list[str] = []
    monkeypatch.setattr(
        "huggingface_hub.snapshot_download",
        lambda repo, **given: asked.extend(given["allow_patterns"]) or str(tmp_path),
    )
    assert torch.equal(sl.SAE.from_pretrained("me/saes", **(PLACE | made.given))(X), whole(X))
    for name in (*names, "sae_weights.safetensors.index.json", "cfg.json"):
        assert any(fnmatch(name, pattern) for pattern in asked), name
    assert not any(fnmatch("other-00001-of-00002.safetensors", pattern) for pattern in asked)

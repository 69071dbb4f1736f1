"""Weights of every dtype that files have: the SAE of the numbers that they stand for, and the same written back."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from foreign import LIBRARIES, MAKERS, load, some_activations
from safetensors.torch import load_file, save_file
from torch import Tensor

import saelab as sl
from saelab.stores.tensors import DTYPES, load_tensors

X = some_activations()
FLOATS = [torch.float64, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz]
NORMALIZED = "overcomplete"  # whose rows have no norm of 1 but in their own precision


def convert(folder: Path, dtype: torch.dtype, *, and_back: bool) -> None:
    """Round all weights to a dtype, and write them in it, or in float32."""

    def change(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: change(one) for name, one in value.items()}
        if not isinstance(value, Tensor) or not value.is_floating_point():
            return value
        return value.to(dtype).float() if and_back else value.to(dtype)

    for path in folder.rglob("*"):
        if path.suffix == ".safetensors":
            save_file(change(load_file(path)), path)
        if path.suffix in (".pt", ".pth"):
            torch.save(change(torch.load(path, weights_only=True)), path)


def read_all(folder: Path) -> dict[str, Tensor]:
    held: dict[str, Tensor] = {}
    for path in sorted(folder.rglob("*")):
        held |= load_file(path) if path.suffix == ".safetensors" else {}
        held |= torch.load(path, weights_only=True) if path.suffix == ".pt" else {}
    return held


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_the_sae_is_that_of_the_rounded_numbers(dtype: torch.dtype, tmp_path: Path) -> None:
    some = slice(None, None, 1 if dtype == torch.float8_e4m3fn else 4)  # what has least is tried on all
    for i, (name, make) in enumerate(list(MAKERS.items())[some]):
        short, wide = tmp_path / f"{i}" / "short", tmp_path / f"{i}" / "wide"
        for folder in (short, wide):
            folder.mkdir(parents=True)
            made = make(folder)
            convert(folder, dtype, and_back=folder == wide)
        sae = load(short, made)
        if made.format != NORMALIZED:
            other = load(wide, made)
            assert torch.allclose(sae.encode(X), other.encode(X), atol=1e-6), name
            assert torch.allclose(sae(X), other(X), atol=1e-5), name
        sae.save_pretrained(tmp_path / f"{i}" / "own")
        again = sl.SAE.from_pretrained(tmp_path / f"{i}" / "own")
        assert torch.equal(again.encode(X), sae.encode(X)), name
        if made.format in LIBRARIES:
            again.save_pretrained(tmp_path / f"{i}" / "back", made.format)
            before, after = read_all(short), read_all(tmp_path / f"{i}" / "back")
            assert before.keys() == after.keys(), name
            for key, part in before.items():
                assert after[key].dtype == part.dtype and torch.equal(after[key].double(), part.double()), (name, key)


@pytest.mark.parametrize("name", ["F4", "F6_E2M3", "F6_E3M2", "Q8_0"])
def test_what_pytorch_has_no_type_for_is_named(name: str, tmp_path: Path) -> None:
    """Packed numbers, more than one to a byte, among them."""
    made = MAKERS["sparsify topk"](tmp_path)
    (path,) = tmp_path.rglob("sae.safetensors")
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    header["W_dec"]["dtype"] = name
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + length :])
    with pytest.raises(ValueError, match=rf"got '{name}' for 'W_dec', which PyTorch has no name for"):
        load(tmp_path, made)


def test_every_dtype_that_safetensors_and_pytorch_share(tmp_path: Path) -> None:
    held = {
        name: torch.arange(8, dtype=torch.uint8).repeat(8).view(dtype)
        for name, dtype in DTYPES.items()
        if name != "BOOL"
    }
    save_file(held | {"BOOL": torch.ones(3, dtype=torch.bool)}, tmp_path / "a.safetensors")
    for name, tensor in load_tensors(tmp_path / "a.safetensors").items():
        assert tensor.dtype == DTYPES[name]
        assert name == "BOOL" or torch.equal(tensor.view(torch.uint8), held[name].view(torch.uint8))

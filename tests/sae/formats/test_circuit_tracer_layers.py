"""circuit-tracer's transcoders of a layer each, several in a folder: written, and read by its own formula."""

from pathlib import Path
from typing import Any

import foreign
import pytest
import torch
from foreign import D, F, some_activations
from safetensors.torch import load_file, save_file
from torch import Tensor

import saelab as sl
from saelab.sae.activation_functions import Gated
from saelab.stores.manifest import Provenance

X = some_activations(200)
ACTIVATIONS = {
    "relu": sl.ReLU(target_l0=4.0),
    "jumprelu": sl.JumpReLU(target_l0=4.0),
    "gated": Gated(target_l0=4.0),
    "batchtopk": sl.BatchTopK(k=4),
}


def place(layer: int, model: str = "some/model", read: str = "hook_resid_mid", to: int | None = None) -> Provenance:
    return Provenance(
        model=model,
        weight_processing="none",
        hook_point=f"blocks.{layer}.{read}",
        hook_point_out=f"blocks.{layer if to is None else to}.hook_mlp_out",
        text="a.txt",
        tokens_sha256="",
        mask={},
        dtype="unknown",
        ctx_len=None,
        n_tokens=0,
        seed=None,
        versions={},
    )


def some_transcoder(
    activation: Any, layer: int = 0, skip: bool = False, normalizer: str = "none", **axes: Any
) -> sl.SAE:
    """Weights, biases and thresholds that are nothing special, one threshold 0; normalizers that were fitted."""
    cfg = sl.SAEConfig(
        **{"d_in": D, "d_sae": F, "d_out": D, "skip": skip, "normalizer": normalizer, "activation": activation} | axes
    )
    sae, g = sl.SAE(cfg, seed=layer), torch.Generator().manual_seed(layer)
    with torch.no_grad():
        for key, part in sae.named_parameters():
            part.copy_(torch.randn(part.shape, generator=g) * 0.5)
            if key == "threshold":
                part.abs_()[3] = 0.0
        if cfg.activation.threshold == "running":
            sae.threshold.fill_(0.6)
    sae.normalizer.fit(X)
    if sae.target_normalizer is not None:
        sae.target_normalizer.fit(2 * X - 1)
    sae.provenance = place(layer)
    return sae


def theirs(file: Path, x: Tensor) -> tuple[Tensor, Tensor]:
    """Codes and outputs by circuit-tracer's formula, in float64; its thresholds alone decide."""
    held = {name: tensor.double() for name, tensor in load_file(file).items()}
    u = torch.nn.functional.linear(x.double(), held["W_enc"], held["b_enc"])
    jump = held.get("activation_function.threshold")
    z = u.relu() if jump is None else u * (u > jump)
    skipped = x.double() @ held["W_skip"].T if "W_skip" in held else 0
    return z, z @ held["W_dec"] + held["b_dec"] + skipped


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("normalizer", ["none", "scale", "whiten"])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_what_is_written_gives_its_codes_there(name: str, normalizer: str, skip: bool, tmp_path: Path) -> None:
    sae = some_transcoder(ACTIVATIONS[name], 2, skip, normalizer)
    sae.save_pretrained(tmp_path, "circuit_tracer")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.yaml", "layer_2.safetensors"]
    z, y = theirs(tmp_path / "layer_2.safetensors", X)
    torch.testing.assert_close(sae.encode(X).double(), z, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(sae(X).double(), y, rtol=1e-4, atol=1e-4)
    again = sl.SAE.from_pretrained(tmp_path, "layer_2.safetensors")
    torch.testing.assert_close(again(X).double(), y, rtol=1e-4, atol=1e-4)
    assert again.provenance is not None and again.provenance.place == place(2).place
    assert again.provenance.model == "some/model"


def test_a_folder_holds_all_layers_and_one_setting(tmp_path: Path) -> None:
    for layer in range(3):
        some_transcoder(ACTIVATIONS["relu"], layer).save_pretrained(tmp_path, "circuit_tracer")
    names = [f"layer_{layer}.safetensors" for layer in range(3)]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.yaml", *names]
    yaml = pytest.importorskip("yaml")
    said = {"model_kind": "transcoder_set", "model_name": "some/model"}
    said |= {"feature_input_hook": "hook_resid_mid", "feature_output_hook": "hook_mlp_out"}
    assert yaml.safe_load((tmp_path / "config.yaml").read_text()) == said
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    other = some_transcoder(ACTIVATIONS["relu"], 1)
    other.provenance = place(1, read="mlp.hook_in")
    with pytest.raises(ValueError, match=r"agree on `feature_input_hook`, got 'mlp\.hook_in' beside 'hook_resid_mid'"):
        other.save_pretrained(tmp_path, "circuit_tracer")
    other.provenance = place(1, model="another/model")
    with pytest.raises(ValueError, match="agree on `model_name`"):
        other.save_pretrained(tmp_path, "circuit_tracer")
    with pytest.raises(ValueError, match=r"of one d_sae and d_model, got \(21, 6\) beside \(20, 6\) in layer_0"):
        some_transcoder(ACTIVATIONS["relu"], 1, d_sae=F + 1).save_pretrained(tmp_path, "circuit_tracer")
    assert before == {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    some_transcoder(ACTIVATIONS["jumprelu"], 1).save_pretrained(tmp_path, "circuit_tracer")  # its own layer is replaced
    after = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert {name for name in names if before[name] != after[name]} == {"layer_1.safetensors"}


def test_what_the_files_cannot_say(tmp_path: Path) -> None:
    sae = some_transcoder(sl.TopK(k=3))
    with pytest.raises(ValueError, match=r"a threshold for each latent, got TopK.*sae\.to_jumprelu"):
        sae.save_pretrained(tmp_path, "circuit_tracer")
    sae.to_jumprelu(X).save_pretrained(tmp_path / "jumps", "circuit_tracer")  # as is advised
    sae = some_transcoder(sl.ReLU(target_l0=3.0), d_out=D - 1)
    with pytest.raises(ValueError, match="places of one width, got d_in 6 and d_out 5"):
        sae.save_pretrained(tmp_path, "circuit_tracer")
    sae = sl.SAE(sl.SAEConfig(d_in=D, d_sae=F, activation=sl.ReLU(target_l0=3.0)))
    with pytest.raises(ValueError, match="got an autoencoder"):
        sae.save_pretrained(tmp_path, "circuit_tracer")
    sae = some_transcoder(sl.JumpReLU(target_l0=3.0))
    sae.threshold.data[3] = -0.2
    with pytest.raises(ValueError, match=r"Thresholds in the transcoder must be at least 0, got -0\.2"):
        sae.save_pretrained(tmp_path, "circuit_tracer")
    sae = some_transcoder(sl.ReLU(target_l0=3.0))
    for given, told in ((place(2, to=3), "one layer.*got 'blocks.2.*blocks.3"), (None, "without provenance")):
        sae.provenance = given
        with pytest.raises(ValueError, match=told):
            sae.save_pretrained(tmp_path, "circuit_tracer")
    assert [path.name for path in tmp_path.iterdir()] == ["jumps"]


def test_a_private_path_stays_here(tmp_path: Path) -> None:
    sae = some_transcoder(ACTIVATIONS["relu"])
    sae.provenance = place(0, model="/home/ada/models/tiny")
    sae.save_pretrained(tmp_path, "circuit_tracer")
    assert "ada" not in (tmp_path / "config.yaml").read_text()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_there_and_back_changes_no_bit(dtype: torch.dtype, tmp_path: Path) -> None:
    (tmp_path / "theirs").mkdir()
    made = foreign.circuit_tracer(tmp_path / "theirs", jump=True, skip=True)
    path = tmp_path / "theirs" / "layer_3.safetensors"
    save_file({name: tensor.to(dtype) for name, tensor in load_file(path).items()}, path)
    sae = foreign.load(tmp_path / "theirs", made)
    sae.save_pretrained(tmp_path / "own")
    sl.SAE.from_pretrained(tmp_path / "own").save_pretrained(tmp_path / "back", "circuit_tracer")
    before, after = load_file(path), load_file(tmp_path / "back" / path.name)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) and after[name].dtype == dtype for name in before)
    again = foreign.load(tmp_path / "back", made)
    assert again.provenance == sae.provenance


def test_transcoders_of_both_kinds_share_no_folder(tmp_path: Path) -> None:
    clt = sl.sae.CLT(sl.sae.CLTConfig(n_layers=2, d_in=D, d_sae=F, activation=sl.ReLU(target_l0=3.0)), seed=0)
    clt.provenances = tuple(place(layer) for layer in range(2))
    clt.save_pretrained(tmp_path / "cross", "circuit_tracer")
    some_transcoder(ACTIVATIONS["relu"]).save_pretrained(tmp_path / "layers", "circuit_tracer")
    with pytest.raises(ValueError, match="of a layer each, got a cross-layer one"):
        some_transcoder(ACTIVATIONS["relu"]).save_pretrained(tmp_path / "cross", "circuit_tracer")
    with pytest.raises(ValueError, match=r"one kind of transcoder, got \['layer_0\.safetensors'\]"):
        clt.save_pretrained(tmp_path / "layers", "circuit_tracer")

"""circuit-tracer's cross-layer transcoders: read by its own formula, written and read again, and incomplete ones."""

from pathlib import Path
from typing import Any

import foreign
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import saelab as sl
from saelab.sae import CLT, CLTConfig
from saelab.stores.manifest import Provenance

N, D, D_SAE = 3, 6, 10
CONFIG = """# made elsewhere
model_name: "org/small"
model_kind: cross_layer_transcoder
feature_input_hook: hook_resid_mid  # after attention
feature_output_hook: 'hook_mlp_out'
transcoders:
  - model_name: other
"""


def write(folder: Path, *, jumps: bool, config: str | None = CONFIG, dtype: torch.dtype = torch.float32) -> None:
    """Files as circuit-tracer's `to_safetensors` writes them."""
    folder.mkdir(exist_ok=True)
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    for i in range(N):
        held = {f"W_enc_{i}": draw(D_SAE, D), f"b_enc_{i}": draw(D_SAE), f"b_dec_{i}": draw(D)}
        if jumps:
            held[f"threshold_{i}"] = draw(D_SAE).abs()
        save_file(held, folder / f"W_enc_{i}.safetensors")
        save_file({f"W_dec_{i}": draw(D_SAE, N - i, D)}, folder / f"W_dec_{i}.safetensors")
    if config is not None:
        (folder / "config.yaml").write_text(config)


def reconstruct(folder: Path, x: Tensor) -> Tensor:
    """Outputs (n_layers, n, d) of inputs of that shape, by circuit-tracer's formula."""
    outputs = torch.zeros_like(x)
    for i in range(N):
        held = load_file(folder / f"W_enc_{i}.safetensors") | load_file(folder / f"W_dec_{i}.safetensors")
        held = {name: tensor.float() for name, tensor in held.items()}
        u = torch.einsum("bd,fd->bf", x[i], held[f"W_enc_{i}"]) + held[f"b_enc_{i}"]
        z = u * (u > held[f"threshold_{i}"]) if f"threshold_{i}" in held else u.relu()
        outputs[i] += held[f"b_dec_{i}"]
        for m in range(i, N):
            outputs[m] += z @ held[f"W_dec_{i}"][:, m - i]
    return outputs


def side_by_side(x: Tensor) -> Tensor:
    return torch.cat(list(x), dim=1)


@pytest.mark.parametrize("jumps", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_read_as_there_and_written_back(jumps: bool, dtype: torch.dtype, tmp_path: Path) -> None:
    write(tmp_path / "theirs", jumps=jumps, dtype=dtype)
    clt = CLT.from_pretrained(tmp_path / "theirs")
    x = torch.randn(N, 7, D, generator=torch.Generator().manual_seed(1))
    wanted = side_by_side(reconstruct(tmp_path / "theirs", x))
    torch.testing.assert_close(clt(side_by_side(x)), wanted, rtol=1e-4, atol=1e-4)
    assert isinstance(clt.cfg.activation, sl.JumpReLU if jumps else sl.ReLU) and clt.provenances is not None
    assert clt.places == tuple((f"blocks.{i}.hook_resid_mid", f"blocks.{i}.hook_mlp_out") for i in range(N))
    assert clt.provenances[0].model == "org/small"
    clt.save_pretrained(tmp_path / "ours", "circuit_tracer")
    assert sorted(p.name for p in (tmp_path / "ours").iterdir()) == sorted(
        p.name for p in (tmp_path / "theirs").iterdir()
    )
    for path in (tmp_path / "theirs").glob("*.safetensors"):
        one, other = load_file(path), load_file(tmp_path / "ours" / path.name)
        assert one.keys() == other.keys() and all(torch.equal(one[name].float(), other[name]) for name in one)
    again = CLT.from_pretrained(tmp_path / "ours")
    assert again.places == clt.places and again.provenances == clt.provenances
    yaml = pytest.importorskip("yaml")
    said = yaml.safe_load((tmp_path / "ours" / "config.yaml").read_text())
    assert said == {
        "model_kind": "cross_layer_transcoder",
        "model_name": "org/small",
        "feature_input_hook": "hook_resid_mid",
        "feature_output_hook": "hook_mlp_out",
    }


def train(activation: Any, **axes: Any) -> CLT:
    """With normalizers that must be folded in, and provenance."""
    cfg = CLTConfig(n_layers=N, d_in=D, d_sae=D_SAE, activation=activation, **axes)
    x, y = (3 * torch.randn(600, N * D, generator=torch.Generator().manual_seed(seed)) + 1 for seed in (0, 1))
    clt = CLT(cfg).fit((x, y), sl.TrainConfig(n_tokens=400, batch_size=40), progress=False)
    first = Provenance(
        model="org/small",
        weight_processing="none",
        hook_point="",
        text="text",
        tokens_sha256="",
        mask={},
        dtype="float32",
        ctx_len=8,
        n_tokens=600,
        seed=None,
        versions={},
    )
    clt.provenances = tuple(
        first.at(f"blocks.{i}.mlp.hook_in").paired(first.at(f"blocks.{i}.hook_mlp_out")) for i in range(N)
    )
    return clt


@pytest.mark.filterwarnings("ignore:Each layer must have its target L0")
@pytest.mark.parametrize(
    "activation",
    [sl.ReLU(target_l0=3.0), sl.JumpReLU(target_l0=3.0), sl.BatchTopK(k=3), "jumps of TopK"],
    ids=lambda a: getattr(a, "name", a),
)
def test_trained_here_and_read_by_their_formula(activation: Any, tmp_path: Path) -> None:
    x = 3 * torch.randn(N, 200, D, generator=torch.Generator().manual_seed(4)) + 1
    clt = train(sl.TopK(k=3) if activation == "jumps of TopK" else activation, normalizer="whiten")
    if activation == "jumps of TopK":
        clt = clt.to_jumprelu(side_by_side(x))
    clt.save_pretrained(tmp_path, "circuit_tracer")
    made = side_by_side(reconstruct(tmp_path, x))
    near = (made - clt(side_by_side(x))).abs().amax(1) < 1e-3  # a code at its threshold may be rounded to either side
    assert near.float().mean() > 0.98
    torch.testing.assert_close(CLT.from_pretrained(tmp_path)(side_by_side(x)), made, rtol=1e-3, atol=1e-3)


def test_what_the_format_cannot_express(tmp_path: Path) -> None:
    clt = train(sl.TopK(k=3))
    with pytest.raises(ValueError, match=r"knows ReLU and a threshold for each latent, got TopK.*to_jumprelu"):
        clt.save_pretrained(tmp_path, "circuit_tracer")
    clt = train(sl.ReLU(target_l0=3.0, coefficient=0.01))
    places = clt.provenances
    clt.provenances = None
    with pytest.raises(ValueError, match="without provenance"):
        clt.save_pretrained(tmp_path, "circuit_tracer")
    assert places is not None
    clt.provenances = tuple(one.at(f"blocks.{i + 1}.mlp.hook_in") for i, one in enumerate(places))
    with pytest.raises(ValueError, match=r"layer 0 must be at blocks\.0, got 'blocks\.1\.mlp\.hook_in'"):
        clt.save_pretrained(tmp_path, "circuit_tracer")
    clt.provenances = (places[0].at("blocks.0.hook_resid_mid"), *places[1:])
    with pytest.raises(ValueError, match="one hook point for all layers"):
        clt.save_pretrained(tmp_path, "circuit_tracer")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["W_enc_1", "W_dec_2", "W_enc_0"])
def test_files_that_are_missing(name: str, tmp_path: Path) -> None:
    write(tmp_path, jumps=False)
    (tmp_path / f"{name}.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=f"got no .*{name}"):
        CLT.from_pretrained(tmp_path)


def test_the_last_layer_is_missed_by_the_decoders(tmp_path: Path) -> None:
    write(tmp_path, jumps=False)
    for side in ("enc", "dec"):
        (tmp_path / f"W_{side}_2.safetensors").unlink()
    with pytest.raises(ValueError, match=r"Layer 0 of 2.*are all layers here\?"):
        CLT.from_pretrained(tmp_path)


def test_files_that_do_not_fit_each_other(tmp_path: Path) -> None:
    def change(name: str, **tensors: Tensor) -> None:
        write(tmp_path, jumps=True)
        path = tmp_path / f"{name}.safetensors"
        save_file(load_file(path) | tensors, path)

    change("W_enc_1", W_skip_1=torch.zeros(D, D))
    with pytest.raises(ValueError, match="no skip connection"):
        CLT.from_pretrained(tmp_path)
    change("W_enc_1", b_enc_1=torch.zeros(D_SAE + 1))
    with pytest.raises(ValueError, match="Layer 1 of 3"):
        CLT.from_pretrained(tmp_path)
    change("W_enc_1", threshold_1=torch.full((D_SAE,), -0.5))
    with pytest.raises(ValueError, match=r"Thresholds in .*W_enc_1.* at least 0, got -0\.5"):
        CLT.from_pretrained(tmp_path)
    write(tmp_path, jumps=True)
    held = load_file(tmp_path / "W_enc_2.safetensors")
    save_file({name: t for name, t in held.items() if "threshold" not in name}, tmp_path / "W_enc_2.safetensors")
    with pytest.raises(ValueError, match="thresholds for all layers or none, got none for 2"):
        CLT.from_pretrained(tmp_path)
    write(tmp_path, jumps=True, config="model_name: [a, b]\n")
    with pytest.raises(ValueError, match="plain text"):
        CLT.from_pretrained(tmp_path)


def test_without_a_configuration_the_model_has_to_be_told(tmp_path: Path) -> None:
    write(tmp_path, jumps=False, config=None)
    assert CLT.from_pretrained(tmp_path).provenances is None
    clt = CLT.from_pretrained(tmp_path, model="org/small", weight_processing="folded")
    assert clt.places is not None and clt.places[0] == ("blocks.0.hook_resid_mid", "blocks.0.hook_mlp_out")
    assert clt.provenances is not None and clt.provenances[2].weight_processing == "folded"


def test_a_folder_of_theirs_is_no_sae(tmp_path: Path) -> None:
    write(tmp_path, jumps=False)
    with pytest.raises(ValueError, match=r"CLT\.from_pretrained"):
        sl.SAE.from_pretrained(tmp_path)


@pytest.mark.parametrize("name", ["mod\u00e8le", 'a"b', "it's", "a # b", "\u65e5\u672c"])
def test_any_name_of_a_model_is_read_as_it_was_written(name: str, tmp_path: Path) -> None:
    write(tmp_path / "theirs", jumps=True)
    CLT.from_pretrained(tmp_path / "theirs", model=name).save_pretrained(tmp_path / "ours", "circuit_tracer")
    again = CLT.from_pretrained(tmp_path / "ours")
    assert again.provenances is not None and again.provenances[0].model == name
    yaml = pytest.importorskip("yaml")
    assert yaml.safe_load((tmp_path / "ours" / "config.yaml").read_text())["model_name"] == name


@pytest.mark.parametrize(
    ("text", "model"),
    [("'it''s' # here", "it's"), ("a/b  # here", "a/b"), ("a#b", "a#b"), ("~", None), ("null", None)],
)
def test_texts_of_yaml(text: str, model: str | None, tmp_path: Path) -> None:
    write(tmp_path, jumps=True, config=f"model_name: {text}\n")
    found = CLT.from_pretrained(tmp_path).provenances
    assert (found[0].model if found else None) == model


@pytest.mark.parametrize("text", ['"cut', "'cut", '"a" b', "", "*anchor", "\udcff"])
def test_texts_that_are_none(text: str, tmp_path: Path) -> None:
    write(tmp_path, jumps=True)
    (tmp_path / "config.yaml").write_bytes(f"model_name: {text}\n".encode("utf-8", "surrogateescape"))
    with pytest.raises(ValueError, match=r"config\.yaml"):
        CLT.from_pretrained(tmp_path)


def test_numbers_and_dtypes_that_cannot_be(tmp_path: Path) -> None:
    write(tmp_path / "far", jumps=True)
    (tmp_path / "far" / "W_enc_999999999999.safetensors").write_bytes(b"")  # names are counted, none made up
    with pytest.raises(FileNotFoundError, match=r"got no .*W_enc_3"):
        CLT.from_pretrained(tmp_path / "far")
    write(tmp_path / "int", jumps=True)
    path = tmp_path / "int" / "W_dec_1.safetensors"
    save_file({name: tensor.to(torch.int8) for name, tensor in load_file(path).items()}, path)
    with pytest.raises(ValueError, match=r"floating point weights, got torch\.int8"):
        CLT.from_pretrained(tmp_path / "int")


@pytest.mark.filterwarnings("ignore:Each layer must have its target L0")
def test_training_goes_on_from_what_was_read(tmp_path: Path) -> None:
    write(tmp_path, jumps=True)
    CLT.from_pretrained(tmp_path).save_pretrained(tmp_path / "own")
    clt = CLT.from_pretrained(tmp_path / "own")
    before = clt.layers[1].W_enc.detach().clone()
    x, y = (torch.randn(200, N * D, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    clt.fit((x, y), sl.TrainConfig(n_tokens=40, batch_size=40, lr=1e-9), progress=False)
    torch.testing.assert_close(clt.layers[1].W_enc, before, atol=1e-5, rtol=0)


def test_a_layers_file_knows_its_place_and_refuses_negative_codes(tmp_path):
    made = foreign.circuit_tracer(tmp_path, jump=True, skip=True)
    sae = foreign.load(tmp_path, made)
    assert sae.provenance.model == "some/model" and sae.cfg.skip
    assert (sae.provenance.hook_point, sae.provenance.hook_point_out) == (
        "blocks.3.mlp.hook_in",
        "blocks.3.hook_mlp_out",
    )
    (tmp_path / "config.yaml").unlink()
    alone = sl.SAE.from_pretrained(tmp_path, made.file, model="m", hook_point="a", hook_point_out="b")
    assert alone.provenance.hook_point == "a"
    held = load_file(tmp_path / made.file)
    held["activation_function.threshold"][2] = -0.5
    save_file(held, tmp_path / made.file)
    with pytest.raises(ValueError, match=r"Thresholds in .*layer_3.* at least 0, got -0.5"):
        foreign.load(tmp_path, made)

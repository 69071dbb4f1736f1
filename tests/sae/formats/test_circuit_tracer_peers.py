"""circuit-tracer's own loader and transcoders, on what we write and it writes: `make peers`."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from foreign import peer_activations
from test_circuit_tracer_layers import place
from torch import Tensor

import saelab as sl
from saelab.sae import CLT, CLTConfig

if find_spec("circuit_tracer") is None:
    pytest.skip("circuit-tracer is not installed here (make peers)", allow_module_level=True)

from huggingface_hub import constants

if not hasattr(constants, "HF_HUB_ENABLE_HF_TRANSFER"):  # gone since huggingface_hub 1.0; circuit-tracer 0.5.0 reads it
    constants.HF_HUB_ENABLE_HF_TRANSFER = False
from circuit_tracer.transcoder.activation_functions import JumpReLU
from circuit_tracer.transcoder.single_layer_transcoder import SingleLayerTranscoder, TranscoderSet
from circuit_tracer.utils.caching import load_transcoders_from_cache

pytestmark = pytest.mark.filterwarnings("ignore")
D, F, N = 64, 200, 3
CLOSE = {"rtol": 1e-4, "atol": 1e-4}
ACTIVATIONS = {"relu": sl.ReLU(), "jumprelu": sl.JumpReLU(), "batchtopk": sl.BatchTopK(k=12)}


@pytest.fixture(scope="module", params=["random", "stories260k"])
def x(request: pytest.FixtureRequest) -> Tensor:
    return peer_activations(request, request.param, D)


def some_transcoder(activation: Any, layer: int, skip: bool, x: Tensor) -> sl.SAE:
    cfg = sl.SAEConfig(d_in=D, d_sae=F, d_out=D, skip=skip, normalizer="whiten", activation=activation)
    sae, g = sl.SAE(cfg, seed=layer), torch.Generator().manual_seed(layer)
    with torch.no_grad():
        for name, part in sae.named_parameters():
            part.copy_(torch.randn(part.shape, generator=g) * 0.2)
            part.abs_() if name == "threshold" else None
        sae.threshold.fill_(0.4) if activation.threshold == "running" else None
    sae.normalizer.fit(x)
    assert sae.target_normalizer is not None
    sae.target_normalizer.fit(2 * x.flip(1) - 0.5)
    sae.provenance = place(layer)
    return sae


@pytest.mark.parametrize("lazy", [False, True])
@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_it_loads_what_we_write(name: str, skip: bool, lazy: bool, x: Tensor, tmp_path: Path) -> None:
    ours = [some_transcoder(ACTIVATIONS[name], layer, skip, x) for layer in range(N)]
    for sae in ours:
        sae.save_pretrained(tmp_path / "me" / "mine", "circuit_tracer")
    theirs, config = load_transcoders_from_cache(
        "me/mine", cache_dir=tmp_path, device=torch.device("cpu"), lazy_encoder=lazy, lazy_decoder=lazy
    )
    assert (theirs.n_layers, theirs.d_transcoder, theirs.skip_connection) == (N, F, skip)
    assert (theirs.feature_input_hook, theirs.feature_output_hook) == ("hook_resid_mid", "hook_mlp_out")
    assert config["model_name"] == "some/model"
    for sae, other in zip((sae.fold() for sae in ours), theirs, strict=True):
        assert torch.equal(other.W_dec, sae.W_dec) and torch.equal(other.W_enc.T, sae.W_enc)
        if skip:
            assert torch.equal(other.W_skip.T, sae.W_skip)
        if name != "relu":
            assert torch.equal(other.activation_function.threshold, sae.threshold.expand(F))
        with torch.no_grad():
            z = other.encode(x)
            assert 0.2 < (z != 0).sum(1).float().mean() < 0.9 * F
            torch.testing.assert_close(sae.encode(x), z, **CLOSE)
            torch.testing.assert_close(sae(x), other(x), **CLOSE)
            sparse = other.encode_sparse(x, zero_positions=slice(0, 0))[0]
            torch.testing.assert_close(other.decode_sparse(sparse, x)[0], sae(x), **CLOSE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("jump", "skip"), [(False, False), (True, True)])
def test_we_load_what_it_writes(jump: bool, skip: bool, dtype: torch.dtype, x: Tensor, tmp_path: Path) -> None:
    g = torch.Generator().manual_seed(0)
    held = {}
    for layer in range(N):
        activation: Any = JumpReLU(torch.rand(F, generator=g).to(dtype)) if jump else torch.nn.functional.relu
        held[layer] = SingleLayerTranscoder(D, F, activation, layer, skip_connection=skip, dtype=dtype)
        with torch.no_grad():
            for part_name, part in held[layer].named_parameters():
                if "threshold" not in part_name:
                    part.copy_(torch.randn(part.shape, generator=g) * 0.2)
    TranscoderSet(held, "hook_resid_mid", "hook_mlp_out").to_safetensors(str(tmp_path))
    (tmp_path / "config.yaml").write_text("model_name: some/model\nmodel_kind: transcoder_set\n")
    for layer, other in held.items():
        sae = sl.SAE.from_pretrained(tmp_path, f"layer_{layer}.safetensors")
        assert sae.provenance is not None and sae.provenance.place == place(layer).place
        other = other.float()
        with torch.no_grad():
            torch.testing.assert_close(sae.encode(x), other.encode(x), **CLOSE)
            torch.testing.assert_close(sae(x), other(x), **CLOSE)


def test_cross_layer_transcoders_too(x: Tensor, tmp_path: Path) -> None:
    clt = CLT(CLTConfig(n_layers=N, d_in=D, d_sae=F, activation=sl.JumpReLU(), normalizer="none"), seed=0)
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, part in clt.named_parameters():
            part.copy_(torch.randn(part.shape, generator=g) * 0.2)
            part.abs_() if "threshold" in name else None
    clt.provenances = tuple(place(layer) for layer in range(N))
    clt.save_pretrained(tmp_path / "me" / "cross", "circuit_tracer")
    theirs, _ = load_transcoders_from_cache("me/cross", cache_dir=tmp_path, device=torch.device("cpu"))
    inputs = torch.stack([x, x.flip(1), 2 * x])
    with torch.no_grad():
        z = theirs.encode(inputs)
        torch.testing.assert_close(clt.encode(torch.cat(list(inputs), 1)).movedim(1, 0), z, **CLOSE)
        made = theirs.decode(z.to_sparse())
        torch.testing.assert_close(clt(torch.cat(list(inputs), 1)), torch.cat(list(made), 1), **CLOSE)

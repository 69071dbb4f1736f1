"""overcomplete's own modules, trained by its own function, and ours read by them: `make peers`."""

import json
import sys
import types
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from foreign import PLACE, peer_activations
from safetensors.torch import load_file, save_file
from torch import Tensor

import saelab as sl

if (spec := find_spec("overcomplete")) is None or spec.submodule_search_locations is None:
    pytest.skip("overcomplete is not installed here (make peers)", allow_module_level=True)
# Its top imports models of images, and with them torchvision, which the SAEs need nothing of.
package = types.ModuleType("overcomplete")
package.__path__ = list(spec.submodule_search_locations)
sys.modules.setdefault("overcomplete", package)
from overcomplete import sae as saes  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")
D_IN, D_SAE, K = 64, 160, 8
CLOSE = {"rtol": 1e-4, "atol": 1e-4}
TOPK = {"activation": sl.TopK(k=K)}


@pytest.fixture(scope="module", params=["random", "stories260k"])
def x(request: pytest.FixtureRequest) -> Tensor:
    return peer_activations(request, request.param, D_IN)


def of_batch(sae: Any) -> dict[str, Any]:
    return {"activation": sl.BatchTopK(k=K), "threshold": float(sae.running_threshold)}


SAES: dict[str, tuple[Callable[[Tensor], Any], Any]] = {
    "SAE": (lambda x: saes.SAE(D_IN, D_SAE), {"activation": sl.ReLU()}),
    "TopKSAE": (lambda x: saes.TopKSAE(D_IN, D_SAE, top_k=K), TOPK),
    "TopKSAE, a radius": (
        lambda x: saes.TopKSAE(D_IN, D_SAE, top_k=K, dictionary_params={"use_multiplier": True}),
        TOPK,
    ),
    "TopKSAE, max_l1": (
        lambda x: saes.TopKSAE(D_IN, D_SAE, top_k=K, dictionary_params={"normalization": "max_l1"}),
        TOPK,
    ),
    "TopKSAE, batch norm": (lambda x: saes.TopKSAE(D_IN, D_SAE, top_k=K, encoder_module="mlp_bn_1"), TOPK),
    "TopKSAE, tied": (lambda x: saes.TopKSAE(D_IN, D_SAE, top_k=K).tied(bias=True), TOPK),
    "TopKSAE, untied": (lambda x: saes.TopKSAE(D_IN, D_SAE, top_k=K).untied(), TOPK),
    "BatchTopKSAE": (lambda x: saes.BatchTopKSAE(D_IN, D_SAE, top_k=K * 100), of_batch),
    "JumpSAE": (lambda x: saes.JumpSAE(D_IN, D_SAE, bandwidth=0.1), {}),
    "RATopKSAE": (lambda x: saes.RATopKSAE(D_IN, D_SAE, x[:200].clone(), top_k=K), TOPK),
    "RAJumpSAE": (lambda x: saes.RAJumpSAE(D_IN, D_SAE, x[:200].clone(), bandwidth=0.1), {}),
    "RATopKSAE, tied": (lambda x: saes.RATopKSAE(D_IN, D_SAE, x[:200].clone(), top_k=K).tied(), TOPK),
}


def loss(x: Tensor, x_hat: Tensor, pre: Tensor, z: Tensor, dictionary: Tensor) -> Tensor:
    return (x - x_hat).square().mean()


def train(name: str, x: Tensor) -> tuple[Any, dict[str, Any]]:
    """A module trained by the library, in inference, and what its state dict does not say."""
    torch.manual_seed(0)
    make, given = SAES[name]
    sae = make(x)
    saes.train_sae(
        sae, x.split(100), loss, torch.optim.Adam(sae.parameters(), lr=1e-2), nb_epochs=2, monitoring=0, clip_grad=0
    )
    return sae, given


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("name", SAES)
def test_codes_and_reconstructions_are_its_own(name: str, suffix: str, x: Tensor, tmp_path: Path) -> None:
    sae, given = train(name, x)
    sae.eval()
    file = tmp_path / f"theirs{suffix}"
    state = {key: tensor.clone() for key, tensor in sae.state_dict().items()}
    torch.save(state, file) if suffix == ".pt" else save_file(state, file)
    ours = sl.SAE.from_pretrained(file, **PLACE, **(given(sae) if callable(given) else given))
    with torch.no_grad():
        _, z, x_hat = sae(x)
    assert 1 < (z != 0).sum(1).float().mean() < 0.9 * D_SAE
    torch.testing.assert_close(ours.encode(x), z, **CLOSE)
    torch.testing.assert_close(ours(x), x_hat, **CLOSE)
    ours.save_pretrained(tmp_path / "ours")
    sl.SAE.from_pretrained(tmp_path / "ours").save_pretrained(tmp_path / "back", "overcomplete")
    assert_same_module(tmp_path / "back", file.name, name, x, z, x_hat)


def assert_same_module(folder: Path, file: str, name: str, x: Tensor, z: Tensor, x_hat: Tensor) -> None:
    """The state dict that was written back is the module's: loaded there, it makes the same."""
    fresh = SAES[name][0](x)
    path = folder / file
    fresh.load_state_dict(torch.load(path, weights_only=True) if path.suffix == ".pt" else load_file(path))
    if name == "BatchTopKSAE":
        fresh.running_threshold = torch.tensor(json.loads((folder / "config.json").read_text())["running_threshold"])
    fresh.eval()
    with torch.no_grad():
        _, z_again, x_hat_again = fresh(x)
    torch.testing.assert_close(z_again, z, **CLOSE)
    torch.testing.assert_close(x_hat_again, x_hat, **CLOSE)


@pytest.mark.parametrize("name", ["TopKSAE", "RATopKSAE"])
def test_in_the_middle_of_training(name: str, x: Tensor, tmp_path: Path) -> None:
    """After an optimizer's step the rows are not normalized; its next forward, or eval(), does it."""
    sae, given = train(name, x)
    file = tmp_path / "theirs.pt"
    torch.save(sae.state_dict(), file)
    with pytest.raises(ValueError, match=r"sae\.eval\(\); torch\.save"):
        sl.SAE.from_pretrained(file, **PLACE, **given)
    said = {"sae_class": name, "arguments": {"top_k": K}}
    (tmp_path / "config.json").write_text(json.dumps(said))
    ours = sl.SAE.from_pretrained(file, **PLACE)
    sae.eval()
    with torch.no_grad():
        _, z, x_hat = sae(x)
    torch.testing.assert_close(ours.encode(x), z, **CLOSE)
    torch.testing.assert_close(ours(x), x_hat, **CLOSE)


@pytest.mark.parametrize(
    "activation", [sl.ReLU(), sl.TopK(k=K), sl.JumpReLU(), sl.BatchTopK(k=K)], ids=lambda activation: activation.name
)
def test_it_makes_the_same_of_ours(activation: Any, x: Tensor, tmp_path: Path) -> None:
    """As the model card says: the class and its arguments are in config.json."""
    cfg = sl.SAEConfig(d_in=D_IN, d_sae=D_SAE, activation=activation, normalizer="none")
    sae, g = sl.SAE(cfg, seed=0), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for part_name, part in sae.named_parameters():
            part.copy_(torch.randn(part.shape, generator=g) * 0.3)
            part.abs_() if part_name == "threshold" else None
        sae.b_dec.zero_()
        sae.threshold.fill_(0.4) if activation.threshold == "running" else None
    sae.save_pretrained(tmp_path, "overcomplete")
    said = json.loads((tmp_path / "config.json").read_text())
    theirs = getattr(saes, said["sae_class"])(**said["arguments"])
    theirs.load_state_dict(torch.load(tmp_path / "sae.pt", weights_only=True))
    theirs = theirs.eval()
    with torch.no_grad():
        _, z, x_hat = theirs(x)
    torch.testing.assert_close(z, sae.encode(x), **CLOSE)
    torch.testing.assert_close(x_hat, sae(x), **CLOSE)


@pytest.mark.parametrize("name", ["MpSAE", "OMPSAE", "QSAE"])
def test_other_classes_are_refused(name: str, x: Tensor, tmp_path: Path) -> None:
    sae = getattr(saes, name)(D_IN, D_SAE)
    torch.save(sae.state_dict(), tmp_path / "a.pt")
    with pytest.raises(ValueError, match="QSAE" if name == "QSAE" else "MpSAE and OMPSAE"):
        sl.SAE.from_pretrained(tmp_path, **PLACE, **TOPK)
    torch.save(sae, tmp_path / "a.pt")
    with pytest.raises(ValueError, match=rf"overcomplete\.sae\.\w+\.{name}.*state_dict\(\)"):
        sl.SAE.from_pretrained(tmp_path, **PLACE, **TOPK)

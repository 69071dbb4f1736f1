"""SAEs read from, and written for, the libraries themselves: equal codes and reconstructions on both sides.

Needs the extra `bench`, in an environment of its own: `make peers`.
"""

import json
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from foreign import MAKERS, OUT, PLACE, TO, D, F, load, peer_activations, some_activations
from safetensors.torch import load_file
from torch import Tensor, nn

import saelab as sl

if any(find_spec(name) is None for name in ("sae_lens", "sparsify", "dictionary_learning")):
    pytest.skip("the extra `bench` is not installed here (make peers)", allow_module_level=True)

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import sae_lens.loading.pretrained_sae_loaders as sae_lens_loaders
    import yaml
    from dictionary_learning import dictionary as dictionary_classes
    from dictionary_learning.trainers.batch_top_k import BatchTopKSAE
    from dictionary_learning.trainers.matryoshka_batch_top_k import MatryoshkaBatchTopKSAE
    from dictionary_learning.trainers.top_k import AutoEncoderTopK
    from dictionary_learning.utils import load_dictionary
    from sae_lens import SAE as SAELensSAE, __file__ as sae_lens_file
    from sae_lens.registry import get_sae_class
    from sparsify import SparseCoder, SparseCoderConfig

pytestmark = pytest.mark.filterwarnings("ignore")

D_IN, D_SAE, D_OUT, K = 64, 200, 48, 12
CLOSE = {"rtol": 1e-5, "atol": 1e-5}
Held = dict[str, Tensor]


@pytest.fixture(scope="module", params=["random", "stories260k"])
def x(request: pytest.FixtureRequest) -> Tensor:
    return peer_activations(request, request.param, D_IN)


@dataclass
class Peer:
    """An SAE of another library, how it encodes, decodes and saves, and what its files do not say."""

    encode: Callable[[Tensor], Tensor]
    run: Callable[[Tensor], Tensor]
    save: Callable[[Path], None]
    load: Callable[[Path], Callable[[Tensor], Tensor]]
    """reads a folder, gives what `run` would be"""
    format: str
    weights: str
    config: str
    given: dict[str, Any]


def fill(module: nn.Module, seed: int = 0) -> None:
    """Weights, norms, biases, gates and thresholds that are nothing special, some thresholds below 0."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, part in module.named_parameters():
            new = torch.randn(part.shape, generator=g) * (0.15 if part.ndim > 1 else 0.4)
            if part.ndim > 1 and "dec" in name:
                new *= 0.5 + torch.rand(new.shape[0], 1, generator=g)
            part.copy_(torch.rand(part.shape, generator=g) - 0.1 if name == "threshold" else new)


# ---- each library's SAEs
def of_saelens(architecture: str, norm: str = "none", subtract: bool = True, rescale: bool = False) -> Peer:
    cls, config = get_sae_class(architecture)
    cfg: dict[str, Any] = {"d_in": D_IN, "d_sae": D_SAE}
    cfg |= {"normalize_activations": norm, "apply_b_dec_to_input": subtract}
    cfg |= {"k": K, "rescale_acts_by_decoder_norm": rescale} if "topk" in architecture else {}
    cfg |= {"d_out": D_OUT} if "transcoder" in architecture else {}
    cfg |= {"residual_threshold": 0.3, "max_iterations": 8} if architecture == "matching_pursuit" else {}
    sae = cls(config(**cfg))
    fill(sae)
    if architecture == "matching_pursuit":
        sae.W_dec.data /= sae.W_dec.data.norm(dim=1, keepdim=True)
    sae.cfg.metadata.model_name, sae.cfg.metadata.hook_name = PLACE["model"], PLACE["hook_point"]
    sae.cfg.metadata.hook_name_out = TO["hook_point_out"]
    return Peer(
        sae.encode, sae, sae.save_model, SAELensSAE.load_from_disk, "saelens", "sae_weights.safetensors", "cfg.json", {}
    )


def of_sparsify(activation: str, transcode: bool, skip: bool, num_latents: int) -> Peer:
    cfg = SparseCoderConfig(
        activation=activation,
        k=8,
        num_latents=num_latents,
        expansion_factor=3,
        transcode=transcode,
        skip_connection=skip,
        normalize_decoder=False,
    )
    sae = SparseCoder(D_IN, cfg)
    fill(sae)

    def encode(x: Tensor) -> Tensor:
        found = sae.encode(x)
        return torch.zeros(len(x), sae.num_latents).scatter(1, found.top_indices, found.top_acts)

    def save(folder: Path) -> None:
        sae.save_to_disk(folder)

    def read(folder: Path) -> Callable[[Tensor], Tensor]:
        again = SparseCoder.load_from_disk(folder)
        return lambda x: again(x).sae_out

    given = PLACE | (TO if transcode or skip else {})
    return Peer(encode, lambda x: sae(x).sae_out, save, read, "sparsify", "sae.safetensors", "cfg.json", given)


DICTIONARIES = {
    name: getattr(dictionary_classes, name)
    for name in ("AutoEncoder", "AutoEncoderNew", "GatedAutoEncoder", "JumpReluAutoEncoder")
} | {cls.__name__: cls for cls in (AutoEncoderTopK, BatchTopKSAE, MatryoshkaBatchTopKSAE)}


def of_dictionary_learning(name: str) -> Peer:
    more: dict[str, Any] = {"k": K} if "TopK" in name else {}
    more |= {"group_sizes": [40, 60, 100]} if "Matryoshka" in name else {}
    sae = DICTIONARIES[name](D_IN, D_SAE, **more)
    fill(sae)
    if "Batch" in name:
        sae.threshold.fill_(0.4)

    def save(folder: Path) -> None:
        folder.mkdir()
        torch.save(sae.state_dict(), folder / "ae.pt")
        trainer = {"dict_class": name, "k": K, "lm_name": PLACE["model"], "submodule_name": "resid_post_layer_1"}
        sizes = {"activation_dim": D_IN, "dict_size": D_SAE, "layer": 1}
        (folder / "config.json").write_text(json.dumps({"trainer": trainer | sizes, "buffer": {"ctx_len": 64}}))

    def read(folder: Path) -> Callable[[Tensor], Tensor]:
        # Its loader divides this class's decoder by its norms by itself, without multiplying the codes.
        if name == "AutoEncoder":
            return dictionary_classes.AutoEncoder.from_pretrained(folder / "ae.pt", normalize_decoder=False)
        return load_dictionary(str(folder), "cpu")[0]

    return Peer(sae.encode, sae, save, read, "dictionary_learning", "ae.pt", "config.json", {})


PEERS: dict[str, Callable[[], Peer]] = {}
for architecture, norm, subtract in product(
    ("standard", "topk", "abstopk", "jumprelu", "gated"),
    ("none", "layer_norm", "constant_norm_rescale"),
    (True, False),
):
    for rescale in (False, True) if "topk" in architecture else (False,):
        PEERS[f"saelens {architecture}, {norm}, {subtract=}, {rescale=}"] = (
            lambda a=(architecture, norm, subtract, rescale): of_saelens(*a)
        )
for architecture in ("transcoder", "skip_transcoder", "jumprelu_transcoder", "jumprelu_skip_transcoder"):
    PEERS[f"saelens {architecture}"] = lambda a=architecture: of_saelens(a, subtract=False)
for subtract in (True, False):
    PEERS[f"saelens matching_pursuit, {subtract=}"] = lambda s=subtract: of_saelens("matching_pursuit", subtract=s)
for kind in product(("topk", "groupmax"), (True, False), (True, False), (0, 200)):
    PEERS["sparsify {}, transcode={}, skip={}, num_latents={}".format(*kind)] = lambda a=kind: of_sparsify(*a)
for name in DICTIONARIES:
    PEERS[f"dictionary_learning {name}"] = lambda name=name: of_dictionary_learning(name)


def read_weights(path: Path) -> Held:
    return torch.load(path, weights_only=True) if path.suffix == ".pt" else load_file(path)


@pytest.mark.parametrize("name", PEERS)
def test_both_libraries_make_the_same_of_it(name: str, x: Tensor, tmp_path: Path) -> None:
    peer = PEERS[name]()
    peer.save(tmp_path / "theirs")
    ours = sl.SAE.from_pretrained(tmp_path / "theirs", **peer.given)
    with torch.no_grad():
        codes, made = peer.encode(x), peer.run(x)
    assert 0.2 < (codes != 0).sum(1).float().mean() < 0.9 * codes.shape[1]
    torch.testing.assert_close(ours.encode(x), codes, **CLOSE)
    torch.testing.assert_close(ours(x), made, **CLOSE)

    # Through our own format and back, not a bit differs.
    ours.save_pretrained(tmp_path / "ours")
    again = sl.SAE.from_pretrained(tmp_path / "ours")
    again.save_pretrained(tmp_path / "back", peer.format)
    before, after = (read_weights(tmp_path / folder / peer.weights) for folder in ("theirs", "back"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) and before[key].dtype == after[key].dtype for key in before)
    before, after = (json.loads((tmp_path / folder / peer.config).read_text()) for folder in ("theirs", "back"))
    assert before == after

    # Written anew, from our weights alone, the library makes the same of it too.
    again.origin = None
    again.save_pretrained(tmp_path / "anew", peer.format)
    with torch.no_grad():
        torch.testing.assert_close(peer.load(tmp_path / "anew")(x), made, **CLOSE)


# ---- SAEs of our own
OWN: dict[str, tuple[dict[str, Any], set[str]]] = {
    "relu": ({"activation": sl.ReLU(target_l0=12.0)}, {"saelens", "dictionary_learning"}),
    "jumprelu": ({"activation": sl.JumpReLU(target_l0=12.0)}, {"saelens", "dictionary_learning"}),
    "topk": ({"activation": sl.TopK(k=K)}, {"saelens", "sparsify", "dictionary_learning"}),
    "abstopk": ({"activation": sl.AbsTopK(k=K)}, {"saelens"}),
    "batchtopk": ({"activation": sl.BatchTopK(k=K), "prefixes": (40, 100, 200)}, {"saelens", "dictionary_learning"}),
    "relu transcoder": ({"activation": sl.ReLU(target_l0=12.0), "d_out": D_IN, "skip": True}, {"saelens"}),
    "topk transcoder": ({"activation": sl.TopK(k=K), "d_out": D_IN, "skip": True}, {"sparsify"}),
}


@pytest.mark.parametrize("normalizer", ["none", "scale", "whiten"])
@pytest.mark.parametrize(("name", "format"), [(n, f) for n, (_, formats) in OWN.items() for f in sorted(formats)])
def test_they_make_the_same_of_ours(name: str, format: str, normalizer: str, x: Tensor, tmp_path: Path) -> None:
    cfg = sl.SAEConfig(d_in=D_IN, d_sae=D_SAE, dictionary="free", normalizer=normalizer, **OWN[name][0])
    sae = sl.SAE(cfg, seed=0)
    fill(sae, seed=3)
    sae.threshold.data.abs_() if cfg.activation.threshold == "learned" else None
    sae.threshold.fill_(0.4) if cfg.activation.threshold == "running" else None
    sae.normalizer.fit(x)
    if sae.target_normalizer is not None:
        sae.target_normalizer.fit(2 * x.flip(1) - 0.5)
    sae.save_pretrained(tmp_path / "a", format)
    read = {
        "saelens": SAELensSAE.load_from_disk,
        "sparsify": lambda folder: lambda x: SparseCoder.load_from_disk(folder)(x).sae_out,
        "dictionary_learning": lambda folder: load_dictionary(str(folder), "cpu")[0],
    }[format]
    if format == "dictionary_learning" and name == "relu":
        read = lambda folder: dictionary_classes.AutoEncoder.from_pretrained(  # noqa: E731
            folder / "ae.pt", normalize_decoder=False
        )
    with torch.no_grad():
        theirs = read(tmp_path / "a")(x)
    # Whitening multiplies what rounds by up to its condition number.
    close = {"rtol": 1e-4, "atol": 1e-4} if normalizer == "whiten" else CLOSE
    torch.testing.assert_close(theirs, sae(x), **close)


# ---- what SAELens reads of other people's files
X = some_activations(200)


def as_saelens_reads(loader: str, repo: str, place: str, folder: Path, patch: pytest.MonkeyPatch, **cfg: Any) -> Any:
    """Its own conversion of a file on the Hub, with the Hub in a folder."""

    def fetch(repo_id: str, filename: str, subfolder: str | None = None, **_: Any) -> str:
        return str(folder / (subfolder or "") / filename)

    def measure(repo_id: str, filename: str) -> dict[str, list[int]]:
        return {key: list(tensor.shape) for key, tensor in load_file(folder / filename).items()}

    patch.setattr(sae_lens_loaders, "hf_hub_download", fetch)
    patch.setattr(sae_lens_loaders, "get_safetensors_tensor_shapes", measure)
    cfg = {"d_in": D, "d_sae": F, "dtype": "float32", **cfg}
    cfg, state, _ = getattr(sae_lens_loaders, loader)(repo, place, "cpu", cfg_overrides=cfg)
    cfg = sae_lens_loaders.handle_config_defaulting(cfg)
    sae = SAELensSAE.from_dict(cfg)
    sae.process_state_dict_for_loading(state)
    sae.load_state_dict(state)
    return sae


@pytest.mark.parametrize(
    ("maker", "loader", "repo", "place", "cfg"),
    [
        ("gemma scope", "gemma_2_sae_huggingface_loader", "google/gemma-scope-2b-pt-res", "layer_1/width_16k", {}),
        (
            "gemma scope transcoder",
            "gemma_2_transcoder_huggingface_loader",
            "google/gemma-scope-2b-pt-transcoders",
            "layer_1/width_16k",
            {"d_out": D},
        ),
        ("gemma scope 2", "gemma_3_sae_huggingface_loader", "google/gemma-scope-2-1b-pt", "resid_post/layer_7", {}),
        (
            "gemma scope 2 affine",
            "gemma_3_sae_huggingface_loader",
            "google/gemma-scope-2-1b-pt",
            "transcoder/layer_7",
            {"d_out": OUT},
        ),
        *(
            (f"dictionary_learning {name}", "dictionary_learning_sae_huggingface_loader_1", "canrager/lm_sae", ".", {})
            for name in ("AutoEncoder", "GatedAutoEncoder", "AutoEncoderTopK", "BatchTopKSAE", "JumpReluAutoEncoder")
        ),
        (
            "qwen scope",
            "qwen_scope_sae_huggingface_loader",
            "Qwen/SAE-Res-Qwen3-1.7B-Base-W32K-L0_4",
            "layer1.sae.pt",
            {},
        ),
    ],
)
def test_saelens_reads_the_same_in_other_peoples_files(
    maker: str, loader: str, repo: str, place: str, cfg: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / place if maker.startswith("gemma") else tmp_path
    folder.mkdir(parents=True, exist_ok=True)
    made = MAKERS[maker](folder)
    if maker.startswith("dictionary"):
        config = json.loads((folder / "config.json").read_text())
        config["trainer"] |= {"activation_dim": D, "dict_size": F, "layer": 1}
        (folder / "config.json").write_text(json.dumps(config))
    theirs = as_saelens_reads(loader, repo, place, tmp_path, monkeypatch, **cfg)
    ours = load(folder, made)
    with torch.no_grad():
        torch.testing.assert_close(ours.encode(X), theirs.encode(X), **CLOSE)
        torch.testing.assert_close(ours(X), theirs(X), **CLOSE)


def test_saelens_reads_the_same_in_llama_scope(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It leaves its users to fold the norm of the activations, which is in the file that it read."""
    made = MAKERS["llama scope"](tmp_path)
    theirs = as_saelens_reads("llama_scope_sae_huggingface_loader", "r", ".", tmp_path, monkeypatch)
    norms = json.loads((tmp_path / "hyperparams.json").read_text())["dataset_average_activation_norm"]
    theirs.fold_activation_norm_scaling_factor(D**0.5 / norms["in"])
    ours = load(tmp_path, made)
    with torch.no_grad():
        torch.testing.assert_close(ours.encode(X), theirs.encode(X), **CLOSE)
        torch.testing.assert_close(ours(X), theirs(X), **CLOSE)


def test_release_names_lead_where_saelens_finds_them() -> None:
    """Every name of its table leads to the same repository and folder; those of releases newer than ours are left."""
    from saelab.sae.formats.releases import find_published

    table = yaml.safe_load((Path(sae_lens_file).parent / "pretrained_saes.yaml").read_text())
    found, other, unknown = 0, [], 0
    for release, entry in table.items():
        for sae in entry["saes"]:
            try:
                place = find_published(release, str(sae["id"]))
            except ValueError:
                place = None
            if place is None:
                unknown += 1
            elif (place.repo, place.path) == (entry["repo_id"], str(sae["path"])):
                found += 1
            else:
                other.append((release, sae["id"]))
    assert not other
    assert found > 0.99 * (found + unknown)

"""Damaged, hostile and ambiguous files, the Hub, release names: refused with a reason, nothing run."""

import fnmatch
import io
import json
import os
import shutil
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from foreign import MAKERS, PLACE, D, F, draw, load, pick, saelens, some_activations, write_json
from safetensors.torch import load_file, save_file

import saelab as sl
from saelab.sae.formats.hub import find_release, list_files, register_release
from saelab.sae.formats.sources import read_tensors

X = some_activations(8)
MATRYOSHKA = "chanind/gemma-2-9b-batch-topk-matryoshka-saes-w-32k-l0-60"


class Bomb:
    """Unpickled, it would leave a file behind."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def refuse(match: str, folder: Path, *names: str, **given: Any) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=match):
        sl.SAE.from_pretrained(folder, *names, **{**PLACE, **given})


# ---- damage
@pytest.mark.parametrize("kept", [0, 5, 60, -7])
@pytest.mark.parametrize("name", ["saelens topk", "gemma scope", "openai topk", "sparsify topk"])
def test_a_file_that_was_cut_off(name: str, kept: int, tmp_path: Path) -> None:
    made = MAKERS[name](tmp_path)
    path = next(path for path in tmp_path.rglob("*") if path.suffix in (".safetensors", ".npz", ".pt"))
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ValueError, match=path.name):
        load(tmp_path, made)


@pytest.mark.parametrize(
    ("name", "change", "match"),
    [
        ("W_enc", torch.zeros(F, D), r"W_enc must have shape \(6, 20\), got \(20, 6\)"),
        ("W_dec", torch.zeros(F, D + 1), "must have shape"),
        ("b_dec", torch.zeros(D, 1), "b_dec must have shape"),
        ("threshold", torch.zeros(F - 1), "threshold must have shape"),
        ("W_enc", torch.zeros(D, F, dtype=torch.int32), "W_enc must be floating-point numbers"),
        ("b_enc", None, "must hold tensors"),
    ],
)
def test_weights_that_do_not_fit(name: str, change: torch.Tensor | None, match: str, tmp_path: Path) -> None:
    w = draw()
    held = {n: t for n, t in (w | {name: change}).items() if t is not None}  # type: ignore[operator]
    saelens(tmp_path, held, "jumprelu")
    refuse(match, tmp_path)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"architecture": "temporal"}, "is no point on saelab's axes"),
        ({"architecture": None}, "is no point on saelab's axes"),
        ({"normalize_activations": "covariance_whitening"}, "`normalize_activations` must be"),
        ({"architecture": "topk", "k": "many"}, "must say a number for `k`"),
        ({"architecture": "topk", "k": F + 1}, "`k` must be in 1..d_sae"),
    ],
)
def test_configs_that_say_nothing_we_know(change: dict[str, Any], match: str, tmp_path: Path) -> None:
    saelens(tmp_path, draw(), "jumprelu")
    write_json(tmp_path / "cfg.json", json.loads((tmp_path / "cfg.json").read_text()) | change)
    refuse(match, tmp_path)


@pytest.mark.parametrize("held", ["[1, 2]", "{", "null"])
def test_configs_that_are_none(held: str, tmp_path: Path) -> None:
    saelens(tmp_path, draw(), "jumprelu")
    (tmp_path / "cfg.json").write_text(held)
    refuse("must hold", tmp_path)


# ---- hostility
@pytest.mark.parametrize("file", ["ae.pt", "layer0.sae.pt", "weights.pth", "sae_weights.pt"])
@pytest.mark.parametrize("zipped", [True, False])
def test_no_code_in_a_pickle_is_run(file: str, zipped: bool, tmp_path: Path) -> None:
    mark = tmp_path / "it-ran"
    (tmp_path / "a").mkdir()
    held = {"W_E": torch.zeros(2), "b_dec": Bomb(mark)}
    torch.save(held, tmp_path / "a" / file, _use_new_zipfile_serialization=zipped)
    write_json(tmp_path / "a" / "config.json", {"d_model": 4})
    refuse(r"one that names \w+\.mkdir\. It was not unpickled further: what it holds could run code", tmp_path / "a")
    assert not mark.exists()


def test_no_code_in_an_archive_is_run(tmp_path: Path) -> None:
    mark = tmp_path / "it-ran"
    (tmp_path / "a").mkdir()
    w = {name: part.numpy() for name, part in draw().items()}
    np.savez(tmp_path / "a" / "params.npz", **w | {"b_enc": np.array([Bomb(mark)] * F, dtype=object)})
    refuse("got objects, which could run code", tmp_path / "a")
    assert not mark.exists()


def bomb(path: Path, shape: tuple[int, ...], n_bytes: int) -> None:
    """An npz whose W_enc claims a shape and unpacks to so many zeros."""
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<f4", "fortran_order": False, "shape": shape})
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, part in draw().items():
            with archive.open(f"{name}.npy", "w") as member:
                if name != "W_enc":
                    np.lib.format.write_array(member, part.numpy())
                    continue
                member.write(header.getvalue())
                for _ in range(n_bytes // 2**20):
                    member.write(bytes(2**20))
                member.write(bytes(n_bytes % 2**20))


def test_a_zip_bomb_is_not_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bomb(tmp_path / "params.npz", (2**12, 2**11), 2**25)
    assert (tmp_path / "params.npz").stat().st_size < 2**20
    monkeypatch.setattr(np.lib.format, "read_array", lambda *a, **k: pytest.fail("it was unpacked"))
    refuse("must not unpack to more than 20 times its size", tmp_path)


def test_an_archive_that_lies_about_its_size(tmp_path: Path) -> None:
    bomb(tmp_path / "params.npz", (2**20, 2**20), 1000)
    refuse("must have .* bytes by its header", tmp_path)


def test_a_compressed_pytorch_file_is_not_unpacked(tmp_path: Path) -> None:
    torch.save(pick(draw()), tmp_path / "b.pt")
    with (
        zipfile.ZipFile(tmp_path / "b.pt") as stored,
        zipfile.ZipFile(tmp_path / "layer0.sae.pt", "w", zipfile.ZIP_DEFLATED) as packed,
    ):
        for info in stored.infolist():
            packed.writestr(info.filename, stored.read(info))
    refuse("must be stored uncompressed", tmp_path, "layer0.sae.pt")


@pytest.mark.parametrize("name", ["../other", "/etc", "~/x", "a/../../other", ""])
def test_no_name_leads_out_of_the_folder(name: str, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "other").mkdir()
    saelens(tmp_path / "other", draw(), "jumprelu")
    refuse("which leaves it", tmp_path / "a", name)
    refuse("which leaves it", Path("owner/repo"), name)
    with pytest.raises(ValueError, match="leaves it"):
        register_release("mine", "me/mine", path=name)


def test_no_config_leads_out_of_the_folder(tmp_path: Path) -> None:
    """OpenMOSS' own loader would take the weights from there."""
    (tmp_path / "a").mkdir()
    made = MAKERS["openmoss relu"](tmp_path / "a")
    settings = json.loads((tmp_path / "a" / "config.json").read_text())
    for elsewhere in ("/etc/passwd", "../b", "owner/other"):
        write_json(tmp_path / "a" / "config.json", settings | {"sae_pretrained_name_or_path": elsewhere})
        with pytest.raises(ValueError, match=r"leaves it|must hold its own weights"):
            load(tmp_path / "a", made)


def test_two_formats_in_one_folder(tmp_path: Path) -> None:
    saelens(tmp_path, draw(), "jumprelu")
    MAKERS["gemma scope"](tmp_path)
    refuse("must hold one SAE, got those of saelens and gemma_scope in", tmp_path)
    sae = sl.SAE.from_pretrained(tmp_path, format="gemma_scope", **PLACE)
    assert torch.equal(sae.W_dec, draw(10)["W_dec"])
    refuse("`format` must be what is there", tmp_path, format="openai")
    refuse("`format` must be one of", tmp_path, format="sealens")


def test_a_folder_that_holds_no_sae(tmp_path: Path) -> None:
    refuse("which is empty", tmp_path)
    save_file({"weight": torch.zeros(2)}, tmp_path / "model.safetensors")
    write_json(tmp_path / "config.json", {"architectures": ["LlamaForCausalLM"]})
    refuse(r"must be of a known format \(saelab, saelens,.*holds \['config.json', 'model.safetensors'\]", tmp_path)
    (tmp_path / "layer_3").mkdir()
    refuse(r"Choose one of \['config.json', 'layer_3'", tmp_path, "layer_4")


def test_names_of_folders_say_nothing(tmp_path: Path) -> None:
    """What is called layer_7 at Gemma Scope stands where the caller says."""
    place = tmp_path / "google" / "gemma-scope-2b-pt-res" / "layer_7" / "width_16k" / "average_l0_9"
    place.mkdir(parents=True)
    MAKERS["gemma scope"](place)
    sae = sl.SAE.from_pretrained(tmp_path, "google/gemma-scope-2b-pt-res/layer_7/width_16k/average_l0_9", **PLACE)
    assert sae.provenance is not None and sae.provenance.hook_point == PLACE["hook_point"]
    with pytest.raises(ValueError, match="`model` must be given"):
        sl.SAE.from_pretrained(place)


def test_tensors_are_mapped_not_read(tmp_path: Path) -> None:
    w = draw()
    save_file(pick(w), tmp_path / "a.safetensors")
    torch.save(pick(w), tmp_path / "b.pt")
    np.savez(tmp_path / "c.npz", **{name: part.numpy() for name, part in w.items()})
    for name in ("a.safetensors", "b.pt", "c.npz"):
        held = read_tensors(tmp_path / name)
        assert all(torch.equal(held[n], w[n]) for n in pick(w))


# ---- the Hub
@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Repositories are folders here; what is fetched is copied, and noted in `fetched`."""
    remote, local = tmp_path / "remote", tmp_path / "cache"

    def snapshot(repo: str, *, allow_patterns: list[str] | None = None, **asked: Any) -> str:
        if not (remote / repo).is_dir():
            raise OSError("no such repository")
        for path in (remote / repo).rglob("*"):
            name = str(path.relative_to(remote / repo))
            if path.is_file() and any(fnmatch.fnmatch(name, pattern) for pattern in allow_patterns or ["*"]):
                (local / repo / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, local / repo / name)
        return str(local / repo)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    return tmp_path


def fetched(hub: Path) -> set[str]:
    return {str(path.relative_to(hub / "cache")) for path in (hub / "cache").rglob("*") if path.is_file()}


def test_only_the_sub_folder_is_fetched(hub: Path) -> None:
    for layer in range(3):
        place = hub / "remote" / "me" / "saes" / f"layer_{layer}" / "width_1k"
        place.mkdir(parents=True)
        MAKERS["gemma scope"](place)
        shutil.copy(place / "params.npz", place / "other.npz")
    sae = sl.SAE.from_pretrained("me/saes", "layer_1/width_1k", **PLACE)
    assert fetched(hub) == {"me/saes/layer_1/width_1k/params.npz"}
    assert sae.name_or_path == "me/saes/layer_1/width_1k"
    assert torch.equal(sae.W_dec, draw(10)["W_dec"])
    refuse("could not be fetched from the Hub", Path("me/none"), "layer_1")


def test_only_the_file_is_fetched(hub: Path) -> None:
    place = hub / "remote" / "me" / "qwen"
    place.mkdir(parents=True)
    made = MAKERS["qwen scope"](place)
    for layer in (2, 3):
        shutil.copy(place / "layer1.sae.pt", place / f"layer{layer}.sae.pt")
    sl.SAE.from_pretrained("me/qwen", "layer2.sae.pt", **made.given)
    assert fetched(hub) == {"me/qwen/layer2.sae.pt"}


def test_an_sae_at_the_root_of_a_repository(hub: Path) -> None:
    saelens_here = hub / "remote" / "me" / "one"
    saelens_here.mkdir(parents=True)
    saelens(saelens_here, draw(), "jumprelu")
    (saelens_here / "huge.bin").write_bytes(bytes(10))
    assert sl.SAE.from_pretrained("me/one").cfg.d_sae == F
    assert fetched(hub) == {"me/one/cfg.json", "me/one/sae_weights.safetensors"}
    assert "params.npz" in list_files(None) and "config.json" in list_files("layers.3")  # of sparsify's run


def test_a_release_says_what_its_files_do_not(hub: Path) -> None:
    place = hub / "remote" / "google" / "gemma-scope-2b-pt-res" / "layer_20" / "width_16k" / "average_l0_71"
    place.mkdir(parents=True)
    MAKERS["gemma scope"](place)
    sae = sl.SAE.from_pretrained("gemma-scope-2b-pt-res", "layer_20/width_16k/average_l0_71")
    assert sae.provenance is not None
    assert (sae.provenance.model, sae.provenance.hook_point) == ("google/gemma-2-2b", "blocks.20.hook_resid_post")
    own = sl.SAE.from_pretrained("gemma-scope-2b-pt-res", "layer_20/width_16k/average_l0_71", model="my/gemma")
    assert own.provenance is not None and own.provenance.model == "my/gemma"
    with pytest.raises(ValueError, match="`name` must be an id of release 'gemma-scope-2b-pt-res', got 'layer_20'"):
        sl.SAE.from_pretrained("gemma-scope-2b-pt-res", "layer_20")
    with pytest.raises(ValueError, match="got None"):
        sl.SAE.from_pretrained("gemma-scope-2b-pt-res")


@pytest.mark.parametrize(
    ("release", "id", "repo", "path"),
    [
        (
            "gpt2-small-res-jb",
            "blocks.8.hook_resid_pre",
            "jbloom/GPT2-Small-SAEs-Reformatted",
            "blocks.8.hook_resid_pre",
        ),
        ("llama_scope_lxr_8x", "l15r_8x", "fnlp/Llama3_1-8B-Base-LXR-8x", "Llama3_1-8B-Base-L15R-8x"),
        (
            "gemma-scope-2-4b-pt-res-all",
            "layer_0_width_16k_l0_big",
            "google/gemma-scope-2-4b-pt",
            "resid_post_all/layer_0_width_16k_l0_big",
        ),
        ("qwen-scope-3-8b-base-w64k-l50", "layer7", "Qwen/SAE-Res-Qwen3-8B-Base-W64K-L0_50", "layer7.sae.pt"),
    ],
)
def test_releases_that_saelens_lists(release: str, id: str, repo: str, path: str) -> None:
    found = find_release(release, id)
    assert found is not None and found[:2] == (repo, path)
    if release.startswith("qwen"):
        assert found[2].activation == sl.TopK(k=50) and found[2].hook_point == "blocks.7.hook_resid_post"


def test_a_release_of_your_own(hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("saelab.sae.formats.hub._added", [])
    place = hub / "remote" / "me" / "qwen-like"
    place.mkdir(parents=True)
    MAKERS["qwen scope"](place)
    at = {"model": "me/lm", "hook_point": "blocks.{layer}.hook_resid_post", "activation": sl.TopK(k=4)}
    register_release("mine", "me/qwen-like", id=r"l(?P<layer>\d+)", path="layer{layer}.sae.pt", **at)
    sae = sl.SAE.from_pretrained("mine", "l1")
    assert sae.provenance is not None and sae.provenance.hook_point == "blocks.1.hook_resid_post"
    assert sae.cfg.activation == sl.TopK(k=4)
    with pytest.raises(ValueError, match="must be regular expressions"):
        register_release("mine(", "me/x")
    assert find_release("yours", "l1") is None


def test_numbers_are_those_of_the_file(tmp_path: Path) -> None:
    """A last look: bfloat16 files load as the float32 that they stand for."""
    w = {name: part.bfloat16() for name, part in draw().items()}
    saelens(tmp_path, w, "jumprelu")
    sae = sl.SAE.from_pretrained(tmp_path)
    assert sae.dtype == torch.float32 and torch.equal(sae.W_dec, w["W_dec"].float())
    sae.save_pretrained(tmp_path / "back", "saelens")
    back = load_file(tmp_path / "back" / "sae_weights.safetensors")
    assert all(back[name].dtype == torch.bfloat16 and torch.equal(back[name], w[name]) for name in w)
    assert X.shape[1] == D

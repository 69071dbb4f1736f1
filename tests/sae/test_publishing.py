"""Uploading: one commit with what was asked for, and a card that lists several SAEs and loses none."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import saelab as sl
from saelab.stores.manifest import Provenance

PLAIN = {"mask": {}, "dtype": "float32", "ctx_len": 8, "n_tokens": 10, "seed": 0, "versions": {}}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A repository that is a folder; what was called is in `calls`."""

    class Api:
        calls: list[tuple[str, dict[str, Any]]] = []  # noqa: RUF012
        folder = tmp_path / "hub"

        def __init__(self, token: str | None = None) -> None:
            self.calls.append(("login", {"token": token}))

        def create_repo(self, repo_id: str, **given: Any) -> None:
            self.calls.append(("create_repo", {"repo_id": repo_id, **given}))

        def create_branch(self, repo_id: str, **given: Any) -> None:
            self.calls.append(("create_branch", {"repo_id": repo_id, **given}))

        def file_exists(self, repo_id: str, name: str, revision: str | None = None) -> bool:
            return (self.folder / name).is_file()

        def hf_hub_download(self, repo_id: str, name: str, revision: str | None, local_dir: str) -> str:
            return str(shutil.copy(self.folder / name, local_dir))

        def upload_folder(self, folder_path: str, **given: Any) -> str:
            self.calls.append(("upload_folder", given))
            shutil.copytree(folder_path, self.folder, dirs_exist_ok=True)
            return "https://hub/commit"

    Api.calls.clear()
    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda repo, **given: str(Api.folder))
    return Api


def make_sae(layer: int) -> sl.SAE:
    sae = sl.SAE(sl.SAEConfig(d_in=8, d_sae=16 + layer, activation=sl.TopK(k=4)), seed=layer)
    sae.provenance = Provenance(
        model="some/model", weight_processing="none", hook_point=f"blocks.{layer}.hook_mlp_out", text="a|b",
        tokens_sha256="", **PLAIN,
    )  # fmt: skip
    return sae


def test_the_commit_is_what_was_asked_for(hub: Any) -> None:
    given = {"revision": "dev", "commit_message": "Layer 3", "create_pr": True}
    sae = make_sae(3)
    assert (
        sae.push_to_hub("me/saes", path_in_repo="layer_3", private=True, token="hf_x", **given) == "https://hub/commit"
    )
    assert hub.calls == [
        ("login", {"token": "hf_x"}),
        ("create_repo", {"repo_id": "me/saes", "private": True, "exist_ok": True}),
        ("create_branch", {"repo_id": "me/saes", "branch": "dev", "exist_ok": True}),
        ("upload_folder", {"repo_id": "me/saes", **given}),
    ]
    assert sae.name_or_path == ""
    files = {str(path.relative_to(hub.folder)) for path in hub.folder.rglob("*") if path.is_file()}
    assert files == {"README.md", "layer_3/README.md", "layer_3/config.json", "layer_3/model.safetensors"}
    hub.calls.clear()
    make_sae(3).push_to_hub("me/saes")
    assert hub.calls[1:] == [
        ("create_repo", {"repo_id": "me/saes", "private": False, "exist_ok": True}),
        ("upload_folder", {"repo_id": "me/saes", "revision": None, "commit_message": "Upload SAE", "create_pr": False}),
    ]


def test_several_saes_in_one_repository(hub: Any) -> None:
    saes = {f"layer_{layer}": make_sae(layer) for layer in (10, 9)}
    for path, sae in saes.items():
        sae.push_to_hub("me/saes", path_in_repo=path)
    for path, sae in saes.items():
        read = sl.SAE.from_pretrained("me/saes", path)
        assert torch.equal(read.W_dec, sae.W_dec) and read.name_or_path == f"me/saes/{path}"
    card = (hub.folder / "README.md").read_text()
    rows = [line for line in card.splitlines() if line.startswith("| [")]
    assert [row.split("`")[1] for row in rows] == ["layer_9", "layer_10"] and "d_sae 26" in rows[1]
    assert 'from_pretrained("me/saes", "layer_9")' in (hub.folder / "layer_9" / "README.md").read_text()
    make_sae(12).push_to_hub("me/saes", path_in_repo="layer_9")  # again: its row is replaced
    card = (hub.folder / "README.md").read_text()
    assert card.count("| [`layer_9`]") == 1 and "d_sae 28" in card and card.startswith("---\nlibrary_name")


def test_what_somebody_wrote_in_a_card_stays(hub: Any) -> None:
    hub.folder.mkdir()
    (hub.folder / "README.md").write_text("---\nlicense: mit\n---\n# Ours\n\nRead this first.\n")
    for layer in (1, 2):
        make_sae(layer).push_to_hub("me/saes", path_in_repo=f"deep/layer_{layer}")
    card = (hub.folder / "README.md").read_text()
    assert card.startswith("---\nlicense: mit\n---\n# Ours\n\nRead this first.\n") and card.count("| [`deep/") == 2
    (hub.folder / "README.md").write_text(card + "\nAnd this last.\n")
    make_sae(3).push_to_hub("me/saes", path_in_repo="deep/layer_3")
    card = (hub.folder / "README.md").read_text()
    assert card.endswith("And this last.\n") and card.count("| [`deep/") == 3
    make_sae(4).push_to_hub("me/saes")  # at the top: its own card, and the list
    card = (hub.folder / "README.md").read_text()
    assert card.count("| [`deep/") == 3 and 'from_pretrained("me/saes")' in card


def test_what_cannot_be_uploaded_is_refused_before_anything_is_made(hub: Any) -> None:
    with pytest.raises(ValueError, match="leaves it"):
        make_sae(1).push_to_hub("me/saes", path_in_repo="../other")
    hub.calls.clear()
    transcoder = sl.SAE(sl.SAEConfig(d_in=8, d_sae=16, d_out=8, activation=sl.TopK(k=4)), seed=0)
    with pytest.raises(ValueError):
        transcoder.push_to_hub("me/saes", format="dictionary_learning")
    assert not hub.calls


@pytest.mark.parametrize(
    ("format", "line"),
    [
        ("saelens", 'SAE.from_pretrained("me/saes", "layer_3")'),
        ("sparsify", 'load_from_hub("me/saes", hookpoint="layer_3")'),
        ("dictionary_learning", "where the files of me/saes/layer_3 are"),
    ],
)
def test_each_library_is_shown_how_to_load_it(format: str, line: str, hub: Any) -> None:
    sae = sl.SAE(sl.SAEConfig(d_in=8, d_sae=16, activation=sl.TopK(k=4), normalizer="none"), seed=0)
    sae.push_to_hub("me/saes", path_in_repo="layer_3", format=format)
    card = (hub.folder / "layer_3" / "README.md").read_text()
    assert line in card and 'saelab.SAE.from_pretrained("me/saes", "layer_3")' in card

"""The Hub's own arguments: what is asked of it, what is read from its cache, and what is said where it has nothing."""

from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from foreign import MAKERS, PLACE
from huggingface_hub import errors

import saelab as sl

SHA = "0123456789abcdef0123456789abcdef01234567"


def make_cache(root: Path, repo: str, path: str, revision: str = "main") -> Path:
    """The folders in which Hugging Face keeps one commit of a repository, with an SAE in them."""
    held = root / f"models--{repo.replace('/', '--')}"
    (held / "refs").mkdir(parents=True, exist_ok=True)
    (held / "refs" / revision).write_text(SHA)
    place = held / "snapshots" / SHA / path
    place.mkdir(parents=True)
    MAKERS["gemma scope"](place)
    return place


def test_the_hub_is_asked_as_its_own_functions_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}
    place = make_cache(tmp_path, "google/gemma-scope-2b-pt-res", "layer_20/width_16k/average_l0_71")

    def snapshot(repo: str, **given: Any) -> str:
        asked.update(given, repo=repo)
        return str(place.parents[2])

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    given = {"revision": "v1", "token": "hf_x", "cache_dir": tmp_path, "local_files_only": True}
    sl.SAE.from_pretrained("gemma-scope-2b-pt-res-canonical", "layer_20/width_16k/canonical", **given)
    files = asked.pop("allow_patterns")
    assert asked == {"repo": "google/gemma-scope-2b-pt-res", **given}
    assert "layer_20/width_16k/average_l0_71/params.npz" in files
    sl.SAE.from_pretrained("me/any", "layer_20/width_16k/average_l0_71", **PLACE)
    nothing = {"revision": None, "token": None, "cache_dir": None, "local_files_only": False}
    assert {name: asked[name] for name in nothing} == nothing


def test_a_name_is_no_pattern(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr(
        "huggingface_hub.snapshot_download", lambda repo, **given: asked.extend(given["allow_patterns"]) or tmp_path
    )
    with pytest.raises(FileNotFoundError, match=r"must hold an SAE at 'a\*'"):
        sl.SAE.from_pretrained("me/any", "a*", local_files_only=True)
    assert "a[*]/params.npz" in asked


def test_what_is_in_the_cache_is_read_without_the_hub(tmp_path: Path) -> None:
    make_cache(tmp_path, "me/saes", "layer_3", revision="v2")
    given = {"cache_dir": tmp_path, "local_files_only": True}
    sae = sl.SAE.from_pretrained("me/saes", "layer_3", revision="v2", **given, **PLACE)
    by_commit = sl.SAE.from_pretrained("me/saes", "layer_3", revision=SHA, **given, **PLACE)
    assert torch.equal(sae.W_dec, by_commit.W_dec)
    with pytest.raises(FileNotFoundError, match=r"'me/saes' must be in the cache .*, as local_files_only forbids"):
        sl.SAE.from_pretrained("me/saes", "layer_3", **given, **PLACE)
    with pytest.raises(FileNotFoundError, match=r"must hold an SAE at 'layer_33', got none .* one of: layer_3\?"):
        sl.SAE.from_pretrained("me/saes", "layer_33", revision="v2", **given, **PLACE)
    with pytest.raises(FileNotFoundError, match=r"an SAE at its top, got none .* It has SAEs at: layer_3,"):
        sl.SAE.from_pretrained("me/saes", revision="v2", **given, **PLACE)


def test_what_is_not_there_is_looked_for_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = ["README.md", "layer_3/cfg.json", "layer_3/sae_weights.safetensors", "old/x.pt", "config.json"]
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda repo, **given: tmp_path)
    monkeypatch.setattr("huggingface_hub.HfApi.list_repo_files", lambda self, repo, revision: files)
    with pytest.raises(FileNotFoundError, match=r"It has SAEs at: layer_3, old/x\.pt, \.\.\."):
        sl.SAE.from_pretrained("me/saes")
    monkeypatch.setattr("huggingface_hub.HfApi.list_repo_files", lambda self, repo, revision: 1 / 0)
    with pytest.raises(FileNotFoundError, match=r"an SAE at 'layer_4', got none .* Check the name\."):
        sl.SAE.from_pretrained("me/saes", "layer_4")


def failing(kind: type[Exception]) -> Exception:
    response = httpx.Response(404, request=httpx.Request("GET", "https://huggingface.co"))
    return kind("it failed", response=response) if issubclass(kind, errors.HfHubHTTPError) else kind("it failed")


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        (errors.GatedRepoError, "'me/saes' must be open to you, .* https://huggingface.co/me/saes"),
        (errors.RepositoryNotFoundError, "got none that is open to you. Check the name; .* pass token="),
        (errors.RevisionNotFoundError, "`revision` must be .* of 'me/saes', got 'v9', which it does not have"),
        (errors.LocalEntryNotFoundError, "must be in the cache /there, as HF_HUB_OFFLINE forbids to fetch it"),
        (errors.HfHubHTTPError, "could not be fetched from the Hub .HfHubHTTPError.; check the name"),
    ],
)
def test_each_failure_has_its_own_sentence(kind: type[Exception], said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def snapshot(repo: str, **given: Any) -> str:
        raise failing(kind)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(FileNotFoundError, match=said):
        sl.SAE.from_pretrained("me/saes", revision="v9", cache_dir="/there")


def test_a_repository_that_is_nearly_one_of_the_published(monkeypatch: pytest.MonkeyPatch) -> None:
    def snapshot(repo: str, **given: Any) -> str:
        raise failing(errors.RepositoryNotFoundError)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    with pytest.raises(FileNotFoundError, match=r"Did you mean one of: google/gemma-scope-2b-pt-res,"):
        sl.SAE.from_pretrained("google/gemma-scope-2b-pt-ress", "x")

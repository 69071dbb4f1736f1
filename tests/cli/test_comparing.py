"""`saelab compare`: two stores, two SAEs, and what cannot be compared."""

import json
from pathlib import Path

import pytest
import torch

import saelab as sl
from saelab.cli.app import dispatch
from tests.pages import read_cards

FLIPPED = (3, 5)


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """Two SAEs of which the second has the first's latents turned round by two, two of them flipped; their stores."""
    generator = torch.Generator().manual_seed(0)
    n = 2000
    where = sl.stores.Provenance(
        model="/nowhere/m", weight_processing="none", hook_point="", text="", tokens_sha256="", mask={},
        dtype="float32", ctx_len=25, n_tokens=n, seed=None, versions={},
    )  # fmt: skip
    fires = torch.rand(n, 8, generator=generator) < 0.2
    x = torch.randn(n, 8, generator=generator) * fires
    columns = {"doc_ids": (torch.arange(n) // 25).int(), "positions": (torch.arange(n) % 25).int()}
    acts = sl.Activations.from_tensor(x, where, token_ids=torch.zeros(n).int(), **columns)
    found, turned = {}, torch.eye(8).roll(2, 1)
    turned[:, list(FLIPPED)] *= -1
    for name, weights in (("a", torch.eye(8)), ("b", turned)):
        cfg = sl.SAEConfig(d_in=8, d_sae=8, activation=sl.AbsTopK(k=8), normalizer="none")
        sae = sl.SAE(cfg)
        with torch.no_grad():
            sae.W_enc.copy_(weights)
            sae.W_dec.copy_(weights.T)
            sae.b_enc.zero_()
            sae.b_dec.zero_()
        folder = tmp_path_factory.mktemp(name)
        sae.save_pretrained(folder / "sae")
        sl.harvest(sae, None, acts, folder / "store", allow_mismatch=True, progress=False)
        found |= {f"{name} sae": folder / "sae", f"{name} store": folder / "store"}
    return found


@pytest.mark.parametrize("what", ["store", "sae"])
@pytest.mark.parametrize("method", ["best", "mutual", "hungarian"])
def test_pairs_are_found_and_saved(folders, what, method, tmp_path, capsys) -> None:
    out = tmp_path / "match.json"
    words = [str(folders[f"{side} {what}"]) for side in "ab"]
    assert dispatch(["compare", *words, "--method", method, "--out", str(out), "--no-progress", "--top", "3"]) == 0
    saved = json.loads(out.read_text())
    assert sorted((i, j) for i, j, _ in saved["matched"]) == sorted((i, (i + 2) % 8) for i in range(8))
    assert all((value < 0) == (j in FLIPPED) for _, j, value in saved["matched"]) and saved["method"] == method
    assert len(saved["a"]["q"]) == 8 and saved["similarity"] == ("correlation" if what == "store" else "decoder")
    text = capsys.readouterr().out
    assert "universal" in text and f"8 pairs in {out}" in text and text.count("+1.000") + text.count("-1.000") == 3


def test_matched_features_stand_side_by_side_on_a_page(folders, tmp_path, capsys) -> None:
    page = tmp_path / "page.html"
    words = [str(folders["a store"]), str(folders["b store"])]
    assert dispatch(["compare", *words, "--html", str(page), "--no-progress"]) == 0
    assert "8 features" in capsys.readouterr().out
    partners = [card["partners"] for card in read_cards(page.read_text()).values()]
    assert len(partners) == 8 and all(one[0]["title"].startswith("Partner in") for one in partners)


def test_saes_of_a_folder_are_baselines(folders, tmp_path, capsys) -> None:
    sl.SAE(sl.SAEConfig(d_in=8, d_sae=8, activation=sl.AbsTopK(k=8)), seed=5).save_pretrained(tmp_path / "random rows")
    words = [str(folders["a sae"]), str(folders["b sae"]), "--out", str(tmp_path / "match.json")]
    assert dispatch(["compare", *words, "--baselines", str(tmp_path), "--no-progress"]) == 0
    assert "random rows" in capsys.readouterr().out
    assert list(json.loads((tmp_path / "match.json").read_text())["baselines"]) == ["random rows"]


def test_what_cannot_be_compared_is_said_in_one_line(folders, tmp_path, capsys) -> None:
    store, sae = str(folders["a store"]), str(folders["a sae"])
    for words, said in (
        ([store, sae], "got one of each"),
        ([store, str(tmp_path / "nowhere")], "must be folders"),
        ([store, store, "--method", "guess"], "`--method` must be one of best, mutual, hungarian"),
        ([store, store, "--similarity", "decoder"], "must be one of"),
        ([sae, sae, "--html", "page.html"], "must be feature stores"),
        ([store, store, "--baselines", str(tmp_path)], "A and B must be SAEs, got feature stores"),
        ([sae, sae, "--baselines", str(tmp_path)], "must hold folders of SAEs, got none"),
        ([store, store, "--html", "page.html", "--sides"], "shows whole features"),
    ):
        assert dispatch(["compare", *words, "--no-progress"]) == 2
        error = capsys.readouterr().err
        assert said in error and len(error.splitlines()) == 1

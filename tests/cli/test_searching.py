"""`saelab families` and `saelab search`: trees of features and edited queries in the shell, and wrong use."""

import json
from pathlib import Path

import numpy as np
import pytest
from corpora_made import harvest_codes

import saelab as sl
from saelab.cli.app import dispatch
from saelab.corpora import EmbeddingSearch
from saelab.labels import LabelStore

N = 400


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> str:
    """Feature 0 above 1, 2, 3 and 4, and five of no family."""
    rng = np.random.default_rng(0)
    fires = rng.random((N, 10)) < 0.04
    fires[:, 0] = rng.random(N) < 0.19
    fires[:, 1:5] = fires[:, :1] & (rng.random((N, 4)) < 0.5)
    folder = harvest_codes(fires * rng.uniform(1, 2, fires.shape), np.arange(N), tmp_path_factory.mktemp("tree")).folder
    with LabelStore.open(folder) as book:
        book.set(0, "animals", author="me")
    return str(folder)


@pytest.fixture(scope="module")
def embedded(tmp_path_factory) -> tuple[str, str]:
    """An SAE and the embeddings of texts by the tiny model."""
    folder = tmp_path_factory.mktemp("embedded")
    animals = ("fox", "hen", "owl", "cow")
    texts = [f"The {one} met the {other} on day {i}." for i in range(5) for one in animals for other in animals]
    acts = sl.embed(
        sl.lm.tiny_model(), texts, folder / "acts", pooling="mean", hook_point="blocks.1.hook_resid_post",
        progress=False,
    )  # fmt: skip
    sae = sl.SAE(sl.SAEConfig(d_in=acts.d_in, d_sae=32, activation=sl.AbsTopK(k=4)), seed=0)
    sae.fit(acts, sl.TrainConfig(n_tokens=500, batch_size=64, n_held_out=0), progress=False)
    sae.save_pretrained(folder / "sae")
    return str(folder / "sae"), str(folder / "acts")


def test_families_are_listed_and_written(store, tmp_path, capsys) -> None:
    out = tmp_path / "families.json"
    assert dispatch(["families", store, "--min-excess", "4", "--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert "1 families of 10 sides" in said and "0 (animals), " in said and "(3 draws)" in said
    told = json.loads(out.read_text())["families"]
    assert told[0]["parent"] == [0, 1] and sorted(told[0]["children"]) == [[j, 1] for j in (1, 2, 3, 4)]
    assert dispatch(["families", store, "--draws", "0", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["null_counts"] == []


def test_a_row_is_searched_with_edits(embedded, capsys) -> None:
    sae, acts = embedded
    search = EmbeddingSearch(sl.SAE.from_pretrained(sae), sl.Activations.load(acts))
    j = int(search.peaks[:, 0].argmax())
    i = int(search.peaks[:, 1].argmax())
    edits = {j: 2 * float(search.peaks[j, 0]), i: -3 * float(search.peaks[i, 1])} if i != j else {j: 0.0}
    words = f"{j}:2x,{i}:-3x" if i != j else f"{j}:0"
    assert dispatch(["search", sae, acts, "--row", "3", "--edit", words, "--top", "4", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    expected = search.query(3, edits, top=4)
    assert [one["row"] for one in told["rows"]] == [one.row for one in expected.rows]
    assert told["near_query"] == pytest.approx(expected.near_query)
    assert dispatch(["search", sae, acts, "--row", "3"]) == 0
    assert "nothing edited; cosine with the query 1.000" in capsys.readouterr().out


def test_a_text_is_embedded_as_the_documents_were(embedded, capsys) -> None:
    sae, acts = embedded
    given = ["--encoder", "tiny", "--pooling", "mean", "--hook-point", "blocks.1.hook_resid_post", "--json"]
    assert dispatch(["search", sae, acts, "--text", "The owl met the hen on day 3.", *given]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert rows[0]["text"] == "The owl met the hen on day 3." and rows[0]["cosine"] == pytest.approx(1, abs=1e-5)
    given[3] = "last"
    assert dispatch(["search", sae, acts, "--text", "The owl.", *given]) == 2
    assert "pooling" in capsys.readouterr().err


def test_wrong_use_is_told(store, embedded, tmp_path: Path, capsys) -> None:
    for words, said in [
        (["families", store, "--min-overlap", "2"], "`min_overlap` must be in"),
        (["families", store, "--by", "sum"], "`--by` must be one of"),
        (["search", *embedded], "takes --row, or --text with --encoder"),
        (["search", *embedded, "--row", "1", "--text", "owl", "--encoder", "tiny"], "takes --row, or --text"),
        (["search", *embedded, "--text", "owl"], "--text with --encoder"),
        (["search", *embedded, "--row", "999"], "must be a row in 0..79"),
        (["search", *embedded, "--row", "1", "--edit", "3"], "`--edit` must be features with codes"),
        (["search", *embedded, "--row", "1", "--edit", "99:2x"], "features in 0..31"),
        (["search", *embedded, "--row", "1", "--top", "0"], "`top` must be at least 1"),
        (["search", *embedded[:1], str(tmp_path / "none"), "--row", "1"], "none"),
    ]:
        assert dispatch(words) == 2, words
        assert said in capsys.readouterr().err

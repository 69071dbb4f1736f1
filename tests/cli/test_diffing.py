"""`saelab diff` and `saelab find`: two corpora in the shell, documents by features and words, and wrong use."""

import json
from pathlib import Path

import numpy as np
import pytest
from corpora_made import harvest_codes

from saelab.cli.app import dispatch
from saelab.labels import LabelStore


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> tuple[str, str]:
    """Two corpora of 60 documents of 5 tokens; feature 2 fires on its negative side in b alone."""
    found = []
    for i, name in enumerate(("old", "new")):
        rng = np.random.default_rng(i)
        codes = rng.gamma(2, size=(300, 6)) * (rng.random((300, 6)) < 0.1)
        codes[:, 2] = -2.0 * i * (rng.random(300) < 0.3)
        store = harvest_codes(codes, np.repeat(np.arange(60), 5), tmp_path_factory.mktemp(name))
        folder = store.folder.rename(store.folder.parent / name)
        with LabelStore.open(folder) as book:
            book.set(2, "rain and storms", author="me", sign=-1)
        found.append(str(folder))
    return found[0], found[1]


@pytest.mark.parametrize("by", ["max", "share", "mean"])
def test_what_differs_is_listed_with_its_name(folders, by, capsys) -> None:
    assert dispatch(["diff", *folders, "--by", by, "--draws", "3"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "60 documents (a) and 60 (b)" in lines[0] and "(3 draws)" in lines[0]
    assert lines[2].startswith("2 -") and lines[2].endswith("rain and storms")


def test_everything_is_written_and_hypotheses_are_sentences(folders, tmp_path, capsys) -> None:
    out = tmp_path / "diff.json"
    assert dispatch(["diff", *folders, "--hypotheses", "3", "--out", str(out), "--draws", "0"]) == 0
    assert "new has more of: rain and storms (in " in capsys.readouterr().out
    saved = json.loads(out.read_text())
    first = saved["rows"][0]
    assert (first["feature"], first["sign"], first["rate_a"]) == (2, -1, 0.0) and saved["null_discoveries"] == []
    assert saved["hypotheses"]["rows"][0]["holds"] is True
    assert dispatch(["diff", *folders, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["rows"][0]["feature"] == 2


def test_documents_are_found_by_words_and_by_features(folders, capsys) -> None:
    found = []
    for words in (["storm"], ["--features", "-2"], ["--features", "-2:2,4:-0.1"]):
        assert dispatch(["find", folders[1], *words, "--top", "4", "--json"]) == 0
        found.append([row["doc_id"] for row in json.loads(capsys.readouterr().out)["rows"]])
    assert found[0] == found[1] and len(found[0]) == len(found[2]) == 4
    assert dispatch(["find", folders[1], "storm"]) == 0
    assert "(rain and storms)" in capsys.readouterr().out


def test_wrong_use_is_told(folders, tmp_path: Path, capsys) -> None:
    other = harvest_codes(np.eye(6), np.arange(6), tmp_path).folder
    wider = harvest_codes(np.eye(7), np.arange(7), tmp_path / "wider").folder
    assert other.is_dir()
    for words, said in [
        (["diff", folders[0], str(wider)], "same SAE"),
        (["diff", *folders, "--by", "sum"], "`--by` must be one of max, share, mean"),
        (["diff", *folders, "--fdr", "2"], "`fdr` must be between"),
        (["find", folders[0]], "got both or neither"),
        (["find", folders[0], "storm", "--features", "2"], "got both or neither"),
        (["find", folders[0], "desert"], "must match a label"),
        (["find", folders[0], "--features", "2;3"], "numbers joined by commas"),
        (["find", folders[0], "--features", "99"], "feature in 0..5"),
    ]:
        assert dispatch(words) == 2, words
        assert said in capsys.readouterr().err

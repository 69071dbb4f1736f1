"""`saelab dissect` and `saelab label-head`: concepts and labels from JSON files, baselines, and wrong use."""

import json

import numpy as np
import pytest
from corpora_made import harvest_codes
from label_heads_made import DOCUMENTS, SIDES, make_documents

from saelab.cli.app import dispatch
from saelab.corpora import LabelHead


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A store, and files with the tokens of each concept and the documents of each label."""
    codes, labels, at = make_documents()
    root = tmp_path_factory.mktemp("runs")
    harvest_codes(codes, DOCUMENTS, root)
    harvest_codes(np.roll(codes, 1, 0), DOCUMENTS, root / "other")
    tokens = {name: [row for (label, _), row in at.items() if label == name] for name in SIDES}
    (root / "tokens.json").write_text(json.dumps(tokens))
    (root / "labels.json").write_text(json.dumps({name: np.flatnonzero(y).tolist() for name, y in labels.items()}))
    return root


def test_detectors_of_planted_tokens(folder, capsys) -> None:
    words = ["dissect", str(folder / "store"), "--labels", str(folder / "tokens.json"), "--quantile", "0.05"]
    assert dispatch([*words, "--baseline", str(folder / "other/store"), "--out", str(folder / "found.json")]) == 0
    assert "labels shifted" in capsys.readouterr().out
    saved = json.loads((folder / "found.json").read_text())
    assert [(c["feature"], c["sign"]) for c in saved["concepts"]] == list(SIDES.values())
    # codes of the next token tell nothing
    assert saved["rows"][3]["name"] == "store" and saved["rows"][3]["n_unique_clear"] == 0
    assert dispatch([*words, *["--baseline", str(folder / "other/store")] * 2]) == 2
    assert "names, which must differ" in capsys.readouterr().err
    assert dispatch([*words, "--json"]) == 0
    assert "no random dictionary" in json.loads(capsys.readouterr().out)["warning"]


def test_a_head_is_fitted_and_saved(folder, capsys) -> None:
    words = ["label-head", str(folder / "store"), "--labels", str(folder / "labels.json"), "--epochs", "8"]
    assert dispatch([*words, "--out", str(folder / "head"), "--no-baselines"]) == 0
    assert "macro F1" in capsys.readouterr().out
    head = LabelHead.from_pretrained(folder / "head")
    assert [(head.top_features(name, 1)[0].feature, head.top_features(name, 1)[0].sign) for name in SIDES] == list(
        SIDES.values()
    )


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "must be a JSON file"),
        ("[1]", "object of lists"),
        ('{"a": [1], "a": [2]}', "a name is there twice"),
        ("[" * 100_000, "must be a JSON file"),
        ("{}", "object of lists"),
        ('{"a": [1.5]}', "object of lists"),
        ('{"a": [true]}', "object of lists"),
        ('{"a": [99999]}', "list tokens in 0..3839"),
        ('{"a": [1]}', "must have a concept"),
    ],
)
def test_wrong_files_are_said(folder, tmp_path, capsys, text, said) -> None:
    (tmp_path / "labels.json").write_text(text)
    assert dispatch(["dissect", str(folder / "store"), "--labels", str(tmp_path / "labels.json")]) == 2
    assert said in capsys.readouterr().err
    assert dispatch(["dissect", str(folder / "store"), "--labels", str(tmp_path / "no.json")]) == 2

"""`saelab monitor`: pairs and conversations in files, and the trait that is kept."""

import json
from pathlib import Path

import pytest

from saelab.cli.app import dispatch
from saelab.steering.monitoring import monitor
from saelab.steering.traits import Trait, trait_vector

PAIRS = [
    (f"You are glad {at}", f"You are sad {at}") for at in ("here.", "there.", "now.", "again.", "at home.", "too.")
]
QUIET = ["--no-progress"]


def test_a_trait_is_made_kept_and_read_again(
    tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    lines = [json.dumps({"positive": a, "negative": b}) for a, b in PAIRS]
    Path("pairs.jsonl").write_text("\n".join([*lines, ""]))
    Path("texts.txt").write_text("One day I was glad.\nI was sad.\n")
    first = ["monitor", "tiny", "pairs.jsonl", "texts.txt", "--separator", "", "--name", "glad", "--save", "t.json"]
    assert dispatch([*first, *QUIET]) == 0, capsys.readouterr().err
    said = capsys.readouterr().out
    trait = trait_vector(tiny, PAIRS, name="glad", progress=False)
    assert str(trait) in said and said.count("1 text") == 2
    assert Trait.load("t.json").to_dict() == trait.to_dict()
    assert dispatch(["monitor", "tiny", "t.json", "texts.txt", "--separator", "", "--json", *QUIET]) == 0
    read = json.loads(capsys.readouterr().out)["texts"]
    assert [one["rows"] for one in read] == [
        json.loads(json.dumps(monitor(tiny, text, trait).to_dict()["rows"]))
        for text in ("One day I was glad.", "I was sad.")
    ]


def test_bad_files_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bad = tmp_path / "bad.jsonl"
    for text, message in (('{"positive": "a"}\n', "line 1 is not"), ("nonsense", "line 1 is not"), ("", "two or more")):
        bad.write_text(text)
        assert dispatch(["monitor", "tiny", str(bad), *QUIET]) == 2
        assert message in capsys.readouterr().err
    (tmp_path / "other.json").write_text("{}")
    assert dispatch(["monitor", "tiny", str(tmp_path / "other.json"), *QUIET]) == 2
    assert "must be a trait" in capsys.readouterr().err

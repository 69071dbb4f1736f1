"""`saelab releases`: published SAEs from the shell."""

import json

import pytest

from saelab.cli.app import dispatch


def test_releases_are_listed_filtered_and_printed_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert dispatch(["releases", "gemma canonical", "--model", "gemma-2-2b", "--layer", "12", "--d-sae", "16384"]) == 0
    shown = capsys.readouterr().out
    assert "layer_12/width_16k/canonical" in shown and "3 SAEs of 3 releases" in shown
    assert dispatch(["releases", "res-jb", "--hook-point", "hook_resid_post", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["saes"]
    assert {sae["release"] for sae in found} >= {"gemma-2b-res-jb", "gpt2-small-res-jb"}
    assert dispatch(["releases", "--model", "gema-2-2b"]) == 2
    assert "Did you mean one of: gemma-2-2b," in capsys.readouterr().err

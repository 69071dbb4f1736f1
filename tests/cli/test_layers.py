"""`saelab layers` and `saelab lens`: the same as the library gives, files written, and what is wrong in one line."""

import json
from pathlib import Path

import pytest

import saelab as sl
from saelab.analysis import TunedLens, layer_profile, lens
from saelab.cli.app import dispatch

QUIET = "--no-progress"


@pytest.fixture
def text(tmp_path: Path) -> str:
    path = tmp_path / "text.txt"
    path.write_text("\n<|endoftext|>\n".join(f"{n} owls see {2 * n} cats" for n in range(10, 50)))
    return str(path)


def test_a_profile_from_the_shell_is_the_librarys(text, tmp_path, capsys) -> None:
    sizes = ["--n-prompts", "9", "--n-groups", "3", "--length", "10", "--n-views", "2", "--ctx-len", "32"]
    out = tmp_path / "profile.json"
    assert dispatch(["layers", "tiny", text, *sizes, "--out", str(out), QUIET]) == 0
    shown = capsys.readouterr().out
    assert "9 prompts of 10 tokens" in shown and "outlier dimensions by layer" in shown
    model = sl.load_model("tiny", progress=False)
    tokens = sl.tokenize(model, Path(text), 32)
    found = layer_profile(model, tokens, n_prompts=9, n_groups=3, length=10, n_views=2, progress=False)
    plain = json.loads(out.read_text())
    assert plain["measures"][0]["text"] == found["entropy"].text.tolist() and plain["n_tokens"] == found.n_tokens
    assert dispatch(["layers", "tiny", text, "--length", "99", QUIET]) == 2
    assert "`length` must be at most" in capsys.readouterr().err


def test_a_lens_is_fitted_saved_and_read(text, tmp_path, capsys) -> None:
    folder = str(tmp_path / "lens")
    assert dispatch(["lens", "tiny", "10 owls", "--fit", text, "--tuned", folder, "--n-steps", "3", "--ctx-len", "32",
                     QUIET]) == 0  # fmt: skip
    said = capsys.readouterr()
    assert "tuned lens of" in said.out and "no better than the mean prediction" in said.err
    assert dispatch(["lens", "tiny", "10 owls", "--tuned", folder, "--json", QUIET]) == 0
    plain = json.loads(capsys.readouterr().out)
    model = sl.load_model("tiny", progress=False)
    found = lens(model, "10 owls", TunedLens.from_pretrained(folder))
    assert plain["kl"] == found.kl.tolist() and plain["lens"] == "tuned"
    assert dispatch(["lens", "tiny", "10 owls", QUIET]) == 0 and "logit lens of" in capsys.readouterr().out
    for words, expected in [(["--fit", text], "--tuned"), (["--tuned", text], "lens.json")]:
        assert dispatch(["lens", "tiny", "10 owls", *words, QUIET]) == 2
        assert expected in capsys.readouterr().err

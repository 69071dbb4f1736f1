"""`saelab read`: tokens with features, names of a store's labels, JSON, and stores of another SAE."""

import json
from pathlib import Path

import pytest

import saelab as sl
from saelab.cli.app import dispatch
from saelab.labels import LabelStore

POINT = "blocks.1.hook_resid_post"


@pytest.fixture(scope="module")
def folders(tiny, tiny_tokens, tmp_path_factory) -> tuple[Path, Path]:
    """A saved SAE and its labelled store."""
    folder = tmp_path_factory.mktemp("read")
    acts = sl.collect(tiny, tiny_tokens, POINT, progress=False)
    sae = sl.SAE(sl.SAEConfig(d_in=32, d_sae=48, activation=sl.AbsTopK(k=3)), seed=0)
    sae.fit(acts, sl.TrainConfig(n_tokens=512, batch_size=256), progress=False)
    sae.save_pretrained(folder / "sae")
    sl.harvest(sae, tiny, tiny_tokens[:16], folder / "store", progress=False)
    with LabelStore.open(folder / "store") as book:
        for feature in range(48):
            book.set(feature, f"thing {feature}", author="me")
    return folder / "sae", folder / "store"


def test_it_shows_tokens_with_named_features(folders, capsys):
    sae, store = map(str, folders)
    assert dispatch(["read", sae, "tiny", "One cat", "--labels", store, "--no-progress"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("1 text, 8 tokens (7 kept)") and "(left out)" in text and "thing" in text
    assert dispatch(["read", sae, "tiny", "One", "Two", "--json", "--no-progress"]) == 0
    plain = json.loads(capsys.readouterr().out)
    assert [len(one) for one in plain["texts"]] == [4, 4]
    assert [len(token["features"]) for token in plain["texts"][0]] == [0, 3, 3, 3]


def test_what_cannot_be_is_said(folders, tiny, tiny_tokens, tmp_path, capsys):
    other = sl.SAE(sl.SAEConfig(d_in=32, d_sae=48, activation=sl.AbsTopK(k=3)), seed=3)
    sl.harvest(other, tiny, tiny_tokens[:4], tmp_path / "other", hook_point=POINT, progress=False)
    sae = str(folders[0])
    for words, said in [
        (["read", sae, "tiny", " "], "blank"),
        (["read", sae, "tiny", "One", "--chat"], "chat template"),
        (["read", sae, "tiny", "One", "--labels", str(tmp_path / "other")], "harvested"),
        (["read", sae, "tiny", "One", "--hook-point", "blocks.0.hook_resid_post"], "hook point"),
    ]:
        assert dispatch([*words, "--no-progress"]) == 2
        assert said in capsys.readouterr().err

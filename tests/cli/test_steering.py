"""`saelab steer` and `saelab steer-curve`: texts, curves, pages, and what cannot be steered."""

import json
from typing import Any

import pytest
import torch
from unchecked import unchecked

import saelab as sl
from saelab.cli.app import dispatch
from saelab.lm import models

HOOK = "blocks.1.hook_resid_post"
SHORT = ["--n-tokens", "4", "--no-progress"]


@pytest.fixture(autouse=True)
def one_model(monkeypatch: pytest.MonkeyPatch, tiny: Any) -> None:
    find = models._find_model
    monkeypatch.setattr(models, "_find_model", lambda name, *rest: tiny if name == "tiny" else find(name, *rest))


@pytest.fixture(scope="module")
def folders(tiny, tmp_path_factory) -> dict[str, str]:
    """An SAE of the tiny model, its store, a text in which "n" is often next, and one that does not say its place."""
    folder = tmp_path_factory.mktemp("steer")
    (folder / "text.txt").write_text("\n<|endoftext|>\n".join(["a tin can, a bin, a pan"] * 30))
    tokens = sl.tokenize(tiny, folder / "text.txt", ctx_len=24)
    acts = sl.collect(tiny, tokens, HOOK, progress=False)
    sae = sl.SAE(sl.SAEConfig(d_in=32, d_sae=64, activation=sl.AbsTopK(k=8)), seed=0)
    sae.save_pretrained(folder / "placeless")
    sae.fit(acts, sl.TrainConfig(n_tokens=512, batch_size=128), progress=False)
    sae.save_pretrained(folder / "sae")
    sl.harvest(sae, tiny, tokens, folder / "store", progress=False)
    return {name: str(folder / name) for name in ("sae", "placeless", "store", "text.txt")}


@pytest.fixture(scope="module")
def live(folders) -> str:
    """A feature that fires often."""
    return str(int(sl.FeatureStore.load(folders["store"]).statistics.fires.sum(1).argmax()))


def test_texts_stand_side_by_side(tiny, folders, live, capsys, tmp_path) -> None:
    page = tmp_path / "texts.html"
    words = ["steer", folders["sae"], "tiny", "One", "Two <b>", "--feature", live, "--strength", "-2", "--unit", "max"]
    words += ["--store", folders["store"], "--n", "2", "--seed", "3", "--top-k", "9", "--top-p", "0.8", *SHORT]
    assert dispatch([*words, "--html", str(page)]) == 0
    said = capsys.readouterr().out
    assert f"feature {live} -2 (add, max) at {HOOK}, all tokens" in said and said.count("perplexity") == 8
    html = page.read_text()
    assert "Two &lt;b&gt;" in html and "Two <b>" not in html and 'class="p"' in html
    assert dispatch([*words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    sae, store = sl.SAE.from_pretrained(folders["sae"]), sl.FeatureStore.load(folders["store"])
    with sl.steer(tiny, sae, {int(live): -2.0}, unit="max", store=store):
        sampling = sl.lm.SamplingConfig(top_k=9, top_p=0.8)
        steered = sl.generate(tiny, ["One", "Two <b>"], 4, n=2, seed=3, sampling=sampling, progress=False)
    assert [row["steered"]["steered"]["text"] for row in found["rows"]] == [sample.text for sample in steered]


def test_texts_come_as_they_are_written(tiny, folders, live, capsys, monkeypatch) -> None:
    """Each token is printed before the next is drawn, and the texts are those of a run that waits."""
    from saelab.cli.terminal import printable
    from saelab.lm.generation import Sampler

    texts = dict.fromkeys((name, i) for name in ("unsteered", "steered") for i in range(4))
    for name, strength in (("unsteered", 0.0), ("steered", 9.0)):
        with sl.steer(tiny, sl.SAE.from_pretrained(folders["sae"]), {int(live): strength}):
            how = {
                "n": 2,
                "on_token": lambda i, token, name=name: texts.update({(name, i): (texts[name, i] or "") + token.text}),
            }
            sl.generate(tiny, ["One", "Two"], 4, progress=False, **how)
    words = ["steer", folders["sae"], "tiny", "One", "Two", "--feature", live, "--strength", "9", "--n", "2", *SHORT]
    drawn, plain = [], Sampler.__call__
    monkeypatch.setattr(Sampler, "__call__", lambda *given: (drawn.append(capsys.readouterr().out), plain(*given))[1])
    assert dispatch([*words, "--stream"]) == 0
    end = capsys.readouterr().out
    assert (
        len(drawn) == 2 * 2 * 2 * 4 and sum(map(bool, drawn)) > len(drawn) / 2
    )  # with each draw the one before is out
    said, place = "".join(drawn) + end, 0
    for (name, i), text in texts.items():
        place = said.index(printable(f"[{name}] {['One', 'Two'][i // 2]}{text}"), place) + 1
    assert said.count("perplexity") == 8 and "KL" in end and "[steered]" not in end.partition("perplexity")[2]


def test_features_modes_and_places_go_together(folders, capsys) -> None:
    words = ["steer", folders["placeless"], "tiny", "One", "--hook-point", HOOK, "--feature", "1", "--feature", "2"]
    assert dispatch([*words, "--strength", "3", "--strength", "-1", "--where", "generated", *SHORT]) == 0
    assert "feature 1 +3, feature 2 -1 (add, raw) at blocks.1.hook_resid_post, generated" in capsys.readouterr().out
    assert dispatch([*words, "--mode", "ablate", *SHORT]) == 0
    assert "feature 1, feature 2 (ablate) at" in capsys.readouterr().out


@unchecked()  # as its users have it
def test_a_curve_has_its_baselines_its_page_and_its_numbers(folders, live, capsys, tmp_path) -> None:
    page, file = tmp_path / "curve.html", tmp_path / "curve.json"
    words = ["steer-curve", folders["sae"], "tiny", "--feature", live, "--concept", "n", "--other", "x,y"]
    words += ["--baselines", "--text", folders["text.txt"], "--store", folders["store"], "--strengths", "-1,1"]
    words += ["--prompt", "One", "--prompt", "Two", "--n", "1", "--out", str(page), "--json", str(file)]
    assert dispatch([*words, *SHORT]) == 0
    said = capsys.readouterr().out
    saved = json.loads(file.read_text())
    assert list(saved["sources"])[:4] == [f"feature {live}", "means", "probe", "random"] and len(saved["sources"]) == 5
    assert f"10 strengths in {page}" in said and "Steering n against x,y: 2 prompts" in said
    assert saved["prompts"] == ["One", "Two"] and [row["strength"] for row in saved["rows"][1:3]] == [-1, 1]
    html = page.read_text()
    assert html.count("plotly-graph-div") == 2 and "probe" in html and "prefers-color-scheme: dark" in html


@unchecked()
def test_without_a_text_the_models_own_is_read(folders, live, monkeypatch, capsys) -> None:
    monkeypatch.setattr("saelab.steering.baselines.OWN_TEXTS", 24)
    monkeypatch.setattr("saelab.steering.baselines.OWN_TOKENS", 8)
    words = ["steer-curve", folders["sae"], "tiny", "--feature", live, "--concept", "a,b,c,d,e,f,g,h,i,k,l,m,n,o,p"]
    assert dispatch([*words, "--baselines", "--strengths", "1", "--n", "1", "--prompt", "One", *SHORT]) == 0
    assert "probe" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["steer", "{sae}", "tiny", "One", "--feature", "64"], "`features` must be in 0..63, got [64]"),
        (["steer", "{sae}", "tiny", "One", "--feature", "1", "--unit", "max"], "need `store`"),
        (["steer", "{sae}", "tiny", "One", "--feature", "1", "--unit", "meter"], "`unit` must be one of"),
        (["steer", "{sae}", "tiny", "One", "--feature", "1", "--where", "up"], "`where` must be one of"),
        (["steer", "{sae}", "tiny", "One", "--feature", "1", "--mode", "up"], "`mode` must be one of"),
        (["steer", "{sae}", "tiny", "One", "--feature", "1", "--strength", "1", "--strength", "2"], "got 2 for 1"),
        (["steer", "{sae}", "tiny", " ", "--feature", "1"], "A prompt must hold text"),
        (["steer", "{sae}", "tiny", "One", "--feature", "1", "--chat"], "a tokenizer with a chat template"),
        (["steer", "{sae}", "./nowhere", "One", "--feature", "1"], "existing folder or a Hub id"),
        (["steer", "{placeless}", "tiny", "One", "--feature", "1"], "`hook_point` must be given"),
        (["steer", "{sae}", "tales", "One", "--feature", "1"], "or pass --allow-mismatch"),
        (["steer", "{sae}", "tiny", "One"], "Missing option '--feature'"),
        (["steer-curve", "{sae}", "tiny", "--feature", "1", "--concept", "bad"], "must be single tokens"),
        (["steer-curve", "{sae}", "tiny", "--feature", "1", "--concept", "tales:joi"], "must be a concept of tales"),
        (["steer-curve", "{sae}", "tiny", "--feature", "1", "--concept", "a", "--strengths", "x"], "must be numbers"),
        (["steer-curve", "{sae}", "tiny", "--feature", "1", "--concept", "a", "--unit", "raw"], "`strengths` must be"),
    ],
)
def test_what_cannot_be_steered_is_said_in_one_line(folders, words, said, capsys) -> None:
    places = {f"{{{name}}}": folder for name, folder in folders.items()}
    with unchecked():  # names are checked by hand for whoever has no type checker
        assert dispatch([*(places.get(word, word) for word in words), "--no-progress"]) == 2
    error = capsys.readouterr().err
    assert said in error and len(error.splitlines()) == 1


@unchecked()
def test_features_of_tales_move_its_concepts(capsys, tmp_path) -> None:
    """The direction between the words for hot and cold, as a feature: the command finds that it moves them."""
    model = sl.load_model("tales", progress=False)
    ids = [model.tokenizer.convert_tokens_to_ids(words.split()) for words in ("hot warm burning", "cold icy chilly")]
    rows = model.original_model.lm_head.weight.detach().float()
    sae = sl.SAE(sl.SAEConfig(d_in=128, d_sae=2, activation=sl.AbsTopK(k=1), normalizer="none"))
    with torch.no_grad():
        sae.W_dec[0] = rows[ids[0]].mean(0) - rows[ids[1]].mean(0)
    sae.save_pretrained(tmp_path / "sae")
    words = ["steer-curve", str(tmp_path / "sae"), "tales", "--feature", "0", "--concept", "tales:hot", "--n", "1"]
    words += [
        "--other",
        "tales:cold",
        "--prompt",
        "The soup was very",
        "--prompt",
        "It was a",
        "--strengths",
        "-0.5,0.5",
    ]
    words += ["--hook-point", "blocks.3.hook_resid_post", "--json", str(tmp_path / "curve.json"), *SHORT]
    assert dispatch(words) == 0
    below, above = json.loads((tmp_path / "curve.json").read_text())["rows"][1:]
    assert above["selectivity"]["value"] > 0.3 > -0.3 > below["selectivity"]["value"]
    assert "hot against cold" in capsys.readouterr().out


def test_prompts_are_a_users_messages(folders, tiny, capsys, monkeypatch) -> None:
    template = "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}|{% endfor %}"
    monkeypatch.setattr(tiny.tokenizer, "chat_template", template)
    assert dispatch(["steer", folders["sae"], "tiny", "One", "--feature", "1", "--chat", "--json", *SHORT]) == 0
    [row, *_] = json.loads(capsys.readouterr().out)["rows"]
    assert row["prompt"] == "[user] One|"
    assert dispatch(["steer", folders["sae"], "tiny", "One", "--feature", "1", "--chat", "--stream", *SHORT]) == 0
    said = capsys.readouterr().out
    assert said.startswith("[unsteered] One") and "[steered] One" in said and "[user] One|" in said

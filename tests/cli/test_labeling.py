"""`saelab label`: by rules, by a language model, by files of prompts and answers; all of it in the book."""

import json
import re
from pathlib import Path

import pytest
import torch
from unchecked import unchecked

import saelab as sl
from saelab.cli import labelers
from saelab.cli.app import dispatch
from saelab.labels import encoders
from saelab.labels.autointerp import explainers
from saelab.labels.autointerp.clients import Answer, Messages
from saelab.labels.label_store import LabelStore
from saelab.stores.validation import read_json

WORDS = ("hot", "cold", *(f"w{i}" for i in range(30)))
RULES = """
from saelab.labels.rules.predicates import Predicate
PREDICATES = [Predicate("words of weather", lambda view: view.mark_words(WORDS.__contains__))]
"""


@pytest.fixture(scope="module")
def harvested(tmp_path_factory) -> Path:
    """Feature 0 fires on hot and negatively on cold, feature 1 on both, 2 never; 80 documents of 25 words.

    Of 40 held-out documents .94^25 = .21 are silent of both words, 9 +- 2.6, and of one .47; 4 are needed."""
    sae = sl.SAE(sl.SAEConfig(d_in=3, d_sae=3, activation=sl.AbsTopK(k=2), normalizer="none"))
    with torch.no_grad():
        sae.W_enc.copy_(torch.eye(3))
        sae.W_dec.copy_(torch.eye(3))
        sae.b_enc.zero_()
        sae.b_dec.zero_()
    share = torch.tensor([0.03, 0.03, *[0.94 / 30] * 30])
    ids = share.multinomial(2000, replacement=True, generator=torch.Generator().manual_seed(0)).int()
    x = torch.zeros(2000, 3)
    x[:, 0], x[:, 1] = (ids == 0).float() - (ids == 1).float(), (ids < 2).float()
    columns = {"doc_ids": (torch.arange(2000) // 25).int(), "positions": (torch.arange(2000) % 25).int()}
    where = sl.stores.Provenance(
        model="/nowhere/m", weight_processing="none", hook_point="", text="", tokens_sha256="", mask={},
        dtype="float32", ctx_len=25, n_tokens=2000, seed=None, versions={},
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("harvested")
    acts = sl.Activations.from_tensor(x, where, token_ids=ids, **columns)
    sl.harvest(sae, None, acts, folder, allow_mismatch=True, progress=False)
    (folder / "strings.json").write_text(json.dumps({str(i): f" {word}" for i, word in enumerate(WORDS)}))
    return folder


@pytest.fixture
def store(harvested: Path):
    """The store, whose book and answers go after the test."""
    yield harvested
    for name in ("labels.sqlite", "answers.jsonl"):
        (harvested / name).unlink(missing_ok=True)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows are chosen without type checks: other tests have them."""
    for name in ("explain_features", "estimate_labels"):
        monkeypatch.setattr(explainers, name, unchecked()(getattr(explainers, name)))


def label(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str, str]:
    code = dispatch(["label", *map(str, words), "--no-progress"])
    said = capsys.readouterr()
    return code, said.out, said.err


def test_rules_name_features_and_own_predicates_are_taken(store: Path, tmp_path: Path, capsys) -> None:
    code, out, err = label(capsys, store)
    assert code == 0, err
    assert "labels added" in out and "SAE '' could not be opened" in err and "--sae" in err
    book = LabelStore.open(store)
    assert "hot" in book[0, 1].text and "cold" in book[0, -1].text and book[0, 1].scores["f1"] == 1.0
    assert book[0].kind == "two-sided" and 2 not in book and book.authors() == {"rules": 4}
    (tmp_path / "mine.py").write_text("WORDS = {'hot', 'cold'}" + RULES)
    rules = ("--rules", tmp_path / "mine.py", "--no-lens")
    assert label(capsys, store, *rules, "--features", "1")[0] == 0
    assert book[1].text == book[1, 1].text == "words of weather" and "hot" in book[0, 1].text
    (tmp_path / "mine.py").write_text("WORDS = {'w1'}" + RULES)
    assert label(capsys, store, *rules)[0] == 0
    assert {one.kind for one in book.chosen(0)} == {"none"} and (0, 0) not in book, "the axis of before is gone"
    code, out, err = label(capsys, store, *rules, "--resume")
    assert (code, out) == (0, "") and "No feature is left" in err


def answer(messages: Messages) -> str:
    """As somebody would who calls everything words of weather, and takes every window for one that fires."""
    asked = messages[0]["content"]
    if "label" in asked.rsplit("\n", 4)[-3] or '{"label"' in asked:
        return '{"label": "words of <b>weather</b>"}'
    return "[1, 2, 3]"


class Fake:
    """A client that answers at once."""

    name, settings = "fake", {"model": "fake"}
    n_asked = 0

    def __init__(self, *_: object, **__: object) -> None:
        pass

    def complete(self, messages: Messages) -> Answer:
        type(self).n_asked += 1
        return Answer(text=answer(messages))


def test_a_language_model_names_features_and_is_asked_nothing_twice(
    store: Path, quick: None, capsys, monkeypatch
) -> None:
    monkeypatch.setattr(labelers, "OpenAIClient", Fake)
    command = (store, "--model", "fake", "--scorers", "", "--features", "0")
    code, out, _ = label(capsys, *command, "--estimate", "--price-in", 1, "--price-out", 2)
    assert code == 0 and out.startswith("about 2 prompts") and Fake.n_asked == 0
    code, out, err = label(capsys, *command)
    assert code == 0 and Fake.n_asked == 2 and "2 labels added" in out and "about 2 prompts" in err
    book = LabelStore.open(store)
    assert {one.text for one in book} == {"words of <b>weather</b>"} and book.authors() == {"fake": 2}
    assert label(capsys, *command)[0] == 0 and Fake.n_asked == 2
    assert label(capsys, *command, "--rules", "builtin", "--no-lens", "--resume")[0] == 0
    assert book.authors() == {"rules": 3, "fake": 2} and "hot" in book[0, 1].text, "the last author's is chosen"


def test_settings_reach_the_client_and_scorers_their_encoder(store: Path, quick: None, capsys, monkeypatch) -> None:
    given: list[dict] = []

    class Told(Fake):
        def __init__(self, model: str, url: str, **options: object) -> None:
            given.append({"model": model, "url": url, **options})

    def encode(texts: list[str]) -> list[list[float]]:
        return [[float("hot" in text), float("cold" in text), 0.1] for text in texts]

    monkeypatch.setattr(labelers, "OpenAIClient", Told)
    monkeypatch.setattr(labelers, "SentenceEncoder", lambda name: given.append(name) or encode)
    words = ["--llm", "http://x", "--model", "m", "--timeout", 9, "--scorers", "embedding", "--encoder", "minilm"]
    for one in ("max_tokens=2048", "temperature=", "reasoning_effort=low"):
        words += ["--setting", one]
    code, _, err = label(capsys, store, *words, "--features", "1")
    assert code == 0, err
    settings = {"max_tokens": 2048, "temperature": None, "reasoning_effort": "low"}
    assert given == [{"model": "m", "url": "http://x", "timeout": 9.0, "settings": settings}, "minilm"]
    assert "embedding" in LabelStore.open(store)[1, 1].scores


def test_labels_are_searched_by_meaning(store: Path, capsys, monkeypatch) -> None:
    with LabelStore.open(store) as book:
        for feature, text in enumerate(("rain and storms", "a cat", "stormy seas")):
            book.set(feature, text, author="me")
    monkeypatch.setattr(
        encoders, "SentenceEncoder", lambda name: lambda texts: [[float("r" in t), float("c" in t), 0.1] for t in texts]
    )
    assert dispatch(["labels", str(store), "search", "weather"]) == 0
    assert "No label." in capsys.readouterr().err
    assert dispatch(["labels", str(store), "search", "weather", "--encoder", "minilm", "--top", "2"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["0", "2"]
    (store / "labels.vectors.safetensors").unlink()


def test_prompts_go_out_and_answers_come_back_by_files(store: Path, quick: None, tmp_path: Path, capsys) -> None:
    prompts, answers = tmp_path / "p.jsonl", tmp_path / "a.jsonl"
    assert "3 prompts in" in label(capsys, store, "--export-prompts", prompts)[1]
    asked = [json.loads(line) for line in prompts.read_text().splitlines()]
    answers.write_text(
        "".join(json.dumps({"id": one["id"], "answer": answer(one["messages"])}) + "\n" for one in asked)
    )
    code, out, _ = label(capsys, store, "--import-answers", answers, "--model", "gpt-x", "--export-prompts", prompts)
    assert code == 0 and "3 labels added" in out and LabelStore.open(store).authors() == {"gpt-x": 3}
    more = int(re.findall(r"([\d,]+) prompts in", out)[0].replace(",", ""))
    assert more == len(prompts.read_text().splitlines()) > 0  # now those of scores


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--llm", "http://127.0.0.1:9"], "--model"),
        (["--llm", "http://127.0.0.1:9", "--model", "m", "--export-prompts", "p"], "--llm"),
        (["--features", "3"], "0..2"),
        (["--features", "-1"], "0..2"),
        (["--rules", "nowhere.py"], "nowhere.py"),
        (["--rules", ","], "builtin"),
        (["--estimate"], "--model"),
        (["--model", "m", "--llm", "http://127.0.0.1:9", "--budget", "2"], "price_in"),
        (["--model", "m", "--llm", "http://127.0.0.1:9", "--setting", "max_tokens"], "NAME=VALUE"),
        (["--model", "m", "--llm", "http://127.0.0.1:9", "--scorers", "embedding"], "--encoder"),
        (["--model", "tiny", "--llm", "local", "--setting", "top_p=1"], "max_tokens alone"),
    ],
)
def test_what_makes_no_sense_is_wrong_use(store: Path, capsys, words: list[str], said: str) -> None:
    code, out, err = label(capsys, store, *words)
    assert (code, out) == (2, "") and said in err.splitlines()[-1]
    assert not (store / "labels.sqlite").exists()


def test_a_file_of_rules_must_have_predicates(store: Path, tmp_path: Path, capsys) -> None:
    for source, said in (("PREDICATES = [1]", "PREDICATES"), ("", "PREDICATES"), ("1 / 0", "ZeroDivisionError")):
        (tmp_path / "mine.py").write_text(source)
        code, _, err = label(capsys, store, "--rules", tmp_path / "mine.py")
        assert code == 2 and said in err
    assert read_json(store / "manifest.json")["d_sae"] == 3

"""Documents labeled by a language model: it sees them whole, and a right label scores one, a wrong one chance."""

import json
import re

import pytest
from documents_planted import PLANTED, plant_store

from saelab.labels.autointerp import Answer, explain_features
from saelab.labels.autointerp.requests import make_key

SCORERS = ("detection", "simulation")
"""fuzzing marks some tokens of a window, and a document is one"""


class Reader:
    """Names the planted word that all marked documents hold, and finds a label's word in documents."""

    name = "reader"

    def __init__(self, wrong: bool = False) -> None:
        self.settings, self.wrong, self.prompts = {"model": self.name, "wrong": wrong}, wrong, list[str]()

    def complete(self, messages) -> Answer:
        prompt = messages[0]["content"]
        self.prompts.append(make_key(self.settings, messages) + prompt)
        return Answer(text=self.say(prompt), tokens_in=1, tokens_out=1)

    def say(self, prompt: str) -> str:
        rows = [json.loads(line) for line in prompt.splitlines() if line.startswith("{") and '"label"' not in line]
        if "A label proposed" not in prompt:
            texts = [row["text"].lower() for row in rows if "<*" in row["text"]]
            word = next(word for word in PLANTED if texts and all(word in text for text in texts))
            return json.dumps({"label": "nothing at all" if self.wrong else word})
        label = json.loads(re.search(r"naming what it fires on: (.*)", prompt)[1])
        if "[number, token]" in prompt:
            return json.dumps({str(n): 10 for row in rows for n, text in row["text"] if label in text.lower()})
        if "<*" in prompt.split("A label proposed")[1].split('"text"')[0]:
            return json.dumps([int((label in row["text"].lower()) == ("<*" in row["text"])) for row in rows])
        return json.dumps([int(label in row["text"].lower()) for row in rows])


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return plant_store(tmp_path_factory.mktemp("planted"))[0]


def test_a_right_label_of_documents_scores_one(store, tmp_path):
    reader = Reader()
    found = explain_features(
        store, reader, [1, 2, 3], scorers=SCORERS, answers=tmp_path / "answers.jsonl", progress=False
    )
    assert {label.feature: label.text for label in found.labels} == dict(
        enumerate(PLANTED[1:], 1)
    ) and not found.missing
    for label in found.labels:
        assert label.scores["detection"] == 1 and label.scores["simulation"] > 0.85, label.scores
    assert reader.prompts and not any("\u2026" in prompt for prompt in reader.prompts)  # whole documents
    fuzzed = explain_features(store, reader, [1], answers=tmp_path / "answers.jsonl", progress=False)
    assert [(one.stage, one.problem) for one in fuzzed.missing] == [("fuzzing", "no windows for fuzzing")]


def test_a_wrong_label_of_documents_scores_chance(store, tmp_path):
    found = explain_features(
        store, Reader(wrong=True), [2], scorers=SCORERS, answers=tmp_path / "answers.jsonl", progress=False
    )
    (label,) = found.labels
    assert label.text == "nothing at all" and label.scores["detection"] == 0.5

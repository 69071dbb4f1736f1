"""Scorers without a label's text (intruder) and without a language model (embedding)."""

import json
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from labeling_made import NAMES, WORDS, Oracle, rows_of, split_marks

from saelab.functional.statistics import auroc
from saelab.labels.autointerp.embeddings import Embedding, auroc_interval
from saelab.labels.autointerp.example_windows import ExampleConfig, build_case
from saelab.labels.autointerp.explainers import estimate_labels, explain_features, score_labels
from saelab.labels.autointerp.requests import RequestConfig, RequestQueue
from saelab.labels.autointerp.scorers import N_TOGETHER, Intruder
from saelab.labels.label import Label

FAST = RequestConfig(wait=0.01, longest_wait=1.0)


@pytest.fixture(scope="module")
def cases(store):
    train = store.split(0.5, 0)
    return {side: build_case(store, *side, train, ExampleConfig()) for side in NAMES}


def make_intruder(tmp_path, seed: int = 0) -> Intruder:
    return Intruder(RequestQueue(Oracle(), tmp_path / "a.jsonl", FAST, progress=False), seed)


def prompts_of(tasks) -> list[list[dict]]:
    return [rows_of(task.question.messages[0]["content"]) for task in tasks]


# --- intruders


def test_each_silent_window_is_the_intruder_once_and_at_every_place_as_often(cases, tmp_path) -> None:
    case = cases[2, 1]
    tasks = make_intruder(tmp_path).tasks("any label", case)
    silent = {e.text for e in (*case.hard, *case.easy)}
    firing = {e.text for e in case.fires}
    met = Counter()
    for rows, task in zip(prompts_of(tasks), tasks, strict=True):
        texts = [row["text"].replace("<*", "").replace("*>", "") for row in rows]
        place = int(task.truth[0])
        assert len(set(texts)) == N_TOGETHER and {texts[i] for i in range(5) if i != place - 1} <= firing
        assert texts[place - 1] in silent
        met[texts[place - 1]] += 1
        assert "any label" not in task.question.messages[0]["content"]
    assert set(met.values()) == {1} and len(met) == len(tasks) == len(silent) // 5 * 5
    places = Counter(task.truth[0] for task in tasks)
    assert set(places.values()) == {len(tasks) // 5} and len(places) == 5


def test_marks_do_not_tell_the_intruder_by_number_or_place(cases, tmp_path) -> None:
    """Intruders have as many marks as firing windows, and their marks lie where those of the others do."""
    numbers, places = {True: [], False: []}, {True: [], False: []}
    for seed in range(4):
        for case in (cases[0, 1], cases[2, 1]):
            tasks = make_intruder(tmp_path, seed).tasks("", case)
            for rows, task in zip(prompts_of(tasks), tasks, strict=True):
                for i, row in enumerate(rows, 1):
                    marks = split_marks(row["text"])[1]
                    numbers[i == task.truth[0]].append(sum(marks))
                    places[i == task.truth[0]] += (np.flatnonzero(marks) / len(marks)).tolist()
    mean = {is_odd: np.mean(values) for is_odd, values in numbers.items()}
    error = np.hypot(*(np.std(values) / np.sqrt(len(values)) for values in numbers.values()))
    assert abs(mean[True] - mean[False]) < 4 * error and min(min(values) for values in numbers.values()) >= 1
    error = np.hypot(*(np.std(values) / np.sqrt(len(values)) for values in places.values()))
    assert abs(np.mean(places[True]) - np.mean(places[False])) < 4 * error + 0.1  # centers lie in the last 3/4
    assert np.std(places[True]) > 0.15


def test_windows_of_a_prompt_are_of_similar_strength(cases, tmp_path) -> None:
    case = cases[1, 1]
    strengths = np.linspace(1, 40, len(case.fires))
    fires = tuple(
        replace(e, values=tuple(float(s) * (v != 0) for v in e.values))
        for e, s in zip(case.fires, strengths, strict=True)
    )
    by_text = {e.text: s for e, s in zip(fires, strengths, strict=True)}
    tasks = make_intruder(tmp_path).tasks("", replace(case, fires=fires))
    for rows, task in zip(prompts_of(tasks), tasks, strict=True):
        found = [by_text[row["text"].replace("<*", "").replace("*>", "")] for i, row in enumerate(rows, 1)
                 if i != task.truth[0]]  # fmt: skip
        assert max(found) - min(found) < 0.55 * (strengths[-1] - strengths[0])


def test_a_feature_whose_windows_share_nothing_scores_chance(cases, tmp_path) -> None:
    """A reader who compares words finds every intruder of a real feature, and those of windows that are all silent no
    better than by chance."""
    case = cases[1, 1]
    scorer = make_intruder(tmp_path)
    assert scorer.score([""], [case])[0].value.value == 1.0
    rng, right, n = np.random.default_rng(0), 0, 0
    silent = [*case.easy, *case.hard]
    for seed in range(8):
        order = rng.permutation(len(silent))
        half = len(silent) // 2
        fires = tuple(
            replace(silent[i], values=tuple(float(j == silent[i].center) for j in range(len(silent[i].words))))
            for i in order[:half]
        )
        rest = tuple(silent[i] for i in order[half:])
        moved = replace(case, fires=fires, hard=(), easy=rest)
        scorer = make_intruder(tmp_path / str(seed), seed)
        score = scorer.score([""], [moved])[0].value
        right, n = right + round(score.value * score.n_windows), n + score.n_windows
    assert abs(right / n - 0.2) < 4 * np.sqrt(0.2 * 0.8 / n)


def test_too_few_windows_give_no_score(cases, tmp_path) -> None:
    case = cases[1, 1]
    few = replace(case, easy=case.easy[:4], hard=())
    reply = make_intruder(tmp_path).score([""], [few])[0]
    assert reply.value is None and "no windows for intruder" in reply.problem


def test_an_intruders_answer_is_one_number(cases, tmp_path) -> None:
    read = make_intruder(tmp_path).tasks("", cases[1, 1])[0].question.read
    assert read("[3]") == read('{"answers": [3]}') == [3]
    for bad in ("[0]", "[6]", "[1, 2]", "3"):
        with pytest.raises(ValueError, match="must"):
            read(bad)


# --- embeddings


def count_words(texts: list[str]) -> np.ndarray:
    """A bag of words, which knows what a label names and not the order of words."""
    return np.array([[text.split().count(word) for word in WORDS] for text in texts], float) + 1e-6


def label_with(text: str, feature: int = 1) -> list[Label]:
    return [Label(feature=feature, sign=1, text=text, author="me")]


def score(store, labels, encoder, **options):
    return score_labels(store, None, labels, scorers=[Embedding(encoder, **options)], progress=False).labels


def test_a_label_that_names_the_word_tells_all_windows(store) -> None:
    (named,) = score(store, label_with("river"), count_words)
    found = named.scores
    assert (found["embedding"], found["embedding_chance"], found["embedding_high"]) == (1.0, 0.5, 1.0)
    assert 0.85 < found["embedding_low"] < 1 and named.provenance.get("embedding", {}) == {}
    (wrong,) = score(store, label_with("hot"), count_words)
    assert wrong.scores["embedding_low"] <= 0.5 <= wrong.scores["embedding_high"]
    # half of the negatives have the word: a reader of words without their order cannot tell those
    (loose,) = score(store, label_with("hot", 2), count_words)
    assert 0.4 < loose.scores["embedding"] < 0.95


def test_a_random_encoder_scores_chance(store) -> None:
    values = []
    for seed in range(6):
        rng = np.random.default_rng(seed)
        labels = [label for feature in (0, 1, 2) for label in label_with("river", feature)]
        values += [one.scores["embedding"] for one in score(store, labels, lambda t: rng.normal(size=(len(t), 8)))]  # noqa: B023
    # an AUROC of 20 against 17 or more windows has a standard error of at most .1
    assert abs(np.mean(values) - 0.5) < 4 * 0.1 / np.sqrt(len(values))


def test_windows_are_encoded_once_and_labels_with_their_instruction(store) -> None:
    asked = []

    def encode(texts):
        asked.extend(texts)
        return count_words(texts)

    labels = [*label_with("river"), *label_with("hot"), *label_with("cold")]
    score(store, labels, encode, instruction="Find: ")
    case = build_case(store, 1, 1, store.split(0.5, 0), ExampleConfig())
    windows = {e.text for e in (*case.fires, *case.hard, *case.easy)}
    assert set(asked) == windows | {"Find: river", "Find: hot", "Find: cold"} and len(asked) == len(set(asked))


def test_it_stands_beside_a_client_and_costs_nothing(store, tmp_path) -> None:
    options = {"answers": tmp_path / "a", "asking": FAST, "scorers": ["detection", Embedding(count_words)]}
    alone = estimate_labels(store, Oracle(), [1], **options | {"scorers": ["detection"]})
    assert estimate_labels(store, Oracle(), [1], **options) == alone
    (label,) = explain_features(store, Oracle(), [1], progress=False, **options).labels
    assert label.scores["embedding"] == label.scores["detection"] == 1.0
    assert label.provenance["embedding"] == {"encoder": "count_words", "instruction": ""}
    with pytest.raises(ValueError, match=r"such as `Embedding\(encoder\)`, got 'embedding'"):
        explain_features(store, Oracle(), [1], progress=False, **options | {"scorers": ["embedding"]})


def test_windows_that_are_too_few_are_told(store) -> None:
    found = score_labels(
        store,
        None,
        label_with("river"),
        scorers=[Embedding(count_words)],
        cases=ExampleConfig(n_scored=0),
        progress=False,
    )
    assert found.missing[0].stage == "embedding" and "held-out" in found.missing[0].problem
    assert json.dumps(found.labels[0].to_dict()) and not found.labels[0].scores


@pytest.mark.parametrize(("true", "n"), [(0.5, (20, 20)), (0.9, (20, 20)), (0.8, (12, 30))])
def test_the_interval_of_an_auroc_holds_as_often_as_it_says(true, n) -> None:
    """Of 600 samples of normal scores 95 % hold it, within four standard errors, or more."""
    from scipy.stats import norm

    rng, shift = np.random.default_rng(0), np.sqrt(2) * norm.ppf(true)
    y = np.arange(sum(n)) < n[0]
    inside = 0
    for _ in range(600):
        low, high = auroc_interval(auroc(rng.normal(size=sum(n)) + shift * y, y), *n)
        inside += low <= true <= high
    assert 0.95 - 4 * np.sqrt(0.95 * 0.05 / 600) - 0.01 < inside / 600  # .01: the approximation's own error


def test_the_interval_of_a_perfect_auroc_is_no_point() -> None:
    low, high = auroc_interval(1.0, 20, 20)
    assert 0.8 < low < 0.95 and high == 1.0
    assert auroc_interval(0.0, 20, 20) == pytest.approx((0.0, 1 - low))
    lows = [auroc_interval(1.0, size, size)[0] for size in (4, 10, 40)]
    assert lows == sorted(lows)

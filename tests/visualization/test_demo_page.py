"""The page: it stands alone, escapes what it is given, and colours tokens by what a feature does."""

import re
from html.parser import HTMLParser
from typing import Any

import numpy as np
import pytest
from scipy.sparse import csr_matrix

from saelab.evaluation.concepts import score_concepts
from saelab.lm.token_labels import Concept, TokenLabels
from saelab.visualization.demo_page import (
    Corpus,
    Sentence,
    Trial,
    color,
    examples,
    show_comparison,
    show_failures,
    show_features,
)
from saelab.visualization.html import facts, make_page, paragraph, section, table

HOSTILE = "<script>alert(1)</script>\"'><img src=http://evil.example/x onerror=alert(1)>&"
WORDS = ["the", "hot", "sun", "shone", ".", "a", "cold", "wind", "blew", "."]
HOT, COLD, ROUND = 1, 6, 2


class Parsed(HTMLParser):
    """Tags with their attributes, and the text outside scripts and styles."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.inside: list[str] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self.inside.append(tag)

    def handle_endtag(self, tag: str) -> None:
        while self.inside and self.inside.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        if not {"script", "style"} & set(self.inside[-1:]):
            self.text.append(data)

    def spans(self) -> list[dict[str, str | None]]:
        return [attrs for tag, attrs in self.tags if tag == "span" and "t" in (attrs["class"] or "").split()]


def make_world(n_stories: int = 40, hostile: bool = False) -> tuple[Corpus, csr_matrix]:
    """Stories of two sentences, and codes of three features: for hot and cold, for round, and a silent one."""
    name = HOSTILE if hostile else "hot"
    table = (
        Concept(name, "pole", opposite="cold"),
        Concept("cold", "pole", opposite=name),
        Concept("round", "one-sided"),
    )
    n = len(WORDS) * n_stories
    truth, codes = np.zeros((n, 3), bool), np.zeros((n, 3), np.float32)
    starts = np.arange(0, n, len(WORDS))
    truth[starts + HOT, 0], truth[starts + COLD, 1], truth[starts + ROUND, 2] = True, True, True
    codes[starts + HOT, 0] = np.linspace(1, 2, n_stories)
    codes[starts + COLD, 0] = -np.linspace(1, 3, n_stories)
    codes[starts + ROUND, 1] = 1.0
    words = [HOSTILE if hostile else word for word in WORDS] * n_stories
    story_ids = np.repeat(np.arange(n_stories), len(WORDS))
    return Corpus(words, TokenLabels.of(truth, table, story_ids), np.ones(n, bool)), csr_matrix(codes)


def make_trials(corpus: Corpus, codes: csr_matrix, min_count: int = 5) -> list[Trial]:
    scores = score_concepts(codes, corpus.labels, min_count=min_count)
    return [Trial("AbsTopK", codes, scores, 0.1, signed=True), Trial("TopK", abs(codes), scores, 0.2)]


def make_sections(corpus: Corpus, trials: list[Trial], names: list[str]) -> list[str]:
    baselines = {"pca": trials[0].scores, "probe": trials[0].scores}
    shown = [show_comparison(trials, baselines), show_features(corpus, trials, names), show_failures(trials, baselines)]
    return [section("What was run", facts({"model": "tales"})), *shown]


def test_the_page_loads_nothing() -> None:
    corpus, codes = make_world()
    page = make_page("Title", "Lead", make_sections(corpus, make_trials(corpus, codes), ["hot", "round"]))
    for tag, attrs in Parsed(page).tags:
        assert tag not in ("link", "iframe", "img", "object", "embed", "base")
        for name in ("src", "href", "srcset", "data", "action"):
            assert attrs.get(name) is None, f"{tag} {name}={attrs[name]}"
    styles = "".join(re.findall(r"<style>(.*?)</style>", page, re.S))
    assert "url(" not in styles and "@import" not in styles and "prefers-color-scheme: dark" in styles
    assert page.count("plotly.js v") == 1


def test_hostile_text_stays_text() -> None:
    corpus, codes = make_world(hostile=True)
    sections = make_sections(corpus, make_trials(corpus, codes), [HOSTILE, "cold"])
    parts = [paragraph(HOSTILE), facts({HOSTILE: HOSTILE}), table([HOSTILE], [[HOSTILE]]), section(HOSTILE)]
    harmless = Parsed(make_page("Title", "Lead", make_sections(*_harmless())))
    parsed = Parsed(make_page(HOSTILE, HOSTILE, [*sections, *parts]))
    assert "img" not in {tag for tag, _ in parsed.tags}
    assert not any(name.startswith("on") for _, attrs in parsed.tags for name in attrs)
    n_scripts = [sum(tag == "script" for tag, _ in page.tags) for page in (parsed, harmless)]
    assert n_scripts[0] == n_scripts[1]
    assert HOSTILE in "".join(parsed.text)


def _harmless() -> tuple[Corpus, list[Trial], list[str]]:
    corpus, codes = make_world()
    return corpus, make_trials(corpus, codes), ["hot"]


def test_hostile_names_do_not_leave_the_figure() -> None:
    corpus, codes = make_world()
    trials = [Trial(HOSTILE, codes, trial.scores, 0.1) for trial in make_trials(corpus, codes)]
    assert "<script>alert" not in show_comparison(trials, {})
    assert "img" not in {tag for tag, _ in Parsed(show_comparison(trials, {})).tags}


def test_colors_follow_sign_and_size() -> None:
    sentence = Sentence(["a", "b", "c"], [2.0, 0.0, -1.0], [["hot"], [], ["cold"]])
    first, silent, last = Parsed(color(sentence, scale=2.0, underline="cold")).spans()
    assert first["class"] == "t plus" and silent["class"] == "t" and last["class"] == "t minus true"
    strong, weak = (float((span["style"] or "").split(":")[1]) for span in (first, last))
    assert strong == pytest.approx(2 * weak, abs=0.01)
    assert silent.get("style") is None
    assert [span["title"] for span in (first, silent, last)] == ["+2.00 | hot", "0", "-1.00 | cold"]


def test_every_token_is_shown_and_spaced() -> None:
    words = ["\u201c", "No", ",", "\u201d", "said", "Ann", "."]
    parsed = Parsed(color(Sentence(words, [0.0] * 7, [[]] * 7), 0.0))
    assert len(parsed.spans()) == 7
    assert "".join(parsed.text) == "\u201cNo,\u201d said Ann."
    with pytest.raises(ValueError, match="shorter"):
        color(Sentence(words, [0.0], [[]] * 7), 1.0)


def test_sentences_stay_in_their_story() -> None:
    corpus, _ = make_world(n_stories=3)
    n = len(WORDS)
    assert corpus.span(n + HOT) == (n, n + 5)  # nothing comes before the first sentence of a story
    assert corpus.span(n + COLD) == (n, 2 * n)  # a short one brings the one before it
    assert corpus.span(3 * n - 1)[1] == 3 * n
    quoted = ["\u201c", "Why", "?", "\u201d", "said", "Ann", ".", "She", "sat", "."]
    silent = TokenLabels.of(csr_matrix((10, 3), dtype=bool), corpus.labels.concepts, np.zeros(10, int))
    spoken = Corpus(quoted, silent, np.ones(10, bool))
    assert spoken.span(1) == (0, 7)


def test_examples_are_strong_typical_and_wrong() -> None:
    corpus, codes = make_world()
    column = codes[:, [0]].toarray().ravel()
    column[HOT] = 0.0  # a miss in the first story
    found = examples(corpus, column, 1, 0.0, "hot")
    peaks = [max(sentence.values) for sentence in found]
    assert len(found) == 4 and peaks[0] == 2.0 and peaks[0] > peaks[1] > peaks[2] > peaks[3] == 0.0
    assert "miss" in found[3].note
    column[len(WORDS) :: len(WORDS)] = 5.0  # false alarms in all others
    assert any("false alarm" in sentence.note for sentence in examples(corpus, column, 1, 0.0, "hot"))
    corpus.shown[len(WORDS) :] = False
    assert {sentence.values[HOT] for sentence in examples(corpus, column, -1, 0.0, "cold")} == {0.0}


def test_a_pair_is_shown_on_both_sides() -> None:
    corpus, codes = make_world()
    shown = show_features(corpus, make_trials(corpus, codes), [])
    assert "hot: the positive side, F1 1.00" in shown and "cold: the negative side, F1 1.00" in shown
    kinds = {span["class"] for span in Parsed(shown).spans()}
    assert {"t plus true", "t minus true"} <= kinds


@pytest.mark.parametrize("min_count", [5, 10_000])
def test_silent_features_and_unscored_concepts(min_count: int) -> None:
    corpus, codes = make_world()
    silent: Any = csr_matrix(codes.shape, dtype=np.float32)
    assert len(examples(corpus, silent[:, [0]].toarray().ravel(), 1, 0.0, "hot")) == 4
    page = make_page("Title", "Lead", make_sections(corpus, make_trials(corpus, silent, min_count), ["hot", "round"]))
    assert "hot" in page and "nan" not in "".join(Parsed(page).text)
    assert page.count("No feature fires with it") + page.count("fewer than") >= 2

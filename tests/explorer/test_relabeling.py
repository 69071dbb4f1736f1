"""Labels of one feature made while somebody waits: kept in the label store, never over a person's choice."""

import threading
import time
from pathlib import Path
from typing import Any

import pytest

import saelab as sl
from saelab.explorer import session
from saelab.explorer.relabeling import LabelingRequest, relabel
from saelab.explorer.session import Explorer
from saelab.labels.autointerp.clients import Answer
from saelab.labels.label_store import LabelStore

HOOK = "blocks.1.hook_resid_post"


class Scripted:
    """A client that answers every question alike."""

    name = "scripted"

    def __init__(self) -> None:
        self.settings: dict[str, Any] = {}
        self.n, self.wait, self.asked = 0, threading.Event(), threading.Event()
        self.wait.set()

    def complete(self, messages: Any) -> Answer:
        self.asked.set()
        self.wait.wait(10)
        self.n += 1
        return Answer(text='{"label": "<b>words of owls</b>"}')


@pytest.fixture
def explorer(tiny: Any, tiny_tokens: Any, tmp_path: Path) -> Any:
    sae = sl.SAE(sl.SAEConfig(d_in=32, d_sae=48, activation=sl.AbsTopK(k=3), normalizer="none"), seed=0)
    store = sl.harvest(sae, tiny, tiny_tokens, tmp_path / "store", hook_point=HOOK, progress=False)
    opened = Explorer.open(store, tiny, sae, client=Scripted())
    yield opened
    opened.close()


def feature_of(explorer: Any) -> int:
    return int(explorer.store.statistics.fires.sum(1).argmax())


def test_rules_tell_their_progress_and_their_labels_are_kept(explorer: Any) -> None:
    j = feature_of(explorer)
    events = [event for several in relabel(explorer, LabelingRequest(feature=j)) for event in several]
    shares = [event["progress"] for event in events if "progress" in event]
    assert shares == sorted(shares) and shares[0] > 0 and shares[-1] < 1
    assert events[-1]["done"] and events[-1]["labels"]
    kept = [label for label in explorer.labels.labels(j) if label.author == "rules"]
    assert {(label.sign, label.text) for label in kept} == {(x["sign"], x["text"]) for x in events[-1]["labels"]}


def test_one_side_alone_is_labelled_when_asked_for(explorer: Any) -> None:
    j = feature_of(explorer)
    *_, [last] = [several for several in relabel(explorer, LabelingRequest(feature=j, sign=-1)) if several]
    assert {label["sign"] for label in last["labels"]} == {-1}


def test_a_person_s_choice_stays(explorer: Any) -> None:
    j = feature_of(explorer)
    for sign in (0, 1, -1):
        explorer.labels.set(j, "mine", author="me", sign=sign)
    for method in ("rules", "llm"):
        assert list(relabel(explorer, LabelingRequest(feature=j, method=method)))[-1][0]["done"]  # type: ignore[arg-type]
    assert {label.text for label in explorer.labels.chosen(j)} == {"mine"}
    assert {label.author for label in explorer.labels.labels(j)} == {"me", "rules", "scripted"}


def test_a_language_model_s_words_are_text(explorer: Any) -> None:
    j = feature_of(explorer)
    events = [event for several in relabel(explorer, LabelingRequest(feature=j, method="llm")) for event in several]
    assert events[-1]["done"] and any("answers" in event.get("text", "") for event in events)
    assert all("owls" in label.text for label in explorer.labels.labels(j))
    assert explorer.client.n >= 1


def test_nothing_more_is_asked_once_the_reader_has_left(explorer: Any) -> None:
    explorer.client.wait.clear()
    events = relabel(explorer, LabelingRequest(feature=feature_of(explorer), method="llm"))
    next(events)
    events.close()  # type: ignore[attr-defined]
    explorer.client.wait.set()
    end = time.monotonic() + 20
    while any(thread.name == "saelab_work" for thread in threading.enumerate()) and time.monotonic() < end:
        time.sleep(0.02)
    assert not any(thread.name == "saelab_work" for thread in threading.enumerate())
    assert explorer.client.n <= 4  # those that had been sent


@pytest.mark.parametrize("seconds", [0.1, 20.0])
def test_closing_ends_a_labelling_which_writes_nothing_any_more(
    explorer: Any, seconds: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session, "END", seconds)
    explorer.client.wait.clear()
    events = relabel(explorer, LabelingRequest(feature=feature_of(explorer), method="llm"))
    next(events)
    [thread] = [thread for thread in threading.enumerate() if thread.name == "saelab_work"]
    assert explorer.client.asked.wait(20)
    if seconds > 1:  # an answer that comes in time ends the thread, which closing waits for
        threading.Timer(0.2, explorer.client.wait.set).start()
    begin = time.monotonic()
    explorer.close()
    assert time.monotonic() - begin < 15 and thread.is_alive() == (seconds < 1)
    explorer.client.wait.set()
    thread.join(20)
    assert not thread.is_alive() and explorer.client.n <= 4
    assert not explorer.labels.path.exists() and explorer.labels._connection is None


def test_what_cannot_be_labelled_is_refused_in_a_sentence(explorer: Any) -> None:
    with pytest.raises(ValueError, match=r"must be in 0\.\.47, got 48"):
        relabel(explorer, LabelingRequest(feature=48))
    explorer.client = None
    with pytest.raises(ValueError, match="No language model was named"):
        relabel(explorer, LabelingRequest(feature=1, method="llm"))
    for plain, said in (
        ({"method": "magic"}, "`method` must be"),
        ({"sign": 2}, "`sign` must be"),
        ({"x": 1}, "no key"),
    ):
        with pytest.raises(ValueError, match=said):
            LabelingRequest.from_dict(1, plain)


def test_an_error_in_the_thread_is_raised_here(explorer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> int:
        raise TimeoutError("labels.sqlite is locked by another process.")

    monkeypatch.setattr(LabelStore, "add", fail)
    with pytest.raises(TimeoutError, match="locked by another process"):
        list(relabel(explorer, LabelingRequest(feature=feature_of(explorer))))

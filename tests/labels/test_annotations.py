"""Notes, lists, set-ups and undo beside a plain Python model, with machines and other processes at work on the file."""

import json
import multiprocessing
import sqlite3
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from saelab.labels.annotations import N_CHANGES, Annotations
from saelab.labels.label import Label
from saelab.labels.label_store import FILE, LabelStore
from saelab.labels.label_tables import APPLICATION_ID, SCHEMA_VERSION

D_SAE = 6
HOSTILE = ("<script>alert(1)</script>", "'; DROP TABLE labels; --", "\u202e\x00 tab\t", "né ✓", '"', "a" * 200)


@pytest.fixture
def kept(tmp_path: Path) -> Annotations:
    return open_kept(tmp_path)


def open_kept(folder: Path) -> Annotations:
    return Annotations(LabelStore(folder / FILE), D_SAE)


def read_all(kept: Annotations) -> dict[str, Any]:
    """Everything in the file but the times at which set-ups were kept."""
    setups = {each["name"]: each["setup"] for each in kept.setups()}
    lists = {each["name"]: each["features"] for each in kept.lists()}
    labels = kept.labels.read("SELECT * FROM labels ORDER BY id") if kept.labels.path.exists() else []
    return {"notes": kept.notes(), "lists": lists, "setups": setups, "labels": labels}


class Model:
    """What a file of notes, lists and set-ups should hold, with all earlier states."""

    def __init__(self) -> None:
        self.notes: dict[int, str] = {}
        self.lists: dict[str, list[int]] = {}
        self.setups: dict[str, Any] = {}

    def state(self) -> dict[str, Any]:
        return json.loads(json.dumps({"lists": self.lists, "setups": self.setups})) | {"notes": dict(self.notes)}

    def edit(self, kept: Annotations, rng: np.random.Generator) -> None:
        """One random edit, of the file and here."""
        feature, name = int(rng.integers(D_SAE)), HOSTILE[rng.integers(len(HOSTILE))]
        held = self.lists.get(name, [])
        kind = rng.integers(7)
        if kind == 0:
            text = str(rng.choice(["", "a note", HOSTILE[0]]))
            kept.set_note(feature, text)
            self.notes = {j: said for j, said in (self.notes | {feature: text}).items() if said}
        elif kind == 1:
            features = rng.integers(0, D_SAE, 3).tolist()
            kept.set_list(name, features)
            self.lists[name] = list(dict.fromkeys(features))
        elif kind == 2:
            kept.add_to_list(name, feature)
            self.lists[name] = held if feature in held else [*held, feature]
        elif kind == 3:
            kept.remove_from_list(name, feature)
            if feature in held:
                self.lists[name] = [j for j in held if j != feature]
        elif kind == 4:
            kept.delete_list(name)
            self.lists.pop(name, None)
        elif kind == 5:
            kept.set_setup(name, {"features": [feature], "prompt": name})
            self.setups[name] = {"features": [feature], "prompt": name}
        else:
            kept.delete_setup(name)
            self.setups.pop(name, None)


@pytest.mark.parametrize("seed", range(3))
def test_edits_and_undos_are_those_of_a_plain_model(tmp_path: Path, seed: int) -> None:
    rng, model, kept = np.random.default_rng(seed), Model(), open_kept(tmp_path)
    states: list[dict[str, Any]] = []
    for _ in range(60):
        if rng.random() < 0.1:  # the history outlives the process
            kept.labels.close()
            kept = open_kept(tmp_path)
        if rng.random() < 0.35:
            assert kept.last_change() == kept.undo()
            if states:
                before = states.pop()
                model.notes, model.lists, model.setups = before["notes"], before["lists"], before["setups"]
        else:
            before = model.state()
            model.edit(kept, rng)
            states += [before] if model.state() != before else []
        assert {name: value for name, value in read_all(kept).items() if name != "labels"} == model.state()
        assert len(kept.history()) == len(states)


@pytest.mark.parametrize("seed", range(3))
def test_undoing_labels_brings_back_exactly_what_was_there(tmp_path: Path, seed: int) -> None:
    rng, kept = np.random.default_rng(seed), open_kept(tmp_path)
    kept.labels.add([machine(j % D_SAE, f"rule {j}", ("rules", "model")[j % 2], (0, 1, -1)[j % 3]) for j in range(18)])
    states = []
    for _ in range(25):
        before = read_all(kept)
        feature, sign = int(rng.integers(D_SAE)), int(rng.integers(-1, 2))
        authors = [label.author for label in kept.labels.labels(feature) if label.sign == sign]
        if rng.random() < 0.5 or not authors:
            kept.set_label(feature, str(rng.integers(3)), author=str(rng.choice(["ada", "bob"])), sign=sign)
            assert kept.labels[feature, sign].by_person
        elif rng.random() < 0.6:
            author = authors[0] if rng.random() < 0.7 else None
            assert kept.choose_label(feature, author, sign=sign) == kept.labels[feature, sign]
        else:
            kept.delete_label(feature, authors[0], sign=sign)
        states += [before] if read_all(kept)["labels"] != before["labels"] else []
    assert len(kept.history()) == len(states) > 5
    while states:
        kept.undo()
        assert read_all(kept) == states.pop()
    assert kept.undo() is None and kept.last_change() is None


def machine(feature: int, text: str, author: str = "rules", sign: int = 0) -> Label:
    return Label(feature=feature, text=text, author=author, sign=sign, scores={"f1": 0.5})


def test_what_machines_add_meanwhile_stays_and_people_keep_their_word(kept: Annotations) -> None:
    kept.labels.add([machine(1, "old")])
    kept.choose_label(1, "rules")
    kept.set_label(1, "mine", author="ada")
    kept.labels.add([machine(1, "new"), machine(1, "other", "model")])
    assert kept.labels[1].text == "mine"
    kept.undo()
    assert kept.labels[1].text == "old", "a person had chosen it"
    kept.undo()
    assert {label.text for label in kept.labels.labels(1)} >= {"new", "other"} and not kept.labels[1].by_person
    assert not any(row[-1] for row in read_all(kept)["labels"]), "nobody's choice is left"


def test_a_choice_that_somebody_else_made_since_stands(kept: Annotations) -> None:
    kept.labels.add([machine(1, "rule")])
    kept.set_label(1, "mine", author="ada")
    kept.labels.set(1, "theirs", author="bob")  # by the command, which keeps no history
    kept.undo()
    assert kept.labels[1].text == "theirs" and {label.text for label in kept.labels.labels(1)} == {"rule", "theirs"}
    kept.set_label(2, "mine", author="ada")
    kept.labels.add([machine(2, "rule")])
    kept.delete_label(2, "ada")
    kept.labels.choose(2, "rules")
    kept.undo()
    assert kept.labels[2].text == "rule" and {label.text for label in kept.labels.labels(2)} == {"rule", "mine"}
    assert sum(row[-1] for row in read_all(kept)["labels"]) == 2, "one choice of each feature"


def add_features(path: str, features: list[int]) -> None:
    kept = Annotations(LabelStore(path))
    for feature in features:
        kept.add_to_list("shared", feature)


def test_several_threads_and_processes_lose_nothing(tmp_path: Path) -> None:
    path = str(tmp_path / FILE)
    kinds = (threading.Thread, threading.Thread, multiprocessing.get_context("spawn").Process)
    workers = [of(target=add_features, args=(path, list(range(i, 24, 3)))) for i, of in enumerate(kinds)]
    for worker in reversed(workers):  # the process takes a while to start
        worker.start()
    for worker in workers:
        worker.join()
    kept = Annotations(LabelStore(path))
    assert sorted(kept.lists()[0]["features"]) == list(range(24)) and len(kept.history()) == 24
    assert kept.lists_of(5) == ["shared"]
    while kept.undo():
        pass
    assert kept.lists() == []


def test_files_without_notes_are_read_and_those_with_notes_stay_label_files(tmp_path: Path) -> None:
    with LabelStore(tmp_path / FILE) as labels:
        labels.set(3, "older", author="ada")
    kept = open_kept(tmp_path)
    assert kept.notes() == {} and kept.lists() == [] and kept.setups() == [] and kept.undo() is None
    kept.set_note(3, "seen")
    assert kept.labels[3].text == "older"
    with sqlite3.connect(tmp_path / FILE) as db:
        assert db.execute("PRAGMA user_version").fetchone()[0] == SCHEMA_VERSION
        assert db.execute("PRAGMA application_id").fetchone()[0] == APPLICATION_ID
    db.close()
    with LabelStore(tmp_path / FILE) as labels:
        labels.save(tmp_path / "out.json")
    with LabelStore(tmp_path / "copy.sqlite") as labels:
        assert labels.load(tmp_path / "out.json") == 1


def test_a_failed_change_leaves_neither_itself_nor_history(kept: Annotations) -> None:
    kept.set_label(2, "mine", author="ada")
    before = read_all(kept)
    with pytest.raises(ValueError, match="must be one with a label"):
        kept.choose_label(2, "nobody")
    with pytest.raises(ValueError, match="surrogate"):
        kept.set_label(2, "\ud800", author="ada")
    for wrong in (lambda: kept.set_note(D_SAE, "x"), lambda: kept.set_list("", [1]), lambda: kept.set_list("x", [-1])):
        with pytest.raises(ValueError):
            wrong()
    with pytest.raises(ValueError):
        kept.set_setup("x", {"strength": float("nan")})
    assert read_all(kept) == before and len(kept.history()) == 1


def test_read_only_changes_nothing_and_makes_no_file(tmp_path: Path) -> None:
    kept = Annotations(LabelStore(tmp_path / FILE), D_SAE, read_only=True)
    for change in (
        lambda: kept.set_note(0, "x"),
        lambda: kept.add_to_list("x", 0),
        lambda: kept.set_label(0, "x", author="ada"),
        kept.undo,
    ):
        with pytest.raises(ValueError, match="only be read"):
            change()
    assert not kept.labels.path.exists()


def test_the_history_is_bounded(kept: Annotations, monkeypatch: pytest.MonkeyPatch) -> None:
    assert N_CHANGES >= 100
    monkeypatch.setattr("saelab.labels.annotations.N_CHANGES", 3)
    for i in range(6):
        kept.set_note(0, str(i))
    assert len(kept.history()) == 3
    while kept.undo():
        pass
    assert kept.note(0) == "2"

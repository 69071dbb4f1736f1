"""The label book: who is chosen, texts that harm nothing, files that come back, and a database that loses nothing."""

import csv
import gzip
import io
import json
import math
import os
import shutil
import sqlite3
import tempfile
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import typer
from processes import Child

import saelab as sl
from saelab.cli.app import app, dispatch
from saelab.labels import text_search
from saelab.labels.label import FORMATS, Label, join_texts
from saelab.labels.label_store import FILE, LabelStore
from saelab.labels.text_search import has_stems, rank_texts
from saelab.stores.sharing import shareable
from saelab.visualization.reports import report
from tests.pages import read_cards

SCRIPT = '</script><script>alert(1)</script><img src=x onerror="alert(2)">'
HOSTILE = (
    SCRIPT, "=cmd|' /C calc'!A0", "'=1+1", "''+2", "-1", "@SUM(A1)", "\t=x", "\uff1dfull width", "a;=cmd()", "'tis",
    'say "hi", "there"', "'); DROP TABLE labels; --", "' OR '1'='1", "nul\0inside", "\0", "", " ", "line\nend\r\nof\r",
    "NEAR(a b) OR text:x*", '"', "AND NOT", "100% _under_", "\x1b[2J", "{braces} %s {0}", "\u2028\u202e\U0001f600",
    "\\", "it's",
)  # fmt: skip


def label(feature: int, text: str, author: str = "rules", **more: object) -> Label:
    return Label(feature=feature, text=text, author=author, **more)  # type: ignore[arg-type]


def texts(labels: list[Label]) -> list[str]:
    return [one.text for one in labels]


@pytest.fixture
def book(tmp_path: Path) -> LabelStore:
    return LabelStore(tmp_path / FILE)


@pytest.fixture
def store(tmp_path: Path) -> sl.FeatureStore:
    """Feature 0 separates hot (+) from cold (-), feature 1 fires on "the", feature 2 never."""
    return harvest(tmp_path / "store", seed=0)


def harvest(folder: Path, seed: int) -> sl.FeatureStore:
    sae = sl.SAE(sl.SAEConfig(d_in=3, d_sae=3, activation=sl.AbsTopK(k=1), normalizer="none"))
    with torch.no_grad():
        sae.W_enc.copy_(torch.eye(3))
        sae.W_dec.copy_(torch.eye(3))
        sae.b_enc.zero_()
        sae.b_dec.fill_(1e-3 * seed)
    ids = torch.tensor([0, 1, 0, 2]).repeat(12).int()
    x = torch.zeros(len(ids), 3)
    x[:, 0], x[:, 1] = (ids == 1).float() - (ids == 2).float(), (ids == 0).float()
    columns = {"doc_ids": torch.arange(12).repeat_interleave(4).int(), "positions": torch.arange(4).repeat(12).int()}
    where = sl.stores.Provenance(
        model="/nowhere/gpt-tiny", weight_processing="none", hook_point="blocks.1.hook_resid_post", text="",
        tokens_sha256="", mask={}, dtype="float32", ctx_len=4, n_tokens=len(ids), seed=None, versions={},
    )  # fmt: skip
    acts = sl.Activations.from_tensor(x, where, token_ids=ids, **columns)
    sl.harvest(sae, None, acts, folder, allow_mismatch=True, progress=False)
    (folder / "strings.json").write_text(json.dumps({"0": " the", "1": " hot", "2": " cold"}))
    return sl.FeatureStore.load(folder)


# ---- what is chosen
def test_a_book_is_empty_until_its_first_label_and_is_read_again(book: LabelStore) -> None:
    assert len(book) == 0 and list(book) == book.search("x") == book.labels(3) == [] and 3 not in book
    assert not book.path.exists()
    given = label(3, "hot words", sign=1, kind="input", scores={"f1": 0.5}, evidence={"rule": ["a", 1]})
    assert book.add([given, label(3, "cold words", sign=-1), label(1, "the", scores={"r": math.inf})]) == 3
    with LabelStore(book.path) as again:
        kept = again[3, 1]
        assert replace(kept, time="") == given and kept.time.endswith("+00:00")
        assert texts(list(again)) == ["the", "hot words", "cold words"] and len(again) == 3
        assert again[3] == kept and again[3, -1].text == "cold words" and again[1].scores == {"r": math.inf}
        assert 3 in again and (3, -1) in again and (3, 0) not in again and "3 features" not in str(again)
        assert again.authors() == {"rules": 3} and "2 features named; labels by rules 3" in str(again)
        for missing in (2, (3, 0), (1, 1)):
            with pytest.raises(KeyError, match="no label"):
                again[missing]


def test_the_last_label_is_chosen_and_one_of_the_same_author_takes_the_place_of_the_older(book: LabelStore) -> None:
    book.add([label(5, "first"), label(5, "second", "model")])
    assert book[5].text == "second"
    book.add([label(5, "third")])
    assert texts(book.labels(5)) == ["third", "second"] and len(book) == 1
    book.add([label(5, "no good rule", "other rules", kind="none")])
    assert book[5].text == "third", "that there is no good name is said only where there is no other"
    assert texts(book.labels(5)) == ["third", "second", "no good rule"]
    assert book.delete(5, author="rules") == 1 and book[5].text == "second"
    assert book.delete(author="model") == 1 and book[5].kind == "none" and book.delete(5) == 1 and 5 not in book
    with pytest.raises(ValueError, match="`delete`"):
        book.delete()


def test_no_rule_and_no_model_takes_the_place_of_a_persons_choice(book: LabelStore) -> None:
    book.set(7, "rain and storms", author="me")
    book.add(
        [label(7, "tokens 'rain'"), label(7, "weather", "model"), label(7, "mine?", "me"), label(7, "cold", sign=-1)]
    )
    assert book[7].text == "rain and storms" and book[7].by_person and book[7, -1].text == "cold"
    book.add([label(7, "another person's", "you", by_person=True)])
    assert book[7].text == "rain and storms"
    book.add([label(7, "rain, storms", "me", by_person=True)])  # the same person's newer word
    assert book[7].text == "rain, storms" and sum(one.author == "me" and one.by_person for one in book.labels(7)) == 1
    assert book.set(7, "storms", author="you").text == book[7].text == "storms"  # a person may
    assert book.choose(7, "model").text == "weather"
    book.add([label(7, "clouds", "model"), label(7, "mine", "me", by_person=True)])
    assert book[7].text == "weather", "a model that was chosen by a person does not take that back"
    assert "clouds" in texts(book.labels(7))
    book.add([label(7, "weather", "model", scores={"f1": 0.25})])  # the same text, measured again
    assert book[7].scores == {"f1": 0.25} and "clouds" not in texts(book.labels(7))
    assert book.choose(7, None).author == "model" and book.set(7, "", author="me").text == book[7].text == ""
    book.add([label(8, "a person's", "me", by_person=True)])
    book.add([label(8, "a model's", "model")])
    assert book[8].text == "a person's"
    with pytest.raises(ValueError, match=r"`author`.*'nobody'.*'me'"):
        book.choose(7, "nobody")


def test_labels_are_added_all_or_not_at_all(store: sl.FeatureStore) -> None:
    book = LabelStore.open(store)
    with pytest.raises(ValueError, match=r"`feature` must be in 0\.\.2, got 3"):
        book.add([label(0, "a"), label(3, "b")])
    with pytest.raises(ValueError, match="surrogate"):
        book.add([label(0, "a"), label(1, "\ud800")])
    with pytest.raises(ValueError, match="JSON"):
        book.add([label(0, "a"), label(1, "b", evidence={"what": object()})])
    assert len(book) == 0
    with pytest.raises(ValueError, match="2\\*\\*63"):
        LabelStore(store.folder / "free.sqlite").add([label(0, "a"), label(2**63, "b")])


# ---- texts that harm nothing
def test_hostile_texts_come_back_as_they_were_and_can_be_searched(book: LabelStore) -> None:
    book.add([label(i, text, f"author {text}") for i, text in enumerate(HOSTILE)])
    again = LabelStore(book.path)
    assert texts(list(again)) == list(HOSTILE)
    assert [one.author for one in again] == [f"author {text}" for text in HOSTILE]
    for i, text in enumerate(HOSTILE):
        found = again.search(text)
        assert again[i] in found or not text.replace("\0", "").strip(), text
    assert len(again) == len(HOSTILE)


QUERIES = ("storm", "STORMS", "rain storm", "stor", "caf\u00e9")


@pytest.mark.parametrize("stems", [True, False])
def test_a_search_finds_all_words_in_any_form(stems: bool) -> None:
    if stems and not has_stems():
        pytest.skip("this build of SQLite has no FTS5")
    said = ["the sun", "snowstorm", "rain and storms", "a storm", "the caf\u00e9", "brain"]
    found = {query: set(rank_texts(said, query, stems)) for query in QUERIES}
    words, letters = {2, 3}, {1, 2, 3}
    assert found["storm"] == found["stor"] == (words if stems else letters)
    assert found["STORMS"] == (words if stems else {2}) and found["rain storm"] == {2} and found["caf\u00e9"] == {4}
    assert rank_texts(said, "ow", stems) == [1], "where no word fits, letters do"
    assert rank_texts(["rain rain", "rain " * 9 + "wind"], "wind", stems) == [1] and rank_texts(said, "", stems) == []
    for syntax in ('"', "NOT sun", "storm OR sun", "text:sun", "(", "*", "NEAR(sun)", "-", "%", "_", "a" * 9999):
        assert rank_texts(said, syntax, stems) == []
    assert rank_texts(said, "AND", stems) == [2] and rank_texts(said, "^sun*)", stems) == [0]  # words as any other
    assert rank_texts(said, "x " * 5000, stems) == []


def test_a_search_reads_the_chosen_labels_unless_asked_for_all(book: LabelStore, monkeypatch) -> None:
    book.add([label(0, "storms"), label(0, "a kind of weather", "model"), label(1, "stormy", sign=-1)])
    for _ in range(2):
        assert texts(book.search("storm")) == ["stormy"] and texts(book.search("storm", every=True)) == [
            "storms",
            "stormy",
        ]
        monkeypatch.setattr(text_search, "has_stems", lambda: False)  # a build without FTS5


# ---- files
def full(path: Path) -> LabelStore:
    """Labels of every kind of choice, with every hostile text."""
    book = LabelStore(path)
    book.add([label(i, text, text or "nobody", scores={"f1": i / 7}) for i, text in enumerate(HOSTILE)])
    book.set(0, "mine", author="me")
    book.set(0, "yours", author="you")
    book.add([label(0, "theirs", "model", evidence={"answers": ["x" * 200_000, None, {"a": 1.5}]})])
    book.add([label(1, "old", "model", sign=-1), label(1, "older", sign=-1, scores={"r": math.nan, "r_chance": 0.0})])
    book.choose(1, "model", sign=-1)
    book.add([label(1, "new", "model", sign=-1), label(2, "a", provenance={"store": SCRIPT}), label(2, "b", "model")])
    return book


@pytest.mark.parametrize("ending", [".json", ".csv", ".jsonl", ".csv.gz", ".jsonl.gz"])
def test_a_book_comes_back_from_a_file(book: LabelStore, tmp_path: Path, ending: str) -> None:
    full(book.path)
    file = tmp_path / f"labels{ending}"
    n = book.save(file)
    again = LabelStore(tmp_path / "again.sqlite")
    assert again.load(file) == n == len(book.labels())
    assert repr(again.labels()) == repr(book.labels()) and repr(list(again)) == repr(list(book))  # NaN equals nothing
    again.save(tmp_path / f"again{ending}")
    assert (tmp_path / f"again{ending}").read_bytes() == file.read_bytes()
    for one in (again, book):  # the same choices are a person's
        one.add([label(feature, "newest", "newest", sign=sign) for feature, sign in ((0, 0), (1, -1), (2, 0))])
        assert texts([one[0], one[1, -1], one[2]]) == ["yours", "old", "newest"]


def test_no_cell_of_a_table_is_a_formula(book: LabelStore, tmp_path: Path) -> None:
    full(book.path).delete(0, author="model")  # whose evidence exceeds what the csv module reads
    book.save(tmp_path / "labels.csv")
    raw = (tmp_path / "labels.csv").read_bytes().decode()
    rows = list(csv.DictReader(io.StringIO(raw, newline="")))
    assert {row["text"] for row in rows} >= {"'" + HOSTILE[1], "''=1+1", "'tis", "it's"}
    cells = [cell for row in rows for name, cell in row.items() if name != "sign"]
    assert not [cell for cell in cells if cell.startswith(tuple("=+-@\t\r\uff1d"))]


def test_a_file_adds_to_a_book_whose_persons_choices_stay(book: LabelStore, tmp_path: Path) -> None:
    full(book.path).save(tmp_path / "labels.json")
    other = LabelStore(tmp_path / "other.sqlite")
    other.set(0, "here", author="somebody")
    other.add([label(2, "before", "before")])
    other.load(tmp_path / "labels.json")
    assert other[0].text == "here" and other[2].text == "b" and other[1, -1].text == "old"
    assert {"mine", "yours", "theirs"} < set(texts(other.labels(0)))


def test_records_of_neuronpedia_and_plain_tables_are_read(
    book: LabelStore, store: sl.FeatureStore, tmp_path: Path
) -> None:
    record = {
        "id": "c1", "modelId": "gpt2-small", "layer": "6-res-jb", "index": "12", "description": SCRIPT, "notes": None,
        "typeName": "np_max-act", "explanationModelName": "gpt-x", "embedding": [0.5], "createdAt": "2026-01-01",
        "scores": [{"value": 0.75, "explanationScoreTypeName": "eleuther_recall"}],
    }  # fmt: skip
    other = record | {"index": 13, "explanationModelName": None, "typeName": None, "scores": None, "notes": "by hand"}
    lines = "\n".join(json.dumps(one) for one in (record, other))
    for name, data in {
        "list.json": json.dumps([record, other]).encode(),
        "lines.jsonl": lines.encode(),
        "batch-0.jsonl.gz": gzip.compress(lines.encode()),
        "feature.json": json.dumps({"modelId": "gpt2-small", "explanations": [record, other]}).encode(),
    }.items():
        (tmp_path / name).write_bytes(data)
        read = LabelStore(tmp_path / f"{name}.sqlite")
        assert read.load(tmp_path / name) == 2
        assert (read[12].text, read[12].author, read[12].scores) == (
            SCRIPT,
            "gpt-x, np_max-act",
            {"eleuther_recall": 0.75},
        )
        assert read[12].provenance["neuronpedia"]["layer"] == "6-res-jb" and read[12].time == "2026-01-01"
        assert read[13].author == "neuronpedia" and not read[13].by_person and "embedding" not in str(read[12])
    (tmp_path / "plain.csv").write_text("\ufefffeature,text\r\n4,rain\r\n5,'=not a formula\r\n", encoding="utf-8")
    assert book.load(tmp_path / "plain.csv") == 2
    assert (book[4].text, book[4].author, book[5].text) == ("rain", "plain.csv", "=not a formula")
    mine = LabelStore.open(store)
    mine.add([label(0, "hot", sign=1), label(1, "nothing", kind="none")])
    assert mine.save(tmp_path / "mine.jsonl") == 1
    written = json.loads((tmp_path / "mine.jsonl").read_text())
    assert (written["modelId"], written["layer"], written["index"]) == ("gpt-tiny", "1-saelab", "0")
    assert written["description"] == "+ hot" and json.loads(written["notes"])["saelab"]["author"] == "rules"
    assert written["explanationModelName"] is None  # a key into a table of Neuronpedia's


BAD = {
    "nothing.json": "",
    "list.json": "[1]",
    "cut.json": '{"kind": "labels", "schema_version": 1, "labels": [{"fea',
    "newer.json": '{"kind": "labels", "schema_version": 9, "labels": []}',
    "deep.json": "[" * 100_000,
    "field.json": '[{"index": 1, "description": "a"}, {"index": 2}]',
    "sign.json": '[{"index": 1, "description": "a", "notes": "{\\"saelab\\": {\\"sign\\": 7}}"}]',
    "type.json": '{"kind": "labels", "schema_version": 1, "labels": [{"feature": 1, "text": ["a"], "author": "b"}]}',
    "extra.csv": "feature,text,colour\n1,a,red\n",
    "short.csv": "feature,text\n1\n",
    "number.csv": "feature,text\n0,fine\none,a\n",
    "truth.csv": "feature,text,by_person\n1,a,perhaps\n",
}


@pytest.mark.parametrize("name", BAD)
def test_a_file_of_something_else_adds_nothing(book: LabelStore, tmp_path: Path, name: str) -> None:
    book.set(0, "here", author="me")
    (tmp_path / name).write_text(BAD[name])
    if name == "nothing.json":
        assert book.load(tmp_path / name) == 0
    else:
        with pytest.raises(ValueError, match=name):
            book.load(tmp_path / name)
    assert texts(book.labels()) == ["here"]
    with pytest.raises(FileNotFoundError):
        book.load(tmp_path / "missing")
    with pytest.raises(ValueError, match=r"\.jsonl"):
        book.save(tmp_path / "labels.txt")


# ---- a database that loses nothing
def test_a_damaged_file_is_an_error_and_is_left_as_it_is(tmp_path: Path) -> None:
    whole = full(tmp_path / "whole.sqlite").path.read_bytes()
    size = len(whole)
    cases = [whole[:n] for n in (1, 99, 100, 4096, size // 2, size - 1)]
    page = size // 2 // 4096 * 4096
    cases += [whole[:page] + bytes(4096) + whole[page + 4096 :]]  # which much of the reading would pass by
    cases += [b"not a database at all" * 300, whole[:4096] + bytes(size - 4096), bytes(4096) + whole[4096:]]
    for i, damaged in enumerate(cases):
        path = tmp_path / f"{i}.sqlite"
        path.write_bytes(damaged)
        for use in (list, len, str, lambda book: book.set(0, "x", author="me"), lambda book: book.search("x")):
            with LabelStore(path) as book, pytest.raises(ValueError, match="damaged file"):
                use(book)
            assert path.read_bytes() == damaged


def test_other_files_are_refused(tmp_path: Path, book: LabelStore) -> None:
    with sqlite3.connect(tmp_path / "other.sqlite") as db:
        db.execute("CREATE TABLE labels (feature, text)")
    db.close()
    with pytest.raises(ValueError, match="another SQLite database"):
        list(LabelStore(tmp_path / "other.sqlite"))
    book.set(0, "here", author="me")
    book.close()
    with sqlite3.connect(book.path) as db:
        db.execute("PRAGMA user_version = 2")
    db.close()
    with pytest.raises(ValueError, match="schema_version 1, got 2"):
        book.set(0, "there", author="me")
    with sqlite3.connect(book.path) as db:
        db.execute("PRAGMA user_version = 1")
        db.execute("UPDATE labels SET scores = 'no JSON'")
    db.close()
    with pytest.raises(ValueError, match="damaged"):
        list(book)


def test_a_locked_file_is_waited_for_and_then_an_error(tmp_path: Path) -> None:
    book = LabelStore(tmp_path / FILE, timeout=0.05)
    book.set(0, "here", author="me")
    other = sqlite3.connect(book.path, isolation_level=None, check_same_thread=False)
    other.execute("BEGIN IMMEDIATE")
    assert book[0].text == "here"  # reading goes on
    with pytest.raises(TimeoutError, match="locked by another process"):
        book.set(0, "there", author="me")
    other.execute("ROLLBACK")
    other.execute("BEGIN EXCLUSIVE")
    with pytest.raises(TimeoutError, match="locked"):
        LabelStore(book.path, timeout=0.05).labels()
    other.execute("ROLLBACK")
    other.execute("BEGIN IMMEDIATE")
    other.execute("UPDATE labels SET text = 'meanwhile'")
    threading.Timer(0.2, other.execute, ["COMMIT"]).start()
    patient = LabelStore(book.path)
    patient.add([label(0, "later")])  # waits for its turn, and sees what came before
    assert sorted(texts(patient.labels())) == ["later", "meanwhile"]
    other.close()


def write_many(path: Path, author: str) -> int:
    book = LabelStore(path)
    for start in range(0, 200, 10):
        book.add([label(i, f"{author} {i}", author) for i in range(start, start + 10)])
    return 0


def test_two_processes_write_at_once(tmp_path: Path, book: LabelStore) -> None:
    children = [Child(tmp_path / f"{name}.err", write_many, book.path, name) for name in ("a", "b")]
    for child in children:
        assert child.wait() == (0, "")
    assert sorted(texts(book.labels())) == sorted(f"{name} {i}" for name in "ab" for i in range(200))
    assert len(book) == 200


def test_threads_write_at_once_and_a_replaced_file_is_seen(book: LabelStore, tmp_path: Path) -> None:
    threads = [
        threading.Thread(target=lambda i=i: book.add([label(j, "x", str(i)) for j in range(5)])) for i in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(book.labels()) == 40
    copy = LabelStore(tmp_path / "copy.sqlite")
    copy.set(1, "of the copy", author="me")
    copy.close()
    os.replace(copy.path, book.path)
    assert texts(book.labels()) == ["of the copy"]
    book.path.unlink()
    assert book.labels() == []


def test_a_book_that_may_not_be_written_is_read() -> None:
    folder = Path(tempfile.mkdtemp())
    try:
        LabelStore(folder / FILE).set(0, "here", author="me")
        (folder / FILE).chmod(0o444)
        folder.chmod(0o555)
        user = os.geteuid()
        if user == 0:
            os.seteuid(65534)  # root may write everywhere
        try:
            book = LabelStore(folder / FILE)
            assert book[0].text == "here" and texts(book.search("here")) == ["here"]
            with pytest.raises(PermissionError, match="may not be written"):
                book.set(0, "there", author="me")
            with pytest.raises(PermissionError):
                LabelStore(folder / "new.sqlite").set(0, "there", author="me")
            assert book[0].text == "here"
            book.close()
        finally:
            os.seteuid(user)
    finally:
        folder.chmod(0o755)
        shutil.rmtree(folder)


def test_labels_of_another_sae_are_not_taken_for_those_of_this_one(store: sl.FeatureStore, tmp_path: Path) -> None:
    LabelStore.open(store.folder).set(0, "here", author="me")
    other = harvest(tmp_path / "other", seed=1)
    shutil.copy(store.folder / FILE, other.folder / FILE)
    with pytest.raises(ValueError, match="SAE that was harvested"):
        list(LabelStore.open(other))
    with pytest.raises(FileNotFoundError):
        LabelStore.open(tmp_path / "nowhere")
    assert list(LabelStore.open(store)) == list(LabelStore(other.folder / FILE))


# ---- the report, the card, the shell
def test_cards_show_the_chosen_labels_of_each_side_escaped(store: sl.FeatureStore) -> None:
    plain = store.feature(0)._repr_html_()
    book = LabelStore.open(store)
    book.add([label(0, SCRIPT, SCRIPT, sign=1, scores={"f1": 0.75, "f1_chance": 0.25}), label(0, "cold", sign=-1)])
    book.add([label(0, "not chosen", "model", sign=-1), label(1, "articles", "model")])
    book.set(0, "cold & ice", author="me", sign=-1)
    card = store.feature(0)._repr_html_()
    assert "<script" not in card and "<img" not in card and "&lt;/script&gt;" in card
    assert "cold &amp; ice, by me, a person" in card and "f1 0.75 (chance 0.25)" in card and "not chosen" not in card
    assert "articles" in store.feature(1)._repr_html_() and "by model" in store.feature(1)._repr_html_()
    book.add([label(2, "", kind="none")])
    assert "no name, by rules" in store.feature(2)._repr_html_() and join_texts(book.chosen(2)) == ""
    book.close()
    book.path.write_bytes(b"garbage" * 99)
    damaged = store.feature(0)._repr_html_()
    assert "damaged" in damaged and damaged.endswith(plain[plain.index("<article") :])


def read_rows(page: str) -> dict[int, dict]:
    data = page.split('<script type="application/json" id="data">')[1].split("</script>")[0]
    return {row["feature"]: row for row in json.loads(data)["features"]}


def test_the_report_shows_the_book_unless_labels_are_given(store: sl.FeatureStore, tmp_path: Path) -> None:
    with LabelStore.open(store) as book:
        book.add(
            [label(0, SCRIPT, SCRIPT, sign=1), label(0, "cold", sign=-1), label(1, "articles", scores={"f1": 0.5})]
        )
        page = Path(report(store, tmp_path / "a.html", progress=False).page).read_text()
        rows = read_rows(page)
        assert (
            rows[0]["label"] == f"+ {SCRIPT}; \u2212 cold" and rows[1]["label"] == "articles" and not rows[2]["label"]
        )
        assert read_cards(page)[1]["origins"] == ["by rules: f1 0.5"] and "\\u003cscript" in page
        assert [rows[j].get("score") for j in range(3)] == [None, 0.5, None] and rows[0]["authors"] == [
            shareable(SCRIPT),
            "rules",
        ]
        assert SCRIPT not in page and "<img src=x" not in page
        page = Path(report(store, tmp_path / "b.html", labels={2: "given"}, progress=False).page).read_text()
        assert {j: row["label"] for j, row in read_rows(page).items()} == {0: "", 1: "", 2: "given"}
        other = LabelStore(tmp_path / "other.sqlite")
        other.set(2, "theirs", author="me")
        page = Path(report(store, tmp_path / "c.html", labels=other, progress=False).page).read_text()
        assert read_rows(page)[2]["label"] == "theirs" and not read_rows(page)[0]["label"]
    book.path.write_bytes(b"garbage" * 99)
    with pytest.raises(ValueError, match="damaged"):
        report(store, tmp_path / "d.html", progress=False)


def test_the_commands(store: sl.FeatureStore, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def shell(*words: object) -> tuple[int, str, str]:
        code = dispatch(["labels", str(store.folder), *map(str, words)])
        said = capsys.readouterr()
        return code, said.out, said.err

    assert shell()[:2] == (0, f"{store.folder / FILE}: 0 of 3 features named\n")
    LabelStore.open(store).add([label(1, "kinds of \x1b[2J weather", "rules")])
    code, out, _ = shell("search", "weather")
    assert code == 0 and "kinds of \\x1b[2J weather" in out and "by rules" in out
    assert (
        shell("set", 1, "rain and storms")[0] == 0 and shell("set", 0, "cold", "--sign", -1, "--author", "me")[0] == 0
    )
    code, out, _ = shell("show", 1)
    assert (
        code == 0 and [line[0] for line in out.splitlines()] == ["*", " "] and "rain and storms" in out.splitlines()[0]
    )
    assert "No label" in shell("search", "weather")[2] and "weather" in shell("search", "weather", "--all")[1]
    assert "weather" in shell("choose", 1, "rules")[1] and "no label" in shell("show", 2)[2]
    for name, form in [("labels.json", None), *((f"labels.{form}.any", form) for form in FORMATS)]:
        command = ["export", tmp_path / name, *(["--format", form] if form else [])]
        assert shell(*command)[:2] == (0, f"3 labels in {tmp_path / name}.\n")
        assert shell("delete", 1, "rules")[:2] == (0, "1 label deleted.\n")
        assert shell("import", tmp_path / name)[:2] == (0, "3 labels added.\n")
    LabelStore.open(store).add([Label(feature=2, text="No good rule", author="rules", kind="none")])
    said = f"3 labels in {tmp_path / 'some.jsonl'}. Left out: 1 that say that there is no good name.\n"
    assert shell("export", tmp_path / "some.jsonl")[:2] == (0, said)
    assert shell("export", tmp_path / "all.csv")[1] == f"4 labels in {tmp_path / 'all.csv'}.\n"
    for wrong in (
        ("set", 3, "x"),
        ("export", tmp_path / "x.txt"),
        ("choose", 2, "x"),
        ("import", tmp_path / "no"),
        ("sett",),
    ):
        code, out, err = shell(*wrong)
        assert (code, out, len(err.splitlines())) == (2, "", 1), wrong
    assert dispatch(["labels", str(tmp_path), "set", "1", "x"]) == 2 and not (tmp_path / FILE).exists()


def test_the_help_of_the_commands_is_complete(capsys: pytest.CaptureFixture[str]) -> None:
    group: typer.main.TyperGroup = typer.main.get_command(app)  # type: ignore[assignment]
    for name, command in group.commands["labels"].commands.items():  # type: ignore[attr-defined]
        assert dispatch(["labels", "store", name, "--help"]) == 0
        said = " ".join(capsys.readouterr().out.split())
        assert command.help and all(
            param.help and param.help[:20] in said for param in command.params if param.name != "help"
        )

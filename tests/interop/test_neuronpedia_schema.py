"""Every row of an export is taken by Neuronpedia's tables, in a real PostgreSQL, in the way of its importer."""

import getpass
import gzip
import json
import os
import re
import socket
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from neuronpedia_database import (
    FACTS,
    HEADS,
    LINES,
    USERS,
    Database,
    find_server,
    gather_facts,
    import_folder,
    read_facts,
    read_migrations,
    serve,
)

import saelab as sl
from saelab.interop.neuronpedia import Publication, export_store
from saelab.labels.label import FIRST_USER, Label
from saelab.labels.label_store import LabelStore

PLACE = "blocks.1.hook_resid_post"
MIGRATIONS = os.environ.get("SAELAB_NEURONPEDIA_MIGRATIONS")


@pytest.fixture(scope="module")
def server() -> Iterator[Database]:
    programs = find_server()
    if programs is None:
        pytest.skip("no PostgreSQL server: initdb, pg_ctl and psql are neither on the PATH nor in SAELAB_POSTGRES")
    with serve(programs) as database:
        yield database


@pytest.fixture(scope="module", params=["facts", "migrations"])
def tables(request: pytest.FixtureRequest, server: Database) -> Database:
    if request.param == "facts":
        return server.make("facts", read_facts(json.loads(FACTS.read_text())))
    if MIGRATIONS is None:
        pytest.skip("SAELAB_NEURONPEDIA_MIGRATIONS does not name the folder of Neuronpedia's migrations")
    has_vectors = bool(server.ask("SELECT 1 FROM pg_available_extensions WHERE name = 'vector'"))
    return server.make("migrations", read_migrations(Path(MIGRATIONS), has_vectors))


@pytest.fixture(scope="module")
def sae() -> sl.SAE:
    return sl.SAE(sl.SAEConfig(d_in=32, d_sae=40, activation=sl.AbsTopK(k=3)), seed=1)


@pytest.fixture(scope="module")
def store(sae: sl.SAE, tiny: Any, tiny_tokens: Any, tmp_path_factory: pytest.TempPathFactory) -> sl.FeatureStore:
    folder = tmp_path_factory.mktemp("published") / "store"
    made = sl.harvest(sae, tiny, tiny_tokens[:24], folder, hook_point=PLACE, progress=False)
    with LabelStore.open(made) as book:
        book.set(3, "a name", author="ada-the-user")
        book.add(
            [Label(feature=5, sign=1, text="hot", author="rules", scores={"f1": 0.5}, provenance={"at": str(folder)})]
        )
        book.add([Label(feature=5, sign=-1, text="cold", author=str(folder / "lm"))])
        book.add([Label(feature=7, text="No good rule", author="rules", kind="none")])
        book.add([Label(feature=9, text="odd", author="rules", time="some day")])
    return made


@pytest.mark.parametrize("with_model", [True, False])
def test_every_kind_of_row_is_taken(
    tables: Database, store: sl.FeatureStore, sae: sl.SAE, tiny: Any, with_model: bool, tmp_path: Path
) -> None:
    parts = {"sae": sae, "model": tiny} if with_model else {}
    name = f"set-{int(with_model)}"
    root = export_store(store, tmp_path, "neuronpedia", source_set=name, progress=False, **parts)
    taken = import_folder(tables, root)
    assert {kind: one.errors for kind, one in taken.items()} == dict.fromkeys([*HEADS, *LINES], ())
    assert {kind: one.dropped for kind, one in taken.items()} == dict.fromkeys([*HEADS, *LINES], ())
    n = int((store.statistics.fires.sum(1) > 0).sum())
    assert {kind: one.taken for kind, one in taken.items() if kind not in ("activations", "model")} == {
        "release": 1, "sourceset": 1, "source": 1, "features": n, "explanations": 4, "scores": 0,
    }  # fmt: skip
    assert taken["activations"].taken == taken["activations"].given > n and tables.count("Model")
    where = f"""WHERE layer = '1-{name}' AND "index" = '5' ORDER BY description"""
    assert tables.ask(f'SELECT description FROM "Explanation" {where}') == ["+ hot", "\u2212 cold"]
    sql = f"""SELECT cardinality(vector), "hasVector" FROM "Neuron" WHERE layer = '1-{name}' LIMIT 1"""
    assert tables.ask(sql) == (["32|t"] if with_model else ["0|f"])
    for table, column in {"SourceRelease": "name", "Model": "id", "SourceSet": "name", "Source": '"setName"'}.items():
        asked = store.provenance.model if table == "Model" else name
        assert tables.ask(f"""SELECT visibility FROM "{table}" WHERE {column} = '{asked}'""") == ["PUBLIC"]


def scored(store: sl.FeatureStore, folder: Path, **about: Any) -> Path:
    """An export of two labels with scores, in text that PostgreSQL does not store."""
    for name in ("tokens.safetensors", "statistics.safetensors", "strings.json", "manifest.json"):
        (folder / name).write_bytes((store.folder / name).read_bytes())
    for shard in store.manifest.shards:
        (folder / shard.file).write_bytes((store.folder / shard.file).read_bytes())
    copy = sl.FeatureStore.load(folder)
    scores = {"detection": 0.8, "detection_low": 0.7, "detection_high": 0.9, "detection_chance": 0.5, "f1": 0.4}
    with LabelStore.open(copy) as book:
        book.add([Label(feature=3, text="a\0b \\u0000 c", author="lm", scores=scores)])
        book.add([Label(feature=5, text="none", author="lm", scores={"fuzzing": float("nan"), "detection": 0.6})])
    shown = Publication(model_id=f"m-{about.get('score_model')}", **about)
    return export_store(copy, folder / "out", "neuronpedia", features=[3, 5], about=shown, progress=False)


def test_scores_have_a_table_of_their_own(tables: Database, store: sl.FeatureStore, tmp_path: Path) -> None:
    for name in ("ExplanationScoreModel", "ExplanationScoreType"):
        given = {"name": "scorer" if name.endswith("Model") else "eleuther_recall", "displayName": "d"}
        more = {"description": "d", "creatorName": "c", "creatorId": USERS[0]}
        columns = tables.columns(name)
        row = {key: value for key, value in (given | more).items() if key in columns}
        keys = ", ".join(f'"{key}"' for key in row)
        tables.ask(f"""INSERT INTO "{name}" ({keys}) VALUES ({", ".join(f"'{value}'" for value in row.values())})""")
    taken = import_folder(tables, scored(store, tmp_path, score_model="scorer"))
    assert {kind: one.errors for kind, one in taken.items()} == dict.fromkeys([*HEADS, *LINES], ())
    assert (taken["explanations"].taken, taken["scores"].taken, taken["scores"].dropped) == (2, 2, ())
    sql = """SELECT description, value, "jsonDetails" FROM "ExplanationScore" s JOIN "Explanation" e
        ON e.id = s."explanationId" WHERE e."modelId" = 'm-scorer' ORDER BY value DESC"""
    first, second = tables.ask(sql)
    assert first == 'a\ufffdb \\u0000 c|0.8|{"low": 0.7, "high": 0.9, "chance": 0.5}' and second == "none|0.6|{}"
    (tmp_path / "other").mkdir()
    refused = import_folder(tables, scored(store, tmp_path / "other", score_model="nobody"))
    assert "explanationScoreModelName" in refused["scores"].errors[0] and refused["explanations"].taken == 2


def test_without_a_model_that_scores_there_are_no_rows_of_scores(store: sl.FeatureStore, tmp_path: Path) -> None:
    root = scored(store, tmp_path)
    assert not (root / "scores").exists()
    rows = read(root, "explanations/batch-0.jsonl.gz")
    assert json.loads(rows[0]["notes"])["saelab"]["scores"]["detection"] == 0.8
    assert "\0" not in json.dumps(rows) and rows[0]["description"] == "a\ufffdb \\u0000 c"
    raw = gzip.decompress((root / "explanations/batch-0.jsonl.gz").read_bytes())
    assert b"\\u0000" not in raw  # its importer replaces these six characters, wherever they stand


def test_a_wrong_key_is_refused_by_the_tables(tables: Database, store: sl.FeatureStore, tmp_path: Path) -> None:
    """The tables do look: what names no row of theirs fails, and a row that names one is taken."""
    made = {}
    for name, about in {
        "nobody": Publication(creator_id="nobody"),
        "unknown": Publication(explanation_model="unknown-lm"),
        "other": Publication(
            creator_id=USERS[1],
            visibility="UNLISTED",
            owner="me",
            urls=("https://a.org",),
            model_id=f"other-{tables.name}",
        ),
    }.items():
        root = export_store(store, tmp_path, "neuronpedia", source_set=name, about=about, features=[3], progress=False)
        made[name] = import_folder(tables, root)
    assert "fkey" in made["nobody"]["sourceset"].errors[0] and not made["nobody"]["features"].taken
    assert (
        "explanationModelName" in made["unknown"]["explanations"].errors[0] and made["unknown"]["features"].taken == 1
    )
    assert [one.taken for one in made["other"].values()][:5] == [1] * 5 and not made["other"]["explanations"].errors
    assert tables.ask(f"""SELECT owner, visibility FROM "Model" WHERE id = 'other-{tables.name}'""") == ["me|UNLISTED"]


def test_the_facts_are_those_of_the_tables(tables: Database) -> None:
    assert gather_facts(tables) == json.loads(FACTS.read_text())


def test_a_field_without_a_column_is_noticed(tables: Database, store: sl.FeatureStore, tmp_path: Path) -> None:
    root = export_store(store, tmp_path, "neuronpedia", source_set="odd", features=[3], progress=False)
    file = root / "features/batch-0.jsonl.gz"
    row = json.loads(gzip.decompress(file.read_bytes()))
    file.write_bytes(gzip.compress(json.dumps(row | {"more": 1}).encode()))
    head = json.loads((root / "source.jsonl").read_text())
    (root / "source.jsonl").write_text(json.dumps(head | {"more": 1, "num_prompts": "3"}) + "\n")
    taken = import_folder(tables, root)
    assert taken["features"].dropped == ("more",)
    assert taken["source"].errors == ("Source.more is not known", "Source.num_prompts is no integer")


def read(root: Path, name: str) -> list[dict[str, Any]]:
    raw = (root / name).read_bytes()
    return [json.loads(line) for line in (gzip.decompress(raw) if name.endswith(".gz") else raw).splitlines()]


def test_rows_need_what_the_facts_need(store: sl.FeatureStore, sae: sl.SAE, tiny: Any, tmp_path: Path) -> None:
    """Without a server: every row has a column for each field, and a value where one is due."""
    facts = json.loads(FACTS.read_text())["tables"]
    root = export_store(store, tmp_path, "neuronpedia", sae=sae, model=tiny, progress=False)
    files = {f"{kind}.jsonl": table for kind, table in HEADS.items()}
    files |= {f"{kind}/batch-0.jsonl.gz": table for kind, table in LINES.items() if kind != "scores"}
    for name, table in files.items():
        columns, rows = facts[table]["columns"], read(root, name)
        due = {column for column, kind in columns.items() if " !" in kind}
        without = {column for column in due if columns[column].endswith("!")}
        assert rows and {tuple(row) for row in rows} == {tuple(rows[0])}  # the importer goes by the first row's fields
        for row in rows:
            assert set(row) <= set(columns) and without <= set(row), table
            assert not [column for column in due & set(row) if row[column] is None], table
    [model] = read(root, "model.jsonl")
    assert (model["layers"], model["dimension"], model["owner"]) == (tiny.cfg.n_layers, 32, "custom")


def test_what_stands_for_a_signed_feature(store: sl.FeatureStore, sae: sl.SAE, tmp_path: Path) -> None:
    root = export_store(store, tmp_path, "neuronpedia", sae=sae, progress=False)
    rows = {int(row["index"]): row for row in read(root, "features/batch-0.jsonl.gz")}
    for j, row in rows.items():
        values = store.feature(j).values
        expected = max(values) if max(values) > 0 else min(values)
        assert row["vectorDefaultSteerStrength"] == pytest.approx(float(expected)), "a code that the feature has"
        assert row["maxActApprox"] == pytest.approx(abs(float(expected)))
    below = int((store.statistics.fires[:, 1] > 0).sum())
    assert below and f"{below} of 40 features fire below 0" in read(root, "source.jsonl")[0]["notes"]
    found = {row["index"] for row in read(root, "explanations/batch-0.jsonl.gz")}
    assert found == {"3", "5", "9"}  # no good rule is no explanation
    only = export_store(store, tmp_path / "one", "neuronpedia", features=[1, 3], progress=False)
    assert {row["index"] for row in read(only, "explanations/batch-0.jsonl.gz")} == {"3"}  # a key into the features


@pytest.mark.parametrize("form", ["neuronpedia", "saedashboard"])
def test_no_export_names_a_folder_a_person_or_this_machine(
    store: sl.FeatureStore, sae: sl.SAE, form: Any, tmp_path: Path
) -> None:
    opened = sl.FeatureStore.load(store.folder)
    private = {"model": "/home/ada/lm", "text": "/home/ada/my texts/a.txt"}
    opened.manifest.__dict__["provenance"] = opened.manifest.provenance | private
    root = export_store(opened, tmp_path / "out", form, sae=sae, features=[3, 5], progress=False)
    secrets = ["/home", "ada", "/tmp", str(store.folder), str(tmp_path), socket.gethostname()]
    files = [file for file in root.rglob("*") if file.is_file()]
    assert len(files) > 3
    for file in files:
        raw = file.read_bytes()
        text = (gzip.decompress(raw) if file.suffix == ".gz" else raw).decode()
        text = re.sub(r'"tokens": ?\[.*?\]', "", text)
        found = [secret for secret in secrets if re.search(rf"(?<!\w){re.escape(secret)}(?!\w)", text)]
        assert not found and getpass.getuser() not in re.findall(r'"(\w+)"', text), file


def test_the_converter_gets_vectors_and_labels(store: sl.FeatureStore, sae: sl.SAE, tmp_path: Path) -> None:
    folder = export_store(store, tmp_path / "a", "saedashboard", sae=sae, features=[3, 5], progress=False)
    boards = json.loads((folder / "batch-0.json").read_text())["features"]
    assert boards[0]["vector"] == pytest.approx(sae.directions()[3].tolist())
    assert [row["description"] for row in read(folder, "explanations/batch-0.jsonl.gz")] == [
        "a name", "+ hot", "\u2212 cold",
    ]  # fmt: skip
    plain = export_store(store, tmp_path / "b", "saedashboard", features=[3], progress=False)
    assert "vector" not in json.loads((plain / "batch-0.json").read_text())["features"][0]  # an empty one is steered by


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"creator": ""}, "`creator` must be a name"),
        ({"creator_id": " "}, "`creator_id` must be a name"),
        ({"model_id": "../x"}, "`model_id` must be letters"),
    ],
)
def test_names_that_it_does_not_take(wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=re.escape(said)):
        replace(Publication(), **wrong)


def test_a_set_has_a_plain_name(store: sl.FeatureStore, tmp_path: Path) -> None:
    for name in ("Mine", "a--b", "-a", "neurons", "../a", ""):
        with pytest.raises(ValueError, match="`source_set` must be lowercase letters"):
            export_store(store, tmp_path, "neuronpedia", source_set=name, progress=False)


def test_a_saved_label_file_has_the_columns_too(store: sl.FeatureStore, tmp_path: Path) -> None:
    columns = json.loads(FACTS.read_text())["tables"]["Explanation"]["columns"]
    with LabelStore.open(store) as book, LabelStore(tmp_path / "again.sqlite") as again:
        assert book.save(tmp_path / "labels.jsonl") == 4
        rows = read(tmp_path, "labels.jsonl")
        assert again.load(tmp_path / "labels.jsonl") == 4
        kept = [(label.text, label.sign, label.author, dict(label.scores)) for label in again]
        assert kept == [
            (label.text, label.sign, label.author.rpartition("/")[2], dict(label.scores))  # a path is cut
            for label in book
            if label.kind != "none"
        ]
    for row in rows:
        assert set(row) <= set(columns) and row["layer"] == "1-saelab" and row["authorId"] == FIRST_USER
    assert np.all([re.match(r"\d{4}-", row["createdAt"]) for row in rows])

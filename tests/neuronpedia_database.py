"""Neuronpedia's tables in a PostgreSQL server that is started here, and its importer's way to fill them.

The tables come from Neuronpedia's own migrations where SAELAB_NEURONPEDIA_MIGRATIONS names their folder, and else from
`interop/neuronpedia_schema.json`, facts read from a database that those migrations made.
"""

import gzip
import json
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FACTS = Path(__file__).parent / "interop" / "neuronpedia_schema.json"
HEADS = {"release": "SourceRelease", "model": "Model", "sourceset": "SourceSet", "source": "Source"}
LINES = {
    "features": "Neuron", "activations": "Activation", "explanations": "Explanation", "scores": "ExplanationScore",
}  # fmt: skip
"""what its importer reads, and the scores, which its administrator names to it with their table"""
FIXED = ("ExplanationModelType", "ExplanationType", "ExplanationScoreModel", "ExplanationScoreType")
"""tables of names that an installation fills"""
USERS = ("clkht01d40000jv08hvalcvly", "cljgamm90000076zdchicy6zj")
"""the users that Neuronpedia's seed makes"""
PLAIN = {"text": str, "boolean": bool, "integer": int, "double precision": (int, float), "jsonb": (dict, list)}


def find_server() -> Path | None:
    """The folder of PostgreSQL's programs: SAELAB_POSTGRES, or where `initdb` of the PATH really lies."""
    named = os.environ.get("SAELAB_POSTGRES")
    found = Path(named) / "initdb" if named else shutil.which("initdb")
    folder = Path(found).resolve().parent if found else None
    return folder if folder and all((folder / name).exists() for name in ("initdb", "pg_ctl", "psql")) else None


@dataclass(frozen=True)
class Database:
    """One database of a running server, spoken to through psql."""

    programs: Path
    folder: Path
    name: str = "postgres"

    def ask(self, sql: str, name: str = "") -> list[str]:
        """The lines that a text of SQL prints; RuntimeError with what the server says."""
        words = [self.programs / "psql", "-h", self.folder, "-U", "postgres", "-d", name or self.name, "-qAtX"]
        done = subprocess.run([*words, "-v", "ON_ERROR_STOP=1"], input=sql, capture_output=True, text=True, timeout=60)
        if done.returncode:
            raise RuntimeError(done.stderr.strip())
        return done.stdout.splitlines()

    def make(self, name: str, sql: str) -> "Database":
        """A new database with tables."""
        self.ask(f'CREATE DATABASE "{name}"')
        made = Database(self.programs, self.folder, name)
        made.ask(sql)
        made.ask("".join(_insert_user(made, user) for user in USERS))
        return made

    def columns(self, table: str) -> dict[str, str]:
        """Type of each column."""
        sql = (
            "SELECT column_name || '|' || CASE data_type WHEN 'ARRAY' THEN udt_name::regtype::text "
            "WHEN 'USER-DEFINED' THEN udt_name ELSE data_type END FROM information_schema.columns "
            f"WHERE table_name = '{table}' ORDER BY ordinal_position"
        )
        return dict(line.split("|") for line in self.ask(sql))

    def count(self, table: str) -> int:
        """Number of rows."""
        return int(self.ask(f'SELECT count(*) FROM "{table}"')[0])


def _insert_user(database: Database, user: str) -> str:
    names = database.columns("User")
    given = {"id": user, "name": user, "emailUnsubscribeCode": user}
    return _insert("User", {name: value for name, value in given.items() if name in names})


def _insert(table: str, row: dict[str, Any]) -> str:
    listed = ", ".join(f'"{name}"' for name in row)
    return (
        f'INSERT INTO "{table}" ({listed}) '
        f'SELECT {listed} FROM jsonb_populate_record(null::"{table}", $json${json.dumps(row)}$json$::jsonb) '
        "ON CONFLICT DO NOTHING;\n"
    )


@contextmanager
def serve(programs: Path) -> Iterator[Database]:
    """A server on a socket in a folder of its own, as a user that is not root."""
    folder = Path(tempfile.mkdtemp(prefix="pg", dir="/tmp"))  # a socket's path must be short
    user = "nobody" if os.geteuid() == 0 else None
    if user:
        shutil.chown(folder, user)
    data = folder / "data"
    settings = f"-c listen_addresses='' -c unix_socket_directories='{folder}' -c fsync=off -c shared_buffers=16MB"

    def call(name: str, *words: str) -> None:
        done = subprocess.run(
            [programs / name, *words], user=user, cwd=folder, timeout=90, text=True,
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
        )  # fmt: skip
        if done.returncode:
            raise RuntimeError(f"{name}: {done.stderr}")

    try:
        call("initdb", "-D", str(data), "-U", "postgres", "-A", "trust", "-N", "--no-locale", "-E", "UTF8")
        call("pg_ctl", "-D", str(data), "-w", "-l", str(folder / "log"), "-o", settings, "start")
        try:
            yield Database(programs, folder)
        finally:
            call("pg_ctl", "-D", str(data), "-m", "immediate", "stop")
    finally:
        shutil.rmtree(folder, ignore_errors=True)


# ---- tables
def read_migrations(folder: Path, has_vectors: bool) -> str:
    """All migrations in their order. Without pgvector its one type is an array: nothing here fills such a column."""
    text = "\n".join(file.read_text() for file in sorted(folder.glob("*/migration.sql")))
    if has_vectors:
        return text
    return re.sub(r"\bvector\(\d+\)", "REAL[]", re.sub(r'CREATE EXTENSION[^;]*"vector";', "", text))


def read_facts(facts: dict[str, Any]) -> str:
    """SQL of the tables that the facts name, with their columns, keys and lists of values."""
    sql = [f'CREATE TYPE "{name}" AS ENUM ({_quote(values)});' for name, values in facts["enums"].items()]
    for table, about in facts["tables"].items():
        rows = [f'"{name}" {_type(kind)}' for name, kind in about["columns"].items()]
        rows += [f"UNIQUE ({_names(key)})" for key in about["unique"]]
        sql.append(f'CREATE TABLE "{table}" ({", ".join(rows)});')
    for table, about in facts["tables"].items():
        for names, other, theirs in about["keys"]:
            sql.append(
                f'ALTER TABLE "{table}" ADD FOREIGN KEY ({_names(names)}) REFERENCES "{other}" ({_names(theirs)});'
            )
    return "\n".join(sql)


def _quote(values: list[str]) -> str:
    return ", ".join(f"'{value}'" for value in values)


def _names(names: list[str]) -> str:
    return ", ".join(f'"{name}"' for name in names)


def _type(kind: str) -> str:
    name, *needed = kind.split(" !")
    name = name.removesuffix(" =")
    end = (" NOT NULL" if needed else "") + (f" DEFAULT {needed[0]}" if needed and needed[0] else "")
    return (f'"{name}"' if name[0].isupper() else name) + end


def gather_facts(database: Database) -> dict[str, Any]:
    """The facts of a database that migrations made: `type`, with ` !` where a value is needed, then its default."""
    wanted = [*HEADS.values(), *LINES.values(), "User", *FIXED]
    tables = {}
    for table in wanted:
        sql = (
            f"SELECT column_name || '|' || is_nullable || '|' || coalesce(column_default, '') FROM "
            f"information_schema.columns WHERE table_name = '{table}' ORDER BY ordinal_position"
        )
        types, columns = database.columns(table), {}
        for line in database.ask(sql):
            name, free, default = line.split("|")
            kind = types[name] if types[name] != "vector" else "real[]"
            columns[name] = kind if free == "YES" else f"{kind} !{default}"
        tables[table] = {"columns": columns, "unique": _unique(database, table), "keys": _keys(database, table, wanted)}
    used = {kind.split(" !")[0] for about in tables.values() for kind in about["columns"].values() if kind[0].isupper()}
    sql = "SELECT typname || '|' || enumlabel FROM pg_enum JOIN pg_type t ON t.oid = enumtypid ORDER BY enumsortorder"
    enums: dict[str, list[str]] = {}
    for line in database.ask(sql):
        name, value = line.split("|")
        if name in used:
            enums.setdefault(name, []).append(value)
    return {"enums": enums, "tables": tables}


def _unique(database: Database, table: str) -> list[list[str]]:
    sql = (
        "SELECT (SELECT json_agg(attname ORDER BY place) FROM unnest(indkey) WITH ORDINALITY AS k(number, place) "
        "JOIN pg_attribute ON attrelid = indrelid AND attnum = number) FROM pg_index "
        f"WHERE indisunique AND indrelid = '\"{table}\"'::regclass"
    )
    return sorted(json.loads(line) for line in database.ask(sql))


def _keys(database: Database, table: str, wanted: list[str]) -> list[list[Any]]:
    def listed(of: str, numbers: str) -> str:
        return (
            f"(SELECT json_agg(attname ORDER BY place) FROM unnest({numbers}) WITH ORDINALITY AS k(number, place) "
            f"JOIN pg_attribute ON attrelid = {of} AND attnum = number)"
        )

    sql = (
        f"SELECT json_build_array({listed('conrelid', 'conkey')}, relname, {listed('confrelid', 'confkey')}) "
        f"FROM pg_constraint JOIN pg_class c ON c.oid = confrelid "
        f"WHERE contype = 'f' AND conrelid = '\"{table}\"'::regclass"
    )
    return sorted((key for key in map(json.loads, database.ask(sql)) if key[1] in wanted), key=str)


# ---- the importer
@dataclass(frozen=True)
class Taken:
    """What an import made of one kind of record."""

    given: int = 0
    taken: int = 0
    dropped: tuple[str, ...] = ()
    """fields that no column has: the importer leaves them out without a word"""
    errors: tuple[str, ...] = ()


def import_folder(database: Database, folder: Path) -> dict[str, Taken]:
    """Import the files of one SAE as Neuronpedia does: heads by its models, the rest by jsonb_to_recordset."""
    found = {}
    for kind, table in HEADS.items():
        rows = [json.loads(line) for line in (folder / f"{kind}.jsonl").read_text().splitlines()]
        found[kind] = _import_heads(database, table, rows)
    for kind, table in LINES.items():
        texts = [gzip.decompress(file.read_bytes()).decode() for file in sorted((folder / kind).glob("*.jsonl.gz"))]
        parts = [_import_lines(database, table, text) for text in texts]
        found[kind] = Taken(
            sum(part.given for part in parts),
            sum(part.taken for part in parts),
            tuple(sorted({name for part in parts for name in part.dropped})),
            tuple(error for part in parts for error in part.errors),
        )
    return found


def _import_heads(database: Database, table: str, rows: list[dict[str, Any]]) -> Taken:
    """A row that is there already stays. Unknown fields, values of other types and missing ones are refused."""
    before, errors, columns = database.count(table), [], database.columns(table)
    for row in rows:
        if not row.get("inferenceHosts"):  # no column, and its importer leaves an empty list out
            row = {name: value for name, value in row.items() if name != "inferenceHosts"}
        errors += [f"{table}.{name} is not known" for name in row if name not in columns]
        errors += [f"{table}.{name} is no {columns[name]}" for name in row if not _fits(row[name], columns.get(name))]
        if not errors:
            try:
                database.ask(_insert(table, row))
            except RuntimeError as error:
                errors.append(str(error))
    return Taken(len(rows), database.count(table) - before, (), tuple(errors))


def _fits(value: Any, kind: str | None) -> bool:
    if kind is None or value is None:
        return True
    if kind.endswith("[]"):
        return isinstance(value, list) and all(_fits(one, kind[:-2]) for one in value)
    wanted = PLAIN.get(kind, str)
    return isinstance(value, wanted) and (wanted is bool or not isinstance(value, bool))


def _import_lines(database: Database, table: str, text: str) -> Taken:
    lines = [line for line in text.replace("\\u0000", " ").strip().split("\n") if line.strip()]
    if not lines:
        return Taken()
    first, columns, before = json.loads(lines[0]), database.columns(table), database.count(table)
    if table == "Activation":
        lines = [json.dumps(_split_heads(json.loads(line))) for line in lines]
    known = {name: kind for name, kind in columns.items() if name in json.loads(lines[0])}
    listed = ", ".join(f'"{name}"' for name in known)
    typed = ", ".join(f'"{name}" ' + (f'"{kind}"' if kind[0].isupper() else kind) for name, kind in known.items())
    sql = (
        f'INSERT INTO "{table}" ({listed}) SELECT {listed} FROM '
        f"jsonb_to_recordset($json$[{','.join(lines)}]$json$::jsonb) AS t({typed}) ON CONFLICT DO NOTHING"
    )
    errors: list[str] = []
    try:
        database.ask(sql)
    except RuntimeError as error:
        errors.append(str(error))
    return Taken(len(lines), database.count(table) - before, tuple(sorted(set(first) - set(columns))), tuple(errors))


def _split_heads(row: dict[str, Any]) -> dict[str, Any]:
    """Attention's pair of lists, as its importer splits it."""
    pair = row.get("zIndices")
    names = ("zKIndices", "zQIndices")
    return row | dict(zip(names, pair, strict=False)) if isinstance(pair, list) and pair else row

"""The tables of a label file: opened, checked and created, and rows put into them and read from them."""

import errno
import json
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from saelab.labels.label import PACKED, Label, LabelEntry, pack_label

SCHEMA_VERSION = 1
APPLICATION_ID = 0x5AE1AB  # marks the file as one of saelab's
BEST_FIRST = "fixed DESC, kind = 'none', id DESC"
PLACES = f"""SELECT *, row_number() OVER (PARTITION BY feature, sign ORDER BY {BEST_FIRST}) AS place
    FROM labels {{where}}"""
SCHEMA = f"""
CREATE TABLE labels (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    feature INTEGER NOT NULL,
    sign INTEGER NOT NULL,
    text TEXT NOT NULL,
    kind TEXT NOT NULL,
    author TEXT NOT NULL,
    by_person INTEGER NOT NULL,
    scores TEXT NOT NULL,
    evidence TEXT NOT NULL,
    provenance TEXT NOT NULL,
    time TEXT NOT NULL,
    fixed INTEGER NOT NULL DEFAULT 0
);
CREATE INDEX labels_by_feature ON labels (feature, sign);
CREATE TABLE about (name TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE VIEW places AS {PLACES.format(where="")};
PRAGMA application_id = {APPLICATION_ID};
PRAGMA user_version = {SCHEMA_VERSION};
"""
FIELDS = ("feature", "sign", "text", "kind", "author", "by_person", *PACKED, "time", "fixed")
PLACE = "feature = ? AND sign = ?"


def connect(path: Path, timeout: float, create: bool) -> sqlite3.Connection | None:
    """A connection to an intact label file of this version; None where there is none yet, unless `create` is set.

    Raises:
        ValueError: the file is damaged, of another kind or of another schema version.
        TimeoutError: another process keeps it locked for `timeout` seconds.
    """
    if not create and not path.exists():
        return None
    with explained(path):
        uri = f"{path.absolute().as_uri()}?mode={'rwc' if create else 'rw'}"
        # LabelStore's own lock serializes threads.
        db = sqlite3.connect(uri, timeout, uri=True, isolation_level=None, check_same_thread=False)
        try:
            if _check(db, path):
                return db
            if create:
                _found(db)
                return db
        except BaseException:
            db.close()
            raise
        db.close()
        return None


@contextmanager
def transaction(db: sqlite3.Connection) -> Iterator[None]:
    """Context manager: all changes of the block, or none after an exception; other processes wait until it ends."""
    db.execute("BEGIN IMMEDIATE")
    try:
        yield
        db.execute("COMMIT")
    except BaseException:
        if db.in_transaction:
            db.execute("ROLLBACK")
        raise


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """Context manager that turns SQLite's errors into TimeoutError (locked), OSError (no access) or ValueError."""
    try:
        yield
    except sqlite3.DatabaseError as error:
        said, kept = str(error), "Nothing was changed"
        if "locked" in said:
            raise TimeoutError(f"{path} is locked by another process. {kept}: try again when that has ended.") from None
        if "readonly" in said or "unable to open" in said:
            why = f"Cannot open or write {path}: it or its folder may not be written to. {kept}"
            raise PermissionError(errno.EACCES, f"{why}: change the permissions, or work on a copy") from None
        if "full" in said or "I/O" in said:
            why = f"Cannot write {path} ({said}). {kept}: free some space, then run again"
            raise OSError(errno.ENOSPC if "full" in said else errno.EIO, why) from None
        raise ValueError(format_damage(path, said)) from None
    except OverflowError:
        raise ValueError("`feature` must be below 2**63, got more. Give the number of a feature.") from None


def _check(db: sqlite3.Connection, path: Path) -> bool:
    """Whether the file is a label database; False where it is empty. One transaction, so nobody writes meanwhile."""
    db.execute("BEGIN")
    (n_tables,) = db.execute("SELECT count(*) FROM sqlite_master").fetchone()
    size = path.stat().st_size
    about = {
        name: db.execute(f"PRAGMA {name}").fetchone()[0] for name in ("application_id", "user_version", "page_size")
    }
    if n_tables == size == 0:
        db.execute("COMMIT")
        return False
    if n_tables and about["application_id"] != APPLICATION_ID:
        raise ValueError(f"{path} must be a book of labels, got another SQLite database. Move it away.")
    if n_tables and about["user_version"] != SCHEMA_VERSION:
        raise ValueError(
            f"{path} must have schema_version {SCHEMA_VERSION}, got {about['user_version']}. Export its labels as JSON "
            "with the saelab that wrote it, and import them here."
        )
    # SQLite takes the missing end of a last page for zeros, and a file without a whole page for an empty one.
    found = "it was cut off" if size % about["page_size"] else db.execute("PRAGMA quick_check(1)").fetchone()[0]
    if found != "ok" or not n_tables:
        raise ValueError(format_damage(path, found))
    db.execute("COMMIT")
    return True


def format_damage(path: Path, found: str) -> str:
    """The error message for a damaged file."""
    reason = " ".join(found.split())
    return (
        f"{path} must be an intact book of labels, got a damaged file ({reason}). It is left as it is: put a copy in "
        "its place, or move it away and import the labels from an export."
    )


def _found(db: sqlite3.Connection) -> None:
    """Create the tables, unless another process has just done so."""
    with transaction(db):
        if not db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:
            for statement in SCHEMA.split(";"):
                db.execute(statement)


def put_label(db: sqlite3.Connection, label: Label) -> int:
    """Insert a label in place of its author's older ones of the same side; returns the row's id.

    An older one that a person chose and that has another text is kept. A person's label becomes chosen unless another
    person's choice stands; one that replaces a chosen label is chosen.
    """
    packed = pack_label(label)
    place, author = packed[:2], (label.author, label.by_person)
    sql = f"SELECT id, text, fixed FROM labels WHERE {PLACE} AND author = ? AND by_person = ?"
    old = [row for row in db.execute(sql, (*place, *author)) if label.by_person or not row[2] or row[1] == label.text]
    db.executemany("DELETE FROM labels WHERE id = ?", [(number,) for number, _, _ in old])
    fixed = any(row[2] for row in old)
    if label.by_person and not fixed:
        fixed = db.execute(f"SELECT 1 FROM labels WHERE {PLACE} AND fixed", place).fetchone() is None
    marks = ", ".join("?" * len(FIELDS))
    added = db.execute(f"INSERT INTO labels ({', '.join(FIELDS)}) VALUES ({marks})", (*packed, fixed))
    assert added.lastrowid is not None
    return added.lastrowid


def fix_choice(db: sqlite3.Connection, feature: int, sign: int, number: int | None) -> None:
    """Mark one label of a feature and sign as chosen by a person, or none of them.

    Args:
        db: the open database.
        feature: number of the feature.
        sign: 1, -1 or 0.
        number: id of the chosen row; None leaves the choice to the order of labels.
    """
    db.execute(f"UPDATE labels SET fixed = (id IS ?) WHERE {PLACE}", (number, feature, sign))


def unpack_row(row: Sequence[Any]) -> LabelEntry:
    """The label of a row of FIELDS and its rank among those of its feature and sign; ValueError for an invalid row."""
    *values, fixed, place = row
    fields = dict(zip(FIELDS, values, strict=False))
    packed = {name: json.loads(fields[name]) for name in PACKED}
    return LabelEntry(Label(**(fields | packed | {"by_person": bool(fields["by_person"])})), place == 1, bool(fixed))

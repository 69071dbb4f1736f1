"""Connections to the SQLite file of labels: opening, checks, locks, and SQLite's errors with advice.

Nothing is written to a file that is damaged, of another kind or of another version. Every change is one transaction
that waits for those of other processes; the journal is SQLite's own, so that one file holds everything at rest and can
be read where nothing may be written.
"""

import errno
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

FILE = "labels.sqlite"
SCHEMA_VERSION = 1
APPLICATION_ID = 0x5AE1AB  # marks the file as one of saelab's
BEST_FIRST = "fixed DESC, kind = 'none', id DESC"
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
CREATE VIEW places AS SELECT *, row_number() OVER (PARTITION BY feature, sign ORDER BY {BEST_FIRST}) AS place
    FROM labels;
PRAGMA application_id = {APPLICATION_ID};
PRAGMA user_version = {SCHEMA_VERSION};
"""


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
        # LabelBook's own lock serializes threads.
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
        raise ValueError(tell_damage(path, said)) from None
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
        raise ValueError(tell_damage(path, found))
    db.execute("COMMIT")
    return True


def tell_damage(path: Path, found: str) -> str:
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

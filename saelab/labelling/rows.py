"""Labels as rows of the SQLite table: conversion, replacement and choice."""

import json
import sqlite3
from collections.abc import Sequence
from datetime import datetime, timezone
from typing import Any

from saelab.labelling.formats import Entry
from saelab.labelling.label import Label

PACKED = ("scores", "evidence", "provenance")
FIELDS = ("feature", "sign", "text", "kind", "author", "by_person", *PACKED, "time", "fixed")
PLACE = "feature = ? AND sign = ?"


def put_label(db: sqlite3.Connection, label: Label) -> int:
    """Insert a label in place of its author's older ones of the same side; returns the row's id.

    An older one that a person chose and that has another text is kept. A person's label becomes chosen unless another
    person's choice stands; one that replaces a chosen label is chosen.
    """
    packed = _pack(label)
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


def unpack_row(row: Sequence[Any]) -> Entry:
    """The label of a row of FIELDS and its rank among those of its feature and sign; ValueError for an invalid row."""
    *values, fixed, place = row
    fields = dict(zip(FIELDS, values, strict=False))
    packed = {name: json.loads(fields[name]) for name in PACKED}
    return Entry(Label(**(fields | packed | {"by_person": bool(fields["by_person"])})), place == 1, bool(fixed))


def tell_time() -> str:
    """The current time in UTC, ISO 8601."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def _pack(label: Label) -> tuple[Any, ...]:
    for name in ("text", "author", "time"):
        try:
            getattr(label, name).encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"`{name}` must be Unicode, got half a surrogate pair ({error.reason}). Replace what cannot be encoded."
            ) from None
    try:
        packed = [json.dumps(dict(getattr(label, name)), default=_plain) for name in PACKED]
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"A label's {', '.join(PACKED)} must be ready for JSON ({error}). Give plain values."
        ) from None
    head = (int(label.feature), int(label.sign), label.text, label.kind, label.author, bool(label.by_person))
    return (*head, *packed, label.time)


def _plain(value: Any) -> Any:
    """Arrays and their numbers as lists and plain numbers."""
    if hasattr(value, "tolist"):
        return value.tolist()
    raise TypeError(f"{type(value).__name__} is not")

"""`Annotations`: notes, lists of features and steering set-ups in the label file of a store; undo of people's changes.

They are in tables of their own beside that of the labels, so that the file is read as before by all who know labels
alone. Every change is one transaction together with its entry in the history, which outlives the process.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, SupportsIndex

from saelab.functional.indices import read_feature, read_features
from saelab.labels.label import BOTH, Label, format_time
from saelab.labels.label_store import LabelStore

N_CHANGES = 1000
"""Changes that can be undone; older ones are final."""
LONGEST_NAME, LONGEST_NOTE = 200, 20_000
TABLES = (
    "CREATE TABLE IF NOT EXISTS annotations (kind TEXT NOT NULL, name TEXT NOT NULL, value TEXT NOT NULL, "
    "time TEXT NOT NULL, PRIMARY KEY (kind, name))",
    "CREATE TABLE IF NOT EXISTS changes (id INTEGER PRIMARY KEY AUTOINCREMENT, what TEXT NOT NULL, "
    "before TEXT NOT NULL, after TEXT NOT NULL, time TEXT NOT NULL)",
)
NOTE, LIST, SETUP = "note", "list", "setup"
COLUMNS = "id, feature, sign, text, kind, author, by_person, scores, evidence, provenance, time, fixed"
FIXED = -1
"""index of the column that says whether a person chose a label"""


@dataclass(frozen=True, kw_only=True)
class Change:
    """A change by a person that can be undone."""

    what: str
    """what was done, in words"""
    time: str
    """ISO 8601, UTC"""


class Annotations:
    """Notes on features, named lists of features and steering set-ups, kept with the labels of a store; with undo.

    Labels that are set, chosen or deleted through it can be undone, too. Several threads and processes may read and
    write at once: a change is one transaction, and `undo` takes back the last one of all of them.

    Args:
        labels: label database in whose file they are kept.
        d_sae: number of features of the store; None does not check that a feature exists.
        read_only: True refuses every change with ValueError.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder, LabelStore(f"{folder}/labels.sqlite") as labels:
    ...     kept = Annotations(labels)
    ...     kept.set_note(3, "fires in recipes")
    ...     kept.note(3), kept.undo(), kept.note(3)
    ('fires in recipes', 'note on feature 3', '')
    """

    def __init__(self, labels: LabelStore, d_sae: int | None = None, read_only: bool = False) -> None:
        self.labels, self.d_sae, self.read_only = labels, d_sae, read_only

    # ---- notes
    def note(self, feature: SupportsIndex) -> str:
        """The note on a feature; empty where there is none."""
        return self._value(NOTE, str(self._read_feature(feature))) or ""

    def notes(self) -> dict[int, str]:
        """All notes by feature."""
        return {int(name): text for name, text, _ in self._all(NOTE)}

    def set_note(self, feature: SupportsIndex, text: str) -> None:
        """Write the note on a feature in place of the one before; an empty text removes it."""
        feature = self._read_feature(feature)
        if len(text) > LONGEST_NOTE:
            raise ValueError(f"A note may have at most {LONGEST_NOTE:,} characters, got {len(text):,}. Shorten it.")
        _require_unicode(text)
        self._put(NOTE, str(feature), text.strip() or None, f"note on feature {feature}")

    # ---- lists
    def lists(self) -> list[dict[str, Any]]:
        """All lists by name: {"name", "features"}."""
        return [{"name": name, "features": json.loads(value)} for name, value, _ in self._all(LIST)]

    def lists_of(self, feature: SupportsIndex) -> list[str]:
        """Names of the lists that a feature is in."""
        feature = self._read_feature(feature)
        return [each["name"] for each in self.lists() if feature in each["features"]]

    def set_list(self, name: str, features: Iterable[SupportsIndex]) -> None:
        """Make a list of these features, in this order, in place of the one of that name."""
        chosen = list(dict.fromkeys(self._read_feature(feature) for feature in features))
        self._put(LIST, _read_name(name), json.dumps(chosen), f"list {name!r}")

    def add_to_list(self, name: str, feature: SupportsIndex) -> None:
        """Add a feature to the end of a list, which is made where there is none of that name."""
        feature = self._read_feature(feature)
        self._require_writable()
        with self.labels.changing():
            held = self._features(_read_name(name))
            if feature not in held:
                self._put(LIST, name, json.dumps([*held, feature]), f"feature {feature} added to list {name!r}")

    def remove_from_list(self, name: str, feature: SupportsIndex) -> None:
        """Remove a feature from a list; one that is not in it changes nothing."""
        feature = self._read_feature(feature)
        self._require_writable()
        with self.labels.changing():
            held = self._features(name)
            if feature in held:
                left = [other for other in held if other != feature]
                self._put(LIST, name, json.dumps(left), f"feature {feature} removed from list {name!r}")

    def delete_list(self, name: str) -> None:
        """Delete a list; one that does not exist changes nothing."""
        self._put(LIST, name, None, f"list {name!r} deleted")

    def _features(self, name: str) -> list[int]:
        return list(json.loads(self._value(LIST, name) or "[]"))

    # ---- set-ups
    def setups(self) -> list[dict[str, Any]]:
        """All steering set-ups by name: {"name", "setup", "time"}."""
        return [{"name": name, "setup": json.loads(value), "time": time} for name, value, time in self._all(SETUP)]

    def set_setup(self, name: str, setup: Mapping[str, Any]) -> None:
        """Keep a steering set-up, ready for JSON, in place of the one of that name."""
        text = json.dumps(dict(setup), allow_nan=False)
        self._put(SETUP, _read_name(name), text, f"set-up {name!r}")

    def delete_setup(self, name: str) -> None:
        """Delete a set-up; one that does not exist changes nothing."""
        self._put(SETUP, name, None, f"set-up {name!r} deleted")

    # ---- labels by people
    def set_label(self, feature: SupportsIndex, text: str, *, author: str, sign: int = BOTH) -> Label:
        """Add a person's label and choose it, as `LabelStore.set` does; can be undone.

        Args:
            feature: number of the feature.
            text: the label.
            author: who gave it.
            sign: 1 or -1 for the codes of one sign, 0 for the whole feature.
        """
        with self._changing_labels(feature, f"label of feature {feature}"):
            return self.labels.set(feature, text, author=author, sign=sign)

    def choose_label(self, feature: SupportsIndex, author: str | None, *, sign: int = BOTH) -> Label:
        """Record a person's choice among the labels of a feature, as `LabelStore.choose` does; can be undone."""
        with self._changing_labels(feature, f"choice of feature {feature}'s label"):
            return self.labels.choose(feature, author, sign=sign)

    def delete_label(self, feature: SupportsIndex, author: str, *, sign: int = BOTH) -> int:
        """Delete an author's labels of a feature and sign, as `LabelStore.delete` does; can be undone."""
        with self._changing_labels(feature, f"label of feature {feature} deleted"):
            return self.labels.delete(feature, sign=sign, author=author)

    @contextmanager
    def _changing_labels(self, feature: SupportsIndex, what: str) -> Iterator[None]:
        """Context manager: the changes of one feature's labels, and what undoes them, as one transaction."""
        number = self._read_feature(feature)
        self._require_writable()
        with self.labels.changing():
            before = self._label_rows(number)
            yield
            after = self._label_rows(number)
            if before != after:
                both = set(before) & set(after)
                own = [{i: row for i, row in rows.items() if before.get(i) != after.get(i)} for rows in (before, after)]
                assert all(before[i][:FIXED] == after[i][:FIXED] for i in both)
                self._record(what, *({"labels": list(rows.values())} for rows in own))

    def _label_rows(self, feature: int) -> dict[int, list[Any]]:
        rows = self.labels.read(f"SELECT {COLUMNS} FROM labels WHERE feature = ? ORDER BY id", (feature,))
        return {row[0]: list(row) for row in rows}

    def to_dict(self) -> dict[str, Any]:
        """All notes, lists and set-ups, ready for JSON."""
        notes = [{"feature": feature, "text": text} for feature, text in sorted(self.notes().items())]
        return {"notes": notes, "lists": self.lists(), "setups": self.setups()}

    # ---- history
    def last_change(self) -> str | None:
        """What `undo` would undo, in words; None where there is nothing."""
        rows = self._read("SELECT what FROM changes ORDER BY id DESC LIMIT 1")
        return str(rows[0][0]) if rows else None

    def history(self) -> list[Change]:
        """The changes that can be undone, last one first."""
        rows = self._read("SELECT what, time FROM changes ORDER BY id DESC")
        return [Change(what=what, time=time) for what, time in rows]

    def undo(self) -> str | None:
        """Undo the last change, of whichever person and process; returns what it was, None where there is nothing.

        Everything that it changed is as it was, except for what others have changed again since, such as a label that a
        rule or a model has replaced.
        """
        self._require_writable()
        if self.last_change() is None:
            return None
        with self.labels.changing() as db:
            row = db.execute("SELECT id, what, before, after FROM changes ORDER BY id DESC LIMIT 1").fetchone()
            if row is None:  # another process was quicker
                return None
            number, what, before, after = row[0], str(row[1]), json.loads(row[2]), json.loads(row[3])
            self._restore_labels(before.get("labels", []), after.get("labels", []))
            self._restore_values(before.get("values", []), after.get("values", []))
            db.execute("DELETE FROM changes WHERE id = ?", (number,))
        return what

    def _restore_labels(self, before: Sequence[list[Any]], after: Sequence[list[Any]]) -> None:
        """Rows of labels as they were before a change, but for what others have made of them since."""
        old, new = ({row[0]: row for row in rows} for rows in (before, after))
        with self.labels.changing() as db:
            for number in sorted({*old, *new}):
                held = self._find_row(number)
                untouched = held == new.get(number)
                if number not in old:  # a label that it added, whoever is chosen now
                    untouched = held is not None and held[:FIXED] == new[number][:FIXED]
                elif held is None and old[number][FIXED]:
                    untouched = True  # a machine would have let it be, as a person had chosen it
                if untouched:
                    db.execute("DELETE FROM labels WHERE id = ?", (number,))
                if untouched and number in old:
                    self._bring_back(old[number], {row[0] for row in new.values() if row[FIXED]})

    def _bring_back(self, row: list[Any], own: set[int]) -> None:
        """Insert a row again; chosen as before, unless another choice than its own change's was made since."""
        with self.labels.changing() as db:
            sql = "SELECT id FROM labels WHERE feature = ? AND sign = ? AND fixed"
            theirs = {number for (number,) in db.execute(sql, row[1:3])} - own
            marks = ", ".join("?" * len(row))
            values = [*row[:FIXED], row[FIXED] and not theirs]
            db.execute(f"INSERT INTO labels ({COLUMNS}) VALUES ({marks})", values)

    def _find_row(self, number: int) -> list[Any] | None:
        rows = self.labels.read(f"SELECT {COLUMNS} FROM labels WHERE id = ?", (number,))
        return list(rows[0]) if rows else None

    def _restore_values(self, before: Sequence[list[Any]], after: Sequence[list[Any]]) -> None:
        with self.labels.changing() as db:
            for kind, name, value, time in before:
                db.execute("DELETE FROM annotations WHERE kind = ? AND name = ?", (kind, name))
                if value is not None:
                    db.execute("INSERT INTO annotations VALUES (?, ?, ?, ?)", (kind, name, value, time))

    def _record(self, what: str, before: Mapping[str, Any], after: Mapping[str, Any]) -> None:
        with self.labels.changing() as db:
            self._make_tables()
            values = what, json.dumps(before), json.dumps(after), format_time()
            db.execute("INSERT INTO changes (what, before, after, time) VALUES (?, ?, ?, ?)", values)
            db.execute("DELETE FROM changes WHERE id <= (SELECT max(id) FROM changes) - ?", (N_CHANGES,))

    # ---- the file
    def _put(self, kind: str, name: str, value: str | None, what: str) -> None:
        """Set a value, or remove it with None, and record the change, unless nothing changes."""
        self._require_writable()
        with self.labels.changing() as db:
            self._make_tables()
            sql = "SELECT value, time FROM annotations WHERE kind = ? AND name = ?"
            held = db.execute(sql, (kind, name)).fetchone() or (None, "")
            if value == held[0]:
                return
            now = format_time()
            if value is None:
                db.execute("DELETE FROM annotations WHERE kind = ? AND name = ?", (kind, name))
            else:
                db.execute("INSERT OR REPLACE INTO annotations VALUES (?, ?, ?, ?)", (kind, name, value, now))
            self._record(what, {"values": [[kind, name, *held]]}, {"values": [[kind, name, value, now]]})

    def _require_writable(self) -> None:
        if self.read_only:
            raise ValueError("Labels and notes may only be read here. Open the store without read-only to change them.")

    def _make_tables(self) -> None:
        with self.labels.changing() as db:
            for statement in TABLES:
                db.execute(statement)

    def _value(self, kind: str, name: str) -> str | None:
        rows = self._read("SELECT value FROM annotations WHERE kind = ? AND name = ?", (kind, name))
        return str(rows[0][0]) if rows else None

    def _all(self, kind: str) -> list[tuple[str, str, str]]:
        sql = "SELECT name, value, time FROM annotations WHERE kind = ? ORDER BY name"
        return [(str(name), str(value), str(time)) for name, value, time in self._read(sql, (kind,))]

    def _read(self, sql: str, values: Sequence[Any] = ()) -> list[tuple[Any, ...]]:
        """Rows of a query; none where nothing was kept yet."""
        tables = self.labels.read("SELECT 1 FROM sqlite_master WHERE type = 'table' AND name = 'annotations'")
        return self.labels.read(sql, values) if tables else []

    def _read_feature(self, feature: SupportsIndex) -> int:
        return read_features([feature], self.d_sae, "feature")[0] if self.d_sae else read_feature(feature)


def _read_name(name: str) -> str:
    """A name that a person gave, which must not be empty or long."""
    if not name.strip() or len(name) > LONGEST_NAME:
        raise ValueError(f"A name must have 1 to {LONGEST_NAME} characters, got {len(name)}. Choose another.")
    _require_unicode(name)
    return name


def _require_unicode(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"A text must be Unicode, got half a surrogate pair ({error.reason}). Replace what cannot be encoded."
        ) from None

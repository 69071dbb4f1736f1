"""`LabelStore`: SQLite database of a feature store's labels, many per feature, one of them selected; with text search.

Nothing is written to a file that is damaged, of another kind or of another version. Every change is one transaction
that waits for those of other processes; the journal is SQLite's own: one file, which may be read-only, holds all.
"""

import gzip
import json
import os
import sqlite3
import tempfile
import threading
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, SupportsIndex

import numpy as np

from saelab.functional.indices import read_feature
from saelab.labels.encoders import EmbeddingFunction, VectorIndex
from saelab.labels.label import (
    BOTH,
    Format,
    Label,
    LabelEntry,
    LabelKind,
    ShownLabel,
    format_time,
    name_format,
    name_source,
    publish_entries,
    read_entries,
    write_entries,
)
from saelab.labels.label_tables import (
    BEST_FIRST,
    FIELDS,
    PLACES,
    connect,
    explained,
    fix_choice,
    format_damage,
    put_label,
    transaction,
    unpack_row,
)
from saelab.labels.text_search import rank_texts
from saelab.stores.feature_store import FeatureStore
from saelab.stores.files import write_atomic
from saelab.stores.hub import LABELS, MANIFEST, HubAccess, Upload, find_folder, push_files
from saelab.stores.manifest import FeatureManifest

FILE = "labels.sqlite"
VECTORS = ".vectors.safetensors"
TOP = 20
TIMEOUT = 30.0
BY_FEATURE = "feature, CASE sign WHEN 0 THEN 0 WHEN 1 THEN 1 ELSE 2 END, place"  # the whole feature, then + and -


class LabelStore:
    """Labels of features in an SQLite file in the folder of their feature store.

    A feature, and each of its signs, may have many labels, one of which is chosen. A label that a person chose, by
    `set` or `choose`, stays chosen whatever a rule or a model adds later. Otherwise the label added last is chosen,
    where labels of kind "none" (no good name) come after all others. Scores do not decide, as scores of different
    scorers do not compare.

    The file is created by the first label; until then the database is empty. Several threads and processes may read and
    write at once.

    Args:
        path: the SQLite file.
        manifest: manifest of the feature store, by which labels of another SAE are refused; None checks nothing.
        timeout: seconds to wait for another process's lock.

    Raises:
        ValueError: the file is damaged, or holds labels of another SAE.
        TimeoutError: another process keeps the file locked for `timeout` seconds; nothing is lost.
        PermissionError: the file may not be written.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder, LabelStore(f"{folder}/labels.sqlite") as book:
    ...     _ = book.set(123, "rain and storms", author="me")
    ...     [label.text for label in book.search("storm")], book[123].by_person
    (['rain and storms'], True)
    """

    def __init__(self, path: str | Path, manifest: FeatureManifest | None = None, timeout: float = TIMEOUT) -> None:
        self.path, self.timeout = Path(path), timeout
        self._manifest = manifest
        self._sae = str(manifest.request.get("sae") or "") if manifest is not None else ""
        self._lock = threading.RLock()
        self._connection: tuple[tuple[int, ...], sqlite3.Connection, weakref.finalize] | None = None
        self._changing: sqlite3.Connection | None = None

    @classmethod
    def open(cls, store: FeatureStore | str | Path, timeout: float = TIMEOUT) -> "LabelStore":
        """The label database of a store, given as object or folder; FileNotFoundError where there is no store.

        `timeout` is the time in seconds to wait for another process's lock.
        """
        if isinstance(store, FeatureStore):
            book = cls(store.folder / FILE, store.manifest, timeout)
        else:
            book = cls(Path(store) / FILE, FeatureManifest.load(store), timeout)
        book._adopt()
        return book

    @property
    def sae(self) -> str:
        """Hash of the weights of the SAE whose features are labeled; empty where it is not known."""
        return self._sae

    def close(self) -> None:
        """Close the file; the next use opens it again."""
        with self._lock:
            if self._connection is not None:
                self._connection[2]()
                self._connection = None

    def __enter__(self) -> "LabelStore":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # ---- reading
    def __getitem__(self, key: SupportsIndex | tuple[SupportsIndex, int]) -> Label:
        """The chosen label of a feature and sign; of `book[feature]` that of the whole feature, else of +, else of -.

        KeyError where there is none.
        """
        feature, sign = key if isinstance(key, tuple) else (key, None)
        found = [label for label in self.chosen(feature) if sign in (None, label.sign)]
        if not found:
            raise KeyError(
                f"Feature {feature} has no label{'' if sign is None else f' of sign {sign}'} in {self.path}."
            )
        return found[0]

    def __contains__(self, key: object) -> bool:
        feature, sign = key if isinstance(key, tuple) else (key, None)
        return isinstance(feature, int) and any(sign in (None, label.sign) for label in self.chosen(feature))

    def __len__(self) -> int:
        """Number of chosen labels, of features and of their signs."""
        rows = self.read("SELECT count(*) FROM places WHERE place = 1")
        return int(rows[0][0]) if rows else 0

    def __iter__(self) -> Iterator[Label]:
        return iter(self.chosen())

    def chosen(self, feature: SupportsIndex | None = None) -> list[Label]:
        """The chosen labels of one feature or of all: of the whole feature, then of its positive side, then of its
        negative side.
        """
        return [entry.label for entry in self._entries(feature) if entry.chosen]

    def labels(self, feature: SupportsIndex | None = None) -> list[Label]:
        """All labels of one feature or of all, of each sign the chosen one first."""
        return [entry.label for entry in self._entries(feature)]

    def shown(self, features: Iterable[int] | None = None) -> list[ShownLabel]:
        """What lists show of the chosen labels of some features or of all, in the order of `chosen`."""
        where = "" if features is None else f"WHERE feature IN ({', '.join(str(int(j)) for j in features)})"
        columns = ", ".join(ShownLabel._fields)
        places = PLACES.format(where=where)
        rows = self.read(f"SELECT {columns} FROM ({places}) WHERE place = 1 ORDER BY {BY_FEATURE}")
        try:
            return [ShownLabel._make((*row[:5], bool(row[5]), json.loads(row[6]))) for row in rows]
        except ValueError as error:
            raise ValueError(format_damage(self.path, str(error))) from None

    def stamps(self) -> dict[int, tuple[int, ...]]:
        """Numbers for each feature with labels, which differ after a change of its labels or choices."""
        sql = "SELECT feature, count(*), sum(id), sum(fixed * id) FROM labels GROUP BY feature"
        return {row[0]: row[1:] for row in self.read(sql)}

    def search(
        self, text: str, every: bool = False, *, encoder: EmbeddingFunction | None = None, top: int = TOP
    ) -> list[Label]:
        """The chosen labels that match a text query, best match first.

        By words, see `rank_texts`; with an encoder they are followed by the labels that are nearest in meaning, by the
        cosine of their vectors with the query's. The vectors are kept beside the database, in a file of the same name
        that ends in .vectors.safetensors, so that a label is encoded once. Labels of kind "none" (no good name) have no
        meaning to search.

        Args:
            text: the query.
            every: whether to search all labels instead of the chosen ones.
            encoder: function from texts to vectors, such as a `SentenceEncoder`; None searches words alone.
            top: with an encoder, number of labels up to which those by meaning are added.

        >>> import tempfile
        >>> wet = lambda texts: [[float("rain" in t or "weather" in t), float("cat" in t), 0.1] for t in texts]
        >>> with tempfile.TemporaryDirectory() as folder, LabelStore(f"{folder}/labels.sqlite") as book:
        ...     _ = [book.set(i, text, author="me") for i, text in enumerate(("a cat", "rain and storms"))]
        ...     [label.text for label in book.search("weather", encoder=wet, top=1)]
        ['rain and storms']
        """
        entries = self._entries()
        searched = [entry.label for entry in entries if every or entry.chosen]
        found = rank_texts([label.text for label in searched], text)
        if encoder is not None:
            meant = [label.text for label in (entry.label for entry in entries) if label.kind != "none"]
            index = VectorIndex(encoder, self.path.with_suffix(VECTORS) if meant else None)
            index.update(meant)
            others = [i for i in range(len(searched)) if i not in {*found} and searched[i].kind != "none"]
            near = index.compare(text, [searched[i].text for i in others])
            found += [others[j] for j in np.argsort(-near, kind="stable")[: max(0, top - len(found))]]
        return [searched[i] for i in found]

    def authors(self) -> dict[str, int]:
        """Number of labels by author, most first."""
        return dict(self.read("SELECT author, count(*) AS n FROM labels GROUP BY author ORDER BY n DESC, author"))

    def __repr__(self) -> str:
        return f"LabelStore({str(self.path)!r})"

    def __str__(self) -> str:
        n_features = len({label.feature for label in self if label.kind != "none"})
        of = f" of {self._manifest.d_sae:,}" if self._manifest else ""
        authors = ", ".join(f"{author} {n:,}" for author, n in self.authors().items())
        return f"{self.path}: {n_features:,}{of} features named" + (f"; labels by {authors}" if authors else "")

    # ---- writing
    def add(self, labels: Iterable[Label], *, afresh: bool = False) -> int:
        """Add labels, all of them or none; returns how many were added.

        A label with an empty `time` gets the current time. For each feature and sign only the newest label of an author
        is kept, besides one that a person chose and that has another text. With `afresh`, all earlier labels of these
        authors on these features are removed, except those that a person chose. A person's label becomes chosen unless
        another person has chosen one.
        """
        added = [replace(label, time=label.time or format_time()) for label in labels]
        with self.changing() as db:
            for feature, author in {(label.feature, label.author) for label in added if afresh}:
                sql = "DELETE FROM labels WHERE feature = ? AND author = ? AND NOT by_person AND NOT fixed"
                db.execute(sql, (read_feature(feature), author))
            for label in added:
                self._put(db, label)
        return len(added)

    def set(
        self, feature: SupportsIndex, text: str, *, author: str, sign: int = BOTH, kind: LabelKind = "free"
    ) -> Label:
        """Add a person's label and choose it, whatever was chosen before; returns the label.

        Args:
            feature: number of the feature.
            text: the label.
            author: who gave it.
            sign: 1 or -1 for the codes of one sign, 0 for the whole feature.
            kind: what the label describes, one of `LabelKind`.
        """
        label = Label(
            feature=read_feature(feature),
            sign=sign,
            text=text,
            kind=kind,
            author=author,
            by_person=True,
            time=format_time(),
        )
        with self.changing() as db:
            fix_choice(db, label.feature, sign, self._put(db, label))
        return label

    def choose(self, feature: SupportsIndex, author: str | None, *, sign: int = BOTH) -> Label:
        """Record a person's choice of an author's newest label for a feature; returns the label that is now chosen.

        With `author` None such a choice is undone: the label added last is chosen, one of kind "none" only where there
        is no other. `sign` is 1 or -1 for the labels of one sign, 0 for those of the whole feature. ValueError where
        there is no such label.
        """
        with self.changing() as db:
            sql = f"SELECT id, author FROM labels WHERE feature = ? AND sign = ? ORDER BY {BEST_FIRST}"
            found = db.execute(sql, (read_feature(feature), sign)).fetchall()
            ids = [number for number, name in found if author in (None, name)]
            if not ids:
                names = list(dict.fromkeys(name for _, name in found))[:5]
                raise ValueError(
                    f"`author` must be one with a label of feature {feature} and sign {sign}, got {author!r}; "
                    f"there are {names}."
                )
            fix_choice(db, read_feature(feature), sign, None if author is None else max(ids))
        return self[feature, sign]

    def delete(
        self, feature: SupportsIndex | None = None, *, sign: int | None = None, author: str | None = None
    ) -> int:
        """Delete the labels that match all of the given feature, sign and author; returns their number.

        None does not restrict; ValueError with neither `feature` nor `author`.
        """
        if feature is None and author is None:
            raise ValueError("`delete` needs `feature` or `author`, got neither; say whose labels are to go.")
        given = {"feature": None if feature is None else read_feature(feature), "sign": sign, "author": author}
        where = {name: value for name, value in given.items() if value is not None}
        with self.changing() as db:
            sql = f"DELETE FROM labels WHERE {' AND '.join(f'{name} = ?' for name in where)}"
            return db.execute(sql, tuple(where.values())).rowcount

    # ---- files
    def save(self, path: str | Path, form: Format | None = None, *, model_id: str = "", source_id: str = "") -> int:
        """Write all labels to a file that `load` reads back; returns how many were written.

        Args:
            path: file to write; an ending .gz compresses it.
            form: "json", "csv", or "neuronpedia" for Neuronpedia's explanation records, one JSON object a line; None
                goes by the file's ending: .json, .csv or .jsonl. In CSV a text that a spreadsheet would run as a
                formula is prefixed with an apostrophe; for Neuronpedia labels of kind "none" (no good name) are left
                out.
            model_id: Neuronpedia's name of the model; empty for the name of the store's model.
            source_id: Neuronpedia's name of the SAE; empty for layer and set as `export_store` has them, such as
                6-saelab.

        The file names authors, evidence and provenance, so that it can be read back, without local paths and passwords.
        What `export_store` writes for Neuronpedia names no author, either.
        """
        path, form = Path(path), form or name_format(Path(path))
        entries = publish_entries(self._entries(order="id"), names=True)
        if form == "neuronpedia":
            entries = [entry for entry in entries if entry.label.kind != "none"]
        origin: Mapping[str, Any] = self._manifest.provenance if self._manifest else {}
        model_id = model_id or Path(str(origin.get("model", ""))).name
        source_id = source_id or name_source(str(origin.get("hook_point", "")))
        text = write_entries(entries, form, model_id, source_id).encode()
        write_atomic(path, gzip.compress(text, mtime=0) if path.suffix == ".gz" else text)
        return len(entries)

    def load(self, path: str | Path) -> int:
        """Add the labels of a file with their choices, all of them or none; returns how many were added.

        Reads what `save` wrote, Neuronpedia's records, and CSV with the columns feature and text. A person's choice in
        the database stays. FileNotFoundError, or ValueError for a file in none of these formats.
        """
        entries = read_entries(Path(path))
        with self.changing() as db:
            before = set(db.execute("SELECT feature, sign FROM labels WHERE fixed"))
            for entry in entries:
                label = replace(entry.label, time=entry.label.time or format_time())
                number = self._put(db, label)
                if (label.feature, label.sign) not in before and (entry.fixed or label.by_person):
                    fix_choice(db, label.feature, label.sign, number if entry.fixed else None)
        return len(entries)

    # ---- the Hub
    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        name: str | None = None,
        *,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
    ) -> "LabelStore":
        """The labels in a folder, or in a dataset repository on the Hub, of a feature store there or alone.

        Those from the Hub are copied, so that labels may be added; `FeatureStore.from_pretrained` has the same folder.

        Args:
            source: local folder, or dataset repository 'owner/name'.
            name: folder in it; None is its top.
            revision: branch, tag or commit on the Hub; None is the default branch.
            token: Hub access token; None uses the stored login.
            cache_dir: folder that downloads are kept in; None is Hugging Face's.
            local_files_only: whether to look in that folder alone and fetch nothing.

        Raises:
            FileNotFoundError: where there are no labels, or the Hub cannot be reached.
            ValueError: the file is damaged.
        """
        hub = HubAccess(revision=revision, token=token, cache_dir=cache_dir, local_files_only=local_files_only)
        folder = find_folder(source, name, FeatureManifest.files_of_kind, hub)
        if not (folder / FILE).is_file() and not (folder / LABELS).is_file():
            raise FileNotFoundError(f"Labels must be in {LABELS} or {FILE}, got neither in '{folder}'. Check the name.")
        alone = not (folder / MANIFEST).is_file()
        book = cls(folder / FILE, None if alone else FeatureManifest.load(folder))
        book._adopt()
        return book

    def push_to_hub(
        self,
        repo_id: str,
        *,
        path_in_repo: str | None = None,
        names: bool = False,
        revision: str | None = None,
        commit_message: str = "Upload labels",
        create_pr: bool = False,
        private: bool = False,
        token: str | bool | None = None,
    ) -> str:
        """Upload all labels with their choices, as labels.json.gz beside a store's files or alone, to a dataset
        repository, created if need be; returns the commit's address. Local paths are left out.

        Args:
            repo_id: 'owner/name' on the Hub.
            path_in_repo: folder in the repository; None is its top.
            names: whether to name the persons who gave labels; otherwise they are called a person.
            revision: branch, made if need be; None is the default branch.
            commit_message: message of the commit.
            create_pr: whether to open a pull request instead; its address is returned.
            private: whether a new repository is private.
            token: Hub access token; None uses the stored login.
        """
        to = Upload(repo_id, path_in_repo, revision, commit_message, create_pr, private, token)
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder, LABELS)
            text = write_entries(publish_entries(self._entries(order="id"), names), "json")
            write_atomic(file, gzip.compress(text.encode(), mtime=0))
            return push_files({LABELS: file}, to)

    def _adopt(self) -> None:
        """Take over the published labels that came with a store, where nothing was kept there yet."""
        published = self.path.with_name(LABELS)
        if not self.path.exists() and published.is_file():
            self.load(published)

    # ---- the file
    def _entries(self, feature: SupportsIndex | None = None, order: str = BY_FEATURE) -> list[LabelEntry]:
        where, values = ("", ()) if feature is None else ("WHERE feature = ?", (read_feature(feature),))
        rows = self.read(f"SELECT {', '.join(FIELDS)}, place FROM places {where} ORDER BY {order}", values)
        try:
            return [unpack_row(row) for row in rows]
        except (ValueError, TypeError) as error:
            raise ValueError(format_damage(self.path, str(error))) from None

    def _put(self, db: sqlite3.Connection, label: Label) -> int:
        if self._manifest is not None and label.feature >= self._manifest.d_sae:
            raise ValueError(f"`feature` must be in 0..{self._manifest.d_sae - 1}, got {label.feature}.")
        return put_label(db, label)

    def read(self, sql: str, values: Sequence[Any] = ()) -> list[tuple[Any, ...]]:
        """Rows of an SQL query; none where there is no file."""
        with self._lock, explained(self.path):
            db = self._open()
            return db.execute(sql, values).fetchall() if db is not None else []

    @contextmanager
    def changing(self) -> Iterator[sqlite3.Connection]:
        """Context manager in which all changes of this thread are one transaction: all of them are made or, after an
        exception, none. Yields the open database.
        """
        with self._lock, explained(self.path):
            if self._changing is not None:  # a part of a larger change
                yield self._changing
                return
            db = self._open(create=True)
            assert db is not None
            with transaction(db):
                if self._sae:
                    db.execute("INSERT OR IGNORE INTO about VALUES ('sae', ?)", (self._sae,))
                self._changing = db
                try:
                    yield db
                finally:
                    self._changing = None

    def version(self) -> tuple[int, ...]:
        """Numbers that differ after any change of the file, by whichever process; empty where there is no file."""
        with self._lock, explained(self.path):
            db = self._open()
            if db is None:
                return ()
            return (*_identify(self.path), db.execute("PRAGMA data_version").fetchone()[0], db.total_changes)

    def _open(self, create: bool = False) -> sqlite3.Connection | None:
        """The connection, opened on first use and again after the file was replaced or the process forked."""
        if self._connection is not None:
            if self._connection[0] == _identify(self.path):
                return self._connection[1]
            self.close()
        db = connect(self.path, self.timeout, create)
        if db is None:
            return None
        self._connection = _identify(self.path), db, weakref.finalize(self, db.close)
        about = db.execute("SELECT value FROM about WHERE name = 'sae'").fetchone()
        if about is not None and self._sae not in ("", about[0]):
            self.close()
            raise ValueError(
                f"{self.path} must hold labels of the SAE that was harvested, fingerprint {self._sae}, got those of "
                f"{about[0]}. Move it away, or harvest that SAE."
            )
        return db


def _identify(path: Path) -> tuple[int, ...]:
    try:
        found = path.stat()
    except FileNotFoundError:
        return ()
    return os.getpid(), found.st_dev, found.st_ino

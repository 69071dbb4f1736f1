"""Search of many short texts by word stems (SQLite FTS5), else by substrings: `TextIndex`, `rank_texts`."""

import re
import sqlite3
import threading
from collections.abc import Mapping, Sequence
from functools import cache

WORD = re.compile(r"\w+")


class TextIndex:
    """Texts by number, searched by the words of a query; held in memory.

    A text has one or more fields; a match in an earlier field ranks higher. A text matches if it has every word of the
    query, exactly, longer or in another form: "storm" finds "storms" and "stormy". If no text matches, substrings are
    searched: "storm" finds "snowstorm". In a build of SQLite without FTS5, or with `stems` off, only substrings are
    searched. No query is an error: it has words and no syntax. Several threads may use it at once.

    Args:
        n_fields: number of fields of each text.
        stems: whether words are searched by their stems.

    >>> index = TextIndex()
    >>> index.update({7: ("rainy days",), 8: ("the train",)})
    >>> index.search("rain"), index.search("trai")
    ([7], [8])
    """

    def __init__(self, n_fields: int = 1, stems: bool = True) -> None:
        self._fields = [f"f{i}" for i in range(n_fields)]
        self._texts: dict[int, tuple[str, ...]] = {}
        self._folded: dict[int, str] = {}
        self._lock = threading.Lock()
        self._db = sqlite3.connect(":memory:", isolation_level=None, check_same_thread=False)
        self._stems = stems and has_stems()
        if self._stems:
            made = f"fts5({', '.join(self._fields)}, content='', tokenize='porter unicode61')"
            self._db.execute(f"CREATE VIRTUAL TABLE found USING {made}")
            # An earlier field counts ten times as much as the next.
            weights = ", ".join(f"{10.0**-i}" for i in range(n_fields))
            self._db.execute("INSERT INTO found(found, rank) VALUES ('rank', ?)", (f"bm25({weights})",))

    def __len__(self) -> int:
        return len(self._texts)

    def update(self, texts: Mapping[int, Sequence[str]]) -> None:
        """Add texts, each a sequence of its fields, or replace those of the same number."""
        names = ", ".join(self._fields)
        marks = ", ".join("?" * (1 + len(self._fields)))
        with self._lock:
            cleaned = {number: tuple(map(_clean, fields)) for number, fields in texts.items()}
            changed = {number: fields for number, fields in cleaned.items() if self._texts.get(number) != fields}
            if self._stems and changed:
                old = [(number, *self._texts[number]) for number in changed if number in self._texts]
                new = [(number, *fields) for number, fields in changed.items()]
                self._db.execute("BEGIN")
                sql = f"INSERT INTO found(found, rowid, {names}) VALUES ('delete', {marks})"
                self._db.executemany(sql, old)
                self._db.executemany(f"INSERT INTO found(rowid, {names}) VALUES ({marks})", new)
                self._db.execute("COMMIT")
            self._texts.update(changed)
            self._folded.update({number: "\n".join(fields).casefold() for number, fields in changed.items()})

    def search(self, query: str, ranked: bool = True) -> list[int]:
        """Numbers of the texts that match a query, best match first; without `ranked`, in ascending order."""
        words = WORD.findall(query)
        with self._lock:
            found = self._search_stems(words, ranked) if self._stems and words else []
            return found or self._search_parts(words or query.split())

    def close(self) -> None:
        """Free the index."""
        with self._lock:
            self._db.close()

    def _search_stems(self, words: Sequence[str], ranked: bool) -> list[int]:
        # In quotes, a word of letters and digits is no FTS5 syntax; * also matches longer words.
        asked = " ".join(f'"{word}" *' for word in words)
        try:
            order = "rank, rowid" if ranked else "rowid"
            rows = self._db.execute(f"SELECT rowid FROM found WHERE found MATCH ? ORDER BY {order}", (asked,))
            return [number for (number,) in rows]
        except sqlite3.OperationalError:  # more words than SQLite takes
            return []

    def _search_parts(self, parts: Sequence[str]) -> list[int]:
        folded = [part.casefold() for part in parts]
        if not folded:
            return []
        return sorted(number for number, text in self._folded.items() if all(part in text for part in folded))


def _clean(text: str) -> str:
    """The text without halves of surrogate pairs, which SQLite does not take."""
    return text.encode(errors="replace").decode()


@cache
def has_stems() -> bool:
    """Whether this build of SQLite has FTS5."""
    db = sqlite3.connect(":memory:")
    try:
        db.execute("CREATE VIRTUAL TABLE found USING fts5(text, content='')")
        return True
    except sqlite3.OperationalError:
        return False
    finally:
        db.close()


def rank_texts(texts: Sequence[str], query: str, stems: bool = True) -> list[int]:
    """Indices of the texts that match a query, best match first; see `TextIndex` for what matches.

    The index is built in memory for each query, so label files are the same for every build of SQLite.

    >>> rank_texts(["rainy days", "the train", "sun"], "rain")
    [0]
    """
    index = TextIndex(stems=stems)
    try:
        index.update({i: (text,) for i, text in enumerate(texts)})
        return index.search(query)
    finally:
        index.close()

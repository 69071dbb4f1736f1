"""Text search over labels: by word stems (SQLite FTS5), ranked; otherwise by substrings."""

import re
import sqlite3
from collections.abc import Sequence


def rank_texts(texts: Sequence[str], query: str, stems: bool = True) -> list[int]:
    """Indices of the texts that match a query, best match first.

    A text matches if it has every word of the query, exactly, longer or in another form: "storm" finds "storms" and
    "stormy". If no text matches, substrings are searched: "storm" finds "snowstorm". The index is built in memory for
    each query, so label files are the same for every build of SQLite; in a build without FTS5, or with `stems` off,
    only substrings are searched. No query is an error: it has words and no syntax.

    >>> rank_texts(["rainy days", "the train", "sun"], "rain")
    [0]
    """
    words = re.findall(r"\w+", query)
    found = _rank_by_stems(texts, words) if words and stems else None
    if found:
        return found
    parts = [part.casefold() for part in (words or query.split())]
    return [i for i, text in enumerate(texts) if parts and all(part in text.casefold() for part in parts)]


def has_stems() -> bool:
    """Whether this build of SQLite has FTS5."""
    return _rank_by_stems(["a"], ["a"]) is not None


def _rank_by_stems(texts: Sequence[str], words: Sequence[str]) -> list[int] | None:
    """Indices of the texts that match by word stems; None where SQLite has no FTS5."""
    db = sqlite3.connect(":memory:")
    try:
        db.execute("CREATE VIRTUAL TABLE found USING fts5(text, content='', tokenize='porter unicode61')")
        db.executemany("INSERT INTO found(rowid, text) VALUES (?, ?)", enumerate(texts))
        # In quotes, a word of letters and digits is no FTS5 syntax; * also matches longer words.
        asked = " ".join(f'"{word}" *' for word in words)
        rows = db.execute("SELECT rowid FROM found WHERE found MATCH ? ORDER BY rank, rowid", (asked,))
        return [i for (i,) in rows]
    except sqlite3.OperationalError:
        return None
    finally:
        db.close()

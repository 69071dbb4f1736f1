"""Preserving labels when a feature store is overwritten: labels of another SAE are moved to a file of their own."""

import logging
import os
import re
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from saelab.stores.files import read_json

BOOK = "labels.sqlite"
PATIENCE = 5.0
"""seconds to wait for another process that is writing labels"""
logger = logging.getLogger(__name__)


def make_way(folder: Path, request: dict[str, Any]) -> None:
    """Move the labels of a store that is about to be overwritten to another file, unless the new store is of the same
    SAE.

    They go to labels-SAE.sqlite in the same folder, and return from there when that SAE is harvested again. The caller
    must hold the folder's lock.

    Raises:
        TimeoutError: where another process is writing the labels.
    """
    before = read_json(folder / "manifest.json").get("request") or {}
    if before == request or (before.get("sae") is not None and before.get("sae") == request.get("sae")):
        return
    book = folder / BOOK
    if book.is_file():
        aside = _name_free(folder, before.get("sae"))
        _rename(book, aside)
        logger.warning(
            "%s holds labels of the SAE that was harvested here before; they are no labels of this one and are kept in "
            "%s. Write them to a file with `saelab.LabelBook(%r).save('labels.json')`.",
            folder,
            aside,
            str(aside),
        )
    kept = folder / _name(request.get("sae"))
    if kept.is_file():
        _rename(kept, book)
        logger.warning("%s has its labels of this SAE back, from %s.", folder, kept)


def _name(sae: object, n: int = 0) -> str:
    fingerprint = re.sub(r"[^0-9A-Za-z]", "", str(sae or "unknown"))[:16]  # no path, whatever the file holds
    return f"labels-{fingerprint}{f'-{n}' if n else ''}.sqlite"


def _name_free(folder: Path, sae: object) -> Path:
    n = 0
    while (folder / _name(sae, n)).exists():
        n += 1
    return folder / _name(sae, n)


def _rename(path: Path, new: Path) -> None:
    with _alone_with(path):
        os.replace(path, new)


@contextmanager
def _alone_with(path: Path) -> Iterator[None]:
    """Context manager that holds a database's exclusive lock, after rolling back what a killed process left
    half-written.
    """
    with closing(sqlite3.connect(path, timeout=PATIENCE, isolation_level=None)) as db:
        try:
            db.execute("BEGIN EXCLUSIVE")
        except sqlite3.OperationalError as error:
            if "locked" in str(error):
                raise TimeoutError(
                    f"{path} is being written by another process. Try again when that has ended."
                ) from None
        except sqlite3.DatabaseError:  # damaged: moved as it is
            pass
        yield

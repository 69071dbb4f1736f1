"""Offline language model client: prompts are exported to a file and responses read from one."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from saelab.labelling.answers import make_key
from saelab.labelling.clients import Answer, Messages, Waiting
from saelab.stores.files import write_atomic
from saelab.stores.results import Result


@dataclass(frozen=True, kw_only=True)
class ExchangeReport(Result):
    """Numbers of exported prompts with, without and with unmatched responses."""

    n_prompts: int
    """prompts of the run"""
    n_answered: int
    missing: tuple[str, ...]
    """ids of prompts without a response, which `Exchange.export` writes"""
    unknown: tuple[str, ...]
    """ids of responses that match no prompt: of another store, other settings, or edited"""
    duplicated: tuple[str, ...]
    """ids that occur twice with the same response; a file with two different ones is refused"""

    def __str__(self) -> str:
        lines = [f"{self.n_answered:,} of {self.n_prompts:,} prompts answered"]
        for name in ("missing", "unknown", "duplicated"):
            if ids := getattr(self, name):
                lines.append(f"{name}: {len(ids):,} ({', '.join(ids[:5])}{', ...' if len(ids) > 5 else ''})")
        return "\n".join(lines)


class Exchange:
    """Client that reads responses from a file and collects the prompts that have none; it needs no API key.

    The file has lines `{"id": ..., "answer": ...}` with the ids of `export`. `name` is the author of the labels; it
    does not change the ids. ValueError for a line in another form, and for an id with two different responses.
    """

    settings: Mapping[str, Any] = {"exchange": 1}

    def __init__(self, answers: str | Path | None = None, *, name: str = "offline") -> None:
        self.name = name
        self._answers: dict[str, str] = {}
        self._duplicated: list[str] = []
        self._asked: dict[str, Messages] = {}
        self._known: set[str] = set()
        if answers is not None:
            self._read(Path(answers))

    def complete(self, messages: Messages) -> Answer:
        """The response in the file; Waiting where there is none yet."""
        key = make_key(self.settings, messages)
        self._asked[key] = messages
        if key not in self._answers:
            raise Waiting("waits for an answer")
        return Answer(text=self._answers[key])

    def note(self, messages: Messages) -> None:
        """Record a prompt whose response an earlier run already cached."""
        key = make_key(self.settings, messages)
        self._asked[key] = messages
        self._known.add(key)

    def export(self, path: str | Path) -> int:
        """Write the prompts without a response as lines `{"id": ..., "messages": [...]}`; returns how many."""
        waiting = self._missing()
        lines = [
            json.dumps({"id": key, "messages": [dict(message) for message in self._asked[key]]}) for key in waiting
        ]
        write_atomic(path, "".join(line + "\n" for line in lines).encode())
        return len(waiting)

    def _missing(self) -> list[str]:
        return [key for key in self._asked if key not in self._answers and key not in self._known]

    def report(self) -> ExchangeReport:
        """Missing, unknown and duplicated responses, for the prompts seen so far."""
        missing = self._missing()
        return ExchangeReport(
            n_prompts=len(self._asked),
            n_answered=len(self._asked) - len(missing),
            missing=tuple(missing),
            unknown=tuple(key for key in self._answers if key not in self._asked),
            duplicated=tuple(self._duplicated),
        )

    def _read(self, path: Path) -> None:
        if not path.is_file():
            raise FileNotFoundError(f"`answers` must be an existing JSONL file, got {path}. Check its name.")
        for number, line in enumerate(path.read_bytes().splitlines(), 1):
            if line.strip():
                key, text = _read_line(path, number, line)
                if self._answers.get(key, text) != text:
                    raise ValueError(f"{path} must have one answer for an id, got two for {key}. Remove one of them.")
                if key in self._answers:
                    self._duplicated.append(key)
                self._answers[key] = text


def _read_line(path: Path, number: int, line: bytes) -> tuple[str, str]:
    try:
        entry = json.loads(line)
        key, text = entry["id"], entry["answer"]
        if not isinstance(key, str) or not isinstance(text, str):
            raise TypeError("id and answer are no texts")
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f'{path}:{number} must be a line {{"id": "...", "answer": "..."}}, got another ({error!r}). Was it cut off?'
        ) from None
    return key, text

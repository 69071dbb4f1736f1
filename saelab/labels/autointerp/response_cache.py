"""Cache of language model responses in an append-only JSONL file, so that a resumed run repeats no request.

Also the offline client: prompts are exported to a file and responses read from one.
"""

import hashlib
import json
import logging
import os
import threading
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from glob import escape
from pathlib import Path
from typing import Any

from saelab.labels.autointerp.clients import Answer, Waiting
from saelab.lm.conversations import Messages
from saelab.stores.files import write_atomic
from saelab.stores.jobs import explained
from saelab.stores.results import Result
from saelab.training.ranks import RankGrid

logger = logging.getLogger(__name__)


def make_key(settings: Mapping[str, Any], messages: Messages) -> str:
    """The cache key of a request: equal for equal messages and settings, on any machine.

    >>> make_key({"model": "m"}, [{"role": "user", "content": "Hi"}])[:8]
    'b058d498'
    """
    text = json.dumps([dict(settings), [dict(message) for message in messages]], sort_keys=True, ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


class AnswerLog:
    """Append-only response cache: one JSON line per response, with key, settings, messages, answer, tokens and times.

    Each line is on the disk before the next prompt is sent. A line that a killed process left incomplete is ignored,
    and its request is sent again. Of several processes each appends to a part of its own, as a network disk lets two
    of them write over one another's lines; what is read is the file with all parts that lie beside it.

    Args:
        path: the file.
        part: name of this process's part; empty for a process alone, which appends to the file.
    """

    def __init__(self, path: str | Path, part: str = "") -> None:
        self.path = Path(path)
        self._own = self.path.with_name(f"{self.path.stem}.part-{part}{self.path.suffix}") if part else self.path
        self._lock = threading.Lock()
        self._known: dict[str, tuple[Answer, float]] = {}
        self.n_placeless: Counter[str] = Counter()
        """by name of the model, responses in the file that do not say which endpoint gave them"""
        for file in (self.path, *self._parts()):
            if file.is_file():
                self._read(file)

    def __len__(self) -> int:
        return len(self._known)

    def find(self, key: str) -> Answer | None:
        """The cached response of a key; None where there is none."""
        known = self._known.get(key)
        return known[0] if known else None

    @property
    def seconds(self) -> float | None:
        """Mean response time in seconds; None where none was measured."""
        times = [seconds for _, seconds in self._known.values() if seconds > 0]
        return sum(times) / len(times) if times else None

    def add(self, key: str, settings: Mapping[str, Any], messages: Messages, answer: Answer, seconds: float) -> None:
        """Append a response to the cache.

        Args:
            key: cache key, from `make_key`.
            settings: the client's settings, stored with the response.
            messages: the prompt.
            answer: the response and its token counts.
            seconds: response time.

        Raises:
            OSError: the file cannot be written.
        """
        entry = {
            "key": key,
            "settings": dict(settings),
            "messages": [dict(message) for message in messages],
            "answer": answer.text,
            "tokens_in": answer.tokens_in,
            "tokens_out": answer.tokens_out,
            "seconds": round(seconds, 3),
            "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        } | ({"problem": answer.problem} if answer.problem else {})
        with self._lock:
            self._write(json.dumps(entry))
            self._known[key] = (answer, seconds)

    def join(self) -> None:
        """Append all parts to the file and delete them; for one process, when the others write no more."""
        for part in self._parts():
            data = part.read_bytes()
            if whole := data[: data.rfind(b"\n") + 1]:
                _append(self.path, whole)
            part.unlink()

    def _parts(self) -> list[Path]:
        return sorted(self.path.parent.glob(f"{escape(self.path.stem)}.part-*{escape(self.path.suffix)}"))

    def _write(self, line: str) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        _append(self._own, f"{line}\n".encode())

    def _read(self, path: Path) -> None:
        n_bad = 0
        for line in path.read_bytes().splitlines():
            try:
                entry = json.loads(line)
                counts = {name: entry[name] for name in ("tokens_in", "tokens_out")}
                answer = Answer(text=entry["answer"], problem=entry.get("problem", ""), **counts)
                self._known[entry["key"]] = (answer, float(entry["seconds"]))
                if not {"endpoint", "local"} & (settings := entry["settings"]).keys():
                    self.n_placeless[str(settings.get("model"))] += 1
            except (ValueError, KeyError, TypeError, AttributeError):
                n_bad += bool(line.strip())
        if n_bad:
            logger.info("%s has %d lines that cannot be read; what they answered is asked again", path, n_bad)


def _append(path: Path, data: bytes) -> None:
    """Add whole lines to a file, by one write at its end, as processes of one machine may share it."""
    with explained(path.parent), open(path, "ab+") as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            data = (b"" if file.read(1) == b"\n" else b"\n") + data  # after a line that a killed process left
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


@dataclass(frozen=True, kw_only=True)
class ExchangeReport(Result):
    """Numbers of exported prompts with, without and with unmatched responses."""

    n_prompts: int
    """prompts of the run"""
    n_answered: int
    missing: tuple[str, ...]
    """ids of prompts without a response, in increasing order; `OfflineClient.export` writes them"""
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


class OfflineClient:
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

    def join(self, ranks: RankGrid) -> None:
        """Add the prompts that other processes have asked of clients of theirs."""
        asked = {key: [dict(message) for message in messages] for key, messages in self._asked.items()}
        for one in ranks.gather_json({"asked": asked, "known": sorted(self._known)}):
            self._asked |= one["asked"]
            self._known |= set(one["known"])

    def _missing(self) -> list[str]:
        return sorted(key for key in self._asked if key not in self._answers and key not in self._known)

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

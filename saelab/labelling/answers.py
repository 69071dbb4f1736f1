"""Cache of language model responses in an append-only JSONL file, so that a resumed run repeats no request."""

import hashlib
import json
import logging
import os
import threading
from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from saelab.labelling.clients import Answer, Messages
from saelab.stores.disk import explained

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
    and its request is sent again.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._lock = threading.Lock()
        self._known: dict[str, tuple[Answer, float]] = {}
        self._is_cut = False
        if self.path.is_file():
            self._read()

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
        }
        with self._lock:
            self._write(json.dumps(entry))
            self._known[key] = (answer, seconds)

    def _write(self, line: str) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        data = ("\n" if self._is_cut else "") + line + "\n"
        with (
            explained(self.path.parent),
            open(self.path, "ab") as file,
        ):  # one write at the end: several processes may share the file
            file.write(data.encode())
            file.flush()
            os.fsync(file.fileno())
        self._is_cut = False

    def _read(self) -> None:
        data = self.path.read_bytes()
        self._is_cut = bool(data) and not data.endswith(b"\n")
        n_bad = 0
        for line in data.splitlines():
            try:
                entry = json.loads(line)
                answer = Answer(text=entry["answer"], tokens_in=entry["tokens_in"], tokens_out=entry["tokens_out"])
                self._known[entry["key"]] = (answer, float(entry["seconds"]))
            except (ValueError, KeyError, TypeError):
                n_bad += bool(line.strip())
        if n_bad:
            logger.info("%s has %d lines that cannot be read; what they answered is asked again", self.path, n_bad)

"""Loggers of a training run's history: JSONL and CSV files in the run's folder, TensorBoard, Weights & Biases.

A sink is any callable that takes one entry of the history, a flat dictionary of numbers. Entries have no clock times,
so that a resumed run writes the same bytes as an uninterrupted one.
"""

import csv
import io
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from saelab.stores.disk import explained
from saelab.stores.files import write_atomic

Entry = dict[str, Any]
Sink = Callable[[Entry], None]


class FileSink:
    """A sink that writes the history to `history.jsonl` and `history.csv` in a folder.

    Args:
        folder: the folder.
        history: entries so far, such as those of a checkpoint; the files are written again with these.
    """

    def __init__(self, folder: Path, history: list[Entry]) -> None:
        self.jsonl, self.csv = folder / "history.jsonl", folder / "history.csv"
        write_atomic(self.jsonl, "".join(_as_json(entry) for entry in history).encode())
        write_atomic(self.csv, "".join([_header(history), *(_as_csv(entry) for entry in history)]).encode())

    def __call__(self, entry: Entry) -> None:
        with explained(self.jsonl.parent):
            with self.jsonl.open("a", encoding="utf-8") as file:
                file.write(_as_json(entry))
            text = _as_csv(entry) if self.csv.stat().st_size else _header([entry]) + _as_csv(entry)
            with self.csv.open("a", encoding="utf-8", newline="") as file:
                file.write(text)


def _as_json(entry: Entry) -> str:
    return json.dumps(_finite(entry)) + "\n"


def _header(history: list[Entry]) -> str:
    return _row(list(history[0])) if history else ""


def _as_csv(entry: Entry) -> str:
    return _row(list(_finite(entry).values()))


def _finite(entry: Entry) -> Entry:
    """The entry with None for NaN and infinities, which JSON lacks."""
    return {key: None if isinstance(v, float) and not math.isfinite(v) else v for key, v in entry.items()}


def _row(values: Sequence[object]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerow(values)
    return text.getvalue()


def tensorboard_sink(folder: str | Path) -> Sink:
    """A sink that writes TensorBoard scalars, tokens as the step; needs the extra `[tensorboard]` (ImportError)."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ImportError("TensorBoard must be installed for this sink: pip install 'saelab[tensorboard]'.") from error
    writer = SummaryWriter(str(folder))

    def write(entry: Entry) -> None:
        for key, value in entry.items():
            if isinstance(value, int | float) and key != "n_tokens":
                writer.add_scalar(key, value, entry["n_tokens"])
        writer.flush()

    return write


def wandb_sink(run: Any) -> Sink:
    """A sink that logs to a Weights & Biases run (`wandb.init(...)`, extra `[wandb]`), with tokens as the step."""
    return lambda entry: run.log(entry, step=entry["n_tokens"])

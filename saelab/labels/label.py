"""Labels of a feature, or of one of its signs, with author, scores and provenance; and their file formats.

The formats are JSON, CSV and Neuronpedia's explanation records. All three preserve labels and choices, except that NaN
and infinities are written as null and read as NaN. As display text labels are plain, not escaped.
"""

import csv
import gzip
import hashlib
import io
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime, timezone
from math import isnan
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import numpy as np

from saelab.functional.indices import read_feature
from saelab.stores.feature_store import FeatureStore
from saelab.stores.files import to_json
from saelab.stores.sharing import shareable, shareable_parts

LabelKind = Literal["input", "output", "position", "two-sided", "polysemantic", "none", "free"]
"""What a label describes.

input: the tokens that the feature fires on; output: the tokens that it promotes; position: where it fires; two-sided:
an axis; polysemantic: several things; none: no good name was found; free: kind not specified.
"""
BOTH = 0
MARKS = {1: "+ ", 0: "", -1: "\u2212 "}
ENDS = ("low", "high", "chance")
MOST_SCORES = 4
Format = Literal["json", "csv", "neuronpedia"]
FORMATS: tuple[Format, ...] = get_args(Format)
SCHEMA_VERSION = 1
PACKED = ("scores", "evidence", "provenance")
COLUMNS = ("feature", "sign", "text", "kind", "author", "by_person", "chosen", "fixed", "time", *PACKED)
FORMULA = re.compile("^'*[=+\\-@\t\r\n\uff1d\uff0b\uff0d\uff20]")
"""cells that a spreadsheet would run as a formula, and cells that look like an escaped one"""
LOCAL = re.compile(r"[/~]|\w:\\|\\\\")
"""beginnings of a name that is a path"""
LONGEST_CELL = 2**31 - 1
FIRST_USER = "clkht01d40000jv08hvalcvly"
"""id of the user that the seed of every Neuronpedia installation makes"""
SOURCE_SET = "saelab"
ME = "me"
"""author of a person's label where no name is given: that of the user is not looked up, as labels are shared"""


@dataclass(frozen=True, kw_only=True)
class Label:
    """One label of one feature.

    >>> Label(feature=3, text="words for weather", author="me").sign
    0
    """

    feature: int
    sign: int = BOTH
    """1 or -1 for the codes of that sign; 0 for the whole feature"""
    text: str
    kind: LabelKind = "free"
    author: str
    """name of a rule set, a model, or a person"""
    by_person: bool = False
    """whether a person gave it; other authors never replace a person's choice"""
    scores: Mapping[str, float] = field(default_factory=dict)
    """scores on held-out documents by name, with the chance level as name + "_chance" where there is one"""
    evidence: Mapping[str, Any] = field(default_factory=dict)
    """data that the label is based on, ready for JSON"""
    provenance: Mapping[str, Any] = field(default_factory=dict)
    """store, split and settings that the label was made with"""
    time: str = ""
    """ISO 8601, UTC; empty until it is stored"""

    def __post_init__(self) -> None:
        for name in ("feature", "sign"):
            object.__setattr__(self, name, read_feature(getattr(self, name), name))
        if self.sign not in (-1, BOTH, 1):
            raise ValueError(f"`sign` must be 1, -1, or 0 for the whole feature, got {self.sign}.")
        if self.feature < 0:
            raise ValueError(f"`feature` must be 0 or more, got {self.feature}.")
        if self.kind not in get_args(LabelKind):
            raise ValueError(f"`kind` must be one of {list(get_args(LabelKind))}, got {self.kind!r}.")
        if not self.author:
            raise ValueError("`author` must say who gave the label, got an empty text.")

    def to_dict(self) -> dict[str, Any]:
        """All fields, ready for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "Label":
        """The label of `to_dict`'s output; ValueError for an unknown or missing field."""
        try:
            return cls(**data)
        except TypeError as error:
            raise ValueError(f"A label must have the fields of `Label`, got others ({error}).") from None


class ShownLabel(NamedTuple):
    """What a list of features shows of a chosen label."""

    feature: int
    sign: int
    text: str
    kind: str
    author: str
    by_person: bool
    scores: Mapping[str, float]


def join_texts(labels: Sequence[Label | ShownLabel]) -> str:
    """The labels of one feature as one line, each side marked; empty where there is no good name.

    A label of the axis between both sides is left out where both sides have one of their own.

    >>> join_texts([Label(feature=0, sign=sign, text=text, author="a") for sign, text in ((1, "hot"), (-1, "cold"))])
    '+ hot; \u2212 cold'
    """
    names = [label for label in labels if label.kind != "none"]
    if {label.sign for label in names} == {-1, 0, 1}:
        names = [label for label in names if label.kind != "two-sided"]
    if len(names) == 1 and names[0].sign >= 0:
        return names[0].text
    return "; ".join(MARKS[label.sign] + label.text for label in names)


def describe_origin(label: Label) -> str:
    """The author of a label and its scores on held-out text, as one line.

    >>> describe_origin(Label(feature=0, text="hot", author="me", by_person=True))
    'by me, a person'
    """
    scores = describe_scores(label)
    person = ", a person" if label.by_person else ""
    return f"by {shareable(label.author)}{person}" + (f": {scores}" if scores else "")


def main_score(label: Label | ShownLabel) -> float | None:
    """The first score of a label, by which labels are sorted; None without one.

    >>> main_score(Label(feature=0, text="hot", author="me", scores={"f1": 0.91, "f1_chance": 0.5}))
    0.91
    """
    return next((float(value) for name, value in label.scores.items() if _is_main(name, value, label)), None)


def _is_main(name: str, value: float, label: Label | ShownLabel) -> bool:
    """Whether a score is a score of its own, neither unknown nor the interval or chance level of another."""
    base, _, end = name.rpartition("_")
    return not isnan(value) and not (end in ENDS and base in label.scores)


def describe_scores(label: Label) -> str:
    """The first scores of a label as text, each with its interval and chance level where it has them.

    For a rule on the strongest firings alone, the share of firings that it covers is added.

    >>> describe_scores(Label(feature=0, text="hot", author="me", scores={"f1": 0.91, "f1_chance": 0.5}))
    'f1 0.91 (chance 0.5)'
    """
    said = []
    for name, value in label.scores.items():
        if not _is_main(name, value, label):
            continue
        low, high, chance = (label.scores.get(f"{name}_{end}") for end in ENDS)
        extras = [] if low is None or high is None else [f"{low:.2g} to {high:.2g}"]
        extras += [] if chance is None else [f"chance {chance:.2g}"]
        said.append(f"{name} {value:.2g}" + (f" ({', '.join(extras)})" if extras else ""))
    return ", ".join(said[:MOST_SCORES]) + _describe_share(label)


def _describe_share(label: Label) -> str:
    share, threshold = label.scores.get("share"), label.evidence.get("threshold")
    if share is None or isnan(share) or share >= 1 or not isinstance(threshold, int | float):
        return ""
    return f"; of codes with |z| from {threshold:.3g} on, {share:.2g} of the firings"


def require_same_tokens(store: FeatureStore, untrained: FeatureStore) -> None:
    """Check that an untrained dictionary's store is of the trained one's tokens; ValueError where it is not."""
    if not np.array_equal(untrained.token_ids, store.token_ids):
        raise ValueError(
            f"`untrained` must be a store of the same {len(store)} tokens, got {len(untrained)} tokens, or others; "
            "make it with `harvest_untrained`."
        )


def average_scores(labels: Sequence[Label], n_sides: int) -> dict[str, float]:
    """The share of sides with a label as "named", and the mean of each score that has a chance level.

    >>> made = [Label(feature=i, text="x", author="me", scores={"a": i / 4, "a_chance": 0.5}) for i in (2, 3)]
    >>> average_scores(made, 4)
    {'named': 0.5, 'a': 0.625}
    """
    found = {"named": sum(bool(label.text) for label in labels) / max(1, n_sides)}
    names = dict.fromkeys(name for label in labels for name in label.scores if f"{name}_chance" in label.scores)
    means = {name: np.mean([label.scores[name] for label in labels if name in label.scores]) for name in names}
    return found | {name: float(value) for name, value in means.items()}


def format_floor(trained: dict[str, float], untrained: dict[str, float] | None, chance: dict[str, float]) -> str:
    """One line with the mean scores of trained and untrained dictionaries and the chance levels.

    >>> format_floor({"named": 1.0, "a": 0.75}, {"named": 0.5, "a": 0.625}, {"a": 0.5})
    'sides named 100% (untrained 50%), mean a 0.75 (untrained 0.62, chance 0.5)'
    """

    def extras(name: str) -> str:
        return "none scored" if untrained is None or name not in untrained else f"untrained {untrained[name]:.2f}"

    parts = [f"sides named {trained['named']:.0%}" + (f" (untrained {untrained['named']:.0%})" if untrained else "")]
    parts += [f"mean {name} {trained[name]:.2f} ({extras(name)}, chance {chance[name]:g})" for name in chance]
    note = "" if untrained is not None else "; no untrained dictionary was labeled for comparison"
    return ", ".join(parts).replace("none scored, ", "") + note


@dataclass(frozen=True)
class LabelEntry:
    """A label with its state in the database."""

    label: Label
    chosen: bool = False
    """whether it is the label to show"""
    fixed: bool = False
    """whether a person chose it"""


def name_format(path: Path) -> Format:
    """The file format of a path's ending; ValueError for an ending of none."""
    forms: dict[str, Format] = {".json": "json", ".csv": "csv", ".jsonl": "neuronpedia"}
    ending = next((suffix for suffix in reversed(path.suffixes) if suffix != ".gz"), "")
    if ending not in forms:
        raise ValueError(f"`path` must end in {', '.join(forms)} (or also .gz), got {path}. Name the format otherwise.")
    return forms[ending]


def write_entries(entries: Sequence[LabelEntry], form: Format, model_id: str = "", source_id: str = "") -> str:
    """The text of a label file.

    Args:
        entries: labels to write.
        form: "json", "csv" or "neuronpedia".
        model_id: Neuronpedia's name of the model; used for "neuronpedia" only.
        source_id: Neuronpedia's name of the SAE; used for "neuronpedia" only.
    """
    if form == "csv":
        return _write_csv(entries)
    if form == "neuronpedia":
        records = (explain(entry, model_id, source_id) for entry in entries)
        return "".join(json.dumps(record, allow_nan=False) + "\n" for record in records)
    listed = [entry.label.to_dict() | {"chosen": entry.chosen, "fixed": entry.fixed} for entry in entries]
    return to_json({"kind": "labels", "schema_version": SCHEMA_VERSION, "labels": listed}) + "\n"


def publish_entries(entries: Sequence[LabelEntry], names: bool = False) -> list[LabelEntry]:
    """Labels as others get them: without local paths and, unless `names` is set, without the names of persons.

    Evidence, which quotes the text, stays. One person is called a person, several person 1, person 2 and so on.

    >>> mine = LabelEntry(Label(feature=0, text="hot", author="ada", by_person=True, provenance={"at": "/home/ada/s"}))
    >>> [shown] = publish_entries([mine])
    >>> shown.label.author, dict(shown.label.provenance)
    ('a person', {'at': 's'})
    """
    persons = list(dict.fromkeys(entry.label.author for entry in entries if entry.label.by_person))
    called = {name: "a person" if len(persons) == 1 else f"person {i}" for i, name in enumerate(persons, 1)}

    def strip(label: Label) -> Label:
        author = label.author if names or not label.by_person else called[label.author]
        if LOCAL.match(author):
            author = shareable(author) or author
        return replace(label, author=author, provenance=shareable_parts(label.provenance))

    return [replace(entry, label=strip(entry.label)) for entry in entries]


def read_entries(path: Path) -> list[LabelEntry]:
    """The labels of a file: one that `write_entries` wrote, a table of features and texts, or Neuronpedia's records.

    The format is recognized from the content, which may be compressed by gzip. FileNotFoundError where there is no
    file, ValueError with the file and its first invalid record otherwise.
    """
    if not path.is_file():
        raise FileNotFoundError(f"`path` must be an existing file of labels, got {path}. Check its name.")
    raw = path.read_bytes()
    try:
        text = (gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw).decode("utf-8-sig")
        rows = _read_json(text) if text.lstrip()[:1] in ("{", "[") else _read_csv(text)
    except (ValueError, RecursionError, OSError, EOFError, csv.Error) as error:
        raise ValueError(f"{path} must hold labels as JSON, JSON lines or CSV, got something else ({error}).") from None
    entries = []
    for number, row in enumerate(rows, 1):
        try:
            entries.append(_to_entry(row, path.name))
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"{path} must hold labels; its record {number} is none ({error}).") from None
    return entries


def _to_entry(row: Mapping[str, Any], file: str) -> LabelEntry:
    fields = _from_record(row) if "description" in row else dict(row)
    for name in ("feature", "text"):
        if name not in fields:
            raise ValueError(f"it must have a `{name}`")
    chosen, fixed = (_truth(fields.pop(name, False)) for name in ("chosen", "fixed"))
    fields["feature"], fields["sign"] = int(fields["feature"]), int(fields.get("sign", 0))
    fields["by_person"] = _truth(fields.get("by_person", False))
    fields["author"] = fields.get("author") or file
    scores = dict(fields.get("scores") or {})
    fields["scores"] = {name: math.nan if value is None else float(value) for name, value in scores.items()}
    if wrong := [name for name in ("text", "author", "time") if not isinstance(fields.get(name, ""), str)]:
        raise ValueError(f"its `{wrong[0]}` must be a text")
    if wrong := [name for name in PACKED if not isinstance(fields.get(name, {}), dict)]:
        raise ValueError(f"its `{wrong[0]}` must be an object")
    return LabelEntry(Label.from_dict(fields), chosen, fixed)


def _truth(value: Any) -> bool:
    said = str(value).lower()  # spreadsheets write TRUE
    if said in ("true", "false", ""):
        return said == "true"
    raise ValueError(f"it must say true or false, not {value!r}")


def _read_json(text: str) -> list[Any]:
    try:
        data = json.loads(text)
    except ValueError:
        data = [json.loads(line) for line in text.split("\n") if line.strip()]
    if isinstance(data, list):
        return data
    if data.get("kind") == "labels":
        if (version := data.get("schema_version")) != SCHEMA_VERSION:
            raise ValueError(f"its schema_version must be {SCHEMA_VERSION}, not {version}")
        return list(data["labels"]) if isinstance(data.get("labels"), list) else []
    return list(data["explanations"]) if isinstance(data.get("explanations"), list) else [data]


# ---- CSV: a cell that a spreadsheet would take for a formula gets an apostrophe, which reading takes away again
def _write_csv(entries: Sequence[LabelEntry]) -> str:
    file = io.StringIO(newline="")
    writer = csv.writer(file, quoting=csv.QUOTE_ALL)  # so that a semicolon begins no cell either
    writer.writerow(COLUMNS)
    for entry in entries:
        row = entry.label.to_dict() | {"chosen": entry.chosen, "fixed": entry.fixed}
        writer.writerow(_to_cell(row[name]) for name in COLUMNS)
    return file.getvalue()


def _to_cell(value: Any) -> str:
    if isinstance(value, str):
        return f"'{value}" if FORMULA.match(value) else value
    return json.dumps(json.loads(to_json(value))) if isinstance(value, Mapping) else str(value).lower()


def _read_csv(text: str) -> list[dict[str, Any]]:
    limit = csv.field_size_limit(LONGEST_CELL)
    try:
        rows = list(csv.DictReader(io.StringIO(text, newline=""), strict=True))
    finally:
        csv.field_size_limit(limit)
    return [_from_cells(row) for row in rows]


def _from_cells(row: Mapping[str | None, Any]) -> dict[str, Any]:
    if None in row or None in row.values():
        raise ValueError("it must have as many cells as the header")
    cells = {str(name): value for name, value in row.items() if value or name in ("text", "feature")}
    plain = {
        name: value[1:] if value[0] == "'" and FORMULA.match(value) else value for name, value in cells.items() if value
    }
    return cells | plain | {name: json.loads(cells[name]) for name in PACKED if name in cells}


# ---- Neuronpedia: what it has no column for stands as JSON in its notes
def name_source(hook_point: str) -> str:
    """Neuronpedia's name of an SAE of saelab's: the layer, 0 outside the blocks, and the set.

    >>> name_source("blocks.6.hook_resid_post")
    '6-saelab'
    """
    layer = re.match(r"blocks\.(\d+)\.", hook_point)
    return f"{int(layer[1]) if layer else 0}-{SOURCE_SET}"


def explain(
    entry: LabelEntry,
    model_id: str,
    source_id: str,
    *,
    public: bool = False,
    author_id: str = FIRST_USER,
    explanation_model: str | None = None,
    explanation_type: str | None = None,
) -> dict[str, Any]:
    """A label as a row of Neuronpedia's table of explanations, with no field that the table lacks.

    Args:
        entry: the label.
        model_id: Neuronpedia's name of the model.
        source_id: Neuronpedia's name of the SAE.
        public: whether to leave out evidence, provenance and the name of a person.
        author_id: id of a Neuronpedia user.
        explanation_model: a name of its table of explanation models; None for none.
        explanation_type: a name of its table of explanation types; None for none.
    """
    label = entry.label
    name = json.dumps([model_id, source_id, label.feature, label.sign, label.author, label.text, label.time])
    return {
        "id": "c" + hashlib.sha256(name.encode()).hexdigest()[:24],
        "modelId": model_id,
        "layer": source_id,
        "index": str(label.feature),
        "description": MARKS[label.sign] + label.text,
        "authorId": author_id,
        "typeName": explanation_type,
        "explanationModelName": explanation_model,
        "notes": json.dumps({"saelab": json.loads(to_json(_to_notes(entry, public)))}),
        "createdAt": _format_valid(label.time),
    }


def _to_notes(entry: LabelEntry, public: bool) -> dict[str, Any]:
    label = entry.label.to_dict()
    names = ("sign", "kind", "by_person", "scores") if public else (*label.keys() - {"feature", "text", "time"},)
    notes = {name: label[name] for name in sorted(names)}
    if public:
        return notes | {"author": "a person" if entry.label.by_person else shareable(entry.label.author)}
    return notes | {"time": entry.label.time, "chosen": entry.chosen, "fixed": entry.fixed}


def _format_valid(time: str) -> str:
    """The time where it is one, else now: the table needs one."""
    try:
        datetime.fromisoformat(time)
    except ValueError:
        return format_time()
    return time


def _from_record(record: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a label from a Neuronpedia record; another tool's model and type become its author."""
    fields = {"feature": record["index"], "text": record["description"], "time": record.get("createdAt") or ""}
    scores = record.get("scores") or []
    fields["scores"] = {str(score["explanationScoreTypeName"]): score["value"] for score in scores}
    try:
        own = dict(json.loads(record["notes"])["saelab"])
    except (KeyError, TypeError, ValueError):
        own = {}
    if own:
        mark = next((mark for sign, mark in MARKS.items() if sign == own.get("sign")), "")
        return fields | {"text": fields["text"].removeprefix(mark)} | own
    origin = {name: record[name] for name in ("id", "modelId", "layer", "typeName", "notes") if record.get(name)}
    made_by = [str(record[name]) for name in ("explanationModelName", "typeName") if record.get(name)]
    return fields | {"author": ", ".join(made_by) or "neuronpedia", "provenance": {"neuronpedia": origin}}


def format_time() -> str:
    """The current time in UTC, ISO 8601."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def pack_label(label: Label) -> tuple[Any, ...]:
    """The label as values of a database row, PACKED fields as JSON; ValueError for what cannot be stored."""
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

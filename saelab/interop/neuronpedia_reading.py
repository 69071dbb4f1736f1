"""`read_neuronpedia`: features, examples and explanations of a Neuronpedia export, one's own or published."""

import gzip
import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from jaxtyping import Float

from saelab.functional.indices import FeatureIds, read_feature, read_features
from saelab.labels.label import Label, read_entries
from saelab.labels.label_store import LabelStore
from saelab.stores.feature_store import FeatureStore

Read = TypeVar("Read")


@dataclass(frozen=True)
class PublishedFeature:
    """What a Neuronpedia export says of one feature, but for its examples and explanations."""

    feature: int
    rate: float
    """share of tokens on which it fires; NaN where the export does not say"""
    peak: float
    """largest activation, approximately"""
    hook_point: str | None
    vector: Float[np.ndarray, "d_in"] | None
    """its direction; None where the export has none"""
    promoted: tuple[tuple[str, float], ...]
    """tokens with the largest logits, and these"""
    suppressed: tuple[tuple[str, float], ...]


@dataclass(frozen=True)
class PublishedExample:
    """A window of text and a feature's activations on it."""

    feature: int
    tokens: tuple[str, ...]
    values: tuple[float, ...]
    """activation of each token, with its sign"""
    low: float | None
    """bounds of the interval of activations that the window stands for; None for the top examples"""
    high: float | None
    share: float | None
    """share of the firings in that interval, as its exporter counted them"""


@dataclass(frozen=True)
class NeuronpediaExport:
    """The files of one SAE in Neuronpedia's bulk format, read when they are asked for.

    It is no feature store: there are the strongest examples of each feature and a sample of the others, as text without
    token ids, so that rates and co-occurrences cannot be counted. What its exporter counted stands in `features`.
    """

    folder: Path
    source: dict[str, Any]
    """the record of the SAE: id, modelId, dataset and others"""
    labels: tuple[Label, ...]
    """the explanations"""

    @cached_property
    def features(self) -> dict[int, PublishedFeature]:
        """The features by number."""
        return {one.feature: one for one in _read_lines(self.folder, "features", _read_feature)}

    def examples(self, features: FeatureIds | None = None) -> dict[int, list[PublishedExample]]:
        """The examples of some features, or of all, by number, those with the largest magnitudes first."""
        top = max(self.features, default=-1)
        wanted = set(self.features) if features is None else {*map(int, read_features(features, top + 1))}
        found: dict[int, list[PublishedExample]] = {j: [] for j in sorted(wanted)}

        def read(row: dict[str, Any]) -> PublishedExample | None:
            return _read_example(row) if int(row["index"]) in wanted else None

        for one in filter(None, _read_lines(self.folder, "activations", read)):
            found[one.feature].append(one)
        for windows in found.values():
            windows.sort(key=lambda one: -max(map(abs, one.values), default=0.0))
        return found

    def add_labels(self, labels: LabelStore | FeatureStore | str | Path) -> int:
        """Add the explanations to a label store, or to that of a feature store; returns how many were added."""
        if isinstance(labels, LabelStore):
            return labels.add(self.labels)
        with LabelStore.open(labels) as book:
            return book.add(self.labels)

    def __str__(self) -> str:
        named = len({label.feature for label in self.labels})
        with_vector = sum(one.vector is not None for one in self.features.values())
        return (
            f"{self.source.get('modelId')}/{self.source.get('id')}: {len(self.features):,} features, "
            f"{with_vector:,} with a vector, {named:,} with an explanation; examples only, not all activations"
        )


def read_neuronpedia(folder: str | Path) -> NeuronpediaExport:
    """The features, examples and explanations of one SAE in Neuronpedia's bulk format.

    `folder` is that of one SAE, with source.jsonl or at least one of features, activations and explanations, such as
    export_store writes and as Neuronpedia publishes them.

    Raises:
        FileNotFoundError: the folder holds none of these.
        ValueError: a file is damaged; the message names it and the line.
    """
    folder = Path(folder)
    kinds = ("features", "activations", "explanations")
    if not (folder / "source.jsonl").is_file() and not any(any(_files(folder, kind)) for kind in kinds):
        raise FileNotFoundError(
            f"`folder` must hold source.jsonl, or batches in {', '.join(kinds)}, got {folder}. "
            "Name the folder of one SAE."
        )
    labels = []
    for file in _files(folder, "explanations"):
        labels += [entry.label for entry in read_entries(file) if entry.label.text.strip()]
    return NeuronpediaExport(folder, _read_source(folder), tuple(labels))


def _read_source(folder: Path) -> dict[str, Any]:
    file = folder / "source.jsonl"
    if file.is_file():
        return next(_parse(file, dict), {})
    found = next(_read_lines(folder, "features", dict), {})
    return {"modelId": found.get("modelId"), "id": found.get("layer")}


def _files(folder: Path, kind: str) -> list[Path]:
    found = [*(folder / kind).glob("*.jsonl.gz"), *(folder / kind).glob("*.jsonl")]
    return sorted(found, key=lambda file: (len(file.name), file.name))


def _read_lines(folder: Path, kind: str, read: Callable[[dict[str, Any]], Read]) -> Iterator[Read]:
    for file in _files(folder, kind):
        yield from _parse(file, read)


def _parse(file: Path, read: Callable[[dict[str, Any]], Read]) -> Iterator[Read]:
    """What is read of each line of a file of JSON lines; ValueError with the line that is no record."""
    raw, number = file.read_bytes(), 0
    try:
        for line in (gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw).splitlines():
            number += 1
            if line.strip():
                row = json.loads(line)
                if not isinstance(row, dict) or ("index" in row and read_feature(int(row["index"])) < 0):
                    raise ValueError("no record of a feature")
                yield read(row)
    except (ValueError, TypeError, LookupError, AttributeError, EOFError, OSError, RecursionError) as error:
        raise ValueError(f"{file} must hold JSON lines; its line {number} is none ({error}).") from None


def _read_feature(row: dict[str, Any]) -> PublishedFeature:
    vector = row.get("vector") or []
    return PublishedFeature(
        feature=int(row["index"]),
        rate=_number(row.get("frac_nonzero")),
        peak=_number(row.get("maxActApprox")),
        hook_point=row.get("hookName"),
        vector=np.asarray(vector, dtype=np.float32) if vector else None,
        promoted=_pair(row, "pos"),
        suppressed=_pair(row, "neg"),
    )


def _number(value: Any) -> float:
    return math.nan if value is None or value < 0 else float(value)  # its API writes -1 where a rate is unknown


def _pair(row: dict[str, Any], side: str) -> tuple[tuple[str, float], ...]:
    texts: Sequence[str] = row.get(f"{side}_str") or []
    return tuple(zip(texts, map(float, row.get(f"{side}_values") or []), strict=False))


def _read_example(row: dict[str, Any]) -> PublishedExample:
    share = row.get("binContains")
    is_top = share is None or share < 0
    low, high, share = (
        (None, None, None) if is_top else (float(row[name]) for name in ("binMin", "binMax", "binContains"))
    )
    return PublishedExample(int(row["index"]), tuple(row["tokens"]), tuple(map(float, row["values"])), low, high, share)

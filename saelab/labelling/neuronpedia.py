"""Neuronpedia's bulk import format: an SAE, its features and their examples as records of its database."""

import gzip
import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from saelab.labelling.book import LabelBook
from saelab.labelling.dashboards import Dashboards
from saelab.labelling.formats import Entry, write_entries
from saelab.stores.features import FeatureStore
from saelab.stores.files import replace_folder, to_json, write_atomic
from saelab.stores.names import as_file_name, shareable

PER_FILE = 128
STRENGTH = 10.0
"""steering strength that Neuronpedia uses, as a multiple of the largest code"""


@dataclass(frozen=True)
class Source:
    """Neuronpedia's identifier of an SAE: model, layer and set."""

    model: str
    layer: int
    set: str

    @classmethod
    def of(cls, store: FeatureStore, set: str) -> "Source":
        """The identifier of a store; the layer of a hook point outside the blocks is 0."""
        origin = store.provenance
        layer = re.match(r"blocks\.(\d+)\.", origin.hook_point)
        return cls(Path(origin.model).name, int(layer[1]) if layer else 0, set)

    @property
    def id(self) -> str:
        """Layer and set, such as 6-res."""
        return f"{self.layer}-{self.set}"


@dataclass(frozen=True)
class BulkImport:
    """The records of one SAE; what was not measured is null, or an empty list."""

    boards: Dashboards
    source: Source
    creator: str
    now: str
    """time of export, ISO 8601"""

    def write(self, folder: Path, made: Iterator[dict[str, Any]]) -> Path:
        """Write the records of these dashboards, and the store's chosen labels; returns the SAE's folder."""
        root = folder / as_file_name(self.source.model) / as_file_name(self.source.id)
        with replace_folder(root, last="source.jsonl", stale=("*.jsonl", "*/batch-*.jsonl.gz")) as temp:
            for name, head in self.heads().items():
                write_atomic(temp / f"{name}.jsonl", _to_line(head))
            for i, part in enumerate(in_files(made)):
                windows = ((one["feature_index"], n, w) for one in part for n, w in enumerate(one["activations"]))
                _write_lines(temp / f"features/batch-{i}.jsonl.gz", map(self.feature, part))
                _write_lines(temp / f"activations/batch-{i}.jsonl.gz", (self.activation(*window) for window in windows))
            with LabelBook.open(self.boards.store) as book:
                chosen = [Entry(label, chosen=True) for label in book.chosen()]
            if chosen:
                text = write_entries(chosen, "neuronpedia", self.source.model, self.source.id)
                write_atomic(temp / "explanations/batch-0.jsonl.gz", gzip.compress(text.encode(), mtime=0))
        return root

    def heads(self) -> dict[str, dict[str, Any]]:
        """The records of model, release, set and SAE, by file name."""
        store, source = self.boards.store, self.source
        origin, made = store.provenance, {"createdAt": self.now}
        nowhere = ("saelensConfig", "saelensRelease", "saelensSaeId", "hfRepoId", "hfFolderId")
        return {
            "release": {"name": source.set, "description": repr(store), "creatorName": self.creator, **made},
            "model": {"id": source.model, "displayName": shareable(origin.model), **made},
            "sourceset": {
                "modelId": source.model,
                "name": source.set,
                "creatorId": self.creator,
                "releaseName": source.set,
                **made,
            },
            "source": {
                "id": source.id,
                "modelId": source.model,
                "setName": source.set,
                "creatorId": self.creator,
                "hasDashboards": True,
                "inferenceEnabled": False,
                **dict.fromkeys(nowhere),
                "num_prompts": int((store.text.positions == 0).sum()),
                "num_tokens_in_prompt": origin.ctx_len,
                "dataset": origin.text,
                "notes": f"saelab, {origin.hook_point}, weight processing {origin.weight_processing}",
                **made,
            },
        }

    def feature(self, one: dict[str, Any]) -> dict[str, Any]:
        """The record of a feature, from its dashboard."""
        j, sae = one["feature_index"], self.boards.sae
        peak = float(self.boards.store.statistics.peaks[j].max())
        return {
            "modelId": self.source.model,
            "layer": self.source.id,
            "index": str(j),
            "creatorId": self.creator,
            "createdAt": self.now,
            "maxActApprox": peak,
            "hasVector": sae is not None,
            "vector": sae.directions()[j].float().cpu().tolist() if sae is not None else [],
            "vectorLabel": None,
            "vectorDefaultSteerStrength": STRENGTH / peak if peak > 0 else None,
            "hookName": self.boards.store.provenance.hook_point,
            "topkCosSimIndices": [],
            "topkCosSimValues": [],
            "sourceSetName": self.source.set,
            **{name: value for name, value in one.items() if name not in ("feature_index", "activations", "vector")},
        }

    def activation(self, j: int, n: int, window: dict[str, Any]) -> dict[str, Any]:
        """The record of the n-th window of a feature."""
        values = window["values"]
        largest = max(range(len(values)), key=values.__getitem__)
        name = json.dumps([self.source.model, self.source.id, j, n, window["tokens"], values])
        lists = ("dfaValues", "lossValues", "logitContributions", "zIndices", "zValues")
        return {
            "id": "c" + hashlib.sha256(name.encode()).hexdigest()[:24],
            "tokens": window["tokens"],
            "index": str(j),
            "layer": self.source.id,
            "modelId": self.source.model,
            "maxValue": values[largest],
            "maxValueTokenIndex": largest,
            "minValue": min(values),
            "values": values,
            "creatorId": self.creator,
            "dataSource": self.boards.store.provenance.text,
            **dict.fromkeys(("dataIndex", "dfaTargetIndex", "dfaMaxValue")),
            **{name: [] for name in lists},
            "createdAt": self.now,
            "binMin": window["bin_min"],
            "binMax": window["bin_max"],
            "binContains": window["bin_contains"],
            "qualifyingTokenIndex": window["qualifying_token_index"],
        }


def in_files(items: Iterable[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    """The items in groups, one for each file."""
    part: list[dict[str, Any]] = []
    for item in items:
        part.append(item)
        if len(part) == PER_FILE:
            yield part
            part = []
    if part:
        yield part


def _write_lines(path: Path, records: Iterable[dict[str, Any]]) -> None:
    write_atomic(path, gzip.compress(b"".join(map(_to_line, records)), mtime=0))


def _to_line(record: dict[str, Any]) -> bytes:
    return (json.dumps(json.loads(to_json(record))) + "\n").encode()

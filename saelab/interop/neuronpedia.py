"""`export_store`: export a feature store to the file formats of delphi, SAEDashboard and Neuronpedia.

Dashboards are computed from a store, its SAE and its model. Neuronpedia's bulk import format holds an SAE, its
features and their examples as records of its database.
"""

import gzip
import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from jaxtyping import Float, Int

from saelab.analysis.direct_logits import Promoted, logit_lens
from saelab.analysis.feature_similarity import NearestFeatures, nearest_features
from saelab.analysis.max_activating import ExampleGroup, max_activating_examples
from saelab.collecting.harvesting import require_harvested
from saelab.functional.indices import FeatureIds, read_features
from saelab.functional.screening import largest_first
from saelab.interop.delphi import N_SPLITS, write_delphi
from saelab.labels.label import LabelEntry, write_entries
from saelab.labels.label_store import LabelStore
from saelab.lm.model_checks import Model, find_known_ids
from saelab.lm.unembedding import read_out
from saelab.sae.compatibility import match_weights
from saelab.sae.sae import SAE
from saelab.stores.feature_store import FeatureStore
from saelab.stores.files import as_file_name, replace_folder, shareable, to_json, write_atomic, write_json
from saelab.stores.jobs import hidden

N_TOP, N_EACH, N_QUANTILES, N_BINS, N_ROWS, N_LOGITS = 20, 5, 10, 50, 3, 10
TOP = -1
"""value of the bounds of the top examples"""
BLOCK = 64
PER_FILE = 128
STRENGTH = 10.0
"""steering strength that Neuronpedia uses, as a multiple of the largest code"""
SETTINGS, SKIPPED = "run_settings.json", "skipped_indexes.json"
StoreFormat = Literal["delphi", "saedashboard", "neuronpedia"]


@dataclass(frozen=True, eq=False)
class Dashboards:
    """Inputs of feature dashboards; without `sae` and `model` some fields stay empty."""

    store: FeatureStore
    sae: SAE | None
    model: "Model | None"
    alike: NearestFeatures

    @classmethod
    def open(cls, store: FeatureStore, sae: SAE | None, model: "Model | None") -> "Dashboards":
        """The inputs, with the correlations of all features measured."""
        if sae is not None:
            require_harvested(store, sae)
        if model is not None:
            match_weights(store.provenance, model)
        return cls(store, sae, model, nearest_features(store, m=N_ROWS))

    def make(self, features: Sequence[int]) -> Iterator[dict[str, Any]]:
        """The dashboard of each feature, with SAEDashboard's field names."""
        for start in range(0, len(features), BLOCK):
            part = list(features[start : start + BLOCK])
            lens = (
                logit_lens(self.sae, self.model, part, n=N_LOGITS, allow_mismatch=True)
                if self.sae and self.model
                else None
            )
            effects = None
            if self.sae and self.model:
                effects = read_out(self.model, self.sae.directions()[part]).cpu()[:, find_known_ids(self.model)]
            for i, j in enumerate(part):
                row = None if effects is None else effects[i].numpy()
                yield self._make(j, lens[j] if lens else None, row)

    def _make(self, j: int, effects: Promoted | None, logits: Float[np.ndarray, "n_known"] | None) -> dict[str, Any]:
        found = self.store.feature(j)
        heights, values = _histogram(found.values)
        logit_heights, logit_values = _histogram(logits) if logits is not None else ([], [])
        alike = self.alike.of(j)
        ctx_len = self.store.provenance.ctx_len or 0
        return {
            "feature_index": j,
            **self._align(j),
            "correlated_neurons_indices": [],
            "correlated_neurons_pearson": [],
            "correlated_neurons_l1": [],
            "correlated_features_indices": [i for i, _ in alike],
            "correlated_features_pearson": [value for _, value in alike],
            "correlated_features_l1": [],
            "neg_str": [text for text, _ in effects.suppressed] if effects else [],
            "neg_values": [value for _, value in effects.suppressed] if effects else [],
            "pos_str": [text for text, _ in effects.promoted] if effects else [],
            "pos_values": [value for _, value in effects.promoted] if effects else [],
            "frac_nonzero": len(found) / len(self.store),
            "freq_hist_data_bar_values": values,
            "freq_hist_data_bar_heights": heights,
            "logits_hist_data_bar_heights": logit_heights,
            "logits_hist_data_bar_values": logit_values,
            "n_prompts_total": int((np.asarray(self.store.text.positions) == 0).sum()),
            "n_tokens_in_prompt": ctx_len,
            "dataset": self.store.provenance.text,
            "decoder_weights_dist": [],
            "vector": [],
            "activations": [one for group in self._examples(j) for one in _describe(group, len(self.store))],
        }

    def _align(self, j: int) -> dict[str, Any]:
        """The neurons with the largest components of the feature's direction, and their shares of its L1 norm."""
        if self.sae is None:
            return {f"neuron_alignment_{name}": [] for name in ("indices", "values", "l1")}
        row = self.sae.directions()[j].float().cpu()
        top = largest_first(row.abs(), min(N_ROWS, len(row)))
        shares = row[top].abs() / row.abs().sum().clamp(min=1e-12)
        return {
            "neuron_alignment_indices": top.tolist(),
            "neuron_alignment_values": row[top].tolist(),
            "neuron_alignment_l1": shares.tolist(),
        }

    def _examples(self, j: int) -> list[ExampleGroup]:
        found = max_activating_examples(
            self.store, j, n_top=N_TOP, n_each=N_EACH, n_quantiles=N_QUANTILES, n_near=0, n_random=0
        )
        return [group for group in found.groups if group.side != 0]


def _histogram(values: Float[np.ndarray, "n"]) -> tuple[list[int], list[float]]:
    """Heights and centers of bars of equal width."""
    if len(values) == 0:
        return [], []
    counts: Int[np.ndarray, n]
    counts, edges = np.histogram(values.astype(np.float64), N_BINS)
    return counts.tolist(), ((edges[1:] + edges[:-1]) / 2).tolist()


def _describe(group: ExampleGroup, n_tokens: int) -> Iterator[dict[str, Any]]:
    """The windows of a group; bounds are codes with their sign, below 0 for negative firings."""
    low, high = (group.low, group.high) if group.side > 0 else (-group.high, -group.low)
    share = group.n_firings / n_tokens
    bounds = (TOP, TOP, TOP) if group.name == "top" and group.side > 0 else (low, high, share)
    for one in group.examples:
        yield {
            "bin_min": bounds[0],
            "bin_max": bounds[1],
            "bin_contains": bounds[2],
            "tokens": list(one.words),
            "values": list(one.values),
            "qualifying_token_index": one.center,
        }


@dataclass(frozen=True)
class NeuronpediaSource:
    """Neuronpedia's identifier of an SAE: model, layer and set."""

    model: str
    layer: int
    set: str

    @classmethod
    def of(cls, store: FeatureStore, set: str) -> "NeuronpediaSource":
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
    source: NeuronpediaSource
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
            with LabelStore.open(self.boards.store) as book:
                chosen = [LabelEntry(label, chosen=True) for label in book.chosen() if label.kind != "none"]
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


def export_store(
    store: FeatureStore,
    folder: str | Path,
    format: StoreFormat,
    *,
    sae: SAE | None = None,
    model: "Model | None" = None,
    features: FeatureIds | None = None,
    source_set: str = "saelab",
    creator: str = "saelab",
    n_splits: int = N_SPLITS,
    pad_id: int | None = None,
    progress: bool = True,
) -> Path:
    """Write a feature store in another tool's format; returns the folder that holds it.

    What was not measured stays empty or null. Codes keep their sign.

    Args:
        store: feature store to export.
        folder: folder to write to.
        format: "delphi", the latent cache that delphi explains and scores; "saedashboard", `run_settings.json`,
            `skipped_indexes.json` and `batch-{i}.json` as SAEDashboard writes them for Neuronpedia; "neuronpedia", the
            files of its bulk import under `{model}/{layer}-{source_set}`, with the store's chosen labels as
            explanations.
        sae: the SAE of the store, for decoder directions; not used for delphi.
        model: the language model, for promoted logits; needs `sae`, not used for delphi.
        features: numbers of the features; None takes all that fire. Not used for delphi.
        source_set: Neuronpedia's name of the set of SAEs.
        creator: name of the records' creator, for "neuronpedia".
        n_splits: number of files, for "delphi".
        pad_id: token id that fills up short sequences, for "delphi".
        progress: whether to show a progress bar.

    Raises:
        ValueError: the format or a feature does not exist, or as in `write_delphi`.
    """
    if format not in get_args(StoreFormat):
        raise ValueError(f"`format` must be one of {list(get_args(StoreFormat))}, got '{format}'.")
    if format == "delphi":
        return write_delphi(store, folder, n_splits=n_splits, pad_id=pad_id)
    fires = store.statistics.fires.sum(1) > 0
    wanted = read_features(fires.nonzero()[0] if features is None else features, store.d_sae)
    boards, source = Dashboards.open(store, sae, model), NeuronpediaSource.of(store, source_set)
    made = _show_progress(boards.make(wanted), len(wanted), progress)
    if format == "neuronpedia":
        now = datetime.now(timezone.utc).isoformat()
        return BulkImport(boards, source, creator, now).write(Path(folder), made)
    return _write_batches(Path(folder), store, source, made, (~fires).nonzero()[0].tolist())


def _show_progress(items: Iterator[dict[str, Any]], n: int, progress: bool) -> Iterator[dict[str, Any]]:
    from tqdm.auto import tqdm

    return iter(tqdm(items, total=n, unit=" features", disable=hidden(progress)))


def _write_batches(
    folder: Path, store: FeatureStore, source: NeuronpediaSource, made: Iterator[dict[str, Any]], silent: list[int]
) -> Path:
    """Write the dashboards in SAEDashboard's files for Neuronpedia."""
    head = {"model_id": source.model, "layer": source.layer, "sae_set": source.set, "sae_id_suffix": None}
    with replace_folder(folder, last=SETTINGS, stale=(SETTINGS, SKIPPED, "batch-*.json")) as temp:
        for i, part in enumerate(in_files(made)):
            write_json(temp / f"batch-{i}.json", {**head, "features": part})
        write_json(temp / SKIPPED, {**head, "skipped_indexes": silent})
        origin = store.provenance
        settings = {"n_features_at_a_time": PER_FILE, "n_tokens": len(store), "hook_point": origin.hook_point}
        write_json(temp / SETTINGS, {**head, **settings, "n_features": store.d_sae, "dataset": origin.text})
    return folder

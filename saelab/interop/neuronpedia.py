"""`export_store`: export a feature store to the file formats of delphi, SAEDashboard and Neuronpedia.

Neuronpedia's bulk import format holds an SAE, its
features and their examples as rows of its database's tables: a row with a field that no column has, without a value
that a column needs, or with a key that no other row has is refused. Nothing here names a local folder or a person.
"""

import gzip
import hashlib
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from saelab.functional.indices import FeatureIds, read_features
from saelab.interop.dashboards import Dashboards
from saelab.interop.delphi import N_SPLITS, write_delphi
from saelab.labels.label import ENDS, FIRST_USER, Label, LabelEntry, explain, name_source
from saelab.labels.label_store import LabelStore
from saelab.lm.huggingface import AnyModel, as_model
from saelab.sae.sae import SAE
from saelab.stores.feature_store import FeatureStore
from saelab.stores.files import as_file_name, replace_folder, to_json, write_atomic, write_json
from saelab.stores.jobs import hidden
from saelab.stores.sharing import shareable

PER_FILE = 128
SETTINGS, SKIPPED = "run_settings.json", "skipped_indexes.json"
StoreFormat = Literal["delphi", "saedashboard", "neuronpedia"]
Visibility = Literal["PUBLIC", "UNLISTED", "PRIVATE"]
MODEL_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
SET = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*")
SCORE_TYPES = {"detection": "eleuther_recall", "fuzzing": "eleuther_fuzz"}
"""Neuronpedia's names of scores that are made as delphi makes them"""
NO_OWNER = "custom"
"""owner of the models that Neuronpedia's own API makes"""


@dataclass(frozen=True, kw_only=True)
class Publication:
    """What a Neuronpedia database says of an export: names, keys and who may see it.

    The defaults satisfy the keys of every installation: its seed makes the user `creator_id`, and explanations name no
    model or type. Raises ValueError for a name that Neuronpedia does not take.

    >>> Publication(owner="EleutherAI", visibility="UNLISTED").creator
    'saelab'
    """

    creator: str = "saelab"
    """name shown as the creator of the release and the set"""
    creator_id: str = FIRST_USER
    """id of the Neuronpedia user that owns the rows"""
    owner: str = ""
    """who made the model; empty for the organization in its Hugging Face id, else custom"""
    visibility: Visibility = "PUBLIC"
    """PUBLIC as Neuronpedia's converter has it; in its tables the default is PRIVATE, which shows nothing"""
    model_id: str = ""
    """Neuronpedia's name of the model, such as gpt2-small; empty for the last part of the store's model"""
    release: str = ""
    """name of the release; empty for the name of the set"""
    urls: tuple[str, ...] = ()
    """pages about the release"""
    explanation_model: str | None = None
    """a name of the installation's table of explanation models; None for none"""
    explanation_type: str | None = None
    """a name of the installation's table of explanation types; None for none"""
    score_model: str | None = None
    """a name of its table of models that score, which a row for each score of a label names; None leaves scores in the
    notes of explanations
    """
    score_types: Mapping[str, str] = field(default_factory=lambda: dict(SCORE_TYPES))
    """its names of the scores in `Label.scores` that get rows; its own are the default"""

    def __post_init__(self) -> None:
        if self.visibility not in get_args(Visibility):
            raise ValueError(f"`visibility` must be one of {list(get_args(Visibility))}, got {self.visibility!r}.")
        for name in ("creator", "creator_id"):
            if not getattr(self, name).strip():
                raise ValueError(f"`{name}` must be a name, got an empty text. Leave it out for the default.")
        if self.model_id and not MODEL_ID.fullmatch(self.model_id):
            raise ValueError(f"`model_id` must be letters, digits, '.', '_' and '-', got {self.model_id!r}.")


DEFAULTS = Publication()


@dataclass(frozen=True)
class NeuronpediaSource:
    """Neuronpedia's identifier of an SAE: model, layer and set."""

    model: str
    layer: int
    set: str

    @classmethod
    def of(cls, store: FeatureStore, set: str, model_id: str = "") -> "NeuronpediaSource":
        """The identifier of a store; the layer of a hook point outside the blocks is 0.

        ValueError where the set's name is none that Neuronpedia takes.
        """
        if not SET.fullmatch(set) or set == "neurons":
            raise ValueError(
                f"`source_set` must be lowercase letters and digits, with single hyphens between, and not 'neurons', "
                f"got {set!r}."
            )
        origin = store.provenance
        layer = int(name_source(origin.hook_point).partition("-")[0])
        return cls(model_id or as_file_name(re.split(r"[\\/]", origin.model.rstrip("\\/"))[-1]), layer, set)

    @property
    def id(self) -> str:
        """Layer and set, such as 6-res."""
        return f"{self.layer}-{self.set}"


@dataclass(frozen=True)
class BulkImport:
    """The records of one SAE; what was not measured is null, or an empty list."""

    boards: Dashboards
    source: NeuronpediaSource
    about: Publication = DEFAULTS
    now: str = field(default_factory=lambda: _format_time(datetime.now(timezone.utc)))
    """time of export, ISO 8601"""

    def write(self, folder: Path, made: Iterator[dict[str, Any]]) -> Path:
        """Write the records of these dashboards, and the labels chosen for them; returns the SAE's folder."""
        root = folder / as_file_name(self.source.model) / as_file_name(self.source.id)
        with replace_folder(root, last="source.jsonl", stale=("*.jsonl", "*/batch-*.jsonl.gz")) as temp:
            for name, head in self.heads().items():
                write_atomic(temp / f"{name}.jsonl", _to_line(head))
            written: set[int] = set()
            for i, part in enumerate(in_files(made)):
                written |= {one["feature_index"] for one in part}
                windows = ((one["feature_index"], n, w) for one in part for n, w in enumerate(one["activations"]))
                _write_lines(temp / f"features/batch-{i}.jsonl.gz", map(self.feature, part))
                _write_lines(temp / f"activations/batch-{i}.jsonl.gz", (self.activation(*window) for window in windows))
            self.write_explanations(temp, written)
        return root

    def write_explanations(self, folder: Path, features: set[int]) -> None:
        """Write the labels that are chosen for these features, and their scores; no file where there are none."""
        labels = explained_labels(self.boards.store, features)
        if labels:
            _write_lines(folder / "explanations/batch-0.jsonl.gz", map(self.explanation, labels))
        if scores := [score for label in labels for score in self.scores(label)]:
            _write_lines(folder / "scores/batch-0.jsonl.gz", scores)

    def heads(self) -> dict[str, dict[str, Any]]:
        """The records of model, release, set and SAE, by file name."""
        source, about = self.source, self.about
        owned = {"creatorId": about.creator_id, "createdAt": self.now, "visibility": about.visibility}
        release, place = about.release or source.set, self.boards.store.provenance.hook_point
        return {
            "release": {
                "name": release,
                "description": f"Sparse autoencoder on {place} of {source.model}",
                "creatorName": about.creator,
                "urls": list(about.urls),
                **owned,
            },
            "model": {**self._model(), **owned},
            "sourceset": {
                "modelId": source.model,
                "name": source.set,
                "description": place,
                "creatorName": about.creator,
                "urls": list(about.urls),
                "releaseName": release,
                **owned,
            },
            "source": {**self._source(), **owned},
        }

    def _model(self) -> dict[str, Any]:
        """Fields of the model; without a model its sizes are 0, Neuronpedia's word for unknown."""
        cfg = self.boards.model.cfg if self.boards.model is not None else None
        given = shareable(self.boards.store.provenance.model)
        maker = given.partition("/")[0] if given.count("/") == 1 else ""
        return {
            "id": self.source.model,
            "displayName": given,
            "displayNameShort": self.source.model,
            "layers": int(cfg.n_layers) if cfg is not None else 0,
            "neuronsPerLayer": int(getattr(cfg, "d_mlp", None) or 0),
            "owner": self.about.owner or maker or NO_OWNER,
            **({"dimension": int(cfg.d_model)} if cfg is not None else {}),
        }

    def _source(self) -> dict[str, Any]:
        store, source = self.boards.store, self.source
        below = int((store.statistics.fires[:, 1] > 0).sum())
        signs = f"codes keep their sign, {below:,} of {store.d_sae:,} features fire below 0" if store.signed else ""
        notes = f"saelab, {store.provenance.hook_point}, weight processing {store.provenance.weight_processing}"
        return {
            "id": source.id,
            "modelId": source.model,
            "setName": source.set,
            "hasDashboards": True,
            "inferenceEnabled": False,
            "num_prompts": int((np.asarray(store.text.positions) == 0).sum()),
            "num_tokens_in_prompt": store.provenance.ctx_len,
            "dataset": self.boards.dataset,
            "notes": "; ".join(filter(None, [notes, signs])),
        }

    def feature(self, one: dict[str, Any]) -> dict[str, Any]:
        """The record of a feature, from its dashboard.

        The steering strength is the largest code; for a feature that fires below 0 only, the smallest.
        """
        j, vector = one["feature_index"], one.get("vector", [])
        above, below = map(float, self.boards.store.statistics.peaks[j])
        left_out = ("feature_index", "activations", "vector", "dataset", "n_prompts_total", "n_tokens_in_prompt")
        return {
            "modelId": self.source.model,
            "layer": self.source.id,
            "index": str(j),
            "creatorId": self.about.creator_id,
            "createdAt": self.now,
            "maxActApprox": above or below,
            "hasVector": bool(vector),
            "vector": vector,
            "vectorDefaultSteerStrength": (above or -below) if vector else None,
            "hookName": self.boards.store.provenance.hook_point,
            "sourceSetName": self.source.set,
            **{name: value for name, value in one.items() if name not in left_out},
        }

    def explanation(self, label: Label) -> dict[str, Any]:
        """The record of a label: its side stands in the text, its kind and scores in the notes; no person is named."""
        about = self.about
        return explain(
            LabelEntry(label, chosen=True), self.source.model, self.source.id, public=True, author_id=about.creator_id,
            explanation_model=about.explanation_model, explanation_type=about.explanation_type,
        )  # fmt: skip

    def scores(self, label: Label) -> Iterator[dict[str, Any]]:
        """The records of a label's scores, with interval and chance level as details; none without `score_model`."""
        explanation = self.explanation(label)
        for name, kind in self.about.score_types.items() if self.about.score_model is not None else ():
            value = label.scores.get(name)
            if value is None or not math.isfinite(value):
                continue
            ends = {end: label.scores[f"{name}_{end}"] for end in ENDS if f"{name}_{end}" in label.scores}
            key = json.dumps([explanation["id"], kind, self.about.score_model])
            yield {
                "id": "c" + hashlib.sha256(key.encode()).hexdigest()[:24],
                "initiatedByUserId": self.about.creator_id,
                "value": float(value),
                "explanationId": explanation["id"],
                "explanationScoreTypeName": kind,
                "explanationScoreModelName": self.about.score_model,
                "jsonDetails": to_json(ends, indent=None),
                "createdAt": explanation["createdAt"],
            }

    def activation(self, j: int, n: int, window: dict[str, Any]) -> dict[str, Any]:
        """The record of the n-th window of a feature."""
        values = window["values"]
        largest = max(range(len(values)), key=values.__getitem__)
        name = json.dumps([self.source.model, self.source.id, j, n, window["tokens"], values])
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
            "creatorId": self.about.creator_id,
            "dataSource": self.boards.dataset,
            "createdAt": self.now,
            "binMin": window["bin_min"],
            "binMax": window["bin_max"],
            "binContains": window["bin_contains"],
            "qualifyingTokenIndex": window["qualifying_token_index"],
        }


def explained_labels(store: FeatureStore, features: set[int]) -> list[Label]:
    """The chosen labels of these features; one that says that there is no good name is no explanation."""
    with LabelStore.open(store) as book:
        return [
            label
            for label in book.chosen()
            if label.kind != "none" and label.text.strip() and label.feature in features
        ]


def _format_time(time: datetime) -> str:
    return time.isoformat(timespec="milliseconds").replace("+00:00", "Z")


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
    """A record as a line of JSON without NUL, which PostgreSQL stores in no text.

    Its importer takes every backslash and u0000 for one: those that a text has as characters are written otherwise.
    """
    text = json.dumps(_without_nul(json.loads(to_json(record))))
    return (text.replace("\\\\u0000", "\\u005cu0000") + "\n").encode()


def _without_nul(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_nul(one) for name, one in value.items()}
    if isinstance(value, list):
        return [_without_nul(one) for one in value]
    return value.replace("\0", "\ufffd") if isinstance(value, str) else value


def export_store(
    store: FeatureStore,
    folder: str | Path,
    format: StoreFormat,
    *,
    sae: SAE | None = None,
    model: AnyModel | None = None,
    features: FeatureIds | None = None,
    source_set: str = "saelab",
    creator: str = "",
    about: Publication = DEFAULTS,
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
            `skipped_indexes.json` and `batch-{i}.json` as SAEDashboard writes them for Neuronpedia's converter;
            "neuronpedia", the files of its bulk import under `{model}/{layer}-{source_set}`. Both of the latter get the
            store's chosen labels in `explanations/`, which the converter leaves out: copy the folder into its output.
        sae: the SAE of the store, for decoder directions; not used for delphi.
        model: the language model, for promoted logits; needs `sae`, not used for delphi.
        features: numbers of the features; None takes all that fire. Not used for delphi.
        source_set: Neuronpedia's name of the set of SAEs.
        creator: name shown as the creator, for "neuronpedia"; empty for that of `about`.
        about: names, keys and visibility of the records, for "neuronpedia".
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
    source = NeuronpediaSource.of(store, source_set, about.model_id)
    boards = Dashboards.open(store, sae, None if model is None else as_model(model))
    records = BulkImport(boards, source, replace(about, creator=creator or about.creator))
    made = _show_progress(boards.make(wanted), len(wanted), progress)
    if format == "neuronpedia":
        return records.write(Path(folder), made)
    return _write_batches(Path(folder), records, made, (~fires).nonzero()[0].tolist(), {*map(int, wanted)})


def _show_progress(items: Iterator[dict[str, Any]], n: int, progress: bool) -> Iterator[dict[str, Any]]:
    from tqdm.auto import tqdm

    return iter(tqdm(items, total=n, unit=" features", disable=hidden(progress)))


def _write_batches(
    folder: Path, records: BulkImport, made: Iterator[dict[str, Any]], silent: list[int], features: set[int]
) -> Path:
    """Write the dashboards in SAEDashboard's files for Neuronpedia."""
    source, store = records.source, records.boards.store
    head = {"model_id": source.model, "layer": source.layer, "sae_set": source.set, "sae_id_suffix": None}
    with replace_folder(folder, last=SETTINGS, stale=(SETTINGS, SKIPPED, "batch-*.json", "*/batch-*.jsonl.gz")) as temp:
        for i, part in enumerate(in_files(made)):
            write_json(temp / f"batch-{i}.json", {**head, "features": part})
        write_json(temp / SKIPPED, {**head, "skipped_indexes": silent})
        records.write_explanations(temp, features)
        place = store.provenance.hook_point
        settings = {"n_features_at_a_time": PER_FILE, "n_tokens": len(store), "hook_point": place}
        write_json(temp / SETTINGS, {**head, **settings, "n_features": store.d_sae, "dataset": records.boards.dataset})
    return folder

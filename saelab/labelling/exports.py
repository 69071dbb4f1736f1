"""Export of a feature store to the file formats of delphi, SAEDashboard and Neuronpedia."""

from collections.abc import Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Literal, get_args

from saelab.collecting.delphi_writing import N_SPLITS, write_delphi
from saelab.functional.feature_ids import FeatureIds, read_features
from saelab.labelling.dashboards import Dashboards
from saelab.labelling.neuronpedia import PER_FILE, BulkImport, Source, in_files
from saelab.lm.models import Model
from saelab.sae.sae import SAE
from saelab.stores.features import FeatureStore
from saelab.stores.files import replace_folder, write_json
from saelab.stores.progress import hidden

SETTINGS, SKIPPED = "run_settings.json", "skipped_indexes.json"
StoreFormat = Literal["delphi", "saedashboard", "neuronpedia"]


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
    boards, source = Dashboards.open(store, sae, model), Source.of(store, source_set)
    made = _show_progress(boards.make(wanted), len(wanted), progress)
    if format == "neuronpedia":
        now = datetime.now(timezone.utc).isoformat()
        return BulkImport(boards, source, creator, now).write(Path(folder), made)
    return _write_batches(Path(folder), store, source, made, (~fires).nonzero()[0].tolist())


def _show_progress(items: Iterator[dict[str, Any]], n: int, progress: bool) -> Iterator[dict[str, Any]]:
    from tqdm.auto import tqdm

    return iter(tqdm(items, total=n, unit=" features", disable=hidden(progress)))


def _write_batches(
    folder: Path, store: FeatureStore, source: Source, made: Iterator[dict[str, Any]], silent: list[int]
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

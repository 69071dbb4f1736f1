"""`saelab dissect`, `saelab label-head`: features that detect known concepts, and labels of documents from features."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Option

from saelab.cli import options
from saelab.cli.sources import Source
from saelab.cli.terminal import echo

if TYPE_CHECKING:
    from collections.abc import Sequence

    from saelab.lm.token_labels import TokenLabels
    from saelab.stores.feature_store import FeatureStore

DISSECT = Source("saelab.evaluation.dissection:dissect")
HEAD = Source("saelab.corpora.label_fitting:label_head")


@options.documented_by(DISSECT, baseline="baselines")
def dissect_store(
    store: options.StoreFolder,
    labels: Annotated[
        Path,
        Option(
            help='JSON file with the rows (tokens) of each concept, counted from 0: {"plural": [3, 17], ...}.',
            metavar="FILE",
        ),
    ],
    baseline: Annotated[
        list[Path] | None,
        Option(
            help="Store of another dictionary on the same tokens, such as an untrained SAE's; may be repeated.",
            metavar="STORE",
            show_default="none",
        ),
    ] = None,
    quantile: float = DISSECT.quantile,
    detector: float = DISSECT.detector,
    clear: float = DISSECT.clear,
    min_count: options.Count = DISSECT.min_count,
    train_frac: float = DISSECT.train_frac,
    seed: options.Count = DISSECT.seed,
    out: options.JSONFile = None,
    json: options.AsJSON = False,
) -> None:
    """Find the concept that each side of a feature fits best by IoU, beside labels moved and other dictionaries."""
    from saelab.evaluation.dissection import dissect
    from saelab.stores.feature_store import FeatureStore
    from saelab.stores.files import to_json, write_json

    codes = FeatureStore.load(store)
    found = dissect(
        codes,
        _read_rows(labels, len(codes), codes.counted),
        baselines=_load_stores(baseline or ()),
        quantile=quantile, detector=detector, clear=clear, min_count=min_count, train_frac=train_frac, seed=seed,
    )  # fmt: skip
    if out is not None:
        write_json(out, found.to_dict())
    echo(to_json(found.to_dict()) if json else str(found))


def _load_stores(folders: "Sequence[Path]") -> "dict[str, FeatureStore]":
    """Stores by the names of their folders: a result is shared, and where a store lies is not."""
    from saelab.stores.feature_store import FeatureStore

    found = {folder.absolute().name: FeatureStore.load(folder) for folder in folders}
    if len(found) < len(folders):
        raise ValueError(
            f"`--baseline` stores are told by their folders' names, which must differ, got {[*map(str, folders)]}; "
            "rename some."
        )
    return found


@options.documented_by(HEAD, epochs="n_epochs")
def fit_label_head(
    store: options.StoreFolder,
    labels: Annotated[
        Path,
        Option(
            help='JSON file with the documents of each label, counted from 0 in their order: {"I10": [0, 4], ...}.',
            metavar="FILE",
        ),
    ],
    out: Annotated[Path, Option(help="Folder for the head.", metavar="FOLDER")],
    untrained: Annotated[
        Path | None,
        Option(help="Store of an untrained SAE's codes of the same tokens.", metavar="STORE", show_default="none"),
    ] = None,
    l1: float = HEAD.l1,
    epochs: options.Count = HEAD.n_epochs,
    train_frac: float = HEAD.train_frac,
    min_count: options.Count = HEAD.min_count,
    baselines: Annotated[bool, Option(help="Also fit what the head is compared with.")] = HEAD.baselines,
    seed: options.Count = HEAD.seed,
    json: options.AsJSON = False,
) -> None:
    """Fit a head that labels documents from the features of their tokens, and score it on held-out documents."""
    from dataclasses import asdict

    import numpy as np

    from saelab.corpora.label_fitting import label_head
    from saelab.stores.feature_store import FeatureStore
    from saelab.stores.files import to_json

    codes = FeatureStore.load(store)
    head = label_head(
        codes,
        _read_rows(labels, len(np.unique(codes.doc_ids)), "documents"),
        untrained=None if untrained is None else FeatureStore.load(untrained),
        l1=l1, n_epochs=epochs, train_frac=train_frac, min_count=min_count, baselines=baselines, seed=seed,
    )  # fmt: skip
    head.save_pretrained(out)
    told = {"folder": str(out), "labels": head.labels, "scores": [asdict(one) for one in head.scores]}
    echo(to_json(told) if json else f"{head}\nSaved to {out}.")


def _read_rows(path: Path, n: int, counted: str) -> "TokenLabels":
    """Labels from a JSON file that lists the rows of each; ValueError for anything else, or rows that there are not."""
    import json

    import numpy as np

    from saelab.lm.token_labels import TokenLabels

    def unlike(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(found := dict(pairs)) < len(pairs):
            raise ValueError("a name is there twice")
        return found

    try:
        given = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=unlike)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"`--labels` must be a JSON file, got {path}: {error}.") from None
    rows: list[Any] = list(given.values()) if isinstance(given, dict) else [None]
    if not rows or not all(isinstance(one, list) and all(type(row) is int for row in one) for one in rows):
        raise ValueError(f'`--labels` must be an object of lists of row numbers, {{"name": [3, 17]}}, got {path}.')
    if wrong := [row for one in rows for row in one if not 0 <= row < n]:
        raise ValueError(f"`--labels` must list {counted} in 0..{n - 1}, got {wrong[:5]}.")
    return TokenLabels.place({name: np.array(one, np.int64) for name, one in given.items()}, (n,))

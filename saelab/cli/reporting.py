"""`saelab report`: a feature store as a page."""

from pathlib import Path
from typing import Annotated

import typer

from saelab.cli import options
from saelab.cli.saying import say
from saelab.lm.models import Model, load_model
from saelab.lm.quiet import offline
from saelab.pictures.reports import report
from saelab.sae.sae import SAE
from saelab.stores.features import FeatureStore
from saelab.stores.files import read_json

Compare = Annotated[
    Path | None,
    typer.Option(
        "--compare",
        help="Another store of the same text: every card shows the best partner there.",
        metavar="STORE",
        show_default="none",
    ),
]


def write_report(
    store: options.StoreFolder,
    out: options.OutReport,
    prompt: options.Prompts = [],  # noqa: B006 - typer copies it
    features: options.FeatureList = None,
    sae: options.ReportSAE = None,
    model: options.ReportModel = None,
    evaluation: options.EvaluationFile = None,
    compare: Compare = None,
    title: options.Title = "",
    progress: options.Progress = True,
) -> None:
    """Write a report to open in a browser: every feature with where it fires, to search and to sort.

    SAE and model are those that the store was made with. Where they cannot be found what rests on them is left out: a
    line on stderr says so.
    """
    opened = FeatureStore.load(store)
    coder = open_sae(opened, sae)
    lm = open_model(opened, model, progress) if coder is not None else None
    made = report(
        opened,
        out,
        lm,
        features=read_numbers(features),
        sae=coder,
        prompts=prompt,
        evaluation=read_json(evaluation) if evaluation is not None else None,
        compare=FeatureStore.load(compare) if compare is not None else None,
        title=title,
        progress=progress,
    )
    say(str(made))


def open_sae(store: FeatureStore, named: str | None) -> SAE | None:
    """The SAE that is named, else the one that the store has; None, with a line on stderr, where that is gone."""
    if named is not None:
        return SAE.from_pretrained(named)
    recorded = store.manifest.sae.get("name_or_path") or ""
    try:
        if not recorded:
            raise ValueError("it was harvested before it was saved")
        with offline():
            return SAE.from_pretrained(find_recorded(store, recorded))
    except (OSError, ValueError) as error:
        _leave_out(f"SAE '{recorded}'", error, "--sae")
    return None


def find_recorded(store: FeatureStore, recorded: str) -> str:
    """What a store says that it was made with: a folder beside it or here where there is one, else the name itself."""
    near = [store.folder / recorded, store.folder.parent / recorded, Path(recorded)]
    return next((str(place) for place in near if place.is_dir()), recorded)


def open_model(store: FeatureStore, named: str | None, progress: bool, option: str = "--model") -> "Model | None":
    """The model that is named, else the one that the store has; None, with a line on stderr, where that is gone."""
    processing = store.provenance.weight_processing
    if named is not None:
        return load_model(named, weight_processing=processing, progress=progress)
    recorded = store.provenance.model
    try:
        with offline():
            return load_model(find_recorded(store, recorded), weight_processing=processing, progress=progress)
    except (OSError, ValueError) as error:
        _leave_out(f"model '{recorded}'", error, option)
    return None


def _leave_out(what: str, error: Exception, option: str) -> None:
    reason = " ".join(str(error).split())[:200]
    say(f"The {what} could not be opened ({reason}). What rests on it is left out: give {option}.", err=True)


def read_numbers(given: str | None) -> list[int] | None:
    """The numbers of `--features`; None where it is not given."""
    if given is None:
        return None
    try:
        return [int(part) for part in given.split(",")]
    except ValueError:
        raise ValueError(f"`--features` must be numbers joined by commas, got '{given}'.") from None

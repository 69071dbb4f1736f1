"""`saelab export` and `saelab upload`: a store in other tools' files, and its features on Neuronpedia."""

from pathlib import Path
from typing import Annotated

from typer import Option

from saelab.cli import options
from saelab.cli.sources import Source, read_value
from saelab.cli.terminal import echo

EXPORT = Source("saelab.interop.neuronpedia:export_store")
ABOUT = Source("saelab.interop.neuronpedia:Publication")
N_SPLITS = read_value("saelab.interop.delphi:N_SPLITS")
FIRST_USER = read_value("saelab.labels.label:FIRST_USER")
FORMATS = read_value("saelab.interop.neuronpedia:StoreFormat")
UPLOAD = Source("saelab.interop.neuronpedia_upload:upload")


RecordedModel = Annotated[str | None, Option(metavar="MODEL", show_default="as the store has it")]
ModelId = Annotated[
    str, Option(help="Neuronpedia's name of the model.", metavar="NAME", show_default="end of the store's model")
]


@options.documented_by(EXPORT, ABOUT)
def export_features(
    store: options.StoreFolder,
    out: Annotated[Path, Option("--out", help="Folder to write to.", metavar="FOLDER")],
    format: Annotated[
        str, Option("--format", help=f"What to write: {', '.join(FORMATS)}.", metavar="NAME", show_default=True)
    ] = "neuronpedia",
    sae: options.StoreSAE = None,
    model: RecordedModel = None,
    features: options.FeatureList = None,
    source_set: options.Name = EXPORT.source_set,
    model_id: ModelId = "",
    creator: options.Name = ABOUT.creator,
    creator_id: options.Name = FIRST_USER,
    owner: Annotated[str, Option(metavar="NAME", show_default="the model's organization, else custom")] = "",
    visibility: options.Name = ABOUT.visibility,
    release: Annotated[str, Option(metavar="NAME", show_default="the name of the set")] = "",
    url: Annotated[list[str], Option("--url", help="Page about the release; may be given again.", metavar="URL")] = [],  # noqa: B006
    explanation_model: Annotated[str | None, Option(metavar="NAME")] = None,
    explanation_type: Annotated[str | None, Option(metavar="NAME")] = None,
    score_model: Annotated[str | None, Option(metavar="NAME")] = None,
    n_splits: options.Count = N_SPLITS,
    pad_id: Annotated[int | None, Option(metavar="ID")] = None,
    progress: options.Progress = True,
) -> None:
    """Write a store in the files of delphi, SAEDashboard or Neuronpedia's bulk import, labels included.

    Where the store's SAE and model are at hand, directions and promoted tokens are written too. Local paths and names
    of persons are left out.
    """
    from saelab.cli.inputs import open_model, open_sae, read_numbers
    from saelab.interop.neuronpedia import Publication, export_store
    from saelab.stores.feature_store import FeatureStore

    if format not in FORMATS:
        raise ValueError(f"`--format` must be one of {', '.join(FORMATS)}, got '{format}'.")
    opened = FeatureStore.load(store)
    wide = format != "delphi"
    coder = open_sae(opened, sae) if wide else None
    about = Publication(
        creator=creator,
        creator_id=creator_id,
        owner=owner,
        visibility=visibility,  # type: ignore[arg-type]
        model_id=model_id,
        release=release,
        urls=tuple(url),
        explanation_model=explanation_model,
        explanation_type=explanation_type,
        score_model=score_model,
    )
    written = export_store(
        opened,
        out,
        format,  # type: ignore[arg-type]
        sae=coder,
        model=open_model(opened, model, progress) if coder is not None else None,
        features=read_numbers(features) if wide else None,
        source_set=source_set,
        about=about,
        n_splits=n_splits,
        pad_id=pad_id,
        progress=progress,
    )
    echo(f"{written}: {format}")


@options.documented_by(UPLOAD)
def upload_features(
    store: options.StoreFolder,
    sae: options.StoreSAE = None,
    model: RecordedModel = None,
    features: options.FeatureList = None,
    source_set: options.Name = UPLOAD.source_set,
    model_id: ModelId = "",
    url: options.Name = UPLOAD.url,
    create: Annotated[bool, Option("--create")] = False,
    dry_run: Annotated[bool, Option("--dry-run")] = False,
    journal: Annotated[Path | None, Option(metavar="FILE", show_default="in the store's folder")] = None,
    progress: options.Progress = True,
) -> None:
    """Send features, examples and chosen labels to Neuronpedia, with the key in NEURONPEDIA_API_KEY.

    An interrupted upload continues where it stopped when the same command is run again.
    """
    from saelab.cli.inputs import open_model, open_sae, read_numbers
    from saelab.interop.neuronpedia import Publication
    from saelab.interop.neuronpedia_upload import upload
    from saelab.stores.feature_store import FeatureStore

    opened = FeatureStore.load(store)
    coder = open_sae(opened, sae)
    result = upload(
        opened,
        sae=coder,
        model=open_model(opened, model, progress) if coder is not None else None,
        features=read_numbers(features),
        source_set=source_set,
        about=Publication(model_id=model_id),
        url=url,
        create=create,
        dry_run=dry_run,
        journal=journal,
        progress=progress,
    )
    echo(str(result))

"""`saelab upload`: send the features of a store to Neuronpedia."""

from pathlib import Path
from typing import Annotated

from typer import Option

from saelab.cli import options
from saelab.cli.sources import Source
from saelab.cli.terminal import echo

UPLOAD = Source("saelab.interop.neuronpedia_upload:upload")


@options.documented_by(UPLOAD)
def upload_features(
    store: options.StoreFolder,
    sae: options.StoreSAE = None,
    model: Annotated[str | None, Option(metavar="MODEL", show_default="as the store has it")] = None,
    features: options.FeatureList = None,
    source_set: options.Name = UPLOAD.source_set,
    model_id: Annotated[
        str, Option(help="Neuronpedia's name of the model.", metavar="NAME", show_default="end of the store's model")
    ] = "",
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

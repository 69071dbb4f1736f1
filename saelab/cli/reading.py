"""`saelab read`: the features that fire on the tokens of a text."""

from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from saelab.cli import options
from saelab.cli.sources import Source
from saelab.cli.terminal import echo

READ = Source("saelab.analysis.text_features:read")


@options.documented_by(READ)
def read_texts(
    sae: options.SAEName,
    model: options.ModelName,
    text: Annotated[list[str], Argument(metavar="TEXT", help="Text to read; several may be given.")],
    labels: Annotated[
        Path | None,
        Option(
            help="Feature store whose labels name features.", metavar="STORE", show_default="features have no names"
        ),
    ] = None,
    chat: options.Chat = False,
    hook_point: str | None = None,
    bos: options.Bos = True,
    allow_mismatch: options.AllowMismatch = False,
    device: options.Device = None,
    backend: options.BackendName = "auto",
    json: options.AsJSON = False,
    progress: options.Progress = True,
) -> None:
    """Show which features of an SAE fire on each token of a text, with their values and names.

    Tokens that the SAE was not made for, such as BOS, are marked as left out.
    """
    from contextlib import ExitStack

    from saelab.analysis.text_features import read
    from saelab.cli.inputs import as_messages, open_pair
    from saelab.collecting.harvesting import require_harvested
    from saelab.labels.label_store import LabelStore
    from saelab.stores.feature_store import FeatureStore
    from saelab.stores.files import to_json

    coder, lm = open_pair(sae, model, device, progress, backend)
    texts = as_messages(text) if chat else list(text)
    with ExitStack() as stack:
        names = None
        if labels is not None:
            store = FeatureStore.load(labels)
            require_harvested(store, coder)
            names = stack.enter_context(LabelStore.open(store))
        found = read(
            coder,
            lm,
            texts,
            labels=names,
            hook_point=hook_point,
            bos=bos,
            allow_mismatch=allow_mismatch,
            progress=progress,
        )
        echo(to_json(found.to_dict()) if json else str(found))

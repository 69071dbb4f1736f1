"""`saelab harvest`, `saelab features`, `saelab dead`, `saelab report`: make, list and show a feature store."""

from pathlib import Path
from typing import Annotated, Any

from typer import Argument, Option

from saelab.cli import options
from saelab.cli.sources import Source
from saelab.cli.terminal import echo

HARVEST = Source("saelab.collecting.harvesting:harvest")
LIST = Source("saelab.analysis.dashboard:list_features")
DEAD = Source("saelab.analysis.density:dead_features")


@options.documented_by(HARVEST, options.TOKENIZE, values="dtype")
def harvest_text(
    sae: options.SAEName,
    model: Annotated[
        str,
        Argument(metavar="MODEL", help="As of `collect`; or a folder of activations, which are encoded then."),
    ],
    text: Annotated[
        Path | None,
        Argument(metavar="TEXT", help="As of `collect`.", show_default="none, with a folder of activations"),
    ] = None,
    *,
    out: Annotated[Path, Option(metavar="FOLDER")],
    n_tokens: int | None = None,
    ctx_len: options.SAECtxLen = None,
    values: options.Name = HARVEST.dtype,
    batch_size: int | None = None,
    allow_mismatch: options.AllowMismatch = False,
    separator: options.Separator = options.SEPARATOR,
    field: options.Name = options.FIELD,
    bos: options.Bos = True,
    device: options.Device = None,
    backend: options.BackendName = "auto",
    overwrite: Annotated[bool, Option("--overwrite", help="Delete the store in the folder and start over.")] = False,
    progress: options.Progress = True,
) -> None:
    """Encode a text, or activations of `collect` or `embed`, once into a feature store, which every analysis reads.

    Reads the text from its start; hook point and mask are the SAE's. An interrupted run continues where it
    stopped when the same command is run again, and ends with the same bytes.

    Several processes share the work, into one folder: torchrun --nproc-per-node 4 -m saelab harvest ...
    """
    from saelab.cli.descriptions import describe_store
    from saelab.cli.inputs import choose_device, is_collected, open_pair, read_head
    from saelab.collecting.harvesting import harvest
    from saelab.lm.model_checks import Model
    from saelab.sae.sae import SAE
    from saelab.stores.activations import Activations
    from saelab.training.launch import launched

    if values not in ("float16", "float32"):
        raise ValueError(f"`--values` must be float16 or float32, got '{values}'.")
    if is_collected(model) != (text is None):
        raise ValueError(
            f"MODEL must be a model, with a TEXT, or a folder of activations without, got '{model}' and {text}."
        )
    with launched(None, choose_device(device)) as (ranks, place):
        lm: Model | None = None
        rows: Any = None
        with ranks.together():
            if text is None:
                coder = SAE.from_pretrained(sae, device=place)
                rows = Activations.load(model, coder.provenance.hook_point if coder.provenance else None)
            else:
                coder, lm = open_pair(sae, model, str(place), progress and ranks.is_first, backend)
        if lm is not None and text is not None:
            length = ctx_len or (coder.provenance.ctx_len if coder.provenance else None) or options.CTX_LEN
            rows = read_head(lm, text, n_tokens, length, bos, separator, field, ranks.mesh)
        harvest(
            coder,
            lm,
            rows,
            out,
            dtype=values,  # type: ignore[arg-type]
            batch_size=batch_size,
            allow_mismatch=allow_mismatch,
            progress=progress,
            resume=not overwrite,
            mesh=ranks.mesh,
        )
        ranks.on_first(lambda: echo(describe_store(out)))


@options.documented_by(LIST)
def show_features(
    store: options.StoreFolder,
    sort: options.Name = LIST.sort,
    top: int = LIST.top,
    ascending: Annotated[bool, Option("--ascending", help="Smallest first.")] = False,
    json: options.AsJSON = False,
) -> None:
    """List features by how often they fire, how strongly, or with which sign."""
    from saelab.analysis.dashboard import list_features
    from saelab.stores.feature_store import FeatureStore

    found = list_features(FeatureStore.load(store), sort=sort, top=top, descending=not ascending)
    _print(found, json)


@options.documented_by(DEAD)
def show_dead(
    store: options.StoreFolder,
    sae: Annotated[str | None, Option(metavar="SAE", show_default="no causes")] = None,
    near_dead_rate: float = DEAD.near_dead_rate,
    dense_rate: float = DEAD.dense_rate,
    json: options.AsJSON = False,
) -> None:
    """Count dead, near-dead, live and dense features; with --sae, give likely causes of the dead ones."""
    from saelab.analysis.density import dead_features
    from saelab.sae.sae import SAE
    from saelab.stores.feature_store import FeatureStore

    coder = SAE.from_pretrained(sae) if sae is not None else None
    opened = FeatureStore.load(store)
    _print(dead_features(opened, coder, near_dead_rate=near_dead_rate, dense_rate=dense_rate), json)


def _print(result: Any, as_json: bool) -> None:
    from saelab.stores.files import to_json

    echo(to_json(result.to_dict()) if as_json else str(result))


@options.documented_by(Source("saelab.visualization.reports:report"))
def write_report(
    store: options.StoreFolder,
    out: Annotated[Path, Option(metavar="PATH")],
    prompt: Annotated[
        list[str], Option("--prompt", help="Text shown token by token; may be given again.", metavar="TEXT")
    ] = [],  # noqa: B006 - typer copies it
    features: options.FeatureList = None,
    sae: options.StoreSAE = None,
    model: Annotated[str | None, Option(metavar="MODEL", show_default="as the store has it")] = None,
    evaluation: Annotated[
        Path | None, Option(help="What `saelab evaluate --json` wrote.", metavar="FILE", show_default="not shown")
    ] = None,
    compare: Annotated[Path | None, Option(metavar="STORE", show_default="none")] = None,
    title: Annotated[str, Option(show_default="features, hook point and model")] = "",
    backend: options.BackendName = "auto",
    progress: options.Progress = True,
) -> None:
    """Write a report to search and sort in a browser: every feature with text on which it fires.

    SAE and model are those that the store was made with. What needs them is left out if they cannot be
    found, with a line on stderr.
    """
    from saelab.cli.inputs import open_model, open_sae, read_numbers
    from saelab.stores.feature_store import FeatureStore
    from saelab.stores.validation import read_json
    from saelab.visualization.reports import report

    opened = FeatureStore.load(store)
    coder = open_sae(opened, sae)
    lm = open_model(opened, model, progress, backend=backend) if coder is not None else None
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
    echo(str(made))

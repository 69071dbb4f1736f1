"""`saelab embed`: one row a document, from a text encoder."""

from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from saelab.cli import options
from saelab.cli.sources import Source, read_value
from saelab.cli.terminal import echo

EMBED = Source("saelab.collecting.embedding:embed")
SHARD_ROWS = read_value("saelab.collecting.embedding:SHARD_ROWS")


@options.documented_by(EMBED)
def embed_texts(
    encoder: Annotated[
        str,
        Argument(
            metavar="ENCODER",
            help="Folder or Hub id of a text encoder of sentence-transformers or transformers; with --hook-point, of "
            "a language model as `collect` takes it.",
        ),
    ],
    text: options.TextFile,
    out: Annotated[Path, Option(metavar="FOLDER")],
    pooling: Annotated[str | None, Option(metavar="NAME")] = None,
    normalize: Annotated[bool, Option("--normalize")] = False,
    hook_point: Annotated[str | None, Option(metavar="NAME", show_default="its last hidden state")] = None,
    max_tokens: int | None = None,
    batch_size: int | None = None,
    dtype: Annotated[
        str, Option(help=f"Dtype of the stored rows: {', '.join(options.DTYPES)}.", metavar="NAME")
    ] = options.DTYPES[0],
    shard_rows: int = SHARD_ROWS,
    separator: options.Separator = options.SEPARATOR,
    field: options.Name = options.FIELD,
    device: options.Device = None,
    backend: options.BackendName = "auto",
    overwrite: Annotated[bool, Option("--overwrite", help="Delete activations in the folder and start over.")] = False,
    progress: options.Progress = True,
) -> None:
    """Write one vector for each document of a text to a folder, with the document beside it.

    `train` and `harvest` take the folder as one of `collect`, and a document is then a token. An interrupted run
    continues where it stopped when the same command is run again, and ends with the same bytes.
    """
    import torch

    from saelab.cli.descriptions import describe_activations
    from saelab.cli.inputs import choose_device
    from saelab.collecting.embedding import embed
    from saelab.lm.text_encoders import load_text_encoder

    if dtype not in options.DTYPES:
        raise ValueError(f"`--dtype` must be one of {', '.join(options.DTYPES)}, got '{dtype}'.")
    model, tokenizer = load_text_encoder(encoder, hook_point=hook_point, device=choose_device(device), backend=backend)
    embed(
        model,
        text,
        out,
        pooling=pooling,
        normalize=normalize,
        hook_point=hook_point,
        tokenizer=tokenizer,
        max_tokens=max_tokens,
        batch_size=batch_size,
        dtype=getattr(torch, dtype),
        shard_rows=shard_rows,
        separator=separator or None,
        field=field,
        progress=progress,
        resume=not overwrite,
    )
    echo(describe_activations(out))

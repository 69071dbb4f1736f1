"""`saelab collect`."""

from pathlib import Path
from typing import Annotated

import torch
import typer
from typer import Option

from saelab.cli.info import describe_activations
from saelab.cli.options import (
    CTX_LEN,
    FIELD,
    SEPARATOR,
    Bos,
    Device,
    Field,
    ModelName,
    Progress,
    Separator,
    TextFile,
    choose_device,
)
from saelab.cli.texts import read_head
from saelab.collecting.collection import SHARD_TOKENS, collect
from saelab.lm.masks import TokenMask
from saelab.lm.models import load_model

DTYPES = ("float32", "bfloat16", "float16")


def collect_text(
    model: ModelName,
    text: TextFile,
    hook_point: Annotated[
        list[str],
        Option(
            help="Place in the model, such as blocks.2.hook_resid_post; several by giving the flag again.",
            metavar="NAME",
        ),
    ],
    out: Annotated[Path, Option(help="Folder for the activations.", metavar="FOLDER")],
    n_tokens: Annotated[
        int | None, Option(help="Tokens to read from the start of the text, BOS included.", show_default="all")
    ] = None,
    ctx_len: Annotated[int, Option(help="Tokens in a sequence.")] = CTX_LEN,
    dtype: Annotated[
        str, Option(help=f"What the activations are stored as: {', '.join(DTYPES)}.", metavar="NAME")
    ] = DTYPES[0],
    max_norm_ratio: Annotated[
        float | None,
        Option(help="Leave out tokens whose norm exceeds this many times the median norm.", show_default="keep all"),
    ] = TokenMask.max_norm_ratio,
    batch_size: Annotated[int | None, Option(help="Sequences in a forward.", show_default="about 4096 tokens")] = None,
    shard_tokens: Annotated[int, Option(help="Tokens in a file of the folder.")] = SHARD_TOKENS,
    separator: Separator = SEPARATOR,
    field: Field = FIELD,
    bos: Bos = True,
    device: Device = None,
    overwrite: Annotated[bool, Option("--overwrite", help="Delete activations in the folder and begin anew.")] = False,
    progress: Progress = True,
) -> None:
    """Write the activations of a language model on a text to a folder.

    Reads the text from its start. Special tokens are left out. A run that was cut off goes on where it stopped when
    the same command is given again, and ends with the same bytes.
    """
    if dtype not in DTYPES:
        raise ValueError(f"`--dtype` must be one of {', '.join(DTYPES)}, got '{dtype}'.")
    lm = load_model(model, device=choose_device(device))
    tokens = read_head(lm, text, n_tokens, ctx_len, bos, separator, field)
    if n_tokens is not None and tokens.n_tokens < n_tokens:
        typer.echo(f"note: the text holds {tokens.n_tokens:,} tokens, fewer than --n-tokens {n_tokens:,}.", err=True)
    collect(
        lm,
        tokens,
        hook_point,
        out,
        dtype=getattr(torch, dtype),
        mask=TokenMask(max_norm_ratio=max_norm_ratio),
        batch_size=batch_size,
        shard_tokens=shard_tokens,
        progress=progress,
        resume=not overwrite,
    )
    typer.echo(describe_activations(out))

"""Arguments that several commands share, and the defaults that they take from the library."""

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
from typer import Argument, Option

from saelab.lm.tokens import tokenize


def default_of(function: Callable[..., Any], name: str) -> Any:
    """The default of a library function's parameter, so that the command line's is the same."""
    return inspect.signature(function).parameters[name].default


CTX_LEN: int = default_of(tokenize, "ctx_len")
SEPARATOR: str = default_of(tokenize, "separator")
FIELD: str = default_of(tokenize, "field")

ModelName = Annotated[
    str,
    Argument(
        metavar="MODEL", help="Hub id or local folder of a causal language model; `tiny`: a random one, built in."
    ),
]
TextFile = Annotated[
    Path, Argument(metavar="TEXT", help="Documents in a file: .jsonl, .parquet, or UTF-8 text with separator lines.")
]
Separator = Annotated[
    str, Option(help="Line that ends a document in a text file; '' makes every line a document.", metavar="LINE")
]
Field = Annotated[str, Option(help="Name of the text in the rows of .jsonl and .parquet.", metavar="NAME")]
Bos = Annotated[bool, Option("--bos/--no-bos", help="Put the model's BOS token before every document, or not.")]
Device = Annotated[
    str | None,
    Option(
        help="Where to compute, such as cpu, cuda or mps.", metavar="NAME", show_default="an accelerator if present"
    ),
]
Progress = Annotated[bool, Option("--progress/--no-progress", help="Show progress on stderr, or not.")]


def choose_device(name: str | None) -> torch.device:
    """The named device, or the accelerator where there is one; ValueError for one that this machine does not have."""
    if name is None:
        found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        return found or torch.device("cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:  # unknown name; known, but not on this machine
        raise ValueError(
            f"`--device` must be one that this machine has, got '{name}' ({str(error).splitlines()[0]})"
        ) from error

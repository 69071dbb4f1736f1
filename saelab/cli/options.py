"""Options and arguments that several commands take, and `documented_by`, which takes help texts from docstrings.

Defaults come from the library's signatures, help from the `Args:` sections of the functions that a command calls.
"""

import ast
import inspect
import re
import textwrap
from collections.abc import Callable
from copy import copy
from dataclasses import is_dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin

import torch
from typer import Argument, Option

from saelab.lm.tokens import tokenize

Command = Callable[..., None]
NONE_IS = re.compile(r"(?:None (?:is |takes |for )?|by default )(.*)")
PYTHON_ONLY = re.compile(r"(?:None|True|False|empty) |by default ")


def default_of(function: Callable[..., Any], name: str) -> Any:
    """The default of a library function's parameter, so that the command line's is the same."""
    return inspect.signature(function).parameters[name].default


def documented_by(*sources: Callable[..., Any], **names: str) -> Callable[[Command], Command]:
    """Decorator of a command: options without a help text get that of the parameter with their name in the sources.

    The meaning of None in a docstring is shown as the option's default. Options that no source has are left as they
    are.

    Args:
        sources: functions with an `Args:` section, or dataclasses with a docstring under each field; the first that
            has a parameter counts.
        names: names of options that differ from those of the parameters, as `option="parameter"`.
    """

    def fill(command: Command) -> Command:
        for option, default in inspect.signature(command).parameters.items():
            parameter = names.get(option, option)
            texts = [text for source in sources if (text := read_parameters(source).get(parameter))]
            assert texts or option not in names, f"No source has a parameter {parameter}."
            if texts:
                hint = command.__annotations__[option]
                command.__annotations__[option] = _describe(hint, default.default is None, *shorten(texts[0]))
        return command

    return fill


def _describe(hint: Any, optional: bool, text: str, none_is: str | None) -> Any:
    kind, *given = get_args(hint) if get_origin(hint) is Annotated else (hint,)
    info = copy(given[0]) if given else Option()
    if info.help is not None:
        return hint
    info.help = text
    if optional and none_is and info.show_default is True:
        info.show_default = none_is
    return Annotated.__class_getitem__((kind, info))  # type: ignore[attr-defined]  # mypy takes it for a special form


@cache
def read_parameters(source: Callable[..., Any]) -> dict[str, str]:
    """Descriptions by parameter: of a function its `Args:` section, of a dataclass the docstrings under its fields."""
    if is_dataclass(source):
        tree: Any = ast.parse(textwrap.dedent(inspect.getsource(source)))
        return {
            ast.unparse(field.target): " ".join(ast.literal_eval(text.value).split())
            for field, text in pairwise(tree.body[0].body)
            if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr)
        }
    section = re.search(r"^Args:\n((?: +.*\n?)+)", inspect.getdoc(source) or "", re.MULTILINE)
    parts = re.split(r"^ {4}(\w+): ", section[1], flags=re.MULTILINE)[1:] if section else []
    return {name: " ".join(text.split()) for name, text in zip(parts[::2], parts[1::2], strict=True)}


def shorten(text: str) -> tuple[str, str | None]:
    """The first sentence of a parameter's description without what concerns Python alone; and what None stands for.

    >>> shorten("rows in a `Step`; None is all. More.")
    ('Rows in a Step.', 'all')
    """
    clauses = re.split(r"\.(?= [A-Z])|\.$", text.replace("`", ""))[0].split("; ")
    none_is = next((match[1] for clause in clauses[1:] if (match := NONE_IS.fullmatch(clause))), None)
    kept = "; ".join([clauses[0], *(clause for clause in clauses[1:] if not PYTHON_ONLY.match(clause))])
    return kept[:1].upper() + kept[1:] + ".", none_is


CTX_LEN: int = default_of(tokenize, "ctx_len")
SEPARATOR: str = default_of(tokenize, "separator")
FIELD: str = default_of(tokenize, "field")
DTYPES = ("float32", "bfloat16", "float16")

# shapes, whose help is the parameter's
Name = Annotated[str, Option(metavar="NAME")]
Folder = Annotated[Path | None, Option(metavar="FOLDER")]
Count = Annotated[int, Option(metavar="N")]

ModelName = Annotated[
    str,
    Argument(
        metavar="MODEL",
        help="Hub id or local folder of a causal language model; built in are `tales`, `tales-b`, `othello` and "
        "`tiny`, a random one.",
    ),
]
TextFile = Annotated[
    Path, Argument(metavar="TEXT", help="Documents in a file: .jsonl, .parquet, or UTF-8 text with separator lines.")
]
Separator = Annotated[
    str, Option(help="Line that ends a document in a text file; '' makes every line a document.", metavar="LINE")
]
Bos = Annotated[bool, Option("--bos/--no-bos", help="Put the model's BOS token before every document, or not.")]
Device = Annotated[
    str | None,
    Option(
        help="Where to compute, such as cpu, cuda or mps.", metavar="NAME", show_default="an accelerator if present"
    ),
]
Prefixes = Annotated[
    str | None,
    Option(
        help="Matryoshka: sizes that end at d_sae, such as 64,256,1024, or `random`.",
        metavar="SIZES",
        show_default="none",
    ),
]
Progress = Annotated[bool, Option("--progress/--no-progress", help="Show progress on stderr, or not.")]
SAEName = Annotated[str, Argument(metavar="SAE", help="Folder of an SAE, or a Hub id.")]
SAECtxLen = Annotated[int | None, Option(show_default=f"the SAE's, else {CTX_LEN}")]
Baselines = Annotated[
    Path | None,
    Option(
        help="Folder of SAEs to compare with, each in a folder that has the baseline's name, as `fit_baselines` makes "
        "them.",
        metavar="FOLDER",
        show_default="none",
    ),
]
JSONFile = Annotated[Path | None, Option(help="File for the numbers.", metavar="FILE", show_default="none is written")]
AllowMismatch = Annotated[bool, Option("--allow-mismatch")]
StoreFolder = Annotated[Path, Argument(metavar="STORE", help="Folder written by `saelab harvest`.")]
AsJSON = Annotated[bool, Option("--json", help="Print JSON.")]
StoreSAE = Annotated[
    str | None, Option("--sae", help="The SAE that was harvested.", metavar="SAE", show_default="as the store has it")
]
FeatureList = Annotated[
    str | None, Option("--features", help="Numbers joined by commas.", metavar="1,2,3", show_default="all")
]


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

"""Options and arguments that several commands take, and `documented_by`, which takes help texts from docstrings.

Defaults come from the library's signatures, help from the `Args:` sections of the functions that a command calls; both
are read from the source files. Commands import the library when they run, so that nobody waits for torch to be told of
an option.
"""

import inspect
import re
from collections.abc import Callable
from copy import copy
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin

from typer import Argument, Option

from saelab.cli.sources import Source, read_registered

Command = Callable[..., None]
NONE_IS = re.compile(r"(?:None (?:is |takes |for )?|by default )(.*)")
PYTHON_ONLY = re.compile(r"(?:None|True|False|empty) |by default ")


def documented_by(*sources: Source, **names: str) -> Callable[[Command], Command]:
    """Decorator of a command: options without a help text get that of the parameter with their name in the sources.

    The meaning of None in a docstring is shown as the option's default. Options that no source has are left as they
    are.

    Args:
        sources: functions with an `Args:` section, or dataclasses with a docstring under each field; the first that
            has a parameter counts.
        names: names of options that differ from those of the parameters, as `option="parameter"`.
    """

    described = [source.describe() for source in sources]

    def fill(command: Command) -> Command:
        for option, default in inspect.signature(command).parameters.items():
            parameter = names.get(option, option)
            texts = [found[parameter] for found in described if parameter in found]
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


def shorten(text: str) -> tuple[str, str | None]:
    """The first sentence of a parameter's description without what concerns Python alone; and what None stands for.

    >>> shorten("rows in a `Step`; None is all. More.")
    ('Rows in a Step.', 'all')
    """
    clauses = re.split(r"\.(?= [A-Z])|\.$", text.replace("`", ""))[0].split("; ")
    none_is = next((match[1] for clause in clauses[1:] if (match := NONE_IS.fullmatch(clause))), None)
    kept = "; ".join([clauses[0], *(clause for clause in clauses[1:] if not PYTHON_ONLY.match(clause))])
    return kept[:1].upper() + kept[1:] + ".", none_is


TOKENIZE = Source("saelab.lm.tokens:tokenize")
CTX_LEN: int = TOKENIZE.ctx_len
SEPARATOR: str = TOKENIZE.separator
FIELD: str = TOKENIZE.field
SAE_CONFIG = Source("saelab.sae.config:SAEConfig")
TRAINING = Source("saelab.training.config:TrainConfig")
TOPK = Source("saelab.sae.activation_functions:TopK")
ACTIVATIONS = read_registered("saelab.sae.activation_functions", "register_activation")
"""name of each activation by its class"""
DTYPES = ("float32", "bfloat16", "float16")
WORLD = "tales:"
"""what the name of a concept of tales is written after"""

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
Chat = Annotated[bool, Option("--chat", help="Read each text as a user's message, in the tokenizer's chat template.")]
Device = Annotated[
    str | None,
    Option(
        help="Where to compute, such as cpu, cuda or mps.", metavar="NAME", show_default="an accelerator if present"
    ),
]
BackendName = Annotated[
    str,
    Option(
        help="What runs the model: transformer_lens, huggingface for Hugging Face's own modules, or auto.",
        metavar="NAME",
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

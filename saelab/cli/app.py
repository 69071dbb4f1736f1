"""The entry point `saelab`: registers the subcommands, and prints errors as one line with an exit code."""

import os
import sys
from collections.abc import Callable, Sequence
from functools import wraps
from typing import Annotated

import typer

from saelab.cli.comparing import compare_folders
from saelab.cli.converting import convert_sae
from saelab.cli.demo import run_demo
from saelab.cli.diffing import diff_stores, find_documents
from saelab.cli.embedding import embed_texts
from saelab.cli.exploring import explore_store
from saelab.cli.exporting import export_features, upload_features
from saelab.cli.features import harvest_text, show_dead, show_features, write_report
from saelab.cli.info import show_info
from saelab.cli.labeling import VERBS as LABEL_VERBS, label_features, open_book
from saelab.cli.layers import profile_layers, show_lens
from saelab.cli.monitoring import monitor_texts
from saelab.cli.planning import plan_run
from saelab.cli.reading import read_texts
from saelab.cli.releases import show_releases
from saelab.cli.searching import search_documents, show_families
from saelab.cli.steering import draw_curve, steer_prompts
from saelab.cli.terminal import echo, find_base
from saelab.cli.tracing import trace_prompt
from saelab.cli.training import collect_text, evaluate_sae, train_sae
from saelab.stores.jobs import Terminable, is_launched, name_process

DONE, FAILED, WRONG_USE = 0, 1, 2
SPELLINGS = {
    "resume=False": "--overwrite",
    "resume=True": "--resume",
    "allow_mismatch=True": "--allow-mismatch",
    "allow_missing=True": "--allow-missing",
}
"""how the library's advice reads in the shell"""
PEER_GONE = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "NCCL error", "another process")
"""what the communication of a process says whose partner has ended"""
NO_MEMORY = ("can't allocate memory", "out of memory")
"""what PyTorch's allocators say"""

app = typer.Typer(
    name="saelab",
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Exit codes: 0 done, 1 failed or interrupted, 2 wrong use.",
)
UsageError: type[Exception] = find_base(typer.BadParameter, "UsageError")
VERBS: dict[str, Callable[..., None]] = {
    "collect": collect_text,
    "embed": embed_texts,
    "plan": plan_run,
    "train": train_sae,
    "evaluate": evaluate_sae,
    "convert": convert_sae,
    "harvest": harvest_text,
    "read": read_texts,
    "features": show_features,
    "dead": show_dead,
    "label": label_features,
    "compare": compare_folders,
    "diff": diff_stores,
    "find": find_documents,
    "families": show_families,
    "search": search_documents,
    "report": write_report,
    "explore": explore_store,
    "steer": steer_prompts,
    "steer-curve": draw_curve,
    "monitor": monitor_texts,
    "trace": trace_prompt,
    "layers": profile_layers,
    "lens": show_lens,
    "releases": show_releases,
    "export": export_features,
    "upload": upload_features,
    "info": show_info,
}


@app.callback()
def start(
    debug: Annotated[bool, typer.Option("--debug", envvar="SAELAB_DEBUG", help="Show tracebacks.")] = False,
) -> None:
    """Sparse autoencoders for language models: collect activations, train, evaluate, harvest features."""


def dispatch(words: Sequence[str]) -> int:
    """Run one command line, without the program's name; returns the exit code."""
    try:
        code = app(list(words), prog_name="saelab", standalone_mode=False)
    except UsageError as error:
        context = getattr(error, "ctx", None)
        place = context.command_path if context is not None else "saelab"
        text = " ".join(error.format_message().split())  # type: ignore[attr-defined]
        return _complain(f"{place}: {text} (see {place} --help)", WRONG_USE)
    return code if isinstance(code, int) else DONE


def guard(verb: Callable[..., None]) -> Callable[..., None]:
    """The command with errors turned into one line on stderr; with --debug they pass through."""

    @wraps(verb)
    def run(*args: object, **kwargs: object) -> None:
        try:
            with Terminable():
                verb(*args, **kwargs)
        except typer.Exit:
            raise
        except KeyboardInterrupt as stop:
            raise typer.Exit(_complain(_spell(stop) or "Interrupted.", FAILED)) from None
        except Exception as error:
            if "--debug" in sys.argv or os.environ.get("SAELAB_DEBUG"):
                raise
            raise typer.Exit(_report(error)) from None

    return run


def _report(error: Exception) -> int:
    """Say what went wrong in one line; returns the exit code."""
    process = name_process()
    if isinstance(error, ValueError | TypeError | FileNotFoundError):
        return WRONG_USE if process else _complain(f"error: {_spell(error)}", WRONG_USE)  # all processes have it
    if is_launched() and isinstance(error, RuntimeError) and any(sign in str(error) for sign in PEER_GONE):
        if process:  # the first says it
            return FAILED
        said = _spell(error) if "another process" in str(error) else "Stopped, as another process ended."
        return _complain(f"{said} The same command goes on (train: with --resume).", FAILED)
    text = f"failed: {type(error).__name__}: {_spell(error)} (saelab --debug shows where)"
    if isinstance(error, MemoryError) or any(sign in str(error) for sign in NO_MEMORY):
        text += "; saelab plan says how much memory a run needs"
    return _complain(f"{name_process(first=True)}: {text}" if is_launched() else text, FAILED)


def _spell(error: BaseException) -> str:
    text = " ".join(str(error).split())
    for python, shell in SPELLINGS.items():
        text = text.replace(python, shell)
    return text


def _complain(line: str, code: int) -> int:
    echo(line, err=True, always=True)
    return code


for _name, _verb in VERBS.items():
    app.command(_name)(guard(_verb))

labels = typer.Typer(rich_markup_mode=None, context_settings=app.info.context_settings)
labels.callback(invoke_without_command=True)(guard(open_book))
for _name, _verb in LABEL_VERBS.items():
    labels.command(_name)(guard(_verb))
app.add_typer(labels, name="labels")

app.command("demo")(guard(run_demo))


def main() -> int:
    """Run the command line; returns the exit code."""
    return dispatch(sys.argv[1:] or ["--help"])

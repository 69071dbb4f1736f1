"""`saelab explore`: the features of a store in a browser, to search, read, name and steer."""

import shlex
import threading
import webbrowser
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from typer import Option

from saelab.cli import options
from saelab.cli.sources import Source, read_value
from saelab.cli.terminal import echo

if TYPE_CHECKING:
    from saelab.explorer.launch import ExplorerServer

HOST = read_value("saelab.explorer.launch:HOST")
POLL = 0.5
"""seconds between two looks whether the model is there"""


@options.documented_by(Source("saelab.explorer.launch:explore"))
def explore_store(
    store: options.StoreFolder,
    model: Annotated[
        str | None,
        Option(help="The language model whose features they are.", metavar="MODEL", show_default="as the store has it"),
    ] = None,
    sae: options.StoreSAE = None,
    compare: Annotated[Path | None, Option(metavar="STORE", show_default="none")] = None,
    evaluation: Annotated[
        Path | None, Option(help="What `saelab evaluate --json` wrote.", metavar="FILE", show_default="none")
    ] = None,
    attribution: Annotated[
        Path | None, Option(help="An attribution that was saved.", metavar="FILE", show_default="none")
    ] = None,
    concepts: Annotated[
        Path | None,
        Option(
            help="Concept scores that were saved, such as concepts.json of `saelab demo`.",
            metavar="FILE",
            show_default="none",
        ),
    ] = None,
    llm: Annotated[
        str | None,
        Option(
            help="URL of an OpenAI-compatible endpoint, or `local` for a model on this machine, to label features when "
            "asked to; the key is read from OPENAI_API_KEY.",
            metavar="URL",
            show_default="OpenAI's, where --label-model is given",
        ),
    ] = None,
    label_model: Annotated[
        str | None,
        Option(help="The language model that labels and scores.", metavar="NAME", show_default="none is asked"),
    ] = None,
    read_only: Annotated[bool, Option("--read-only")] = False,
    title: Annotated[str, Option(show_default="features, hook point and model")] = "",
    host: Annotated[str, Option(metavar="ADDRESS")] = HOST,
    port: Annotated[int | None, Option(metavar="N", show_default="8765, or any that is free")] = None,
    browser: Annotated[bool, Option("--browser/--no-browser", help="Open a browser, or not.")] = False,
    device: options.Device = None,
    backend: options.BackendName = "auto",
) -> None:
    """Show the features of a store in a browser: search, read, name and steer them.

    The address is printed, and holds a random token: who has it, on this machine, can use the page. The language model
    loads behind the page. Ctrl-C ends it; labels, notes and lists are kept in the store.
    """
    from saelab.cli.inputs import choose_device, load_recorded, open_sae
    from saelab.cli.labelers import open_client
    from saelab.evaluation.results import ConceptScores
    from saelab.explorer.launch import ExplorerServer, describe_address
    from saelab.explorer.session import Explorer
    from saelab.interventions.attribution import Attribution
    from saelab.stores.feature_store import FeatureStore

    opened, chosen = FeatureStore.load(store), choose_device(device)
    coder = open_sae(opened, sae)
    explorer = Explorer.open(
        opened,
        partial(load_recorded, opened, model, chosen, backend),
        coder.to(chosen) if coder is not None else None,
        compare=compare,
        evaluation=evaluation,
        attribution=Attribution.load(attribution) if attribution is not None else None,
        concepts=ConceptScores.load(concepts) if concepts is not None else None,
        client=open_client(llm, label_model, progress=False, option="--label-model"),
        read_only=read_only,
        title=title,
    )
    try:
        server = ExplorerServer(explorer, host, port)
    except BaseException:
        explorer.close()
        raise
    echo(describe_address(server))
    echo("Ctrl-C ends it.")
    if browser:
        webbrowser.open(server.url)
    _serve(server, lambda line: echo(line, err=True))


def _serve(server: "ExplorerServer", tell: Callable[[str], None]) -> None:
    """Wait until the server ends, or Ctrl-C; tell when the model is there, or why it is not."""
    watching = threading.Thread(target=_tell_of_model, args=(server, tell), name="watch model", daemon=True)
    watching.start()
    try:
        server.wait()
    except KeyboardInterrupt:
        echo("The explorer has ended.", err=True)


def _tell_of_model(server: "ExplorerServer", tell: Callable[[str], None]) -> None:
    pause = threading.Event()
    while server.explorer.model_state == "loading" and server.is_running:
        pause.wait(POLL)
    state = server.explorer.model_state
    if state == "ready":
        tell("The language model is ready.")
    elif state.startswith("failed"):
        reason = state.removeprefix("failed: ")
        tell(f"Prompts and steering are left out, as the language model could not be loaded: {reason}")


def name_command(store: Path, model: str, concepts: Path | None = None) -> str:
    """The command that explores a store, as it is typed."""
    scores = "" if concepts is None else f" --concepts {shlex.quote(str(concepts))}"
    return f"saelab explore {shlex.quote(str(store))} --model {shlex.quote(model)}{scores}"

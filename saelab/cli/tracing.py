"""`saelab trace`: the attribution graph of a prompt."""

import os
import re
from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from saelab.cli import options
from saelab.cli.sources import Source
from saelab.cli.terminal import echo

TRACE = Source("saelab.circuits.tracing:trace")
SAE_NAME = re.compile(r"[\w.~-]*(?:/[\w.=-]+)+")
"""of a folder or of the Hub, such as owner/name or release/id"""


@options.documented_by(TRACE)
def trace_prompt(
    model: options.ModelName,
    saes: Annotated[
        list[str],
        Argument(
            metavar="SAE",
            help="Folders or Hub ids of transcoders of the MLPs, also cross-layer ones, and SAEs of other places.",
        ),
    ],
    prompt: Annotated[str, Argument(metavar="PROMPT", help="Text whose next token is explained.")],
    target: Annotated[
        list[str],
        Option("--target", help="Token to explain; may be given again.", metavar="TOKEN", show_default="most probable"),
    ] = [],  # noqa: B006 - typer copies it
    out: Annotated[
        Path | None, Option(help="File for the graph.", metavar="FILE", show_default="none is written")
    ] = None,
    page: Annotated[
        Path | None, Option(help="HTML page that shows the graph.", metavar="FILE", show_default="none is written")
    ] = None,
    json: Annotated[
        Path | None,
        Option(
            help="The graph as JSON of circuit-tracer and Neuronpedia.", metavar="FILE", show_default="none is written"
        ),
    ] = None,
    nodes: Annotated[float, Option(help="Share of influence that nodes are kept for; 1 is all.", metavar="X")] = 0.8,
    edges: Annotated[float, Option(help="Share of the edges between them.", metavar="X")] = 0.98,
    check: Annotated[
        bool, Option("--check", help="Ablate and steer features to see whether the graph is right.")
    ] = False,
    batch_size: options.Count = TRACE.batch_size,
    max_features: Annotated[int, Option(metavar="N")] = TRACE.max_features,
    allow_missing: Annotated[bool, Option("--allow-missing")] = False,
    allow_mismatch: options.AllowMismatch = False,
    device: options.Device = None,
    backend: options.BackendName = "auto",
    progress: options.Progress = True,
) -> None:
    """Show which tokens and features of a prompt cause its next token, as a graph of their direct effects.

    The graph is pruned to its most influential nodes.
    """
    from saelab.circuits.graph_files import write_graph_json
    from saelab.circuits.graph_validation import validate
    from saelab.circuits.graph_views import GraphView
    from saelab.circuits.tracing import trace
    from saelab.cli.inputs import open_several
    from saelab.visualization.graph_page import require_page_name, write_graph_page

    if page is not None:
        require_page_name(page)
    # the last SAE, where the prompt was forgotten; `Path.exists` raises for texts longer than a file's name
    if os.path.exists(os.path.expanduser(prompt)) or SAE_NAME.fullmatch(prompt):
        raise ValueError(
            f"`PROMPT` must be a text after the SAEs, got '{prompt}', which is the name of a file or an SAE. Put the "
            "prompt behind it; if it is the prompt, begin it with a space."
        )
    coders, lm = open_several(saes, model, device, progress, backend)
    graph = trace(
        lm,
        coders,
        prompt,
        targets=target or "top",
        batch_size=batch_size,
        max_features=max_features,
        allow_missing=allow_missing,
        allow_mismatch=allow_mismatch,
    )
    pruned = graph.prune(nodes, edges)
    echo(str(pruned))
    echo(f"the whole graph: replacement {graph.replacement_score:.3f}, completeness {graph.completeness_score:.3f}")
    if check:
        echo(str(validate(pruned, lm, coders, allow_mismatch=allow_mismatch, progress=progress)))
    if out is not None:
        pruned.save(out)
        echo(f"{len(pruned):,} nodes and {len(pruned.edge_weights):,} edges in {out}.")
    whole = GraphView(node_threshold=1.0, edge_threshold=1.0)  # the graph is pruned, and pages need not prune it again
    if json is not None:
        echo(f"JSON for circuit-tracer and Neuronpedia in {write_graph_json(pruned, json, view=whole)}.")
    if page is not None:
        echo(f"A page of the graph in {write_graph_page(pruned, page, view=whole)}.")

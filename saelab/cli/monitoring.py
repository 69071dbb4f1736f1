"""`saelab monitor`: how far conversations lie along a trait."""

from pathlib import Path
from typing import Annotated, Any

from typer import Argument, Option

from saelab.cli import options
from saelab.cli.sources import Source
from saelab.cli.terminal import echo

TRAIT = Source("saelab.steering.traits:trait_vector")
MONITOR = Source("saelab.steering.monitoring:monitor")


@options.documented_by(TRAIT, MONITOR)
def monitor_texts(
    model: options.ModelName,
    trait: Annotated[
        Path,
        Argument(
            metavar="TRAIT",
            help="Pairs of descriptions, a .jsonl file whose lines have `positive` and `negative`; or a trait that "
            "--save wrote.",
        ),
    ],
    text: Annotated[
        Path | None,
        Argument(metavar="TEXT", help="Conversations or texts in a file, such as .jsonl.", show_default="none is read"),
    ] = None,
    save: Annotated[Path | None, Option(help="File for the trait.", metavar="FILE", show_default="none")] = None,
    question: Annotated[
        list[str] | None,
        Option(help="What the model answers under each description; may be given again.", show_default="none"),
    ] = None,
    read: options.Name = TRAIT.read,
    n_tokens: options.Count = TRAIT.n_tokens,
    name: options.Name = TRAIT.name,
    seed: options.Count = TRAIT.seed,
    field: Annotated[str, Option(help="Column or key of conversations or texts.", metavar="NAME")] = "messages",
    separator: options.Separator = options.SEPARATOR,
    device: options.Device = None,
    backend: options.BackendName = "auto",
    json: options.AsJSON = False,
    progress: options.Progress = True,
) -> None:
    """Show how far the messages of conversations lie along a trait, a direction between opposite descriptions."""
    from saelab.cli.inputs import choose_device
    from saelab.lm.documents import read_rows
    from saelab.lm.models import load_model
    from saelab.steering.monitoring import monitor
    from saelab.steering.traits import Trait, trait_vector
    from saelab.stores.files import to_json

    pairs = None if trait.suffix == ".json" else read_pairs(trait)
    made = Trait.load(trait) if pairs is None else None
    texts = [] if text is None else list(read_rows(text, separator=separator or None, field=field))
    lm = load_model(model, device=choose_device(device), backend=backend, progress=progress)
    if made is None:
        made = trait_vector(
            lm, pairs or [], questions=question or (), read=read, n_tokens=n_tokens, name=name, seed=seed,  # type: ignore[arg-type]
            progress=progress,
        )  # fmt: skip
    if save is not None:
        made.save(save)
    found = [monitor(lm, one, made, seed=seed) for one in texts]  # type: ignore[arg-type]
    if json:
        echo(to_json({"trait": made.to_dict(), "texts": [one.to_dict() for one in found]}))
        return
    echo("\n\n".join(map(str, [made, *found])))


def read_pairs(path: Path) -> list[tuple[Any, Any]]:
    """Pairs of descriptions in a file of JSON lines; ValueError that names the line of a bad one."""
    import json

    found = []
    for i, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            found.append((row["positive"], row["negative"]))
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"Each line of {path.name} must be an object with `positive` and `negative`, line {i} is not: {error}."
            ) from error
    return found

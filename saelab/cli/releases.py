"""`saelab releases`: published SAEs by name."""

from typing import Annotated

from typer import Argument, Option

from saelab.cli import options
from saelab.cli.sources import Source
from saelab.cli.terminal import echo


@options.documented_by(Source("saelab.sae.formats.releases:list_releases"))
def show_releases(
    search: Annotated[str | None, Argument(metavar="SEARCH")] = None,
    model: Annotated[str | None, Option(metavar="MODEL")] = None,
    layer: Annotated[int | None, Option(metavar="N")] = None,
    hook_point: Annotated[str | None, Option(metavar="NAME")] = None,
    d_sae: Annotated[int | None, Option(metavar="N")] = None,
    json: options.AsJSON = False,
) -> None:
    """Show published SAEs that `saelab convert RELEASE FOLDER --name ID` finds by name; nothing is fetched."""
    from saelab.sae.formats.releases import list_releases
    from saelab.stores.files import to_json

    found = list_releases(search, model=model, layer=layer, hook_point=hook_point, d_sae=d_sae)
    echo(to_json(found.to_dict()) if json else str(found))

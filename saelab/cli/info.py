"""`saelab info`: what a folder holds and how it was made."""

from pathlib import Path
from typing import Annotated

from typer import Argument

from saelab.cli.terminal import echo


def show_info(
    path: Annotated[
        Path,
        Argument(
            metavar="PATH", help="Folder of an SAE (anybody's), of activations, of features, or of an unfinished run."
        ),
    ],
) -> None:
    """Show what a folder of an SAE, activations or features holds, and how it was made."""
    from saelab.cli.descriptions import describe_folder

    echo(describe_folder(path))

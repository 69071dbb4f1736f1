"""The one way from a command to the terminal."""

import typer

from saelab.stores.names import printable


def say(text: str, err: bool = False) -> None:
    """Print a text, on stderr with `err`; what a terminal would obey in it, whoever wrote it, is shown as its code."""
    typer.echo(printable(text), err=err)

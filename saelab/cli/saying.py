"""The one way from a command to the terminal."""

from typing import Any

import typer

from saelab.stores.names import printable


def find_base(cls: type, name: str) -> Any:
    """The class called `name` among those that a class of typer is made from: typer keeps click's to itself.

    ImportError where there is none.
    """
    for base in cls.__mro__[1:]:
        if base.__name__ == name:
            return base
    raise ImportError(
        f"`{cls.__name__}` of typer must be made from a class `{name}`, got version {typer.__version__}, where it is "
        "not. Take a release that saelab was tested with (see README)."
    )


def say(text: str, err: bool = False) -> None:
    """Print a text, on stderr with `err`; what a terminal would obey in it, whoever wrote it, is shown as its code."""
    typer.echo(printable(text), err=err)

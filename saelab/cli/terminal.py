"""Printing to the terminal, and the classes of click that typer keeps to itself."""

import re
from typing import TYPE_CHECKING, Any

import typer

from saelab.stores.jobs import name_process

CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069]")
"""Characters that move a terminal's cursor or reverse the direction of its text"""


def echo(text: str, err: bool = False, always: bool = False, nl: bool = True) -> None:
    """Print a text, on stderr with `err`, without a new line where `nl` is False; what a terminal would obey in it,
    whoever wrote it, is shown as its code.

    Of several processes the first prints, with `always` this one, too.
    """
    if always or not name_process():
        typer.echo(printable(text), err=err, nl=nl)


def printable(text: str) -> str:
    """A text that is safe to print: control characters and marks of text direction are replaced by their escape codes.

    >>> printable("a\x1b[2J" + chr(10) + "b")
    'a\\\\x1b[2J\\nb'
    """
    return CONTROL.sub(lambda found: found[0] if found[0] in "\n\t" else ascii(found[0])[1:-1], text)


def make_printable(text: str) -> str:
    r"""Text with what would steer a terminal spelt out.

    >>> make_printable("\x1b[2J")
    '\\x1b[2J'
    """
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


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


if TYPE_CHECKING:
    from typer import Context as Context
else:
    Context = find_base(typer.Context, "Context")  # what a command is given

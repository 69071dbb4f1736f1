"""`saelab labels STORE ...`: the book of a store's labels, searched, read and written."""

import getpass
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from typer import Argument, Option

from saelab.cli import options
from saelab.cli.saying import find_base, say
from saelab.labelling.book import LabelBook
from saelab.labelling.formats import FORMATS, name_format
from saelab.labelling.label import BOTH, Label
from saelab.labelling.wording import MARKS, describe_origin

if TYPE_CHECKING:
    from typer import Context
else:
    Context = find_base(typer.Context, "Context")  # what a command is given

Feature = Annotated[int, Argument(metavar="FEATURE", help="Number of the feature.")]
Words = Annotated[
    str, Argument(metavar="TEXT", help="Words that the label has, as they are, longer or in another form.")
]
Text = Annotated[str, Argument(metavar="TEXT", help="What the feature is called.")]
Author = Annotated[str, Argument(metavar="AUTHOR", help="Whose label; `show` tells who gave some.")]
Sign = Annotated[int, Option(help="1 or -1 for one side of the feature, 0 for the whole.", metavar="SIGN")]
Giver = Annotated[str | None, Option("--author", help="Who says so.", metavar="NAME", show_default="your user name")]
Every = Annotated[bool, Option("--all", help="Labels that are not chosen, too.")]
Top = Annotated[int, Option(help="Labels to show.")]
OutFile = Annotated[Path, Argument(metavar="FILE", help="File for the labels; compressed where it ends in .gz.")]
InFile = Annotated[
    Path, Argument(metavar="FILE", help="What `export` wrote, Neuronpedia's records, or a table as CSV.")
]
FormatName = Annotated[
    str | None, Option("--format", help=f"{', '.join(FORMATS)}.", metavar="NAME", show_default="by the file's ending")
]
ModelId = Annotated[str, Option(help="Neuronpedia's name of the model.", metavar="NAME", show_default="the store's")]
SourceId = Annotated[
    str, Option(help="Neuronpedia's name of the dictionary.", metavar="NAME", show_default="the store's hook point")
]


def open_book(context: Context, store: options.StoreFolder) -> None:
    """Search, read and write the labels of a store's features.

    They lie in labels.sqlite in the store's folder. What a person calls a feature stands before what rules and models
    call it. Without a command: how many there are.
    """
    context.obj = store
    if context.invoked_subcommand is None:
        say(make_printable(str(_open(context))))


def search_labels(context: Context, text: Words, every: Every = False, top: Top = 20) -> None:
    """Find features by their labels, the best first."""
    _print(_open(context).search(text, every=every), top)


def show_labels(context: Context, feature: Feature) -> None:
    """Show all labels of a feature; of each side the chosen one is marked by *."""
    book = _open(context)
    chosen = book.chosen(feature)
    for label in book.labels(feature):
        say(f"{'*' if label in chosen else ' '} {_say(label)}")
    if not chosen:
        say(f"Feature {feature} has no label.", err=True)


def set_label(context: Context, feature: Feature, text: Text, sign: Sign = BOTH, author: Giver = None) -> None:
    """Give a feature a label and choose it: your word stands until a person says otherwise."""
    say(_say(_open(context).set(feature, text, author=author or getpass.getuser(), sign=sign)))


def choose_label(context: Context, feature: Feature, author: Author, sign: Sign = BOTH) -> None:
    """Choose the newest label that an author gave: it stands until a person says otherwise."""
    say(_say(_open(context).choose(feature, author, sign=sign)))


def delete_labels(context: Context, feature: Feature, author: Author, sign: Sign = BOTH) -> None:
    """Delete an author's labels of a feature."""
    n = _open(context).delete(feature, author=author, sign=sign)
    say(f"{n} label{'' if n == 1 else 's'} deleted.")


def export_labels(
    context: Context,
    file: OutFile,
    form: FormatName = None,
    model_id: ModelId = "",
    source_id: SourceId = "",
) -> None:
    """Write all labels to a file: JSON, CSV, or Neuronpedia's explanation records, one a line."""
    if form is not None and form not in FORMATS:
        raise ValueError(f"`--format` must be one of {', '.join(FORMATS)}, got '{form}'.")
    n = _open(context).save(file, form or name_format(file), model_id=model_id, source_id=source_id)
    say(f"{n:,} labels in {file}.")


def import_labels(context: Context, file: InFile) -> None:
    """Add the labels of a file; a person's choice that stands already is kept."""
    say(f"{_open(context).load(file):,} labels added.")


VERBS: dict[str, Callable[..., None]] = {
    "search": search_labels,
    "show": show_labels,
    "set": set_label,
    "choose": choose_label,
    "delete": delete_labels,
    "export": export_labels,
    "import": import_labels,
}


def _open(context: Context) -> LabelBook:
    """The book of the store that was named, closed when the command ends."""
    return context.with_resource(LabelBook.open(context.obj))


def make_printable(text: str) -> str:
    r"""Text with what would steer a terminal spelt out.

    >>> make_printable("\x1b[2J")
    '\\x1b[2J'
    """
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def _say(label: Label) -> str:
    return make_printable(
        f"{label.feature:>6} {MARKS[label.sign]}{label.text} ({label.kind}, {describe_origin(label)})"
    )


def _print(labels: Sequence[Label], top: int) -> None:
    for label in labels[:top]:
        say(_say(label))
    if not labels:
        say("No label.", err=True)
    elif len(labels) > top:
        say(f"{len(labels) - top:,} more: give --top {len(labels)}.", err=True)

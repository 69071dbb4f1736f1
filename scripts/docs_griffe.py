"""Docstrings as the documentation site needs them: doctests as code blocks, fields of a class as one list."""

import re
from typing import Any

import griffe

DOCTEST = re.compile(r"(?:^[ \t]*>>> .*\n?)(?:^[ \t]*\S.*\n?)*", re.MULTILINE)


def fence_doctests(text: str) -> str:
    r"""The docstring with a fence about each doctest: Markdown would take `>>>` for a quotation.

    >>> fence_doctests("The sum.\n\n>>> 1 + 1\n2\n")
    'The sum.\n\n```pycon\n>>> 1 + 1\n2\n```\n'
    """
    return DOCTEST.sub(lambda found: f"```pycon\n{found[0].rstrip()}\n```\n", text)


def list_fields(obj: griffe.Object) -> None:
    """Move the sentences under a class's fields into a list in its own docstring: a heading for each takes a page."""
    fields = [
        member
        for member in obj.members.values()
        if member.is_attribute and not member.is_alias and member.docstring and not member.name.startswith("_")
        if "property" not in member.labels
    ]
    if fields and obj.docstring is not None:
        entries = [f"{field.name}: " + field.docstring.value.strip().replace("\n", "\n        ") for field in fields]
        obj.docstring.value += "\n\nAttributes:\n    " + "\n    ".join(entries) + "\n"
        for field in fields:
            field.docstring = None


class Docstrings(griffe.Extension):
    """What mkdocstrings calls for each object that it reads."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring is not None and ">>> " in obj.docstring.value:
            obj.docstring.value = fence_doctests(obj.docstring.value)
        if obj.is_class:
            list_fields(obj)

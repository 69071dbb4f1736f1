"""Styles and scripts of the pages, as files."""

from functools import cache
from importlib.resources import files


@cache
def read_asset(name: str) -> str:
    """The text of a file beside this one."""
    return files(__name__).joinpath(name).read_text(encoding="utf-8")

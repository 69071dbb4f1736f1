"""Style, markup and script of the report page, read from files in this folder."""

from functools import cache
from importlib.resources import files


@cache
def read_asset(name: str) -> str:
    """The text of a file in this folder."""
    return files(__name__).joinpath(name).read_text(encoding="utf-8")

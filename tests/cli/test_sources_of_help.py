"""What help says is what the library says: defaults, choices and descriptions read from source files are the real."""

import inspect
import re
from dataclasses import MISSING, fields, is_dataclass
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any, get_args

import pytest
from typer import Option
from typer.models import OptionInfo

import saelab.cli
from saelab.cli import options
from saelab.cli.options import documented_by
from saelab.cli.sources import Source, read_registered, read_value
from saelab.sae.activation_registry import ACTIVATIONS

WRITTEN = "\n".join(file.read_text() for file in sorted(Path(saelab.cli.__file__).parent.glob("*.py")))
SOURCES, VALUES = (sorted({*re.findall(rf'{call}\("([^"]+)"\)', WRITTEN)}) for call in ("Source", "read_value"))
UNREAD = object()


def real(path: str) -> Any:
    """What a path leads to, imported."""
    module, _, name = path.partition(":")
    thing = import_module(module)
    for part in name.split("."):
        thing = getattr(thing, part)
    return thing


def read_default(source: Source, name: str) -> Any:
    """A default, or UNREAD where it is no literal: a command that wanted it could not be imported."""
    try:
        return getattr(source, name)
    except LookupError:
        return UNREAD


@pytest.mark.parametrize("path", SOURCES)
def test_defaults_and_descriptions_are_those_of_the_library(path: str) -> None:
    thing, source = real(path), Source(path)
    if is_dataclass(thing):
        defaults = {field.name: field.default for field in fields(thing) if field.default is not MISSING}
        names = {field.name for field in fields(thing)}
    else:
        parameters = inspect.signature(thing).parameters
        defaults = {name: p.default for name, p in parameters.items() if p.default is not p.empty}
        names = {name for name, p in parameters.items() if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}
        said = " ".join((inspect.getdoc(thing) or "").split())
        assert all(f"{name}: {text}" in said for name, text in source.describe().items())
        assert names - {"self", "cls"} == set(source.describe())
    assert defaults and set(source.describe()) <= names
    read = {name: read_default(source, name) for name in defaults}
    known = {name: value for name, value in read.items() if value is not UNREAD}
    assert known == {name: defaults[name] for name in known}
    assert [*map(type, known.values())] == [type(defaults[name]) for name in known]


@pytest.mark.parametrize("path", VALUES)
def test_constants_and_choices_are_those_of_the_library(path: str) -> None:
    thing = real(path)
    assert read_value(path) == (tuple(thing) if isinstance(thing, dict) else get_args(thing) or thing)


def test_activations_are_those_that_are_registered() -> None:
    module = "saelab.sae.activation_functions"
    own = {kind.__name__: name for name, kind in ACTIVATIONS.items() if kind.__module__ == module}
    assert list(read_registered(module, "register_activation").items()) == list(own.items())
    assert own == options.ACTIVATIONS and len(own) > 5


def test_the_commands_read_from_the_library() -> None:
    assert len(SOURCES) > 20 and len(VALUES) > 10


MODULE = '''
from dataclasses import dataclass
from typing import Literal

import a_library_that_is_not_there

N_ROWS, OTHER = 3, "b"
Colour = Literal["red", "green"]
MADE = a_library_that_is_not_there.make()


@dataclass
class Config:
    n_rows: int | None = None
    """rows in a `Step`; None is all. More."""
    colour: Colour = "red"


def call(x: int, n_rows: int = 0) -> None: ...


def call(x: int, n_rows: int = N_ROWS, *, colour: str = "", made: object = MADE) -> None:
    """Nothing.

    Args:
        x: first: of
            two lines; None takes the last.
        n_rows: never read, as `Config` comes first.
        colour: True draws.

    Raises:
        ValueError: x: not this one.
    """
'''


@pytest.fixture
def written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A module that cannot be imported."""
    (tmp_path / "unimportable.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    return "unimportable"


def test_help_comes_from_the_docstrings_of_what_a_command_calls(written: str) -> None:
    @documented_by(Source(f"{written}:Config"), Source(f"{written}:call"), paint="colour")
    def command(
        x: int | None = None,
        n_rows: int | None = 3,
        paint: Annotated[str, Option(metavar="C")] = "",
        own: Annotated[int, Option(help="Own.")] = 0,
    ) -> None: ...

    read = {name: get_args(hint)[1] for name, hint in command.__annotations__.items() if get_args(hint)[1:]}
    assert {name: info.help for name, info in read.items() if isinstance(info, OptionInfo)} == {
        "x": "First: of two lines.",
        "n_rows": "Rows in a Step.",
        "paint": "True draws.",
        "own": "Own.",
    }
    assert read["x"].show_default == "the last" and read["n_rows"].show_default is True and read["paint"].metavar == "C"


def test_defaults_are_read_from_the_last_definition(written: str) -> None:
    call = Source(f"{written}:call")
    assert (call.n_rows, call.colour, Source(f"{written}:Config").n_rows) == (3, "", None)
    assert [read_value(f"{written}:{name}") for name in ("N_ROWS", "OTHER", "Colour")] == [3, "b", ("red", "green")]


def test_what_was_renamed_is_an_error(written: str) -> None:
    with pytest.raises(AttributeError, match="must have a default of 'x', got none"):
        Source(f"{written}:call").x  # noqa: B018
    for path in (f"{written}:gone", f"{written}:Config.gone", "saelab.gone:gone"):
        with pytest.raises(LookupError, match=r"gone` must be .*, got none. Was it renamed"):
            Source(path).describe()
    for path in (f"{written}:GONE", f"{written}:call"):
        with pytest.raises(LookupError, match="must be a constant, got none"):
            read_value(path)
    for read in (lambda: read_value(f"{written}:MADE"), lambda: Source(f"{written}:call").made):
        with pytest.raises(LookupError, match="must be written as a literal"):
            read()

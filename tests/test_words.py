"""The words of CONTRIBUTING.md in the code: American spelling, one meaning a type name, features and latents, first
lines.
"""

import ast
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path

import pytest
from sources import nodes, parse

ROOT = Path(__file__).parents[1]
FILES = sorted(file for folder in ("saelab", "scripts", "benchmarks") for file in (ROOT / folder).rglob("*.py"))
PACKAGE = [file for file in FILES if ROOT / "saelab" in file.parents]

BRITISH = re.compile(
    r"(normal|optim|initial|summar|quant|organ|general|serial|token|recogn|minim|maxim|regular|standard|vector|parametr"
    r"|factor|penal|capital|material|categor|random|util|special|visual|memor|priorit|stabil|character|final|local)is"
    r"(e|ed|es|er|ers|ing|ation|ations)?(?=_|$|[A-Z])"
    r"|cent(re|red|ring)|(col|fav|behavi|neighb|flav|hon)our|labell|modell|cancell|signall|travell|catalogue|grey"
    r"|analys(e|ed|er|ing)(?=_|$)|artefact|licence|judgement",
    re.I,
)
NAMING = {"id", "attr", "arg", "name", "names", "asname", "module", "rest", "kwd_attrs"}
"""fields of a syntax tree that hold identifiers"""
UNIT_OF_MEASURE = {"unit", "Unit", "UNIT", "CURVE_UNIT", "UnitName", "unit_scale"}
"""what may be called a unit: what strengths and progress bars count in, and vectors of norm 1"""


def shown_names(kind: ast.ClassDef) -> list[str]:
    """The names at the start of the texts that a class's `__repr__` returns."""
    own = [f for f in kind.body if isinstance(f, ast.FunctionDef) and f.name == "__repr__"]
    returned = [node.value for f in own for node in ast.walk(f) if isinstance(node, ast.Return) and node.value]
    texts = [ast.unparse(value).lstrip("frb'\"") for value in returned]
    return [found[1] for text in texts if (found := re.match(r"(\w+)\(", text))]


@cache
def names(file: Path) -> set[str]:
    """Every identifier of a module."""
    return identifiers(parse(file))


def identifiers(tree: ast.AST) -> set[str]:
    found: set[str] = set()
    for node in nodes(tree):
        for field in NAMING.intersection(node._fields):
            value = getattr(node, field)
            for name in value if isinstance(value, list) else [value]:
                found.update(name.split(".") if isinstance(name, str) else ())
    return found


def words(name: str) -> list[str]:
    """The words of a name in snake or camel case."""
    return [word.lower() for word in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", name)]


def british(found: Iterable[str]) -> list[str]:
    return sorted(name for name in found if BRITISH.search(name))


def units(found: Iterable[str]) -> list[str]:
    return sorted(name for name in found if {"unit", "units"} & set(words(name)) and name not in UNIT_OF_MEASURE)


def types(tree: ast.Module) -> Iterator[str]:
    """Classes and aliases of types that a module defines; aliases are the assigned names in CamelCase."""
    for node in nodes(tree):
        if isinstance(node, ast.ClassDef):
            yield node.name
        target = node.targets[0] if isinstance(node, ast.Assign) else getattr(node, "target", None)
        if isinstance(node, ast.Assign | ast.AnnAssign) and isinstance(target, ast.Name):
            made = node.value.func if isinstance(node.value, ast.Call) else None
            is_variable = isinstance(made, ast.Name) and made.id in ("TypeVar", "ParamSpec")
            if re.fullmatch(r"_?[A-Z][a-z]\w*", target.id) and not is_variable:
                yield target.id


def first_line(tree: ast.Module) -> str | None:
    """What is wrong with a module's first sentence, or None."""
    paragraph = (ast.get_docstring(tree) or "").split("\n\n")[0]
    if not paragraph:
        return "no docstring"
    if "\n" in paragraph:
        return "the first paragraph is longer than one line"
    return None if paragraph.endswith(".") else "the first line does not end with a full stop"


def where(files: Iterable[Path], judge: object) -> list[str]:
    assert callable(judge)
    return [f"{file.relative_to(ROOT)}: {name}" for file in files for name in judge(names(file))]


def test_identifiers_are_in_american_spelling() -> None:
    found = where(FILES, british)
    assert not found, "\n".join(found)


def test_features_and_latents_are_not_called_units() -> None:
    found = where(PACKAGE, units) + [str(file.relative_to(ROOT)) for file in PACKAGE if units([file.stem])]
    assert not found, "\n".join(found)


def test_a_type_name_has_one_meaning() -> None:
    homes = defaultdict(set)
    for file in PACKAGE:
        for name in types(parse(file)):
            homes[name].add(str(file.relative_to(ROOT)))
    twice = [f"{name}: {', '.join(sorted(files))}" for name, files in homes.items() if len(files) > 1]
    assert not twice, "\n".join(twice)


def test_objects_are_shown_by_the_name_of_their_class() -> None:
    found = []
    for file in PACKAGE:
        for node in nodes(parse(file)):
            if isinstance(node, ast.ClassDef):
                for shown in shown_names(node):
                    if shown != node.name:
                        found.append(f"{file.relative_to(ROOT)}: {node.name} is shown as {shown}")
    assert not found, "\n".join(found)


def test_every_module_begins_with_one_sentence() -> None:
    found = [f"{file.relative_to(ROOT)}: {why}" for file in PACKAGE if (why := first_line(parse(file)))]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    "name", ["normaliser", "Colours", "tokenise", "labelled_rows", "re_centre", "PenalisedLoss", "_analyse"]
)
def test_planted_british_spelling_is_found(name: str) -> None:
    assert british([name]) == [name]


@pytest.mark.parametrize(
    "name", ["normalizer", "promise", "precision", "center", "analyses", "labeled", "raise_", "noise"]
)
def test_american_spelling_passes(name: str) -> None:
    assert not british([name])


def test_identifiers_of_every_kind_are_read() -> None:
    lines = [
        "import a.b as c",
        "from d import e",
        "class F(g, h=i): ...",
        "def j(k, /, l, *m, n: o = 1, **p) -> q:",
        "    global r",
        "    s.t = lambda u: f'{v}' 'not this'  # nor this",
        "    try: ...",
        "    except w as x: ...",
        "    match y:",
        "        case z(A=B, C=[*D]) | {**E}: ...",
    ]
    letters = "abcdeFghijklmnopqrstuvwxyzABCDE"
    assert identifiers(ast.parse("\n".join(lines))) == set(letters)


def test_planted_names_of_classes_are_read() -> None:
    lines = ["class A:", "    def __repr__(self) -> str:", '        return f"B({1})"']
    assert shown_names(ast.parse("\n".join(lines)).body[0]) == ["B"]


def test_planted_units_and_types_are_found() -> None:
    assert units(["dead_units", "UnitCounts", "unit", "community", "n_united"]) == ["UnitCounts", "dead_units"]
    lines = [
        'A = TypeVar("A")',
        'Item = TypeVar("Item")',
        'Mode = Literal["x"]',
        "LIMIT = 3",
        "class Row:",
        "    Side = int",
    ]
    assert sorted(types(ast.parse("\n".join(lines)))) == ["Mode", "Row", "Side"]


@pytest.mark.parametrize(
    ("docstring", "complaint"),
    [
        ("One line.", None),
        ("One.\n\nTwo.", None),
        ("One line", "full stop"),
        ("Two\nlines.", "longer"),
        ("", "no docstring"),
    ],
)
def test_planted_first_lines_are_judged(docstring: str, complaint: str | None) -> None:
    why = first_line(ast.parse(f'"""{docstring}"""'))
    assert why is None if complaint is None else complaint in str(why)

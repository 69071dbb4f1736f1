"""What scripts, benchmarks, notebooks and pages name of saelab is there: most of them are not run by the tests."""

import ast
import json
import re
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = sorted(
    path
    for folder, pattern in (
        ("scripts", "*.py"), ("benchmarks", "*.py"), ("tests", "**/*.py"), ("notebooks", "*.ipynb"),
        ("docs", "**/*.md"), (".", "*.md"),
    )
    for path in (ROOT / folder).glob(pattern)
    if path.name not in ("LOG.md", "CHANGELOG.md", "test_names.py")
)  # fmt: skip


def sources(path: Path) -> Iterator[str]:
    """Code of a file: a script whole, cells of a notebook, `python` blocks of a page."""
    text = path.read_text()
    if path.suffix == ".py":
        yield text
    elif path.suffix == ".ipynb":
        for cell in json.loads(text)["cells"]:
            if cell["cell_type"] == "code":
                yield re.sub(r"^(\s*)[%!].*$", r"\1pass", "".join(cell["source"]), flags=re.M)
    else:
        yield from re.findall(r"^```python\n(.*?)^```", text, re.M | re.S)


def names(source: str) -> Iterator[str]:
    """Dotted names below saelab that are imported, or reached through `sl`."""
    tree = ast.parse(source)
    inner = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "saelab":
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Attribute) and id(node) not in inner:
            dotted = ast.unparse(node)
            yield from ["saelab" + dotted[2:]] if re.fullmatch(r"sl(\.\w+)+", dotted) else []


def missing(name: str) -> bool:
    """Whether a dotted name leads nowhere; what follows a class or a function is not looked at."""
    thing, parts = import_module("saelab"), name.split(".")[1:]
    for i, part in enumerate(parts, start=1):
        if not hasattr(thing, part):
            try:
                import_module(".".join(["saelab", *parts[:i]]))
            except ImportError:
                return True
        thing = getattr(thing, part)
        if not hasattr(thing, "__path__") and not hasattr(thing, "__spec__"):
            return False
    return False


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_names_are_there(path: Path) -> None:
    named = {name for source in sources(path) for name in names(source)}
    assert not [name for name in sorted(named) if missing(name)]


def test_a_name_that_is_gone_is_found() -> None:
    gone = names(
        "import saelab as sl\nfrom saelab.steering.curves import Nothing\nsl.analysis.nothing(sl.SAE.x, sl.TopK)"
    )
    assert [name for name in gone if missing(name)] == ["saelab.steering.curves.Nothing", "saelab.analysis.nothing"]

"""Docstrings: `Args:` names every parameter, in order, wherever there are more than three.

Those of `__init__` may stand in the docstring of its class. A method that overrides a documented one of its base class
with the same parameters may leave them out.
"""

import ast
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest
from sources import nodes, parse

PACKAGE = Path(__file__).parents[1] / "saelab"
COMMANDS = PACKAGE / "cli"
SECTION = re.compile(r"^(Args|Returns|Yields|Raises|Attributes):$", re.M)
ENTRY = re.compile(r"^ {4}(\*{0,2}\w+):(?= |$)", re.M)


def functions(tree: ast.AST, inside: str = "") -> Iterator[tuple[str, ast.FunctionDef]]:
    """Public functions, and public methods and calls of public classes, with their dotted names."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            yield from functions(node, f"{inside}{node.name}.")
        if isinstance(node, ast.FunctionDef) and (node.name == "__call__" or not node.name.startswith("_")):
            yield inside + node.name, node


def constructors(tree: ast.AST) -> Iterator[tuple[ast.ClassDef, ast.FunctionDef]]:
    """Public classes with an `__init__` of their own."""
    for node in nodes(tree):
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            yield from ((node, one) for one in node.body if isinstance(one, ast.FunctionDef) and one.name == "__init__")


def parameters(node: ast.FunctionDef) -> list[str]:
    """Names as `Args:` lists them, `self` and `cls` aside."""
    args = node.args
    names = [a.arg for a in (*args.posonlyargs, *args.args)]
    names += [f"*{args.vararg.arg}"] if args.vararg else []
    names += [a.arg for a in args.kwonlyargs]
    names += [f"**{args.kwarg.arg}"] if args.kwarg else []
    return [n for n in names if n not in ("self", "cls")]


def listed(node: ast.FunctionDef | ast.ClassDef) -> list[str]:
    """The parameters that the section `Args:` names."""
    docstring = ast.get_docstring(node) or ""
    heads = list(SECTION.finditer(docstring))
    ends = [*(h.start() for h in heads[1:]), len(docstring)]
    sections = {h[1]: docstring[h.end() : end] for h, end in zip(heads, ends, strict=False)}
    return ENTRY.findall(sections.get("Args", ""))


def fault(node: ast.FunctionDef, of: ast.ClassDef | None = None) -> str | None:
    """What its docstring, or that of its class, lacks, or None."""
    names, found = parameters(node), listed(node) or (listed(of) if of else [])
    if len(names) > 3 and not found:
        return f"{len(names)} parameters and no `Args:`"
    if found and found != names:
        return f"`Args:` lists {found}, the signature has {names}"
    return None


def documented_overrides(trees: Iterable[ast.AST]) -> set[str]:
    """Methods without `Args:` whose base class, in any of the files, documents the same parameters."""
    classes = {node.name: node for tree in trees for node in nodes(tree) if isinstance(node, ast.ClassDef)}

    def bases(node: ast.ClassDef) -> Iterator[ast.ClassDef]:
        for base in node.bases:
            if isinstance(base, ast.Name) and base.id in classes:
                yield classes[base.id]
                yield from bases(classes[base.id])

    found = set()
    for node in classes.values():
        above = {name: method for base in bases(node) for name, method in functions(base)}
        for name, method in functions(node):
            if name in above and not listed(method) and listed(above[name]) == parameters(method):
                found.add(f"{node.name}.{name}")
    return found


def faults(package: Path) -> list[str]:
    found = []
    trees = {file: parse(file) for file in sorted(package.rglob("*.py"))}
    exempt = documented_overrides(trees.values())
    for file, tree in trees.items():
        if COMMANDS in file.parents:
            continue  # help of options is checked by the commands' own tests
        for name, node in functions(tree):
            if name not in exempt and (why := fault(node)):
                found.append(f"{file.relative_to(package.parent)}:{node.lineno} {name}: {why}")
        for made, node in constructors(tree):
            if why := fault(node, made):
                found.append(f"{file.relative_to(package.parent)}:{node.lineno} {made.name}: {why}")
    return found


def test_every_long_signature_is_explained() -> None:
    found = faults(PACKAGE)
    assert not found, "\n".join(found)


ONE = "    Args:\n        a: x.\n"
TWO = "    Args:\n        b: x.\n        a: x.\n"
ALL = "    Args:\n        a: x.\n        *b: x.\n        c: x.\n        **d: x.\n"


@pytest.mark.parametrize(
    ("signature", "section", "complaint"),
    [
        ("a, b, c, d", "", "no `Args:`"),
        ("a, b", TWO, "lists"),
        ("a, b", ONE, "lists"),
        ("a, b, *, c", "", None),
        ("a, *b, c, **d", ALL, None),
    ],
)
def test_a_planted_docstring_is_judged(signature: str, section: str, complaint: str | None) -> None:
    node = ast.parse(f'def f({signature}):\n    """Sum.\n\n{section}    """').body[0]
    assert isinstance(node, ast.FunctionDef)
    assert (fault(node) or "").find(complaint or "") >= 0
    assert complaint is not None or fault(node) is None


@pytest.mark.parametrize(
    ("section", "complaint"), [("", "no `Args:`"), (TWO, "lists"), (ALL.replace("*", "") + "        e: x.\n", "lists")]
)
def test_a_class_explains_what_it_is_made_with(section: str, complaint: str) -> None:
    code = (
        'class A:\n    """Sum.\n\n{}    """\n    def __init__(self, a, b, c, d): ...\n    def __call__(self, a): ...\n'
    )
    [(made, node)] = constructors(ast.parse(code.format(section)))
    assert complaint in (fault(node, made) or "")
    [(made, node)] = constructors(ast.parse(code.format(ALL.replace("*", ""))))
    assert fault(node, made) is None and fault(node) is not None
    assert [name for name, _ in functions(ast.parse(code))] == ["A.__call__"]
    assert not [*constructors(ast.parse(code.replace("class A", "class _A")))]


def test_an_override_may_leave_out_what_its_base_explains() -> None:
    args = "".join(f"            {name}: x.\n" for name in "abcd")
    base = f'class Base:\n    def f(self, a, b, c, d):\n        """Sum.\n\n        Args:\n{args}        """\n'
    same = "class Same(Base):\n    def f(self, a, b, c, d): ...\n"
    other = "class Other(Base):\n    def f(self, a, b, c, e): ...\n"
    assert documented_overrides([ast.parse(base), ast.parse(same + other)]) == {"Same.f"}
    assert not documented_overrides([ast.parse(base.replace("Args", "Notes") + same)])

"""Sources as syntax trees, read once by all tests of a process."""

import ast
from functools import cache
from pathlib import Path


def parse(file: Path) -> ast.Module:
    """The tree of a file as it is now; not to be changed, as others are given the same."""
    return _parse(file, file.stat().st_mtime_ns)


@cache
def nodes(tree: ast.AST) -> tuple[ast.AST, ...]:
    """All nodes of a tree, as `ast.walk` gives them."""
    return tuple(ast.walk(tree))


@cache
def _parse(file: Path, changed: int) -> ast.Module:
    return ast.parse(file.read_text())

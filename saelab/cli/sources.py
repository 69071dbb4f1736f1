"""Docstrings, defaults and choices of the library, read from its source files: help is shown without importing torch.

`saelab._lazy` reads the public names of packages in the same way.
"""

import ast
import re
from functools import cache
from importlib.util import find_spec
from itertools import pairwise
from typing import Any


class Source:
    """A function or dataclass of the library; its attributes are the defaults of the parameters or fields.

    >>> Source("saelab.training.config:TrainConfig").n_tokens
    2000000
    """

    def __init__(self, path: str) -> None:
        self.path = path

    def __getattr__(self, parameter: str) -> Any:
        if parameter not in (found := self._defaults()):
            raise AttributeError(f"`{self.path}` must have a default of '{parameter}', got none. Was it renamed?")
        return _evaluate(found[parameter], self.path)

    def describe(self) -> dict[str, str]:
        """Descriptions by parameter: of a function its `Args:` section, of a dataclass the docstrings under its
        fields.
        """
        node = self._definition()
        if isinstance(node, ast.ClassDef):
            return {
                ast.unparse(field.target): " ".join(ast.literal_eval(text.value).split())
                for field, text in pairwise(node.body)
                if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr)
            }
        section = re.search(r"^Args:\n((?: +.*\n?)+)", ast.get_docstring(node) or "", re.MULTILINE)
        parts = re.split(r"^ {4}(\w+): ", section[1], flags=re.MULTILINE)[1:] if section else []
        return {name: " ".join(text.split()) for name, text in zip(parts[::2], parts[1::2], strict=True)}

    def _definition(self) -> ast.FunctionDef | ast.ClassDef:
        module, _, name = self.path.partition(":")
        name, *inner = name.split(".")
        body: list[ast.stmt] = _parse(module, rf"(?:def|class) {name}\b")
        for part in (name, *inner):  # of several of one name, as of overloads, the last counts
            named = [node for node in body if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name == part]
            if not named:
                raise LookupError(f"`{self.path}` must be a function or class, got none. Was it renamed?")
            body = named[-1].body
        return named[-1]

    def _defaults(self) -> dict[str, ast.expr]:
        node = self._definition()
        if isinstance(node, ast.ClassDef):
            fields = [field for field in node.body if isinstance(field, ast.AnnAssign)]
            return {ast.unparse(field.target): field.value for field in fields if field.value is not None}
        named = [*node.args.posonlyargs, *node.args.args]
        pairs = [*zip(reversed(named), reversed(node.args.defaults), strict=False)]
        pairs += [(arg, value) for arg, value in zip(node.args.kwonlyargs, node.args.kw_defaults, strict=True) if value]
        return {arg.arg: value for arg, value in pairs}


def read_value(path: str) -> Any:
    """The value of a constant; of a `Literal` its choices, and of a registry, a dictionary by name, its names.

    >>> read_value("saelab.universality.matching:MatchingMethod")
    ('best', 'mutual', 'hungarian')
    """
    module, _, name = path.partition(":")
    for node in _parse(module, rf"(?:\w+, )*{name}\b[^=\n(]*="):
        assert isinstance(node, ast.Assign | ast.AnnAssign)
        target: Any = node.targets[0] if isinstance(node, ast.Assign) else node.target
        value: Any = node.value
        pairs = zip(target.elts, value.elts, strict=True) if isinstance(target, ast.Tuple) else [(target, value)]
        for one, its_value in pairs:
            if ast.unparse(one) == name:
                return _evaluate(its_value, path)
    raise LookupError(f"`{path}` must be a constant, got none. Was it renamed?")


def read_registered(module: str, decorator: str) -> dict[str, str]:
    """Name by class, for the classes of a module that `@decorator("name")` registers.

    >>> read_registered("saelab.sae.activation_functions", "register_activation")["TopK"]
    'topk'
    """
    pattern = rf'^@{decorator}\("(\w+)"\)\n(?:@.*\n)*class (\w+)'
    return {kind: name for name, kind in re.findall(pattern, _read(module), re.MULTILINE)}


def _evaluate(node: ast.expr, path: str) -> Any:
    """What an expression says, if it is made of literals and of constants of its module."""
    if isinstance(node, ast.Name):
        return read_value(f"{path.partition(':')[0]}:{node.id}")
    if isinstance(node, ast.Subscript) and ast.unparse(node.value) == "Literal":
        return ast.literal_eval(node.slice)
    if isinstance(node, ast.Dict):
        return tuple(ast.literal_eval(key) for key in node.keys if key is not None)
    try:
        return ast.literal_eval(node)
    except ValueError as error:
        raise LookupError(f"`{path}` must be written as a literal, got `{ast.unparse(node)}`.") from error


@cache
def _parse(module: str, start: str) -> list[ast.stmt]:
    """The statements at the top of a module whose first line begins with a pattern.

    Their lines alone are parsed, up to the next one at the margin: that takes a fifth of the time of a whole file.
    """
    lines = rf"^{start}.*\n(?:(?:[ \t)\]}}].*)?\n)*"
    return ast.parse("".join(re.findall(lines, _read(module), re.MULTILINE))).body


@cache
def _read(module: str) -> str:
    """The text of a module, which is not imported; only the packages around it are, and they import nothing."""
    spec = find_spec(module)
    if spec is None or spec.loader is None:
        raise LookupError(f"`{module}` must be a module, got none. Was it renamed?")
    return str(spec.loader.get_source(module))  # type: ignore[attr-defined]

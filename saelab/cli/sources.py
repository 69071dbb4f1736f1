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
        found: Any = _read_module(module)
        for part in name.split("."):  # of several of one name, as of overloads, the last counts
            kinds = [node for node in found.body if isinstance(node, ast.FunctionDef | ast.ClassDef)]
            found = next((node for node in reversed(kinds) if node.name == part), None)
            if found is None:
                raise LookupError(f"`{self.path}` must be a function or class, got none. Was it renamed?")
        return found

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
    for node in _read_module(module).body:
        target = node.targets[0] if isinstance(node, ast.Assign) else getattr(node, "target", None)
        value: Any = getattr(node, "value", None)
        pairs = zip(target.elts, value.elts, strict=True) if isinstance(target, ast.Tuple) else [(target, value)]
        for one, its_value in pairs:
            if isinstance(one, ast.Name) and one.id == name:
                return _evaluate(its_value, path)
    raise LookupError(f"`{path}` must be a constant, got none. Was it renamed?")


def read_registered(module: str, decorator: str) -> dict[str, str]:
    """Name by class, for the classes of a module that `@decorator("name")` registers.

    >>> read_registered("saelab.sae.activation_functions", "register_activation")["TopK"]
    'topk'
    """
    kinds = [node for node in _read_module(module).body if isinstance(node, ast.ClassDef)]
    calls = [(kind.name, call) for kind in kinds for call in kind.decorator_list if isinstance(call, ast.Call)]
    return {name: ast.literal_eval(call.args[0]) for name, call in calls if ast.unparse(call.func) == decorator}


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
def _read_module(name: str) -> ast.Module:
    """The syntax tree of a module, which is not imported; only the packages around it are, and they import nothing."""
    spec = find_spec(name)
    if spec is None or spec.loader is None:
        raise LookupError(f"`{name}` must be a module, got none. Was it renamed?")
    return ast.parse(spec.loader.get_source(name))  # type: ignore[attr-defined]

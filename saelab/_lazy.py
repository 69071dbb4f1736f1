"""Public names of packages that are imported from their modules when they are first used.

A package lists its names once, as imports under `if TYPE_CHECKING:` in its `__init__.py`. Type checkers and editors
read them as imports; `attach` reads the same lines at run time, so that `import saelab` loads nothing that is not used.
"""

import ast
import gc
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any


def attach(package: str) -> tuple[Callable[[str], Any], Callable[[], list[str]], list[str]]:
    """`__getattr__`, `__dir__` and `__all__` of a package, from the imports under `if TYPE_CHECKING:` in its file.

    Args:
        package: dotted name of the package that calls, its `__name__`.
    """
    module = sys.modules[package]
    assert module.__spec__ is not None and module.__spec__.loader is not None
    source = module.__spec__.loader.get_source(package)  # type: ignore[attr-defined]
    homes: dict[str, str] = {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            lines = [line for line in node.body if isinstance(line, ast.ImportFrom) and line.module]
            homes |= {alias.asname or alias.name: str(line.module) for line in lines for alias in line.names}

    def get(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}", name=name, obj=module)
        home = homes[name]
        with uncollected():
            value = import_module(f"{package}.{name}") if home == package else getattr(import_module(home), name)
        vars(module)[name] = value
        return value

    def list_names() -> list[str]:
        return sorted({*vars(module), *homes})

    return get, list_names, sorted(homes)


@contextmanager
def uncollected() -> Iterator[None]:
    """Context manager without garbage collection: of modules that are being imported it finds nothing to free, and with
    torch among them it takes a twelfth of their time.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if not gc.get_freeze_count():  # else somebody has frozen objects, which are to stay so
            gc.freeze()  # and the next line counts all as old: a collection of what is new need not go through them
            gc.unfreeze()
        if was_enabled:
            gc.enable()

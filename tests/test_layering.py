"""The floors, the doors and the order inside a package, read from the syntax tree (see CONTRIBUTING.md)."""

import ast
import re
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest
from sources import nodes, parse

import saelab

PACKAGE = Path(saelab.__file__).parent
FLOORS = {
    "functional": 0,
    "stores": 1,
    "training": 2,
    "lm": 3,
    "synthetic": 4,
    "sae": 4,
    "collecting": 5,
    "interventions": 6,
    "evaluation": 7,
    "analysis": 8,
    "circuits": 8,
    "geometry": 8,
    "probing": 8,
    "labels": 9,
    "steering": 9,
    "universality": 10,
    "interop": 10,
    "corpora": 10,
    "visualization": 11,
    "explorer": 12,
    "cli": 13,
    "__main__": 14,
}
DOORS = {"transformer_lens": "lm", "transformers": "lm", "sentence_transformers": "lm", "plotly": "visualization"}
ON_DEMAND = {"saelab.sae.estimator"}
"""modules that nobody else imports: they may import what is heavy at once"""
LAZY = "saelab._lazy"
HEAVY = {
    "transformer_lens",
    "transformers",
    "sentence_transformers",
    "datasets",
    "scipy",
    "sklearn",
    "plotly",
    "pandas",
    "pyarrow",
    "wandb",
}


def modules(package: Path) -> dict[str, ast.Module]:
    """Every module of the package by its dotted name, parsed."""
    found = {}
    for file in sorted(package.rglob("*.py")):
        parts = file.relative_to(package.parent).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = parse(file)
    return found


def targets(node: ast.AST, known: dict[str, ast.Module]) -> list[str]:
    """What one statement imports; `from a import b` names `a.b` where that is a module, `a` where it is not."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        base = "." * node.level + (node.module or "")
        return [name if (name := f"{base}.{alias.name}") in known else base for alias in node.names]
    return []


def imports(tree: ast.AST, known: dict[str, ast.Module]) -> list[str]:
    return [target for node in statements(tree) for target in targets(node, known)]


@cache
def statements(tree: ast.AST) -> list[ast.AST]:
    """Those that import."""
    return [node for node in nodes(tree) if isinstance(node, ast.Import | ast.ImportFrom)]


LATER = ast.FunctionDef | ast.AsyncFunctionDef | ast.expr
"""what holds no statement that runs at import"""


def at_import_time(tree: ast.AST, known: dict[str, ast.Module]) -> list[str]:
    """What is imported when the module is, not when one of its functions is called."""
    found = targets(tree, known)
    for child in ast.iter_child_nodes(tree):
        for_types = isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING"
        if not for_types and not isinstance(child, LATER):
            found += at_import_time(child, known)
    return found


def floor_fault(name: str, target: str) -> str | None:
    """Why `name` may not import `target`, or None where it may."""
    room = name.split(".")[1]
    outside = target.split(".")[0]
    if target.startswith("."):
        return "imports relatively; write the full name"
    if outside in DOORS and room != DOORS[outside]:
        return f"only saelab.{DOORS[outside]} may import {outside}"
    if outside != "saelab" or target == LAZY or target.startswith(f"saelab.{room}.") or target == f"saelab.{room}":
        return None
    there = target.split(".")[1] if "." in target else None
    if there not in FLOORS or FLOORS[there] >= FLOORS[room]:
        return f"floor {FLOORS[room]} may import only from the floors below"
    return None


def cycle(known: dict[str, ast.Module]) -> list[str]:
    graph = {name: {t for t in imports(tree, known) if t in known and t != name} for name, tree in known.items()}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return [f"import cycle: {' -> '.join(reversed(error.args[1]))}"]
    return []


def faults(package: Path) -> list[str]:
    known = modules(package)
    found = cycle(known)
    for name, tree in known.items():
        if name in ("saelab", LAZY):
            continue  # the list of public names stands above all floors, what reads such lists below
        if name.split(".")[1] not in FLOORS:
            found.append(f"{name} has no floor: add its package to FLOORS")
            continue
        late = [(t, why) for t in imports(tree, known) if (why := floor_fault(name, t))]
        found += [f"{name} -> {target}: {why}" for target, why in late]
        found += [f"{name} -> {target}: on demand alone" for target in ON_DEMAND.intersection(imports(tree, known))]
        heavy = {t for t in at_import_time(tree, known) if t.split(".")[0] in HEAVY and name not in ON_DEMAND}
        found += [f"{name} -> {target}: import it inside the function that uses it" for target in sorted(heavy)]
    return found


def test_every_import_goes_down() -> None:
    found = faults(PACKAGE)
    assert not found, "\n".join(found)


LONGEST = 500
"""lines of a file that is still read as one thing"""
OWN_RIGHT = ("saelab.cli.", "saelab.sae.formats.", "saelab.visualization.demo_page", "saelab.explorer.pages")
"""commands, file formats and pages"""


def fragments(package: Path) -> list[str]:
    """Files that only one other imports, though they hold no public name and both would fit in one file."""
    known = modules(package)
    read = {name: set(imports(tree, known)) for name, tree in known.items()}
    packages = {name for name in known if (package.parent / name.replace(".", "/")).is_dir()}
    listed = {target for name in packages for target in read[name]}
    found = []
    for name in sorted(set(known) - packages - listed - {LAZY}):
        users = [user for user, targets in read.items() if name in targets and user not in packages]
        if len(users) == 1 and not name.startswith(OWN_RIGHT):
            lines = [
                len((package.parent / f"{n.replace('.', '/')}.py").read_text().splitlines()) for n in (name, *users)
            ]
            if sum(lines) <= LONGEST:
                found.append(f"{name}: only {users[0]} imports it, put it there")
    return found


def test_no_file_is_a_fragment_of_another(tmp_path: Path) -> None:
    assert not fragments(PACKAGE)
    plant(tmp_path, "__init__.py", "")
    plant(tmp_path, "sae/__init__.py", "")
    plant(tmp_path, "sae/config.py", "from saelab.sae.private import f\n")
    plant(tmp_path, "sae/private.py", "def f(): pass\n")
    assert fragments(tmp_path / "saelab") == ["saelab.sae.private: only saelab.sae.config imports it, put it there"]
    plant(tmp_path, "sae/module.py", "from saelab.sae.private import f\n")
    assert not fragments(tmp_path / "saelab")


def test_the_package_has_few_files_and_tests_beside_each_package() -> None:
    files = {str(file.relative_to(PACKAGE)): len(file.read_text().splitlines()) for file in PACKAGE.rglob("*.py")}
    assert len(files) <= 440 and not {name: n for name, n in files.items() if n > LONGEST}
    tests = Path(__file__).parent
    for file in tests.rglob("test_*.py"):
        if file.parent in (tests, tests / "families"):
            continue  # what is about no single module
        names = [path.stem for path in (PACKAGE / file.parent.relative_to(tests)).glob("*.py")]
        assert any(f"{file.stem}_".startswith(f"test_{name}_") for name in names), f"{file}: no module of this name"


def test_contributing_has_the_same_floors() -> None:
    text = (Path(__file__).parents[1] / "CONTRIBUTING.md").read_text()
    rows = re.findall(r"^\| (\d+) \| (`[^|]+`) \|", text, re.M)
    assert {name: int(floor) for floor, cell in rows for name in re.findall(r"`(\w+)`", cell)} == FLOORS


@pytest.mark.parametrize(
    ("path", "source", "complaint"),
    [
        ("functional/sums.py", "from saelab.stores import files", "floor 0 may import only"),
        ("functional/sums.py", "def f():\n    import saelab.sae.module", "floor 0 may import only"),
        ("collecting/scores.py", "from saelab.evaluation.evaluation import evaluate", "floor 5 may import only"),
        ("sae/module.py", "from saelab import evaluate", "floor 4 may import only"),
        ("sae/module.py", "from .config import SAEConfig", "imports relatively"),
        ("sae/module.py", "def f():\n    from transformers import AutoModel", "only saelab.lm may import"),
        ("cli/app.py", "def f():\n    import transformer_lens.model_bridge", "only saelab.lm may import"),
        ("evaluation/scores.py", "def f():\n    import plotly.graph_objects", "only saelab.visualization may import"),
        ("lm/models.py", "from transformers import AutoModel", "import it inside the function"),
        ("lm/models.py", "if True:\n    import transformer_lens", "import it inside the function"),
        ("functional/sums.py", "class A:\n    from scipy import sparse", "import it inside the function"),
        ("attic/old.py", "", "has no floor"),
        ("sae/module.py", "from saelab.sae import config\n", "import cycle"),
    ],
)
def test_a_planted_fault_is_found(tmp_path: Path, path: str, source: str, complaint: str) -> None:
    plant(tmp_path, "sae/config.py", "from saelab.sae.module import SAE\n" if "cycle" in complaint else "")
    plant(tmp_path, "stores/files.py", "import json\n")
    plant(tmp_path, "__init__.py", "from saelab.sae.config import SAEConfig\n")
    assert not [fault for fault in faults(tmp_path / "saelab") if "cycle" not in fault]
    plant(tmp_path, path, source)
    assert any(complaint in fault for fault in faults(tmp_path / "saelab")), faults(tmp_path / "saelab")


def plant(root: Path, path: str, source: str) -> None:
    file = root / "saelab" / path
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(source)


def test_an_import_downwards_is_allowed(tmp_path: Path) -> None:
    plant(tmp_path, "functional/sums.py", "import torch\n")
    plant(tmp_path, "sae/config.py", "from saelab.functional.sums import total\nfrom saelab.functional import sums\n")
    plant(tmp_path, "sae/module.py", "from saelab.sae.config import SAEConfig\n")
    plant(tmp_path, "lm/models.py", "def load():\n    from transformers import AutoModel\n")
    assert not faults(tmp_path / "saelab")

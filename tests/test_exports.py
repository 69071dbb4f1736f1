"""The public names: listed, described, complete, cheap to import, and a short list at the top."""

import gc
import inspect
import pkgutil
import subprocess
import sys
import weakref
from collections.abc import Iterator
from importlib import import_module, metadata
from types import ModuleType
from typing import Any, get_args, get_type_hints

import pytest

import saelab
from saelab._lazy import uncollected

HEAVY = [
    "IPython", "datasets", "matplotlib", "pandas", "plotly", "pyarrow", "scipy", "sklearn", "transformer_lens",
    "transformers", "typer", "wandb",
]  # fmt: skip
PACKAGES = ["saelab"] + [
    module.name
    for module in pkgutil.walk_packages(saelab.__path__, "saelab.")
    if module.ispkg and module.name not in ("saelab.cli", "saelab.visualization.assets")
]
NAMES = [(package, name) for package in PACKAGES for name in import_module(package).__all__]
THINGS = [(package, name) for package, name in NAMES if not inspect.ismodule(getattr(import_module(package), name))]


def get(package: str, name: str) -> Any:
    return getattr(import_module(package), name)


def test_the_top_is_short_and_each_package_lists_itself() -> None:
    top = [name for package, name in THINGS if package == "saelab"]
    assert 30 <= len(top) <= 52
    assert {"analysis", "interventions", "labels", "sae", "universality"} <= set(dir(saelab))
    for package in PACKAGES:
        module = import_module(package)
        assert list(module.__all__) == sorted(module.__all__) and set(module.__all__) <= set(dir(module))


def test_what_is_at_the_top_is_one_with_what_is_below() -> None:
    homes = {name: package for package, name in THINGS if package != "saelab"}
    for package, name in THINGS:
        if package == "saelab":
            assert get(package, name) is get(homes[name], name)
    names = [name for package, name in THINGS if package != "saelab"]
    assert len(names) == len(set(names)), "one name, one thing"


def test_no_public_name_is_that_of_a_module_beside_it() -> None:
    """Python sets a module as an attribute of its package when it is imported, and would hide a function."""
    for package in PACKAGES:
        found = list(pkgutil.iter_modules(import_module(package).__path__))
        files, packages = ({m.name for m in found if m.ispkg is kind} for kind in (False, True))
        assert not {name for home, name in NAMES if home == package} & files, package
        assert not {name for home, name in THINGS if home == package} & packages, package


def test_a_name_that_is_not_there_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match=r"module 'saelab.analysis' has no attribute 'logit_len'"):
        _ = get("saelab.analysis", "logit_len")


@pytest.mark.parametrize(("package", "name"), THINGS)
def test_public_name_is_described_and_typed(package: str, name: str) -> None:
    thing = get(package, name)
    if not (inspect.isclass(thing) or inspect.isfunction(thing)):
        return  # a type alias
    doc = thing.__doc__ or ""
    assert doc.split("\n\n")[0].strip().endswith((".", ":")), f"{package}.{name}: the docstring opens with one sentence"
    if inspect.isfunction(thing):
        signature = inspect.signature(thing)
        assert signature.return_annotation is not inspect.Signature.empty
        assert all(p.annotation is not inspect.Parameter.empty for p in signature.parameters.values())


def mentioned(thing: Any) -> Iterator[type]:
    """Classes of ours in the signature of a function, and in those of the public methods and fields of a class."""
    faces = [thing] if inspect.isclass(thing) or inspect.isfunction(thing) else []
    if inspect.isclass(thing):
        faces += [f for n, f in vars(thing).items() if inspect.isfunction(f) and (n == "__init__" or n[0] != "_")]
    for face in faces:
        try:
            hints = list(get_type_hints(face).values())
        except (NameError, TypeError):  # what is imported for type checkers alone
            continue
        while hints:
            hint = hints.pop()
            hints += get_args(hint)
            if inspect.isclass(hint) and hint.__module__.startswith("saelab.") and not hint.__name__.startswith("_"):
                yield hint


@pytest.mark.parametrize("package", PACKAGES)
def test_what_a_public_signature_mentions_is_public(package: str) -> None:
    public = {id(get(*pair)) for pair in THINGS}
    missing = {
        f"{hint.__module__}.{hint.__qualname__} of {package}.{name}"
        for other, name in THINGS
        if other == package
        for hint in mentioned(get(package, name))
        if id(hint) not in public
    }
    assert not missing, missing


def test_version_is_the_installed_one() -> None:
    assert saelab.__version__ == metadata.version("saelab")


def test_a_checkout_that_is_not_installed_imports() -> None:
    code = (
        "from importlib import metadata\n"
        "def find_nothing(name): raise metadata.PackageNotFoundError(name)\n"
        "metadata.version = find_nothing\n"
        "import saelab; print(saelab.__version__)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "0+unknown"


def test_import_is_light() -> None:
    code = f"import sys, saelab; saelab.SAE; saelab.collect; print(*(m for m in {HEAVY} if m in sys.modules))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.split() == [], "import these where they are used"


def test_nothing_is_loaded_before_it_is_used() -> None:
    code = "import sys, saelab; print(*(m for m in sys.modules if m.startswith('saelab.')))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.split() == ["saelab._lazy"]


def test_packages_help() -> None:
    code = "import saelab as sl; help(sl.interventions)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "steer(" in run.stdout and isinstance(saelab.interventions, ModuleType)


@pytest.fixture
def thawed() -> Iterator[None]:
    """Nothing is frozen here, as in a process of a user; `conftest.py` freezes what was there before the first test."""
    gc.unfreeze()
    yield
    gc.freeze()


@pytest.mark.usefixtures("thawed")
@pytest.mark.parametrize("enabled", [True, False])
def test_garbage_is_collected_as_before_once_names_are_imported(enabled: bool) -> None:
    class Cycle:
        """Refers to itself."""

    gone: list[str] = []
    try:
        (gc.enable if enabled else gc.disable)()
        with pytest.raises(ImportError), uncollected():
            assert not gc.isenabled()
            cycle = Cycle()
            cycle.own = cycle  # type: ignore[attr-defined]
            weakref.finalize(cycle, gone.append, "cycle")
            del cycle
            raise ImportError
        assert gc.isenabled() is enabled and gc.get_freeze_count() == 0 and not gone
        gc.collect()
        assert gone == ["cycle"]
    finally:
        gc.enable()


def test_what_others_froze_stays_frozen() -> None:
    gc.freeze()
    count = gc.get_freeze_count()
    with uncollected():
        pass
    assert gc.get_freeze_count() == count > 0

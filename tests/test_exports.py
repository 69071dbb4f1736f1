"""The public names: listed, sorted, described, and cheap to import."""

import inspect
import runpy
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from types import ModuleType

import pytest

import saelab

HEAVY = [
    "IPython", "datasets", "matplotlib", "pandas", "plotly", "pyarrow", "scipy", "sklearn", "transformer_lens",
    "transformers", "typer", "wandb",
]  # fmt: skip


def test_all_is_sorted_and_complete() -> None:
    public = {n for n in dir(saelab) if not n.startswith("_") and not isinstance(getattr(saelab, n), ModuleType)}
    assert list(saelab.__all__) == sorted(saelab.__all__)
    assert set(saelab.__all__) - {"__version__"} == public


def test_no_public_name_is_also_a_module() -> None:
    """`import saelab.evaluate` must not give a function."""
    files = {path.stem for path in Path(saelab.__file__).parent.rglob("*.py")}
    folders = {path.name for path in Path(saelab.__file__).parent.iterdir() if path.is_dir()}
    assert not set(saelab.__all__) & (files | folders)


@pytest.mark.parametrize("name", [n for n in saelab.__all__ if callable(getattr(saelab, n))])
def test_public_name_is_described_and_typed(name: str) -> None:
    thing = getattr(saelab, name)
    doc = thing.__doc__ or ""
    assert doc.split("\n\n")[0].strip().endswith((".", ":")), f"saelab.{name}: the docstring opens with one sentence"
    if inspect.isfunction(thing):
        signature = inspect.signature(thing)
        assert signature.return_annotation is not inspect.Signature.empty
        assert all(p.annotation is not inspect.Parameter.empty for p in signature.parameters.values())


def test_version_is_the_installed_one() -> None:
    assert saelab.__version__ == metadata.version("saelab")


def test_a_checkout_that_is_not_installed_imports(monkeypatch: pytest.MonkeyPatch) -> None:
    def find_nothing(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", find_nothing)
    assert runpy.run_path(saelab.__file__)["__version__"] == "0+unknown"


def test_import_is_light() -> None:
    code = f"import sys, saelab; print(*(m for m in {HEAVY} if m in sys.modules))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.split() == [], "import these where they are used"

"""The versions that are tested are those that pyproject.toml promises."""

import ast
import re
import sys
from pathlib import Path

import pytest

import saelab

ROOT = Path(__file__).parents[1]
TOOLS = {
    "build",
    "mypy",
    "pre-commit",
    "pre-commit-hooks",
    "pytest-cov",
    "ruff",
    "setuptools",
    "twine",
}  # they decide nothing about results


def read_bounds() -> dict[str, str]:
    """The lower bound of every requirement but the peers' and the loggers', by name."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    lists = [
        re.search(rf"^{name} = \[(.*?)\]$", text, re.M | re.S)
        for name in ("dependencies", "datasets", "fast", "llm", "widgets", "dev")
    ]
    found = [bound for part in lists if part for bound in re.findall(r'"([\w-]+)>=([\d.]+)', part[1])]
    assert len(found) > 20
    return {name: version for name, version in found if name not in TOOLS}


def test_the_oldest_versions_are_the_lower_bounds() -> None:
    if not (ROOT / "constraints-oldest.txt").is_file():
        pytest.skip("no constraints here: installed without its repository")
    lines = (ROOT / "constraints-oldest.txt").read_text(encoding="utf-8").splitlines()
    pinned = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    assert pinned == read_bounds()


def test_what_is_imported_is_declared() -> None:
    declared = {name.lower().replace("-", "_") for name in read_bounds()}
    imported = {"scikit_learn" if name == "sklearn" else name for name in find_imports()}
    # by declared packages; triton by a torch that was built for CUDA
    brought_along = {"pandas", "tokenizers", "ipython", "filelock", "traitlets", "triton", "llvmlite"}
    asked_for = {"wandb", "tensorboard", "polars", "sentence_transformers"}  # where they are missing
    assert imported - declared <= brought_along | asked_for


def test_the_citation_and_the_changelog_are_of_this_version() -> None:
    if not (ROOT / "CITATION.cff").is_file():
        pytest.skip("no citation here: installed without its repository")
    version = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.M)
    assert version
    assert f"\nversion: {version[1]}\n" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    newest = re.search(r"^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.M)
    assert newest and newest[1] in ("Unreleased", version[1])


def find_imports() -> set[str]:
    """The packages outside the standard library that saelab imports anywhere."""
    found = set()
    for path in Path(saelab.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            found |= {name.partition(".")[0] for name in names}
    return {name.lower() for name in found - sys.stdlib_module_names - {"saelab"}}


def test_no_advice_needs_an_index_that_has_saelab() -> None:
    """It is on none: what is missing is advised by its own name, or from a folder (`pip install '.[llm]'`)."""
    files = [path for folder in ("saelab", "docs", "notebooks") for path in (ROOT / folder).rglob("*")]
    texts = {path: path.read_text(encoding="utf-8") for path in files if path.suffix in (".py", ".md", ".ipynb")}
    assert len(texts) > 300
    advice = re.compile(r"(?:pip |uv pip )?install (?:-\S+ )*[`'\\\"]*saelab\b")
    assert not [str(path) for path, text in texts.items() if advice.search(text)]

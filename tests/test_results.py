"""The page of methods says what is saved, no more and no less."""

import importlib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def test_the_page_of_methods_is_made_from_its_results(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "scripts")
    page = importlib.import_module("methods.page")
    results = ROOT / "docs" / "results" / "methods"
    assert page.make_page(results) == results.with_suffix(".md").read_text(encoding="utf-8")

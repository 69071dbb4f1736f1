"""Long tables of cases: some of them run each time, all of them with `pytest -m slow`."""

from collections.abc import Collection, Iterable
from typing import Any

import pytest


def one_in(n: int, cases: Iterable[Any], always: Collection[Any] = ()) -> list[Any]:
    """Parameters of a test: every n-th case, the first among them, and those that always run; the others are slow."""
    found = []
    for i, case in enumerate(cases):
        values = case if isinstance(case, tuple) else (case,)
        marks = () if i % n == 0 or values[0] in always else (pytest.mark.slow,)
        found.append(pytest.param(*values, marks=marks))
    return found

"""Every command, cut off at its file events or stopped by a full disk: nothing half-written passes for whole, and the
same command again ends with the bytes of an undisturbed run. `make kills` tries every event.
"""

import sys
from pathlib import Path

import pytest
from kills import cases, check
from processes import Child

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="processes are forked")
SAMPLE = {"save over an SAE": 3, "collect --overwrite": 2, "train": 2}
"""cases of the suite, and how many of their events"""


def run(folder: Path, points: dict[str, int | None], hows: list[str], timeout: float) -> None:
    child = Child(folder / "errors.txt", check, str(folder), points, hows)
    assert child.wait(timeout) == (0, "")


def test_some_events(tmp_path: Path) -> None:
    run(tmp_path, SAMPLE, ["kill", "full"], 600)  # ends a child that hangs; a busy machine took more than 120


@pytest.mark.slow
@pytest.mark.parametrize("name", [case.name for case in cases()])
def test_every_event(name: str, tmp_path: Path) -> None:
    run(tmp_path, {name: None}, ["kill", "full"], 1800)

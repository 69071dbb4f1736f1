"""Blocks of the README and of the guides in docs/, run in order, each page in an empty folder of its own: `python` in
one namespace, `sh` as saelab's own commands.
"""

import re
import shlex
import sys
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import pytest
from unchecked import unchecked

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "docs" / "index.md", *sorted((ROOT / "docs" / "how-to").glob("*.md"))]
NAMES = [str(path.relative_to(ROOT)) for path in PAGES]


class Block(NamedTuple):
    """One fenced block: its info string, the line it starts on, its text."""

    kind: str
    line: int
    text: str


def blocks(markdown: str) -> list[Block]:
    fence = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```", re.MULTILINE | re.DOTALL)
    found = fence.finditer(markdown)
    return [Block(m[1], markdown.count("\n", 0, m.start()) + 1, m[2]) for m in found]


def run_python(block: Block, namespace: dict[str, Any], page: str) -> None:
    padded = "\n" * block.line + block.text  # a traceback shows the page's own line number
    exec(compile(padded, page, "exec"), namespace)


def run_shell(block: Block, monkeypatch: pytest.MonkeyPatch, page: str) -> None:
    """Run each command through the installed entry point, in this process: importing torch four times takes longer."""
    from saelab.cli.app import main

    for command in block.text.replace("\\\n", " ").splitlines():
        words = shlex.split(command, comments=True)
        if not words:
            continue
        assert words[0] == "saelab", (
            f"{page}, line {block.line}: a `sh` block holds saelab commands; mark others `text`"
        )
        monkeypatch.setattr(sys, "argv", words)
        try:
            code = main()
        except SystemExit as stop:
            code = stop.code
        assert not code, f"{page}, line {block.line}: `{command}` exits with {code}"


@unchecked()  # as its readers have it
@pytest.mark.parametrize("path", PAGES, ids=NAMES)
def test_page_runs(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    namespace: dict[str, Any] = {"__name__": "page"}
    for block in blocks(path.read_text(encoding="utf-8")):
        if block.kind == "python":
            run_python(block, namespace, str(path))
        elif block.kind == "sh":
            run_shell(block, monkeypatch, str(path))


@pytest.mark.parametrize("path", PAGES, ids=NAMES)
def test_every_block_says_what_it_is(path: Path) -> None:
    assert {block.kind for block in blocks(path.read_text(encoding="utf-8"))} <= {"python", "sh", "text"}


def test_the_guides_are_found() -> None:
    assert len(PAGES) > 8 and all(path.is_file() for path in PAGES)
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150


def test_blocks_are_found_with_their_lines() -> None:
    found = blocks("a\n```python\nx = 1\n```\n\n```sh\nsaelab info\n```\n")
    assert found == [Block("python", 2, "x = 1\n"), Block("sh", 6, "saelab info\n")]


def test_a_shell_block_runs_the_commands_and_stops_at_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[str]] = []

    def main() -> None:
        seen.append(sys.argv[1:])
        raise SystemExit(2 if "bad" in sys.argv else 0)

    monkeypatch.setitem(sys.modules, "saelab.cli", ModuleType("saelab.cli"))
    monkeypatch.setitem(sys.modules, "saelab.cli.app", ModuleType("saelab.cli.app"))
    monkeypatch.setattr(sys.modules["saelab.cli.app"], "main", main, raising=False)
    run_shell(Block("sh", 1, "saelab info a \\\n  --json 'b c'  # why\n\nsaelab info d\n"), monkeypatch, "a.md")
    assert seen == [["info", "a", "--json", "b c"], ["info", "d"]]
    with pytest.raises(AssertionError, match="exits with 2"):
        run_shell(Block("sh", 1, "saelab bad\n"), monkeypatch, "a.md")
    with pytest.raises(AssertionError, match="holds saelab commands"):
        run_shell(Block("sh", 1, "rm x\n"), monkeypatch, "a.md")


def test_a_wrong_block_fails_on_its_own_line() -> None:
    with pytest.raises(ZeroDivisionError) as error:
        run_python(Block("python", 41, "x = 1\nx / 0\n"), {}, "a.md")
    assert error.traceback[-1].lineno + 1 == 43

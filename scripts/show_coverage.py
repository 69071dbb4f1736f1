"""Writes which share of each package the tests run, from coverage's JSON, as a page: `make coverage`."""

import argparse
import json
import sys
from collections import defaultdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

HEAD = """# Coverage

The share of saelab's statements that run in `make test`: tests and doctests, without those marked slow, and without
what tests start in processes of their own. Tests that need a real model and text outside the repository are skipped
where these are missing. The page is written by `make coverage`, which also writes a page per file
(`build/coverage/html`) and `build/coverage/coverage.xml`.

"""


def sum_packages(files: dict[str, Any]) -> dict[str, tuple[int, int]]:
    """Statements and covered statements by package, the modules at the top of saelab under `saelab`."""
    sums: dict[str, tuple[int, int]] = defaultdict(lambda: (0, 0))
    for name, file in files.items():
        package = ".".join(Path(name).parts[:2]) if len(Path(name).parts) > 2 else "saelab"
        n, covered = sums[package]
        sums[package] = n + file["summary"]["num_statements"], covered + file["summary"]["covered_lines"]
    return dict(sorted(sums.items()))


def format_page(found: dict[str, Any]) -> str:
    """The page: the total first, then a row for each package."""
    rows = sum_packages(found["files"])
    n, covered = (sum(column) for column in zip(*rows.values(), strict=True))
    python = ".".join(map(str, sys.version_info[:2]))
    lines = [
        f"**{covered / n:.1%}** of {n:,} statements: Python {python}, torch {version('torch')}, "
        f"transformers {version('transformers')}, transformer-lens {version('transformer-lens')}.",
        "",
        "| package | statements | not run | covered |",
        "|---|---|---|---|",
        *(f"| `{name}` | {n:,} | {n - ran:,} | {ran / n:.1%} |" for name, (n, ran) in rows.items() if n),
    ]
    return HEAD + "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").strip())
    parser.add_argument("json", type=Path, help="what `coverage json` wrote")
    parser.add_argument("page", type=Path, help="the page to write")
    args = parser.parse_args()
    page = format_page(json.loads(args.json.read_text(encoding="utf-8")))
    args.page.write_text(page, encoding="utf-8")
    print(next(line for line in page.splitlines() if line.startswith("**")))


if __name__ == "__main__":
    main()

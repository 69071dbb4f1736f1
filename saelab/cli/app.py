"""The entry point `saelab`: the commands, and the demo."""

import sys

from saelab.cli.commands import app, dispatch, guard
from saelab.cli.demo import run_demo

app.command("demo")(guard(run_demo))


def main() -> int:
    """Run the command line; returns the exit code."""
    return dispatch(sys.argv[1:] or ["--help"])

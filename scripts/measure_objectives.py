"""What each loss term of `saelab.sae.objectives` does for a dictionary, beside its baselines, at several seeds.

    python scripts/measure_objectives.py multi_topk --seeds 0 1 2

A subcommand is a module of scripts/objectives: `describe` adds its options, `measure` prints its table.
"""

import argparse
import pkgutil
from importlib import import_module
from pathlib import Path

FOLDER = Path(__file__).parent / "objectives"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    for found in pkgutil.iter_modules([str(FOLDER)]):
        module = import_module(f"objectives.{found.name}")
        if not hasattr(module, "measure"):
            continue  # what the others share
        about = module.__doc__
        command = commands.add_parser(
            found.name,
            description=about,
            help=about.splitlines()[0],
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
        command.add_argument("--n-tokens", type=int, default=400_000, help="to train each dictionary on")
        module.describe(command)
        command.set_defaults(measure=module.measure)
    args = parser.parse_args()
    args.measure(args)


if __name__ == "__main__":
    main()

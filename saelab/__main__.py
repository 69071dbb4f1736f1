"""`python -m saelab`, and so `torchrun -m saelab`: the command line."""

import sys

from saelab.cli.app import main

if __name__ == "__main__":
    sys.exit(main())

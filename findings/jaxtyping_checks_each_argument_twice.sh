#!/bin/sh
# jaxtyping 0.3.11 with beartype 0.23.1, no other library: a function under `jaxtyped(typechecker=beartype)`, which is
# also what the import hook puts on every function, has each argument checked twice a call: once for its message, on a
# copy of the signature without the result, and once by the function itself. beartype alone checks once. Where a check
# is not free, as of a large container or a Protocol, a call costs twice as much, and binding the arguments comes on top.
#
# Seen: "beartype alone: 1 check a call, jaxtyped: 2".
# Exits 1 if that changes.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
cd "$folder"
cat > try.py <<'PYTHON'
import sys

from beartype import beartype
from jaxtyping import jaxtyped

asked = []


class Asked(type):
    def __instancecheck__(cls, thing):
        asked.append(thing)
        return True


class Thing(metaclass=Asked):
    pass


def second(thing: Thing, n: int) -> int:
    return n


def count(function):
    function(1, 2)  # whatever is made at the first call
    asked.clear()
    function(1, 2)
    return len(asked)


alone, both = count(beartype(second)), count(jaxtyped(second, typechecker=beartype))
print(f"beartype alone: {alone} check a call, jaxtyped: {both}")
sys.exit((alone, both) != (1, 2))
PYTHON
env/bin/pip install -q jaxtyping==0.3.11 beartype==0.23.1 > /dev/null 2>&1
env/bin/python try.py

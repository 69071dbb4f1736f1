#!/bin/sh
# eai-delphi 0.1.3 (and its repository in November 2025), torch 2.13.0: `center_examples`, "if True, the examples will be
# centered on the latent activation", does the opposite. By default, True, examples are the windows of the text as they lie,
# with the activation anywhere; False gives windows around it, nearly all with their largest activation at one place (and
# none from the first and last window of a row). Who leaves the default explains and scores windows that are not centered.
#
# Seen: "center_examples=True: largest activation at 32 of 32 places, False: at 7". Exits 1 if that changes.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install -q torch==2.13.0 numpy transformers==5.23.0 simple_parsing jaxtyping orjson tqdm > /dev/null 2>&1
"$folder/env/bin/pip" install -q --no-deps eai-delphi==0.1.3 > /dev/null 2>&1
cd "$folder"
env/bin/python -W ignore - <<'PYTHON'
import importlib.util
import sys
import types

import torch


class Unused(types.ModuleType):
    """What embeddings, remote files and other examples need, and this does not."""

    __path__ = []

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return object


for name in ("faiss", "sentence_transformers", "blobfile"):
    sys.modules[name] = Unused(name)
for name in ("delphi", "delphi.latents"):  # without their tops, which import servers
    package = types.ModuleType(name)
    package.__path__ = list(importlib.util.find_spec("delphi").submodule_search_locations) if name == "delphi" else [
        sys.modules["delphi"].__path__[0] + "/latents"
    ]
    sys.modules[name] = package
import logging

sys.modules["delphi"].logger = logging.getLogger("delphi")
from delphi.config import ConstructorConfig
from delphi.latents.constructors import constructor
from delphi.latents.latents import ActivationData, Latent, LatentRecord

g = torch.Generator().manual_seed(0)
n_rows, length, window = 200, 256, 32
tokens = torch.randint(0, 99, (n_rows, length), generator=g)
places = torch.stack([torch.arange(n_rows).repeat_interleave(2), torch.randint(0, length, (2 * n_rows,), generator=g)], 1)
places = torch.unique(places, dim=0)
data = ActivationData(torch.cat([places, torch.zeros(len(places), 1, dtype=torch.long)], 1), torch.rand(len(places), generator=g) + 0.1)


class Tokenizer:
    def batch_decode(self, rows):
        return [str(int(i)) for i in rows.flatten()]


def count(center):
    how = ConstructorConfig(example_ctx_len=window, min_examples=1, n_non_activating=2, center_examples=center)
    record = constructor(LatentRecord(Latent("m", 0)), data, how, tokens, Tokenizer())
    return len({int(example.activations.argmax()) for example in record.examples})


told, other = count(True), count(False)
print(f"center_examples=True: largest activation at {told} of {window} places, False: at {other}")
sys.exit(not (told > 20 and other < 12))
PYTHON

#!/bin/sh
# sae-lens 6.54.12: its registry of published SAEs says that the release gemma-scope-9b-it-res is of gemma-2-9b; the same
# repository's canonical release is said to be of gemma-2-9b-it, as the repository's own name has it. Who takes the model
# from the registry's entry reads the base model's activations with SAEs of the instruction-tuned one. In the release
# gpt2-small-res_scefr-ajt one SAE of the list holds a list of SAEs itself, a copy of the release's.
#
# Seen: "gemma-scope-9b-it-res: gemma-2-9b, gemma-scope-9b-it-res-canonical: gemma-2-9b-it, both of
# google/gemma-scope-9b-it-res; lists within lists: gpt2-small-res_scefr-ajt". Exits 1 if that changes.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install -q PyYAML==6.0.3 > /dev/null 2>&1
"$folder/env/bin/pip" install -q --no-deps sae-lens==6.54.12 > /dev/null 2>&1
cd "$folder"
env/bin/python - <<'PYTHON'
import sys
import sysconfig
from pathlib import Path

import yaml

(file,) = Path(sysconfig.get_path("purelib")).glob("sae_lens/**/pretrained_saes.yaml")
registry = yaml.load(file.read_text(encoding="utf-8"), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
plain, canonical = (registry[f"gemma-scope-9b-it-res{end}"] for end in ("", "-canonical"))
nested = [name for name, release in registry.items() if any("saes" in sae for sae in release["saes"])]
print(
    f"gemma-scope-9b-it-res: {plain['model']}, gemma-scope-9b-it-res-canonical: {canonical['model']}, "
    f"both of {plain['repo_id']}; lists within lists: {', '.join(nested)}"
)
same = plain["repo_id"] == canonical["repo_id"] == "google/gemma-scope-9b-it-res"
found = (plain["model"], canonical["model"]) == ("gemma-2-9b", "gemma-2-9b-it")
sys.exit(not (same and found and nested == ["gpt2-small-res_scefr-ajt"]))
PYTHON

#!/bin/sh
# torch 2.13.0 and sentencepiece 0.2.3 on Linux: both bring a libgomp of their own, so a process that has loaded a
# SentencePiece tokenizer has two OpenMP runtimes with a pool of threads each. Code that looks for "the" OpenMP library
# that PyTorch runs on (to run its own loops on the same threads, or to bound them) finds two, and may take the other.
#
# Seen: "after torch: torch; after sentencepiece: sentencepiece.libs, torch". Exits 1 if that changes.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install -q torch==2.13.0 sentencepiece==0.2.3 > /dev/null 2>&1
cd "$folder"
env/bin/python -W ignore - <<'PYTHON'
import sys


def find_openmp():
    files = {line.split()[-1] for line in open("/proc/self/maps") if "libgomp" in line}
    return sorted({file.split("site-packages/")[1].split("/")[0] for file in files})


import torch

first = find_openmp()
import sentencepiece

second = find_openmp()
print(f"after torch: {', '.join(first)}; after sentencepiece: {', '.join(second)}")
sys.exit((first, second) != (["torch"], ["sentencepiece.libs", "torch"]))
PYTHON

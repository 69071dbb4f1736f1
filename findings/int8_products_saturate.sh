#!/usr/bin/env bash
# torch._int_mm is not exact where oneDNN has no VNNI: pairs of int8 products are summed in 16 bits and saturate.
# torch 2.13.0 (oneDNN 3.12.0), x86-64 with VNNI: exact by itself; with ONEDNN_MAX_CPU_ISA=SSE41, AVX, AVX2 or AVX512_CORE, what
# older processors have anyway, all but a few entries of a full-range product are wrong by up to its own standard deviation,
# without a warning. Values in -64..64 on both sides are exact everywhere. oneDNN reads the variable once a process.
# Seen: "as it is: 0 of 131072 wrong; AVX2: 131072 of 131072 wrong" (values -128..127, 256 x 769 x 512). Exits 1 if that changes.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 numpy
cat > "$folder/try.py" <<'P'
import torch
g = torch.Generator().manual_seed(0)
a, b = (torch.randint(-128, 128, (n, 769), dtype=torch.int8, generator=g) for n in (256, 512))
print(int((torch._int_mm(a, b.T).double() != a.double() @ b.double().T).sum()))
P
whole=$("$folder/venv/bin/python" "$folder/try.py")
old=$(ONEDNN_MAX_CPU_ISA=AVX2 "$folder/venv/bin/python" "$folder/try.py")
echo "as it is: $whole of 131072 wrong; AVX2: $old of 131072 wrong"
test "$old" -gt 100000

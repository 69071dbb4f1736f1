#!/bin/sh
# transformers 5.9.0 (torch 2.13.0), tiny random models of two families, no other library:
# - Gemma 2 with attn_implementation="sdpa", which a model made from its class has unasked, leaves out the soft cap of
#   attention logits without a word: other logits than with "eager". 5.24.0 refuses "sdpa" for it.
# - Zamba 2 is not causal where a text is longer than one chunk of its scan: the logits of a text change when tokens are
#   added behind it. In 5.24.0 they do not.
#
# Seen: "5.9.0: sdpa of gemma2 differs, zamba2 leaks", "5.24.0: sdpa of gemma2 is refused, zamba2 is causal".
# Exits 1 if that changes.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
cd "$folder"
cat > try.py <<'PYTHON'
import torch
import transformers
from transformers import AutoModelForCausalLM, Gemma2Config, Zamba2Config

common = dict(vocab_size=64, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=4, pad_token_id=0)
ids = torch.randint(3, 64, (2, 12), generator=torch.Generator().manual_seed(0))


def make(config, attention):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.3)
    return model


@torch.no_grad()
def leaks(model):
    whole = model(ids, use_cache=False).logits
    parts = [(model(ids[:, :n], use_cache=False).logits - whole[:, :n]).abs().max() for n in (4, 8, 11)]
    return max(parts) > 1e-3 * whole.abs().max()


gemma = Gemma2Config(**common, intermediate_size=64, head_dim=8, attn_logit_softcapping=1.0)
try:
    with torch.no_grad():
        eager, fused = (make(gemma, kind)(ids, use_cache=False).logits for kind in ("eager", "sdpa"))
    told = "differs" if (eager - fused).abs().max() > 1e-3 else "agrees"
except ValueError:
    told = "is refused"
zamba = Zamba2Config(
    **common, intermediate_size=64, mamba_d_state=8, n_mamba_heads=8, mamba_headdim=8, mamba_ngroups=1, chunk_size=8,
    layers_block_type=["mamba", "hybrid", "mamba"], hybrid_layer_ids=[1], use_mamba_kernels=False,
)
causal = "leaks" if leaks(make(zamba, "eager")) else "is causal"
print(f"{transformers.__version__}: sdpa of gemma2 {told}, zamba2 {causal}")
PYTHON
"$folder/env/bin/pip" install -q torch==2.13.0
for version in 5.9.0 5.24.0; do
    "$folder/env/bin/pip" install -q "transformers==$version"
    HF_HUB_OFFLINE=1 "$folder/env/bin/python" -W ignore try.py 2>error.txt | tail -1 | tee "$version.txt" || cat error.txt
    [ -s "$version.txt" ] || tail -5 error.txt
done
grep -q "gemma2 differs, zamba2 leaks" 5.9.0.txt
grep -q "gemma2 is refused, zamba2 is causal" 5.24.0.txt

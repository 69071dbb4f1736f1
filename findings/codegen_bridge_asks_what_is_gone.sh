#!/bin/sh
# transformer-lens 4.3.0 with transformers 5.24.0, torch 2.13.0: the TransformerBridge of a CodeGen model fails in every
# forward, AttributeError: "'CodeGenAttention' object has no attribute 'embed_positions'". The model that it wraps, loaded
# by transformers alone, runs: its rotary positions come from elsewhere since 5.24. With transformers 5.23.0 both run.
#
# Seen: "5.23.0: model runs, bridge runs", "5.24.0: model runs, bridge fails: AttributeError". Exits 1 if that changes.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
cd "$folder"
cat > try.py <<'PYTHON'
import torch
import transformers
from tokenizers import Tokenizer, models
from transformer_lens.model_bridge import TransformerBridge
from transformers import CodeGenConfig, CodeGenForCausalLM, PreTrainedTokenizerFast

words = {word: i for i, word in enumerate(["<s>", "</s>", *"abcdefghijklmnopqrstuvwxyz"])}
tokenizer = PreTrainedTokenizerFast(
    tokenizer_object=Tokenizer(models.BPE(vocab=words, merges=[])), bos_token="<s>", eos_token="</s>", pad_token="</s>"
)
sizes = dict(vocab_size=28, n_embd=32, n_layer=2, n_head=4, rotary_dim=4, n_positions=64, bos_token_id=0, eos_token_id=1)
model = CodeGenForCausalLM(CodeGenConfig(**sizes)).eval()
ids = torch.randint(2, 28, (2, 12), generator=torch.Generator().manual_seed(0))
with torch.no_grad():
    model(ids)
    model.save_pretrained("codegen")
    tokenizer.save_pretrained("codegen")
    try:
        TransformerBridge.boot_transformers("codegen", device="cpu")(ids)
        told = "bridge runs"
    except AttributeError as error:
        told = f"bridge fails: AttributeError: {error}"
print(f"{transformers.__version__}: model runs, {told}")
PYTHON
for version in 5.23.0 5.24.0; do
    "$folder/env/bin/pip" install -q torch==2.13.0 "transformers==$version" transformer-lens==4.3.0
    HF_HUB_OFFLINE=1 "$folder/env/bin/python" -W ignore try.py 2>/dev/null | tail -1 | tee "$version.txt"
done
grep -q "bridge runs" 5.23.0.txt
grep -q "bridge fails: AttributeError.*embed_positions" 5.24.0.txt

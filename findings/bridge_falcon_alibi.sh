#!/bin/sh
# transformer-lens 4.3.0 (and 3.9.0) with transformers 5.23.0, torch 2.13.0: a TransformerBridge around a Falcon with
# ALiBi positions (as in falcon-rw-1b) gives logits of its own, a percent or more away from those of the model that it
# wraps; with rotary positions they agree to rounding. Hugging Face divides scores and ALiBi by sqrt(d_head), the bridge
# the scores alone. Nothing is said.
#
# Seen: rotary 2.1e-07, alibi 9.0e-03 (random weights of deviation .15). Exits 1 when the second falls below 1e-3.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install -q torch==2.13.0 transformers==5.23.0 transformer-lens==4.3.0
cd "$folder"
HF_HUB_OFFLINE=1 "$folder/env/bin/python" -W ignore - <<'PYTHON'
import sys
import torch
from tokenizers import Tokenizer, models
from transformer_lens.model_bridge import TransformerBridge
from transformers import FalconConfig, FalconForCausalLM, PreTrainedTokenizerFast

words = {word: i for i, word in enumerate(["<s>", "</s>", *"abcdefghijklmnopqrstuvwxyz"])}
tokenizer = PreTrainedTokenizerFast(
    tokenizer_object=Tokenizer(models.BPE(vocab=words, merges=[])), bos_token="<s>", eos_token="</s>", pad_token="</s>"
)


def distance(alibi):
    torch.manual_seed(0)
    sizes = dict(vocab_size=28, hidden_size=32, num_hidden_layers=3, num_attention_heads=4)
    model = FalconForCausalLM(FalconConfig(alibi=alibi, bos_token_id=0, eos_token_id=1, **sizes)).eval()
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.15)
    ids = torch.randint(2, 28, (2, 12))
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits
        model.save_pretrained(f"falcon-{alibi}")
        tokenizer.save_pretrained(f"falcon-{alibi}")
        found = TransformerBridge.boot_transformers(f"falcon-{alibi}", device="cpu")(ids)
    return float((found - expected).norm() / expected.norm())


rotary, alibi = distance(False), distance(True)
print(f"relative distance of the bridge's logits: rotary {rotary:.1e}, alibi {alibi:.1e}")
sys.exit(not (rotary < 1e-5 and alibi > 1e-3))
PYTHON

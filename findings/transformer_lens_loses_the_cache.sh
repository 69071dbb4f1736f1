#!/usr/bin/env bash
# transformer-lens 4.3.0 beside transformers 5.24.0: a bridge's `generate` writes another text with a cache than without.
#
# transformers 5.24 calls the key-value cache `cache` on its way through a model's layers, where it was `past_key_values`
# before. The bridge's attention looks for the old name, finds none and attends to the newest token alone. Nothing is
# raised; the bridge's own `generate` shows a FutureWarning about the name, `bridge.original_model.generate` not even that.
# With transformers 5.23.0 both texts are the same. Seen 2026-11-28 with torch 2.13.0 on a CPU:
#
#   transformers 5.23.0: plain same, original_model same, bridge same
#   transformers 5.24.0: plain same, original_model DIFFERENT, bridge DIFFERENT
#
# Exits with 0 as long as that is so.
set -euo pipefail
here=$(mktemp -d)
trap 'rm -rf "$here"' EXIT
cat > "$here/show.py" <<'PY'
import tempfile
import warnings

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from transformer_lens.model_bridge import TransformerBridge
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

warnings.simplefilter("ignore")
words = ["<s>", "</s>", "<pad>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
inner = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=[]))
inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
config = LlamaConfig(vocab_size=len(words), num_key_value_heads=2, architectures=["LlamaForCausalLM"], **sizes)


def make():
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).eval()
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.15)
    return model


plain, folder = make(), tempfile.mkdtemp()
plain.save_pretrained(folder)
tokenizer.save_pretrained(folder)
bridge = TransformerBridge.boot_transformers(folder, device="cpu")
ids = torch.tensor([[0, 75, 104, 111, 111, 114]])


def theirs(module, cached):
    made = module.generate(ids, do_sample=False, max_new_tokens=16, min_new_tokens=16, use_cache=cached, pad_token_id=2)
    return made[0].tolist()


def bridged(cached):
    made = bridge.generate(ids, 16, do_sample=False, use_past_kv_cache=cached, verbose=False, stop_at_eos=False)
    return made[0].tolist()


found = {
    "plain": theirs(plain, True) == theirs(plain, False),
    "original_model": theirs(bridge.original_model, True) == theirs(bridge.original_model, False),
    "bridge": bridged(True) == bridged(False),
}
told = ", ".join(f"{name} {'same' if same else 'DIFFERENT'}" for name, same in found.items())
print(f"transformers {transformers.__version__}: {told}")
PY
python3 -m venv "$here/env"
"$here/env/bin/pip" install -q torch==2.13.0 transformer-lens==4.3.0 transformers==5.23.0
"$here/env/bin/python" "$here/show.py" | tee "$here/seen"
"$here/env/bin/pip" install -q transformers==5.24.0
"$here/env/bin/python" "$here/show.py" | tee -a "$here/seen"
grep -qx "transformers 5.23.0: plain same, original_model same, bridge same" "$here/seen"
grep -qx "transformers 5.24.0: plain same, original_model DIFFERENT, bridge DIFFERENT" "$here/seen"

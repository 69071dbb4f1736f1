#!/bin/sh
# transformer-lens 4.3.0 with transformers 5.23.0, torch 2.13.0 (CPU).
#
# TransformerBridge.boot_transformers names BOS, EOS and padding on a tokenizer that has none, and it does so on the
# caller's own object. The name is "<|endoftext|>". Where the vocabulary has an unknown-word token and no such entry,
# all three then have the id of the unknown word: whoever asks the tokenizer afterwards is told that texts begin and end
# with unknown words.
#
# Output seen:
#   before: None None None
#   after: <|endoftext|> 0 <|endoftext|> 0 <|endoftext|> 0
#   token 0 of the vocabulary: <unk>
set -e
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
"${PYTHON:-python3}" -m venv env
env/bin/pip install -q torch==2.13.0 transformers==5.23.0 transformer-lens==4.3.0
cat > run.py <<'PY'
import tempfile

from tokenizers import Tokenizer, models, pre_tokenizers
from transformer_lens.model_bridge import TransformerBridge
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

words = Tokenizer(models.WordLevel({"<unk>": 0, "one": 1, "two": 2}, unk_token="<unk>"))
words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>")
print("before:", tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token)

sizes = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
model = LlamaForCausalLM(LlamaConfig(vocab_size=3, max_position_embeddings=32, **sizes))
folder = tempfile.mkdtemp()
model.save_pretrained(folder)
TransformerBridge.boot_transformers(folder, hf_model=model, tokenizer=tokenizer)
found = [(getattr(tokenizer, f"{n}_token"), getattr(tokenizer, f"{n}_token_id")) for n in ("bos", "eos", "pad")]
print("after:", *(part for pair in found for part in pair))
print("token 0 of the vocabulary:", tokenizer.convert_ids_to_tokens(0))
assert found == [("<|endoftext|>", 0)] * 3, "the behaviour has changed"
PY
HF_HUB_OFFLINE=1 env/bin/python run.py

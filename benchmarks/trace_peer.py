"""Seconds that circuit-tracer takes for graphs that `benchmarks/trace.py` has timed, and whether they are the same.

    python benchmarks/trace.py --cache runs/tales-transcoders --export runs/trace-peer
    python -m venv runs/peer && runs/peer/bin/pip install torch==2.13.0 circuit-tracer==0.5.0
    runs/peer/bin/python benchmarks/trace_peer.py runs/trace-peer

circuit-tracer needs transformers before 5 and transformer-lens before 4, so it runs in an environment of its own, on
what the first command wrote: the model's weights, the transcoders, prompts, and for each the seconds and the direct
effects of features on logits that saelab found. Both read the same activations (`mlp.hook_in`), keep the same logits
and all features. circuit-tracer leaves out the first position, so effects are compared from the second on.
"""

import argparse
import json
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from circuit_tracer import attribute
from circuit_tracer.replacement_model.replacement_model_transformerlens import TransformerLensReplacementModel
from circuit_tracer.transcoder import TranscoderSet
from circuit_tracer.transcoder.activation_functions import TopK
from circuit_tracer.transcoder.single_layer_transcoder import SingleLayerTranscoder
from safetensors.torch import load_file
from transformer_lens import HookedTransformerConfig
from transformers import PreTrainedTokenizerFast


def load_model(folder: Path, facts: dict[str, Any]) -> TransformerLensReplacementModel:
    """circuit-tracer's model with the exported weights and transcoders."""
    weights = load_file(folder / "model.safetensors")
    cfg = HookedTransformerConfig(
        **facts["shape"],
        act_fn="silu",
        normalization_type="RMS",
        positional_embedding_type="rotary",
        rotary_dim=facts["shape"]["d_head"],
        rotary_base=10_000,
        final_rms=True,
        gated_mlp=True,
        eps=1e-6,
        device="cpu",
        dtype=torch.float32,
    )
    model = TransformerLensReplacementModel(cfg)
    n_heads, d_head = cfg.n_heads, cfg.d_head
    state = {"embed.W_E": weights["model.embed_tokens.weight"], "unembed.W_U": weights["lm_head.weight"].T}
    state["unembed.b_U"], state["ln_final.w"] = torch.zeros(cfg.d_vocab), weights["model.norm.weight"]
    for i in range(cfg.n_layers):
        of = f"model.layers.{i}."
        for name in "QKV":
            split = weights[f"{of}self_attn.{name.lower()}_proj.weight"].view(n_heads, d_head, cfg.d_model)
            state[f"blocks.{i}.attn.W_{name}"] = split.transpose(1, 2)
        joined = weights[f"{of}self_attn.o_proj.weight"].T
        state[f"blocks.{i}.attn.W_O"] = joined.reshape(n_heads, d_head, cfg.d_model)
        state[f"blocks.{i}.mlp.W_in"] = weights[f"{of}mlp.up_proj.weight"].T
        state[f"blocks.{i}.mlp.W_gate"] = weights[f"{of}mlp.gate_proj.weight"].T
        state[f"blocks.{i}.mlp.W_out"] = weights[f"{of}mlp.down_proj.weight"].T
        state[f"blocks.{i}.ln1.w"] = weights[f"{of}input_layernorm.weight"]
        state[f"blocks.{i}.ln2.w"] = weights[f"{of}post_attention_layernorm.weight"]
    missing = model.load_state_dict(state, strict=False).missing_keys
    learned = [name for name in missing if ".b_" not in name and "mask" not in name and "IGNORE" not in name]
    assert not [name for name in learned if "rotary" not in name], learned
    model.tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokenizer.json"), bos_token="<bos>", pad_token="<pad>", unk_token="<unk>"
    )
    coders = {}
    for i in range(cfg.n_layers):
        parts = load_file(folder / f"transcoder-{i}.safetensors")
        d_sae, d_in = parts["W_enc"].shape
        coders[i] = SingleLayerTranscoder(d_in, d_sae, TopK(facts["k"]), i, dtype=torch.float32)
        coders[i].load_state_dict(parts, strict=False)
    model._configure_replacement_model(TranscoderSet(coders, "mlp.hook_in", "mlp.hook_out"))
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    args = parser.parse_args()
    facts = json.loads((args.folder / "prompts.json").read_text())
    model = load_model(args.folder, facts)
    seconds, ours, worst = [], [], 0.0
    for prompt in facts["prompts"]:
        ids = torch.tensor(prompt["ids"])
        start = time.perf_counter()
        graph = attribute(ids, model, attribution_targets=torch.tensor(prompt["logits"]))
        seconds.append(time.perf_counter() - start)
        ours.append(prompt["seconds"])
        active = graph.active_features[graph.selected_features].tolist()
        effects = graph.adjacency_matrix[-len(prompt["logits"]) :, : len(active)]
        mine = {tuple(place): torch.tensor(row) for *place, row in prompt["effects"]}
        theirs = {tuple(place): effects[:, i] for i, place in enumerate(active)}
        values = dict(zip(map(tuple, active), graph.activation_values[graph.selected_features].tolist(), strict=True))
        # its TopK keeps negative pre-activations among the k largest, saelab's does not
        assert mine.keys() == {place for place in theirs if values[place] > 0}, (len(theirs), len(mine))
        off = torch.stack([(theirs[place] - row).abs().max() for place, row in mine.items()]).max()
        worst = max(worst, float(off / effects.abs().max()))
    print(f"circuit-tracer: median {median(seconds[1:]):.3f} s of {len(seconds) - 1} graphs")
    print(f"saelab: median {median(ours[1:]):.3f} s, {median(ours[1:]) / median(seconds[1:]):.3f} of it")
    print(f"direct effects on logits differ by at most {worst:.1e} of the largest")


if __name__ == "__main__":
    main()

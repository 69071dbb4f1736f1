"""Tiny random models of every causal architecture that the installed transformers and transformer_lens both know."""

from typing import Any

import torch

SIZES: dict[str, Any] = {
    "vocab_size": 272, "hidden_size": 32, "n_embd": 32, "d_model": 32, "num_hidden_layers": 3, "n_layer": 3,
    "n_layers": 3, "num_layers": 3, "num_attention_heads": 4, "n_head": 4, "n_heads": 4, "num_heads": 4,
    "attention_heads": 4, "num_key_value_heads": 2, "num_kv_heads": 2, "head_dim": 8, "intermediate_size": 48,
    "ffn_dim": 48, "ffn_hidden_size": 48, "max_position_embeddings": 64, "n_positions": 64, "n_ctx": 64,
    "max_seq_len": 64, "context_length": 64, "sliding_window": 12, "window_size": 12, "moe_intermediate_size": 24,
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1,
    "topk_group": 1, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8,
    "v_head_dim": 8, "first_k_dense_replace": 1, "rotary_dim": 4, "state_size": 8, "attention_hidden_size": 32,
    "word_embed_proj_dim": 32, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_chunk_size": 8,
    "linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
    "shared_expert_intermediate_size": 24, "shared_intermediate_size": 24, "time_step_rank": 4, "mamba_dt_rank": 4,
    "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2, "tie_word_embeddings": True, "lru_width": 32,
    "attention_window_size": 12, "block_types": ["recurrent", "recurrent", "attention"], "kv_channels": 8,
    "query_pre_attn_scalar": 8, "local_attention": 24, "vocab_size_per_layer_input": 272, "attention_types": None,
    "hidden_size_per_layer_input": 8, "layer_types": None, "mlp_layer_types": None, "no_rope_layers": None,
    "num_attention_heads_per_layer": None, "per_layer_config": None, "original_max_position_embeddings": 16,
}  # fmt: skip
"""what a configuration is given of these, where it has the field; None: it makes its own for so few layers"""

LONG = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [3.0] * 4, "rope_theta": 1e4,
        "original_max_position_embeddings": 16}  # fmt: skip
YARN = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4, "original_max_position_embeddings": 16}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "rope_theta": 1e4, "original_max_position_embeddings": 16,
          "low_freq_factor": 1.0, "high_freq_factor": 4.0}  # fmt: skip
OWN: dict[str, dict[str, Any]] = {
    "ApertusForCausalLM": {"rope_parameters": LLAMA3},
    "BambaForCausalLM": {"attn_layer_indices": [1], "mamba_d_head": 16},
    "CohereForCausalLM": {"logit_scale": 0.0625},
    "DeepseekV2ForCausalLM": {"n_shared_experts": 1},
    "DeepseekV3ForCausalLM": {"n_shared_experts": 1},
    "FalconH1ForCausalLM": {"mamba_d_ssm": 32, "mamba_d_head": 8, "lm_head_multiplier": 0.3},
    "FalconForCausalLM": {"new_decoder_architecture": True},
    "GPTNeoForCausalLM": {"attention_types": [[["global", "local", "global"], 1]]},
    "GptOssForCausalLM": {"rope_parameters": YARN},
    "GraniteForCausalLM": {"logits_scaling": 8.0, "residual_multiplier": 0.22, "embedding_multiplier": 12.0},
    "GraniteMoeForCausalLM": {"logits_scaling": 8.0, "residual_multiplier": 0.22},
    "GraniteMoeHybridForCausalLM": {"layer_types": ["linear_attention", "full_attention", "linear_attention"]},
    "JambaForCausalLM": {"attn_layer_period": 2, "attn_layer_offset": 1, "use_mamba_kernels": False},
    "Lfm2ForCausalLM": {"layer_types": ["conv", "full_attention", "conv"]},
    "Lfm2MoeForCausalLM": {"layer_types": ["conv", "full_attention", "conv"], "num_dense_layers": 1},
    "Mamba2ForCausalLM": {"num_heads": 8, "head_dim": 8, "n_groups": 2, "chunk_size": 8},
    "Phi3ForCausalLM": {"rope_parameters": LONG},
    "Qwen3NextForCausalLM": {"layer_types": ["linear_attention", "full_attention", "linear_attention"]},
    "Qwen3_5ForCausalLM": {"layer_types": ["linear_attention", "full_attention", "linear_attention"]},
    "Qwen3_5MoeForCausalLM": {"layer_types": ["linear_attention", "full_attention", "linear_attention"]},
    "OlmoHybridForCausalLM": {"layer_types": ["linear_attention", "full_attention", "linear_attention"]},
    "MambaForCausalLM": {"tie_word_embeddings": False},
    "StableLmForCausalLM": {"partial_rotary_factor": 0.5},
    "PhiForCausalLM": {"partial_rotary_factor": 0.5},
    "Ministral3ForCausalLM": {"rope_parameters": YARN | {"llama_4_scaling_beta": 0.1, "beta_fast": 32.0,
                              "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0}},
}  # fmt: skip
"""what an architecture needs besides, or is interesting with"""


def list_architectures() -> list[str]:
    """The names that both libraries' registries of text models have, those that take pictures last."""
    from transformer_lens.factories.architecture_adapter_factory import SUPPORTED_ARCHITECTURES
    from transformers.models.auto import modeling_auto as known

    names: set[str] = set()
    for mapping in (known.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, known.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES):
        for entry in mapping.values():
            names |= {entry} if isinstance(entry, str) else set(entry)
    return sorted(names & set(SUPPORTED_ARCHITECTURES), key=lambda name: ("ConditionalGeneration" in name, name))


def build(name: str) -> Any:
    """A random Hugging Face model of an architecture, all of whose weights matter."""
    import transformers

    kind = getattr(transformers, name)
    fields = set(kind.config_class().to_dict()) | {"tie_word_embeddings"}
    fields |= set(getattr(kind.config_class, "attribute_map", {}))
    sizes = {key: value for key, value in SIZES.items() if key in fields and value is not None}
    config = kind.config_class(**sizes | OWN.get(name, {}))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = kind(config).eval()
        with torch.no_grad():
            for path, weight in model.named_parameters():
                torch.nn.init.normal_(weight, mean=float("norm" in path and weight.ndim == 1), std=0.15)
    n = sum(weight.numel() for weight in model.parameters())
    if n > 2_000_000:
        raise MemoryError(f"{n:,} weights are no tiny model")
    with torch.no_grad():
        model(torch.arange(3, 15)[None], use_cache=False)  # sizes that do not go together are no fault of saelab's
    return model

"""Tiny random models of every causal architecture that the installed transformers knows."""

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
    "mamba_num_heads": 8, "mamba_head_dim": 8, "n_groups": 2, "ssm_state_size": 8, "chunk_size": 8,
    "moe_shared_expert_intermediate_size": 24, "moe_latent_size": None, "o_lora_rank": 8, "projector_hidden_size": 32,
    "num_attention_heads_per_layer": None, "per_layer_config": None, "original_max_position_embeddings": 16,
}  # fmt: skip
"""what a configuration is given of these, where it has the field; None: it makes its own for so few layers"""

TOWER: dict[str, Any] = {
    "hidden_size": 32, "embed_dim": 32, "dim": 32, "num_hidden_layers": 2, "num_layers": 2, "depth": 2, "num_heads": 4,
    "num_attention_heads": 4, "intermediate_size": 48, "image_size": 28, "patch_size": 14, "out_hidden_size": 32,
    "projection_dim": 32, "vision_output_dim": 32, "num_groups": 4, "projector_input_dim": 32,
    "projector_output_dim": 32,
}  # fmt: skip
"""the same for what sees or hears, which takes no part in a text"""
MOST_WEIGHTS = 20_000_000

LONG = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [3.0] * 4, "rope_theta": 1e4,
        "original_max_position_embeddings": 16}  # fmt: skip
YARN = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4, "original_max_position_embeddings": 16}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "rope_theta": 1e4, "original_max_position_embeddings": 16,
          "low_freq_factor": 1.0, "high_freq_factor": 4.0}  # fmt: skip
SECTIONS = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}
LATENT = {"num_key_value_heads": 4}  # keys of all heads come from one latent vector
OWN: dict[str, dict[str, Any]] = {
    "ApertusForCausalLM": {"rope_parameters": LLAMA3},
    "BambaForCausalLM": {"attn_layer_indices": [1], "mamba_d_head": 16},
    "CohereForCausalLM": {"logit_scale": 0.0625},
    "DeepseekV2ForCausalLM": LATENT | {"n_shared_experts": 1},
    "DeepseekV3ForCausalLM": LATENT | {"n_shared_experts": 1},
    "Glm4MoeLiteForCausalLM": LATENT,
    "GlmMoeDsaForCausalLM": LATENT,
    "YoutuForCausalLM": LATENT,
    "Zamba2ForCausalLM": {"layers_block_type": ["linear_attention", "hybrid", "linear_attention"], "n_mamba_heads": 8,
                          "attention_hidden_size": 64, "head_dim": 16, "num_key_value_heads": 4},
    "Emu3ForConditionalGeneration": {
        "vocabulary_map": {"<image>": 260, "<|visual token 000001|>": 261},
        "vq_config": {"base_channels": 32, "channel_multiplier": [1], "attn_resolutions": [], "codebook_size": 64}},
    "Gemma3nForConditionalGeneration": {"text_config": {"intermediate_size": 48, "num_kv_shared_layers": 0,
        "activation_sparsity_pattern": None, "laurel_rank": 8}},
    "Glm4vForConditionalGeneration": {"text_config": {"rope_parameters": SECTIONS}},
    "Qwen2_5_VLForConditionalGeneration": {"text_config": {"rope_parameters": SECTIONS}},
    "Qwen3VLForConditionalGeneration": {"text_config": {"rope_parameters": SECTIONS}},
    "Qwen3VLMoeForConditionalGeneration": {"text_config": {"rope_parameters": SECTIONS}},
    "FalconH1ForCausalLM": {"mamba_d_ssm": 32, "mamba_d_head": 8, "lm_head_multiplier": 0.3},
    "FalconForCausalLM": {"multi_query": False, "num_kv_heads": 4},
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
VARIANTS: dict[str, dict[str, Any]] = {
    "BloomForCausalLM, residual of norms": {"apply_residual_connection_post_layernorm": True},
    "CohereForCausalLM, norms of queries": {"use_qk_norm": True, "logit_scale": 0.0625},
    "DeepseekV2ForCausalLM, full queries": LATENT | {"q_lora_rank": None},
    "FalconForCausalLM, ALiBi": {"alibi": True, "multi_query": False, "num_kv_heads": 4},
    "FalconForCausalLM, one key for all heads": {"multi_query": True},
    "FalconForCausalLM, new decoder": {"new_decoder_architecture": True},
    "GPT2LMHeadModel, scaled by layer": {"scale_attn_by_inverse_layer_idx": True, "reorder_and_upcast_attn": True},
    "GPTBigCodeForCausalLM, keys of each head": {"multi_query": False},
    "GPTNeoXForCausalLM, one branch after another": {"use_parallel_residual": False},
    "Gemma2ForCausalLM, no caps": {"final_logit_softcapping": None, "attn_logit_softcapping": None},
    "Gemma4ForCausalLM, experts": {"enable_moe_block": True, "num_experts": 4, "top_k_experts": 2,
                                   "moe_intermediate_size": 24},
    "GraniteMoeHybridForCausalLM, rotary": {"layer_types": ["linear_attention", "full_attention", "linear_attention"],
                                            "position_embedding_type": "rope"},
    "LlamaForCausalLM, YaRN, biases, untied": {"rope_parameters": YARN, "attention_bias": True, "mlp_bias": True,
                                               "tie_word_embeddings": False},
    "LlamaForCausalLM, linear positions": {
        "rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}},
    "MptForCausalLM, learned positions": {"attn_config": {"alibi": False}},
    "OPTForCausalLM, norms behind, projected": {"do_layer_norm_before": False, "word_embed_proj_dim": 16},
    "Qwen2ForCausalLM, window": {"use_sliding_window": True, "max_window_layers": 1},
    "RwkvForCausalLM, rescaled": {"rescale_every": 2},
    "StableLmForCausalLM, parallel": {"use_parallel_residual": True, "qk_layernorm": True},
}  # fmt: skip
"""other members of some architectures"""


def list_architectures() -> list[str]:
    """The names that both libraries' registries of text models have, those that take pictures last."""
    from transformer_lens.factories.architecture_adapter_factory import SUPPORTED_ARCHITECTURES
    from transformers.models.auto import modeling_auto as known

    names: set[str] = set()
    for mapping in (known.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, known.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES):
        for entry in mapping.values():
            names |= {entry} if isinstance(entry, str) else set(entry)
    return sorted(names & set(SUPPORTED_ARCHITECTURES), key=lambda name: ("ConditionalGeneration" in name, name))


def list_unbridged() -> list[str]:
    """The names of text models that transformers has and transformer_lens has not."""
    from transformer_lens.factories.architecture_adapter_factory import SUPPORTED_ARCHITECTURES
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as KNOWN

    names: set[str] = set()
    for entry in KNOWN.values():
        names |= {entry} if isinstance(entry, str) else set(entry)
    return sorted(names - set(SUPPORTED_ARCHITECTURES))


def build(name: str) -> Any:
    """A random Hugging Face model of an architecture or one of its `VARIANTS`, all of whose weights matter.

    MemoryError where that is no small one: weights are counted before any is made.
    """
    import transformers

    kind, own = getattr(transformers, name.partition(",")[0]), OWN | VARIANTS
    config = kind.config_class(**merge(choose_sizes(kind.config_class, SIZES), own.get(name, {})))
    with torch.device("meta"):
        n = sum(weight.numel() for weight in kind(config).parameters())
    if n > MOST_WEIGHTS:
        raise MemoryError(f"{n:,} weights are no tiny model")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = kind(config).eval()
        with torch.no_grad():
            for path, weight in model.named_parameters():
                torch.nn.init.normal_(weight, mean=float("norm" in path and weight.ndim == 1), std=0.15)
    if not config.is_encoder_decoder:
        with torch.no_grad():
            model(torch.arange(3, 15)[None], use_cache=False)  # sizes that do not go together are no fault of saelab's
    return model


def choose_sizes(kind: Any, sizes: dict[str, Any]) -> dict[str, Any]:
    """Sizes by field of a kind of configuration, and of those inside it: a text's are `SIZES`, any other's `TOWER`."""
    default = kind()
    written = default.to_dict()
    fields = set(written) | {"tie_word_embeddings"} | set(getattr(kind, "attribute_map", {}))
    found = {key: value for key, value in sizes.items() if key in fields and value is not None}
    for key in found:
        if isinstance(written.get(key), list | tuple) and isinstance(found[key], int):
            found[key] = [found[key]] * len(written[key])  # one for each stage
    for key in getattr(kind, "sub_configs", {}):
        own = getattr(default, key, None)
        if own is not None and key not in found:
            is_text = "text" in key or "coder" in key
            found[key] = choose_sizes(type(own), SIZES if is_text else TOWER) | {"model_type": own.model_type}
    return found


def merge(sizes: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    """The sizes, with those of an architecture's own put over them, inside inner configurations too."""
    inner = {key: merge(sizes[key], own[key]) for key in sizes.keys() & own.keys() if key.endswith("_config")}
    return sizes | own | inner

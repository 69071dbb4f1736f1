"""Types of the keys that are read from other libraries' configurations, for validation.

Numbers that must be present are checked by `require_number`.
"""

from typing import Any

from typing_extensions import TypedDict


class Metadata(TypedDict, total=False):
    """Metadata of a SAELens SAE; in files from before 6.0 the same keys are in the configuration itself."""

    sae_lens_version: str | None
    model_name: str | None
    hook_name: str | None
    hook_name_out: str | None
    dataset_path: str | None
    context_size: int | None
    seqpos_slice: list[int | None] | None
    exclude_special_tokens: bool | list[int] | None
    model_from_pretrained_kwargs: dict[str, Any] | None
    saelab: dict[str, Any] | None


class Trainer(TypedDict, total=False):
    """The "trainer" section of a dictionary_learning run."""

    dict_class: str | None
    k: float | None
    lm_name: str | None
    submodule_name: str | None


class Buffer(TypedDict, total=False):
    """The "buffer" section of a dictionary_learning run."""

    ctx_len: int | None


class Said(Metadata, total=False):
    """Configuration of any supported library."""

    metadata: Metadata | None
    trainer: Trainer | None
    buffer: Buffer | None
    architecture: str | None
    activation: str | None
    activation_fn: str | None
    activation_fn_str: str | None
    activation_fn_kwargs: dict[str, Any] | None
    normalize_activations: str | bool | None
    hook_point: str | None
    apply_b_dec_to_input: bool | None
    rescale_acts_by_decoder_norm: bool | None
    finetuning_scaling_factor: bool | None
    residual_threshold: float | None
    stop_on_duplicate_support: bool | None
    max_iterations: int | None
    scaling_factor: float | None
    num_latents: int | None
    signed: bool | None
    transcode: bool | None
    skip_connection: bool | None
    affine_connection: bool | None
    hf_hook_point_in: str | None
    hf_hook_point_out: str | None
    hook_point_in: str | None
    hook_point_out: str | None
    sae_type: str | None
    norm_activation: str | None
    act_fn: str | None
    use_decoder_bias: bool | None
    apply_decoder_bias_to_pre_encoder: bool | None
    sparsity_include_decoder_norm: bool | None
    dataset_average_activation_norm: dict[str, float] | None

"""Checks that a model and its tokenizer are supported; each error names what is missing."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

_QUANTISED = ("bitsandbytes.", "torch.ao.nn.", "torchao.", "auto_gptq.", "gptqmodel.", "awq.", "quanto.", "optimum.")
_TOKENIZER_FILES = ("tokenizer*", "vocab*", "*.model", "*.tiktoken", "tekken.json", "merges.txt")


def require_bridge(model: Any) -> None:
    """Raise TypeError for anything but a TransformerBridge, such as a HookedTransformer or a Hugging Face model."""
    from transformer_lens.model_bridge import TransformerBridge

    if not isinstance(model, TransformerBridge):
        raise TypeError(
            f"`model` must be what `saelab.load_model` returns, a TransformerBridge, got a {type(model).__name__}. "
            "Give its name, folder or Hugging Face object to `saelab.load_model`."
        )


def has_processed_weights(model: Any) -> bool:
    """Whether a bridge has folded or centred its weights, so that activations differ from Hugging Face's.

    RuntimeError where the bridge does not record it: folded weights must not be taken for raw ones.
    """
    said = vars(model).get("_weights_processed")
    if not isinstance(said, bool):
        raise RuntimeError(
            f"A TransformerBridge must say in `_weights_processed` whether its weights were processed, got {said!r}. "
            "Take a release of transformer-lens that saelab was tested with (see README)."
        )
    return said


def admit_object(model: Any) -> Any:
    """The causal Hugging Face model behind an object; of a compiled one, the model that was compiled.

    Raises:
        TypeError: for an object of another kind.
        ValueError: for a model whose weights or outputs saelab cannot read.
    """
    model = getattr(model, "_orig_mod", model)
    kind = type(model).__name__
    if any(type(module).__module__.startswith("peft.") for module in model.modules()):
        raise ValueError(
            f"A model with adapters must be merged first, got a {kind} of PEFT. Give `model.merge_and_unload()`."
        )
    if not hasattr(model, "can_generate") or not hasattr(model, "config"):
        raise TypeError(
            f"`name_or_path` must be a name, a folder, a TransformerBridge or a Hugging Face model, got a {kind}. "
            "Load it with transformers' `AutoModelForCausalLM`, or give its name."
        )
    admit_config(model.config, kind)
    if not model.can_generate():
        raise ValueError(
            f"A model must predict the next token, got a {kind}, which has no language-model head. Load it with "
            "transformers' `AutoModelForCausalLM`."
        )
    if any(weight.is_meta for weight in model.parameters()) or _is_spread(model):
        raise ValueError(
            f"A model must be whole on one device, got a {kind} that is offloaded or spread over several. Load it "
            "without `device_map`."
        )
    quantised = any(type(module).__module__.startswith(_QUANTISED) for module in model.modules())
    if quantised or not all(weight.is_floating_point() for weight in model.parameters()):
        raise _quantised(f"a {kind} with quantised modules")
    return model


def _is_spread(model: Any) -> bool:
    places = {str(place) for place in (getattr(model, "hf_device_map", None) or {}).values()}
    return len(places) > 1 or any(hasattr(module, "_hf_hook") for module in model.modules())


def _quantised(got: str) -> ValueError:
    return ValueError(
        f"A model must have weights of floating point, got {got}. Load its full weights, or give what "
        "`model.dequantize()` returns."
    )


def admit_config(config: Any, kind: str | None = None) -> None:
    """Raise ValueError unless a configuration is of a causal language model with floating-point weights."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES as ENCODERS

    names = [kind] if kind else getattr(config, "architectures", None) or [type(config).__name__]
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(
            f"A model must be a decoder alone, got an encoder with a decoder ({names[0]}), whose text enters at two "
            "places. Take a causal language model."
        )
    if config.model_type in ENCODERS and not getattr(config, "is_decoder", False):
        raise ValueError(
            f"A model must predict each token from those before it, got an encoder ({names[0]}), which sees both "
            "sides. Take a causal language model."
        )
    other = [
        name for name in names if "For" in name and not name.endswith(("CausalLM", "Generation", "ImageTextToText"))
    ]
    if other:
        raise ValueError(
            f"A model must predict the next token, got {other[0]}, which was made for another task and has no such "
            "head. Take the causal model that it was made from."
        )
    if getattr(config, "quantization_config", None):
        method = config.quantization_config
        method = method.get("quant_method") if isinstance(method, dict) else getattr(method, "quant_method", "")
        raise _quantised(f"{names[0]} quantised by {getattr(method, 'value', method) or 'a library'}")


def admit_folder(folder: Path, has_tokenizer: bool) -> None:
    """Raise ValueError unless a folder holds a configuration and a tokenizer, or a tokenizer is given separately."""
    if not (folder / "config.json").is_file():
        raise ValueError(
            f"A model folder must hold config.json, got '{folder}' without one. Give the folder that "
            "`model.save_pretrained` wrote."
        )
    if not has_tokenizer and not any(next(folder.glob(pattern), None) for pattern in _TOKENIZER_FILES):
        raise ValueError(
            f"A model folder must hold its tokenizer, got '{folder}' without one. Save it there with "
            "`tokenizer.save_pretrained`, or pass `tokenizer=`."
        )


def admit_weights(name: str, reports: Sequence[set[str]]) -> None:
    """Raise ValueError where weights were missing from the files, which Hugging Face fills with random numbers.

    `reports` are the names of missing weights, a set for each model that was loaded; RuntimeError without any report.
    """
    if not reports:
        raise RuntimeError(
            f"Hugging Face must report which weights it did not find, got nothing of '{name}': this transformer-lens "
            "loads otherwise. Take a release that saelab was tested with (see README)."
        )
    if missing := set().union(*reports):
        some = ", ".join(sorted(missing)[:3])
        raise ValueError(
            f"A model's files must hold all its weights, got '{name}' without {len(missing)} of them ({some}). A base "
            "model has no language-model head: take the causal model; else fetch the files again."
        )


def admit_tokenizer(model: Any) -> None:
    """Raise ValueError for a tokenizer without ordinary tokens, or with token ids outside of the model's vocabulary."""
    tokenizer = model.tokenizer
    if tokenizer is None:
        return
    added = set(tokenizer.get_added_vocab())
    ordinary = [i for token, i in tokenizer.get_vocab().items() if token not in added]
    if not ordinary:
        raise ValueError(
            f"A model's tokenizer must have tokens of text, got a {type(tokenizer).__name__} with special ones only: "
            "its files are missing. Pass `tokenizer=AutoTokenizer.from_pretrained(...)`."
        )
    if max(ordinary) >= model.cfg.d_vocab:
        raise ValueError(
            f"A tokenizer's tokens must be in the model's vocabulary of {model.cfg.d_vocab}, got ids up to "
            f"{max(ordinary)}. Pass the tokenizer that the model was trained with as `tokenizer=`."
        )

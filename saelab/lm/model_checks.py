"""Checks of a model and its tokenizer: support, other libraries' hooks, weights, context length and vocabulary.

Each error names what is missing. Fingerprints identify a model by its weights, whatever its name; hooks that others
registered are detected, and the model can be run without them.
"""

import re
import sys
import warnings
import zlib
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Bool
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from saelab.lm.unwrapped import TapHook, is_ours, unwrap

_QUANTIZED = ("bitsandbytes.", "torch.ao.nn.", "torchao.", "auto_gptq.", "gptqmodel.", "awq.", "quanto.", "optimum.")
_TOKENIZER_FILES = ("tokenizer*", "vocab*", "*.model", "*.tiktoken", "tekken.json", "merges.txt")
_BOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_LIBRARIES = (
    "transformers.",
    "transformer_lens.model_bridge.component_setup",
    "transformer_lens.model_bridge.generalized_components.",
)
N_ENTRIES = 16
"""number of entries of each parameter, evenly spaced"""
N_SUMS = 4
TOLERANCE = 0.25
"""largest difference, as a fraction of the sum of magnitudes times the coarser dtype's resolution: rounding moves sums
by a tenth of that with some hundred parameters, other random weights move them by a hundredth of the sum itself
"""
FINEST = 1e-6
"""finest resolution required: folded weights were rounded once more, by each machine in its own order"""
WHOLE = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
"""dtypes whose rounding stays below the tolerance"""
Sketch = tuple[float, ...]
# Names of the context length in Hugging Face's configurations; most other names are aliases of the first.
_LIMITS = ("max_position_embeddings", "n_positions", "max_seq_len", "max_context_length", "max_sequence_length")
_LIKE_LIMITS = re.compile(r"position|context|ctx|seq\w*_len|max_len")
"""pattern of names that a context length may have in unknown configurations"""
_RECURRENT = ("rwkv",)  # its `context_length` sizes a training kernel; a state has no positions


@runtime_checkable
class ModelConfig(Protocol):
    """Protocol of a model's configuration: the fields that saelab reads."""

    d_model: int
    d_vocab: int
    n_layers: int
    model_name: str
    architecture: str | None


@runtime_checkable
class Model(Protocol):
    """Protocol of a language model, what `load_model` returns: the part of TransformerLens' `TransformerBridge` and of
    `HuggingFaceModel` that saelab uses.

    Its `hook_dict` is not listed, because run-time checks would build it for every call.
    """

    @property
    def cfg(self) -> ModelConfig:
        """Sizes and names."""

    @property
    def tokenizer(self) -> Any:
        """The tokenizer, or None."""

    original_model: nn.Module
    """the Hugging Face model inside"""
    compatibility_mode: bool
    """whether its weights were folded by `enable_compatibility_mode`"""

    def __call__(self, *args: Any, **kwargs: Any) -> Any: ...

    def enable_compatibility_mode(self, *args: Any, **kwargs: Any) -> Any:
        """Fold norms and center what is written to the residual stream, in place, as TransformerLens 2 did."""

    def modules(self) -> Iterator[nn.Module]:
        """All modules, as in `torch.nn.Module`."""

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Parameters with their names, as in `torch.nn.Module`."""

    def parameters(self) -> Iterator[nn.Parameter]:
        """All parameters, as in `torch.nn.Module`."""

    def to(self, *args: Any, **kwargs: Any) -> Any:
        """The model on another device or in another dtype, as in `torch.nn.Module`."""


def has_processed_weights(model: Any) -> bool:
    """Whether a bridge has folded or centered its weights, so that activations differ from Hugging Face's.

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
            f"A model must be what `saelab.load_model` returns, or a causal Hugging Face model, got a {kind}. "
            "Load it with transformers' `AutoModelForCausalLM`, or give its name to `saelab.load_model`."
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
    quantized = any(type(module).__module__.startswith(_QUANTIZED) for module in model.modules())
    if quantized or not all(weight.is_floating_point() for weight in model.parameters()):
        raise _quantized(f"a {kind} with quantized modules")
    return model


def _is_spread(model: Any) -> bool:
    places = {str(place) for place in (getattr(model, "hf_device_map", None) or {}).values()}
    return len(places) > 1 or any(hasattr(module, "_hf_hook") for module in model.modules())


def _quantized(got: str) -> ValueError:
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
        raise _quantized(f"{names[0]} quantized by {getattr(method, 'value', method) or 'a library'}")


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


def admit_weights(name: str, missing: Collection[str]) -> None:
    """Raise ValueError where weights were missing from the files, which Hugging Face fills with random numbers."""
    if missing:
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


class HookBooks:
    """The dictionaries in which PyTorch keeps the hooks of all modules of a model, and its global hooks.

    A dictionary lives as long as its module, so checking all of them before a forward pass is quick.
    """

    def __init__(self, model: Model) -> None:
        points: Any = getattr(model, "hook_dict", {}).values()  # of a bridge
        modules = {id(module): module for module in (*model.modules(), *model.original_model.modules(), *points)}
        self._books = [vars(module)[name] for module in modules.values() for name in _BOOKS]
        self._books += [getattr(torch_module, f"_global{name}") for name in _BOOKS]

    def has_any(self) -> bool:
        """Whether there are hooks other than the libraries' own and what only watches for saelab."""
        return any(
            isinstance(getattr(hook, "__self__", None), TapHook) or not (is_ours(hook) or _is_inner(hook))
            for hooks in self._books
            if hooks
            for hook in hooks.values()
        )

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Context manager in which only the libraries' own hooks are registered; all others are restored afterward."""
        before = [(hooks, dict(hooks)) for hooks in self._books]
        try:
            for hooks, found in before:
                _refill(hooks, {key: hook for key, hook in found.items() if _is_inner(hook)})
            yield
        finally:
            for hooks, found in before:  # some parts of the bridge register hooks in their first forward pass
                _refill(hooks, found | {key: hook for key, hook in hooks.items() if key not in found})


def warn_of_hooks(model: nn.Module) -> None:
    """Warn where a Hugging Face object has hooks, as the copy of its modules behind a bridge does not have them."""
    if any(
        not _is_inner(hook) for module in model.modules() for name in _BOOKS for hook in vars(module)[name].values()
    ):
        warnings.warn(
            f"This {type(model).__name__} has hooks of its own, and a bridge around a copy of its modules has not. Put "
            "them on the modules of the model that is returned.",
            stacklevel=2,
        )


def _refill(hooks: dict[int, Any], content: dict[int, Any]) -> None:
    if hooks or content:
        hooks.clear()
        hooks.update(content)


def _is_inner(hook: Any) -> bool:
    """Whether a hook is one by which the two libraries do their own work, whoever registered it in the end."""
    while True:
        if isinstance(hook, partial):
            hook = hook.func
        elif getattr(hook, "__module__", None) == "transformer_lens.hook_points" and getattr(hook, "__closure__", None):
            inside = dict(zip(hook.__code__.co_freevars, hook.__closure__, strict=True))  # around a user's function
            hook = next(inside[name].cell_contents for name in ("full_hook", "hook") if name in inside)
        else:
            return str(getattr(hook, "__module__", "")).startswith(_LIBRARIES)


def sketch_weights(model: nn.Module | Model) -> Sketch | None:
    """Fingerprint of a model's weights; None where weights are quantized or have not been loaded.

    It consists of a checksum of the parameters' shapes, the resolution of their dtype, the sum of the magnitudes of 16
    entries of each parameter, and 4 sums of these entries times fixed factors. It does not depend on the parameters'
    order, up to rounding not on the dtype, and not on hooks or the bridge.

    >>> sketch_weights(sl.lm.tiny_model(seed=0)) == sketch_weights(sl.lm.tiny_model(seed=0))
    True
    >>> is_same_weights(sketch_weights(sl.lm.tiny_model(seed=0)), sketch_weights(sl.lm.tiny_model(seed=1)))
    False
    """
    weights = list(_find_weights(model))
    if not weights or any(one.dtype not in WHOLE or one.is_meta for one in weights):
        return None
    shapes = sorted(tuple(one.shape) for one in weights)
    entries = torch.stack([_pick(one) for one in weights]).double().cpu()
    phases = torch.arange(1, N_SUMS + 1).double()[:, None] * torch.arange(1, N_ENTRIES + 1)
    sums = (entries @ phases.cos().T).sum(0)
    resolution = max(FINEST, *(torch.finfo(one.dtype).eps for one in weights))
    return (float(zlib.crc32(repr(shapes).encode())), resolution, float(entries.abs().sum()), *sums.tolist())


def is_same_shape(one: Sequence[float], other: Sequence[float]) -> bool:
    """Whether two fingerprints are of models with parameters of the same shapes."""
    return one[0] == other[0]


def is_same_weights(one: Sequence[float], other: Sequence[float]) -> bool:
    """Whether two fingerprints are of the same weights, up to the rounding of the coarser dtype."""
    allowed = TOLERANCE * max(one[1], other[1]) * max(one[2], other[2])
    return is_same_shape(one, other) and all(abs(a - b) <= allowed for a, b in zip(one[2:], other[2:], strict=True))


def _find_weights(model: nn.Module | Model) -> Iterator[Tensor]:
    """Parameters of Hugging Face's own modules, each once, without those that the bridge derived from them."""
    seen: set[int] = set()
    waiting = [unwrap(model.original_model if isinstance(model, Model) else model)]
    while waiting:
        module = waiting.pop()
        if id(module) in seen:
            continue
        seen.add(id(module))
        waiting += [unwrap(child) for child in module.children()]
        for weight in module.parameters(recurse=False):
            if weight.numel() and id(weight) not in seen:
                seen.add(id(weight))
                yield weight


def _pick(weight: Tensor) -> Tensor:
    places = torch.linspace(0, weight.numel() - 1, N_ENTRIES, dtype=torch.float64).long().to(weight.device)
    return weight.detach().reshape(-1)[places].float()


def find_context(model: Model) -> int:
    """Maximum length of a row in tokens; `sys.maxsize` where nothing limits it.

    The limit is the one in the model's own configuration: learned positions end there, rotary ones were trained up to
    it. State-space and recurrent models and those with ALiBi have none, although the bridge reports 2,048 for them.
    Warns where only fields of unknown names may be the limit; then the smallest of them is taken.

    >>> sl.lm.tiny_model(ctx_len=64).cfg.n_ctx, find_context(sl.lm.tiny_model(ctx_len=64))
    (64, 64)
    """
    config: Any = model.original_model.config
    return find_limit(config)


def find_limit(config: Any) -> int:
    """Maximum length of a row in a Hugging Face configuration; see `find_context`."""
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    if getattr(text, "alibi", False) or getattr(text, "model_type", "") in _RECURRENT:
        return sys.maxsize
    if limits := [n for name in _LIMITS if isinstance(n := getattr(text, name, None), int) and n > 0]:
        return min(limits)
    return _guess_limit(text)


def _guess_limit(config: Any) -> int:
    """Smallest value of the fields whose names look like a context length, with a warning."""
    limits = {name: n for name, n in config.to_dict().items() if type(n) is int and n > 1 and _LIKE_LIMITS.search(name)}
    if limits:
        warnings.warn(
            f"A model's longest row must be named by one of {_LIMITS}, got {limits} in its {type(config).__name__}: "
            f"the least is taken, {min(limits.values())} tokens. Set `max_position_embeddings` in its configuration.",
            stacklevel=4,
        )
    return min(limits.values(), default=sys.maxsize)


def find_row(model: Model, text: str) -> int:
    """Row length that is sufficient for a text, at most the model's context."""
    return min(find_context(model), 4 * len(text.encode(errors="replace")) + 16)


def find_known_ids(model: Model) -> Bool[Tensor, "d_vocab"]:
    """Boolean mask of the model's ids that the tokenizer has a token for.

    Vocabularies are often padded to a round number: logits beyond the last token have no meaning and were never
    trained. All True for a model without a tokenizer.

    >>> bool(find_known_ids(sl.lm.tiny_model()).all())
    True
    """
    tokenizer: Any = model.tokenizer
    known = torch.full((model.cfg.d_vocab,), tokenizer is None)
    if tokenizer is not None:
        ids = torch.tensor([*tokenizer.get_vocab().values(), *getattr(tokenizer, "added_tokens_decoder", {})])
        known[ids[ids < len(known)].long()] = True
    return known

"""`HuggingFaceModel`: a plain Hugging Face model as a `Model`, without transformer_lens.

Its hook points have TransformerLens' names, and the numbers there are those of a bridge around the same weights. What
is inside of a Hugging Face module (attention patterns, queries after their rotation) has none, but for a norm's
`hook_normalized`.
"""

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any, TypeAlias
from weakref import WeakValueDictionary

from torch import nn

from saelab.lm.model_checks import Model, admit_object, admit_tokenizer, find_limit, has_processed_weights
from saelab.lm.module_names import count_layers, text_config
from saelab.lm.tokenizers import copy_tokenizer
from saelab.lm.unwrapped import set_attention, strip

AnyModel: TypeAlias = Model | nn.Module
"""What is accepted as a model: what `load_model` returns, or a causal Hugging Face model as it is."""


@dataclass
class HuggingFaceConfig:
    """Sizes of a Hugging Face model, named as in TransformerLens' configuration."""

    d_model: int
    """width of the residual stream"""
    d_vocab: int
    """number of token ids"""
    n_layers: int
    """number of layers"""
    n_heads: int
    """number of attention heads of a layer; 0 without attention"""
    d_head: int
    """width of a head; 0 without attention, or where layers differ"""
    n_ctx: int
    """maximum length of a row in tokens"""
    model_name: str
    """the model's name or folder"""
    architecture: str | None
    """name of its class"""

    @classmethod
    def read(cls, model: Any, name: str) -> "HuggingFaceConfig":
        """The sizes in a Hugging Face model's own configuration, and its name."""
        text = text_config(model)
        width = _find(text, ("hidden_size", "n_embd", "d_model", "dim"))
        n_heads = _find(text, ("num_attention_heads", "n_head", "n_heads", "num_heads"), 0)
        return cls(
            d_model=width,
            d_vocab=_find(text, ("vocab_size", "n_vocab")),
            n_layers=count_layers(text),
            n_heads=n_heads,
            d_head=_find_head(text, width // n_heads if n_heads else 0),
            n_ctx=find_limit(model.config),
            model_name=name,
            architecture=type(model).__name__,
        )


def _find(config: Any, names: tuple[str, ...], default: int | None = None) -> int:
    found = next((value for name in names if isinstance(value := getattr(config, name, None), int)), default)
    if found is None:
        raise ValueError(
            f"A model's configuration must have one of {names}, got a {type(config).__name__} without. Take "
            "backend='transformer_lens'."
        )
    return found


def _find_head(config: Any, default: int) -> int:
    try:
        return _find(config, ("head_dim",), default)
    except Exception:  # Gemma 4's configuration raises an error of its own kind where layers differ
        return 0


class HuggingFaceModel:
    """A causal Hugging Face model with its tokenizer; what `load_model(..., backend="huggingface")` returns.

    The model inside is the one that was given, not a copy: hooks that others put on it take part in whatever is run,
    and `with` blocks that steer or splice hold for its own `generate`, too.

    >>> model = sl.load_model(sl.lm.tiny_model(), backend="huggingface")
    >>> model
    HuggingFaceModel('tiny-llama-32x3-seed0', LlamaForCausalLM, 3 layers of width 32)
    """

    compatibility_mode = False
    """weights are never folded"""

    def __init__(self, hf_model: nn.Module, tokenizer: Any = None, name: str | None = None) -> None:
        """A model and its tokenizer; without one, that of the folder from which the model was loaded, if there is one.

        Args:
            hf_model: the causal Hugging Face model.
            tokenizer: its tokenizer; a copy is kept.
            name: the model's name or folder; None reads it from the model's configuration.

        Raises:
            TypeError: for an object of another kind.
            ValueError: for a model whose weights or outputs saelab cannot read, or the tokenizer of another.
        """
        self.original_model: Any = admit_object(hf_model)
        name = name or getattr(self.original_model.config, "_name_or_path", "") or type(self.original_model).__name__
        self.cfg = HuggingFaceConfig.read(self.original_model, name)
        self._weights_processed = False
        if tokenizer is not None:
            self.tokenizer = copy_tokenizer(tokenizer, name)
            admit_tokenizer(self)

    @cached_property
    def tokenizer(self) -> Any:
        """The tokenizer; None where none was given and the model's folder has none."""
        found = _find_tokenizer(self.cfg.model_name)
        if found is None:
            return None
        self.tokenizer = copy_tokenizer(found, self.cfg.model_name)
        admit_tokenizer(self)
        return self.tokenizer

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What the Hugging Face model returns."""
        return self.original_model(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        """AttributeError that says where to find what others have: a bridge, or the Hugging Face model."""
        if name.startswith("__") or "original_model" not in self.__dict__:
            raise AttributeError(name)
        has = hasattr(self.original_model, name)
        advice = f"Take `.original_model.{name}`" if has else "For what a TransformerBridge has, load it with"
        ending = "." if has else " backend='transformer_lens'."
        raise AttributeError(f"{type(self).__name__} has no attribute '{name}'. {advice}{ending}", name=name, obj=self)

    def __repr__(self) -> str:
        sizes = f"{self.cfg.n_layers} layers of width {self.cfg.d_model}"
        return f"{type(self).__name__}({Path(self.cfg.model_name).name!r}, {self.cfg.architecture}, {sizes})"

    def enable_compatibility_mode(self, *args: Any, **kwargs: Any) -> Any:
        """ValueError: only a TransformerBridge folds weights."""
        raise ValueError(
            "Folding weights needs transformer_lens, got a plain Hugging Face model. Take "
            "`load_model(..., weight_processing='folded', backend='transformer_lens')`."
        )

    def modules(self) -> Iterator[nn.Module]:
        """All modules, as in `torch.nn.Module`."""
        return self.original_model.modules()

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Parameters with their names, as in `torch.nn.Module`."""
        return self.original_model.named_parameters()

    def parameters(self) -> Iterator[nn.Parameter]:
        """All parameters, as in `torch.nn.Module`."""
        return self.original_model.parameters()

    def to(self, *args: Any, **kwargs: Any) -> "HuggingFaceModel":
        """The model on another device or in another dtype, in place, as in `torch.nn.Module`."""
        self.original_model.to(*args, **{key: value for key, value in kwargs.items() if key != "print_details"})
        return self


def _find_tokenizer(name: str) -> Any:
    """The tokenizer in a folder, or in the cache of a Hub repository; None where there is none. Nothing is fetched."""
    try:
        return _read_tokenizer(name)
    except (OSError, ValueError, KeyError, ImportError):  # not kept: one may be saved there later
        return None


@cache
def _read_tokenizer(name: str) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(name, local_files_only=True)


_wrapped: "WeakValueDictionary[int, HuggingFaceModel]" = WeakValueDictionary()


def as_model(model: AnyModel) -> Model:
    """The model itself, or a `HuggingFaceModel` around a Hugging Face model.

    The same one while somebody uses it. Whoever calls many functions saves the short forward passes that each makes
    first by `model = load_model(hf_model)`.

    Raises:
        TypeError: for an object of another kind, such as a HookedTransformer.
        ValueError: for a model whose weights or outputs saelab cannot read.
    """
    if isinstance(model, HuggingFaceModel) or is_bridge(model):
        return model  # type: ignore[return-value]
    if not isinstance(model, nn.Module):
        raise TypeError(
            "A model must be what `saelab.load_model` returns, or a causal Hugging Face model, got a "
            f"{type(model).__name__}. Give its name or folder to `saelab.load_model`."
        )
    inner = getattr(model, "_orig_mod", model)  # of a compiled model
    found = _wrapped.get(id(inner))
    if found is None:  # the model cannot be gone, and its id another's, while its wrapper holds it
        found = _wrapped[id(inner)] = HuggingFaceModel(inner)
    return found


def is_bridge(model: Any) -> bool:
    """Whether an object is a TransformerBridge; transformer_lens is not imported to tell."""
    bridges = sys.modules.get("transformer_lens.model_bridge")
    return bridges is not None and isinstance(model, bridges.TransformerBridge)


def plain_of(model: Model) -> HuggingFaceModel:
    """A plain model of a model's weights, with modules of its own; ValueError for a bridge that has folded them."""
    if has_processed_weights(model):
        raise ValueError(
            "Hugging Face's modules need raw weights, got a bridge that has folded them. Load the model again, or give "
            "its name or folder."
        )
    hf_model, _ = strip(model.original_model)
    if is_bridge(model):
        set_attention(hf_model, "eager")  # also ends the output of attention maps
    return HuggingFaceModel(hf_model, model.tokenizer, model.cfg.model_name)

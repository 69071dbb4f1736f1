"""What goes into a torch module: tensors as they are, or texts through a tokenizer; and what passes a module in it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, TypeAlias

import torch
from jaxtyping import Bool
from torch import Tensor, nn

from saelab.lm.text_encoders import find_tokenizer, is_pretrained, is_sentence_transformer
from saelab.lm.unwrapped import attach, evaluating

ModuleExample: TypeAlias = str | Sequence[str] | Tensor | Mapping[str, Tensor]
"""Text or texts, which a tokenizer turns into tensors; the tensor that the module takes; or its arguments by name."""


@dataclass(frozen=True, eq=False)
class ModuleInputs:
    """A torch module with the arguments of a call, and which positions of them are text."""

    model: nn.Module
    given: Mapping[str, Tensor] | Tensor
    real: Bool[Tensor, "batch n"] | None = None
    """positions that are not padding; None where nothing says so"""
    text: Bool[Tensor, "batch n"] | None = None
    """of these, without the tokenizer's special tokens"""

    def run(self) -> Any:
        """What the module returns, in evaluation mode; gradients as enabled by the caller."""
        with evaluating(self.model):
            return self.model(self.given) if isinstance(self.given, Tensor) else self.model(**self.given)

    @torch.no_grad()
    def capture(self, module: nn.Module) -> Tensor:
        """The output of a module in it, the first where there are several, without gradient; RuntimeError unless it
        runs once.
        """
        seen: list[Tensor] = []
        with attach((module, "hook_out"), keep_output(seen)):
            self.run()
        if len(seen) != 1:
            raise RuntimeError(
                f"A module that is read must run once in a forward pass, a {type(module).__name__} ran {len(seen)} "
                "times; choose another one, or one that is part of the model."
            )
        return seen[0]


def keep_output(seen: list[Tensor]) -> Callable[[Tensor], None]:
    """A hook function that changes nothing and keeps a copy of what passes."""

    def tap(x: Any) -> None:
        require_tensor(x)
        seen.append(x.detach().clone())

    return tap


def require_tensor(x: Any) -> None:
    """Raise TypeError for what passes a module and is no tensor, such as the named outputs of a whole model."""
    if not isinstance(x, Tensor):
        raise TypeError(
            "A module that is read or steered must put out a tensor, or a tuple that begins with one, got "
            f"{type(x).__name__}; choose a layer inside of it."
        )


def find_module(model: Any, place: nn.Module | str) -> nn.Module:
    """The module itself, or that of a dotted name in the model; ValueError with similar names where there is none.

    >>> find_module(torch.nn.Sequential(torch.nn.Linear(2, 3)), "0")
    Linear(in_features=2, out_features=3, bias=True)
    """
    if isinstance(place, nn.Module):
        return place
    names = dict(model.named_modules())
    if place not in names:
        near = get_close_matches(place, names, n=5, cutoff=0.4) or list(names)[-5:]
        raise ValueError(f"No module {place!r} in a {type(model).__name__}. Did you mean one of: {', '.join(near)}?")
    found: nn.Module = names[place]
    return found


def make_inputs(model: Any, example: ModuleExample, tokenizer: Any = None) -> ModuleInputs:
    """The arguments of a call of a module.

    Of a model of sentence-transformers its transformer is called, of a Hugging Face model with a decoder its encoder.

    Args:
        model: any torch module; with texts one that takes `input_ids`.
        example: text or texts, a tensor, or tensors by name.
        tokenizer: of texts, called as Hugging Face's are; None is the model's own.

    Raises:
        ValueError: texts for a model without tokenizer, and a blank text.
        TypeError: a model that is no torch module.
    """
    if is_sentence_transformer(model):
        model, tokenizer = model[0].auto_model, tokenizer or model.tokenizer
    if not isinstance(model, nn.Module):
        raise TypeError(f"`model` must be a torch module, got {type(model).__name__}.")
    if isinstance(example, Tensor):
        return ModuleInputs(model, example)
    if isinstance(example, Mapping):
        real = example.get("attention_mask")
        return ModuleInputs(model, dict(example), None if real is None else real.bool())
    texts = [example] if isinstance(example, str) else list(example)
    if not texts or not all(isinstance(text, str) and text.strip() for text in texts):
        raise ValueError(f"Texts must be at least one, none of them blank, got {texts[:3]!r}.")
    if is_pretrained(model):
        tokenizer = tokenizer or find_tokenizer(model)
        decodes: Any = model if getattr(model.config, "is_encoder_decoder", False) else None
        model = decodes.get_encoder() if decodes is not None and hasattr(decodes, "get_encoder") else model
    if tokenizer is None:
        raise ValueError(f"`tokenizer` must be given for texts and a {type(model).__name__}, got None.")
    return _tokenize(model, texts, tokenizer)


def _tokenize(model: nn.Module, texts: list[str], tokenizer: Any) -> ModuleInputs:
    rows = tokenizer(texts, truncation=tokenizer.model_max_length < 10**6, return_special_tokens_mask=True)
    width, fill = max(map(len, rows["input_ids"])), tokenizer.pad_token_id or 0
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    ids = torch.tensor([row + [fill] * (width - len(row)) for row in rows["input_ids"]], device=device)
    special = [row + [1] * (width - len(row)) for row in rows["special_tokens_mask"]]
    real = [[True] * len(row) + [False] * (width - len(row)) for row in rows["input_ids"]]
    mask = torch.tensor(real, device=device)
    text = mask & ~torch.tensor(special, device=device).bool()
    return ModuleInputs(model, {"input_ids": ids, "attention_mask": mask.long()}, mask, text)

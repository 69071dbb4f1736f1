"""How far a model reaches: the longest row it can take, and which of its ids have a token."""

import re
import sys
import warnings
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor

from saelab.lm.admission import require_bridge
from saelab.lm.models import Model

# How configurations of Hugging Face name the longest row; most others of their names are kept as aliases of the first.
_LIMITS = ("max_position_embeddings", "n_positions", "max_seq_len", "max_context_length", "max_sequence_length")
_LIKE_LIMITS = re.compile(r"position|context|ctx|seq\w*_len|max_len")
"""what a limit of another name would have in its name"""
_RECURRENT = ("rwkv",)  # its `context_length` sizes a training kernel; a state has no positions


def find_context(model: Model) -> int:
    """The longest row that the model can represent, in tokens; `sys.maxsize` where nothing limits it.

    A limit is what the model's own configuration names: learned positions end there, rotary ones were made for no more.
    State-space and recurrent models and those with ALiBi have none; the bridge writes 2,048 where it finds none. A
    warning where only numbers of other names may be the limit: then the smallest of them is taken.

    >>> sl.tiny_model(ctx_len=64).cfg.n_ctx, find_context(sl.tiny_model(ctx_len=64))
    (64, 64)
    """
    require_bridge(model)
    config: Any = model.original_model.config
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    if getattr(text, "alibi", False) or getattr(text, "model_type", "") in _RECURRENT:
        return sys.maxsize
    if limits := [value for name in _LIMITS if isinstance(value := getattr(text, name, None), int)]:
        return min(limits)
    return _guess_limit(text)


def _guess_limit(config: Any) -> int:
    """The smallest number that a configuration gives by a name like that of a limit, which a warning tells."""
    told = {name: n for name, n in config.to_dict().items() if type(n) is int and n > 1 and _LIKE_LIMITS.search(name)}
    if told:
        warnings.warn(
            f"A model's longest row must be named by one of {_LIMITS}, got {told} in its {type(config).__name__}: the "
            f"smallest is taken, {min(told.values())} tokens. Set `max_position_embeddings` in its configuration.",
            stacklevel=3,
        )
    return min(told.values(), default=sys.maxsize)


def find_row(model: Model, text: str) -> int:
    """A row length that surely holds a text, and is no longer than the model's context."""
    return min(find_context(model), 4 * len(text.encode(errors="replace")) + 16)


def find_known_ids(model: Model) -> Bool[Tensor, "d_vocab"]:
    """Which of the model's ids the tokenizer has a token for.

    Vocabularies are often padded to a round number: logits behind the last token name nothing and were never trained.
    All are known to a model without a tokenizer.

    >>> bool(find_known_ids(sl.tiny_model()).all())
    True
    """
    tokenizer: Any = model.tokenizer
    known = torch.full((model.cfg.d_vocab,), tokenizer is None)
    if tokenizer is not None:
        ids = torch.tensor([*tokenizer.get_vocab().values(), *getattr(tokenizer, "added_tokens_decoder", {})])
        known[ids[ids < len(known)].long()] = True
    return known

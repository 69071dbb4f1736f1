"""Limits of a model: its maximum context length, and which ids of its vocabulary are tokens."""

import re
import sys
import warnings
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor

from saelab.lm.admission import require_bridge
from saelab.lm.models import Model

# Names of the context length in Hugging Face's configurations; most other names are aliases of the first.
_LIMITS = ("max_position_embeddings", "n_positions", "max_seq_len", "max_context_length", "max_sequence_length")
_LIKE_LIMITS = re.compile(r"position|context|ctx|seq\w*_len|max_len")
"""pattern of names that a context length may have in unknown configurations"""
_RECURRENT = ("rwkv",)  # its `context_length` sizes a training kernel; a state has no positions


def find_context(model: Model) -> int:
    """Maximum length of a row in tokens; `sys.maxsize` where nothing limits it.

    The limit is the one in the model's own configuration: learned positions end there, rotary ones were trained up to
    it. State-space and recurrent models and those with ALiBi have none, although the bridge reports 2,048 for them.
    Warns where only fields of unknown names may be the limit; then the smallest of them is taken.

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
    """Smallest value of the fields whose names look like a context length, with a warning."""
    told = {name: n for name, n in config.to_dict().items() if type(n) is int and n > 1 and _LIKE_LIMITS.search(name)}
    if told:
        warnings.warn(
            f"A model's longest row must be named by one of {_LIMITS}, got {told} in its {type(config).__name__}: the "
            f"smallest is taken, {min(told.values())} tokens. Set `max_position_embeddings` in its configuration.",
            stacklevel=3,
        )
    return min(told.values(), default=sys.maxsize)


def find_row(model: Model, text: str) -> int:
    """Row length that is sufficient for a text, at most the model's context."""
    return min(find_context(model), 4 * len(text.encode(errors="replace")) + 16)


def find_known_ids(model: Model) -> Bool[Tensor, "d_vocab"]:
    """Boolean mask of the model's ids that the tokenizer has a token for.

    Vocabularies are often padded to a round number: logits beyond the last token have no meaning and were never
    trained. All True for a model without a tokenizer.

    >>> bool(find_known_ids(sl.tiny_model()).all())
    True
    """
    tokenizer: Any = model.tokenizer
    known = torch.full((model.cfg.d_vocab,), tokenizer is None)
    if tokenizer is not None:
        ids = torch.tensor([*tokenizer.get_vocab().values(), *getattr(tokenizer, "added_tokens_decoder", {})])
        known[ids[ids < len(known)].long()] = True
    return known

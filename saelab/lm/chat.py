"""Answers of a causal language model to a conversation, decoded greedily."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from saelab.lm.extent import find_context
from saelab.lm.generation import generate
from saelab.lm.models import Model
from saelab.lm.special import read_text


def answer(model: Model, messages: Sequence[Mapping[str, str]], n_tokens: int) -> tuple[str, int, int]:
    """Greedy answer to a conversation, with the numbers of tokens of prompt and answer.

    The prompt is made with the tokenizer's chat template where it has one, else the messages are joined as plain text.
    ValueError where prompt and answer do not fit the model's context.

    >>> text, n_in, n_out = answer(sl.tiny_model(), [{"role": "user", "content": "Hi"}], 3)
    >>> n_in, n_out
    (4, 3)
    """
    ids = _encode(model.tokenizer, messages)
    if ids.shape[1] + n_tokens > find_context(model):
        raise ValueError(
            f"A prompt must fit the model's context of {find_context(model)} tokens beside {n_tokens} of the answer, "
            f"got {ids.shape[1]} tokens. Show fewer or shorter texts, or take another model."
        )
    made = generate(model, ids, n_tokens, temperature=0.0, progress=False).samples[0]
    return read_text(model, made.ids), ids.shape[1], len(made.ids)


def _encode(tokenizer: Any, messages: Sequence[Mapping[str, str]]) -> torch.Tensor:
    if tokenizer.chat_template:
        text = tokenizer.apply_chat_template(
            [dict(message) for message in messages], tokenize=False, add_generation_prompt=True
        )
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]  # the template adds its own special tokens
    else:
        ids = tokenizer("\n\n".join(message["content"] for message in messages) + "\n")["input_ids"]
    return torch.tensor([ids])

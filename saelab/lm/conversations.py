"""`Conversation`: messages with roles, as a document or a prompt; the tokenizer's chat template makes them a text.

Templates write their own special tokens, BOS too where the model wants one, so nothing is put before their text.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

Messages: TypeAlias = Sequence[Mapping[str, Any]]
"""a conversation as Hugging Face writes it: {"role": "user", "content": "Hello"} and so on"""


@dataclass(frozen=True)
class Conversation:
    """Messages of a conversation, in order."""

    messages: tuple[dict[str, Any], ...]
    """each with "role" and what was said, as in {"role": "user", "content": "Hello"}"""

    @classmethod
    def find(cls, given: Any) -> "Conversation | None":
        """The conversation in a list of messages; None for anything else.

        >>> Conversation.find([{"role": "user", "content": "Hi"}])
        Conversation(messages=({'role': 'user', 'content': 'Hi'},))
        >>> Conversation.find(["Hi"]), Conversation.find([])
        (None, None)
        """
        if isinstance(given, Conversation):
            return given
        if isinstance(given, np.ndarray) and given.dtype == object and given.ndim == 1:  # a cell of a pandas column
            given = given.tolist()
        if not isinstance(given, list | tuple) or not given:
            return None
        if not all(isinstance(message, Mapping) and isinstance(message.get("role"), str) for message in given):
            return None
        return cls(tuple(dict(message) for message in given))

    def __len__(self) -> int:
        return len(self.messages)

    def write(self, tokenizer: Any, reply: bool = False) -> str:
        """The conversation as the text that the tokenizer's chat template makes of it.

        Args:
            tokenizer: a tokenizer of transformers.
            reply: whether to end with what precedes the assistant's next message.

        Raises:
            ValueError: the tokenizer has no chat template, or the template refuses the messages.
        """
        if not getattr(tokenizer, "chat_template", None):
            raise ValueError(
                f"A conversation needs a tokenizer with a chat template, got {type(tokenizer).__name__} without one. "
                "Write the messages as text, set `tokenizer.chat_template`, or load a model that was tuned for chat."
            )
        try:
            text = tokenizer.apply_chat_template(list(self.messages), tokenize=False, add_generation_prompt=reply)
        except Exception as error:  # whatever a template raises
            roles = [message["role"] for message in self.messages]
            raise ValueError(
                f"A conversation must suit the tokenizer's chat template, got the roles {roles}, of which it says: "
                f"{type(error).__name__}: {error}"
            ) from error
        return str(text)

    def encode(self, tokenizer: Any, reply: bool = False) -> list[int]:
        """Token ids of `write`, special tokens read as such and none added."""
        ids: list[int] = tokenizer(self.write(tokenizer, reply), add_special_tokens=False, verbose=False)["input_ids"]
        return ids


Prompts: TypeAlias = str | Messages | Conversation | Sequence[str | Conversation | Messages]
"""one prompt or several, each a text or a conversation"""

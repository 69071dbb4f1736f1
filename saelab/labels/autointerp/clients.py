"""Language model clients: what a client is and how it fails, and one for a model on this machine."""

import hashlib
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from saelab.lm.conversations import Messages
from saelab.lm.generation import answer
from saelab.lm.huggingface import AnyModel, as_model
from saelab.lm.model_checks import Model, sketch_weights
from saelab.stores.sharing import shareable


@dataclass(frozen=True, kw_only=True)
class Answer:
    """The response to one prompt, with its token counts."""

    text: str
    tokens_in: int = 0
    """tokens of the prompt; 0 where not counted"""
    tokens_out: int = 0
    """tokens of the response, with those of its reasoning"""
    problem: str = ""
    """reason why the text is no whole answer, such as that it was cut off; empty where it is one"""


class RetryLater(Exception):
    """Raised for a temporary failure: the same prompt may succeed when it is sent again.

    Args:
        reason: what went wrong.
        wait: seconds that the server asks for.
        billed: whether the server may have worked for the prompt, and charge it.
    """

    def __init__(self, reason: str, wait: float | None = None, billed: bool = False) -> None:
        super().__init__(reason)
        self.wait, self.billed = wait, billed


class NotAnswered(Exception):
    """Raised for a permanent failure of one prompt, such as a refusal; other prompts may succeed."""


class Waiting(NotAnswered):
    """Raised for a prompt that was not sent or has no response yet; a later run may succeed."""


@runtime_checkable
class Client(Protocol):
    """Protocol for language model clients; `complete` may be called from several threads at once."""

    name: str
    """author of the labels that the client gives"""
    settings: Mapping[str, Any]
    """settings that, besides the messages, determine a response; both are part of the cache key"""

    def complete(self, messages: Messages) -> Answer:
        """The response to a prompt.

        Raises:
            RetryLater, NotAnswered, Waiting: this prompt alone has no response.
            Exception: any other error ends the run.
        """
        ...


@runtime_checkable
class StructuredClient(Client, Protocol):
    """Protocol for clients whose endpoint can hold a response to a JSON schema."""

    def complete_as(self, messages: Messages, schema: Mapping[str, Any]) -> Answer:
        """The response to a prompt as JSON of this schema, or as free text where the endpoint cannot; raises what
        `complete` does.
        """
        ...


class LocalClient:
    """Client that runs a causal language model on this machine with greedy decoding.

    The model's chat template is used where it has one, else plain text. Its settings hold a fingerprint of the weights,
    so that two models of one name share no cached response.

    >>> LocalClient(sl.lm.tiny_model(), n_tokens=4).complete([{"role": "user", "content": "Hello"}]).tokens_out
    4
    """

    def __init__(self, model: AnyModel, *, n_tokens: int = 256) -> None:
        model = as_model(model)
        self._model, self._n_tokens = model, n_tokens
        self._lock = threading.Lock()  # one model runs one prompt at a time
        self.name = shareable(str(model.cfg.model_name))
        self.settings: Mapping[str, Any] = {
            "model": self.name, "n_tokens": n_tokens, "local": True, "weights": _name_weights(model),
        }  # fmt: skip

    def complete(self, messages: Messages) -> Answer:
        """The text generated until the model ends it, at most `n_tokens` tokens."""
        with self._lock:
            try:
                text, tokens_in, tokens_out, is_whole = answer(self._model, messages, self._n_tokens)
            except ValueError as error:
                raise NotAnswered(str(error)) from None
        problem = "" if is_whole else f"it was cut off after `n_tokens` ({self._n_tokens}) tokens; allow more."
        return Answer(text=text, tokens_in=tokens_in, tokens_out=tokens_out, problem=problem)


def _name_weights(model: Model) -> str:
    """A name of a model's weights, up to the last digits; empty where they are quantized."""
    sketch = sketch_weights(model)
    return hashlib.sha256(" ".join(f"{x:.6g}" for x in sketch).encode()).hexdigest()[:12] if sketch else ""

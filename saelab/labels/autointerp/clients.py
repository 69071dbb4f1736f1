"""Language model clients: any OpenAI-compatible endpoint, or a model loaded locally."""

import os
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from saelab.lm.conversations import Messages
from saelab.lm.generation import answer
from saelab.lm.huggingface import AnyModel, as_model
from saelab.stores.files import find_secrets, hide_password, shareable

HOPELESS = (401, 403, 404)
"""HTTP errors that no other prompt would avoid: wrong key, missing rights, unknown model."""


@dataclass(frozen=True, kw_only=True)
class Answer:
    """The response to one prompt, with its token counts."""

    text: str
    tokens_in: int = 0
    """tokens of the prompt; 0 where not counted"""
    tokens_out: int = 0


class RetryLater(Exception):
    """Raised for a temporary failure: the same prompt may succeed when it is sent again."""

    def __init__(self, reason: str, wait: float | None = None) -> None:
        super().__init__(reason)
        self.wait = wait
        """seconds that the server asks for"""


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


class OpenAIClient:
    """Client for any OpenAI-compatible endpoint; needs `pip install 'saelab[llm]'`.

    The API key is kept out of every message and file.

    Args:
        model: the model's name at the endpoint.
        base_url: address of the endpoint; None is OpenAI's own.
        key_from: environment variable that holds the API key; a server of one's own may do without.
        timeout: seconds to wait for a response.
        settings: sent with each request; None is temperature 0 and at most 512 tokens. Some models take
            `max_completion_tokens` instead of `max_tokens`, or no temperature.

    Raises:
        ValueError: the key is missing or refused, or the endpoint does not know the model.
    """

    def __init__(
        self,
        model: str,
        base_url: str | None = None,
        *,
        key_from: str = "OPENAI_API_KEY",
        timeout: float = 60.0,
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        openai = _import_openai()
        self._key = os.environ.get(key_from, "")
        if base_url is None and not self._key:
            raise ValueError(
                f"`key_from` must name an environment variable with a key, got {key_from}, which is empty."
            )
        self.name, self.base_url = model, base_url
        self._place = hide_password(base_url) if base_url is not None else None
        self._more = dict({"temperature": 0, "max_tokens": 512} if settings is None else settings)
        self.settings: Mapping[str, Any] = {"model": model, **self._more}
        # Retries of the library would not be counted: `RequestQueue` retries.
        self._openai = openai.OpenAI(api_key=self._key or "none", base_url=base_url, max_retries=0, timeout=timeout)

    def __repr__(self) -> str:
        return f"OpenAIClient({self.name!r}, {self._place!r})"

    def close(self) -> None:
        """Close the client's connections."""
        self._openai.close()

    def complete(self, messages: Messages) -> Answer:
        """The response to one request, which is never repeated here."""
        openai = _import_openai()
        try:
            given = self._openai.chat.completions.create(
                model=self.name, messages=[dict(message) for message in messages], **self._more
            )
            return _read_completion(given)
        except openai.APIStatusError as error:
            raise self._explain(error.status_code, str(error), error.response.headers) from None
        except openai.APITimeoutError:
            raise RetryLater("no answer in time") from None
        except openai.APIConnectionError as error:
            raise RetryLater(self._clean(f"the connection failed: {error.__cause__ or error}")) from None
        except (openai.APIError, ValueError, TypeError, AttributeError, LookupError) as error:
            raise RetryLater(self._clean(f"not a completion: {error}")) from None

    def _explain(self, status: int, said: str, headers: Mapping[str, str]) -> Exception:
        said = self._clean(said)
        if status in HOPELESS:
            return ValueError(
                f"The endpoint {self._place or 'of OpenAI'} must know the model '{self.name}' and accept the key, "
                f"got {status}: {said} Check the model's name, the URL and the key."
            )
        if status in (408, 409, 425, 429) or status >= 500:
            return RetryLater(f"{status}: {said}", _read_wait(headers))
        return NotAnswered(f"{status}: {said}")

    def _clean(self, text: str) -> str:
        """The text without key and address: servers repeat them in errors, and neither may be shown or written."""
        for secret in filter(None, (self._key, *find_secrets(self.base_url or ""))):
            text = text.replace(secret, "***")
        return text[:300]


def _import_openai() -> Any:
    try:
        import openai
    except ImportError as error:
        raise ImportError(
            "The package openai must be installed for `OpenAIClient`: pip install 'saelab[llm]'."
        ) from error
    return openai


def _read_completion(given: Any) -> Answer:
    """Text and token usage of a completion; servers leave fields out, and some respond with anything at all."""
    text = given.choices[0].message.content
    if not isinstance(text, str):
        raise ValueError("its content is no text")
    usage = given.usage
    counts = (getattr(usage, name, 0) for name in ("prompt_tokens", "completion_tokens"))
    tokens_in, tokens_out = (count if isinstance(count, int) else 0 for count in counts)
    return Answer(text=text, tokens_in=tokens_in, tokens_out=tokens_out)


def _read_wait(headers: Mapping[str, str]) -> float | None:
    """Retry-After, in seconds or as a date."""
    from email.utils import parsedate_to_datetime
    from time import time

    given = headers.get("retry-after", "")
    try:
        return max(0.0, float(given))
    except ValueError:
        pass
    try:
        return max(0.0, parsedate_to_datetime(given).timestamp() - time())
    except (ValueError, TypeError):
        return None


class LocalClient:
    """Client that runs a causal language model on this machine with greedy decoding.

    The model's chat template is used where it has one, else plain text.

    >>> LocalClient(sl.lm.tiny_model(), n_tokens=4).complete([{"role": "user", "content": "Hello"}]).tokens_out
    4
    """

    def __init__(self, model: AnyModel, *, n_tokens: int = 256) -> None:
        model = as_model(model)
        self._model, self._n_tokens = model, n_tokens
        self._lock = threading.Lock()  # one model runs one prompt at a time
        self.name = shareable(str(model.cfg.model_name))
        self.settings: Mapping[str, Any] = {"model": self.name, "n_tokens": n_tokens, "local": True}

    def complete(self, messages: Messages) -> Answer:
        """The text generated until the model ends it, at most `n_tokens` tokens."""
        with self._lock:
            try:
                text, tokens_in, tokens_out = answer(self._model, messages, self._n_tokens)
            except ValueError as error:
                raise NotAnswered(str(error)) from None
        return Answer(text=text, tokens_in=tokens_in, tokens_out=tokens_out)

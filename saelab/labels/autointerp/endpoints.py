"""`OpenAIClient`: a language model at any endpoint of OpenAI's protocol, whatever settings it takes."""

import hashlib
import inspect
import logging
import os
import re
import threading
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

from saelab.labels.autointerp.clients import Answer, NotAnswered, RetryLater
from saelab.lm.conversations import Messages
from saelab.stores.files import find_secrets, hide_password

logger = logging.getLogger(__name__)
HOPELESS = (401, 403, 404)
"""HTTP errors that no other prompt would avoid: wrong key, missing rights, unknown model."""
SETTINGS = {"temperature": 0, "max_tokens": 512}
"""sent with a request unless the caller says otherwise"""
LIMITS = ("max_tokens", "max_completion_tokens")
"""two names of the same limit, of which a model takes one"""
N_REASONING = 4096
"""limit where a model takes `max_completion_tokens` alone, which counts its reasoning"""
TIMEOUT = 60.0
FORMAT = "response_format"
REFUSALS = (400, 422, 500, 501)
"""HTTP errors of requests with a setting that the model or its server does not take"""
REFUSED_CODES = ("unsupported_parameter", "unsupported_value", "unknown_parameter")
REFUSED = re.compile(
    r"un(?:supported|recogni[sz]ed|known|expected|available)|(?:not|n't|never) (?:be )?"
    r"(?:supported?|permitted|allowed|available|implemented|recogni[sz]ed|accepted?|valid)|deprecated|extra_forbidden",
    re.IGNORECASE,
)
SCHEMA = re.compile(r"response_?format|json.?schema|invalid schema|grammar|structured output|guided", re.IGNORECASE)


class OpenAIClient:
    """Client for any OpenAI-compatible endpoint; needs the package openai.

    A default setting that the model refuses is left out of all later requests, and the limit of tokens takes the
    other of its two names; a warning says so once. What the caller set is sent as it is, or the run ends with an error.
    Answers that are empty, cut off or withheld are no answers, and are billed: `Answer.problem` says why. The API key
    is kept out of every message and file.

    Args:
        model: the model's name at the endpoint.
        base_url: address of the endpoint; None is OpenAI's own, or what OPENAI_BASE_URL names.
        key_from: environment variable that holds the API key; a server of one's own may do without.
        timeout: seconds to wait for a response.
        settings: added to temperature 0 and at most 512 tokens, or in their place; None as a value leaves a setting
            out. The limit is 4,096 tokens where the model takes `max_completion_tokens` alone, which counts reasoning.
        structured: whether the endpoint is asked to hold responses to their JSON schema; where it refuses, responses
            are read from free text.

    Raises:
        ValueError: the key is missing or refused, the endpoint does not know the model, or it refuses a setting that
            the caller gave.

    >>> client = OpenAIClient("some-model", "http://127.0.0.1:8000/v1", settings={"temperature": None})
    >>> client, "temperature" in client.settings
    (OpenAIClient('some-model', 'http://127.0.0.1:8000/v1'), False)
    >>> client.close()
    """

    def __init__(
        self,
        model: str,
        base_url: str | None = None,
        *,
        key_from: str = "OPENAI_API_KEY",
        timeout: float = TIMEOUT,
        settings: Mapping[str, Any] | None = None,
        structured: bool = True,
    ) -> None:
        openai = _import_openai()
        self._key = os.environ.get(key_from, "")
        if base_url is None and not self._key:
            raise ValueError(
                f"`key_from` must name an environment variable with a key, got {key_from}, which is empty."
            )
        # Retries of the library would not be counted: `RequestQueue` retries.
        self._openai = openai.OpenAI(api_key=self._key or "none", base_url=base_url, max_retries=0, timeout=timeout)
        self.name, self.base_url, self.structured = model, base_url, structured
        self._address = str(self._openai.base_url) if base_url is None else base_url
        self._place = hide_password(self._address)
        self._more = _merge(settings or {})
        self._own = frozenset(settings or ())
        self._known = frozenset(inspect.signature(self._openai.chat.completions.create).parameters)
        self._refused: set[str] = set()
        self._lock = threading.Lock()
        self.settings: Mapping[str, Any] = {
            "model": model, "endpoint": name_endpoint(self._address), "structured": structured, **self._more,
        }  # fmt: skip

    def __repr__(self) -> str:
        return f"OpenAIClient({self.name!r}, {self._place!r})"

    def close(self) -> None:
        """Close the client's connections."""
        self._openai.close()

    def complete(self, messages: Messages) -> Answer:
        """The response to one request, which is repeated only where a setting was refused."""
        return self._ask(messages, None)

    def complete_as(self, messages: Messages, schema: Mapping[str, Any]) -> Answer:
        """The response as JSON of a schema, or as free text where the endpoint refuses schemas."""
        return self._ask(messages, schema if self.structured else None)

    def _ask(self, messages: Messages, schema: Mapping[str, Any] | None) -> Answer:
        openai = _import_openai()
        while True:  # each turn but the last finds out one more setting that the model refuses
            sent = self._choose(schema)
            inside, outside = (
                {n: v for n, v in sent.items() if (n in self._known) is known} for known in (True, False)
            )
            try:
                given = self._openai.chat.completions.create(
                    model=self.name, messages=[dict(message) for message in messages], **inside, extra_body=outside
                )
            except openai.APIStatusError as error:
                if not self._adapt(error, sent):
                    raise self._explain(error.status_code, _quote_error(error), error.response.headers) from None
            except openai.APIConnectionError as error:
                late, cause = isinstance(error, openai.APITimeoutError), error.__cause__ or error
                said = "no answer in time" if late else self._clean(f"the connection failed: {cause}")
                # Without a connection nothing was sent; afterwards the model may be at work, and is paid for.
                raise RetryLater(said, billed="Connect" not in type(cause).__name__) from None
            except (openai.APIError, ValueError) as error:
                raise RetryLater(self._clean(f"not a completion: {error}")) from None
            else:
                return self._read(given, sent)

    def _choose(self, schema: Mapping[str, Any] | None) -> dict[str, Any]:
        """The settings of a request, without those that were refused before."""
        with self._lock:
            refused = set(self._refused)
        sent = {name: value for name, value in self._more.items() if name not in refused}
        for name, other in (LIMITS, LIMITS[::-1]):
            if name in refused and name in self._more:
                sent[other] = self._more[name] if name in self._own else max(self._more[name], N_REASONING)
        if schema is not None and FORMAT not in refused and FORMAT not in sent:
            named = {"name": "answer", "strict": True, "schema": dict(schema)}
            sent[FORMAT] = {"type": "json_schema", "json_schema": named}
        return sent

    def _adapt(self, error: Any, sent: Mapping[str, Any]) -> bool:
        """Whether a request failed by a setting that later ones go without, or by another name."""
        name = _find_refused(error, sent)
        if name is None:
            return False
        with self._lock:
            if name in self._refused:  # by another thread, in the meantime
                return True
            both = name in LIMITS and set(LIMITS) - {name} <= self._refused
            if both or (name in self._own and name not in LIMITS):
                raise ValueError(
                    f"The endpoint {self._place} must take the setting `{name}`, got {error.status_code}: "
                    f"{self._clean(_quote_error(error))} Leave it out of `settings` by None, or give another value."
                ) from None
            self._refused.add(name)
        what = "it is sent under its other name" if name in LIMITS else "it is left out"
        logger.warning("%s at %s refuses the setting %s: from now on %s", self.name, self._place, name, what)
        return True

    def _read(self, given: Any, sent: Mapping[str, Any]) -> Answer:
        """Token usage first, then text, of a completion; servers leave fields out, and some send anything at all."""
        tokens_in, tokens_out, n_reasoning = _read_usage(given)
        try:
            choice = given.choices[0]
            message = choice.message
        except (AttributeError, TypeError, LookupError) as error:
            if not tokens_in + tokens_out:
                raise RetryLater(self._clean(f"not a completion: {error}")) from None
            return Answer(text="", tokens_in=tokens_in, tokens_out=tokens_out, problem="it holds no choice.")
        text, finish = _read_content(getattr(message, "content", None)), getattr(choice, "finish_reason", None)
        refusal, problem = getattr(message, "refusal", None), ""
        if finish == "length":
            limit = next((name for name in LIMITS if name in sent), LIMITS[0])
            tokens_out = tokens_out or int(sent.get(limit) or 0)
            spent = f"{tokens_out:,} tokens" + (f", {n_reasoning:,} of them reasoning" if n_reasoning else "")
            problem = f"it was cut off after {spent}; allow more by `{limit}` ({sent.get(limit, 'not set')})."
        elif finish == "content_filter" or refusal:
            problem = self._clean(f"it was withheld: {refusal or 'content filter'}.")
        elif not text.strip():
            problem = "it is empty."
        return Answer(text=text, tokens_in=tokens_in, tokens_out=tokens_out, problem=problem)

    def _explain(self, status: int, said: str, headers: Mapping[str, str]) -> Exception:
        said = self._clean(said)
        if status in HOPELESS:
            return ValueError(
                f"The endpoint {self._place} must know the model '{self.name}' and accept the key, "
                f"got {status}: {said} Check the model's name, the URL and the key."
            )
        if status in (408, 409, 425, 429) or status >= 500:
            return RetryLater(f"{status}: {said}", _read_wait(headers))
        return NotAnswered(f"{status}: {said}")

    def _clean(self, text: str) -> str:
        """The text without key and address: servers repeat them in errors, and neither may be shown or written."""
        for secret in filter(None, (self._key, *find_secrets(self._address))):
            text = text.replace(secret, "***")
        return text[:300]


def name_endpoint(url: str) -> str:
    """A short name of an endpoint's address that does not reveal it: equal for equal host, port and path.

    >>> name_endpoint("http://ada:secret@HOST:8000/v1/") == name_endpoint("http://host:8000/v1")
    True
    """
    parts = urlsplit(url)
    place = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}".casefold() + parts.path.rstrip("/")
    return hashlib.sha256(place.encode()).hexdigest()[:12]


def _merge(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings to send: the defaults under those of the caller, of which one limit of tokens replaces the other."""
    left = {n: v for n, v in SETTINGS.items() if not (n in LIMITS and set(LIMITS) & set(settings))}
    return {name: value for name, value in {**left, **settings}.items() if value is not None}


def _import_openai() -> Any:
    try:
        import openai
    except ImportError as error:
        raise ImportError(
            "The package openai must be installed for `OpenAIClient`: pip install 'openai>=1.56'."
        ) from error
    return openai


def _quote_error(error: Any) -> str:
    """What an error says; the client leaves out the body where it is not in OpenAI's form, such as FastAPI's."""
    said, body = str(error), getattr(error, "body", None)
    return said if not body or str(body) in said or "{" in said else f"{said} - {body}"


def _find_refused(error: Any, sent: Mapping[str, Any]) -> str | None:
    """The setting by which a request failed, as the error's fields or its words say; None where it was another cause.

    Words alone count only where they speak of what is not supported: a prompt that is too long names settings too.
    """
    if error.status_code not in REFUSALS:
        return None
    said, param = _quote_error(error), str(getattr(error, "param", None) or "")
    if FORMAT in sent and (param.startswith(FORMAT) or SCHEMA.search(said)):
        return FORMAT
    is_refusal = getattr(error, "code", None) in REFUSED_CODES or REFUSED.search(said)
    if not is_refusal:
        return None
    if param in sent:
        return param
    return next((name for name in sent if re.search(rf"\b{re.escape(name)}\b", said)), None)


def _read_usage(given: Any) -> tuple[int, int, int]:
    """Tokens of prompt, response and reasoning; 0 where not counted.

    Some servers count reasoning in the total alone, so that the response is what the total has beside the prompt.
    """
    usage = getattr(given, "usage", None)

    def read(name: str, of: Any = usage) -> int:
        count = getattr(of, name, None)
        return count if isinstance(count, int) and count > 0 else 0

    n_in, n_out, total = (read(f"{name}_tokens") for name in ("prompt", "completion", "total"))
    details = getattr(usage, "completion_tokens_details", None)
    return n_in, max(n_out, total - n_in if n_in else 0), read("reasoning_tokens", details)


def _read_content(content: Any) -> str:
    """The text of a message, which may come in parts, such as reasoning and answer."""
    if isinstance(content, list):
        parts = [part if isinstance(part, dict) else getattr(part, "__dict__", {}) for part in content]
        content = "".join(str(part.get("text") or "") for part in parts if part.get("type") == "text")
    return content if isinstance(content, str) else ""


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

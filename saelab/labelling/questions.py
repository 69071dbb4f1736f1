"""Requests to a language model, their settings, and their cost."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Generic, TypeVar

from saelab.labelling.clients import Messages
from saelab.stores.results import Result

T = TypeVar("T")
BYTES_PER_TOKEN = 3.5
"""approximate value for English with much JSON in it"""


@dataclass(frozen=True, kw_only=True)
class Question(Generic[T]):
    """A prompt with the parser of its response; `read` raises ValueError with the fault where it cannot be parsed."""

    messages: Messages
    read: Callable[[str], T]
    tokens_out: int = 40
    """approximate length of a response"""


@dataclass(frozen=True, kw_only=True)
class Reply(Generic[T]):
    """The result of a question: a value, or the reason why there is none."""

    value: T | None = None
    problem: str = ""
    is_waiting: bool = False
    """not requested or not answered yet; a later run may fill it in"""


@dataclass(frozen=True, kw_only=True)
class AskConfig:
    """Settings of requests: parallelism, retries, prices and budget.

    >>> AskConfig(price_in=0.15, price_out=0.6).cost(2_000_000, 500_000)
    0.6
    """

    n_parallel: int = 4
    """requests in flight at once"""
    n_tries: int = 6
    """attempts per request, where the server is busy, fails or cannot be reached"""
    n_asks: int = 3
    """requests per question, where the response cannot be parsed"""
    wait: float = 1.0
    """seconds before the second attempt; doubled each time, with a random factor of 0.5 to 1.5"""
    longest_wait: float = 60.0
    """seconds; if a server asks for a longer wait, the prompt is left for a later run"""
    price_in: float | None = None
    """price of a million prompt tokens, in any currency; None where unknown"""
    price_out: float | None = None
    """price of a million response tokens"""
    budget: float | None = None
    """largest cost of one run, in the currency of the prices, which must be given; None for no limit"""
    seed: int = 0
    """seed of the random factor of waits"""

    def __post_init__(self) -> None:
        for name in ("n_parallel", "n_tries", "n_asks"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1, got {getattr(self, name)}.")
        if self.budget is not None and self.cost(0, 0) is None:
            raise ValueError("`budget` needs `price_in` and `price_out`, per million tokens; got it without them.")

    def cost(self, tokens_in: int, tokens_out: int) -> float | None:
        """The cost of so many prompt and response tokens; None without prices."""
        if self.price_in is None or self.price_out is None:
            return None
        return (tokens_in * self.price_in + tokens_out * self.price_out) / 1e6


@dataclass(frozen=True, kw_only=True)
class Usage(Result):
    """Requests, tokens and cost of one run."""

    n_requests: int = 0
    """responses received from the client"""
    n_kept: int = 0
    """responses taken from the cache"""
    n_retries: int = 0
    tokens_in: int = 0
    tokens_out: int = 0
    cost: float | None = None
    """None without prices"""
    seconds: float = 0.0
    stopped: str = ""
    """reason why prompts were not sent; empty where all were"""

    def __str__(self) -> str:
        lines = [f"{self.n_requests:,} answers asked for, {self.n_kept:,} kept from before, {self.n_retries:,} retries"]
        lines.append(
            f"{self.tokens_in:,} tokens in, {self.tokens_out:,} out, cost {_price(self.cost)}, {self.seconds:.1f} s"
        )
        return "\n".join(lines + ([f"stopped: {self.stopped}"] if self.stopped else []))


@dataclass(frozen=True, kw_only=True)
class Estimate(Result):
    """Approximate requests, tokens, cost and time of some questions; cached responses cost nothing."""

    n_requests: int
    n_kept: int
    tokens_in: int
    tokens_out: int
    cost: float | None
    """None without prices"""
    seconds: float
    seconds_each: float
    """mean time of the cached responses; two seconds where there are none"""

    def __str__(self) -> str:
        return (
            f"about {self.n_requests:,} prompts ({self.n_kept:,} more answered before), {self.tokens_in:,} tokens in, "
            f"{self.tokens_out:,} out, cost {_price(self.cost)}, {self.seconds:.0f} s at {self.seconds_each:.2g} s each"
        )

    def times(self, factor: float) -> "Estimate":
        """The estimate for `factor` times as many questions."""
        names = ("n_requests", "n_kept", "tokens_in", "tokens_out")
        counts = {name: round(getattr(self, name) * factor) for name in names}
        cost = None if self.cost is None else self.cost * factor
        return replace(self, **counts, cost=cost, seconds=self.seconds * factor)


def count_tokens(messages: Messages) -> int:
    """Approximate number of tokens of a prompt, from its bytes, as the model's tokenizer is not known here.

    >>> count_tokens([{"role": "user", "content": "x" * 700}])
    204
    """
    return sum(4 + int(len(message["content"].encode()) / BYTES_PER_TOKEN) for message in messages)


def remind(messages: Messages, answer: str, problem: str) -> Messages:
    """The conversation that asks again after a response that could not be parsed; it has a cache key of its own."""
    shown = answer[:2000].strip() or "(nothing)"
    again = f"That answer could not be read: {problem} Answer again, with the JSON that was asked for and nothing else."
    return [*messages, {"role": "assistant", "content": shown}, {"role": "user", "content": again}]


def _price(cost: float | None) -> str:
    return "unknown, no prices given" if cost is None else f"{cost:.4g}"


def sum_tokens(questions: Sequence[Question]) -> tuple[int, int]:
    """Approximate numbers of prompt and response tokens of some questions."""
    return sum(count_tokens(q.messages) for q in questions), sum(q.tokens_out for q in questions)

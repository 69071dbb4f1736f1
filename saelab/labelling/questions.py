"""What is asked of a client, how it is sent, and what that takes."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Generic, TypeVar

from saelab.labelling.clients import Messages
from saelab.stores.results import Result

T = TypeVar("T")
BYTES_PER_TOKEN = 3.5
"""of English with much JSON in it, about"""


@dataclass(frozen=True, kw_only=True)
class Question(Generic[T]):
    """A prompt, and how its answer is read: `read` raises ValueError, saying what is wrong, where it cannot be."""

    messages: Messages
    read: Callable[[str], T]
    tokens_out: int = 40
    """of an answer, about"""


@dataclass(frozen=True, kw_only=True)
class Reply(Generic[T]):
    """What became of a question: a value, or the reason why there is none."""

    value: T | None = None
    problem: str = ""
    is_waiting: bool = False
    """it was not asked, or has no answer yet: another run may bring one"""


@dataclass(frozen=True, kw_only=True)
class AskConfig:
    """How prompts are sent.

    >>> AskConfig(price_in=0.15, price_out=0.6).cost(2_000_000, 500_000)
    0.6
    """

    n_parallel: int = 4
    """requests at a time"""
    n_tries: int = 6
    """of one request, where the server is busy, fails or cannot be reached"""
    n_asks: int = 3
    """of one question, where the answer cannot be read"""
    wait: float = 1.0
    """seconds before the second try; doubles each time, and is spread by half of itself either way"""
    longest_wait: float = 60.0
    """seconds; a server that asks for more has the prompt left for another run"""
    price_in: float | None = None
    """of a million tokens of prompts, in any currency; None where unknown"""
    price_out: float | None = None
    """of a million tokens of answers"""
    budget: float | None = None
    """what one run may cost; needs the prices"""
    seed: int = 0
    """of the spread of waits"""

    def __post_init__(self) -> None:
        for name in ("n_parallel", "n_tries", "n_asks"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1, got {getattr(self, name)}.")
        if self.budget is not None and self.cost(0, 0) is None:
            raise ValueError("`budget` needs `price_in` and `price_out`, per million tokens; got it without them.")

    def cost(self, tokens_in: int, tokens_out: int) -> float | None:
        """What so many tokens cost; None without prices."""
        if self.price_in is None or self.price_out is None:
            return None
        return (tokens_in * self.price_in + tokens_out * self.price_out) / 1e6


@dataclass(frozen=True, kw_only=True)
class Usage(Result):
    """What one run asked and what that cost."""

    n_requests: int = 0
    """answers that came from the client"""
    n_kept: int = 0
    """answers that an earlier run had kept"""
    n_retries: int = 0
    tokens_in: int = 0
    tokens_out: int = 0
    cost: float | None = None
    """None without prices"""
    seconds: float = 0.0
    stopped: str = ""
    """why prompts were left unasked; empty where none were"""

    def __str__(self) -> str:
        lines = [f"{self.n_requests:,} answers asked for, {self.n_kept:,} kept from before, {self.n_retries:,} retries"]
        lines.append(
            f"{self.tokens_in:,} tokens in, {self.tokens_out:,} out, cost {_price(self.cost)}, {self.seconds:.1f} s"
        )
        return "\n".join(lines + ([f"stopped: {self.stopped}"] if self.stopped else []))


@dataclass(frozen=True, kw_only=True)
class Estimate(Result):
    """What questions would take, about; those answered before cost nothing."""

    n_requests: int
    n_kept: int
    tokens_in: int
    tokens_out: int
    cost: float | None
    """None without prices"""
    seconds: float
    seconds_each: float
    """the mean of the answers kept so far; two seconds where there are none"""

    def __str__(self) -> str:
        return (
            f"about {self.n_requests:,} prompts ({self.n_kept:,} more answered before), {self.tokens_in:,} tokens in, "
            f"{self.tokens_out:,} out, cost {_price(self.cost)}, {self.seconds:.0f} s at {self.seconds_each:.2g} s each"
        )

    def times(self, factor: float) -> "Estimate":
        """For so many times the questions."""
        names = ("n_requests", "n_kept", "tokens_in", "tokens_out")
        counts = {name: round(getattr(self, name) * factor) for name in names}
        cost = None if self.cost is None else self.cost * factor
        return replace(self, **counts, cost=cost, seconds=self.seconds * factor)


def count_tokens(messages: Messages) -> int:
    """Tokens of a prompt, about: nobody here knows the model's tokenizer.

    >>> count_tokens([{"role": "user", "content": "x" * 700}])
    204
    """
    return sum(4 + int(len(message["content"].encode()) / BYTES_PER_TOKEN) for message in messages)


def remind(messages: Messages, answer: str, problem: str) -> Messages:
    """The conversation after an answer that could not be read: another prompt, so it is kept apart from the first."""
    shown = answer[:2000].strip() or "(nothing)"
    again = f"That answer could not be read: {problem} Answer again, with the JSON that was asked for and nothing else."
    return [*messages, {"role": "assistant", "content": shown}, {"role": "user", "content": again}]


def _price(cost: float | None) -> str:
    return "unknown, no prices given" if cost is None else f"{cost:.4g}"


def sum_tokens(questions: Sequence[Question]) -> tuple[int, int]:
    """Tokens in and out of questions, about."""
    return sum(count_tokens(q.messages) for q in questions), sum(q.tokens_out for q in questions)

"""Queue of language model requests: parallel, retried, cached, within a budget, and their cost.

Requests run on several threads; Ctrl-C ends the queue without losing those under way.
"""

import logging
import queue
import random
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Generic, TypeVar

from saelab.labels.autointerp.clients import Answer, Client, NotAnswered, RetryLater, StructuredClient, Waiting
from saelab.labels.autointerp.response_cache import AnswerLog, OfflineClient, make_key
from saelab.lm.conversations import Messages
from saelab.stores.jobs import DeferredInterrupt, hidden
from saelab.stores.results import Result
from saelab.training.ranks import ALONE, RankGrid

logger = logging.getLogger(__name__)
Parsed = TypeVar("Parsed")
BYTES_PER_TOKEN = 3.5
"""approximate value for English with much JSON in it"""
J = TypeVar("J")
R = TypeVar("R")
LOOK = 0.05  # seconds between two looks at whether Ctrl-C was pressed
T = TypeVar("T")
FAILURES = 10
"""Prompts in a row without a response after which the endpoint counts as broken."""


@dataclass(frozen=True, kw_only=True)
class Question(Generic[Parsed]):
    """A prompt with the parser of its response; `read` raises ValueError with the fault where it cannot be parsed."""

    messages: Messages
    read: Callable[[str], Parsed]
    tokens_out: int = 40
    """approximate length of a response"""
    schema: Mapping[str, Any] | None = None
    """JSON schema that a `StructuredClient` holds the response to"""


@dataclass(frozen=True, kw_only=True)
class Reply(Generic[Parsed]):
    """The result of a question: a value, or the reason why there is none."""

    value: Parsed | None = None
    problem: str = ""
    is_waiting: bool = False
    """not requested or not answered yet; a later run may fill it in"""


@dataclass(frozen=True, kw_only=True)
class RequestConfig:
    """Settings of requests: parallelism, retries, prices and budget.

    >>> RequestConfig(price_in=0.15, price_out=0.6).cost(2_000_000, 500_000)
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
class TokenUsage(Result):
    """Requests, tokens and cost of one run."""

    n_requests: int = 0
    """responses received from the client"""
    n_kept: int = 0
    """responses taken from the cache"""
    n_retries: int = 0
    n_unusable: int = 0
    """responses that were empty, cut off or withheld, which count as all others do"""
    tokens_in: int = 0
    """as the server counts them; an estimate where it does not, and for requests that it left unanswered"""
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
        if self.n_unusable:
            lines.append(f"{self.n_unusable:,} answers were empty, cut off or withheld")
        return "\n".join(lines + ([f"stopped: {self.stopped}"] if self.stopped else []))


@dataclass(frozen=True, kw_only=True)
class CostEstimate(Result):
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

    def times(self, factor: float) -> "CostEstimate":
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


def run_jobs(
    work: Callable[[J], R], jobs: Sequence[J], n_parallel: int, stop: threading.Event, interrupt: DeferredInterrupt
) -> Iterator[tuple[J, R]]:
    """Pairs of job and result in order of completion.

    After Ctrl-C or an error no new job is started, and those under way are awaited; the first error is raised at the
    end.

    Args:
        work: function from a job to its result, called on several threads.
        jobs: the jobs.
        n_parallel: number of threads.
        stop: event that is set after Ctrl-C or an error, for jobs that wait for something.
        interrupt: deferred Ctrl-C, which is checked twenty times a second.
    """
    results: queue.SimpleQueue[tuple[J, R] | BaseException | None] = queue.SimpleQueue()
    todo: queue.SimpleQueue[J] = queue.SimpleQueue()
    for job in jobs:
        todo.put(job)
    n_working = min(n_parallel, len(jobs))
    for _ in range(n_working):  # daemons: a second Ctrl-C does not wait for them
        threading.Thread(target=_labour, args=(work, todo, results, stop), daemon=True).start()
    error: BaseException | None = None
    try:
        while n_working:
            if interrupt.requested:
                stop.set()
            try:
                found = results.get(timeout=LOOK)
            except queue.Empty:
                continue
            if found is None:
                n_working -= 1
            elif isinstance(found, BaseException):
                error = error or found
            else:
                yield found
    finally:
        stop.set()
    if error is not None:
        raise error


def _labour(
    work: Callable[[J], R],
    todo: "queue.SimpleQueue[J]",
    results: "queue.SimpleQueue[tuple[J, R] | BaseException | None]",
    stop: threading.Event,
) -> None:
    while not stop.is_set():
        try:
            job = todo.get_nowait()
        except queue.Empty:
            break
        try:
            results.put((job, work(job)))
        except BaseException as error:
            stop.set()
            results.put(error)
    results.put(None)


class RequestQueue:
    """Sends requests to a client and caches every response; cached responses are not requested again.

    Budget, usage and cache are shared by all requests made through one `RequestQueue`.

    Args:
        client: language model client.
        path: file of cached responses, which is created when needed.
        cfg: parallelism, retries, prices and budget; None takes the defaults.
        progress: whether to show progress bars.
        ranks: processes with a queue each: they have equal parts of the budget, and until `finish` files of their own.
    """

    def __init__(
        self,
        client: Client,
        path: str | Path,
        cfg: RequestConfig | None = None,
        *,
        progress: bool = True,
        ranks: RankGrid = ALONE,
    ) -> None:
        self.client, self.cfg, self.progress = client, cfg or RequestConfig(), progress and ranks.is_first
        self.ranks = ranks
        self.log = AnswerLog(path, "" if ranks.alone else f"{ranks.index}")
        self.usage = TokenUsage(cost=self.cfg.cost(0, 0))
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._structured = isinstance(client, StructuredClient)
        self._reserved = 0.0  # what the prompts under way may cost
        self._most_out = 0  # tokens of the longest response so far
        self._n_failed = 0
        self._open_at = 0.0  # when the server takes prompts again
        if n_old := self.log.n_placeless[str(client.settings.get("model"))] if "endpoint" in client.settings else 0:
            logger.warning(
                "%s holds %d answers of a model named %s that do not say which endpoint gave them: they are not used, "
                "and their prompts are sent again.",
                self.log.path,
                n_old,
                client.name,
            )

    def finish(self) -> TokenUsage:
        """Put the responses of all processes into the one file; returns the usage of all, whose time is the longest."""
        self.ranks.on_first(self.log.join)
        if isinstance(self.client, OfflineClient):
            self.client.join(self.ranks)
        parts = [TokenUsage(**part) for part in self.ranks.gather_json(asdict(self.usage))]
        names = ("n_requests", "n_kept", "n_retries", "n_unusable", "tokens_in", "tokens_out")
        counts = {name: sum(getattr(part, name) for part in parts) for name in names}
        return TokenUsage(
            **counts,
            cost=self.cfg.cost(counts["tokens_in"], counts["tokens_out"]),
            seconds=max(part.seconds for part in parts),
            stopped=next((part.stopped for part in parts if part.stopped), ""),
        )

    def estimate(self, questions: Sequence[Question[Any]]) -> CostEstimate:
        """Approximate number of requests, tokens, cost and time of questions, before they are sent."""
        by_key = {self._key(question.messages): question for question in questions}
        new = [question for key, question in by_key.items() if self.log.find(key) is None]
        tokens_in, tokens_out = sum_tokens(new)
        each = self.log.seconds or 2.0
        return CostEstimate(
            n_requests=len(new),
            n_kept=len(by_key) - len(new),
            tokens_in=tokens_in,
            tokens_out=tokens_out,
            cost=self.cfg.cost(tokens_in, tokens_out),
            seconds=len(new) * each / self.cfg.n_parallel,
            seconds_each=each,
        )

    def peek(self, question: Question[T]) -> T | None:
        """The value of a cached response; None where there is none that can be parsed."""
        kept = self.log.find(self._key(question.messages))
        try:
            return None if kept is None or kept.problem else question.read(kept.text)
        except ValueError:
            return None

    def ask(self, questions: Sequence[Question[T]], what: str = "ask") -> list[Reply[T]]:
        """A reply to each question, in order; equal questions are sent once.

        Raises:
            KeyboardInterrupt: after Ctrl-C, once requests under way are finished and cached; a second Ctrl-C stops at
                once.
            ConnectionError: ten prompts in a row had no response; other requests under way are finished and cached
                first.
            Exception: any error of the client other than RetryLater and NotAnswered ends the run in the same way.
        """
        from tqdm.auto import tqdm

        start, self._stop = time.monotonic(), threading.Event()
        places: dict[str, list[int]] = {}
        for i, question in enumerate(questions):
            places.setdefault(self._key(question.messages), []).append(i)
        replies: list[Reply[T]] = [Reply(problem="not asked", is_waiting=True) for _ in questions]
        n_done = 0
        with DeferredInterrupt() as interrupt, tqdm(total=len(places), desc=what, disable=hidden(self.progress)) as bar:
            try:
                jobs = [(key, questions[where[0]]) for key, where in places.items()]
                for (key, _), reply in run_jobs(self._settle, jobs, self.cfg.n_parallel, self._stop, interrupt):
                    n_done += 1
                    bar.update()
                    for i in places[key]:
                        replies[i] = reply
            finally:
                self.usage = replace(self.usage, seconds=self.usage.seconds + time.monotonic() - start)
            if interrupt.requested:
                raise KeyboardInterrupt(
                    f"Asking stopped after {n_done} of {len(places)} prompts, all answers kept in {self.log.path}. "
                    "Run the same again to go on; nothing is asked twice."
                )
        return replies

    def _key(self, messages: Messages) -> str:
        return make_key(self.client.settings, messages)

    def _settle(self, job: tuple[str, Question[T]]) -> Reply[T]:
        """Send a question until its response can be parsed, a limited number of times; a response is never made up."""
        question, problem = job[1], ""
        messages = question.messages
        for _ in range(self.cfg.n_asks):
            try:
                answer = self._answer(messages, question)
            except NotAnswered as error:
                return Reply(problem=str(error), is_waiting=isinstance(error, Waiting))
            if answer.problem:  # the same again would be paid for again
                return Reply(problem=f"the answer cannot be used: {answer.problem}")
            try:
                return Reply(value=question.read(answer.text))
            except ValueError as error:
                problem = str(error)
                messages = remind(messages, answer.text, problem)
        return Reply(problem=f"no readable answer in {self.cfg.n_asks}: {problem}")

    def _answer(self, messages: Messages, question: Question[Any]) -> Answer:
        """The cached response to messages, or a new one, which is counted before anything is made of it."""
        key = self._key(messages)
        known = self.log.find(key)
        if known is not None:
            with self._lock:
                self.usage = replace(self.usage, n_kept=self.usage.n_kept + 1)
            if isinstance(self.client, OfflineClient):
                self.client.note(messages)
            return known
        expected = self._reserve(count_tokens(messages), question.tokens_out)
        try:
            answer, seconds = self._send(key, messages, question)
            # where the server does not count, an estimate
            tokens_out = answer.tokens_out or count_tokens([{"content": answer.text}])
            self._count(answer.tokens_in or count_tokens(messages), tokens_out, n_unusable=bool(answer.problem))
            self.log.add(key, self.client.settings, messages, answer, seconds)
        finally:
            with self._lock:
                self._reserved -= expected
        if answer.problem:
            self._fail(answer.problem)
        else:
            with self._lock:
                self._n_failed = 0
        return answer

    def _reserve(self, tokens_in: int, tokens_out: int) -> float:
        """Reserve what a prompt may cost; Waiting where the budget has no room, or had none for an earlier prompt."""
        if self.cfg.budget is None:
            return 0.0
        with self._lock:
            expected = self.cfg.cost(tokens_in, max(tokens_out, self._most_out)) or 0.0
            spent, share = (self.usage.cost or 0.0) + self._reserved, self.cfg.budget / self.ranks.size
            if self.usage.stopped or spent + expected > share:
                self.usage = replace(self.usage, stopped=f"the budget of {self.cfg.budget:g} is used up")
                raise Waiting(self.usage.stopped)
            self._reserved += expected
        return expected

    def _count(self, tokens_in: int, tokens_out: int, n_requests: int = 1, n_unusable: int = 0) -> None:
        """Add a request to the usage; one that the server left unanswered with `n_requests` 0."""
        with self._lock:
            self._most_out = max(self._most_out, tokens_out)
            used = self.usage
            tokens_in, tokens_out = used.tokens_in + tokens_in, used.tokens_out + tokens_out
            self.usage = replace(
                used,
                n_requests=used.n_requests + n_requests,
                n_unusable=used.n_unusable + n_unusable,
                tokens_in=tokens_in,
                tokens_out=tokens_out,
                cost=self.cfg.cost(tokens_in, tokens_out),
            )

    def _send(self, key: str, messages: Messages, question: Question[Any]) -> tuple[Answer, float]:
        """Send a prompt until it is answered; Waiting where retries are used up or the run is stopped."""
        problem = ""
        for n in range(self.cfg.n_tries):
            self._pause(key, n)
            start = time.monotonic()
            try:
                return self._complete(messages, question.schema), time.monotonic() - start
            except RetryLater as error:
                problem = str(error)
                if error.billed:
                    self._count(count_tokens(messages), question.tokens_out, n_requests=0)
                if (error.wait or 0.0) > self.cfg.longest_wait:
                    break
                with self._lock:
                    self.usage = replace(self.usage, n_retries=self.usage.n_retries + 1)
                    self._open_at = max(self._open_at, time.monotonic() + (error.wait or 0.0))
            except Waiting:
                raise
            except NotAnswered as error:
                self._fail(str(error))
                raise
        self._fail(problem)
        raise Waiting(f"no answer: {problem}")

    def _complete(self, messages: Messages, schema: Mapping[str, Any] | None) -> Answer:
        if schema is None or not self._structured:
            return self.client.complete(messages)
        assert isinstance(self.client, StructuredClient)
        return self.client.complete_as(messages, schema)

    def _pause(self, key: str, n: int) -> None:
        """Wait before retry `n`: longer each time, and at least as long as the server last asked of any request."""
        spread = random.Random(f"{self.cfg.seed} {key} {n}").uniform(0.5, 1.5)
        delay = min(self.cfg.wait * 2 ** (n - 1), self.cfg.longest_wait) * spread if n else 0.0
        delay = max(delay, self._open_at - time.monotonic())
        if delay > 0 and self._stop.wait(delay):
            raise Waiting("the run was stopped")

    def _fail(self, problem: str) -> None:
        """Count a prompt without a usable response; ConnectionError where it was the last of many in a row."""
        with self._lock:
            self._n_failed += 1
            n_failed = self._n_failed
        if n_failed >= FAILURES:
            raise ConnectionError(
                f"The endpoint must answer, got no usable answer to {n_failed} prompts in a row ({problem}) "
                f"Answers so far are in {self.log.path}; run the same again to go on."
            )

"""Queue of language model requests: parallel, retried, cached, within a budget, interruptible without loss."""

import random
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from saelab.labelling.answers import AnswerLog, make_key
from saelab.labelling.clients import Answer, Client, Messages, NotAnswered, RetryLater, Waiting
from saelab.labelling.exchange import Exchange
from saelab.labelling.questions import AskConfig, Estimate, Question, Reply, Usage, count_tokens, remind, sum_tokens
from saelab.labelling.workers import run_jobs
from saelab.stores.progress import hidden
from saelab.training.interrupt import DeferredInterrupt

T = TypeVar("T")
FAILURES = 10
"""Prompts in a row without a response after which the endpoint counts as broken."""


class Asker:
    """Sends requests to a client and caches every response; cached responses are not requested again.

    Budget, usage and cache are shared by all requests made through one `Asker`.

    Args:
        client: language model client.
        path: file of cached responses, which is created when needed.
        cfg: parallelism, retries, prices and budget; None takes the defaults.
        progress: whether to show progress bars.
    """

    def __init__(
        self, client: Client, path: str | Path, cfg: AskConfig | None = None, *, progress: bool = True
    ) -> None:
        self.client, self.cfg, self.progress = client, cfg or AskConfig(), progress
        self.log = AnswerLog(path)
        self.usage = Usage(cost=self.cfg.cost(0, 0))
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._reserved = 0.0  # what the prompts under way may cost
        self._n_failed = 0
        self._open_at = 0.0  # when the server takes prompts again

    def estimate(self, questions: Sequence[Question[Any]]) -> Estimate:
        """Approximate number of requests, tokens, cost and time of questions, before they are sent."""
        by_key = {self._key(question.messages): question for question in questions}
        new = [question for key, question in by_key.items() if self.log.find(key) is None]
        tokens_in, tokens_out = sum_tokens(new)
        each = self.log.seconds or 2.0
        return Estimate(
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
            return None if kept is None else question.read(kept.text)
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
                answer = self._answer(messages, question.tokens_out)
            except NotAnswered as error:
                return Reply(problem=str(error), is_waiting=isinstance(error, Waiting))
            try:
                return Reply(value=question.read(answer.text))
            except ValueError as error:
                problem = str(error)
                messages = remind(messages, answer.text, problem)
        return Reply(problem=f"no readable answer in {self.cfg.n_asks}: {problem}")

    def _answer(self, messages: Messages, tokens_out: int) -> Answer:
        """The cached response of a prompt, or a new one."""
        key = self._key(messages)
        known = self.log.find(key)
        if known is not None:
            with self._lock:
                self.usage = replace(self.usage, n_kept=self.usage.n_kept + 1)
            if isinstance(self.client, Exchange):
                self.client.note(messages)
            return known
        expected = self._reserve(count_tokens(messages), tokens_out)
        try:
            answer, seconds = self._send(key, messages)
            self.log.add(key, self.client.settings, messages, answer, seconds)
            self._count(answer, count_tokens(messages))
            return answer
        finally:
            with self._lock:
                self._reserved -= expected

    def _reserve(self, tokens_in: int, tokens_out: int) -> float:
        """Reserve what a prompt may cost; Waiting where the budget has no room, or had none for an earlier prompt."""
        if self.cfg.budget is None:
            return 0.0
        expected = self.cfg.cost(tokens_in, tokens_out) or 0.0
        with self._lock:
            if self.usage.stopped or (self.usage.cost or 0.0) + self._reserved + expected > self.cfg.budget:
                self.usage = replace(self.usage, stopped=f"the budget of {self.cfg.budget:g} is used up")
                raise Waiting(self.usage.stopped)
            self._reserved += expected
        return expected

    def _count(self, answer: Answer, tokens_in: int) -> None:
        tokens_in = answer.tokens_in or tokens_in  # where the server does not count, an estimate
        tokens_out = answer.tokens_out or count_tokens([{"content": answer.text}])
        with self._lock:
            self._n_failed = 0
            used = self.usage
            tokens_in, tokens_out = used.tokens_in + tokens_in, used.tokens_out + tokens_out
            self.usage = replace(
                used,
                n_requests=used.n_requests + 1,
                tokens_in=tokens_in,
                tokens_out=tokens_out,
                cost=self.cfg.cost(tokens_in, tokens_out),
            )

    def _send(self, key: str, messages: Messages) -> tuple[Answer, float]:
        """Send a prompt until it is answered; Waiting where retries are used up or the run is stopped."""
        problem = ""
        for n in range(self.cfg.n_tries):
            self._pause(key, n)
            start = time.monotonic()
            try:
                return self.client.complete(messages), time.monotonic() - start
            except RetryLater as error:
                problem = str(error)
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

    def _pause(self, key: str, n: int) -> None:
        """Wait before retry `n`: longer each time, and at least as long as the server last asked of any request."""
        spread = random.Random(f"{self.cfg.seed} {key} {n}").uniform(0.5, 1.5)
        delay = min(self.cfg.wait * 2 ** (n - 1), self.cfg.longest_wait) * spread if n else 0.0
        delay = max(delay, self._open_at - time.monotonic())
        if delay > 0 and self._stop.wait(delay):
            raise Waiting("the run was stopped")

    def _fail(self, problem: str) -> None:
        """Count a prompt without a response; ConnectionError where it was the last of many in a row."""
        with self._lock:
            self._n_failed += 1
            n_failed = self._n_failed
        if n_failed >= FAILURES:
            raise ConnectionError(
                f"The endpoint must answer, got no answer to {n_failed} prompts in a row ({problem}). "
                f"Answers so far are in {self.log.path}; run the same again to go on."
            )

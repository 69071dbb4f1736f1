"""`Scorer`: how far a label can be trusted, on windows it was not made from; four of them ask a language model."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, TypeVar, runtime_checkable

import numpy as np

from saelab.analyses.contexts import Example
from saelab.analyses.dead import clopper_pearson
from saelab.labelling.asking import Asker
from saelab.labelling.cases import Case
from saelab.labelling.prompts import (
    contrast_prompt,
    detection_prompt,
    fuzzing_prompt,
    read_flags,
    read_strengths,
    simulation_prompt,
)
from saelab.labelling.questions import Question, Reply
from saelab.stores.results import Result

T = TypeVar("T")
N_EACH = 10
"""Windows, or pairs, in a prompt."""
N_LONG = 5
"""Windows in a prompt that lists every token."""
CONFIDENCE = 0.95
N_DRAWS = 1000


@dataclass(frozen=True, kw_only=True)
class Score(Result):
    """How well a label tells where a feature fires, on held-out documents."""

    name: str
    value: float
    """balanced accuracy, or Pearson's r for simulation; higher is better, 1 is perfect"""
    chance: float
    """what no knowledge of the feature gives, "always yes" and "always no" among it"""
    low: float
    """of an interval that holds the value of all held-out documents with 95 % or more"""
    high: float
    n_windows: int

    def __str__(self) -> str:
        return f"{self.name} {self.value:.2f} ({self.low:.2f} to {self.high:.2f}, chance {self.chance:g})"

    def flat(self) -> dict[str, float]:
        """As `Label.scores` holds it."""
        ends = {"chance": self.chance, "low": self.low, "high": self.high}
        return {self.name: self.value} | {f"{self.name}_{end}": value for end, value in ends.items()}


@runtime_checkable
class Scorer(Protocol):
    """Scores labels by the held-out windows of their cases."""

    name: str

    def score(self, texts: Sequence[str], cases: Sequence[Case]) -> list[Reply[Score]]:
        """A score for each label text and its case, or why there is none."""
        ...


@dataclass(frozen=True, kw_only=True)
class Task:
    """One prompt, and what a perfect answer would be."""

    question: Question[list[Any]]
    truth: tuple[float, ...]
    windows: tuple[int, ...] = ()
    """which window each part of the truth is of, where it has several"""


class LLMScorer:
    """Asks a language model; the kinds differ in what they ask and in how that is judged."""

    name = ""

    def __init__(self, asker: Asker, seed: int = 0) -> None:
        self.asker, self.seed = asker, seed

    def tasks(self, text: str, case: Case) -> list[Task]:
        """The prompts of one label, and their truth."""
        raise NotImplementedError

    def judge(self, tasks: Sequence[Task], answers: Sequence[list[Any]]) -> Score:
        """The score that answers earn."""
        truth = [bool(value) for task in tasks for value in task.truth]
        return balance(self.name, truth, [bool(flag) for answer in answers for flag in answer])

    def questions(self, texts: Sequence[str], cases: Sequence[Case]) -> list[Question[list[Any]]]:
        """All prompts."""
        return [task.question for tasks in self._plan(texts, cases) for task in tasks]

    def score(self, texts: Sequence[str], cases: Sequence[Case]) -> list[Reply[Score]]:
        """Ask about all labels at once; a label with a prompt that has no answer has no score."""
        plan = self._plan(texts, cases)
        replies = iter(self.asker.ask([task.question for tasks in plan for task in tasks], self.name))
        return [
            self._conclude(case, tasks, [next(replies) for _ in tasks]) for case, tasks in zip(cases, plan, strict=True)
        ]

    def _plan(self, texts: Sequence[str], cases: Sequence[Case]) -> list[list[Task]]:
        return [[] if case.problem else self.tasks(text, case) for text, case in zip(texts, cases, strict=True)]

    def _conclude(self, case: Case, tasks: list[Task], replies: list[Reply[list[Any]]]) -> Reply[Score]:
        bad = [reply for reply in replies if reply.value is None]
        if bad or not tasks:
            return Reply(
                problem=bad[0].problem if bad else case.problem or f"no windows for {self.name}",
                is_waiting=any(reply.is_waiting for reply in bad),
            )
        return Reply(value=self.judge(tasks, [reply.value for reply in replies if reply.value is not None]))

    def _rng(self, case: Case) -> np.random.Generator:
        return np.random.default_rng((self.seed, case.feature, case.sign % 3))


class Detection(LLMScorer):
    """Which windows does the feature fire in? Balanced accuracy over firing and silent ones, half of these hard."""

    name = "detection"

    def tasks(self, text: str, case: Case) -> list[Task]:
        """Firing and silent windows in random order."""
        windows = [(w, True) for w in case.fires] + [(w, False) for w in (*case.hard, *case.easy)]
        return _flag_tasks(partial(detection_prompt, text), _shuffle(windows, self._rng(case)))


class Fuzzing(LLMScorer):
    """Are the marked tokens those on which the feature fires? Balanced accuracy over right and wrong marks.

    Wrong are as many marks on silent tokens of firing windows, and on the same token where it is silent: there, too,
    as many marks as a firing window has, for their number must not give it away.
    """

    name = "fuzzing"

    def tasks(self, text: str, case: Case) -> list[Task]:
        """Every other firing window rightly marked, the rest and the near misses wrongly, in random order."""
        rng = self._rng(case)
        order = rng.permutation(len(case.fires)).tolist()
        right, wrong = order[::2], order[1::2]
        tokens = {case.fires[i].words[case.fires[i].center] for i in order}
        hard = [window for window in case.hard if window.words[window.center] in tokens][: len(wrong) // 2]
        marked = [((case.fires[i], case.fires_at(case.fires[i])), True) for i in right]
        marked += [(_mark_near(case, w, case.fires[i], rng), False) for w, i in zip(hard, wrong, strict=False)]
        moved = (_misplace(case, case.fires[i], rng) for i in wrong[len(hard) :])
        marked += [(window, False) for window in moved if window is not None]
        return _flag_tasks(partial(fuzzing_prompt, text), _shuffle(marked, rng))


class Contrast(LLMScorer):
    """In which window of a pair does the feature fire? Balanced accuracy over pairs with it first and second."""

    name = "contrast"

    def tasks(self, text: str, case: Case) -> list[Task]:
        """Pairs of a firing and a silent window, each used once; the firing one is first in every other pair."""
        rng = self._rng(case)
        pairs = list(zip(case.fires, _shuffle([*case.hard, *case.easy], rng), strict=False))
        sides = [
            ((fires, silent), True) if i % 2 else ((silent, fires), False) for i, (fires, silent) in enumerate(pairs)
        ]
        shuffled = _shuffle(sides, rng)
        return _flag_tasks(partial(contrast_prompt, text), shuffled, read=_read_sides)


class Simulation(LLMScorer):
    """How strongly does the feature fire on each token? Pearson's r of predicted and true |z| over all tokens.

    An answer without any variation says nothing and scores 0. The interval is the bootstrap's, over windows.
    """

    name = "simulation"

    def tasks(self, text: str, case: Case) -> list[Task]:
        """Firing and silent windows in random order."""
        windows = _shuffle([*case.fires, *case.hard, *case.easy], self._rng(case))
        return [
            self._task(text, case, windows[start : start + N_LONG], start) for start in range(0, len(windows), N_LONG)
        ]

    def _task(self, text: str, case: Case, windows: list[Example], start: int) -> Task:
        truth = [abs(v) if hit else 0.0 for w in windows for v, hit in zip(w.values, case.fires_at(w), strict=True)]
        question = Question(
            messages=simulation_prompt(text, windows),
            read=partial(read_strengths, n=len(truth)),
            tokens_out=12 * N_LONG,
        )
        numbers = tuple(start + i for i, window in enumerate(windows) for _ in window.words)
        return Task(question=question, truth=tuple(truth), windows=numbers)

    def judge(self, tasks: Sequence[Task], answers: Sequence[list[Any]]) -> Score:
        """Pearson's r over tokens, and its bootstrap over windows."""
        true = np.array([value for task in tasks for value in task.truth])
        said = np.array([value for answer in answers for value in answer], float)
        windows = np.array([window for task in tasks for window in task.windows])
        low, high = _resample(true, said, windows, self.seed)
        return Score(
            name=self.name,
            value=_pearson(true, said),
            chance=0.0,
            low=low,
            high=high,
            n_windows=len(np.unique(windows)),
        )


SCORERS = {kind.name: kind for kind in (Detection, Fuzzing, Contrast, Simulation)}


def balance(name: str, truth: Sequence[bool], said: Sequence[bool]) -> Score:
    """Balanced accuracy, the mean of the shares of true and of false ones that are told; chance is 1/2.

    The interval adds up Clopper and Pearson's for the two shares, each wide enough for both to hold in 95 %.

    >>> balance("detection", [True, True, False, False], [True, True, True, True]).value
    0.5
    """
    true, right = np.array(truth), np.array(truth) == np.array(said)
    if not 0 < true.sum() < len(true):
        raise ValueError(f"`truth` must hold both yes and no, got {int(true.sum())} yes of {len(true)}.")
    shares = [right[true].mean(), right[~true].mean()]
    ends = [
        clopper_pearson(np.array([int(right[part].sum())]), int(part.sum()), (1 + CONFIDENCE) / 2)
        for part in (true, ~true)
    ]
    low, high = (float(sum(end[side][0] for end in ends)) / 2 for side in (0, 1))
    return Score(name=name, value=float(np.mean(shares)), chance=0.5, low=low, high=high, n_windows=len(true))


def _flag_tasks(
    prompt: Callable[[list[Any]], Any], items: list[tuple[Any, bool]], read: Callable[..., list[int]] | None = None
) -> list[Task]:
    """Items with their truth, a few to a prompt; none where all of them have one truth."""
    if len({truth for _, truth in items}) < 2:
        return []
    tasks = []
    for start in range(0, len(items), N_EACH):
        part = items[start : start + N_EACH]
        reader = partial(read or _read_yes, n=len(part))
        question = Question(messages=prompt([item for item, _ in part]), read=reader, tokens_out=4 + 2 * len(part))
        tasks.append(Task(question=question, truth=tuple(float(truth) for _, truth in part)))
    return tasks


def _read_yes(answer: str, n: int) -> list[int]:
    return read_flags(answer, n, (0, 1))


def _read_sides(answer: str, n: int) -> list[int]:
    return [int(side == 1) for side in read_flags(answer, n, (1, 2))]


def _misplace(case: Case, window: Example, rng: np.random.Generator) -> tuple[Example, list[bool]] | None:
    """As many marks as the window has firings, on silent tokens; None where there is no silent token."""
    hits = case.fires_at(window)
    silent = [i for i, hit in enumerate(hits) if not hit]
    if not silent:
        return None
    chosen = set(rng.choice(silent, min(sum(hits), len(silent)), replace=False).tolist())
    return window, [i in chosen for i in range(len(hits))]


def _mark_near(case: Case, window: Example, like: Example, rng: np.random.Generator) -> tuple[Example, list[bool]]:
    """Marks on the center of a silent window, and on others until they are as many as the firings of another."""
    others = [i for i in range(len(window.words)) if i != window.center]
    n = min(sum(case.fires_at(like)) - 1, len(others))
    chosen = {window.center, *rng.choice(others, n, replace=False).tolist()}
    return window, [i in chosen for i in range(len(window.words))]


def _shuffle(items: list[T], rng: np.random.Generator) -> list[T]:
    return [items[i] for i in rng.permutation(len(items))]


def _pearson(x: np.ndarray, y: np.ndarray) -> float:
    x, y = x - x.mean(), y - y.mean()
    scale = float(np.sqrt((x * x).sum() * (y * y).sum()))
    return float((x * y).sum()) / scale if scale > 1e-12 else 0.0


def _resample(x: np.ndarray, y: np.ndarray, windows: np.ndarray, seed: int) -> tuple[float, float]:
    """The middle 95 % of Pearson's r over windows drawn with replacement, by the sums of each."""
    sums = np.stack([np.bincount(windows, term) for term in (np.ones_like(x), x, y, x * x, y * y, x * y)], 1)
    rng = np.random.default_rng(seed)
    counts = rng.multinomial(len(sums), np.full(len(sums), 1 / len(sums)), size=N_DRAWS)
    n, x1, y1, xx, yy, xy = (counts @ sums).T
    scale = np.sqrt(np.maximum(xx - x1 * x1 / n, 0) * np.maximum(yy - y1 * y1 / n, 0))
    r = np.where(scale > 1e-9, (xy - x1 * y1 / n) / np.maximum(scale, 1e-9), 0.0)
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(r, [tail, 1 - tail]).tolist()
    return low, high

"""Scorers of labels by a language model on held-out windows, and of features without a label (intruder)."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, TypeVar, runtime_checkable

import numpy as np
import torch

from saelab.analysis.density import clopper_pearson
from saelab.analysis.max_activating import Example
from saelab.functional.statistics import correlation, correlation_of_sums, draw_weights, find_interval
from saelab.labels.autointerp.example_windows import FeatureExamplesSplit
from saelab.labels.autointerp.prompts import (
    contrast_prompt,
    detection_prompt,
    flags_schema,
    fuzzing_prompt,
    intruder_prompt,
    read_flags,
    read_strengths,
    simulation_prompt,
    strengths_schema,
)
from saelab.labels.autointerp.requests import Question, Reply, RequestQueue
from saelab.stores.results import Result

T = TypeVar("T")
N_EACH = 10
"""Windows, or pairs, per prompt."""
N_LONG = 5
"""Windows per prompt that lists every token."""
N_TOGETHER = 5
"""Windows among which the intruder is to be found."""
N_ALIKE = 8
"""Firing windows, at least, among whose strengths those of a prompt are drawn."""
CONFIDENCE = 0.95
N_DRAWS = 1000
NAN = float("nan")


@dataclass(frozen=True, kw_only=True)
class Score(Result):
    """How well a label predicts where a feature fires, on held-out documents."""

    name: str
    value: float
    """balanced accuracy, Pearson's r for simulation, accuracy for intruders, AUROC for embeddings; higher is better, 1
    is perfect"""
    chance: float
    """score without any knowledge of the feature, such as by always answering yes or no"""
    low: float
    """lower end of a 95 % confidence interval for the value on all held-out documents"""
    high: float
    """upper end"""
    n_windows: int

    def __str__(self) -> str:
        return f"{self.name} {self.value:.2f} ({self.low:.2f} to {self.high:.2f}, chance {self.chance:g})"

    def flat(self) -> dict[str, float]:
        """The score as entries of `Label.scores`."""
        ends = {"chance": self.chance, "low": self.low, "high": self.high}
        return {self.name: self.value} | {f"{self.name}_{end}": value for end, value in ends.items()}


@runtime_checkable
class Scorer(Protocol):
    """Protocol for scorers, which score labels on the held-out windows of their cases."""

    name: str

    def score(self, texts: Sequence[str], cases: Sequence[FeatureExamplesSplit]) -> list[Reply[Score]]:
        """A score for each label text on its case, or the reason why there is none."""
        ...


@dataclass(frozen=True, kw_only=True)
class ScoringTask:
    """One prompt and its correct answer."""

    question: Question[list[Any]]
    truth: tuple[float, ...]
    windows: tuple[int, ...] = ()
    """window of each entry of the truth, where a window has several"""


class LLMScorer:
    """Base class of scorers that use a language model; they differ in their prompts and in how answers are scored."""

    name = ""

    def __init__(self, queue: RequestQueue, seed: int = 0) -> None:
        self.queue, self.seed = queue, seed

    def tasks(self, text: str, case: FeatureExamplesSplit) -> list[ScoringTask]:
        """The prompts for one label, with their correct answers."""
        raise NotImplementedError

    def judge(self, tasks: Sequence[ScoringTask], answers: Sequence[list[Any]]) -> Score:
        """The score of the answers."""
        truth = [bool(value) for task in tasks for value in task.truth]
        return balance(self.name, truth, [bool(flag) for answer in answers for flag in answer])

    def questions(self, texts: Sequence[str], cases: Sequence[FeatureExamplesSplit]) -> list[Question[list[Any]]]:
        """All prompts."""
        return [task.question for tasks in self._plan(texts, cases) for task in tasks]

    def score(self, texts: Sequence[str], cases: Sequence[FeatureExamplesSplit]) -> list[Reply[Score]]:
        """A score for each label, requested for all labels at once; a label with an unanswered prompt has none."""
        plan = self._plan(texts, cases)
        replies = iter(self.queue.ask([task.question for tasks in plan for task in tasks], self.name))
        return [
            self._conclude(case, tasks, [next(replies) for _ in tasks]) for case, tasks in zip(cases, plan, strict=True)
        ]

    def _plan(self, texts: Sequence[str], cases: Sequence[FeatureExamplesSplit]) -> list[list[ScoringTask]]:
        return [[] if case.problem else self.tasks(text, case) for text, case in zip(texts, cases, strict=True)]

    def _conclude(
        self, case: FeatureExamplesSplit, tasks: list[ScoringTask], replies: list[Reply[list[Any]]]
    ) -> Reply[Score]:
        bad = [reply for reply in replies if reply.value is None]
        if bad or not tasks:
            return Reply(
                problem=bad[0].problem if bad else case.problem or f"no windows for {self.name}",
                is_waiting=any(reply.is_waiting for reply in bad),
            )
        return Reply(value=self.judge(tasks, [reply.value for reply in replies if reply.value is not None]))

    def _rng(self, case: FeatureExamplesSplit) -> np.random.Generator:
        return np.random.default_rng((self.seed, case.feature, case.sign % 3))


class Detection(LLMScorer):
    """Detection score: how well a language model with the label recognizes the windows in which the feature fires.

    Balanced accuracy over firing and silent windows, half of the latter hard.
    """

    name = "detection"

    def tasks(self, text: str, case: FeatureExamplesSplit) -> list[ScoringTask]:
        """Firing and silent windows in random order, a few per prompt."""
        windows = [(w, True) for w in case.fires] + [(w, False) for w in (*case.hard, *case.easy)]
        return _flag_tasks(partial(detection_prompt, text), _shuffle(windows, self._rng(case)))


class Fuzzing(LLMScorer):
    """Fuzzing score: how well a language model with the label recognizes windows whose marked tokens are the firing
    ones.

    Balanced accuracy over correct and wrong marks. Wrong marks are on as many silent tokens of firing windows, or on
    the same token where it is silent; there, too, as many tokens are marked as a firing window has, because their
    number must not give the answer away.
    """

    name = "fuzzing"

    def tasks(self, text: str, case: FeatureExamplesSplit) -> list[ScoringTask]:
        """Windows in random order: half of the firing ones marked correctly, the rest and the near misses wrongly."""
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


class PairwiseDetection(LLMScorer):
    """Contrast score: how often a language model with the label picks the firing window of a pair.

    Balanced accuracy over pairs with the firing window first and second.
    """

    name = "contrast"

    def tasks(self, text: str, case: FeatureExamplesSplit) -> list[ScoringTask]:
        """Pairs of a firing and a silent window, each window used once; the firing one comes first in half of them."""
        rng = self._rng(case)
        pairs = list(zip(case.fires, _shuffle([*case.hard, *case.easy], rng), strict=False))
        sides = [
            ((fires, silent), True) if i % 2 else ((silent, fires), False) for i, (fires, silent) in enumerate(pairs)
        ]
        shuffled = _shuffle(sides, rng)
        return _flag_tasks(partial(contrast_prompt, text), shuffled, (1, 2), _read_sides)


class Simulation(LLMScorer):
    """Simulation score: how well a language model with the label predicts the feature's strength on each token.

    Pearson's r of predicted and true |z| over all tokens. A constant prediction scores 0. The interval is a bootstrap
    over windows.
    """

    name = "simulation"

    def tasks(self, text: str, case: FeatureExamplesSplit) -> list[ScoringTask]:
        """Firing and silent windows in random order, a few per prompt."""
        windows = _shuffle([*case.fires, *case.hard, *case.easy], self._rng(case))
        return [
            self._task(text, case, windows[start : start + N_LONG], start) for start in range(0, len(windows), N_LONG)
        ]

    def _task(self, text: str, case: FeatureExamplesSplit, windows: list[Example], start: int) -> ScoringTask:
        truth = [abs(v) if hit else 0.0 for w in windows for v, hit in zip(w.values, case.fires_at(w), strict=True)]
        question = Question(
            messages=simulation_prompt(text, windows),
            read=partial(read_strengths, n=len(truth)),
            tokens_out=12 * N_LONG,
            schema=strengths_schema(len(truth)),
        )
        numbers = tuple(start + i for i, window in enumerate(windows) for _ in window.words)
        return ScoringTask(question=question, truth=tuple(truth), windows=numbers)

    def judge(self, tasks: Sequence[ScoringTask], answers: Sequence[list[Any]]) -> Score:
        """Pearson's r over tokens, with its bootstrap interval over windows."""
        true = np.array([value for task in tasks for value in task.truth])
        said = np.array([value for answer in answers for value in answer], float)
        windows = np.array([window for task in tasks for window in task.windows])
        low, high = _resample(true, said, windows, self.seed)
        return Score(
            name=self.name,
            value=float(np.nan_to_num(correlation(true, said))),
            chance=0.0,
            low=low,
            high=high,
            n_windows=len(np.unique(windows)),
        )


class Intruder(LLMScorer):
    """Intruder score: how often a language model finds, among five windows, the one in which the feature does not fire.

    Accuracy, chance 1/5. It needs no label, and says whether the windows of a feature have something in common that a
    reader sees. Each silent window, half of them hard, is the intruder once, among firing windows of similar strength;
    it has as many marks as one of them, and every place holds equally many intruders. After arXiv:2507.08473.
    """

    name = "intruder"

    def tasks(self, text: str, case: FeatureExamplesSplit) -> list[ScoringTask]:
        """One prompt for each silent window; the label's text is not in them."""
        rng = self._rng(case)
        intruders = _shuffle([*case.hard, *case.easy], rng)
        intruders = intruders[: len(intruders) // N_TOGETHER * N_TOGETHER]
        if len(case.fires) < N_TOGETHER - 1:
            return []
        ordered = sorted(case.fires, key=lambda window: max(map(abs, window.values)))
        groups = np.array_split(np.arange(len(ordered)), max(1, len(ordered) // N_ALIKE))
        places = rng.permutation(np.arange(len(intruders)) % N_TOGETHER).tolist()
        tasks = []
        for i, (intruder, place) in enumerate(zip(intruders, places, strict=True)):
            drawn = rng.choice(groups[i % len(groups)], N_TOGETHER - 1, replace=False)
            marked = [(ordered[j], case.fires_at(ordered[j])) for j in drawn]
            marked.insert(place, _mark_near(case, intruder, ordered[rng.choice(drawn)], rng))
            numbers = range(1, N_TOGETHER + 1)
            question = Question(
                messages=intruder_prompt(marked),
                read=partial(read_flags, n=1, allowed=numbers),
                tokens_out=6,
                schema=flags_schema(1, numbers),
            )
            tasks.append(ScoringTask(question=question, truth=(float(place + 1),)))
        return tasks

    def judge(self, tasks: Sequence[ScoringTask], answers: Sequence[list[Any]]) -> Score:
        """The share of prompts whose intruder was found, with its Clopper-Pearson interval."""
        right = [int(answer[0] == task.truth[0]) for task, answer in zip(tasks, answers, strict=True)]
        low, high = clopper_pearson(np.array([sum(right)]), len(right), CONFIDENCE)
        return Score(
            name=self.name,
            value=float(np.mean(right)),
            chance=1 / N_TOGETHER,
            low=float(low[0]),
            high=float(high[0]),
            n_windows=len(right),
        )


NAMES = ("detection", "fuzzing", "contrast", "intruder", "simulation")
SCORERS = dict(zip(NAMES, (Detection, Fuzzing, PairwiseDetection, Intruder, Simulation), strict=True))


def balance(name: str, truth: Sequence[bool], said: Sequence[bool]) -> Score:
    """Balanced accuracy: the mean of the true positive and true negative rates; chance is 1/2.

    The interval averages the Clopper-Pearson intervals of the two rates, each wide enough for both to hold in 95 %.

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
    prompt: Callable[[list[Any]], Any],
    items: list[tuple[Any, bool]],
    allowed: Sequence[int] = (0, 1),
    read: Callable[..., list[int]] | None = None,
) -> list[ScoringTask]:
    """Items with their correct answers, a few per prompt; none where all have the same answer."""
    if len({truth for _, truth in items}) < 2:
        return []
    tasks = []
    for start in range(0, len(items), N_EACH):
        part = items[start : start + N_EACH]
        reader = partial(read or _read_yes, n=len(part))
        question = Question(
            messages=prompt([item for item, _ in part]),
            read=reader,
            tokens_out=4 + 2 * len(part),
            schema=flags_schema(len(part), allowed),
        )
        tasks.append(ScoringTask(question=question, truth=tuple(float(truth) for _, truth in part)))
    return tasks


def _read_yes(answer: str, n: int) -> list[int]:
    return read_flags(answer, n, (0, 1))


def _read_sides(answer: str, n: int) -> list[int]:
    return [int(side == 1) for side in read_flags(answer, n, (1, 2))]


def _misplace(
    case: FeatureExamplesSplit, window: Example, rng: np.random.Generator
) -> tuple[Example, list[bool]] | None:
    """As many marks as the window has firings, on silent tokens; None where there is no silent token."""
    hits = case.fires_at(window)
    silent = [i for i, hit in enumerate(hits) if not hit]
    if not silent:
        return None
    chosen = set(rng.choice(silent, min(sum(hits), len(silent)), replace=False).tolist())
    return window, [i in chosen for i in range(len(hits))]


def _mark_near(
    case: FeatureExamplesSplit, window: Example, like: Example, rng: np.random.Generator
) -> tuple[Example, list[bool]]:
    """Marks on the center of a silent window and on random others, as many as another window has firings."""
    others = [i for i in range(len(window.words)) if i != window.center]
    n = min(sum(case.fires_at(like)) - 1, len(others))
    chosen = {window.center, *rng.choice(others, n, replace=False).tolist()}
    return window, [i in chosen for i in range(len(window.words))]


def _shuffle(items: list[T], rng: np.random.Generator) -> list[T]:
    return [items[i] for i in rng.permutation(len(items))]


def _resample(x: np.ndarray, y: np.ndarray, windows: np.ndarray, seed: int) -> tuple[float, float]:
    """The middle 95 % of Pearson's r over windows drawn with replacement, computed from sums by window."""
    sums = np.stack([np.bincount(windows, term) for term in (np.ones_like(x), x, y, x * x, y * y, x * y)], 1)
    if len(sums) < 2:
        return NAN, NAN
    n, x1, y1, xx, yy, xy = (draw_weights(len(sums), N_DRAWS, seed) @ sums).T
    return find_interval(torch.from_numpy(np.nan_to_num(correlation_of_sums(n, x1, y1, xx, yy, xy))))

"""Automated interpretability: labels of many features from a language model, and their scores on held-out text.

Explainers are the objects that label one feature from its example windows.
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np

from saelab.functional.indices import ChosenRuns, FeatureIds, read_features
from saelab.labels.autointerp.clients import Client
from saelab.labels.autointerp.example_windows import ExampleConfig, FeatureExamplesSplit, build_case
from saelab.labels.autointerp.prompts import LABEL_SCHEMA, N_WORDS, explaining_prompt, read_label
from saelab.labels.autointerp.requests import CostEstimate, Question, Reply, RequestConfig, RequestQueue, TokenUsage
from saelab.labels.autointerp.scorers import SCORERS, LLMScorer, Scorer
from saelab.labels.label import BOTH, Label, LabelKind, average_scores, format_floor, require_same_tokens
from saelab.stores.feature_store import FeatureStore
from saelab.stores.results import Result
from saelab.training.ranks import ALONE, RankGrid, Steps, run_together

BLOCK = 64
"""Number of features whose windows are held at a time."""
ANSWERS = "answers.jsonl"
TYPICAL = " ".join(["something"] * N_WORDS)  # stands for labels that are not known yet


@runtime_checkable
class Explainer(Protocol):
    """Protocol for explainers, which label features by their training windows `shown` and `silent`."""

    name: str
    """author of the labels that the explainer gives"""

    def explain(self, cases: Sequence[FeatureExamplesSplit]) -> list[Reply[str]]:
        """A label for each case, an empty text where no label fits, or the reason why there is none."""
        ...


class LLMExplainer:
    """Explainer that shows a language model the windows with firing tokens marked, and requests a short phrase."""

    def __init__(self, queue: RequestQueue) -> None:
        self.queue, self.name = queue, queue.client.name

    def questions(self, cases: Sequence[FeatureExamplesSplit]) -> list[Question[str]]:
        """The prompt of each case."""
        return [
            Question(messages=explaining_prompt(case), read=_read, tokens_out=25, schema=LABEL_SCHEMA) for case in cases
        ]

    def explain(self, cases: Sequence[FeatureExamplesSplit]) -> list[Reply[str]]:
        """A label for each case, requested for all cases at once."""
        return self.queue.ask(self.questions(cases), "explain")


def _read(answer: str) -> str:
    return read_label(answer) or ""


@dataclass(frozen=True, kw_only=True)
class Unlabeled(Result):
    """A feature, or one of its signs, that has no label or lacks a score, and why."""

    feature: int
    sign: int
    stage: str
    """step that failed: explain, the scorer's name, windows where there are none to show, asking where the budget was
    used up"""
    problem: str
    is_waiting: bool
    """not requested or not answered yet; a later run may fill it in"""


@dataclass(frozen=True, kw_only=True)
class LabelingResult(Result):
    """Labels and scores from one run, what is missing and why, and the requests made."""

    labels: tuple[Label, ...]
    missing: tuple[Unlabeled, ...]
    usage: TokenUsage
    n_sides: int = 0
    """number of features, or signs of them, that were to be labeled"""
    untrained: dict[str, float] | None = None
    """for an untrained dictionary on the same tokens, the share of sides with a label and the mean of each score; None
    where none was labeled"""

    @property
    def n_waiting(self) -> int:
        """Number of missing labels and scores that a later run may fill in."""
        return sum(entry.is_waiting for entry in self.missing)

    def __str__(self) -> str:
        lines = [f"{len(self.labels):,} labels, {len(self.missing):,} missing, {self.n_waiting:,} of them waiting"]
        if self.labels and self.n_sides:
            own = average_scores(self.labels, self.n_sides)
            chance = {
                n: next(x.scores[f"{n}_chance"] for x in self.labels if n in x.scores) for n in own if n != "named"
            }
            lines.append(format_floor(own, self.untrained, chance))
        for label in self.labels[:20]:
            scores = "  ".join(
                f"{name} {value:.2f} (chance {label.scores[name + '_chance']:g})"
                for name, value in label.scores.items()
                if f"{name}_chance" in label.scores
            )
            lines.append(
                f"{label.feature:>7} {'+' if label.sign > 0 else '-' if label.sign else ' '} {label.text!r}  {scores}"
            )
        lines += [f"{e.feature:>7} {e.stage}: {e.problem}" for e in self.missing[:10]]
        return "\n".join([*lines, str(self.usage)])


def explain_features(
    store: FeatureStore,
    explainer: Client | Explainer,
    features: FeatureIds | None = None,
    *,
    signs: Sequence[int] = (1, -1),
    scorers: Sequence[str | Scorer] = ("detection", "fuzzing"),
    untrained: FeatureStore | None = None,
    answers: str | Path | None = None,
    asking: RequestConfig | None = None,
    cases: ExampleConfig | None = None,
    progress: bool = True,
    mesh: Any = None,
) -> LabelingResult:
    """Labels for features from a language model, one per sign, scored on other documents than they were made from.

    Every response is cached, so a repeated call requests only what has none yet. What has no label or score is in
    `missing`, with the reason.

    Args:
        store: feature store that holds codes and text.
        explainer: a client, which explains and scores, or an `Explainer`; with the latter, scorers must be objects.
        features: numbers of the features; None takes all that fire.
        signs: signs to label separately, 1 and -1; 0 stands for both together.
        scorers: names among "detection", "fuzzing", "contrast", "intruder" and "simulation", which use the client, or
            `Scorer` objects such as `Embedding`.
        untrained: store of the same tokens by an untrained dictionary (`sl.collecting.harvest_untrained`), whose
            features of the same numbers are labeled and scored likewise, at the same cost again; the means of its
            scores are in the result.
        answers: file of cached responses; None is answers.jsonl in the store's folder.
        asking: number of parallel requests, retries, prices and budget.
        cases: number and width of the example windows.
        progress: whether to show progress bars.
        mesh: `DeviceMesh` of processes that label together, each of which calls this with the same arguments and a
            client of its own; None is this process alone. Each asks for a share of the features, with an equal part of
            the budget, and all return what one process would. Equal prompts of two shares are sent twice.

    Raises:
        ValueError: a feature does not exist, or `untrained` is not of the same tokens.
        KeyboardInterrupt, ConnectionError: as in `RequestQueue.ask`.
        RuntimeError: where another process failed.
    """
    ranks = RankGrid.of(mesh)
    with ranks.together():
        if untrained is not None:
            require_same_tokens(store, untrained)
        plan = _Plan.make(store, explainer, scorers, answers, asking, cases, progress, ranks)
        sides, floor = _sides(store, features, signs), None
        facts = plan.facts() | {"sides of features": sides}
        facts |= {"untrained store": None if untrained is None else untrained.fingerprint}
    ranks.require_equal(facts)
    found = _explain(plan, sides)
    if untrained is not None:
        wanted = _sides(untrained, sorted({feature for feature, _ in sides}), signs)
        floor = average_scores(_explain(replace(plan, store=untrained), wanted).labels, len(wanted))
    return replace(found.result(plan.finish()), n_sides=len(sides), untrained=floor)


def _explain(plan: "_Plan", sides: list[tuple[int, int]]) -> "_Found":
    """Labels and scores of some sides: each process asks for every so many, a block at a time."""
    assert plan.explainer is not None
    explainer, found = plan.explainer, _Found()

    def ask() -> Steps:
        for block in plan.blocks(sides[plan.ranks.own(len(sides))], found):
            built = plan.build(block, found)
            replies = explainer.explain(built)
            named: list[tuple[Label, FeatureExamplesSplit]] = []
            for case, reply in zip(built, replies, strict=True):
                if reply.value is None:
                    found.miss(case.feature, case.sign, "explain", reply)
                else:
                    named.append((plan.label(case, reply.value), case))
            found.labels += plan.score(named, found)
            yield

    run_together(ask(), plan.ranks, every=1)
    found.join(sides, plan)
    return found


def score_labels(
    store: FeatureStore,
    client: Client | None,
    labels: Sequence[Label],
    *,
    scorers: Sequence[str | Scorer] = ("detection", "fuzzing"),
    answers: str | Path | None = None,
    asking: RequestConfig | None = None,
    cases: ExampleConfig | None = None,
    progress: bool = True,
    mesh: Any = None,
) -> LabelingResult:
    """Labels of any author, with scores on documents that `explain_features` does not show; all are returned.

    Scores of the same name are replaced.

    Args:
        store: feature store that holds codes and text.
        client: language model client; None where all scorers are objects.
        labels: labels to score.
        scorers: names among "detection", "fuzzing", "contrast", "intruder" and "simulation", which use the client, or
            `Scorer` objects such as `Embedding`.
        answers: file of cached responses; None is answers.jsonl in the store's folder.
        asking: number of parallel requests, retries, prices and budget.
        cases: number and width of the example windows.
        progress: whether to show progress bars.
        mesh: `DeviceMesh` of processes that score together, each of which calls this with the same arguments and a
            client of its own; None is this process alone. Each asks for a share of the labels, with an equal part of
            the budget, and all return what one process would. Equal prompts of two shares are sent twice.

    Raises:
        RuntimeError: where another process failed.
    """
    ranks = RankGrid.of(mesh)
    by_side: dict[tuple[int, int], list[Label]] = {}
    for label in labels:
        by_side.setdefault((label.feature, label.sign), []).append(label)
    ordered, places = list[Label](), dict[tuple[int, int], range]()
    for side, group in by_side.items():
        places[side] = range(len(ordered), len(ordered) + len(group))
        ordered += group
    with ranks.together():
        plan = _Plan.make(store, client, scorers, answers, asking, cases, progress, ranks)
        facts = plan.facts() | {"labels": [(label.feature, label.sign, label.text) for label in ordered]}
    ranks.require_equal(facts)
    sides, found = list(places), _Found()
    scored: dict[int, dict[str, float]] = {}

    def ask() -> Steps:
        for block in plan.blocks(sides[ranks.own(len(sides))], found):
            built = {(case.feature, case.sign): case for case in plan.build(block, found)}
            which = [i for side in built for i in places[side]]
            pairs = [(ordered[i], case) for side, case in built.items() for i in places[side]]
            scored.update(zip(which, (dict(label.scores) for label in plan.score(pairs, found)), strict=True))
            yield

    run_together(ask(), ranks, every=1)
    found.join(sides, plan)
    found.labels = ordered
    for i, scores in (entry for part in ranks.gather_json(list(scored.items())) for entry in part):
        ordered[i] = replace(ordered[i], scores=scores)
    return found.result(plan.finish())


def estimate_labels(
    store: FeatureStore,
    client: Client,
    features: FeatureIds | None = None,
    *,
    signs: Sequence[int] = (1, -1),
    scorers: Sequence[str | Scorer] = ("detection", "fuzzing"),
    answers: str | Path | None = None,
    asking: RequestConfig | None = None,
    cases: ExampleConfig | None = None,
) -> CostEstimate:
    """Approximate number of requests, tokens, cost and time of `explain_features` with the same arguments.

    For many features the estimate is extrapolated from a sample.

    Args:
        store: feature store that holds codes and text.
        client: language model client; it is not called.
        features: numbers of the features; None takes all that fire.
        signs: signs to label separately, 1 and -1; 0 stands for both together.
        scorers: as in `explain_features`; those that use no client cost nothing.
        answers: file of cached responses, which cost nothing; None is answers.jsonl in the store's folder.
        asking: number of parallel requests, retries, prices and budget.
        cases: number and width of the example windows.
    """
    plan = _Plan.make(store, client, scorers, answers, asking, cases, False)
    assert plan.queue is not None
    sides = _sides(store, features, signs)
    sample = sides[:: max(1, len(sides) // BLOCK)]
    explainer, questions = LLMExplainer(plan.queue), list[Question[Any]]()
    built = plan.build(sample, _Found())
    for case, question in zip(built, explainer.questions(built), strict=True):
        text = plan.queue.peek(question)
        questions.append(question)
        for scorer in plan.scorers if text != "" else ():
            if isinstance(scorer, LLMScorer):  # others ask nobody
                questions += scorer.questions([TYPICAL if text is None else text], [case])
    return plan.queue.estimate(questions).times(len(sides) / max(1, len(sample)))


class _Found:
    """Labels and missing items of a run so far."""

    def __init__(self) -> None:
        self.labels: list[Label] = []
        self.missing: list[Unlabeled] = []

    def miss(self, feature: int, sign: int, stage: str, reply: Reply[Any]) -> None:
        """Record what is missing, and why."""
        entry = Unlabeled(feature=feature, sign=sign, stage=stage, problem=reply.problem, is_waiting=reply.is_waiting)
        self.missing.append(entry)

    def join(self, sides: Sequence[tuple[int, int]], plan: "_Plan") -> None:
        """Add what the other processes found and miss, all in the order of the sides."""
        place = {side: i for i, side in enumerate(sides)}
        own = {"labels": [label.to_dict() | {"provenance": {}} for label in self.labels]}
        told = plan.ranks.gather_json(own | {"missing": [asdict(entry) for entry in self.missing]})
        labels = [Label.from_dict(row | {"provenance": plan.provenance}) for part in told for row in part["labels"]]
        missing = [Unlabeled(**row) for part in told for row in part["missing"]]
        self.labels = sorted(labels, key=lambda one: place[one.feature, one.sign])
        self.missing = sorted(missing, key=lambda one: place[one.feature, one.sign])

    def result(self, usage: TokenUsage) -> LabelingResult:
        """The result of the run."""
        return LabelingResult(labels=tuple(self.labels), missing=tuple(self.missing), usage=usage)


@dataclass(frozen=True)
class _Plan:
    """Explainer, scorers and windows of a run."""

    store: FeatureStore
    train: ChosenRuns
    """rows of training documents"""
    cases: ExampleConfig
    queue: RequestQueue | None
    explainer: Explainer | None
    scorers: tuple[Scorer, ...]
    ranks: RankGrid

    @classmethod
    def make(
        cls,
        store: FeatureStore,
        who: Client | Explainer | None,
        scorers: Sequence[str | Scorer],
        answers: str | Path | None,
        asking: RequestConfig | None,
        cases: ExampleConfig | None,
        progress: bool,
        ranks: RankGrid = ALONE,
    ) -> "_Plan":
        cases = cases or ExampleConfig(width=store.text.widen(ExampleConfig.width))
        queue = None
        if isinstance(who, Client):
            queue = RequestQueue(who, answers or store.folder / ANSWERS, asking, progress=progress, ranks=ranks)
        explainer = LLMExplainer(queue) if queue is not None else who if isinstance(who, Explainer) else None
        made = tuple(_make_scorer(scorer, queue, cases.seed) for scorer in scorers)
        return cls(store, store.split_runs(cases.train_frac, cases.seed), cases, queue, explainer, made, ranks)

    def facts(self) -> dict[str, Any]:
        """What must be the same in all processes."""
        client = None if self.queue is None else [self.queue.client.name, dict(self.queue.client.settings)]
        scorers = [[scorer.name, dict(getattr(scorer, "settings", {}))] for scorer in self.scorers]
        return {"store": self.store.fingerprint, "client": client, "scorers": scorers, "windows": asdict(self.cases)}

    @property
    def provenance(self) -> dict[str, Any]:
        """Settings that the labels are made with."""
        found: dict[str, Any] = {"cases": asdict(self.cases)}
        if self.queue is not None:
            found |= {"client": dict(self.queue.client.settings), "answers": self.queue.log.path.name}
        settings = {scorer.name: dict(getattr(scorer, "settings", {})) for scorer in self.scorers}
        return found | {name: given for name, given in settings.items() if given}

    def finish(self) -> TokenUsage:
        """Requests made by all processes, whose responses are put into one file."""
        return self.queue.finish() if self.queue is not None else TokenUsage()

    @property
    def usage(self) -> TokenUsage:
        """Requests made so far."""
        return self.queue.usage if self.queue is not None else TokenUsage()

    def blocks(self, sides: list[tuple[int, int]], found: _Found) -> Iterator[list[tuple[int, int]]]:
        """Blocks of sides, until the budget is used up; the remaining sides are recorded as waiting."""
        for start in range(0, len(sides), BLOCK):
            block = sides[start : start + BLOCK]
            if self.usage.stopped:
                for feature, sign in block:
                    found.miss(feature, sign, "asking", Reply(problem=self.usage.stopped, is_waiting=True))
            else:
                yield block

    def build(self, sides: Sequence[tuple[int, int]], found: _Found) -> list[FeatureExamplesSplit]:
        """The windows of each side; sides that do not fire in training documents are recorded as missing."""
        built = []
        for feature, sign in sides:
            case = build_case(self.store, feature, sign, self.train, self.cases)
            if case is None:
                found.miss(feature, sign, "windows", Reply(problem="it does not fire in the training documents"))
            else:
                built.append(case)
        return built

    def label(self, case: FeatureExamplesSplit, text: str) -> Label:
        """The label for a text that the explainer gave."""
        assert self.explainer is not None
        two_sided = case.sign == BOTH and len({value > 0 for e in case.shown for value in e.values if value}) == 2
        kind: LabelKind = "none" if not text else "two-sided" if two_sided else "input"
        counts = {f"n_{name}": len(getattr(case, name)) for name in ("shown", "silent", "fires", "hard", "easy")}
        return Label(
            feature=case.feature, sign=case.sign, text=text, kind=kind, author=self.explainer.name,
            evidence=counts, provenance=self.provenance,
        )  # fmt: skip

    def score(self, pairs: Sequence[tuple[Label, FeatureExamplesSplit]], found: _Found) -> list[Label]:
        """The labels with their scores; labels without a text have none."""
        labels = [label for label, _ in pairs]
        named = [i for i, (label, _) in enumerate(pairs) if label.text]
        for scorer in self.scorers:
            replies = scorer.score([labels[i].text for i in named], [pairs[i][1] for i in named])
            for i, reply in zip(named, replies, strict=True):
                if reply.value is None:
                    found.miss(labels[i].feature, labels[i].sign, scorer.name, reply)
                else:
                    labels[i] = replace(labels[i], scores={**labels[i].scores, **reply.value.flat()})
        return labels


def _make_scorer(scorer: str | Scorer, queue: RequestQueue | None, seed: int) -> Scorer:
    if not isinstance(scorer, str):
        return scorer
    if scorer not in SCORERS:
        raise ValueError(
            f"`scorers` must be among {list(SCORERS)}, or objects with a method `score`, such as `Embedding(encoder)`, "
            f"got '{scorer}'."
        )
    if queue is None:
        raise ValueError(f"The scorer '{scorer}' asks a client, got none. Give a client, or scorers that are objects.")
    return SCORERS[scorer](queue, seed)


def _sides(store: FeatureStore, features: FeatureIds | None, signs: Sequence[int]) -> list[tuple[int, int]]:
    """Features and signs that fire at all."""
    fires = store.statistics.fires
    wanted = read_features(np.flatnonzero(fires.sum(1)) if features is None else features, store.d_sae)
    if bad := [sign for sign in signs if sign not in (-1, BOTH, 1)]:
        raise ValueError(f"`signs` must be among 1, -1 and 0 for both, got {bad[:5]}.")
    counts = {1: fires[:, 0], -1: fires[:, 1], BOTH: fires.sum(1)}
    return [(j, sign) for j in wanted for sign in signs if counts[sign][j] > 0]

"""`SteeringCurve`: effect and cost of steering by source and strength, with bootstrap intervals.

It has the Pareto frontier of effect and cost, the effect at a given cost, and the mean effect over budgets, vectorized
over bootstrap draws. Where a value is undefined, the reason is given.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import Any, Literal, TypeAlias, get_args

import numpy as np
from jaxtyping import Bool, Float

from saelab.functional.metrics import find_frontier, mean_gain, read_cost, read_gain
from saelab.functional.statistics import draw_weights, find_reach
from saelab.stores.results import Result, format_table

NAN = float("nan")
N_DRAWS = 500
MeasureName = Literal[
    "lift", "selectivity", "mass", "gain", "kl", "entropy", "prompt_lift", "prompt_selectivity", "prompt_kl", "nll",
    "perplexity", "rate", "share", "score", "repetition", "distinct_1", "distinct_2",
]  # fmt: skip
"""Measures of effect and cost, as `saelab.steering.dose_response` defines them."""
MATCHED = (1.0, 0.5, 0.2, 0.1, 0.05, 0.02, 0.01, 0.001)
"""KL in nats at which sources are compared: the largest that all of them reach"""
RATIOS: dict[MeasureName, tuple[str, str]] = {
    "lift": ("lift", "n_text"), "selectivity": ("selectivity", "n_text"), "kl": ("kl", "n_text"),
    "mass": ("mass", "n_text"), "entropy": ("entropy", "n_text"), "prompt_lift": ("prompt_lift", "n_prompt"),
    "prompt_selectivity": ("prompt_selectivity", "n_prompt"), "prompt_kl": ("prompt_kl", "n_prompt"),
    "nll": ("nll", "n_written"), "rate": ("hits", "n_words"), "share": ("held", "n_texts"),
    "score": ("score", "n_texts"), "repetition": ("repetition", "n_texts"),
}  # fmt: skip
"""measures as sums over sums"""
NO_STRENGTH = "no strength on this side"
SIDES = {1: "upwards", -1: "downwards"}


@dataclass(frozen=True)
class Estimate:
    """A value with its 95 % interval; NaN where there is none, with the reason.

    >>> str(Estimate(1.0, 0.5, 1.5))
    '1 [0.5, 1.5]'
    """

    value: float
    low: float = NAN
    high: float = NAN
    reason: str = ""
    """why there is no value"""

    def __neg__(self) -> "Estimate":
        return Estimate(0.0 - self.value, 0.0 - self.high, 0.0 - self.low, self.reason)

    def __str__(self) -> str:
        if self.value != self.value:
            return "-"
        return f"{self.value:.2g}" + (f" [{self.low:.2g}, {self.high:.2g}]" if self.low == self.low else "")


@dataclass(frozen=True)
class BestPoint:
    """The strength with the best balance of effect and fluency, chosen on half of the prompts and scored on the others.

    The score is the harmonic mean of effect and fluency, each in [0, 1]. The effect is `1 - exp(-gain)` (for a scored
    concept the increase of the score), the fluency `exp(-extra nll) (1 - extra repetition)`. An nll or repetition lower
    than unsteered text's counts as no difference: repetitive text is likely, but broken. A decrease counts as no
    effect, so score and effect are above 0 by chance alone: evidence of an effect is `effect_low` above 0.
    """

    strength: float
    score: float
    """on the other half of the prompts"""
    effect: float
    fluency: float
    chosen_score: float
    """on the prompts that the strength was chosen on"""
    reason: str = ""
    """why no strength was chosen"""
    effect_low: float = NAN
    """lower end of the effect's 95 % interval on the prompts it is measured on; below 0 for a decrease; NaN for one
    prompt"""
    effect_high: float = NAN
    """upper end"""

    @classmethod
    def none(cls, reason: str) -> "BestPoint":
        """The value where no strength can be chosen, with the reason."""
        return cls(NAN, NAN, NAN, NAN, NAN, reason)


def make_estimates(
    values: Float[np.ndarray, "n"],
    draws: Float[np.ndarray, "n n_draws"],
    n_clusters: int,
    reason: str = "",
    n_groups: int = 1,
) -> list[Estimate]:
    """Values with their 95 % intervals, from bootstrap draws by `find_reach`.

    Args:
        values: the numbers themselves.
        draws: the same numbers with clusters drawn with replacement; NaN is left out.
        n_clusters: number of clusters to draw from, such as prompts.
        reason: why a number is NaN.
        n_groups: number of groups that clusters were drawn within.
    """
    reach = find_reach(draws, n_clusters, n_groups)
    return [
        Estimate(value, value - half, value + half, reason)
        for value, half in zip(values.tolist(), reach.tolist(), strict=True)
    ]


@dataclass(frozen=True)
class Measure:
    """What is read from a steering curve: a measure, as it is or as its difference to unsteered text.

    >>> str(Measure("gain", concept="male")), str(Measure("nll", extra=True))
    ('gain male', 'extra_nll')
    """

    name: MeasureName
    concept: str | None = field(default=None, kw_only=True)
    """one of the curve's other concepts, for "gain" and "mass"; None is the concept that is steered"""
    extra: bool = field(default=False, kw_only=True)
    """True takes the difference to unsteered text"""

    def __post_init__(self) -> None:
        if self.name not in get_args(MeasureName):
            known = get_args(MeasureName)
            raise ValueError(
                f"A measure must be one of {list(known)}, got {self.name!r}. Concepts and differences are arguments: "
                "`Measure('gain', concept='male')`, `Measure('nll', extra=True)`."
            )
        if self.concept is not None and self.name not in ("gain", "mass"):
            raise ValueError(f"`concept` goes with the measures 'gain' and 'mass', got it with '{self.name}'.")

    @classmethod
    def of(cls, given: "Measure | MeasureName") -> "Measure":
        """The measure itself, or the one of that name."""
        return given if isinstance(given, Measure) else cls(given)

    def __str__(self) -> str:
        return f"{'extra_' if self.extra else ''}{self.name}" + ("" if self.concept is None else f" {self.concept}")


AnyMeasure: TypeAlias = Measure | MeasureName


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class SteeringCurve(Result):
    """Measures of `steering_curve` at each point, a source and a strength; the first point is the unsteered model.

    A measure is given by its name, or as a `Measure` for another concept or the difference to unsteered text. Intervals
    come from a bootstrap of prompts with all of their texts (of texts, where there is one prompt). Side 1 means
    positive strengths, which raise the concept, side -1 negative ones, which lower it.
    """

    concept: str
    others: tuple[str, ...]
    """names of the concepts for selectivity"""
    sources: dict[str, str]
    """description of what was steered, by name"""
    neutral: dict[str, float]
    """the strength of each source that leaves the model unsteered"""
    points: tuple[tuple[str, float], ...]
    """source and strength of each"""
    cells: dict[str, Float[np.ndarray, "n_points n_prompts n"]]
    """sums over the tokens of each text, `n` texts per prompt"""
    diversity: dict[MeasureName, Float[np.ndarray, "n_points n"]]
    """distinct n-grams by measure, over the texts of all prompts with the same sample number"""
    prompts: tuple[str, ...]
    n: int
    """texts for each prompt"""
    n_tokens: int
    """most tokens generated for each text"""
    temperature: float
    seed: int

    @property
    def effect(self) -> Measure:
        """The default measure of effect: the gain, or for a scored concept the score above that of unsteered text."""
        return Measure("score", extra=True) if "score" in self.cells else Measure("gain")

    @property
    def measures(self) -> tuple[Measure, ...]:
        """The measures that the curve has; `Measure(name, extra=True)` is the difference to unsteered text."""
        sums = [Measure(name) for name, (part, _) in RATIOS.items() if part in self.cells]
        gains = [Measure("gain", concept=name) for name in (None, *self.others)] if "mass" in self.cells else []
        return (*sums, *gains, Measure("perplexity"), *map(Measure, self.diversity))

    def values(self, measure: AnyMeasure) -> Float[np.ndarray, "n_points"]:
        """A measure at every point, in the order of `points`; ValueError for a measure that the curve does not have."""
        return self._read(measure, np.ones((1, self._n_clusters)))[:, 0]

    def draws(self, measure: AnyMeasure) -> Float[np.ndarray, "n_points n_draws"]:
        """Bootstrap draws of a measure at every point, the same prompts for all measures; NaN if there is one text."""
        return self._read(measure, self._weights)

    def estimate(self, measure: AnyMeasure) -> list[Estimate]:
        """A measure at every point with its 95 % interval; none for distinct n-grams, which are not sums over texts."""
        if Measure.of(measure).name in self.diversity:
            return [Estimate(value) for value in self.values(measure).tolist()]
        return make_estimates(self.values(measure), self.draws(measure), self._n_clusters)

    def along(self, source: str, side: int = 1) -> "SourceCurve":
        """One source on one side: effect at a KL, KL at an effect, area and best strength.

        ValueError for another source or side.
        """
        if source not in self.sources or side not in SIDES:
            known = list(self.sources)[:5]
            raise ValueError(f"`source` must be one of {known} and `side` 1 or -1, got {source!r} and {side}.")
        return SourceCurve(self, source, side)

    def frontier(
        self, source: str | None = None, side: int = 1, measure: AnyMeasure | None = None
    ) -> list[tuple[str, float]]:
        """The Pareto frontier of effect against KL: its points, (source, strength), in increasing order of KL.

        Args:
            source: name of the source whose points are compared; None compares those of all sources.
            side: 1 for positive strengths, where a higher effect is better, -1 for negative ones, where a lower one is.
            measure: measure in place of the effect, by name or as a `Measure`; None is `effect`.

        Raises:
            ValueError: for an unknown source or side, and for a measure that the curve does not have.
        """
        names = self.sources if source is None else [source]
        mine = np.array([i for name in names for i in self.along(name, side).points], dtype=int)
        found = find_frontier(side * self.values(measure or self.effect)[mine], self.values("kl")[mine])
        return [self.points[i] for i in mine[found].tolist()]

    def common_kl(self, side: int = 1) -> float:
        """The largest KL of 1, 0.5, 0.2, ... nats that every source with strengths on a side reaches; NaN for none."""
        tops = [self.values("kl")[line].max() for name in self.sources if (line := self.along(name, side).points)]
        return next((kl for kl in MATCHED if tops and kl <= min(tops)), NAN)

    @property
    def sides(self) -> tuple[int, ...]:
        """The sides, 1 and -1, on which a source has strengths other than the neutral one."""
        return tuple(side for side in SIDES if any(side * (s - self.neutral[name]) > 0 for _, (name, s) in self._doses))

    def summarize(self) -> list[dict[str, Any]]:
        """A row for each side and source: measures at `common_kl`, area up to it, and the best strength."""
        effects = [Measure("lift"), *([Measure("selectivity")] if self.others else []), self.effect]
        wanted = [one for one in effects if one.extra or one in self.measures]
        rows = []
        for side in self.sides:
            kl = self.common_kl(side)
            for name in self.sources:
                if (own := self.along(name, side)).points:
                    found = {str(measure): own.at_kl(kl, measure) for measure in wanted} | {"area": own.area()}
                    rows.append({"source": name, "side": side, "kl": kl, "best": own.best()} | found)
        return rows

    def to_dict(self) -> dict[str, Any]:
        """Every field, every measure at every point, and the summary, ready for JSON."""
        rows: list[dict[str, Any]] = [{"source": name, "strength": strength} for name, strength in self.points]
        for measure in self.measures:
            for row, found in zip(rows, self.estimate(measure), strict=True):
                row[str(measure)] = asdict(found)
        summary = [
            {key: asdict(one) if isinstance(one, Estimate | BestPoint) else one for key, one in row.items()}
            for row in self.summarize()
        ]
        return super().to_dict() | {"rows": rows, "summary": summary}

    def format_rows(self) -> tuple[list[str], list[list[str]]]:
        """The summary as a header and rows of text."""
        rows = self.summarize()
        measures = [key for key in rows[0] if key not in ("source", "side", "kl", "best", "area")] if rows else []
        kls = {side: self.common_kl(side) for side in self.sides}
        header = ["", *measures, "area", "best at", "score"]
        table = []
        for side in self.sides:
            table.append([f"{SIDES[side]}, KL {kls[side]:g}", *[""] * (len(header) - 1)])
            for row in rows:
                if row["side"] == side:
                    best = row["best"]
                    numbers = (row["area"].value, best.strength, best.score)
                    cells = ["-" if x != x else f"{x:.2g}" for x in numbers]
                    table.append([row["source"], *(str(row[key]) for key in measures), *cells])
        return header, table

    @property
    def title(self) -> str:
        """Concept, number of prompts and texts, and temperature in one line."""
        against = f" against {', '.join(self.others)}" if self.others else ""
        size = f"{len(self.prompts)} prompts, {self.n} texts of {self.n_tokens} tokens for each"
        return f"Steering {self.concept}{against}: {size}, temperature {self.temperature:g}"

    @property
    def baseline(self) -> str:
        """Perplexity, rate or score, repetition and distinct_1 of unsteered text, in one line."""
        names: tuple[MeasureName, ...] = (
            "perplexity", "score" if self.effect.extra else "rate", "repetition", "distinct_1",
        )  # fmt: skip
        return "unsteered text: " + ", ".join(f"{name} {self.values(name)[0]:.3g}" for name in names)

    def __repr__(self) -> str:
        return f"SteeringCurve({self.concept}, {len(self.points) - 1} strengths of {', '.join(self.sources)})"

    def __str__(self) -> str:
        header, rows = self.format_rows()
        return "\n".join([self.title, self.baseline, *format_table([header, *rows])])

    @property
    def _doses(self) -> list[tuple[int, tuple[str, float]]]:
        return list(enumerate(self.points))[1:]

    def _read(self, given: AnyMeasure, weights: np.ndarray) -> Float[np.ndarray, "n_points n_draws"]:
        """A measure under weights of prompts, one row a draw."""
        measure = Measure.of(given)
        if measure.extra:
            found = self._read(replace(measure, extra=False), weights)
            return found - found[:1]
        if measure not in self.measures and not (measure.name == "mass" and measure.concept in self.others):
            raise ValueError(f"`measure` must be one of {[str(one) for one in self.measures]}, got '{measure}'.")
        if measure.name == "gain":
            mass = np.log(self._read(Measure("mass", concept=measure.concept), weights))
            return mass - mass[:1]
        if measure.name in self.diversity:
            return np.repeat(self.diversity[measure.name].mean(1, keepdims=True), len(weights), axis=1)
        if measure.name == "perplexity":
            return np.exp(self._read("nll", weights))
        sums, numbers = RATIOS[measure.name]
        of = sums if measure.concept is None else f"{sums} {measure.concept}"
        part, whole = (self._by_cluster(name) @ weights.T for name in (of, numbers))
        return np.divide(part, whole, out=np.full_like(part, np.nan), where=whole > 0)

    @property
    def _n_clusters(self) -> int:
        return len(self.prompts) if len(self.prompts) > 1 else self.n

    def _by_cluster(self, name: str) -> Float[np.ndarray, "n_points n_clusters"]:
        return self.cells[name].sum(2 if len(self.prompts) > 1 else 1)

    @cached_property
    def _weights(self) -> Float[np.ndarray, "n_draws n_clusters"]:
        return draw_weights(self._n_clusters, N_DRAWS)

    @cached_property
    def _halves(self) -> Bool[np.ndarray, "2 n_clusters"]:
        """Every other prompt, and the rest."""
        return np.stack([np.arange(self._n_clusters) % 2 == half for half in (0, 1)])

    @cached_property
    def _weights_in_halves(self) -> Float[np.ndarray, "n n_clusters"]:
        """Each prompt once, then draws within either half."""
        weights = np.ones((1 + N_DRAWS, self._n_clusters))
        for seed, half in enumerate(self._halves):
            weights[1:, half] = draw_weights(int(half.sum()), N_DRAWS, seed)
        return weights


@dataclass(frozen=True, eq=False)
class SourceCurve:
    """One source of a steering curve on one side of the unsteered model; made by `SteeringCurve.along`."""

    curve: SteeringCurve = field(repr=False)
    source: str
    side: int
    """1 for strengths that raise the concept, -1 for those that lower it"""

    @cached_property
    def points(self) -> list[int]:
        """Indices of its points among those of the curve, weakest first."""
        neutral = self.curve.neutral[self.source]
        own = [(s - neutral, i) for i, (name, s) in self.curve._doses if name == self.source]
        return [i for _, i in sorted((abs(step), i) for step, i in own if self.side * step >= 0)]

    def at_kl(self, kl: float, measure: AnyMeasure | None = None) -> Estimate:
        """The effect, or another measure, where the source first reaches a KL, interpolated along its strengths.

        Args:
            kl: cost in nats.
            measure: by default `effect` of the curve.

        Returns:
            the value with its interval; NaN, with the reason, where the strengths do not reach that KL.
        """
        return self._along(measure, kl, lambda gain, cost: read_gain(gain, cost, kl))

    def kl_at(self, value: float, measure: AnyMeasure | None = None) -> Estimate:
        """The KL at which the effect, or another measure, first reaches a value, interpolated along the strengths.

        Args:
            value: of the measure; negative on side -1.
            measure: by default `effect` of the curve.

        Returns:
            the KL in nats with its interval; NaN, with the reason, where the strengths do not reach that value.
        """
        side = self.side
        return self._along(measure, value, lambda gain, cost: read_cost(side * gain, cost, side * value))

    def area(self, max_kl: float | None = None, measure: AnyMeasure | None = None) -> Estimate:
        """The mean, over KL budgets from 0 to `max_kl`, of the largest effect (or measure) within the budget.

        The strength for each budget is chosen on one half of the prompts and its effect measured on the other, and the
        other way round: the largest of several effects is above 0 by chance alone, while an effect measured on other
        prompts is 0 on average where there is none. For intervals, prompts are drawn within each half, which takes
        four. On side -1 the result is the largest decrease, as a negative number.

        Args:
            max_kl: largest budget in nats; by default `common_kl` of the curve on this side.
            measure: by default `effect` of the curve.
        """
        curve, side = self.curve, self.side
        limit = curve.common_kl(side) if max_kl is None else max_kl
        if reason := self._missing(limit):
            return Estimate(NAN, reason=reason)
        if curve._n_clusters < 2:
            return Estimate(NAN, reason="it takes two prompts, or two texts")
        halves = [np.where(half, curve._weights_in_halves, 0.0) for half in curve._halves]
        pair = (Measure.of(measure or curve.effect), Measure("kl"))
        gains, costs = ([curve._read(one, half)[self.points] for half in halves] for one in pair)
        areas = [mean_gain(side * gains[i], costs[i], limit, side * gains[1 - i]) for i in (0, 1)]
        found = side * np.mean(areas, axis=0) + 0.0
        return make_estimates(found[:1], found[None, 1:], curve._n_clusters, n_groups=2)[0]

    def best(self) -> BestPoint:
        """The strength with the best balance of effect and fluency, chosen on half of the prompts, scored on the
        others.

        It is chosen on half of the prompts (every second one); `BestPoint` defines the score.
        """
        if not self.points or len(self.curve.prompts) < 2:
            return BestPoint.none("it takes two prompts" if self.points else NO_STRENGTH)
        effect, fluency = self._weigh(self.curve._halves.astype(float))
        score = 2 * effect * fluency / np.maximum(effect + fluency, 1e-12)
        i = self.points[int(np.nan_to_num(score[self.points, 0]).argmax())]
        if not score[i, 0] > 0:
            return BestPoint.none("no strength has an effect on this side")
        low, high = self._judge(i)
        return BestPoint(
            strength=self.curve.points[i][1],
            score=float(score[i, 1]),
            effect=float(effect[i, 1]),
            fluency=float(fluency[i, 1]),
            chosen_score=float(score[i, 0]),
            effect_low=low,
            effect_high=high,
        )

    def _missing(self, goal: float) -> str:
        """Why nothing can be looked up; empty where it can."""
        if not self.points:
            return NO_STRENGTH
        return "no KL that all sources reach" if goal != goal else ""

    def _along(
        self, measure: AnyMeasure | None, goal: float, read: Callable[[np.ndarray, np.ndarray], np.ndarray]
    ) -> Estimate:
        """The result of `read` on a measure and KL along the strengths, with its interval; `goal` is the value looked
        up.
        """
        if reason := self._missing(goal):
            return Estimate(NAN, reason=reason)
        curve, wanted = self.curve, Measure.of(measure or self.curve.effect)
        line, pair = self.points, (wanted, Measure("kl"))
        ends = [np.concatenate([curve.values(x)[line, None], curve.draws(x)[line]], 1) for x in pair]
        found = read(*ends)
        if found[0] != found[0]:
            gain, cost = (end[:, 0] for end in ends)
            reached = f"KL up to {cost.max():.3g}, {wanted} {gain.min():.3g} to {gain.max():.3g}"
            reason = f"its strengths on this side do not reach {goal:g}: {reached}"
        return make_estimates(found[:1], found[None, 1:], curve._n_clusters, reason)[0]

    def _judge(self, point: int) -> tuple[float, float]:
        """The interval of a point's effect on the second half of the prompts."""
        curve = self.curve
        gain = self.side * curve._read(curve.effect, np.where(curve._halves[1], curve._weights_in_halves, 0.0))[[point]]
        [found] = make_estimates(gain[:, 0], gain[:, 1:], int(curve._halves[1].sum()))
        low, high = (min(x, 1) if curve.effect.extra else 1 - np.exp(-x) for x in (found.low, found.high))
        return float(low), float(high)

    def _weigh(self, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Effect and fluency in [0, 1] of every point under weights of prompts."""
        read, effect = self.curve._read, self.curve.effect
        gain = np.maximum(self.side * read(effect, weights), 0)
        losses = (Measure("nll", extra=True), Measure("repetition", extra=True))
        nll, repeated = (np.maximum(read(one, weights), 0) for one in losses)
        return np.minimum(gain, 1) if effect.extra else 1 - np.exp(-gain), np.exp(-nll) * (1 - repeated)

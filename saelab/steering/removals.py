"""`Removal`: result of `ablate_concept`: probe accuracies and losses after each edit."""

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from saelab.steering.erasing import Edit
from saelab.stores.results import Result, align_columns


@dataclass(frozen=True, kw_only=True)
class ProbedConcept:
    """Held-out scores of a probe for one concept, retrained on edited activations."""

    concept: str
    accuracy: float
    """balanced accuracy at the threshold chosen in training; 0.5 is chance"""
    auroc: float
    """0.5 is chance"""


@dataclass(frozen=True, kw_only=True)
class RemovalScore:
    """Probe accuracies and losses under one edit."""

    name: str
    n: int
    """number of features (with sign), or directions, removed"""
    concept: ProbedConcept
    others: tuple[ProbedConcept, ...]
    loss_without: float
    """nats a token where the concept is not present: the collateral damage"""
    loss_with: float
    """nats a token where it is present"""
    size: float
    """mean squared change over mean squared activation, of tokens without the concept"""

    @property
    def accuracy_of_others(self) -> float:
        """Mean balanced accuracy over the other concepts."""
        return float(np.mean([one.accuracy for one in self.others])) if self.others else float("nan")


@dataclass(frozen=True, kw_only=True)
class Removal(Result):
    """Result of `ablate_concept`, one row for each edit; the first row, `untouched`, is the unmodified model."""

    concept: str
    hook_point: str
    """where activations are edited"""
    read_at: str
    """where probes are trained"""
    rows: tuple[RemovalScore, ...]
    features: tuple[int, ...]
    """features removed by "features"."""
    signs: tuple[int, ...]
    """signs of their codes"""
    rate: float
    """share of held-out tokens with the concept"""
    n_train: int
    """tokens that probes are fitted to"""
    n_tokens: int
    """held-out tokens that probes are tested on"""
    n_predictions: int
    """number of held-out predictions that `loss_without` averages"""
    edits: dict[str, Edit] = field(repr=False)
    """by name, for `sl.splice(model, {hook_point: edit})`; not saved"""

    def __getitem__(self, name: str) -> RemovalScore:
        for row in self.rows:
            if row.name == name:
                return row
        raise KeyError(f"Must be one of {[row.name for row in self.rows]}, got '{name}'.")

    def harmed(self, name: str, n: int = 5) -> tuple[tuple[str, float], ...]:
        """The `n` other concepts that lost most accuracy by an edit, and how much each lost."""
        before = {one.concept: one.accuracy for one in self.rows[0].others}
        lost = [(one.concept, before[one.concept] - one.accuracy) for one in self[name].others]
        return tuple(sorted(lost, key=lambda pair: -pair[1])[:n])

    def to_dict(self) -> dict[str, Any]:
        """Every field but the edits, ready for JSON."""
        found: dict[str, Any] = Result.to_dict(replace(self, edits={}))
        del found["edits"]
        return found

    def __str__(self) -> str:
        first = self.rows[0]
        lines = [
            f"{self.concept} ({self.rate:.2%} of tokens) taken out at {self.hook_point}, probed at {self.read_at}: "
            f"fresh probes of {self.n_train:,} tokens, tested on {self.n_tokens:,} of other documents; "
            f"{len(first.others)} other concepts; {self.n_predictions:,} predictions without it",
        ]
        table = [["", "n", "accuracy", "AUROC", "others", "worst", "loss without", "with", "size"]]
        for row in self.rows:
            worst = self.harmed(row.name, 1) if row is not first else ()
            sign, base = ("", 0) if row is first else ("+", 1)
            cells = [
                f"{row.accuracy_of_others - base * first.accuracy_of_others:{sign}.3f}",
                f"{-worst[0][1]:+.3f}" if worst else "",
                f"{row.loss_without - base * first.loss_without:{sign}.4f}",
                f"{row.loss_with - base * first.loss_with:{sign}.3f}",
                f"{row.size:.4f}",
            ]
            table.append([row.name, str(row.n), f"{row.concept.accuracy:.3f}", f"{row.concept.auroc:.3f}", *cells])
        return "\n".join(
            [*lines, *align_columns(table), "others, worst and losses of edits are changes from the first row"]
        )


def average_scores(name: str, scores: list[RemovalScore]) -> RemovalScore:
    """The mean of scores over random draws, as one row."""

    def mean(values: list[float]) -> float:
        return float(np.mean(values))

    def pool(some: list[ProbedConcept]) -> ProbedConcept:
        accuracy, auroc = mean([one.accuracy for one in some]), mean([one.auroc for one in some])
        return ProbedConcept(concept=some[0].concept, accuracy=accuracy, auroc=auroc)

    return RemovalScore(
        name=name,
        n=scores[0].n,
        concept=pool([score.concept for score in scores]),
        others=tuple(pool(list(some)) for some in zip(*(score.others for score in scores), strict=True)),
        loss_without=mean([score.loss_without for score in scores]),
        loss_with=mean([score.loss_with for score in scores]),
        size=mean([score.size for score in scores]),
    )
